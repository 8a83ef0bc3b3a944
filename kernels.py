"""Products with a few rows, and attention, at memory speed: the layers, and which kernel each of them gets.

kernels.cpp is for CPUs with AVX-512 and bf16. It is compiled when a model first needs it, and kept in the user's cache.
ATen has kernels for quantized weights on every CPU, kernels_triton.py those for CUDA. The plain twin of each product is
`F.linear` with the dequantized weight, that of attention `model.attention`.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v and mask, as in `model.attention`
SOURCE = Path(__file__).with_name("kernels.cpp")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11
# Up to this many rows of x the kernels are faster than GEMM.
MAX_ROWS = 16
ROWS, TALL = 4, 16  # rows of the weight that the kernels of int8 and int4 interleave


class Norm(Protocol):
    """An RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor: ...


@functools.cache
def library() -> Path | None:
    """Compile and load kernels.cpp, and return the library's path.

    None on a CPU that it is not for, and, with a line on stderr, where it cannot be compiled or loaded.
    """
    compiler, info = shlex.split(os.environ.get("CXX") or "g++"), Path("/proc/cpuinfo")
    cpu = info.read_text() if info.is_file() else ""
    program = shutil.which(compiler[0])
    if "avx512_bf16" not in cpu:
        return None
    if program is None:
        print(f"kernels.cpp is not used, products will be slower: there is no {compiler[0]}", file=sys.stderr)
        return None
    version = Path(program).stat()  # of the link's target; to ask the compiler would take a process
    home = Path(torch.__file__).parent
    command = [*compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", STABLE_ABI]
    command += [f"-I{home / 'include'}", str(SOURCE), f"-L{home / 'lib'}", "-ltorch_cpu"]
    features = sorted({line for line in cpu.splitlines() if line.startswith(("model name", "flags"))})
    made_by = [program, str(version.st_size), str(version.st_mtime_ns), torch.__version__]
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *command, *made_by, *features]).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-kernels"
        path = folder / f"{key[:16]}.so"
        if not path.is_file():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        print("kernels.cpp is not used, products will be slower:", said.strip().splitlines()[-1:], file=sys.stderr)
        return None


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


def packed_weight(values: Tensor) -> nn.Parameter:
    return constant(empty_weight(values.shape, values.dtype, values.device).copy_(values))


# ---------------------------------------------------------------------------------------------------------------------
# The operators, `torch.ops.kernels.*`, opaque to torch.compile. x [M, K]; weights as the layers pack them.
# `torch.library.custom_op` would import the compiler at the first call: an eager run's first token came a second later.

OPERATORS = {
    "bf16_product": "(Tensor x, Tensor weight) -> Tensor",
    "int8_product": "(Tensor x, Tensor weight, Tensor scales) -> Tensor",
    "int4_product": "(Tensor x, Tensor weight, Tensor scales, Tensor zeros) -> Tensor",
    "aten_int4_product": "(Tensor x, Tensor weight, Tensor scales_and_zeros) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor",
}
for name, schema in OPERATORS.items():
    torch.library.define(f"kernels::{name}", schema)
