"""The rungs that need a fresh process each: compiling, peak memory, and the time to the first token.

Nothing that ran before helps such a process, and it holds one model. bench.run measures the rungs; started as a
command, this file is the process, and prints JSON:

    python -m bench.process '{"config": {...}, "device": "cpu", "dtype": "bfloat16", "mode": "compile"}'

decode_s and prefill_s are the first calls, decode before prefill, with all that compiling them takes, the compiler's
own import included. peak_bytes is the most memory that this process held at once after the weights were there (on a
GPU: the GPU's), the weights included; compilers that torch.compile starts are processes of their own.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.results import ROOT
from bench.rung import Rung
from bench.runner import PROMPT, Runner, make_steps, time_call
from bench.subject import Subject
from checkpoint import load_model, random_model, save_hub_checkpoint
from cli.errors import fail
from config import DTYPES, quantization_scheme
from kernels import cpu
from linears import Scheme

DEPTH = 4  # layers whose compile time all are compared with
PROMPT_LENGTH = 512  # long enough that the activations show in the peak


def forget_peak() -> None:
    """Let the peak begin anew: drawing and packing random weights is not what a run of a checkpoint does."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Not ru_maxrss: a process inherits that of the one which started it.
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def load(folder: str) -> dict[str, float]:
    """Load a folder onto the CPU; peak_bytes is what that takes beside torch and our kernels."""
    cpu.library()
    forget_peak()
    before = read_peak("cpu")
    model = load_model(folder)
    return {"peak_bytes": read_peak("cpu") - before, "weight_bytes": model.weight_bytes}


def run(job: dict[str, Any]) -> dict[str, float]:
    if "folder" in job:
        return load(job["folder"])
    device = job["device"]
    model = random_model(job["config"], device, DTYPES[job["dtype"]])
    runner = Runner(model, make_steps(job["mode"], device), PROMPT_LENGTH + 64)
    runner.prepare()
    forget_peak()
    decode_s = time_call(runner.step_at(len(PROMPT)), device)
    prefill_s = PROMPT_LENGTH / runner.prefill(PROMPT_LENGTH)
    runner.decode(16)
    times = {"decode_s": decode_s, "prefill_s": prefill_s}
    return times | {"peak_bytes": read_peak(device), "weight_bytes": model.weight_bytes}


# ---------------------------------------------------------------------------------------------------------------------
# The rungs


class Processes:
    """Rungs that start processes; `folder` is for their compile caches."""

    def __init__(self, subject: Subject, device: str, folder: Path):
        self.subject, self.device, self.folder = subject, device, folder
        self.unread: dict[tuple[str, int, str], dict[str, float]] = {}  # times of a process, by weights, depth, cache

    def start(self) -> Iterator[Rung]:
        """Time to the first token of the demo, from the start of the command."""
        demo = [str(ROOT / "generate.py"), "--prompt", "def", "--max_new_tokens", "8", "--device", self.device]
        imports = "`import torch`"
        yield Rung(imports, "s", partial(time_output, ["-c", "import torch; print('done', flush=True)"], 0))
        yield Rung("first token of the demo, eager", "s", partial(time_output, demo, len("def")), against=imports)

    def memory(self) -> Iterator[Rung]:
        for mode in ("eager", "compile"):
            for weights in self.subject.forms:
                name = f"{mode}, {weights}" if weights else mode
                yield Rung(f"{name}, peak memory", "GB", partial(self.measure_peak, weights, mode), weights)

        if self.device == "cpu":
            yield from self.loading()

    def loading(self) -> Iterator[Rung]:
        """Peak memory of loading a folder as the Hub has it, and of those that quantize.py makes of it."""
        for weights, form in self.subject.forms.items():
            name = weights or "as the Hub has it"
            read = partial(self.measure_loading, weights, form)
            files = f"its files, {name}"
            yield Rung(f"loading a folder, {name}, peak memory", "GB", read, weights, against=files)
            yield Rung(files, "GB", partial(self.measure_files, weights, form), weights)

    def checkpoint(self, weights: str, form: dict[str, Any]) -> Path:
        """Make a folder of random weights, once."""
        path = self.folder / f"checkpoint-{weights}"
        if not path.exists() and not weights:
            model = random_model(form, dtype=self.subject.dtype, optimize=False)
            path.mkdir()
            save_hub_checkpoint(model, form, path, self.subject.dtype)
        elif not path.exists():
            plain, scheme = self.checkpoint("", self.subject.raw), quantization_scheme(form)
            assert scheme is not None
            command = [sys.executable, "quantize.py", "--checkpoint_path", str(plain), "--mode", scheme.mode]
            command += ["--groupsize", str(scheme.group_size or -1)] if scheme != Scheme("int8") else []
            command += ["--symmetric"] if scheme.symmetric else []
            subprocess.run([*command, "--output_path", str(path)], cwd=ROOT, check=True, capture_output=True)
        return path

    def measure_files(self, weights: str, form: dict[str, Any]) -> float:
        return sum(file.stat().st_size for file in self.checkpoint(weights, form).glob("*.safetensors")) / 1e9

    def measure_loading(self, weights: str, form: dict[str, Any]) -> float:
        return self.start_process({"folder": str(self.checkpoint(weights, form))}, {})["peak_bytes"] / 1e9

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
            first = f"{DEPTH} layers" if not weights and depth > DEPTH else ""
            for cache in ("cold", "warm"):
                for step in ("decode", "prefill"):
                    measure = partial(self.time_first_step, step, weights, depth, cache)
                    against = first and f"{cache}, {step}, {first}"
                    yield Rung(f"{cache}, {step}, {label}", "s", measure, weights, against=against)

    def time_first_step(self, step: str, weights: str, depth: int, cache: str) -> float:
        times = self.unread.setdefault((weights, depth, cache), {})
        if step not in times:  # else the other step's rung has run the process
            folder = self.folder / f"{weights}-{depth}"
            if cache == "cold":
                shutil.rmtree(folder, ignore_errors=True)
            result = self.run_process(weights, "compile", folder, depth)
            times |= {"decode": result["decode_s"], "prefill": result["prefill_s"]}
        return times.pop(step)

    def run_process(self, weights: str, mode: str, cache: Path, depth: int | None = None) -> dict[str, float]:
        raw = self.subject.forms[weights] | ({"num_hidden_layers": depth} if depth else {})
        job = {"config": raw, "device": self.device, "dtype": self.subject.dtype_name, "mode": mode}
        return self.start_process(job, {"TORCHINDUCTOR_CACHE_DIR": str(cache)})

    def start_process(self, job: dict[str, Any], environment: dict[str, str]) -> dict[str, float]:
        command = [sys.executable, "-m", "bench.process", json.dumps(job)]
        environment = {**os.environ, **environment}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {result.returncode}:\n{result.stderr}")
        return json.loads(result.stdout.splitlines()[-1])


def time_output(arguments: list[str], num_bytes: int) -> float:
    """Start Python with these arguments; return the seconds until it has written more than num_bytes to stdout."""
    began = time.perf_counter()
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        size = 0
        while size <= num_bytes:
            piece = process.stdout.read(4096)
            if not piece:
                raise RuntimeError(f"{shlex.join(arguments)} ended early:\n{process.communicate()[1].decode()}")
            size += len(piece)
        elapsed = time.perf_counter() - began
        process.communicate()
    return elapsed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("bench.process takes a JSON object; bench.run starts it")
    print(json.dumps(run(json.loads(sys.argv[1]))))
