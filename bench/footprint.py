"""Compile the kernels of kernels_triton.py for GPUs that are not here, and report what each one takes of a GPU.

    python scripts/ahead.py

Of every kernel at the sizes of Llama-2-7B, Llama-3.1-8B, Llama-3.2-1B, Llama-3.1-70B, and of a rank of eight that share
the last, for sm_80 and sm_90: registers and spilled bytes as `ptxas` says, shared memory, how wide the loads are, and
of a product how many instructions a weight takes, by the number of columns. Nothing runs. The table goes to
results/<date>_<what compiled it>.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import datetime
import json
import math
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cli import ArgumentParser, need_triton, user_errors, write_whole
from model import visible

ARCHITECTURES = (80, 90)
# hidden size, columns of qkv, of gate and up, of down's input; query heads, kv heads, head_dim
MODELS = {
    "Llama-2-7B": (4096, 12288, 22016, 11008, 32, 32, 128),
    "Llama-3.1-8B": (4096, 6144, 28672, 14336, 32, 8, 128),
    "Llama-3.2-1B": (2048, 3072, 16384, 8192, 32, 8, 64),
    "Llama-3.1-70B": (8192, 10240, 57344, 28672, 64, 8, 128),
    "Llama-3.1-70B/8": (8192, 1280, 7168, 3584, 8, 1, 128),  # of 8 ranks each: one kv head is a variant of its own
}
# How many rows of a weight a program of each product takes, and how many columns in a turn of its loop.
TILES: dict[str, Callable[[dict[str, int]], tuple[int, int]]] = {
    "int4_row": lambda tile: (tile["ROWS"], tile["BLOCK"] * tile["GROUP"]),
    "int4_rows": lambda tile: (tile["ROWS"], tile["BLOCK"] * 8),
    "int8_rows": lambda tile: (tile["ROWS"], tile["BLOCK"]),
}
TRITON_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8",
}  # fmt: skip


@dataclass
class Variant:
    """Of a kernel, as `variant` says, that some step needs."""

    kernel: Any
    of: dict[str, Any]
    used_by: list[str] = field(default_factory=list)
    columns: set[int] = field(default_factory=set)

    def compile_ahead(self, architecture: int) -> dict[str, Any]:
        return compile_ahead(self.kernel, self.of, architecture, sorted(self.columns))


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any):
        self.kernel, self.launches = kernel, list[tuple[Any, tuple[Any, ...], dict[str, int]]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **tile: self.launches.append((self.kernel, args, tile))


def launches(function: str, *args: Any, **around: Any) -> list[tuple[Any, tuple[Any, ...], dict[str, int]]]:
    """Return which kernels a function of kernels_triton.py launches: each with its arguments and its tile."""
    from triton.runtime.jit import JITFunction

    import kernels_triton

    found = []
    kernels = {name: value for name, value in vars(kernels_triton).items() if isinstance(value, JITFunction)}
    recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
    vars(kernels_triton).update(recorders)
    try:
        getattr(kernels_triton, function)(*args, **around)
    finally:
        vars(kernels_triton).update(kernels)
    for recorder in recorders.values():
        found += recorder.launches
    return found


def variant(kernel: Any, args: tuple[Any, ...], tile: dict[str, int]) -> dict[str, Any]:
    """Return what Triton's launcher would compile for a launch: types, constants and which numbers 16 divides."""
    constants: dict[str, Any] = {name: value for name, value in tile.items() if name in kernel.arg_names}
    types, aligned = {}, []
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        special = not kernel.params[i].do_not_specialize
        if isinstance(value, Tensor):
            types[name] = TRITON_TYPES[value.dtype]
        elif value is None or (value == 1 and special):
            constants[name] = value
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
        # What torch allocates is.
        if isinstance(value, Tensor) or (special and isinstance(value, int) and value % 16 == 0):
            aligned.append(i)
    options = {name: value for name, value in tile.items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    return {"signature": signature, "constants": constants, "aligned": aligned, "options": options}


def compile_ahead(kernel: Any, of: dict[str, Any], architecture: int, columns: Iterable[int] = ()) -> dict[str, Any]:
    """Compile a variant of a kernel; return what it takes. columns: of the weights that a product is used for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {(i,): [["tt.divisibility", 16]] for i in of["aligned"]}
    source = ASTSource(fn=kernel, signature=of["signature"], constexprs=of["constants"], attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=of["options"])
    ptx = built.asm["ptx"]
    said, code = assembled(ptx)
    loads = re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)\S* .*", ptx)
    wide = [load for load in loads if re.search(r"v4\.b32|v2\.b64|, 0x10", load)]
    threads = 32 * built.metadata.num_warps
    took = {
        "registers": int(found(r"Used (\d+) registers", said)),
        "spilled_bytes": int(found(r"(\d+) bytes spill stores", said)) + int(found(r"(\d+) bytes spill loads", said)),
        "shared_bytes": built.metadata.shared,
        "threads": threads,
        "loads_of_16_bytes": len(wide),
        "narrower_loads": len(loads) - len(wide),
    }
    if kernel.__name__ in TILES:
        rows, width = TILES[kernel.__name__](of["constants"])
        once, in_turn = instructions(code)
        took["instructions_a_weight"] = {
            K: round((once + math.ceil(K / width) * in_turn) * threads / (rows * K), 2) for K in columns
        }
    return took


def assembled(ptx: str) -> tuple[str, str]:
    """Return what ptxas says of a kernel, and the instructions that it makes of it."""
    import triton

    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "kernel.ptx"), Path(folder, "kernel")
        source.write_text(ptx)
        target = found(r"\.target (\w+)", ptx)
        commands: list[list[str | Path]] = [
            [programs / "ptxas", "-v", "--gpu-name", target, source, "-o", built], [programs / "nvdisasm", "-c", built]
        ]  # fmt: skip
        said, code = (subprocess.run(each, check=True, capture_output=True, text=True) for each in commands)
    return said.stderr, code.stdout


def instructions(code: str) -> tuple[int, int]:
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


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"ptxas says no {pattern!r}: {text}"
    return match[1]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def products(model: str, rows: int) -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    hidden, qkv, gate_up, down, *_ = MODELS[model]
    normed = {"norm": meta(hidden), "eps": 1e-5} if rows == 1 else {}
    shapes: dict[str, tuple[int, int, dict[str, Any]]] = {
        "qkv": (qkv, hidden, normed),
        "gate_up": (gate_up, hidden, normed | {"gated": True}),
        "down": (hidden, down, {"residual": meta(rows, hidden)}),
    }
    for layer, (N, K, around) in shapes.items():
        x = meta(rows, K)
        for group_size in (32, 128):
            tensors = meta(N, K // 8, dtype=torch.int32), meta(N, K // group_size, dtype=torch.int32)
            yield f"{model} {layer}, int4 g{group_size}, {rows} rows", "int4_product", (x, *tensors), around
        if rows > 2:
            tensors = meta(N, K, dtype=torch.int8), meta(N)
            yield f"{model} {layer}, int8, {rows} rows", "int8_product", (x, *tensors), around


def attentions(
    model: str, queries: int, slots: int = 8192
) -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    *_, H, K, D = MODELS[model]
    cache = [meta(1, K, slots + 1, D)[:, :, :slots] for _ in range(2)]
    mask = visible(torch.zeros(1, queries, 1, device="meta"), torch.arange(slots, device="meta"), None)
    name = f"{model} attention, {queries} queries"
    yield name, "split_attention", (meta(1, queries, H, D), *cache, mask), {}


def variants(models: Iterable[str], rows: Sequence[int] = (1, 6, 16)) -> list[Variant]:
    kinds: dict[str, Variant] = {}
    for model in models:
        calls = [call for num_rows in rows for call in [*products(model, num_rows), *attentions(model, num_rows)]]
        for name, function, args, around in calls:
            for kernel, arguments, tile in launches(function, *args, **around):
                of = variant(kernel, arguments, tile)
                kind = kinds.setdefault(f"{kernel.__name__} {of}", Variant(kernel, of))
                kind.used_by.append(name)
                kind.columns.add(args[0].shape[-1])
    return list(kinds.values())


def run(args: argparse.Namespace) -> None:
    need_triton("ahead.py")
    import triton

    entries = []
    for each in variants(args.models):
        for architecture in ARCHITECTURES:
            entry = {"kernel": each.kernel.__name__, "sm": architecture, **each.compile_ahead(architecture)}
            counts = [f"{count} at {K}" for K, count in entry.get("instructions_a_weight", {}).items()]
            print("{kernel:15} sm_{sm} {registers:4} registers {spilled_bytes:5} spilled".format(**entry),
                  f"{', '.join(counts)}{' instructions a weight' * bool(counts):22}", each.used_by[0])  # fmt: skip
            entries.append(entry | {**{n: each.of[n] for n in ("constants", "options")}, "used_by": each.used_by})
    path = args.output_dir / f"{datetime.date.today()}_triton-{triton.__version__}_ahead.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["python", "scripts/ahead.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "ran_on_a_gpu": False,
        "kernels": entries,
    }
    write_whole(path, json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME",
                        help=f"of {', '.join(MODELS)} (all)")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