# It reads on the host how many rows each expert has, which a CUDA graph cannot.
torch.library.define(
    "kernels::by_expert",
    "(Tensor x, Tensor experts, str form, Tensor[] stacks) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


# A wrapper, since in a nested region inductor loses ATen's constant argument, the group size (torch 2.13).
@torch.library.impl("kernels::aten_int4_product", "CPU")
def aten_int4_product(x: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
    group_size = x.shape[1] // scales_and_zeros.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, scales_and_zeros)


@torch.library.register_fake("kernels::attention")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("kernels::bf16_product")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("kernels::int8_product")
def _(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales.numel())


@torch.library.register_fake("kernels::int4_product")
def _(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0] * TALL)


@torch.library.register_fake("kernels::aten_int4_product")
def _(x: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales_and_zeros.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# What torch.compile makes kernels of

GPU = "cuda"  # the type of device for which it writes Triton
# Compiled, a product with at most this many rows is written as a multiply and a sum, which inductor streams at memory
# speed; the GEMM library reaches two thirds of it. With more rows GEMM wins.
MAX_REDUCTION_ROWS = 2


def as_reduction(x: Tensor) -> bool:
    """Say whether a product with x [..., K] is written as a multiply and a sum."""
    return torch.compiler.is_compiling() and x.shape[:-1].numel() <= MAX_REDUCTION_ROWS


def in_one_loop(x: Tensor) -> bool:
    """Say whether a product with x [..., K] and what surrounds it are written as one loop, by `streamed_linear`.

    Only on a GPU, where each kernel launch saved counts.
    """
    return as_reduction(x) and x.device.type == GPU


def made_once(x: Tensor) -> Tensor:
    """Have x written to memory: fused into what reads it, it would be computed again for every output.

    x must not be a view of part of another tensor: torch 2.11 would read from where that tensor begins.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def streamed_product(x: Tensor, weight: Tensor, times: Tensor | None = None) -> Tensor:
    """Multiply x [..., K] with weight [N, K], or each row with a weight of its own, [..., N, K]; fp32 [..., N].

    times [K]: is multiplied with x first.
    """
    wide = made_once(x).float()
    wide = wide if times is None else wide * times.float()
    parts = 1 if weight.device.type == GPU else num_partial_sums(weight.shape[-1])
    products = wide.unflatten(-1, (parts, -1)).unsqueeze(-3) * weight.float().unflatten(-1, (parts, -1))
    return products.sum(dim=-1).sum(dim=-1)


def streamed_sums(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, norm: Norm | None
) -> Tensor:  # fmt: skip
    """As `streamed_linear`, in fp32."""
    y = streamed_product(x, weight, None if norm is None else norm.weight)
    if scales is not None:
        y = y * scales.float()
    if norm is not None:
        squares = x.float().square().unsqueeze(-2).expand(*x.shape[:-1], *weight.shape)
        y = y * torch.rsqrt(squares.mean(dim=-1) + norm.eps)
    return y if bias is None else y + bias


def streamed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, norm: Norm | None = None,
    gated: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute `LinearLayer.forward` in one loop; scales [N]: of an int8 weight.

    The norm divides the product by x's root mean square, which is summed in the same loop for each output.
    """
    if gated:
        biases, halves_of_scales = ((None, None) if t is None else t.chunk(2) for t in (bias, scales))
        halves = zip(weight.chunk(2), biases, halves_of_scales, strict=True)
        y = swiglu(*(streamed_sums(x, *half, norm) for half in halves))
    else:
        y = streamed_sums(x, weight, bias, scales, norm)
    y = y if residual is None else residual + y
    return made_once(y.type_as(x))  # torch 2.11 would finish the sums again in each kernel that reads them


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    # The bias is added apart: in a nested region `F.linear` with a bias specializes a dynamic number of rows.
    y = streamed_product(x, weight) if as_reduction(x) else F.linear(x, weight)
    return (y if bias is None else y + bias).type_as(x)


def num_partial_sums(size: int) -> int:
    """Return into how many equal parts to cut a sum: above 4,096 terms inductor's C++ is no longer a fast loop."""
    fewest = -(-size // 4096)
    return next((parts for parts in range(fewest, 16 * fewest) if size % parts == 0), 1)


def num_copies(positions: Tensor, num_sharing: int) -> int:
    """Return how often a step at positions [B, S] stores each key and value, which `num_sharing` query heads share.

    Compiled for a GPU, once for each query head, always the same bits: the loops that store are then as long as the
    one that rotates the queries, and inductor fuses all of them into one kernel.
    """
    on_gpu = torch.compiler.is_compiling() and positions.device.type == GPU
    return num_sharing if on_gpu and positions.shape[1] <= MAX_ROWS else 1


# ---------------------------------------------------------------------------------------------------------------------
# Experts


def by_expert(x: Tensor, experts: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Run each row of x [M, A, K] through its expert [M, A], with all rows of an expert at once; returns [M, A, N].

    product(i, rows): applies expert i to rows [R, K]; called for experts that have any.
    """
    order = experts.flatten().argsort()
    counts = experts.flatten().bincount().tolist()
    sorted_rows = x.flatten(0, 1)[order].split(counts)
    products = torch.cat([product(i, rows) for i, rows in enumerate(sorted_rows) if len(rows)])
    return products[order.argsort()].unflatten(0, experts.shape)


def expert_linear(x: Tensor, experts: Tensor, weight: Callable[[Any], Tensor]) -> Tensor:
    """Multiply each row of x [M, A, K] with the weight of its expert [M, A]; returns [M, A, N].

    weight(i): indexes the stack [X, N, K], by an expert's number, a tensor of them, or `...`.
    """
    if not torch.compiler.is_compiling():
        return by_expert(x, experts, lambda i, rows: F.linear(rows, weight(i)))
    if x.shape[0] <= MAX_ROWS:  # the product's loop reads the chosen expert in place: nothing is copied
        return streamed_product(x, weight(experts)).type_as(x)
    return torch.ops.kernels.by_expert(x, experts, "Linear", [weight(...)])


@torch.library.impl("kernels::by_expert", "CompositeExplicitAutograd")
def _(x: Tensor, experts: Tensor, form: str, stacks: list[Tensor]) -> Tensor:
    return by_expert(x, experts, lambda i, rows: FORMS[form](rows, *(stack[i] for stack in stacks)))


@torch.library.register_fake("kernels::by_expert")
def _(x: Tensor, experts: Tensor, form: str, stacks: list[Tensor]) -> Tensor:
    row = FORMS[form](x[:1, 0], *(stack[0] for stack in stacks))
    return x.new_empty(*experts.shape, row.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# The layers


def constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class LinearLayer(nn.Module):
    """A linear layer, or a stack of them, with what surrounds its product."""

    def forward(
        self, x: Tensor, experts: Tensor | None = None, norm: Norm | None = None, gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the outputs [..., N] for x [..., K].

        experts [...]: for a stack, which of its layers each row of x goes through. norm: is applied to x first. gated:
        the outputs are gate and up, one after the other, and silu(gate) * up is returned, [..., N / 2]. residual: is
        added to what is returned, and has its shape and dtype.
        """
        fused = self.fused(x, norm, gated, residual) if experts is None else None
        if fused is not None:
            return fused
        y = self.multiply(x if norm is None else norm(x), experts)
        if gated:
            y = swiglu(*y.chunk(2, dim=-1))
        return y if residual is None else residual + y

    def multiply(self, x: Tensor, experts: Tensor | None) -> Tensor:
        """Return the product, plus the bias."""
        raise NotImplementedError

    def fused(self, x: Tensor, norm: Norm | None, gated: bool, residual: Tensor | None) -> Tensor | None:
        """Compute all of `forward` in one kernel, or return None where there is none for this x."""
        return None


class KernelLinear(LinearLayer):
    """A linear layer with a kernel for up to MAX_ROWS rows; above that, GEMM with the unpacked weight.

    Its tensors may all be stacks of X layers: then `experts` says which of them each row of x goes through.
    """

    tensors: tuple[str, ...] = ("weight",)  # the names of those that a product takes

    def __init__(self, bias: Tensor | None):
        super().__init__()
        self.bias = bias

    def multiply(self, x: Tensor, experts: Tensor | None) -> Tensor:
        tensors = [getattr(self, name) for name in self.tensors]
        if experts is not None:
            return torch.ops.kernels.by_expert(x, experts, type(self).__name__, tensors)
        y = self.matmul(x.reshape(-1, x.shape[-1]), *tensors)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])

    @classmethod
    def matmul(cls, rows: Tensor, *tensors: Tensor) -> Tensor:
        """Multiply rows [M, K] with the weight that a layer's `tensors` hold, by the kernel or by GEMM: [M, N]."""
        return cls.product(rows, *tensors) if rows.shape[0] <= MAX_ROWS else cls.gemm(rows, *tensors)

    product: Callable[..., Tensor]
    gemm: Callable[..., Tensor]


class StreamedLinear(KernelLinear):
    """bf16, the weight [N, K] as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(bias)
        self.weight = weight

    @staticmethod
    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.kernels.bf16_product(rows, weight)

    @staticmethod
    def gemm(rows: Tensor, weight: Tensor) -> Tensor:
        return F.linear(rows, weight)


class StreamedInt8Linear(KernelLinear):
    """codes int8 [N, K] and scales bf16 [N]; packed in tiles of 4 rows and 64 columns: [N / 4, K / 64, 4, 64]."""

    tensors = ("weight", "scales")

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        super().__init__(bias)
        packed = codes.unflatten(-1, (-1, 64)).unflatten(-3, (-1, ROWS)).transpose(-3, -2)
        self.weight, self.scales = packed_weight(packed), constant(scales)

    @staticmethod
    def product(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return torch.ops.kernels.int8_product(rows, weight, scales)

    gemm = product


class StreamedInt4Linear(KernelLinear):
    """codes uint8 0 to 15 [N, K], zeros too, [N, K / group], scales bf16 [N, K / group]; packed as in kernels.cpp."""

    tensors = ("weight", "scales", "zeros")

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None):
        super().__init__(bias)
        # 32 columns of a row are four times eight, each of four even and four odd ones.
        columns = codes.unflatten(-1, (-1, 4, 4, 2)).unflatten(-5, (-1, TALL)).movedim(-5, -3).mT  # [.., 4, TALL, 2, 4]
        first, second = columns.unflatten(-1, (2, 2)).unbind(-1)
        self.weight = packed_weight(first | second << 4)  # [N / TALL, K / 32, 4, TALL, 2, 2]
        scales, zeros = (values.unflatten(-2, (-1, TALL)).mT for values in (scales, zeros))  # [N / TALL, groups, TALL]
        self.scales = packed_weight(scales)
        first, second = zeros.unflatten(-1, (2, -1)).unbind(-2)
        self.zeros = packed_weight(first | second << 4)

    @staticmethod
    def product(rows: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return torch.ops.kernels.int4_product(rows, weight, scales, zeros)

    gemm = product


class AtenInt8Linear(KernelLinear):
    """codes int8 [N, K], scales [N] in the dtype of x."""

    tensors = ("weight", "scales")

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        super().__init__(bias)
        self.weight, self.scales = constant(codes), constant(scales)

    @staticmethod
    def product(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, weight, scales)

    @staticmethod
    def gemm(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return F.linear(rows, (weight.float() * scales.float().unsqueeze(1)).to(rows.dtype))


class AtenInt4Linear(KernelLinear):
    """codes uint8 [N, K], zeros uint8 and scales in x's dtype [N, K / group]; packed by ATen for the processor."""

    tensors = ("weight", "scales_and_zeros")

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None):
        super().__init__(bias)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.weight = constant(
            pack(codes.int(), 1) if codes.ndim == 2 else torch.stack([pack(each.int(), 1) for each in codes])
        )
        # ATen's zero is a weight, the one that code 8 stands for. [K / group, N, 2]
        self.scales_and_zeros = constant(torch.stack((scales.mT, ((8 - zeros.to(scales.dtype)) * scales).mT), dim=-1))

    @staticmethod
    def product(rows: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
        return torch.ops.kernels.aten_int4_product(rows, weight, scales_and_zeros)

    gemm = product  # GEMM would be faster, but ATen's packing is not documented and cannot be undone


# By a layer's class name, what multiplies rows with the tensors of one layer.
FORMS: dict[str, Callable[..., Tensor]] = {
    "Linear": F.linear,
    **{
        kind.__name__: kind.matmul
        for kind in (StreamedLinear, StreamedInt8Linear, StreamedInt4Linear, AtenInt8Linear, AtenInt4Linear)
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Which layer a weight gets


def for_cuda(device: torch.device) -> ModuleType | None:
    """Import kernels_triton.py, which takes a second, for a GPU where Triton is installed; else return None."""
    found = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return importlib.import_module("kernels_triton") if found else None


def linear_layer(weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """Return the layer for a weight [N, K], or a stack of them; None where no kernel takes it, as below."""
    return StreamedLinear(weight, bias) if weight.is_contiguous() and streams(weight.dtype, weight, ROWS, 32) else None


def int8_layer(codes: Tensor, scales: Tensor, bias: Tensor | None) -> nn.Module | None:
    """Return the layer for codes [N, K] and scales [N], whose dtype is the model's."""
    if streams(scales.dtype, codes, ROWS, 64):
        return StreamedInt8Linear(codes, scales, bias)
    if codes.ndim == 2 and (cuda := for_cuda(codes.device)):
        return cuda.Int8Linear(codes, scales, bias)
    # ATen's kernels crash on sizes that are not multiples of their tiles.
    N, K = codes.shape[-2:]
    return AtenInt8Linear(codes, scales, bias) if codes.device.type == "cpu" and N % 4 == 0 and K % 16 == 0 else None


def int4_layer(codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group_size: int) -> nn.Module | None:
    """Return the layer for codes [N, K], zeros and scales [N, groups]; the scales' dtype is the model's."""
    N, K = codes.shape[-2:]
    # ATen's kernels take these group sizes alone, those of Triton powers of 2.
    if K % group_size or group_size not in (32, 64, 128, 256):
        return None
    if streams(scales.dtype, codes, TALL, 32):
        return StreamedInt4Linear(codes, scales, zeros, bias)
    if codes.ndim == 2 and (cuda := for_cuda(codes.device)):
        return cuda.Int4Linear(codes, scales, zeros, bias)
    return AtenInt4Linear(codes, scales, zeros, bias) if codes.device.type == "cpu" and N % 16 == 0 else None


def attention_of(dtype: torch.dtype, device: torch.device, plain: Attend) -> Attend:
    """Return the function that attends: a kernel where there is one, else `plain`."""
    if cuda := for_cuda(device):
        return cuda.attention
    takes = dtype == torch.bfloat16 and device.type == "cpu" and library() is not None
    return torch.ops.kernels.attention.default if takes else plain


def streams(dtype: torch.dtype, weight: Tensor, rows: int, columns: int) -> bool:
    """Say whether kernels.cpp takes a weight [N, K], in tiles of so many rows and columns, in a model of this dtype."""
    N, K = weight.shape[-2:]
    fits = dtype == torch.bfloat16 and weight.device.type == "cpu" and N % rows == 0 and K % columns == 0
    return fits and library() is not None
