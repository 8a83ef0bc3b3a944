"""What a figure is and how one is taken: the roof of the machine, the rates of a model, samples in turns.

benchmark.py, speculation.py and compare.py use it; it is no command.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import DTYPES, parse_dtype
from cli import read_json
from generate import generate
from kernels import empty_weight
from model import Transformer
from speculate import verify
from steps import SLOTS_STEP, Sampling, compiled, decode, prefill, visible_slots

GREEDY = Sampling(temperature=0)
PROMPT = [1, 2, 3, 4, 5, 6]


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time a call; on a GPU from when it has nothing else to do until it is done."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


left_out: list[str] = []  # of this process, and why


def leave_out(title: str, error: Exception) -> None:
    """Say on stderr, and in the results, that something is not measured."""
    left_out.append(f"{title}: {type(error).__name__}: {error}".partition("\n")[0])
    print(f"left out: {left_out[-1]}", file=sys.stderr)


def runs(title: str, call: Callable[[], Any]) -> bool:
    """Call it once, which compiles it; leave it out where that fails, in whatever way code of others does."""
    try:
        call()
    except Exception as error:
        leave_out(title, error)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # which raises if the GPU is of no more use to what would come next
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def measure_roof(device: str) -> dict[str, float]:
    """Return the best of several: how fast memory is streamed, in GB/s, and bf16 GEMM, in TFLOP/s.

    On a CPU 1 GiB is read, on a GPU copied, which counts as read and written. Matrices are 2048 or 8192 wide.
    """
    on_gpu = device.startswith("cuda")
    data = empty_weight((2**28,), torch.float32, device).fill_(1)
    other = torch.empty_like(data) if on_gpu else data
    size = 8192 if on_gpu else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    stream, multiply = (lambda: other.copy_(data)) if on_gpu else data.sum, lambda: a @ a
    for run in (stream, multiply) if on_gpu else ():  # the first loads the library
        run()
    streamed = [seconds(stream, device) for _ in range(3)]
    product = [seconds(multiply, device) for _ in range(3)]
    memory = {"copy_gb_per_s": 2 * data.nbytes} if on_gpu else {"read_gb_per_s": data.nbytes}
    rates = {name: num_bytes / min(streamed) / 1e9 for name, num_bytes in memory.items()}
    return rates | {"gemm_tflop_per_s": 2 * size**3 / min(product) / 1e12}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    return f"{processor(info.read_text() if info.is_file() else '')} {torch.get_num_threads()} threads"


def processor(cpuinfo: str) -> str:
    """Return the processor's name from /proc/cpuinfo, which on ARM has none: then its kind, such as aarch64."""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# A model


