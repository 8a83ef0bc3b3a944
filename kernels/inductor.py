"""What torch.compile makes kernels of: products of a row or two, and attention, written so that inductor streams them.

The GEMM library reaches two thirds of memory speed with one row, a multiply and a sum reach it whole. On a GPU the loop
of a product also takes in what surrounds it, since each launch saved counts there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
from kernels.layers import FusedLinear
from linears import StoredLinear
from model import Linear, RMSNorm

# Compiled, a product with at most this many rows is written as a multiply and a sum; with more rows GEMM wins.
MAX_REDUCTION_ROWS = 2
# Above this many terms of a sum inductor's C++ is no longer a fast loop.
MAX_TERMS = 4096


def is_reduction(x: Tensor) -> bool:
    """Say whether a product with x [..., K] is written as a multiply and a sum."""
    return torch.compiler.is_compiling() and x.shape[:-1].numel() <= MAX_REDUCTION_ROWS


def materialize(x: Tensor) -> Tensor:
    """Force inductor to compute x once and store it: fused into its readers, it would be computed for every output.

    x must not be a view of part of another tensor: torch 2.11 would read from where that tensor begins.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def num_partial_sums(size: int) -> int:
    """Return into how many equal parts to cut a sum, of at most MAX_TERMS terms each if `size` can be cut so."""
    fewest = -(-size // MAX_TERMS)
    return next((parts for parts in range(fewest, 16 * fewest) if size % parts == 0), 1)


def streamed_product(x: Tensor, weight: Tensor, parts: int, factors: Tensor | None = None) -> Tensor:
    """Multiply x [..., K] with weight [N, K], or each row with a weight of its own, [..., N, K]; fp32 [..., N].

    parts: of each sum, 1 on a GPU. factors [K]: are multiplied with x first.
    """
    wide = materialize(x).float()
    wide = wide if factors is None else wide * factors.float()
    products = wide.unflatten(-1, (parts, -1)).unsqueeze(-3) * weight.float().unflatten(-1, (parts, -1))
    return products.sum(dim=-1).sum(dim=-1)


def streamed_sums(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, norm: RMSNorm | None
) -> Tensor:  # fmt: skip
    """As `streamed_linear`, in fp32."""
    y = streamed_product(x, weight, 1, None if norm is None else norm.weight)
    if scales is not None:
        y = y * scales.float()
    if norm is not None:
        squares = x.float().square().unsqueeze(-2).expand(*x.shape[:-1], *weight.shape)
        y = y * torch.rsqrt(squares.mean(dim=-1) + norm.eps)
    return y if bias is None else y + bias


def streamed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, norm: RMSNorm | None = None,
    gated: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute `FusedLinear.forward` in one loop; scales [N]: of an int8 weight.

    The norm divides the product by x's root mean square, which is summed in the same loop for each output.
    """
    if gated:
        biases, halves_of_scales = ((None, None) if t is None else t.chunk(2) for t in (bias, scales))
        halves = zip(weight.chunk(2), biases, halves_of_scales, strict=True)
        gate, up = (streamed_sums(x, *half, norm) for half in halves)
        y = F.silu(gate) * up
    else:
        y = streamed_sums(x, weight, bias, scales, norm)
    y = y if residual is None else residual + y
    return materialize(y.type_as(x))  # torch 2.11 would finish the sums again in each kernel that reads them


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As `model.attention`; compiled, for a query or two a multiply, a sum and a softmax, which inductor streams."""
    B, S, H, D = q.shape
    if not torch.compiler.is_compiling() or S > MAX_REDUCTION_ROWS:
        return model.attention(q, k, v, mask)
    v = torch.where(mask.any(dim=1)[:, None, :, None], v, 0)
    mask = mask.unsqueeze(1)  # [B, 1, S, T]
    # The G query heads that share a kv head become rows of one product, [B, K, G * S, D]: K and V are read once.
    q = q.view(B, S, k.shape[1], -1, D).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (q.float().unsqueeze(-2) * k.float().unsqueeze(-3)).sum(dim=-1) * D**-0.5
    scores = torch.where(mask.repeat(1, 1, H // k.shape[1], 1), scores, -torch.inf)  # [B, K, G * S, T]
    y = (scores.softmax(dim=-1).unsqueeze(-1) * v.float().unsqueeze(-3)).sum(dim=-2).type_as(v)
    return y.view(B, H, S, D).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The layers: a linear as it is stored, for which there is no kernel


class CompiledLinear(nn.Module):
    on_gpu = False

    def __init__(self, stored: Linear | StoredLinear):
        super().__init__()
        self.stored = stored

    @property
    def weight(self) -> Tensor:
        return self.stored.weight

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight if isinstance(self.stored, Linear) else self.stored.dequantize().to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.stored(x)
        weight, bias = self.dense_weight(x.dtype), self.stored.bias
        parts = 1 if self.on_gpu else num_partial_sums(weight.shape[-1])
        # The bias is added apart: in a nested region `F.linear` with a bias specializes a dynamic number of rows.
        y = streamed_product(x, weight, parts) if is_reduction(x) else F.linear(x, weight)
        return (y if bias is None else y + bias).type_as(x)

    forward = multiply


class FusedCompiledLinear(FusedLinear, CompiledLinear):
    """Of a GPU: with a weight that is not quantized one loop does all of `FusedLinear.forward`."""

    on_gpu = True

    def fused(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor | None:
        if not (is_reduction(x) and isinstance(self.stored, Linear)):
            return None
        return streamed_linear(x, self.weight, self.stored.bias, None, norm, gated, residual)
