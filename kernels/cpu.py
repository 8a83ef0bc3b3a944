"""Products with a few rows, and attention, at memory speed on x86 CPUs: cpu.cpp and its layers.

cpu.cpp is compiled when a model first needs it, and kept in the user's cache: for AVX-512 with bf16 and VNNI where the
CPU has them, else for AVX2. LLAMA_KERNELS_MARCH holds it to less, as the compiler's -march (x86-64-v3: AVX2). The plain
twin of each product is `F.linear` with the dequantized weight, that of attention `model.attention`.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.inductor import materialize
from kernels.layers import MAX_ROWS, KernelLinear
from linears import frozen_parameter
from model import MLP, Attention, Block, RMSNorm, Transformer, scaled

SOURCES = [
    Path(__file__).with_name(name)
    for name in ("cpu.cpp", "threads.h", "codes.h", "attention.h", "avx512.h", "tiles.h", "avx2.h")
]
NEEDED = {"avx2", "fma", "f16c"}  # of a CPU, as Linux names them
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11
BLOCK_ROWS = 4  # rows of a bf16 weight that the kernels take together


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
                print("compiling kernels/cpu.cpp for this CPU, once: 5 to 20 s", file=sys.stderr)
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
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no reason given"]
        reason = next((line for line in said if "error:" in line), said[-1])  # of a compiler, which also warns
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

    What has been written to them since is lost. A tensor that lies elsewhere is left alone.
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

AROUND = "Tensor x, Tensor? norm, Tensor? output_norm, float eps, float? offset, float multiplier, bool residual"
OUTPUT_PROJECTION = 8  # its place behind x in attention_block
OPERATORS = {
    "product": "(Tensor x, Tensor[] weight, *, Tensor? experts=None) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor",
    "attention_block": f"({AROUND}, Tensor[] qkv, Tensor? bias, Tensor[] o, Tensor? q_norm, Tensor? k_norm,"
    " float query_multiplier, Tensor cos, Tensor sin, Tensor positions, Tensor mask, Tensor(a!) keys,"
    " Tensor(b!) values) -> Tensor",
    "mlp_block": f"({AROUND}, Tensor[] gate_up, Tensor[] down, bool gelu) -> Tensor",
}
for name, schema in OPERATORS.items():
    torch.library.define(f"kernels::{name}", schema)


def num_outputs(weight: list[Tensor]) -> int:
    return weight[0].shape[-2] if len(weight) == 1 else weight[1].shape[-3] * weight[1].shape[-1]


@torch.library.register_fake("kernels::product")
def _(x: Tensor, weight: list[Tensor], experts: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs(weight))


@torch.library.register_fake("kernels::attention")
@torch.library.register_fake("kernels::mlp_block")
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("kernels::attention_block")
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs(arguments[OUTPUT_PROJECTION]))


# ---------------------------------------------------------------------------------------------------------------------
# The layers


class CpuLinear(KernelLinear):
    """A linear whose kernel tells by its tensors what form they have."""

    kept_outputs: int | None = None  # where the weight has been given more rows: so many are its own

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


def code_rows() -> int:
    """Return R, how many rows of int8 and int4 are interleaved: two vectors of 32 bits."""
    return 32 if instruction_set() == "avx512" else 16


def takes_codes(dtype: torch.dtype, weight: Tensor, columns: int) -> bool:
    """Say whether cpu.cpp takes codes [N, K] in a model of this dtype: of any N, in a stack of multiples of R."""
    return has_kernel(dtype, weight, code_rows() if weight.ndim > 2 else 1, columns)


def interleave(values: Tensor) -> Tensor:
    """Put what R rows of a weight have in a column beside each other: [N, C] -> [N / R, C, R].

    Rows of zeros fill the last block.
    """
    rows = F.pad(values, (0, 0, 0, -values.shape[-2] % code_rows()))
    return rows.unflatten(-2, (-1, code_rows())).mT


class CpuCodes(CpuLinear):
    """int8 and int4, of any N outputs."""

    def __init__(self, N: int, bias: Tensor | None):
        missing = -N % code_rows()
        super().__init__(bias if bias is None else F.pad(bias, (0, missing)))
        self.kept_outputs = N if missing else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.kept_outputs is None else y[..., : self.kept_outputs]


class CpuInt8(CpuCodes):
    """codes int8 [N, K]; scales and zeros, int8 or None, [N, groups]. Pairs of codes are interleaved."""

    names: tuple[str, ...] = ("weight", "scales")

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None):
        super().__init__(codes.shape[-2], bias)
        pairs = codes.contiguous().view(torch.int16)
        self.weight = packed_weight(interleave(pairs), torch.int8)  # [N / R, K / 2, R * 2]
        self.scales = packed_weight(interleave(scales))
        if zeros is not None:
            self.zeros, self.names = packed_weight(interleave(zeros)), ("weight", "scales", "zeros")


class CpuInt4(CpuCodes):
    """nibbles uint8 [N, K / 2], two codes each, the even column in the low half; zeros uint8 and scales [N, groups]."""

    names = ("weight", "scales", "zeros")

    def __init__(self, nibbles: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None):
        super().__init__(nibbles.shape[-2], bias)
        # Eight columns of a row are four bytes: four even ones, two to a byte, then four odd ones.
        first, second = (nibbles[..., i::2].unflatten(-1, (-1, 2)) for i in (0, 1))  # [N, K / 8, 2]
        columns = torch.stack((first & 15 | second << 4, first >> 4 | second & 240), dim=-2)
        words = interleave(columns.flatten(-3).view(torch.int32))  # [N / R, K / 8, R]
        self.weight = packed_weight(words, torch.uint8)
        self.scales = packed_weight(interleave(scales))
        first, second = interleave(zeros).unflatten(-1, (2, -1)).unbind(-2)
        self.zeros = packed_weight(first | second << 4)


# ---------------------------------------------------------------------------------------------------------------------
# The blocks


def replace_blocks_(model: Transformer) -> None:
    """Give a model in one of `dtypes` the attention and, where their linears have kernels, the blocks of cpu.cpp.

    Of a block of another class, as an EAGLE-3 head has, attention and feed-forward alone.
    """
    # All or none, since a compiled step takes layers to be alike.
    fit = all(has_attention(block.self_attn) for block in model.layers if type(block) is Block)
    for i, block in enumerate(model.layers):
        attn, mlp = block.self_attn, block.mlp
        attn.attend = torch.ops.kernels.attention.default
        if type(block) is not Block:
            block.self_attn = CpuAttention(attn) if has_attention(attn) else attn
            block.mlp = CpuMLP(mlp) if has_mlp(mlp) else mlp
        elif fit:
            cast("nn.ModuleList", model.layers)[i] = CpuBlock(block)


def has_attention(attn: Attention) -> bool:
    """Say whether attention_block computes an attention."""
    config = attn.config
    others = attn.ranks.count > 1 or config.qk_norm_over_heads or config.query_scaling_beta != 0
    return have_kernels(attn.qkv_proj, attn.o_proj) and not others


def has_mlp(mlp: nn.Module) -> TypeGuard[MLP]:
    """Say whether mlp_block computes a feed-forward."""
    return isinstance(mlp, MLP) and have_kernels(mlp.gate_up_proj, mlp.down_proj) and mlp.gate_up_proj.bias is None


def have_kernels(first: nn.Module, last: nn.Module) -> bool:
    fit = (isinstance(layer, CpuLinear) and layer.kept_outputs is None for layer in (first, last))
    return all(fit) and last.bias is None


def has_few_rows(x: Tensor) -> bool:
    return x.shape[0] * x.shape[1] <= MAX_ROWS


# What the operators take of a module is found once: to look it up at each token would take a tenth of a small step.


def attention_arguments(attn: Attention) -> tuple[Any, ...]:
    norms = map(weight_of, (attn.q_norm, attn.k_norm))
    return attn.qkv_proj.tensors, attn.qkv_proj.bias, attn.o_proj.tensors, *norms, attn.config.query_multiplier


def mlp_arguments(mlp: MLP) -> tuple[Any, ...]:
    return mlp.gate_up_proj.tensors, mlp.down_proj.tensors, mlp.gelu


def stored(*context: Tensor) -> Iterable[Tensor]:
    """Let inductor compute rotations and mask once for all layers, and not anew for each operator that takes them."""
    return map(materialize, context) if torch.compiler.is_compiling() else context


class CpuAttention(Attention):
    """Attention on one rank in one call for a few rows; compiled, it must not stand in a nested region."""

    def __init__(self, attn: Attention):
        self.__dict__.update(attn.__dict__)
        config = attn.config
        around = None, None, config.rms_norm_eps, config.norm_offset, 1, False
        self.arguments = (*around, *attention_arguments(attn))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        if (cache := self.cache) is None or not has_few_rows(x):
            return super().forward(x, cos, sin, positions, mask)
        cos, sin, mask = stored(cos, sin, mask)
        context = cos, sin, positions, mask, cache.k, cache.v
        return torch.ops.kernels.attention_block.default(x, *self.arguments, *context)


class CpuMLP(MLP):
    """A feed-forward on one rank in one call for a few rows."""

    def __init__(self, mlp: MLP):
        self.__dict__.update(mlp.__dict__)
        self.arguments = (None, None, 0, None, 1, False, *mlp_arguments(mlp))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.kernels.mlp_block.default(x, *self.arguments) if has_few_rows(x) else super().forward(x)


class CpuBlock(Block):
    """`Block` on one rank, whose halves are one call each for a few rows: their steps take less than so many calls.

    Compiled, they stand in the graph as they are, and not in a nested region, where torch 2.13 takes no operator that
    writes into its arguments. Experts are not an operator's, and stay in the region.
    """

    def __init__(self, block: Block):
        self.__dict__.update(block.__dict__)  # the modules exist already
        config = self.self_attn.config
        common = config.rms_norm_eps, config.norm_offset, self.multiplier, True
        norms = map(weight_of, (self.input_layernorm, self.attn_output_norm))
        self.attention_arguments = (*norms, *common, *attention_arguments(self.self_attn))
        self.mlp_arguments: tuple[Any, ...] | None = None
        if has_mlp(self.mlp):
            norms = map(weight_of, (self.post_attention_layernorm, self.mlp_output_norm))
            self.mlp_arguments = (*norms, *common, *mlp_arguments(self.mlp))
        self.operators = torch.ops.kernels.attention_block.default, torch.ops.kernels.mlp_block.default

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        cache, mlp_arguments = self.self_attn.cache, self.mlp_arguments
        is_split = mlp_arguments is None and torch.compiler.is_compiling()
        if cache is None or not has_few_rows(x) or is_split:
            return super().forward(x, cos, sin, positions, mask)
        cos, sin, mask = stored(cos, sin, mask)
        attention_block, mlp_block = self.operators
        x = attention_block(x, *self.attention_arguments, cos, sin, positions, mask, cache.k, cache.v)
        if mlp_arguments is not None:
            return mlp_block(x, *mlp_arguments)
        y = self.mlp_output_norm(self.mlp(self.post_attention_layernorm(x)))
        return x + scaled(y, self.multiplier)


def weight_of(norm: nn.Module | None) -> Tensor | None:
    return norm.weight if isinstance(norm, RMSNorm) else None
