"""The rungs that run in one process, such as decode, prefill and positions, for every form of the weights.

bench.run measures them.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from bench import products, speculation
from bench.results import Rung, attempt
from bench.runner import PROMPT, Runner, decode_mode, make_steps
from bench.subject import Subject
from checkpoint import meta_model
from cli.report import step_weight_bytes
from collectives import draft_ranks
from drafters import levels_below
from kernels import cpu
from model import Ranks, Transformer
from steps import compiled, decode

PREFILL = (128, 512, 2048)
POSITIONS = (128, 2048, 8192)
LONGEST = max(POSITIONS) + 64
VERIFIED = 5  # tokens in one forward
ROWS = 8  # of a batch
MODES = ("eager", "compile")
PROFILED, TIMED = 11, 50  # steps at the first position that are taken apart
# Settings of inductor, by the kind of device: each is tried alone, beside those of `steps.compiled`.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "cuda": {
        "no coordinate descent": {"coordinate_descent_tuning": False},
        "combo kernels": {"combo_kernels": True},
        "no fusion for a few bytes": {"score_fusion_memory_threshold": 10},
        "programmatic launch": {"triton.enable_pdl": True},
        "cooperative reductions": {"triton.cooperative_reductions": True},
        "persistent or looped reductions": {"triton.multi_kernel": 1},
    },
    "cpu": {
        "fusion for a few bytes": {"score_fusion_memory_threshold": 1},
        "size assertions": {"size_asserts": True},
        "chunks of 512": {"cpp.min_chunk_size": 512},
    },
}


def beside_another(measure: Callable[[], float]) -> float:
    """Measure beside a program that keeps the last of the cores busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(other.pid, {max(os.sched_getaffinity(0))})
            time.sleep(0.5)  # until it runs
            return measure()
        finally:
            other.kill()


def on_openmp(measure: Callable[[], float]) -> float:
    """Measure while no model has threads of our own."""
    with patch.object(cpu, "served", set()):
        return measure()


