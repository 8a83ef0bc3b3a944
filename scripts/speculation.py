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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_model, random_model, read_config
from generate import generate
from model import Transformer
from scripts.measure import GREEDY, PROMPT, decode_mode, seconds
from speculate import Speculation, accept, count_leading, draft, expected_tokens, levels_below, verify
from steps import compiled, decode, prefill
from tokenizer import load_tokenizer

ACCEPTANCE = 0.7


def accept_by_chance(
    logits: Tensor, drafted: Tensor, q: Tensor | None, sampling: Any, noise: Any
) -> tuple[Tensor, Tensor]:
    """Accept each draft with probability ACCEPTANCE, whatever it is; the id that follows is the target's choice."""
    accepted = torch.rand(drafted.shape, device=drafted.device) < ACCEPTANCE
    num_accepted = count_leading(accepted)
    return num_accepted, logits.argmax(dim=-1).gather(1, num_accepted.unsqueeze(1)).squeeze(1)


compiled_once = cache(compiled)  # duels share their graphs


class Timed:
    """A step that remembers how long each of its calls took."""

    def __init__(self, step: Callable[..., Any], device: str):
        self.step, self.device = step, device
        self.times: list[float] = []

    def __call__(self, *args: Any) -> Any:
        result = None

        def call() -> None:
            nonlocal result
            result = self.step(*args)

        self.times.append(seconds(call, self.device))
        return result


