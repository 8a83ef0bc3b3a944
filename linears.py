"""int8 and int4 weights: the linears as they are stored, and their arithmetic, plain and the same for every device.

A code c of int8 stands for c * scale, with a scale for each output channel. A code c of int4 stands for
(c - zero) * scale, with a scale and a zero point for each group of input columns. Activations are never quantized.
`quantize.py` makes these linears, and `kernels/` repacks them into what a device's kernels read.

Shapes: N outputs, K inputs; a stack of experts has one more dimension in front, [X, N, K].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Experts, Linear, Transformer, by_expert

MODES = ("int8", "int4", "int4-gptq")
GROUP_SIZES = (32, 64, 128, 256)
# The least scale, which a row or group of zeros gets, so that nothing is divided by 0.
MIN_SCALE = 2.0**-40
# Weight [N, K] and group size to codes [N, K], scales and zeros [N, groups].
Encode = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Scheme:
    """How the linears of a checkpoint are stored."""

    mode: str
    group_size: int | None = None  # input columns that share a scale and a zero point; None: a whole row, in int8

    def __str__(self) -> str:
        return self.mode if self.group_size is None else f"{self.mode}-g{self.group_size}"


# Rounding the output head to int8 does not show in the perplexity, to int4 it does: results/NOTES.md.
HEAD_SCHEME = Scheme("int8")


def constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] to int8 codes [N, K] and bf16 scales [N], symmetrically per output channel."""
    weight = weight.float()
    scales = (weight.abs().amax(dim=-1) / 127).clamp(min=MIN_SCALE).bfloat16()
    return (weight / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scales


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the weight that codes and scales stand for: fp32 [N, K]."""
    return codes.float() * scales.float().unsqueeze(-1)


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round weight [N, K] to codes 0 to 15 [N, K], bf16 scales and zeros 0 to 15 [N, groups].

    A code c stands for (c - zero) * scale; a group's codes span its weights and 0. The last group is shorter where
    group_size does not divide K.
    """
    scales, zeros = group_parameters(weight, group_size)
    group_of = torch.arange(weight.shape[-1], device=weight.device) // group_size
    return encode_int4(weight, scales[..., group_of], zeros[..., group_of]), scales, zeros


def dequantize_int4(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """Return the weight that codes, scales and zeros stand for: fp32 [N, K]."""
    K = codes.shape[-1]
    if K % group_size:  # not padded to whole groups: compiled by torch 2.13, the last one would be left unwritten
        group_of = torch.arange(K, device=codes.device) // group_size
        return (codes.float() - zeros[..., group_of]) * scales[..., group_of].float()
    groups = codes.unflatten(-1, (-1, group_size)).float()
    return ((groups - zeros.unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(-2)


def group_parameters(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the bf16 scales and uint8 zeros [N, groups] with which the codes span each group's weights and 0."""
    groups = weight.float().split(group_size, dim=-1)
    low = torch.stack([group.amin(dim=-1) for group in groups], dim=-1).clamp(max=0)
    high = torch.stack([group.amax(dim=-1) for group in groups], dim=-1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=MIN_SCALE).bfloat16()
    return scales, (-low / scales.float()).round().clamp(0, 15).to(torch.uint8)


def encode_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the nearest codes, uint8 0 to 15; scales and zeros as large as weight."""
    return (weight.float() / scales.float() + zeros).round().clamp(0, 15).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes 0 to 15 [N, K] two to a byte, the even column in the low half: uint8 [N, K / 2 rounded up]."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, num_columns: int) -> Tensor:
    """Undo `pack_nibbles`: uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :num_columns]


# ---------------------------------------------------------------------------------------------------------------------
# The linears


def is_router(name: str) -> bool:
    """Say whether a linear chooses experts: rounded, or by a kernel, it would choose others."""
    return name.endswith("mlp.gate")


class StoredLinear(nn.Module):
    """A linear layer, or a stack of them, computed with the dequantized weight: the twin of every kernel."""

    weight: Tensor  # the codes

    def __init__(self, shape: torch.Size, bias: bool):
        super().__init__()
        self.bias = constant(torch.empty(shape[:-1])) if bias else None

    def dequantize(self, index: Any = ...) -> Tensor:
        """Return the weight in fp32, of a stack the layers at an index."""
        raise NotImplementedError

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """Multiply x [..., K]; of a stack, each row of x [M, A, K] with the weight of its expert [M, A]."""
        if experts is None:
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        return by_expert(x, experts, lambda i, rows: F.linear(rows, self.dequantize(i).to(x.dtype)))


class StoredInt8(StoredLinear):
    """An int8 linear: codes int8 [N, K], scales bf16 [N]."""

    def __init__(self, shape: torch.Size, bias: bool = False):
        super().__init__(shape, bias)
        self.weight = constant(torch.empty(shape, dtype=torch.int8))
        self.scales = constant(torch.empty(shape[:-1], dtype=torch.bfloat16))

    def dequantize(self, index: Any = ...) -> Tensor:
        return dequantize_int8(self.weight[index], self.scales[index])


class StoredInt4(StoredLinear):
    """An int4 linear: codes two to a byte, uint8 [N, K / 2]; scales bf16 and zeros uint8 0 to 15, [N, groups]."""

    def __init__(self, shape: torch.Size, group_size: int, bias: bool = False):
        super().__init__(shape, bias)
        *outputs, self.in_features = shape
        self.group_size = group_size
        num_groups = -(-self.in_features // group_size)
        self.weight = constant(torch.empty(*outputs, -(-self.in_features // 2), dtype=torch.uint8))
        self.scales = constant(torch.empty(*outputs, num_groups, dtype=torch.bfloat16))
        self.zeros = constant(torch.empty(*outputs, num_groups, dtype=torch.uint8))

    def dequantize(self, index: Any = ...) -> Tensor:
        codes = unpack_nibbles(self.weight[index], self.in_features)
        return dequantize_int4(codes, self.scales[index], self.zeros[index], self.group_size)


def quantizable_linears(module: nn.Module) -> dict[str, Linear | Experts]:
    """Return the linears that a scheme applies to, by name."""
    children = module.named_modules()
    return {
        name: child for name, child in children if isinstance(child, Linear | Experts) and not name.endswith("mlp.gate")
    }


def empty_stored(child: Linear | Experts, scheme: Scheme) -> StoredInt8 | StoredInt4:
    """Make the quantized linear of the same sizes, on the meta device."""
    bias = getattr(child, "bias", None) is not None
    with torch.device("meta"):
        if scheme.group_size is None:
            return StoredInt8(child.weight.shape, bias)
        return StoredInt4(child.weight.shape, scheme.group_size, bias)


def replace_linears_(model: Transformer, scheme: Scheme) -> None:
    """Replace the linears of a model on the meta device by quantized ones, still to be filled."""
    for name, child in quantizable_linears(model).items():
        model.set_submodule(name, empty_stored(child, HEAD_SCHEME if name == "lm_head" else scheme))


def quantize_linear(child: Linear | Experts, scheme: Scheme, encode: Encode = quantize_int4) -> StoredInt8 | StoredInt4:
    stored = empty_stored(child, scheme)
    if isinstance(stored, StoredInt8):
        stored.weight, stored.scales = map(constant, quantize_int8(child.weight))
    else:
        codes, scales, zeros = encode(child.weight, stored.group_size)
        stored.weight, stored.scales, stored.zeros = map(constant, (pack_nibbles(codes), scales, zeros))
    if isinstance(child, Linear):
        stored.bias = child.bias
    return stored
