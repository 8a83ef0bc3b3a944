"""The rungs that need a fresh process each: compiling, peak memory, and the time to the first token.

Nothing that ran before helps such a process, and it holds one model. bench.run measures the rungs; started as a
command, this file is the process, and prints JSON:

    python -m bench.process '{"config": {...}, "device": "cpu", "dtype": "bfloat16", "mode": "compile"}'
    python -m bench.process '{"folder": "..."}'

decode_s and prefill_s are the first calls, decode before prefill, with all that compiling them takes. peak_bytes is the
most memory, a GPU's on a GPU, that this process held after the weights were there, or that loading a folder adds.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.results import ROOT, Rung
from bench.runner import PROMPT, Runner, make_steps, time_call
from bench.subject import Subject, quantize_options, write_random_folder
from checkpoint import load_model
from cli.report import weight_bytes
from config import DTYPES
from kernels import cpu
from random_weights import random_model

DEPTH = 4  # layers whose compile time all are compared with
PROMPT_LENGTH = 512  # long enough that the activations show in the peak


def forget_peak() -> None:
    """Let the peak begin anew: drawing and packing random weights is not what a run of a checkpoint does."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss: a process inherits that of the one which started it.
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def run(job: dict[str, Any]) -> dict[str, float]:
    if "folder" in job:
        cpu.library()
        forget_peak()
        before = read_peak("cpu")
        model = load_model(job["folder"])
        return {"peak_bytes": read_peak("cpu") - before, "weight_bytes": weight_bytes(model)}
    device = job["device"]
    model = random_model(job["config"], device, DTYPES[job["dtype"]])
    runner = Runner(model, make_steps(job["mode"], device), PROMPT_LENGTH + 64)
    runner.prepare()
    forget_peak()
    times = {"decode_s": time_call(runner.step_at(len(PROMPT)), device)}
    times["prefill_s"] = PROMPT_LENGTH / runner.prefill(PROMPT_LENGTH)
    runner.decode(16)
    return times | {"peak_bytes": read_peak(device), "weight_bytes": weight_bytes(model)}


class Processes:
    """Rungs that start processes; `folder` is for their compile caches and checkpoints."""

    def __init__(self, subject: Subject, device: str, folder: Path):
        self.subject, self.device, self.folder = subject, device, folder
        self.latest: dict[str, float] = {}  # what the latest process measured

    def start(self) -> Iterator[Rung]:
        """Time to the first token of the demo, from the start of the command."""
        demo = [str(ROOT / "generate.py"), "--prompt", "def", "--max_new_tokens", "8", "--device", self.device]
        imports = "`import torch`"
        yield Rung(imports, "s", partial(time_output, ["-c", "import torch; print('done', flush=True)"], 0))
        yield Rung("first token of the demo, eager", "s", partial(time_output, demo, len("def")), against=imports)

    def memory(self) -> Iterator[Rung]:
        """Peak memory of a run and, on a CPU, of loading a folder as the Hub has it, and as quantize.py makes it."""
        for mode in ("eager", "compile"):
            for weights in self.subject.forms:
                name = f"{mode}, {weights}" if weights else mode
                yield Rung(f"{name}, peak memory", "GB", partial(self.measure_peak, weights, mode), weights)
        for weights in self.subject.forms if self.device == "cpu" else ():
            name = weights or "as the Hub has it"
            load, files = partial(self.measure_loading, weights), f"its files, {name}"
            yield Rung(f"loading a folder, {name}, peak memory", "GB", load, weights, against=files)
            yield Rung(files, "GB", partial(self.measure_files, weights), weights)

    def checkpoint(self, weights: str) -> Path:
        """Make a folder of random weights, once."""
        path, form = self.folder / f"checkpoint-{weights}", self.subject.forms[weights]
        if not path.exists() and form is None:
            write_random_folder(self.subject.raw, path, self.subject.dtype)
        elif not path.exists() and form is not None:
            command = [sys.executable, "quantize.py", *quantize_options(form, self.checkpoint(""), path)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return path

    def measure_files(self, weights: str) -> float:
        return sum(file.stat().st_size for file in self.checkpoint(weights).glob("*.safetensors")) / 1e9

    def measure_loading(self, weights: str) -> float:
        return start_process({"folder": str(self.checkpoint(weights))}, self.folder)["peak_bytes"] / 1e9

    def measure_peak(self, weights: str, mode: str) -> float:
        cache = self.folder / f"{weights}-memory"
        if mode == "compile" and not cache.exists():  # what compiling anew takes would else be in the first sample only
            self.run_process(weights, mode, cache)
        return self.run_process(weights, mode, cache)["peak_bytes"] / 1e9

    def compile(self) -> Iterator[Rung]:
        """Seconds of the first decode step and of the first prefill: compiled anew, and from inductor's cache."""
        layers = self.subject.raw["num_hidden_layers"]
        cases = [("", DEPTH)] if layers > DEPTH else []
        for weights, depth in [*cases, *((weights, layers) for weights in self.subject.forms)]:
            label = f"{depth} layers" + (f", {weights}" if weights else "")
            for cache in ("cold", "warm"):
                for step in ("decode", "prefill"):
                    run = partial(self.time_first_step, step, weights, depth, cache)
                    against = "" if weights else f"{cache}, {step}, {DEPTH} layers"
                    yield Rung(f"{cache}, {step}, {label}", "s", run, weights, against=against)

    def time_first_step(self, step: str, weights: str, depth: int, cache: str) -> float:
        if step == "decode":  # comes first, and the process measures both
            folder = self.folder / f"{weights}-{depth}"
            if cache == "cold":
                shutil.rmtree(folder, ignore_errors=True)
            self.latest = self.run_process(weights, "compile", folder, depth)
        return self.latest[f"{step}_s"]

    def run_process(self, weights: str, mode: str, cache: Path, depth: int | None = None) -> dict[str, float]:
        subject = self.subject.with_layers(depth) if depth else self.subject
        job = {"config": subject.config(weights), "device": self.device, "dtype": subject.dtype_name, "mode": mode}
        return start_process(job, cache)


def start_process(job: dict[str, Any], cache: Path) -> dict[str, float]:
    """Run a job in a process; cache: inductor's."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "bench.process", json.dumps(job)]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def time_output(arguments: list[str], num_bytes: int) -> float:
    """Start Python with these arguments; return the seconds until it has written more than num_bytes to stdout."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(num_bytes + 1)
        elapsed = time.perf_counter() - began
        _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}:\n{said.decode()}")
    return elapsed


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
