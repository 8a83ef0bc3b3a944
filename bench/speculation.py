"""Measure speculation: one target decoding plainly and with drafts, in turns; benchmark.py drives it.

Random weights have no drafts worth accepting. For them each draft is accepted by chance, which times the machinery and
writes nonsense; that is here, and no command of the project can reach it.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_model, random_model, read_config
from generate import generate
from model import Transformer
from scripts.measure import GREEDY, PROMPT, decode_mode, seconds, step_at
from speculate import (
    Speculation,
    accept,
    count_leading,
    draft,
    draft_and_verify,
    expected_tokens,
    levels_below,
    verify,
)
from steps import compiled, decode, likeliest, prefill, visible_slots
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


compiled_once = cache(compiled)  # duels share their graphs


@dataclass
class Duel:
    """Decode of one target, plain and with speculation, in turns."""

    name: str
    target: Transformer
    draft_model: Transformer
    prompts: list[list[int]]
    num_tokens: int  # after each of them
    accept: Callable[..., tuple[Tensor, Tensor]] = accept
    levels: list[tuple[int, ...]] = field(default_factory=list)  # a speculation each: one number is a fixed k
    eager: bool = False
    num_taken: int = 0

    def __post_init__(self) -> None:
        self.device = str(self.target.device)
        mode = decode_mode(self.device)
        make = (lambda step, mode=None: step) if self.eager else compiled_once

        def accepting(step: Callable[..., Any]) -> Callable[..., Any]:
            return make(step if self.accept is accept else partial(step, accept=self.accept), mode)

        self.run_prefill, self.run_decode = make(prefill), make(decode, mode)
        self.run_round = accepting(draft_and_verify)
        self.run_draft, self.run_verify = make(draft, mode), accepting(verify)  # its parts, to be timed
        self.max_k = max(max(levels) for levels in self.levels)

    def setup_caches(self) -> None:
        length = 64 * (2 + (max(map(len, self.prompts)) + self.num_tokens + self.max_k) // 64)
        for model in (self.target, self.draft_model):
            model.setup_caches(1, length)

    def warm_up(self) -> None:
        """Run each number of drafts once, which compiles it."""
        for k in {k for levels in self.levels for k in levels if k}:
            self.take((k,), 4 * (k + 1))
        for levels in self.levels:
            self.costs(levels, 1)

    def take(self, levels: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
        """Decode, with as many drafts as `levels` allows; none is plain decoding."""
        speculation = Speculation(
            self.draft_model, self.max_k, levels, draft_and_verify=self.run_round, prefill=self.run_prefill
        )
        torch.manual_seed(self.num_taken)  # where chance accepts, the n-th sample of every duel has the same luck
        self.num_taken += 1
        elapsed, num_timed, num_drafted, counts = 0.0, 0, 0, [0] * (self.max_k + 1)
        for prompt in self.prompts:
            steps = generate(
                self.target, [prompt], num_tokens, GREEDY, prefill=self.run_prefill, decode=self.run_decode,
                speculation=speculation if levels else None,
            )  # fmt: skip
            arrivals, lengths = zip(*((time.perf_counter(), len(ids)) for [ids] in steps), strict=True)
            # From the first round's end, since it prefills the draft, to the last but one's, since that may be cut.
            elapsed += arrivals[-2] - arrivals[1]
            num_timed += sum(lengths[2:-1])
            [taken] = speculation.accept_counts if levels else [[len(arrivals) - 1]]
            counts = [*map(sum, zip_longest(counts, taken, fillvalue=0))]
            num_drafted += speculation.num_drafted if levels else 0
        return {"tok_per_s": num_timed / elapsed, "accept_counts": counts, "num_drafted": num_drafted}

    @torch.inference_mode()
    def costs(self, levels: tuple[int, ...], count: int) -> dict[str, float]:
        """Time a plain step and the two parts of a round, each in a run of its own, half-way in a text."""
        if len(levels) != 1:
            return {}
        [k] = levels
        end = len(self.prompts[0]) + self.num_tokens // 2
        tokens, at = torch.tensor([[1, 1]], device=self.device), torch.tensor([[end - 2, end - 1]], device=self.device)
        slots = visible_slots(torch.arange(self.target.max_seq_length, device=self.device), end + k)
        drafting = self.draft_model, tokens, at, slots, GREEDY, None, k, self.target.config.vocab_size
        drafted, _ = self.run_draft(*drafting)
        parts = {
            "decode_ms": step_at(self.target, self.run_decode, end - 1),
            "draft_ms": lambda: self.run_draft(*drafting),
            "verify_ms": lambda: self.run_verify(self.target, tokens, at, slots, drafted, GREEDY, None, None),
        }
        return {
            name: statistics.median(seconds(part, self.device) * 1e3 for _ in range(count))
            for name, part in parts.items()
        }

    def run(self, num_samples: int) -> list[dict[str, Any]]:
        self.setup_caches()
        self.warm_up()
        rungs: list[tuple[int, ...]] = [(), *self.levels]
        samples: dict[tuple[int, ...], list[dict[str, Any]]] = {rung: [] for rung in rungs}
        for turn in range(num_samples + 1):
            for rung, taken in samples.items():
                sample = self.take(rung, self.num_tokens) | self.costs(rung, self.num_tokens // 8)
                if turn > 0:  # the first warms up
                    taken.append(sample)
        return [self.summary(rung, taken, samples[()]) for rung, taken in samples.items()]

    def summary(self, levels: tuple[int, ...], samples: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Any:
        # By turns, since the machine's own speed moves between them.
        speedups = [one["tok_per_s"] / other["tok_per_s"] for one, other in zip(samples, plain, strict=True)]
        entry: dict[str, Any] = {"target": self.name, "levels": levels, "samples": samples}
        entry |= {"tok_per_s": statistics.median(sample["tok_per_s"] for sample in samples)}
        entry |= {"speedup": statistics.median(speedups)}
        if len(levels) != 1:
            return entry
        [k] = levels
        figures = [formula(sample, k) for sample in samples]
        entry |= {"k": k} | {name: statistics.median(each[name] for each in figures) for name in figures[0]}
        shares = [speedup / each["formula"] for speedup, each in zip(speedups, figures, strict=True)]
        return entry | {"share_of_formula": statistics.median(shares)}


def formula(sample: dict[str, Any], k: int) -> dict[str, float]:
    """Return what the paper's formula promises (section 3.3), and what it is made of."""
    accepted = sum(n * count for n, count in enumerate(sample["accept_counts"]))
    full, rounds = sample["accept_counts"][k], sample["num_drafted"] // k  # where a plain step ends a text it is none
    a = accepted / (accepted + rounds - full)
    c = sample["draft_ms"] / k / sample["decode_ms"]
    verify_steps = sample["verify_ms"] / sample["decode_ms"]
    return {"a": a, "c": c, "verify_steps": verify_steps, "formula": expected_tokens(a, k) / (c * k + 1)}