def profile_step(step: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """Return what a step spends its time in, the longest first: a GPU's kernels, or a CPU's operators.

    Each time is the median of `PROFILED` steps, of which other work may disturb some. What is left of the step's time
    is between kernels, or on a CPU also what other threads are waited for.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says on stderr when it begins and ends
    on_gpu = device.startswith("cuda")
    step()
    seen: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for _ in range(PROFILED):
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            step()
            if on_gpu:
                torch.cuda.synchronize()
        for kernel in profiler.key_averages():
            if us := kernel.self_device_time_total if on_gpu else kernel.self_cpu_time_total:
                seen[kernel.key].append((us, kernel.count))
    middles = {name: sorted(found)[len(found) // 2] for name, found in seen.items()}
    kernels = [{"name": name, "calls": count, "us": us} for name, (us, count) in middles.items()]
    return sorted(kernels, key=lambda kernel: -kernel["us"])


class Ladder:
    """The groups of rungs, and the models that they share."""

    def __init__(self, subject: Subject, device: str, ranks: Ranks, new_tokens: int, max_k: int):
        self.subject, self.device, self.ranks = subject, device, ranks
        self.new_tokens, self.max_k = new_tokens, max_k
        # One length for all, since the compiled steps are made for it.
        self.length = 64 * (2 + max(new_tokens, speculation.SHORTEST, *PREFILL) // 64)

    @cached_property
    def models(self) -> dict[str, Transformer]:
        return {weights: self.subject.model(weights, self.device, ranks=self.ranks) for weights in self.subject.forms}

    def runner(self, mode: str, weights: str, length: int = 0) -> Runner:
        return Runner(self.models[weights], make_steps(mode, self.device), length or self.length)

    def runners(self, length: int = 0) -> Iterator[tuple[str, str, Runner]]:
        """Yield every way to run every form of the weights: what its rungs are called, its form and its runner."""
        for mode in MODES:
            for weights in self.models:
                yield f"{mode}, {weights}" if weights else mode, weights, self.runner(mode, weights, length)

    def products(self) -> Iterator[Rung]:
        return products.make_rungs(self.subject, self.device)

    def long_steps(self) -> Iterator[tuple[Rung, Runner]]:
        """Yield a compiled step of each form of the weights as the positions have it, whose graph inductor has kept."""
        for weights in self.models:
            runner = self.runner("compile", weights, LONGEST)
            run, read = partial(runner.time_step, POSITIONS[0], TIMED), runner.count_step_bytes(POSITIONS[0])
            yield Rung(weights or "plain weights", "ms", run, weights, read), runner

    def kernels(self) -> Iterator[Rung]:
        """A step, whose entry names its kernels; its samples are without the profiler, which takes time itself."""
        for rung, runner in self.long_steps():
            yield replace(rung, kernels=profile_step(runner.step_at(POSITIONS[0]), self.device))

    def options(self) -> Iterator[Rung]:
        """A step as it is, and with each of `OPTIONS`; what fails is named."""
        options = OPTIONS[torch.device(self.device).type].items()
        steps = {name: compiled(decode, decode_mode(self.device), settings) for name, settings in options}
        for plain, runner in self.long_steps():
            yield plain
            for option, step in steps.items():
                changed = replace(runner, steps=runner.steps | {"decode": step})
                run, name = partial(changed.time_step, POSITIONS[0], TIMED), f"{plain.name}, {option}"
                if attempt(name, run):
                    yield replace(plain, name=name, measure=run, against=plain.name, samples=[])

    def decode(self) -> Iterator[Rung]:
        for name, weights, runner in self.runners():
            read = runner.count_step_bytes(len(PROMPT) + self.new_tokens // 2 - 1)  # of a text half as long as it gets
            yield Rung(name, "tok/s", partial(runner.decode, self.new_tokens), weights, read, against="eager")
        for weights in self.models:
            name = f"compile, {weights}" if weights else "compile"
            yield Rung(f"{name} + speculation", "tok/s", self.speculating(weights), weights, against=name)

    def speculating(self, weights: str) -> Callable[[], float]:
        """Return a measurement of decode with drafts of 2 layers in the same weights, accepted by chance."""
        subject = self.subject.with_layers(min(2, self.subject.raw["num_hidden_layers"]))
        small = meta_model(subject.config(weights))
        shared_by = draft_ranks(small.config, subject.forms[weights], step_weight_bytes(small), self.ranks)
        draft_model = subject.model(weights, self.device, seed=1, ranks=shared_by)
        way = speculation.Way("", self.runner("compile", weights), draft_model, levels=levels_below(self.max_k))
        num_tokens = max(speculation.SHORTEST, self.new_tokens)
        duel = speculation.Duel("", [way], [PROMPT], num_tokens, speculation.accept_by_chance)
        return lambda: duel.sample(way, 0, 0)["tok_per_s"]

    def beside(self) -> Iterator[Rung]:
        """Decode with the cores to itself, and beside a busy program on one of them, on our threads and on OpenMP's."""
        for name, weights, runner in self.runners():
            alone, beside = f"{name}, alone", f"{name}, beside another"
            ours = partial(runner.decode, self.new_tokens)
            openmp = partial(on_openmp, ours)
            yield Rung(alone, "tok/s", ours, weights)
            yield Rung(f"{alone}, OpenMP", "tok/s", openmp, weights, against=alone)
            yield Rung(beside, "tok/s", partial(beside_another, ours), weights)
            yield Rung(f"{beside}, OpenMP", "tok/s", partial(beside_another, openmp), weights, against=beside)

    def editing(self) -> Iterator[Rung]:
        for name, weights, runner in self.runners(speculation.EDITING_LENGTH):
            yield from speculation.editing_rungs(name, weights, runner)

    def batch(self) -> Iterator[Rung]:
        for name, weights, runner in self.runners():
            for rows in (1, ROWS):
                run = partial(replace(runner, num_rows=rows).decode, self.new_tokens)
                yield Rung(f"{name}, batch of {rows}", "tok/s", run, weights, against=f"{name}, batch of 1")

    def prefill(self) -> Iterator[Rung]:
        for size in PREFILL:
            for name, weights, runner in self.runners():
                run, flops = partial(runner.prefill, size), runner.count_prefill_flops(size)
                yield Rung(f"{name}, prefill of {size}", "tok/s", run, weights, flops=flops)

    def positions(self) -> Iterator[Rung]:
        for name, weights, runner in reversed([*self.runners(LONGEST)]):  # compiled and int4 first: time may run out
            for position in POSITIONS:
                run, read = partial(runner.time_step, position), runner.count_step_bytes(position)
                first = f"{name}, step at {POSITIONS[0]}"
                yield Rung(f"{name}, step at {position}", "ms", run, weights, read, against=first)
        for mode in MODES:
            first, run = f"{mode}, step at {POSITIONS[0]}", partial(self.runner(mode, "", 256).time_step, POSITIONS[0])
            yield Rung(f"{first}, cache of 256 instead of {LONGEST}", "ms", run, against=first)

    def verify(self) -> Iterator[Rung]:
        for name, weights, runner in self.runners():
            first, run = f"{name}, 1 token", partial(runner.time_verify, 129, VERIFIED - 1)
            yield Rung(first, "ms", partial(runner.time_step, 128), weights)
            yield Rung(f"{name}, verify of {VERIFIED} tokens", "ms", run, weights, against=first)
