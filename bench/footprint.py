"""Compile the kernels of kernels/cuda.py for GPUs that are not here, and report what each one takes of a GPU.

    python -m bench.footprint

Of every kernel at the sizes of Llama-2-7B, Llama-3.1-8B, Llama-3.2-1B, Llama-3.1-70B, and of a rank of eight that share
the last, for sm_80 and sm_90: registers and spilled bytes as `ptxas` says, shared memory, how wide the loads are, and
of a product how many instructions a weight takes, by the number of columns. Nothing runs. The table goes to
results/<date>_<what compiled it>_ahead.json.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import results
from cli.arguments import need_triton
from cli.errors import user_errors
from model import attention_mask

ARCHITECTURES = (80, 90)
# hidden size, columns of qkv, of gate and up, of down's input; query heads, kv heads, head_dim
MODELS = {
    "Llama-2-7B": (4096, 12288, 22016, 11008, 32, 32, 128),
    "Llama-3.1-8B": (4096, 6144, 28672, 14336, 32, 8, 128),
    "Llama-3.2-1B": (2048, 3072, 16384, 8192, 32, 8, 64),
    "Llama-3.1-70B": (8192, 10240, 57344, 28672, 64, 8, 128),
    "Llama-3.1-70B/8": (8192, 1280, 7168, 3584, 8, 1, 128),  # of 8 ranks each: one kv head is a variant of its own
}
# How many columns a program of each product takes in a turn of its loop, as its constants say.
WIDTHS: dict[str, Callable[[dict[str, int]], int]] = {
    "int4_row": lambda tile: tile["BLOCK"] * tile["GROUP"],
    "int4_rows": lambda tile: tile["BLOCK"] * 8,
    "int8_rows": lambda tile: tile["BLOCK"],
}


def make_driver(architecture: int) -> Any:
    """Stand in for Triton's driver of a GPU, which would look for one; by the device it keeps what it has compiled."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
    )


@dataclass
class Variant:
    """A kernel as Triton compiles it for some launches: of these types, constants and numbers that 16 divides."""

    kernel: Any
    tile: dict[str, Any]
    used_by: list[str] = field(default_factory=list)
    columns: set[int] = field(default_factory=set)  # of the weights, where it is a product

    @property
    def constants(self) -> dict[str, Any]:
        names = self.kernel.src.fn.arg_names
        return {names[i]: value for (i,), value in self.kernel.src.constants.items()}

    def measure(self) -> dict[str, Any]:
        name, ptx, threads = self.kernel.name, self.kernel.asm["ptx"], 32 * self.kernel.metadata.num_warps
        messages, code = assemble(ptx)
        loads = re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)\S* .*", ptx)
        num_wide = sum(bool(re.search(r"v4\.b32|v2\.b64|, 0x10", load)) for load in loads)
        footprint = {
            "registers": int(re.findall(r"Used (\d+) registers", messages)[0]),
            "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", messages))),
            "shared_bytes": self.kernel.metadata.shared,
            "threads": threads,
            "loads_of_16_bytes": num_wide,
            "narrower_loads": len(loads) - num_wide,
        }
        if name in WIDTHS:
            rows, width = self.constants["ROWS"], WIDTHS[name](self.constants)
            once, in_turn = count_instructions(code)
            totals = {K: once + math.ceil(K / width) * in_turn for K in sorted(self.columns)}
            footprint["instructions_a_weight"] = {K: round(n * threads / (rows * K), 2) for K, n in totals.items()}
        return footprint


