"""The seam: a loaded model, rewritten for the device that it is on.

`model.py` and `linears.py` say what is computed, and are the plain twin of what is chosen here. `optimize_` replaces
each linear by the layer whose kernel takes it and sets the function that attends. On a CPU it replaces the norms and
runs all blocks in one call; on a GPU, where each kernel launch saved counts, it replaces the blocks.
"""

import importlib.util
import math
from types import ModuleType

import torch
from torch import Tensor, nn

from kernels import cpu, inductor
from kernels.experts import CompiledExperts, KernelExperts
from kernels.inductor import CompiledLinear, FusedCompiledLinear
from kernels.layers import MAX_ROWS, AtenInt4, AtenInt8, KernelLinear, Reordered, is_llama_block
from linears import GROUP_SIZES, StoredLinear, is_router
from model import Block, Experts, Linear, MoE, Transformer

AnyLinear = Linear | Experts | StoredLinear


def optimize_(model: Transformer, device_type: str | None = None) -> None:
    """Give a loaded model, once, the kernels of its device.

    device_type: «cpu» or «cuda», by default the model's own; another serves to look at what would run there.
    """
    on_gpu = (device_type or model.device.type) == "cuda"
    dtype = model.embed_tokens.weight.dtype
    cuda = cuda_kernels() if on_gpu else None
    # A compiled step needs layers that are alike: what holds for a linear of one layer is taken to hold for those that
    # have the same role in the others.
    roles = {name: name.rpartition(".")[2] for name, child in model.named_modules() if isinstance(child, AnyLinear)}
    with_zeros = {role for name, role in roles.items() if has_zeros(model.get_submodule(name))}
    inexact = {role for name, role in roles.items() if not is_exact(model.get_submodule(name), dtype)}
    for name, role in roles.items():  # and not the modules, so that a weight is freed as soon as it is repacked
        linear = model.get_submodule(name)
        assert isinstance(linear, AnyLinear)
        cpu.release_freed_memory()  # of the linear before
        if isinstance(linear, StoredLinear) and role not in with_zeros:
            linear.zeros = None
        layer = None
        if not is_router(name):
            exact = role not in inexact
            layer = gpu_layer(linear, dtype, cuda, exact) if on_gpu else cpu_layer(linear, dtype, exact)
        model.set_submodule(name, layer or compiled_layer(linear, on_gpu))
    layers = [model.get_submodule(name) for name in roles if not is_router(name)]
    if all(isinstance(cpu.layer_of(layer), cpu.CpuLinear) for layer in layers):
        cpu.served.add(model)
    for block in model.layers:
        block.self_attn.attend = inductor.attention if cuda is None else cuda.attention
    if not on_gpu and dtype in cpu.dtypes():
        cpu.optimize_blocks_(model)
    if on_gpu and is_llama_block(model.config):
        blocks = nn.ModuleList(FusedBlock(block) if type(block) is Block else block for block in model.layers)
        model.layers = blocks


def has_zeros(stored: nn.Module) -> bool:
    """Say whether zero points do anything: what symmetric weights of GPTQ have are those that stand for none."""
    zeros = stored.zeros if isinstance(stored, StoredLinear) else None
    return zeros is not None and bool((zeros != (0 if zeros.dtype == torch.int8 else 8)).any())


def is_exact(stored: nn.Module, dtype: torch.dtype) -> bool:
    """Say whether the model's dtype holds the scales: float16 would lose small ones, bfloat16 bits of float16's."""
    scales = getattr(stored, "scales", None)
    return scales is None or torch.equal(scales.to(dtype).to(scales), scales)


# ---------------------------------------------------------------------------------------------------------------------
# Which layer a weight gets


def compiled_layer(stored: AnyLinear, on_gpu: bool) -> nn.Module:
    """Return the layer for a weight that no kernel takes."""
    if isinstance(stored, Experts) or (isinstance(stored, StoredLinear) and stored.weight.ndim == 3):
        return CompiledExperts(stored, on_gpu)
    return (FusedCompiledLinear if on_gpu else CompiledLinear)(stored)


def cpu_layer(stored: AnyLinear, dtype: torch.dtype, exact: bool = True) -> nn.Module | None:
    """Return the layer of a CPU whose kernel takes a weight in a model of this dtype; None where there is none.

    exact: whether that dtype holds all scales, which ATen's kernels need.
    """
    layer: nn.Module | None
    if isinstance(stored, StoredLinear):
        layer = cpu_int8_layer(stored, dtype, exact) if stored.form.bits == 8 else cpu_int4_layer(stored, dtype, exact)
        if layer is not None and stored.order is not None:
            return Reordered(layer, stored.order)
    elif stored.weight.is_contiguous() and cpu.has_kernel(dtype, stored.weight, cpu.BLOCK_ROWS, 32):
        layer = cpu.CpuDense(stored.weight, getattr(stored, "bias", None))
    else:
        return None
    return KernelExperts(layer) if isinstance(layer, KernelLinear) and stored.weight.ndim == 3 else layer


def cpu_int8_layer(stored: StoredLinear, dtype: torch.dtype, exact: bool) -> KernelLinear | None:
    N, K = stored.weight.shape[-2:]
    if cpu.takes_codes(dtype, stored.weight) and (size := common_group_size(stored)) % 32 == 0:
        zeros = None if stored.zeros is None else split_groups(stored, size, stored.zeros)
        return cpu.CpuInt8(stored.weight, split_groups(stored, size, stored.scales), stored.bias, zeros)
    if stored.scales.shape[-1] > 1 or stored.zeros is not None or not exact:
        return None
    # ATen's kernels crash on sizes that are not multiples of their tiles.
    return AtenInt8(stored.weight, stored.scales.to(dtype), stored.bias) if N % 4 == 0 and K % 16 == 0 else None


