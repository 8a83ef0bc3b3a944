"""What a compiled decode step is made of, kernel by kernel, and what settings of torch.compile change in it.

bench.run measures them, as the groups «kernels» and «options», where they are named.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.rung import Rung, can_run
from bench.runner import Runner, decode_mode
from steps import compiled, decode

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


def profile_step(step: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """Return what a step spends its time in, the longest first: a GPU's kernels, or a CPU's operators.

    Each time is the median of `PROFILED` steps, of which other work may disturb some. What is left of the step's time
    is between kernels, or on a CPU also what other threads are waited for.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says on stderr when it begins and ends
    on_gpu = device.startswith("cuda")
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    step()
    times: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for _ in range(PROFILED):
        with profile(activities=[activity]) as profiler:
            step()
            if on_gpu:
                torch.cuda.synchronize()
        for kernel in profiler.key_averages():
            if us := kernel.self_device_time_total if on_gpu else kernel.self_cpu_time_total:
                times.setdefault(kernel.key, []).append(us)
                calls[kernel.key] = kernel.count
    kernels = [{"name": name, "calls": calls[name], "us": statistics.median(times[name])} for name in times]
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def kernel_rungs(runners: dict[str, Runner]) -> Iterator[Rung]:
    """Yield a step of every form of the weights, whose entry names its kernels."""

    def measure(runner: Runner, kernels: list[dict[str, Any]]) -> float:
        kernels[:] = profile_step(runner.step_at(POSITION), runner.device)
        return runner.time_step(POSITION, TIMED)  # without the profiler, which takes time itself

    for weights, runner in runners.items():
        kernels: list[dict[str, Any]] = []
        run = partial(measure, runner, kernels)
        read = runner.count_step_bytes(POSITION)
        yield Rung(weights or "plain weights", "ms", run, weights, read_bytes=read, kernels=kernels)


def option_rungs(runners: dict[str, Runner], device: str) -> Iterator[Rung]:
    """Yield a step of every form of the weights, as it is and with each of `OPTIONS`; what fails is named."""
    steps = {
        name: compiled(decode, decode_mode(device), settings)
        for name, settings in OPTIONS[torch.device(device).type].items()
    }
    for weights, runner in runners.items():
        plain, read = weights or "plain weights", runner.count_step_bytes(POSITION)
        yield Rung(plain, "ms", partial(runner.time_step, POSITION, TIMED), weights, read_bytes=read)
        for name, step in steps.items():
            run = partial(replace(runner, steps=replace(runner.steps, decode=step)).time_step, POSITION, TIMED)
            title = f"{plain}, {name}"
            if can_run(title, run):
                yield Rung(title, "ms", run, weights, read_bytes=read, against=plain)
