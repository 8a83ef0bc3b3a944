"""Products with a few rows, and attention, at memory speed on x86 CPUs: cpu.cpp and its layers.

cpu.cpp is compiled when a model first needs it, and kept in the user's cache: for AVX-512 with bf16 where the CPU has
them, else for AVX2. LLAMA_KERNELS_MARCH holds it to less, as the compiler's -march (x86-64-v3: AVX2). The plain twin of
each product is `F.linear` with the dequantized weight, that of attention `model.attention`.
"""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layers import MAX_ROWS, KernelLinear
from linears import frozen_parameter

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.cpp", "threads.h", "avx512.h", "avx2.h")]
NEEDED = {"avx2", "fma", "f16c"}  # of a CPU, as Linux names them
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11
BLOCK_ROWS, INT4_BLOCK_ROWS = 4, 16  # rows of the weight that the kernels of int8 and int4 interleave


lock = threading.Lock()


def library() -> Path | None:
    """Compile and load cpu.cpp, once, and return the library's path.

    None on a CPU that it is not for, and, with a line on stderr, where it cannot be compiled or loaded.
    """
    with lock:
        return make_library()


def start_to_compile() -> None:
    """Let `library` begin, in a thread: what compiles for the first time does so while the weights load."""
    threading.Thread(target=library, daemon=True).start()


