"""Products of a few rows with a weight that streams from memory once: C++ for CPUs with AVX-512 and bf16.

kernels.cpp is compiled when a model first wants it, and kept in the user's cache. Where the CPU, the compiler, the
dtype or a shape is another, `streamed` returns None and the model stays as it is. The plain twin of each product is
`F.linear` with the dequantized weight.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("kernels.cpp")
# Up to so many rows of x the kernels are faster than GEMM.
MAX_ROWS = 16
ROWS = 4  # of the weight that the kernels take together


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compile and load kernels.cpp; None, and a line on stderr, where that cannot be done."""
    compiler, info = os.environ.get("CXX") or shutil.which("g++"), Path("/proc/cpuinfo")
    cpu = info.read_text() if info.is_file() else ""
    if "avx512_bf16" not in cpu or compiler is None:
        return None
    command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", str(SOURCE)]
    features = sorted({line for line in cpu.splitlines() if line.startswith(("model name", "flags"))})
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *command, *features]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-kernels"
    path = folder / f"{key[:16]}.so"
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            subprocess.run([*command, "-o", str(temporary)], check=True, capture_output=True)
            temporary.replace(path)
        return with_types(ctypes.CDLL(str(path)))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"kernels.cpp is not used, products will be slower: {error}", file=sys.stderr)
        return None


def with_types(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions' parameters: pointers first, then sizes."""
    parameters = {
        "bf16_product": (3, 3), "int8_product": (4, 3), "int8_dequantize": (3, 2), "int4_product": (5, 4),
        "int4_dequantize": (4, 3),
    }  # fmt: skip
    for name, (pointers, sizes) in parameters.items():
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * sizes
        function.restype = None
    return loaded


def call(name: str, tensors: list[Tensor], *sizes: int) -> Tensor:
    """Call a function of kernels.cpp; the last tensor is its output, and returned."""
    getattr(library(), name)(*(tensor.data_ptr() for tensor in tensors), *sizes)
    return tensors[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The operators, x [M, K] in bf16 each; weights as the layers below pack them


@torch.library.custom_op("kernels::bf16_product", mutates_args=())
def bf16_product(x: Tensor, weight: Tensor) -> Tensor:
    M, (N, K) = x.shape[0], weight.shape
    return call("bf16_product", [x.contiguous(), weight, x.new_empty(M, N)], M, N, K)


@torch.library.custom_op("kernels::int8_product", mutates_args=())
def int8_product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    (M, K), N = x.shape, scales.numel()
    return call("int8_product", [x.contiguous(), weight, scales, x.new_empty(M, N)], M, N, K)


@torch.library.custom_op("kernels::int4_product", mutates_args=())
def int4_product(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    (M, K), N = x.shape, scales.shape[0] * ROWS
    return call(
        "int4_product", [x.contiguous(), weight, scales, zeros, x.new_empty(M, N)], M, N, K, K // scales.shape[1]
    )


@torch.library.custom_op("kernels::int8_dequantize", mutates_args=())
def int8_dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    N, K = scales.numel(), weight.numel() // scales.numel()
    return call("int8_dequantize", [weight, scales, scales.new_empty(N, K)], N, K)


@torch.library.custom_op("kernels::int4_dequantize", mutates_args=())
def int4_dequantize(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    N = scales.shape[0] * ROWS
    K = 2 * weight.numel() // N
    return call("int4_dequantize", [weight, scales, zeros, scales.new_empty(N, K)], N, K, K // scales.shape[1])


@bf16_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@int8_product.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales.numel())


@int4_product.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0] * ROWS)


@int8_dequantize.register_fake
def _(weight: Tensor, scales: Tensor) -> Tensor:
    return scales.new_empty(scales.numel(), weight.numel() // scales.numel())


@int4_dequantize.register_fake
def _(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return scales.new_empty(scales.shape[0] * ROWS, 2 * weight.numel() // (scales.shape[0] * ROWS))


# ---------------------------------------------------------------------------------------------------------------------
# The layers


def takes(weight: Tensor, N: int, K: int, multiple: int) -> bool:
    """Say whether the kernels can compute with a weight [N, K] in a model of bf16."""
    fits = N % ROWS == 0 and K % multiple == 0
    return fits and weight.device.type == "cpu" and library() is not None


class StreamedLinear(nn.Module):
    """A linear layer in bf16, its weight as it is: [N, K]."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = bf16_product(rows, self.weight) if rows.shape[0] <= MAX_ROWS else F.linear(rows, self.weight)
        return with_bias(y, self.bias).view(*x.shape[:-1], -1)


class StreamedInt8Linear(nn.Module):
    """codes int8 [N, K] and scales bf16 [N]; packed by four rows and 64 columns: [N / 4, K / 64, 4, 64]."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        super().__init__()
        N, K = codes.shape
        packed = codes.view(N // ROWS, ROWS, K // 64, 64).transpose(1, 2).contiguous()
        self.weight, self.scales, self.bias = constant(packed), constant(scales), bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= MAX_ROWS:
            y = int8_product(rows, self.weight, self.scales)
        else:
            y = F.linear(rows, int8_dequantize(self.weight, self.scales))
        return with_bias(y, self.bias).view(*x.shape[:-1], -1)


class StreamedInt4Linear(nn.Module):
    """codes uint8 0 to 15 [N, K], scales and zeros bf16 [N, K / group]; packed as kernels.cpp says."""

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None):
        super().__init__()
        N, K = codes.shape
        blocks = codes.view(N // ROWS, ROWS, K // 64, 2, 32).transpose(1, 2)  # [.., .., ROWS, halves, 32]
        self.weight = constant((blocks[..., 0, :] | blocks[..., 1, :] << 4).contiguous())
        self.scales, self.zeros = (
            constant(values.view(N // ROWS, ROWS, -1).transpose(1, 2).contiguous()) for values in (scales, zeros)
        )
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= MAX_ROWS:
            y = int4_product(rows, self.weight, self.scales, self.zeros)
        else:
            y = F.linear(rows, int4_dequantize(self.weight, self.scales, self.zeros))
        return with_bias(y, self.bias).view(*x.shape[:-1], -1)


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