def record_launches(architecture: int, function: str, *args: Any, **around: Any) -> list[Variant]:
    """Return the kernels that a function of kernels/cuda.py launches, compiled and not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kernels import cuda

    kernels, run = [], JITFunction.run

    def compile_kernel(kernel: Any, *args: Any, grid: Any, warmup: bool, **tile: Any) -> None:
        kernels.append(Variant(run(kernel, *args, grid=grid, warmup=True, **tile), tile))

    with patch.object(driver, "_active", make_driver(architecture)), patch.object(JITFunction, "run", compile_kernel):
        getattr(cuda, function)(*args, **around)
    return kernels


def assemble(ptx: str) -> tuple[str, str]:
    """Return what ptxas says of a kernel, and the instructions that it makes of it."""
    import triton

    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel")
        source.write_text(ptx)
        [target] = re.findall(r"\.target (\w+)", ptx)
        ptxas = [programs / "ptxas", "-v", "--gpu-name", target, source, "-o", binary]
        commands: tuple[list[Any], ...] = ptxas, [programs / "nvdisasm", "-c", binary]
        messages, code = (subprocess.run(args, check=True, capture_output=True, text=True) for args in commands)
    return messages.stderr, code.stdout


def count_instructions(code: str) -> tuple[int, int]:
    """Return how many instructions a kernel has outside of its longest innermost loop, and how many in it.

    A loop is from where jumps lead back to, to the last of these. What follows the last EXIT is never reached.
    Raises ValueError where there is no loop.
    """
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    count = end = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*)", line):
            count += 1
            jump = re.search(r"BRA.*`\((\.L\w+)\)", instruction[1])
            if jump and labels.get(jump[1], count) < count - 1:
                loops[labels[jump[1]]] = count
            elif "EXIT" in instruction[1]:
                end = count
    spans = loops.items()
    inner = [last - first for first, last in spans if not any(first < a and b <= last for a, b in spans)]
    if not inner:
        raise ValueError("a kernel has no loop to count the instructions of")
    return end - max(inner), max(inner)


Call = tuple[str, str, tuple[Any, ...], dict[str, Any]]  # what it is for, the function, its arguments


def make_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def list_products(model: str, rows: int) -> Iterator[Call]:
    hidden, qkv, gate_up, down, *_ = MODELS[model]
    normed = {"norm": make_meta(hidden), "eps": 1e-5} if rows == 1 else {}
    shapes: dict[str, tuple[int, int, dict[str, Any]]] = {
        "qkv": (qkv, hidden, normed),
        "gate_up": (gate_up, hidden, normed | {"gated": True}),
        "down": (hidden, down, {"residual": make_meta(rows, hidden)}),
    }
    for layer, (N, K, around) in shapes.items():
        x = make_meta(rows, K)
        for group_size in (32, 128):
            tensors = make_meta(N, K // 8, dtype=torch.int32), make_meta(N, K // group_size, dtype=torch.int32)
            yield f"{model} {layer}, int4 g{group_size}, {rows} rows", "int4_product", (x, *tensors), around
        if rows > 2:
            tensors = make_meta(N, K, dtype=torch.int8), make_meta(N)
            yield f"{model} {layer}, int8, {rows} rows", "int8_product", (x, *tensors), around


def make_attention(model: str, queries: int, slots: int = 8192) -> Call:
    *_, H, K, D = MODELS[model]
    cache = [make_meta(1, K, slots + 1, D)[:, :, :slots] for _ in range(2)]
    mask = attention_mask(torch.zeros(1, queries, 1, device="meta"), torch.arange(slots, device="meta"), None)
    return f"{model} attention, {queries} queries", "split_attention", (make_meta(1, queries, H, D), *cache, mask), {}


def compile_variants(models: Iterable[str], architecture: int, rows: Sequence[int] = (1, 6, 16)) -> list[Variant]:
    variants: dict[Any, Variant] = {}
    for model, count in product(models, rows):
        for name, function, args, around in [*list_products(model, count), make_attention(model, count)]:
            for launched in record_launches(architecture, function, *args, **around):
                variant = variants.setdefault(launched.kernel, launched)
                variant.used_by.append(name)
                variant.columns.add(args[0].shape[-1])
    return list(variants.values())


def run(folder: Path) -> None:
    need_triton("bench.footprint")
    import triton

    report = results.begin("footprint", folder, f"triton-{triton.__version__}", "ahead", kernels=[])
    report.content["versions"]["triton"] = triton.__version__
    for architecture in ARCHITECTURES:
        for variant in compile_variants(MODELS, architecture):
            entry = {"kernel": variant.kernel.name, "sm": architecture, **variant.measure()}
            counts = ", ".join(f"{n} at {K}" for K, n in entry.get("instructions_a_weight", {}).items())
            print("{kernel:15} sm_{sm} {registers:4} registers {spilled_bytes:5} spilled".format(**entry),
                  f"{counts} instructions a weight" if counts else "")  # fmt: skip
            constants = variant.constants
            options = {name: value for name, value in variant.tile.items() if name not in constants}
            entry |= {"constants": constants, "options": options, "used_by": variant.used_by}
            report.content["kernels"].append(entry)
    report.finish()


def main(argv: list[str] | None = None) -> None:
    parser = results.make_parser(__doc__)
    with user_errors():
        run(parser.parse_args(argv).output_dir)


if __name__ == "__main__":
    main()
