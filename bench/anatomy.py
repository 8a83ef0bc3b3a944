"""What a compiled decode step is made of, kernel by kernel, and what settings of torch.compile change in it.

benchmark.py measures them, as the groups «kernels» and «options», where they are named.
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Transformer
from scripts.measure import Rung, decode_mode, kv_bytes, median_ms, runs, step_at
from steps import compiled, decode

if TYPE_CHECKING:
    from scripts.ladder import Bench

POSITION = 128
PROFILED, TIMED = 11, 50  # steps
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


@dataclass
class Anatomy(Rung):
    """A step, and the kernels that it launches, of the last turn: of each its name, calls and microseconds a step.

    What is left of the step's time is between kernels, or on a CPU also what other threads are waited for.
    """

    kernels: list[dict[str, Any]] = field(default_factory=list)

    def entry(self, group: dict[str, Rung], roofs: list[dict[str, float]]) -> dict[str, Any]:
        return super().entry(group, roofs) | {"kernels": self.kernels}


def profiled(step: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """Return what a step spends its time in, the longest first: a GPU's kernels, or a CPU's operators.

    Each is the median of `PROFILED` steps, of which other work may disturb some.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says on stderr when it begins and ends
    on_gpu = device.startswith("cuda")
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    step()
    spent: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for _ in range(PROFILED):
        with profile(activities=[activity]) as found:
            step()
            if on_gpu:
                torch.cuda.synchronize()
        for each in found.key_averages():
            us = each.self_device_time_total if on_gpu else each.self_cpu_time_total
            if us:
                spent.setdefault(each.key, []).append(us)
                calls[each.key] = each.count
    kernels = [{"name": name, "calls": calls[name], "us": statistics.median(times)} for name, times in spent.items()]
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def kernels(bench: "Bench", length: int) -> Iterator[Rung]:
    """Yield a step of every form of the weights, whose entry names its kernels. length: of the caches."""

    def measure(found: list[dict[str, Any]], model: Transformer) -> float:
        step = step_at(model, bench.steps["compile"].decode, POSITION)
        found[:] = profiled(step, bench.device)
        return median_ms(step, bench.device, TIMED)  # without the profiler, which takes time itself

    for weights, model in bench.models.items():
        read = model.step_weight_bytes + kv_bytes(model, POSITION + 1)
        found: list[dict[str, Any]] = []
        run = bench.on(weights, length, partial(measure, found))
        yield Anatomy(weights or "plain weights", "ms", run, weights, read_bytes=read, kernels=found)


def options(bench: "Bench", length: int) -> Iterator[Rung]:
    """Yield a step of every form of the weights, as it is and with each of `OPTIONS`; what fails is named."""

    def measure(run_decode: Callable[..., Any], model: Transformer) -> float:
        return median_ms(step_at(model, run_decode, POSITION), bench.device, TIMED)

    steps = {"": bench.steps["compile"].decode}
    for name, settings in OPTIONS[torch.device(bench.device).type].items():
        steps[name] = compiled(decode, decode_mode(bench.device), settings)
    for weights, model in bench.models.items():
        read = model.step_weight_bytes + kv_bytes(model, POSITION + 1)
        first = weights or "plain weights"
        for name, run_decode in steps.items():
            run = bench.on(weights, length, partial(measure, run_decode))
            title, against = (f"{first}, {name}", first) if name else (first, "")
            if name and not runs(title, run):
                continue
            yield Rung(title, "ms", run, weights, read_bytes=read, against=against)
