"""The layers that kernels come in, and those of ATen, which has kernels for quantized weights on every CPU.

`KernelLinear` is a linear layer whose kernel takes a few rows. `FusedLinear` is one of a GPU, which also does what
surrounds its product.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linears import frozen_parameter
from model import ModelConfig, RMSNorm, swiglu

# Up to this many rows of x the kernels are faster than GEMM.
MAX_ROWS = 16


class KernelLinear(nn.Module):
    """A linear layer with a kernel for up to MAX_ROWS rows; above that, GEMM with the unpacked weight.

    Its tensors may be stacks of X layers: then `experts.KernelExperts` runs it.
    """

    names: tuple[str, ...] = ("weight",)  # of the tensors that a product takes

    def __init__(self, bias: Tensor | None):
        super().__init__()
        self.bias = bias

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x.reshape(-1, x.shape[-1]), *self.tensors)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])

    @classmethod
    def matmul(cls, rows: Tensor, *tensors: Tensor) -> Tensor:
        """Multiply rows [M, K] with the weight that a layer's `tensors` hold, by the kernel or by GEMM: [M, N]."""
        return cls.product(rows, *tensors) if rows.shape[0] <= MAX_ROWS else cls.gemm(rows, *tensors)

    product: Callable[..., Tensor]
    gemm: Callable[..., Tensor]


class Reordered(nn.Module):
    """A layer whose columns lie in an order [K] of their own: x is put into it first."""

    def __init__(self, layer: nn.Module, order: Tensor):
        super().__init__()
        self.layer, self.order = layer, frozen_parameter(order)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.index_select(-1, self.order))


class FusedLinear(nn.Module):
    """A linear layer of a GPU, where each kernel launch costs time: it also does what surrounds its product."""

    def forward(
        self, x: Tensor, norm: RMSNorm | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """Return the outputs [..., N] for x [..., K].

        norm: is applied to x first. gated: the outputs are gate and up, one after the other, and silu(gate) * up is
        returned, [..., N / 2]. residual: is added to what is returned, and has its shape and dtype.
        """
        y = self.fused(x, norm, gated, residual)
        if y is not None:
            return y
        y = self.multiply(x if norm is None else norm(x))
        y = swiglu(y) if gated else y
        return y if residual is None else residual + y

    multiply: Callable[[Tensor], Tensor]  # the product, plus the bias
    # All of `forward` in one kernel; returns None where there is none for this x.
    fused: Callable[[Tensor, RMSNorm | None, bool, Tensor | None], Tensor | None]


def is_llama_block(config: ModelConfig) -> bool:
    """Say whether a block norms, gates and adds as Llama's, which is what a FusedBlock does."""
    norms = config.norm_inputs and not config.norm_outputs and config.norm_offset is None
    return norms and not config.gelu and config.residual_multiplier == 1


# ---------------------------------------------------------------------------------------------------------------------
# ATen's kernels

torch.library.define("kernels::aten_int4_product", "(Tensor x, Tensor weight, Tensor scales_and_zeros) -> Tensor")


# A wrapper, since in a nested region inductor loses ATen's constant argument, the group size (torch 2.13).
@torch.library.impl("kernels::aten_int4_product", "CPU")
def aten_int4_product(x: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
    group_size = x.shape[1] // scales_and_zeros.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, scales_and_zeros)


@torch.library.register_fake("kernels::aten_int4_product")
def _(x: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales_and_zeros.shape[1])


class AtenInt8(KernelLinear):
    """codes int8 [N, K], scales [N, 1] in the dtype of x."""

    names = ("weight", "scales")

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        super().__init__(bias)
        self.weight, self.scales = frozen_parameter(codes), frozen_parameter(scales.squeeze(-1))

    @staticmethod
    def product(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, weight, scales)

    @staticmethod
    def gemm(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return F.linear(rows, (weight.float() * scales.float().unsqueeze(1)).to(rows.dtype))


class AtenInt4(KernelLinear):
    """codes uint8 [N, K], zeros uint8 and scales in x's dtype [N, K / group]; packed by ATen for the processor."""

    names = ("weight", "scales_and_zeros")

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None):
        super().__init__(bias)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        packed = [pack(expert.int(), 1) for expert in (codes if codes.ndim == 3 else codes[None])]
        self.weight = frozen_parameter(torch.stack(packed) if codes.ndim == 3 else packed[0])
        zeros = (8 - zeros.to(scales.dtype)) * scales  # ATen's zero is a weight, the one that code 8 stands for
        self.scales_and_zeros = frozen_parameter(torch.stack((scales.mT, zeros.mT), dim=-1))  # [K / group, N, 2]

    @staticmethod
    def product(rows: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
        return torch.ops.kernels.aten_int4_product(rows, weight, scales_and_zeros)

    gemm = product  # GEMM would be faster, but ATen's packing is not documented and cannot be undone
