"""A figure to measure, the roof of the machine beside which it stands, and what is left out."""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.runner import time_call
from kernels.cpu import empty_weight

omissions: list[str] = []  # of this process, and why


def leave_out(title: str, error: Exception) -> None:
    """Say on stderr, and in the results, that something is not measured."""
    omissions.append(f"{title}: {type(error).__name__}: {error}".partition("\n")[0])
    print(f"left out: {omissions[-1]}", file=sys.stderr)


def can_run(title: str, call: Callable[[], Any]) -> bool:
    """Call it once, which compiles it; leave it out where that fails, in whatever way code of others does."""
    try:
        call()
    except Exception as error:
        leave_out(title, error)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # which raises if the GPU is of no more use to what would come next
        return False
    return True


def measure_roof(device: str) -> dict[str, float]:
    """Return the best of several: how fast memory is streamed, in GB/s, and bf16 GEMM, in TFLOP/s.

    On a CPU 1 GiB is read, on a GPU copied, which counts as read and written. Matrices are 2048 or 8192 wide, and in
    fp32 on a CPU without instructions for bf16, where bf16 takes minutes.
    """
    on_gpu = device.startswith("cuda")
    data = empty_weight((2**28,), torch.float32, device).fill_(1)
    copy = torch.empty_like(data) if on_gpu else data
    size = 8192 if on_gpu else 2048
    is_narrow = on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if is_narrow else torch.float32)
    stream, multiply = (lambda: copy.copy_(data)) if on_gpu else data.sum, lambda: a @ a
    for run in (stream, multiply) if on_gpu else ():  # the first loads the library
        run()
    stream_s = min(time_call(stream, device) for _ in range(3))
    product_s = min(time_call(multiply, device) for _ in range(3))
    name, num_bytes = ("copy_gb_per_s", 2 * data.nbytes) if on_gpu else ("read_gb_per_s", data.nbytes)
    return {name: num_bytes / stream_s / 1e9, "gemm_tflop_per_s": 2 * size**3 / product_s / 1e12}


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
    kernels: list[dict[str, Any]] = field(default_factory=list)  # what the last turn's step spent its time in

    def entry(self, group: dict[str, "Rung"], roofs: list[dict[str, float]]) -> dict[str, Any]:
        """Return what the results say of it.

        The machine's own speed moves: ratios and shares of the roof are medians of those within each turn. group: the
        rungs with samples, by name. roofs: of each turn.
        """
        entry: dict[str, Any] = {"name": self.name, "unit": self.unit, "weights": self.weights or "plain"}
        entry |= {"median": statistics.median(self.samples), "samples": self.samples}
        memory = "copy_gb_per_s" if any("copy_gb_per_s" in roof for roof in roofs) else "read_gb_per_s"
        kinds = (("gb_per_s", self.read_bytes / 1e9, memory), ("tflop_per_s", self.flops / 1e12, "gemm_tflop_per_s"))
        for key, per_token, roof_name in kinds:
            if per_token:
                rates = [(s if self.unit == "tok/s" else 1e3 / s) * per_token for s in self.samples]
                shares = [rate / roof[roof_name] for rate, roof in zip(rates, roofs, strict=False)]
                entry |= {key: statistics.median(rates), "share_of_roof": statistics.median(shares)}
        if self.against in group:
            pairs = zip(self.samples, group[self.against].samples, strict=False)
            ratios = [ours / theirs for ours, theirs in pairs]
            entry |= {"against": self.against, "ratios": ratios, "ratio": statistics.median(ratios)}
        return entry | ({"kernels": self.kernels} if self.kernels else {})


def format_line(entry: dict[str, Any]) -> str:
    text = f"  {entry['name']:46} {entry['median']:9.2f} {entry['unit']:5}"
    if "gb_per_s" in entry:
        text += f" {entry['gb_per_s']:7.1f} GB/s"
    if "tflop_per_s" in entry:
        text += f" {entry['tflop_per_s']:7.2f} TFLOP/s"
    if "share_of_roof" in entry:
        text += f", {entry['share_of_roof']:.0%} of the roof"
    if "ratio" in entry:
        ratio = f"{entry['ratio']:.2f}x of" if entry["unit"] == "tok/s" else f"{entry['ratio']:.2f} times as long as"
        text += f"  {ratio} «{entry['against']}»"
    for kernel in entry.get("kernels", []):
        share = kernel["us"] / 1e3 / entry["median"]
        text += f"\n    {kernel['us']:9.1f} us, {share:4.0%}, in {kernel['calls']:4} of {kernel['name'][:80]}"
    return text