def cpu_int4_layer(stored: StoredLinear, dtype: torch.dtype, exact: bool) -> KernelLinear | None:
    if (size := common_group_size(stored)) % 32:
        return None
    zeros = zero_points(stored)
    if cpu.takes_codes(dtype, stored.weight):
        scales, zeros = (split_groups(stored, size, values) for values in (stored.scales, zeros))
        return cpu.CpuInt4(stored.weight, scales, zeros, stored.bias)
    if not exact or stored.weight.shape[-2] % 16:
        return None
    scales, zeros = (
        split_groups(stored, kernel_group_size(size), values) for values in (stored.scales.to(dtype), zeros)
    )
    return AtenInt4(stored.codes(), scales, zeros, stored.bias)


def common_group_size(stored: StoredLinear) -> int:
    """Return the size in which all groups can be split, the last one too, which may be shorter."""
    return math.gcd(stored.group_size, stored.in_features)


def kernel_group_size(size: int) -> int:
    """Return the largest of GROUP_SIZES in which groups of a size, a multiple of 32, can be split."""
    return max(power for power in GROUP_SIZES if size % power == 0)


def split_groups(stored: StoredLinear, size: int, values: Tensor) -> Tensor:
    """Repeat what groups have for the smaller ones that they are split in."""
    if size == stored.group_size:
        return values
    repeated = values.repeat_interleave(stored.group_size // size, dim=-1)
    return repeated[..., : stored.in_features // size].contiguous()


def zero_points(stored: StoredLinear) -> Tensor:
    """Return the zero points of int4, which are 8 where it has none."""
    return torch.full_like(stored.scales, 8, dtype=torch.uint8) if stored.zeros is None else stored.zeros


def cuda_kernels() -> ModuleType | None:
    """Import kernels/cuda.py, which takes a second, where Triton is installed; else return None."""
    if importlib.util.find_spec("triton") is None:
        return None
    from kernels import cuda

    return cuda


def gpu_layer(stored: AnyLinear, dtype: torch.dtype, cuda: ModuleType | None, exact: bool = True) -> nn.Module | None:
    """Return the layer of a GPU whose kernel takes a weight in a model of this dtype; None where there is none."""
    if cuda is None or not isinstance(stored, StoredLinear) or stored.weight.ndim == 3 or not exact:
        return None
    if stored.order is not None or stored.form.scale_dtype != torch.bfloat16:  # as which the kernels hold them
        return None
    if stored.form.bits == 4:
        if common_group_size(stored) % 32:
            return None
        size, both = kernel_group_size(common_group_size(stored)), (stored.scales.to(dtype), zero_points(stored))
        return cuda.CudaInt4(stored.codes(), *(split_groups(stored, size, values) for values in both), stored.bias)
    if stored.scales.shape[-1] > 1 or stored.zeros is not None:
        return None
    return cuda.CudaInt8(stored.weight, stored.scales.to(dtype), stored.bias)


# ---------------------------------------------------------------------------------------------------------------------
# The block of a GPU


class FusedBlock(Block):
    """`Block`, whose products are given the norm before them, and the gate and the residual behind them."""

    def __init__(self, block: Block):
        nn.Module.__init__(self)  # not Block's: the modules exist already
        self.input_layernorm, self.self_attn = block.input_layernorm, block.self_attn
        self.post_attention_layernorm, self.mlp = block.post_attention_layernorm, block.mlp

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        attn, mlp = self.self_attn, self.mlp
        q, k, v = attn.split_heads(attn.qkv_proj(x, norm=self.input_layernorm), cos, sin, positions)
        k, v = self.store_(positions, k, v, mask.shape[-1])
        x = self.add(x, attn.o_proj, attn.attend(q, k, v, mask).flatten(2))
        if isinstance(mlp, MoE):
            return x + mlp(self.post_attention_layernorm(x))
        return self.add(x, mlp.down_proj, mlp.gate_up_proj(x, norm=self.post_attention_layernorm, gated=True))

    def add(self, x: Tensor, layer: nn.Module, y: Tensor) -> Tensor:
        """Return x + layer(y), where each rank's layer gives one summand of layer(y)."""
        ranks = self.self_attn.ranks
        return layer(y, residual=x) if ranks.count == 1 else x + ranks.all_reduce(layer(y))

    def store_(self, positions: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Do what `KVCache.update_` does. Compiled, store each key and value once for every query head that shares it.

        They are the same bits. The loops that store are then as long as the one that rotates the queries, and inductor
        fuses all of them into one kernel. Norms of heads stand between: there it would cost a launch.
        """
        attn, cache = self.self_attn, self.self_attn.cache
        if cache is None:
            return k.transpose(1, 2), v.transpose(1, 2)
        fuses = torch.compiler.is_compiling() and positions.shape[1] <= MAX_ROWS and attn.q_norm is None
        num_copies = attn.num_local_heads // attn.num_local_kv_heads if fuses else 1
        slots = positions.unsqueeze(-1).expand(-1, -1, num_copies)
        rows = torch.arange(len(k), device=k.device).view(-1, 1, 1)
        cache.k[rows, :, slots] = k.unsqueeze(2)
        cache.v[rows, :, slots] = v.unsqueeze(2)
        return cache.k[: len(k), :, :length], cache.v[: len(k), :, :length]
