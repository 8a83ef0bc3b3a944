"""The rungs that run in one process, such as decode, prefill and positions, for every form of the weights.

bench.run measures them.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial

from bench import anatomy, editing, products, speculation
from bench.rung import Rung
from bench.runner import PROMPT, Runner, make_steps
from bench.subject import Subject
from checkpoint import meta_model, random_model
from config import quantization_scheme
from drafters import levels_below
from kernels import cpu
from model import Ranks, Transformer
from tp import draft_ranks

PREFILL = (128, 512, 2048)
POSITIONS = (128, 2048, 8192)
LONGEST = max(POSITIONS) + 64
VERIFIED = 5  # tokens in one forward
ROWS = 8  # of a batch
MODES = ("eager", "compile")


BUSY = """import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
while True:
    pass"""


def beside_another(measure: Callable[[], float]) -> Callable[[], float]:
    """Return what measures beside a program that keeps the last of the cores busy."""

    def beside() -> float:
        with subprocess.Popen([sys.executable, "-c", BUSY]) as other:
            try:
                time.sleep(0.5)  # until it runs
                return measure()
            finally:
                other.kill()

    return beside


def on_openmp(model: Transformer, measure: Callable[[], float]) -> float:
    had_own = model in cpu.served
    cpu.served.discard(model)
    try:
        return measure()
    finally:
        if had_own:
            cpu.served.add(model)


class Ladder:
    """The groups of rungs, and the models that they share."""

    def __init__(self, subject: Subject, device: str, ranks: Ranks, new_tokens: int, max_k: int):
        self.subject, self.device, self.ranks = subject, device, ranks
        self.new_tokens, self.max_k = new_tokens, max_k
        # One length for all, since the compiled steps are made for it.
        self.length = 64 * (2 + max(new_tokens, speculation.SHORTEST, *PREFILL) // 64)

    @cached_property
    def models(self) -> dict[str, Transformer]:
        forms, dtype = self.subject.forms, self.subject.dtype
        return {name: random_model(form, self.device, dtype, ranks=self.ranks) for name, form in forms.items()}

    def runner(self, mode: str, weights: str, length: int = 0, num_rows: int = 1) -> Runner:
        return Runner(self.models[weights], make_steps(mode, self.device), length or self.length, num_rows)

    def ways(self) -> Iterator[tuple[str, str, str]]:
        """Yield every way to run every form of the weights: what its rungs are called, its mode and its scheme."""
        for mode in MODES:
            for weights in self.models:
                yield f"{mode}, {weights}" if weights else mode, mode, weights

    def products(self) -> Iterator[Rung]:
        return products.make_rungs(self.subject, self.device)

    def kernels(self) -> Iterator[Rung]:
        return anatomy.kernel_rungs(self.long_runners())

    def options(self) -> Iterator[Rung]:
        return anatomy.option_rungs(self.long_runners(), self.device)

    def long_runners(self) -> dict[str, Runner]:
        """Return the compiled runners as the positions have them, whose graphs inductor has kept."""
        return {weights: self.runner("compile", weights, LONGEST) for weights in self.models}

    def decode(self) -> Iterator[Rung]:
        for name, mode, weights in self.ways():
            runner = self.runner(mode, weights)
            read = runner.count_step_bytes(len(PROMPT) + self.new_tokens // 2 - 1)  # of a text half as long as it gets
            against = "eager" if name != "eager" else ""
            yield Rung(name, "tok/s", partial(runner.decode, self.new_tokens), weights, read, against=against)
        for weights in self.models:
            name = f"compile, {weights}" if weights else "compile"
            yield Rung(f"{name} + speculation", "tok/s", self.speculating(weights), weights, against=name)

    def speculating(self, weights: str) -> Callable[[], float]:
        """Return a measurement of decode with drafts of 2 layers in the same weights, accepted by chance."""
        raw = self.subject.forms[weights]
        raw = raw | {"num_hidden_layers": min(2, raw["num_hidden_layers"])}
        small = meta_model(raw)
        shared_by = draft_ranks(small.config, quantization_scheme(raw), small.step_weight_bytes, self.ranks)
        num_tokens, levels = max(speculation.SHORTEST, self.new_tokens), levels_below(self.max_k)
        draft_model = random_model(raw, self.device, self.subject.dtype, seed=1, ranks=shared_by)
        runner = self.runner("compile", weights)
        way = speculation.Way("", runner, draft_model, levels=levels)
        duel = speculation.Duel("", [way], [PROMPT], num_tokens, speculation.accept_by_chance)
        return lambda: duel.sample(way, 0, 0)["tok_per_s"]

    def beside(self) -> Iterator[Rung]:
        """Decode with the cores to itself, and beside a busy program on one of them, on our threads and on OpenMP's."""
        for name, mode, weights in self.ways():
            ours = partial(self.runner(mode, weights).decode, self.new_tokens)
            openmp = partial(on_openmp, self.models[weights], ours)
            for place, where in (("alone", partial), ("beside another", beside_another)):
                yield Rung(f"{name}, {place}", "tok/s", where(ours), weights)
                yield Rung(f"{name}, {place}, OpenMP", "tok/s", where(openmp), weights, against=f"{name}, {place}")

    def editing(self) -> Iterator[Rung]:
        for name, mode, weights in self.ways():
            yield from editing.make_rungs(name, weights, self.runner(mode, weights, editing.LENGTH))

    def batch(self) -> Iterator[Rung]:
        for name, mode, weights in self.ways():
            for num_rows in (1, ROWS):
                run = partial(self.runner(mode, weights, num_rows=num_rows).decode, self.new_tokens)
                against = f"{name}, batch of 1" if num_rows > 1 else ""
                yield Rung(f"{name}, batch of {num_rows}", "tok/s", run, weights, against=against)

    def prefill(self) -> Iterator[Rung]:
        for size in PREFILL:
            for name, mode, weights in self.ways():
                runner = self.runner(mode, weights)
                run, flops = partial(runner.prefill, size), runner.count_prefill_flops(size)
                yield Rung(f"{name}, prefill of {size}", "tok/s", run, weights, flops=flops)

    def positions(self) -> Iterator[Rung]:
        for name, mode, weights in self.ways():
            runner = self.runner(mode, weights, LONGEST)
            for position in POSITIONS:
                run, read = partial(runner.time_step, position), runner.count_step_bytes(position)
                first = f"{name}, step at {POSITIONS[0]}" if position != POSITIONS[0] else ""
                yield Rung(f"{name}, step at {position}", "ms", run, weights, read, against=first)
        for mode in MODES:
            first, run = f"{mode}, step at {POSITIONS[0]}", partial(self.runner(mode, "", 256).time_step, POSITIONS[0])
            yield Rung(f"{first}, cache of 256 instead of {LONGEST}", "ms", run, against=first)

    def verify(self) -> Iterator[Rung]:
        for name, mode, weights in self.ways():
            runner, first = self.runner(mode, weights), f"{name}, 1 token"
            yield Rung(first, "ms", partial(runner.time_step, 128), weights)
            run = partial(runner.time_verify, 129, VERIFIED - 1)
            yield Rung(f"{name}, verify of {VERIFIED} tokens", "ms", run, weights, against=first)
