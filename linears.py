"""int8 and int4 weights: the linears as they are stored, and their arithmetic, plain and the same for every device.

A code c stands for (c - zero) * scale, with a scale for each group of input columns, which may be a whole row. A group
may have a zero point of its own; else it is 0 in int8 and 8 in int4. Activations stay floats, but for kernels of x86
CPUs, which turn them into 16-bit fixed point. `quantize.py` makes these linears, `formats.py` reads them and
`compressed.py` writes them, and `kernels/` repacks them into what a device's kernels read.

Shapes: N outputs, K inputs; a stack of experts has one more dimension in front, [X, N, K].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Experts, Linear, by_expert

MODES = ("int8", "int8-gptq", "int4", "int4-gptq")
GROUP_SIZES = (32, 64, 128, 256)
# The least scale, which a row or group of zeros gets, so that nothing is divided by 0.
MIN_SCALE = 2.0**-40
Encoded = tuple[Tensor, Tensor, Tensor]  # codes [N, K], scales and zeros [N, groups]
Encode = Callable[[Tensor], Encoded]  # of a weight [N, K]


@dataclass(frozen=True)
class Form:
    """How a linear is quantized and stored."""

    bits: int  # of a code: 8 or 4
    group_size: int | None = None  # input columns that share a scale; None: a whole row
    has_zeros: bool = False  # whether each group has a zero point
    scale_dtype: torch.dtype = torch.bfloat16
    is_ordered: bool = False  # whether the columns lie in an order of their own, so that those of a group are adjacent

    def __str__(self) -> str:
        groups = f"-g{self.group_size}" if self.group_size else "-channel" * (self.bits == 4)
        return f"int{self.bits}{groups}" + "-sym" * (self.bits == 4 and not self.has_zeros)

    @property
    def head(self) -> "Form":
        """What becomes of the output head: int8. It does not show in the perplexity, int4 does: results/NOTES.md."""
        return self if self.bits == 8 else Form(8)


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def quantize_weight(weight: Tensor, form: Form) -> Encoded:
    """Round weight [N, K] to the nearest codes, with scales and zeros of `group_parameters`.

    A code c stands for (c - zero) * scale. The last group is shorter where the group size does not divide K.
    """
    scales, zeros = group_parameters(weight, form)
    K = weight.shape[-1]
    of_weights = (spread_groups(values, K, form.group_size or K) for values in (scales, zeros))
    return encode(weight, *of_weights), scales, zeros


def spread_groups(values: Tensor, num_columns: int, group_size: int) -> Tensor:
    """Repeat the values of groups [..., groups] for each of their columns: [..., K], or [..., 1] where one has all."""
    if group_size >= num_columns:
        return values
    # Not padded to whole groups: compiled by torch 2.13, the last one would be left unwritten.
    return values[..., torch.arange(num_columns, device=values.device) // group_size]


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | int = 0, group_size: int | None = None) -> Tensor:
    """Return the weight that codes [N, K], scales and zeros [N, groups] stand for: fp32 [N, K]."""
    K = codes.shape[-1]
    group_size = group_size or K
    if group_size >= K or K % group_size:
        if isinstance(zeros, Tensor):
            zeros = spread_groups(zeros, K, group_size)
        return (codes.float() - zeros) * spread_groups(scales, K, group_size).float()
    # Whole groups, as nearly all are, get a dimension of their own: scales and zeros need not be repeated to [N, K].
    groups = codes.unflatten(-1, (-1, group_size)).float()
    zeros = zeros.unsqueeze(-1) if isinstance(zeros, Tensor) else zeros
    return ((groups - zeros) * scales.float().unsqueeze(-1)).flatten(-2)


def group_parameters(weight: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return bf16 scales and zeros [N, groups] with which the codes span each group's weights and 0.

    int8 is symmetric, its zeros are 0. int4 without zero points: all zeros are 8, and code 0, the farthest from them,
    stands for the largest weight: scales have its sign.
    """
    groups = weight.float().split(form.group_size or weight.shape[-1], dim=-1)
    low = torch.stack([group.amin(dim=-1) for group in groups], dim=-1).clamp(max=0)
    high = torch.stack([group.amax(dim=-1) for group in groups], dim=-1).clamp(min=0)
    largest = torch.maximum(high, -low)
    if form.bits == 8:
        scales = (largest / 127).clamp(min=MIN_SCALE).bfloat16()
        return scales, torch.zeros_like(scales, dtype=torch.int8)
    if not form.has_zeros:
        scales = largest.clamp(min=8 * MIN_SCALE) / 8
        scales = torch.where(high > -low, -scales, scales).bfloat16()
        return scales, torch.full_like(scales, 8, dtype=torch.uint8)
    scales = ((high - low) / 15).clamp(min=MIN_SCALE).bfloat16()
    return scales, (-low / scales.float()).round().clamp(0, 15).to(torch.uint8)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the nearest codes, int8 -127 to 127 or int4 0 to 15, in zeros' dtype; scales and zeros are broadcast."""
    lowest, highest = (-127, 127) if zeros.dtype == torch.int8 else (0, 15)
    return (weight.float() / scales.float() + zeros).round().clamp(lowest, highest).to(zeros.dtype)


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
    """A quantized linear layer, or a stack of them, computed with the dequantized weight: the twin of every kernel.

    weight: codes, int8 [N, K] or, in int4, two to a byte: uint8 [N, K / 2]. scales [N, groups]. zeros [N, groups]: as
    the codes, int8 or uint8. order [K]: which column of the weight each column of the codes is.
    """

    def __init__(self, shape: torch.Size, form: Form, bias: bool = False):
        super().__init__()
        *outputs, self.in_features = shape
        self.form, self.group_size = form, form.group_size or self.in_features
        num_groups, num_bytes = -(-self.in_features // self.group_size), -(-self.in_features * form.bits // 8)
        dtype = torch.int8 if form.bits == 8 else torch.uint8
        self.weight = frozen_parameter(torch.empty(*outputs, num_bytes, dtype=dtype))
        self.scales = frozen_parameter(torch.empty(*outputs, num_groups, dtype=form.scale_dtype))
        self.zeros = frozen_parameter(torch.empty(*outputs, num_groups, dtype=dtype)) if form.has_zeros else None
        self.order = frozen_parameter(torch.empty(self.in_features, dtype=torch.int32)) if form.is_ordered else None
        self.bias = frozen_parameter(torch.empty(outputs)) if bias else None

    def codes(self, index: Any = ...) -> Tensor:
        """Return the codes one to a byte, [N, K]; of a stack those of the layers at an index."""
        weight = self.weight[index]
        return weight if self.form.bits == 8 else unpack_nibbles(weight, self.in_features)

    def dequantize(self, index: Any = ...) -> Tensor:
        """Return the weight in fp32, of a stack the layers at an index."""
        zeros = (0 if self.form.bits == 8 else 8) if self.zeros is None else self.zeros[index]
        weight = dequantize(self.codes(index), self.scales[index], zeros, self.group_size)
        return weight if self.order is None else weight[..., self.order.argsort()]

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """Multiply x [..., K]; of a stack, each row of x [M, A, K] with the weight of its expert [M, A]."""
        if experts is None:
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        return by_expert(x, experts, lambda i, rows: F.linear(rows, self.dequantize(i).to(x.dtype)))


def quantizable_linears(module: nn.Module) -> dict[str, Linear | Experts]:
    """Return the linears that are quantized, by name."""
    children = ((name, child) for name, child in module.named_modules() if not is_router(name))
    return {name: child for name, child in children if isinstance(child, Linear | Experts)}


def empty_stored(child: Linear | Experts, form: Form) -> StoredLinear:
    """Make the quantized linear of the same sizes, on the meta device."""
    with torch.device("meta"):
        return StoredLinear(child.weight.shape, form, getattr(child, "bias", None) is not None)


def quantize_linear(child: Linear | Experts, form: Form, choose: Encode | None = None) -> StoredLinear:
    """Return a linear, or a stack of them, quantized; int8 has no zero points here. Its bias is kept.

    choose: chooses the codes; None rounds to nearest.
    """
    stored = empty_stored(child, form)
    codes, scales, zeros = choose(child.weight) if choose else quantize_weight(child.weight, form)
    stored.weight = frozen_parameter(codes if form.bits == 8 else pack_nibbles(codes))
    stored.scales = frozen_parameter(scales)
    stored.zeros = frozen_parameter(zeros) if form.has_zeros else None
    if isinstance(child, Linear):
        stored.bias = child.bias
    return stored