def make_duels(
    raw: dict[str, Any], name: str, device: str, dtype: torch.dtype, num_tokens: int, ks: list[int]
) -> Iterator[Duel]:
    """Make the duels of the demo, with real drafts, and of the config `raw`, with drafts by chance."""
    demo, demo_draft = ROOT / "checkpoints" / "demo", ROOT / "checkpoints" / "demo-draft"
    prompts = [load_tokenizer(demo).encode(text) for text in TEXTS]
    fixed = [(k,) for k in ks]
    adaptive, short, long = levels_below(max(ks)), max(SHORTEST, num_tokens), max(200, num_tokens)
    target, draft_model = load_model(demo, device), load_model(demo_draft, device)
    random_draft = random_model(read_config(demo_draft), device)
    for eager in (True, False):
        how, levels = "eager" if eager else "compiled", [*fixed, adaptive]
        yield Duel(f"demo, its draft, {how}", target, draft_model, prompts, long, levels=levels, eager=eager)
        yield Duel(f"demo, a random draft, {how}", target, random_draft, prompts, long, levels=[adaptive], eager=eager)
    target = random_model(raw, device, dtype)
    draft_model = random_model(raw | {"num_hidden_layers": 2}, device, dtype, seed=1)
    by_chance = f"{name}, 2 layers of it, each draft accepted with probability {ACCEPTANCE}"
    yield Duel(by_chance, target, draft_model, [PROMPT], short, accept_by_chance, [*fixed, adaptive])
    yield Duel(f"{name}, 2 random layers", target, draft_model, [PROMPT], long, levels=[adaptive])


def describe(entry: dict[str, Any]) -> str:
    what = f"k {entry['levels']}" if entry["levels"] else "plain"
    text = f"  {what:20} {entry['tok_per_s']:8.2f} tok/s  {entry['speedup']:5.2f}x"
    if "formula" in entry:
        text += "  a {a:.2f}  c {c:.2f}  verify {verify_steps:.2f} steps  formula {formula:.2f}x".format(**entry)
        text += f"  {entry['share_of_formula']:.0%} of it"
    return text
