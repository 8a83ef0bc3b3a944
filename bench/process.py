"""The rungs that need a fresh process each: compiling, peak memory, and the time to the first token.

Nothing that ran before helps such a process, and it holds one model. benchmark.py measures the rungs; started as a
command, this file is the process:

    python scripts/fresh.py '{"config": {...}, "device": "cpu", "dtype": "bfloat16", "compile": true}'

It prints JSON. decode_s and prefill_s are the first calls, decode before prefill, with all that compiling them takes,
the compiler's own import included. peak_bytes is the most memory that this process held at once after the weights were
there (on a GPU: the GPU's), the weights included; compilers that torch.compile starts are processes of their own.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from checkpoint import DTYPES, random_model
from cli import fail
from scripts.measure import (
    PROMPT,
    Rung,
    decode_rate,
    make_steps,
    prefill_rate,
    run_dtype,
    seconds,
    step_at,
    weight_forms,
)

DEPTH = 4  # layers whose compile time all are compared with
PROMPT_LENGTH = 512  # long enough that the activations show in the peak


# ---------------------------------------------------------------------------------------------------------------------
# The process


def forget_peak() -> None:
    """Let the peak begin anew: drawing and packing random weights is not what a run of a checkpoint does."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Not ru_maxrss: a process inherits that of the one which started it.
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def run(job: dict[str, Any]) -> dict[str, float]:
    device = job["device"]
    model = random_model(job["config"], device, DTYPES[job["dtype"]])
    model.setup_caches(1, PROMPT_LENGTH + 64)
    steps = make_steps(device)["compile" if job["compile"] else "eager"]
    forget_peak()
    decode_s = seconds(step_at(model, steps.decode, len(PROMPT)), device)
    prefill_s = seconds(lambda: prefill_rate(model, steps, PROMPT_LENGTH), device)
    decode_rate(model, steps, 16)
    return {
        "decode_s": decode_s,
        "prefill_s": prefill_s,
        "peak_bytes": peak_bytes(device),
        "weight_bytes": model.weight_bytes,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The rungs


class Fresh:
    """Rungs that start processes; `folder` is for their compile caches."""

    def __init__(self, args: argparse.Namespace, raw: dict[str, Any], folder: Path):
        self.args, self.raw, self.folder = args, raw, folder
        self.found: dict[str, float] = {}  # by the process that ran last

    def start(self) -> Iterator[Rung]:
        """Time to the first token of the demo, from the start of the command."""
        demo = [str(ROOT / "generate.py"), "--prompt", "def", "--max_new_tokens", "8", "--device", self.args.device]
        imports = "`import torch`"
        yield Rung(imports, "s", partial(seconds_to_output, ["-c", "import torch; print('done', flush=True)"], 0))
        yield Rung("first token of the demo, eager", "s", partial(seconds_to_output, demo, len("def")), against=imports)

    def memory(self) -> Iterator[Rung]:
        for mode in ("eager", "compile"):
            for weights in weight_forms(self.args, self.raw):
                name = f"{mode}, {weights}" if weights else mode
                yield Rung(f"{name}, peak memory", "GB", partial(self.peak_gb, weights, mode == "compile"), weights)

    def peak_gb(self, weights: str, compile: bool) -> float:
        cache = self.folder / f"{weights}-memory"
        if compile and not cache.exists():  # what compiling anew takes would else be in the first sample only
            self.process(weights, compile, cache)
        return self.process(weights, compile, cache)["peak_bytes"] / 1e9

    def compile(self) -> Iterator[Rung]:
        """Seconds of the first decode step and of the first prefill: compiled anew, and from inductor's cache."""
        layers = self.raw["num_hidden_layers"]
        cases = [(weights, layers) for weights in weight_forms(self.args, self.raw)]
        if layers > DEPTH:
            cases.insert(0, ("", DEPTH))
        for weights, depth in cases:
            folder = self.folder / f"{weights}-{depth}"
            label = f"{depth} layers" + (f", {weights}" if weights else "")
            first = f"{DEPTH} layers" if not weights and depth > DEPTH else ""
            for cache in ("cold", "warm"):
                for step, measure in (
                    ("decode", partial(self.first_step_s, weights, depth, folder, cache)),
                    ("prefill", lambda: self.found["prefill_s"]),  # of the same process
                ):
                    against = first and f"{cache}, {step}, {first}"
                    yield Rung(f"{cache}, {step}, {label}", "s", measure, weights, against=against)

    def first_step_s(self, weights: str, depth: int, folder: Path, cache: str) -> float:
        if cache == "cold":
            shutil.rmtree(folder, ignore_errors=True)
        return self.process(weights, True, folder, depth)["decode_s"]

    def process(self, weights: str, compile: bool, cache: Path, depth: int | None = None) -> dict[str, float]:
        raw = weight_forms(self.args, self.raw)[weights]
        job = {
            "config": raw | ({"num_hidden_layers": depth} if depth else {}),
            "device": self.args.device,
            "dtype": str(run_dtype(self.args, self.raw)).removeprefix("torch."),
            "compile": compile,
        }
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        command = [sys.executable, str(ROOT / "scripts" / "fresh.py"), json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")
        self.found = json.loads(done.stdout.splitlines()[-1])
        return self.found


def seconds_to_output(arguments: list[str], num_bytes: int) -> float:
    """Start Python with these arguments; return the seconds until it has written more than num_bytes to stdout."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        seen = 0
        while seen <= num_bytes:
            piece = process.stdout.read(4096)
            if not piece:
                raise RuntimeError(f"{shlex.join(arguments)} ended early:\n{process.communicate()[1].decode()}")
            seen += len(piece)
        taken = time.perf_counter() - began
        process.communicate()
    return taken


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("fresh.py takes a JSON object; benchmark.py starts it")
    print(json.dumps(run(json.loads(sys.argv[1]))))
