"""Speculation: one target decoding plainly and with drafts, in turns; bench.run --speculate measures it.

Random weights have no drafts worth accepting. For them each draft is accepted by chance, which times the machinery and
writes nonsense; that is here, and no command of the project can reach it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import speculate
from bench.results import ROOT
from bench.runner import GREEDY, PROMPT, Runner, make_steps, time_call
from bench.subject import Subject
from checkpoint import load_model, random_model
from config import read_config
from drafters import expected_tokens, levels_below
from model import Transformer
from speculate import count_leading
from steps import likeliest
from tokenizer import load_tokenizer

ACCEPTANCE = 0.7
SHORTEST = 128  # tokens of a sample: fewer are a matter of luck
# Several beginnings for the demo, which after a while repeats itself: then a draft is always right, or always wrong.
TEXTS = [
    "class Stack:\n    def __init__(self, items=None):\n",
    "def ",
    "import os\nimport sys\n\ndef main(",
    "    def test_",
    'class Parser(object):\n    """',
    "def read_file(path):\n    ",
    "for i in range(",
    "    if not isinstance(",
]


def accept_by_chance(
    logits: Tensor, drafted: Tensor, q: Tensor | None, sampling: Any, noise: Any
) -> tuple[Tensor, Tensor]:
    """Accept each draft with probability ACCEPTANCE, whatever it is; the id that follows is the target's choice."""
    accepted = torch.rand(drafted.shape, device=drafted.device) < ACCEPTANCE
    return count_leading(accepted), torch.where(F.pad(accepted, (0, 1)), F.pad(drafted, (0, 1)), likeliest(logits))


