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
from model import MLP, Attention, RMSNorm

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


MADV_DONTNEED, MADV_HUGEPAGE = 4, 14  # of linux/mman.h


def advise(tensor: Tensor, advice: int) -> None:
    """Tell Linux how the pages are used that a tensor on a CPU begins in and goes on to."""
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(start, tensor.data_ptr() + tensor.nbytes - start, advice)


def empty_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Allocate a weight, on a CPU in pages of 2 MiB where Linux grants them.

    It is streamed with fewer page lookups, 1.1 to 1.3 times as fast as with pages of 4 KiB. A mapped file has large
    pages already, where its file system does.
    """
    weight = torch.empty(shape, dtype=dtype, device=device)
    advise(weight, MADV_HUGEPAGE)
    return weight


def release_file_pages(tensor: Tensor) -> None:
    """Take the pages of a mapped file out of memory, as which they count, until they are read again.

    A tensor that lies elsewhere is left alone.
    """
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        span, _, _, _, inode = line.split()[:5]
        begin, end = (int(address, 16) for address in span.split("-"))
        if begin <= tensor.data_ptr() < end and inode != "0":
            advise(tensor, MADV_DONTNEED)


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
    "product": "(Tensor x, Tensor[] weight, *, Tensor? experts=None) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps, float? offset) -> Tensor",
    "self_attention": "(Tensor x, Tensor[] qkv, Tensor? bias, Tensor[] o, Tensor? q_norm, Tensor? k_norm, float eps,"
    " float? offset, float query_multiplier, Tensor cos, Tensor sin, Tensor positions, Tensor mask,"
    " Tensor(a!) keys, Tensor(b!) values) -> Tensor",
    "mlp": "(Tensor x, Tensor[] gate_up, Tensor[] down) -> Tensor",
}
for name, schema in OPERATORS.items():
    torch.library.define(f"kernels::{name}", schema)


def num_outputs(weight: list[Tensor]) -> int:
    return weight[0].shape[-2] if len(weight) == 1 else weight[1].shape[-3] * weight[1].shape[-1]


@torch.library.register_fake("kernels::product")
def _(x: Tensor, weight: list[Tensor], experts: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs(weight))


@torch.library.register_fake("kernels::attention")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("kernels::mlp")
def _(x: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs(down))


# ---------------------------------------------------------------------------------------------------------------------
# The layers


class CpuLinear(KernelLinear):
    """A linear whose kernel tells by its tensors what form they have."""

    @staticmethod
    def product(rows: Tensor, *tensors: Tensor, experts: Tensor | None = None) -> Tensor:
        return torch.ops.kernels.product(rows, tensors, experts=experts)

    gemm: Callable[..., Tensor] = product


class CpuBf16(CpuLinear):
    """bf16 or fp16, the weight [N, K] as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(bias)
        self.weight = weight

    gemm: Callable[..., Tensor] = staticmethod(F.linear)


class Avx2Bf16(CpuBf16):
    """The same without instructions for bf16: many rows are multiplied in fp32, since ATen's GEMM of bf16 is slow."""

    gemm = CpuLinear.product


def interleave(values: Tensor, rows: int) -> Tensor:
    """Put what so many rows of a weight have for a group beside each other: [N, groups] -> [N / rows, groups, rows]."""
    return values.unflatten(-2, (-1, rows)).mT


class CpuInt8(CpuLinear):
    """codes int8 [N, K], scales and zeros, int8 or None, [N, groups]; codes in tiles of 4 rows and 64 columns."""

    names: tuple[str, ...] = ("weight", "scales")

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None):
        super().__init__(bias)
        packed = codes.unflatten(-1, (-1, 64)).unflatten(-3, (-1, BLOCK_ROWS)).transpose(-3, -2)
        self.weight = packed_weight(packed)  # [N / 4, K / 64, 4, 64]
        self.scales = packed_weight(interleave(scales, BLOCK_ROWS))
        if zeros is not None:
            self.zeros, self.names = packed_weight(interleave(zeros, BLOCK_ROWS)), ("weight", "scales", "zeros")


class CpuInt4(CpuLinear):
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


# ---------------------------------------------------------------------------------------------------------------------
# Modules of the model that are an operator each, since their steps take less time than so many calls


def replace_modules_(model: nn.Module) -> None:
    """Give a model in one of `dtypes` the operators of what stands between its linears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            module.attend = torch.ops.kernels.attention.default
        if (fast := fast_module(module)) is not None:
            model.set_submodule(name, fast)


def fast_module(module: nn.Module) -> nn.Module | None:
    """Return what computes a module of a model in one of `dtypes` by an operator; None where there is none."""
    if isinstance(module, RMSNorm) and module.ranks.count == 1:
        return CpuNorm(module)
    if isinstance(module, Attention) and have_kernels(module.qkv_proj, module.o_proj):
        has_more = module.config.qk_norm_over_heads or module.config.query_scaling_beta
        return None if has_more else CpuAttention(module)
    if isinstance(module, MLP) and have_kernels(module.gate_up_proj, module.down_proj):
        return None if module.gelu or module.gate_up_proj.bias is not None else CpuMLP(module)
    return None


def have_kernels(first: nn.Module, last: nn.Module) -> bool:
    return isinstance(first, CpuLinear) and isinstance(last, CpuLinear) and last.bias is None


class CpuNorm(RMSNorm):
    """A norm in one call; compiled, it is left to inductor, which fuses it with what surrounds it."""

    def __init__(self, norm: RMSNorm):
        self.__dict__.update(norm.__dict__)
        self.arguments = (norm.weight, norm.eps, norm.offset)
        self.operator = torch.ops.kernels.rms_norm.default

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.compiler.is_compiling() else self.operator(x, *self.arguments)


class CpuAttention(Attention):
    """Attention over caches for a few rows in one call.

    Not compiled: torch 2.13 takes no custom operator in a nested region that writes into its arguments.
    """

    def __init__(self, attn: Attention):
        self.__dict__.update(attn.__dict__)
        eps, offset = (0, None) if attn.q_norm is None else (attn.q_norm.eps, attn.q_norm.offset)
        norms = [None if norm is None else norm.weight for norm in (attn.q_norm, attn.k_norm)]
        qkv, o = attn.qkv_proj, attn.o_proj
        # Found once: to look them up would take a tenth of a small model's step.
        self.arguments = (qkv.tensors, qkv.bias, o.tensors, *norms, eps, offset, attn.config.query_multiplier)
        self.operator = torch.ops.kernels.self_attention.default

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        cache = self.cache
        if cache is None or x.shape[0] * x.shape[1] > MAX_ROWS or torch.compiler.is_compiling():
            return super().forward(x, cos, sin, positions, mask)
        context = cos, sin, positions, mask, cache.k, cache.v
        return self.ranks.all_reduce(self.operator(x, *self.arguments, *context))


class CpuMLP(MLP):
    """A feed-forward for a few rows in one call."""

    def __init__(self, mlp: MLP):
        self.__dict__.update(mlp.__dict__)
        self.arguments = (mlp.gate_up_proj.tensors, mlp.down_proj.tensors)
        self.operator = torch.ops.kernels.mlp.default

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[1] > MAX_ROWS:
            return super().forward(x)
        return self.ranks.all_reduce(self.operator(x, *self.arguments))