def weight_forms(args: argparse.Namespace, raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the config of each form of the weights; the plain one is called «»."""
    quantized = {name: raw | {"layout": "fused", "quantization": scheme} for name, scheme in args.quantize.items()}
    return {"": raw, **quantized}


def config_name(path: Path) -> str:
    return path.stem if path.stem != "config" else path.parent.name


def read_config_file(path: Path) -> dict[str, Any]:
    """Return --config's content. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"--config {path} is no file; expected a config.json")
    return read_json(path)


def run_dtype(args: argparse.Namespace, raw: dict[str, Any]) -> torch.dtype:
    return DTYPES[args.dtype] if args.dtype else parse_dtype(raw)


@dataclass(frozen=True)
class Steps:
    """prefill, decode and verify, plain or compiled."""

    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    verify: Callable[..., Any]


def make_steps(device: str) -> dict[str, Steps]:
    mode = decode_mode(device)
    return {
        "eager": Steps(prefill, decode, verify),
        "compile": Steps(compiled(prefill), compiled(decode, mode), compiled(verify, mode)),
    }


NUM_STEPS = 30  # of a sample at a position, when others are compared


def decode_mode(device: str) -> str | None:
    return "reduce-overhead" if device.startswith("cuda") else None


def decode_rate(model: Transformer, steps: Steps, num_tokens: int, num_rows: int = 1) -> float:
    """Return tokens a second, of all rows together, of plain greedy decoding after a prompt of 6 tokens."""
    prompts = [PROMPT] * num_rows
    arrivals = [time.perf_counter() for _ in generate(model, prompts, num_tokens, GREEDY, decode=steps.decode)]
    return num_rows * (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


def prefill_rate(model: Transformer, steps: Steps, length: int) -> float:
    """Return prompt tokens a second until the first new token is known."""
    prompt = [i % model.config.vocab_size for i in range(length)]
    return length / seconds(lambda: list(generate(model, [prompt], 1, GREEDY, prefill=steps.prefill)), "cpu")


class Forwards:
    """One that is called a forward a token: ids [1, S] in, the likeliest next one out, [1, 1]."""

    device: str
    num_filled: int  # of its cache

    def forward(self, ids: Tensor) -> Tensor:
        """Run ids after those that the cache holds."""
        raise NotImplementedError

    def step(self, ids: Tensor) -> Tensor:
        """As `forward`, of one id."""
        return self.forward(ids)

    def keep(self, length: int) -> None:
        """Forget what the cache holds from position `length` on."""
        raise NotImplementedError

    def steps(self, ids: Tensor, count: int) -> float:
        """Decode `count` tokens after ids [1, 1]; return how many a second."""

        def run() -> None:
            nonlocal ids
            for _ in range(count):
                ids = self.step(ids)

        return count / seconds(run, self.device)

    def decode(self, num_tokens: int) -> float:
        self.keep(0)
        return self.steps(self.forward(torch.tensor([PROMPT], device=self.device)), num_tokens - 1)

    def at(self, position: int) -> float:
        if self.num_filled < position:
            self.keep(0)
            self.forward(torch.ones(1, position, dtype=torch.long, device=self.device))
        for count in (1, NUM_STEPS):  # the first warms up
            self.keep(position)
            rate = self.steps(torch.tensor([[1]], device=self.device), count)
        return rate

    def prefill(self, length: int) -> float:
        prompt = torch.ones(1, length, dtype=torch.long, device=self.device)
        self.keep(0)
        return length / seconds(lambda: self.forward(prompt), self.device)


@torch.inference_mode()
def step_at(model: Transformer, run_decode: Callable[..., Any], position: int) -> Callable[[], Any]:
    """Return a decode step at `position` to call, whatever the cache holds before it."""
    tokens, positions = (torch.tensor([n], device=model.device) for n in (1, position))
    slots = visible_slots(torch.arange(model.max_seq_length, device=model.device), position + 1)
    return torch.inference_mode()(lambda: run_decode(model, tokens, positions, slots, GREEDY, None))


@torch.inference_mode()
def verify_at(model: Transformer, run_verify: Callable[..., Any], position: int, num_tokens: int) -> Callable[[], Any]:
    """Return one forward over `num_tokens` tokens from `position` on to call, accepting included."""
    tokens = torch.ones(1, 2, dtype=torch.long, device=model.device)
    drafted = torch.ones(1, num_tokens - 1, dtype=torch.long, device=model.device)
    positions = torch.tensor([[position - 1, position]], device=model.device)
    slots = visible_slots(torch.arange(model.max_seq_length, device=model.device), position + num_tokens)
    return torch.inference_mode()(lambda: run_verify(model, tokens, positions, slots, drafted, GREEDY, None, None))


def median_ms(run: Callable[[], Any], device: str, count: int = 10) -> float:
    """Return the median milliseconds of `count` calls, after one that warms up.

    On a GPU, of three runs of `count` calls, between which it is not waited for: as when text is generated.
    """
    calls, runs = (count, 3) if device.startswith("cuda") else (1, count)

    def several() -> None:
        for _ in range(calls):
            run()

    several()
    return statistics.median(seconds(several, device) / calls for _ in range(runs)) * 1e3


def kv_bytes(model: Transformer, length: int) -> int:
    """Return the bytes of keys and values that a step reads, of this rank, with `length` tokens in the cache."""
    slots = len(visible_slots(torch.arange(length + SLOTS_STEP), length))
    per_slot = 2 * model.layers[0].self_attn.num_local_kv_heads * model.config.head_dim
    return slots * model.config.num_hidden_layers * per_slot * model.embed_tokens.weight.itemsize


def prefill_flops(model: Transformer, length: int) -> float:
    """Return the operations of a prompt of `length`, of this rank, a token: of the blocks and of causal attention."""
    config, count = model.config, model.ranks.count
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    return config.num_hidden_layers * (2 * weights + 2 * q_size * length) / count


# ---------------------------------------------------------------------------------------------------------------------
# A figure


@dataclass
class Rung:
    """One figure to measure, in turns with the others of its group."""

    name: str
    unit: str  # tok/s, ms, s or GB
    measure: Callable[[], float]
    weights: str = ""  # the scheme they are quantized by
    read_bytes: float = 0  # that a token, or a step of so many ms, reads
    flops: float = 0  # that a token takes
    against: str = ""  # the rung of the group that it is compared with, turn by turn
    samples: list[float] = field(default_factory=list)

    def entry(self, group: dict[str, "Rung"], roofs: list[dict[str, float]]) -> dict[str, Any]:
        """Return what the results say of it.

        The machine's own speed moves: ratios and shares of the roof are medians of those within each turn. group: the
        rungs with samples, by name. roofs: of each turn.
        """
        median = statistics.median(self.samples)
        entry: dict[str, Any] = {"name": self.name, "unit": self.unit, "weights": self.weights or "plain"}
        entry |= {"median": median, "samples": self.samples}
        memory = "copy_gb_per_s" if any("copy_gb_per_s" in roof for roof in roofs) else "read_gb_per_s"
        kinds = (
            ("gb_per_s", self.read_bytes / 1e9, memory),
            ("tflop_per_s", self.flops / 1e12, "gemm_tflop_per_s"),
        )
        for key, per_token, of_roof in kinds:
            if per_token:
                reached = [(s if self.unit == "tok/s" else 1e3 / s) * per_token for s in self.samples]
                entry[key] = statistics.median(reached)
                shares = [value / roof[of_roof] for value, roof in zip(reached, roofs, strict=False)]
                entry["share_of_roof"] = statistics.median(shares)
        if self.against in group:
            pairs = list(zip(self.samples, group[self.against].samples, strict=False))
            entry["against"] = self.against
            entry["ratios"] = [ours / theirs for ours, theirs in pairs]
            entry["ratio"] = statistics.median(entry["ratios"])
        return entry


def line(entry: dict[str, Any]) -> str:
    text = f"  {entry['name']:46} {entry['median']:9.2f} {entry['unit']:5}"
    if "gb_per_s" in entry:
        text += f" {entry['gb_per_s']:7.1f} GB/s"
    if "tflop_per_s" in entry:
        text += f" {entry['tflop_per_s']:7.2f} TFLOP/s"
    if "share_of_roof" in entry:
        text += f", {entry['share_of_roof']:.0%} of the roof"
    if "ratio" in entry:
        of = f"{entry['ratio']:.2f}x of" if entry["unit"] == "tok/s" else f"{entry['ratio']:.2f} times as long as"
        text += f"  {of} «{entry['against']}»"
    for kernel in entry.get("kernels", []):
        share = kernel["us"] / 1e3 / entry["median"]
        text += f"\n    {kernel['us']:9.1f} us, {share:4.0%}, in {kernel['calls']:4} of {kernel['name'][:80]}"
    return text
