"""Stacks of experts at memory speed: a step reads the chosen experts in place, and many rows are sorted by expert."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cpu import CpuLinear
from kernels.inductor import num_partial_sums, streamed_product
from kernels.layers import MAX_ROWS, AtenInt4, AtenInt8, KernelLinear
from linears import StoredLinear
from model import Experts, by_expert

# By the name of a layer's class, what multiplies rows with the tensors of one layer.
MATMULS: dict[str, Callable[..., Tensor]] = {"dense": F.linear, **{n.__name__: n.matmul for n in (AtenInt8, AtenInt4)}}

# It reads on the host how many rows each expert has, which a CUDA graph cannot.
torch.library.define(
    "kernels::by_expert",
    "(Tensor x, Tensor experts, str layer_class, Tensor[] stacks) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.library.impl("kernels::by_expert", "CompositeExplicitAutograd")
def _(x: Tensor, experts: Tensor, layer_class: str, stacks: list[Tensor]) -> Tensor:
    return by_expert(x, experts, lambda i, rows: MATMULS[layer_class](rows, *(stack[i] for stack in stacks)))


@torch.library.register_fake("kernels::by_expert")
def _(x: Tensor, experts: Tensor, layer_class: str, stacks: list[Tensor]) -> Tensor:
    return x.new_empty(*experts.shape, MATMULS[layer_class](x[:1, 0], *(stack[0] for stack in stacks)).shape[1])


class KernelExperts(nn.Module):
    """A stack of experts that share a kernel; stack: holds their tensors, stacked."""

    def __init__(self, stack: KernelLinear):
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        if isinstance(self.stack, CpuLinear):
            # One call for all that are chosen: with one each, of small ones, threads would start and stop too often.
            return self.stack.product(x, *self.stack.tensors, experts=experts)
        return torch.ops.kernels.by_expert(x, experts, type(self.stack).__name__, self.stack.tensors)


class CompiledExperts(nn.Module):
    """A stack of experts as it is stored, for which there is no kernel: compiled, a product is one loop."""

    def __init__(self, stored: Experts | StoredLinear, on_gpu: bool):
        super().__init__()
        self.stored, self.on_gpu = stored, on_gpu

    def dense_weight(self, dtype: torch.dtype, index: Tensor | slice) -> Tensor:
        """Return the weights of the experts at an index."""
        stored = self.stored
        return stored.weight[index] if isinstance(stored, Experts) else stored.dequantize(index).to(dtype)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.stored(x, experts)
        if x.shape[0] <= MAX_ROWS:  # the product's loop reads the chosen expert in place: nothing is copied
            parts = 1 if self.on_gpu else num_partial_sums(x.shape[-1])
            return streamed_product(x, self.dense_weight(x.dtype, experts), parts).type_as(x)
        return torch.ops.kernels.by_expert(x, experts, "dense", [self.dense_weight(x.dtype, slice(None))])