@dataclass
class Duel:
    """Decode of one target, plain and with speculation, in turns."""

    name: str
    target: Transformer
    draft_model: Transformer
    prompt: list[int]
    num_tokens: int
    accept: Callable[..., tuple[Tensor, Tensor]] = accept
    levels: list[tuple[int, ...]] = field(default_factory=list)  # a speculation each: one number is a fixed k
    eager: bool = False
    timed: bool = True  # each step by itself, for which a GPU has to wait after each
    num_taken: int = 0

    def __post_init__(self) -> None:
        mode = decode_mode(str(self.target.device))
        device = str(self.target.device) if self.timed else "cpu"
        make = (lambda step, mode=None: step) if self.eager else compiled_once
        checked = verify if self.accept is accept else partial(verify, accept=self.accept)
        self.run_prefill = make(prefill)
        self.run_decode, self.run_draft = Timed(make(decode, mode), device), Timed(make(draft, mode), device)
        self.run_verify = Timed(make(checked, mode), device)
        self.max_k = max(max(levels) for levels in self.levels)

    def setup_caches(self) -> None:
        length = 64 * (2 + (len(self.prompt) + self.num_tokens + self.max_k) // 64)
        for model in (self.target, self.draft_model):
            model.setup_caches(1, length)

    def warm_up(self) -> None:
        """Run each number of drafts once, which compiles it."""
        for k in {k for levels in self.levels for k in levels if k}:
            self.take((k,), 3)

    def take(self, levels: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
        """Decode, with as many drafts as `levels` allows; none is plain decoding."""
        speculation = Speculation(
            self.draft_model, self.max_k, levels, self.run_draft, self.run_verify, self.run_prefill
        )
        timed = (self.run_decode, self.run_draft, self.run_verify)
        for step in timed:
            step.times.clear()
        torch.manual_seed(self.num_taken)  # where chance accepts, the n-th sample of every duel has the same luck
        self.num_taken += 1
        steps = generate(
            self.target, [self.prompt], num_tokens, GREEDY, prefill=self.run_prefill, decode=self.run_decode,
            speculation=speculation if levels else None,
        )  # fmt: skip
        arrivals = [(time.perf_counter(), len(row)) for [row] in steps]
        [counts] = speculation.accept_counts if levels else [[len(arrivals) - 1]]
        # What the last round gave beyond the text's end counts too: it took its time.
        tokens = sum((n + 1) * count for n, count in enumerate(counts))
        medians = [statistics.median(step.times) * 1e3 if step.times else None for step in timed]
        return {
            "tok_per_s": tokens / (arrivals[-1][0] - arrivals[0][0]),
            "accept_counts": counts,
            "num_drafted": speculation.num_drafted,
            **dict(zip(("decode_ms", "draft_ms", "verify_ms"), medians, strict=True)),
        }

    def run(self, num_samples: int) -> list[dict[str, Any]]:
        self.setup_caches()
        self.warm_up()
        rungs: list[tuple[int, ...]] = [(), *self.levels]
        samples: dict[tuple[int, ...], list[dict[str, Any]]] = {rung: [] for rung in rungs}
        for turn in range(num_samples + 1):
            for rung, taken in samples.items():
                sample = self.take(rung, self.num_tokens)
                if turn > 0:  # the first warms up
                    taken.append(sample)
        return [self.summary(rung, taken, samples[()]) for rung, taken in samples.items()]

    def summary(self, levels: tuple[int, ...], samples: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Any:
        def ratio(key: str, to: str) -> float:
            # By turns, since the machine's own speed moves between them.
            return statistics.median(sample[key] / other[to] for sample, other in zip(samples, plain, strict=True))

        entry: dict[str, Any] = {"target": self.name, "levels": levels, "samples": samples}
        entry |= {"tok_per_s": statistics.median(sample["tok_per_s"] for sample in samples)}
        entry |= {"speedup": ratio("tok_per_s", "tok_per_s")}
        if len(levels) != 1:
            return entry
        [k] = levels
        counts = [sum(column) for column in zip(*(sample["accept_counts"] for sample in samples), strict=True)]
        accepted = sum(n * count for n, count in enumerate(counts))
        a = accepted / (accepted + sum(counts[:k]))
        c = ratio("draft_ms", "decode_ms") / k
        promised = expected_tokens(a, k) / (c * k + 1)
        entry |= {"k": k, "a": a, "c": c, "verify_steps": ratio("verify_ms", "decode_ms")}
        return entry | {"formula": promised, "share_of_formula": entry["speedup"] / promised}


def make_duels(
    raw: dict[str, Any], name: str, device: str, dtype: torch.dtype, num_tokens: int, ks: list[int]
) -> Iterator[Duel]:
    """Make the duels of the demo, with real drafts, and of the config `raw`, with drafts by chance."""
    demo, demo_draft = ROOT / "checkpoints" / "demo", ROOT / "checkpoints" / "demo-draft"
    prompt = load_tokenizer(demo).encode("class Stack:\n    def __init__(self, items=None):\n")
    fixed = [(k,) for k in ks]
    adaptive, long = levels_below(max(ks)), max(800, num_tokens)
    target, draft_model = load_model(demo, device), load_model(demo_draft, device)
    random_draft = random_model(read_config(demo_draft), device)
    for eager in (True, False):
        how, levels = "eager" if eager else "compiled", [*fixed, adaptive]
        yield Duel(f"demo, its draft, {how}", target, draft_model, prompt, long, levels=levels, eager=eager)
        yield Duel(f"demo, a random draft, {how}", target, random_draft, prompt, long, levels=[adaptive], eager=eager)
    target = random_model(raw, device, dtype)
    draft_model = random_model(raw | {"num_hidden_layers": 2}, device, dtype, seed=1)
    by_chance = f"{name}, 2 layers of it, each draft accepted with probability {ACCEPTANCE}"
    yield Duel(by_chance, target, draft_model, PROMPT, num_tokens, accept_by_chance, [*fixed, adaptive])
    yield Duel(f"{name}, 2 random layers", target, draft_model, PROMPT, max(200, num_tokens), levels=[adaptive])


def describe(entry: dict[str, Any]) -> str:
    what = f"k {entry['levels']}" if entry["levels"] else "plain"
    text = f"  {what:20} {entry['tok_per_s']:8.2f} tok/s  {entry['speedup']:5.2f}x"
    if "formula" in entry:
        text += "  a {a:.2f}  c {c:.2f}  verify {verify_steps:.2f} steps  formula {formula:.2f}x".format(**entry)
        text += f"  {entry['share_of_formula']:.0%} of it"
    return text
