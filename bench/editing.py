"""Decoding a text that is known before: what drafts found in the text are worth, whatever a model's taste.

The target computes as ever; then the known text says what it chose. bench.run --only editing measures it.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.results import ROOT
from bench.rung import Rung
from bench.runner import Runner, Steps
from drafters import LOOKUP_K, Lookup, levels_below
from speculate import count_leading
from tokenizer import load_tokenizer

NUM_CHANGES = 10
FILE_IDS, FREE_IDS = 2000, 512  # of the file to repeat, and of a text without a copy
LENGTH = 2 * FILE_IDS + 512  # of the caches


@dataclass(frozen=True)
class Replay:
    """Steps that choose what a text says, [N] ids and some more to draft behind its end."""

    steps: Steps
    text: Tensor

    def prefill(self, model: Any, tokens: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        self.steps.prefill(model, tokens, positions, *rest)
        return self.text[positions[:, -1] + 1]

    def decode(self, model: Any, tokens: Tensor, positions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        self.steps.decode(model, tokens, positions, *rest)
        return self.text[positions + 1], positions + 1

    def draft_and_verify(
        self, model: Any, tokens: Tensor, positions: Tensor, slots: Tensor, drafts: Tensor, k: int, *rest: Any
    ) -> Tensor:
        self.steps.draft_and_verify(model, tokens, positions, slots, drafts, k, *rest)
        following = self.text[positions[:, -1:] + torch.arange(1, k + 2, device=positions.device)]
        return torch.cat((count_leading(drafts == following[:, :-1]).unsqueeze(1), following), dim=1)


class Ngrams:
    """Where each n-gram of a text last ended: prompt lookup as it mostly is, to compare `suffix.Suffixes` with."""

    SIZES = (3, 2)

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # of those before the text's last

    def extend(self, ids: list[int]) -> None:
        for i in ids:
            self.ends |= {tuple(self.ids[-size:]): len(self.ids) for size in self.SIZES if len(self.ids) >= size}
            self.ids.append(i)

    def continuation(self, most: int) -> list[int]:
        ends = [self.ends[gram] for size in self.SIZES if (gram := tuple(self.ids[-size:])) in self.ends]
        period = len(self.ids) - ends[0] if ends else 0
        return [self.ids[ends[0] + i % period] for i in range(most)] if ends else []


def change(lines: list[str]) -> list[str]:
    """Return lines with NUM_CHANGES changes, evenly spread: a word is another, a line is gone, a line is new."""
    lines = list(lines)
    for n in reversed(range(NUM_CHANGES)):  # from the end, so that the places before it stay
        at = (2 * n + 1) * len(lines) // (2 * NUM_CHANGES)
        longest = max(re.findall(r"\w+", lines[at]), key=len, default="")
        lines[at : at + 1] = [
            [lines[at].replace(longest, f"other_{n}") if longest else f"other_{n}\n"],
            [],
            [lines[at], f"    # and {n} more\n"],
        ][n % 3]
    return lines


def make_texts() -> dict[str, tuple[list[int], list[int]]]:
    """Return prompts and what follows them, in the demo's ids: a file and the file changed, prose, and noise."""
    tokenizer = load_tokenizer(ROOT / "checkpoints" / "demo")

    def encode(lines: list[str]) -> list[int]:
        return tokenizer.encode("".join(lines), bos=False)

    lines = (ROOT / "engine.py").read_text().splitlines(keepends=True)
    while len(file := encode(lines)) > FILE_IDS:
        lines.pop()
    prose = encode([(ROOT / "docs" / "design.md").read_text()])[: 2 * FREE_IDS]
    noise = torch.randint(tokenizer.vocab_size, (FREE_IDS,), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "editing": (file, encode(change(lines))),
        "prose": (prose[:FREE_IDS], prose[FREE_IDS:]),
        "no repetition": (prose[:64], noise),
    }


class Rewriting:
    """Decode of one known text, with drafts that are found in it."""

    def __init__(self, runner: Runner, prompt: list[int], answer: list[int], make_drafter: Callable[[], Lookup] | None):
        self.prompt, self.answer, self.make_drafter = prompt, answer, make_drafter
        replay = Replay(runner.steps, torch.tensor(prompt + answer + [0] * 64, device=runner.device))
        known = {name: getattr(replay, name) for name in ("prefill", "decode", "draft_and_verify")}
        self.runner = replace(runner, steps=replace(runner.steps, **known))
        self.num_forwards = 0

    def run(self) -> float:
        """Return tokens a second, from the first token on."""
        options: dict[str, Any] = {}
        if self.make_drafter:
            options["speculation"] = speculation = self.runner.speculation(None)
            speculation.drafter = self.make_drafter()
        arrivals, ids = [], []
        for [new_ids] in self.runner.generate([self.prompt], len(self.answer), **options):
            arrivals.append(time.perf_counter())
            ids += new_ids
        assert ids == self.answer, "another text was written"
        self.num_forwards = len(arrivals) - 1
        return (len(ids) - 1) / (arrivals[-1] - arrivals[0])

    def tokens_per_forward(self) -> float:
        """Return how many tokens each of the target's forwards gave, of those that `run` took last."""
        return (len(self.answer) - 1) / self.num_forwards


DRAFTERS: dict[str, Callable[[], Lookup] | None] = {
    "plain": None,
    "n-grams": lambda: Lookup(levels_below(5), [Ngrams()]),  # type: ignore[list-item]
    "suffixes": lambda: Lookup(levels_below(LOOKUP_K)),
}


def make_rungs(name: str, weights: str, runner: Runner) -> Iterator[Rung]:
    for task, (prompt, answer) in make_texts().items():
        for how, make_drafter in DRAFTERS.items():
            rewriting = Rewriting(runner, prompt, answer, make_drafter)
            title, plain = f"{name}, {task}, {how}", f"{name}, {task}, plain"
            yield Rung(title, "tok/s", rewriting.run, weights, against=plain if make_drafter else "")
            if make_drafter:
                yield Rung(f"{title}, a forward", "tok", rewriting.tokens_per_forward, weights)