@dataclass
class Duel:
    """Decode of one target, plain and with speculation, in turns."""

    name: str
    target: Transformer
    draft_model: Transformer
    prompts: list[list[int]]
    num_tokens: int  # after each of them
    levels: list[tuple[int, ...]]  # a speculation each: one number is a fixed k
    mode: str = "compile"
    accept: Callable[..., tuple[Tensor, Tensor]] = speculate.accept
    length: int = 0  # of the caches; 0: as long as the texts need
    num_samples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.max_k = max(max(levels) for levels in self.levels)
        needed = max(map(len, self.prompts)) + self.num_tokens + self.max_k
        length = self.length or 64 * (2 + needed // 64)
        self.runner = Runner(self.target, make_steps(self.mode, str(self.target.device)), length)
        self.draft_model.setup_caches(1, length)

    def warm_up(self) -> None:
        """Run each number of drafts once, which compiles it."""
        for k in {k for levels in self.levels for k in levels if k}:
            self.sample((k,), 4 * (k + 1))
        for levels in self.levels:
            self.time_parts(levels, 1)

    def sample(self, levels: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
        """Decode, with as many drafts as `levels` allows; none is plain decoding."""
        speculation = self.runner.speculation(self.draft_model, max_k=self.max_k, levels=levels) if levels else None
        torch.manual_seed(self.num_samples)  # where chance accepts, the n-th sample of every duel has the same luck
        self.num_samples += 1
        elapsed, num_timed, num_drafted, counts = 0.0, 0, 0, [0] * (self.max_k + 1)
        for prompt in self.prompts:
            steps = self.runner.generate([prompt], num_tokens, speculation=speculation)
            with patch.object(speculate, "accept", self.accept):
                arrivals, lengths = zip(*((time.perf_counter(), len(ids)) for [ids] in steps), strict=True)
            # From the first round's end, since it prefills the draft, to the last but one's, since that may be cut.
            elapsed += arrivals[-2] - arrivals[1]
            num_timed += sum(lengths[2:-1])
            [row_counts] = speculation.accept_counts if speculation else [[len(arrivals) - 1]]
            counts = [*map(sum, zip_longest(counts, row_counts, fillvalue=0))]
            num_drafted += speculation.num_drafted if speculation else 0
        return {"tok_per_s": num_timed / elapsed, "accept_counts": counts, "num_drafted": num_drafted}

    @torch.inference_mode()
    def time_parts(self, levels: tuple[int, ...], count: int) -> dict[str, float]:
        """Time a plain step and the two parts of a round, each in a run of its own, half-way in a text."""
        if len(levels) != 1:
            return {}
        [k] = levels
        runner, vocab_size = self.runner, self.target.config.vocab_size
        end = len(self.prompts[0]) + self.num_tokens // 2
        drafting = self.draft_model, *runner.last_two(end, k), GREEDY, None, k, vocab_size
        drafted, _ = runner.steps.draft(*drafting)
        parts = {
            "decode_ms": runner.step_at(end - 1),
            "draft_ms": lambda: runner.steps.draft(*drafting),
            "verify_ms": runner.verify_at(end, drafted),
        }
        with patch.object(speculate, "accept", self.accept):
            return {
                name: statistics.median(time_call(part, runner.device) * 1e3 for _ in range(count))
                for name, part in parts.items()
            }

    def run(self, num_samples: int) -> list[dict[str, Any]]:
        self.warm_up()
        rungs: list[tuple[int, ...]] = [(), *self.levels]
        samples: dict[tuple[int, ...], list[dict[str, Any]]] = {rung: [] for rung in rungs}
        for turn in range(num_samples + 1):
            for rung in rungs:
                sample = self.sample(rung, self.num_tokens) | self.time_parts(rung, self.num_tokens // 8)
                if turn > 0:  # the first warms up
                    samples[rung].append(sample)
        return [self.summarize(rung, samples[rung], samples[()]) for rung in rungs]

    def summarize(self, levels: tuple[int, ...], samples: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Any:
        # By turns, since the machine's own speed moves between them.
        figures = [{"tok_per_s": mine["tok_per_s"], "speedup": mine["tok_per_s"] / other["tok_per_s"]}
                   for mine, other in zip(samples, plain, strict=True)]  # fmt: skip
        if len(levels) == 1:
            for figure, sample in zip(figures, samples, strict=True):
                figure |= apply_formula(sample, levels[0])
                figure["share_of_formula"] = figure["speedup"] / figure["formula"]
        entry: dict[str, Any] = {"target": self.name, "levels": levels, "samples": samples}
        entry |= {"k": levels[0]} if len(levels) == 1 else {}
        return entry | {name: statistics.median(figure[name] for figure in figures) for name in figures[0]}


def apply_formula(sample: dict[str, Any], k: int) -> dict[str, float]:
    """Return what the paper's formula promises (section 3.3), and what it is made of."""
    accepted = sum(n * count for n, count in enumerate(sample["accept_counts"]))
    full, rounds = sample["accept_counts"][k], sample["num_drafted"] // k  # where a plain step ends a text it is none
    a = accepted / (accepted + rounds - full)
    c = sample["draft_ms"] / k / sample["decode_ms"]
    verify_steps = sample["verify_ms"] / sample["decode_ms"]
    return {"a": a, "c": c, "verify_steps": verify_steps, "formula": expected_tokens(a, k) / (c * k + 1)}


def make_duels(subject: Subject, device: str, num_tokens: int, ks: list[int]) -> Iterator[Duel]:
    """Make the duels of the demo, with real drafts, and of the subject, with drafts by chance."""
    demo, demo_draft = ROOT / "checkpoints" / "demo", ROOT / "checkpoints" / "demo-draft"
    prompts = [load_tokenizer(demo).encode(text) for text in TEXTS]
    adaptive, short, long = levels_below(max(ks)), max(SHORTEST, num_tokens), max(200, num_tokens)
    levels = [*((k,) for k in ks), adaptive]
    target, draft_model = load_model(demo, device), load_model(demo_draft, device)
    random_draft = random_model(read_config(demo_draft), device)
    for mode, how in (("eager", "eager"), ("compile", "compiled")):
        yield Duel(f"demo, its draft, {how}", target, draft_model, prompts, long, levels, mode)
        yield Duel(f"demo, a random draft, {how}", target, random_draft, prompts, long, [adaptive], mode)
    target = random_model(subject.raw, device, subject.dtype)
    draft_model = random_model(subject.raw | {"num_hidden_layers": 2}, device, subject.dtype, seed=1)
    by_chance = f"{subject.name}, 2 layers of it, each draft accepted with probability {ACCEPTANCE}"
    yield Duel(by_chance, target, draft_model, [PROMPT], short, levels, accept=accept_by_chance)
    yield Duel(f"{subject.name}, 2 random layers", target, draft_model, [PROMPT], long, [adaptive])


def describe(entry: dict[str, Any]) -> str:
    what = f"k {entry['levels']}" if entry["levels"] else "plain"
    text = f"  {what:20} {entry['tok_per_s']:8.2f} tok/s  {entry['speedup']:5.2f}x"
    if "formula" in entry:
        text += "  a {a:.2f}  c {c:.2f}  verify {verify_steps:.2f} steps  formula {formula:.2f}x".format(**entry)
        text += f"  {entry['share_of_formula']:.0%} of it"
    return text