@functools.cache
def make_library() -> Path | None:
    compiler, info = shlex.split(os.environ.get("CXX") or "g++"), Path("/proc/cpuinfo")
    cpu = info.read_text() if info.is_file() else ""
    program = shutil.which(compiler[0])
    if not set(cpu.split()) >= NEEDED:
        return None
    if program is None:
        print(f"cpu.cpp is not used, products will be slower: there is no compiler {compiler[0]!r}", file=sys.stderr)
        return None
    march = os.environ.get("LLAMA_KERNELS_MARCH") or "native"
    version = Path(program).stat()  # of the link's target; to ask the compiler would take a process
    home = Path(torch.__file__).parent
    command = [*compiler, "-O3", f"-march={march}", "-fopenmp", "-shared", "-fPIC", "-std=c++17", STABLE_ABI]
    command += [f"-I{home / 'include'}", str(SOURCES[0]), f"-L{home / 'lib'}", "-ltorch_cpu"]
    features = sorted({line for line in cpu.splitlines() if line.startswith(("model name", "flags"))})
    made_by = [program, str(version.st_size), str(version.st_mtime_ns), torch.__version__]
    sources = [path.read_text() for path in SOURCES]
    key = hashlib.sha256("\n".join([*sources, *command, *made_by, *features]).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-kernels"
        path = folder / f"{key[:16]}.so"
        if not path.is_file():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if sys.stderr.isatty():
                print("compiling kernels/cpu.cpp for this CPU, once: about 20 s", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:  # other processes may be compiling it too
                built = Path(temporary, path.name)
                subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
                with built.open("rb") as file:
                    os.fsync(file.fileno())
                built.replace(path)
        if path.stat().st_uid != os.getuid():
            raise OSError(f"{path} belongs to another user")
        torch.ops.load_library(str(path))
        return path
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = (said.strip().splitlines() or ["no reason given"])[-1]
        print(f"cpu.cpp is not used, products will be slower: {reason}", file=sys.stderr)
        return None


# The models of which all products are cpu.cpp's.
served = weakref.WeakSet[nn.Module]()


@contextlib.contextmanager
def own_threads(model: nn.Module, num_rows: int) -> Iterator[None]:
    """While products of so many rows run, let them do so on threads of cpu.cpp's own, and torch on one.

    OpenMP's threads, which torch has, wait for each other after each product; beside another busy program that takes a
    time slice of it. Changes nothing for a model that has other products, or for rows that GEMM takes.
    """
    if model not in served or num_rows > MAX_ROWS or (num_threads := torch.get_num_threads()) == 1:
        yield
        return
    take_threads = functions().take_threads
    take_threads(num_threads, 1)
    try:
        yield
    finally:
        take_threads(0, num_threads)


@functools.cache
def functions() -> ctypes.PyDLL:
    return ctypes.PyDLL(str(library()))


MADV_HUGEPAGE = 14  # of linux/mman.h


def empty_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Allocate a weight, on a CPU in pages of 2 MiB where Linux grants them.

    It is streamed with fewer page lookups, 1.1 to 1.3 times as fast as with pages of 4 KiB. A mapped file has large
    pages already, where its file system does.
    """
    weight = torch.empty(shape, dtype=dtype, device=device)
    if sys.platform == "linux" and weight.device.type == "cpu":
        start = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(start, weight.data_ptr() + weight.nbytes - start, MADV_HUGEPAGE)
    return weight


def release_freed_memory() -> None:
    """Give the system what is free between tensors: glibc keeps it, some 10 % of a model whose weights are repacked."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def packed_weight(values: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Copy values into a weight; dtype: as which its bytes are seen."""
    weight = empty_weight(values.shape, values.dtype, values.device).copy_(values)
    return frozen_parameter(weight.view(dtype or values.dtype))


# Of the models that are served, by instruction set.
DTYPES = {"avx512": (torch.bfloat16,), "avx2": (torch.bfloat16, torch.float16), None: ()}


@functools.cache
def instruction_set() -> str | None:
    """Return what cpu.cpp was compiled for, «avx512» or «avx2»; None where there is no library."""
    if library() is None:
        return None
    functions().instruction_set.restype = ctypes.c_char_p
    return functions().instruction_set().decode()


def dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes of the models that cpu.cpp serves on this CPU."""
    return DTYPES[instruction_set()]


def has_kernel(dtype: torch.dtype, weight: Tensor, rows: int, columns: int) -> bool:
    """Say whether cpu.cpp takes a weight [N, K], in tiles of so many rows and columns, in a model of this dtype."""
    N, K = weight.shape[-2:]
    return weight.device.type == "cpu" and N % rows == 0 and K % columns == 0 and dtype in dtypes()


# ---------------------------------------------------------------------------------------------------------------------
# The operators, `torch.ops.kernels.*`, opaque to torch.compile. x [M, K]; weights as the layers pack them. With experts
# [M, A], x is [M, A, K] and weights are stacks, of which each row takes one.
# `torch.library.custom_op` would import the compiler at the first call: an eager run's first token came a second later.

OPERATORS = {
    "bf16_product": "(Tensor x, Tensor weight, *, Tensor? experts=None) -> Tensor",
    "int8_product": "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros=None, *, Tensor? experts=None) -> Tensor",
    "int4_product": "(Tensor x, Tensor weight, Tensor scales, Tensor zeros, *, Tensor? experts=None) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor",
}
for name, schema in OPERATORS.items():
    torch.library.define(f"kernels::{name}", schema)


@torch.library.register_fake("kernels::bf16_product")
def _(x: Tensor, weight: Tensor, experts: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-2])


@torch.library.register_fake("kernels::int8_product")
def _(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None = None, experts: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[-3] * BLOCK_ROWS)


@torch.library.register_fake("kernels::int4_product")
def _(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, experts: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[-3] * INT4_BLOCK_ROWS)


@torch.library.register_fake("kernels::attention")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def attention() -> Callable[..., Tensor]:
    """Return the operator that attends as `model.attention`, in `dtypes`; to find it takes a first token's time."""
    return torch.ops.kernels.attention.default


# ---------------------------------------------------------------------------------------------------------------------
# The layers


class CpuBf16(KernelLinear):
    """bf16 or fp16, the weight [N, K] as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(bias)
        self.weight = weight

    @staticmethod
    def product(rows: Tensor, weight: Tensor, *, experts: Tensor | None = None) -> Tensor:
        return torch.ops.kernels.bf16_product(rows, weight, experts=experts)

    @staticmethod
    def gemm(rows: Tensor, weight: Tensor) -> Tensor:
        return F.linear(rows, weight)


class Avx2Bf16(CpuBf16):
    """The same without instructions for bf16: many rows are multiplied in fp32, since ATen's GEMM of bf16 is slow."""

    gemm = CpuBf16.product


def interleave(values: Tensor, rows: int) -> Tensor:
    """Put what so many rows of a weight have for a group beside each other: [N, groups] -> [N / rows, groups, rows]."""
    return values.unflatten(-2, (-1, rows)).mT


class CpuInt8(KernelLinear):
    """codes int8 [N, K], scales and zeros, int8 or None, [N, groups]; codes in tiles of 4 rows and 64 columns."""

    names: tuple[str, ...] = ("weight", "scales")

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None):
        super().__init__(bias)
        packed = codes.unflatten(-1, (-1, 64)).unflatten(-3, (-1, BLOCK_ROWS)).transpose(-3, -2)
        self.weight = packed_weight(packed)  # [N / 4, K / 64, 4, 64]
        self.scales = packed_weight(interleave(scales, BLOCK_ROWS))
        if zeros is not None:
            self.zeros, self.names = packed_weight(interleave(zeros, BLOCK_ROWS)), ("weight", "scales", "zeros")

    @staticmethod
    def product(
        rows: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None = None, *, experts: Tensor | None = None
    ) -> Tensor:
        return torch.ops.kernels.int8_product(rows, weight, scales, zeros, experts=experts)

    gemm = product


class CpuInt4(KernelLinear):
    """nibbles uint8 [N, K / 2], two codes each, the even column in the low half; zeros uint8 and scales [N, groups]."""

    names = ("weight", "scales", "zeros")

    def __init__(self, nibbles: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None):
        super().__init__(bias)
        # Eight columns of a row are four bytes: four even ones, two to a byte, then four odd ones.
        first, second = (nibbles[..., i::2].unflatten(-1, (-1, 2)) for i in (0, 1))  # [N, K / 8, 2]
        columns = torch.stack((first & 15 | second << 4, first >> 4 | second & 240), dim=-2)
        columns = columns.flatten(-2).view(torch.int32).unflatten(-2, (-1, 4))  # [N, K / 32, 4, 1]: moved as numbers
        packed = columns.unflatten(-4, (-1, INT4_BLOCK_ROWS)).movedim(-4, -2).flatten(-2)
        self.weight = packed_weight(packed, torch.uint8)  # [N / 16, K / 32, 4, 16 * 4]
        self.scales = packed_weight(interleave(scales, INT4_BLOCK_ROWS))
        first, second = interleave(zeros, INT4_BLOCK_ROWS).unflatten(-1, (2, -1)).unbind(-2)
        self.zeros = packed_weight(first | second << 4)

    @staticmethod
    def product(
        rows: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, *, experts: Tensor | None = None
    ) -> Tensor:
        return torch.ops.kernels.int4_product(rows, weight, scales, zeros, experts=experts)

    gemm = product
