"""The forms that the products of a block can take on a device: which of them a backend repacks to is measured.

bench.run measures them, as the group «products»: all linears of one block after another, compiled, on as many copies
as no cache holds.
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.results import Rung, attempt
from bench.runner import decode_mode, time_median
from bench.subject import Subject
from checkpoint import meta_model
from kernels.cpu import empty_weight
from kernels.inductor import CompiledLinear, FusedCompiledLinear, is_reduction, streamed_linear
from kernels.layers import AtenInt4, AtenInt8
from kernels.optimize import cpu_layer, cuda_kernels, gpu_layer, zero_points
from linears import Form, StoredLinear, frozen_parameter, quantizable_linears, quantize_linear
from model import Linear, RMSNorm
from steps import allow_many_graphs

ROWS = (1, 5)  # of x: a decode step, and what speculation verifies
# That a measurement reads, of small blocks less: far more than a cache has, and on a GPU for longer than it takes to
# launch it.
BYTES = {"cpu": 2**28, "cuda": 2**31}
MOST_COPIES = 16
EPS = 1e-5
TOLERANCE = 0.02  # of a form's outputs, as a share of the largest

# From a linear as it is stored to a layer; None where it does not take it.
MakeLayer = Callable[[Any], nn.Module | None]


def num_columns(stored: Any) -> int:
    return stored.in_features if isinstance(stored, StoredLinear) else stored.weight.shape[1]


class Product(nn.Module):
    """A function of x and tensors, which are parameters so that a CUDA graph reads them where they are."""

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor):
        super().__init__()
        self.function, self.tensors = function, nn.ParameterList(map(frozen_parameter, tensors))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())  # torch 2.11 does not compile `*self.tensors`


class OneLoop(FusedCompiledLinear):
    """A layer of a GPU, which has int8 weights too in one loop with what surrounds them."""

    def fused(self, x: Tensor, norm: Any, gated: bool, residual: Tensor | None) -> Tensor | None:
        scales = self.stored.scales.flatten() if isinstance(self.stored, StoredLinear) else None
        return streamed_linear(x, self.weight, None, scales, norm) if is_reduction(x) else None


class Normed(nn.Module):
    """A layer behind a norm, of an x that it leaves as it is; folded, it is the layer that normalizes."""

    def __init__(self, layer: nn.Module, folded: bool, size: int, dtype: torch.dtype):
        super().__init__()
        self.layer, self.folded, self.norm = layer, folded, RMSNorm(size, EPS)
        self.norm.weight = frozen_parameter(torch.ones(size, dtype=dtype, device=next(layer.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, norm=self.norm) if self.folded else self.layer(self.norm(x))


class Chain(nn.Module):
    def __init__(self, layers: list[nn.Module], inputs: list[Tensor]):
        super().__init__()
        self.layers, self.inputs = nn.ModuleList(layers), nn.ParameterList([frozen_parameter(x) for x in inputs])

    def forward(self) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, self.inputs, strict=True)]


def tinygemm(codes: Tensor, scales: Tensor, zeros: Tensor) -> nn.Module:
    """Make the layer of ATen's int4 kernel for CUDA: even columns in a byte's high half, zeros as AtenInt4."""
    weight = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    parameters = torch.stack((scales.mT, ((8 - zeros.to(scales.dtype)) * scales).mT), dim=-1).contiguous()
    group_size, multiply = codes.shape[1] // scales.shape[1], torch.ops.aten._weight_int4pack_mm
    return Product(lambda x, weight, parameters: multiply(x, weight, group_size, parameters), weight, parameters)


def aten_layer(stored: StoredLinear, dtype: torch.dtype, on_gpu: bool) -> nn.Module:
    """Make the layer of ATen's kernel for int8 or int4. Raises ValueError where there is none."""
    N, K = len(stored.weight), stored.in_features
    if N % 16 or K % 32:
        raise ValueError(f"ATen's kernels crash on sizes like {N} x {K}")
    scales = stored.scales.to(dtype)
    if stored.form.bits == 8:
        return AtenInt8(stored.weight, scales, bias=None)
    tensors = stored.codes(), scales, zero_points(stored)
    return tinygemm(*tensors) if on_gpu else AtenInt4(*tensors, bias=None)


def make_forms(stored_as: Form | None, dtype: torch.dtype, on_gpu: bool) -> dict[str, MakeLayer]:
    """Return the forms that a linear can take, as which it is stored.

    The first is a multiply and a sum, which torch.compile fuses into one loop for few rows; «ours» is the kernel that
    a model gets on this device, if there is one.
    """
    cuda = cuda_kernels() if on_gpu else None  # which also defines the operators of Triton's kernels

    def ours(stored: Any) -> nn.Module | None:
        return gpu_layer(stored, dtype, cuda) if on_gpu else cpu_layer(stored, dtype)

    def int8_kernel(stored: Any) -> nn.Module:  # which takes a weight of any kind
        weight = stored.weight
        scales = weight.new_ones(len(weight)) if isinstance(stored, Linear) else stored.scales.to(dtype)
        return Product(torch.ops.kernels.cuda_int8_product, weight, scales)

    def behind_norm(form: MakeLayer, folded: bool, stored: Any) -> nn.Module | None:
        return Normed(layer, folded, num_columns(stored), dtype) if (layer := form(stored)) else None

    forms: dict[str, MakeLayer] = {"multiply and sum": FusedCompiledLinear if on_gpu else CompiledLinear}
    is_int4 = stored_as is not None and stored_as.bits == 4
    is_one_loop = stored_as is None or (not is_int4 and stored_as.group_size is None)
    if stored_as is None:
        forms["GEMM"] = lambda linear: linear
    elif is_int4 or is_one_loop:
        forms["ATen"] = partial(aten_layer, dtype=dtype, on_gpu=on_gpu)
    if is_one_loop and cuda:
        forms["Triton" if stored_as else "int8's kernel"] = int8_kernel
    if is_one_loop:
        forms["norm, multiply and sum"] = partial(behind_norm, OneLoop, False)
        forms["norm folded into the sum"] = partial(behind_norm, OneLoop, True)
    elif is_int4 and cuda:
        forms["norm, ours"] = partial(behind_norm, ours, False)
        forms["norm folded into ours"] = partial(behind_norm, ours, True)
    return forms | {"ours": ours}


def make_rungs(subject: Subject, device: str) -> Iterator[Rung]:
    """Yield a rung for each form of the weights and number of rows; what fails or is wrong is named and left out."""
    block = quantizable_linears(meta_model(subject.raw).layers[0])
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(subject.dtype)

    linears = [layer for layer in block.values() if isinstance(layer, Linear)]
    for linear in linears:
        linear.weight, linear.bias = frozen_parameter(random(*linear.weight.shape)), None
    inputs = [[F.rms_norm(random(rows, K), [K]) for K in map(num_columns, linears)] for rows in ROWS]
    for name, stored_as in subject.forms.items():
        stored = [linear if stored_as is None else quantize_linear(linear, stored_as) for linear in linears]
        forms = make_forms(stored_as, subject.dtype, device.startswith("cuda"))
        first, *_ = titles = [", ".join(filter(None, [name, form])) for form in forms]
        for title, form in zip(titles, forms.values(), strict=True):
            made = attempt(title, partial(compile_form, form, stored, inputs, device))
            for rows, chain in zip(ROWS, made[0] if made else (), strict=False):
                label, measure = f"{rows} row{'s' * (rows > 1)}", partial(block_ms, chain, device, made[1])
                yield Rung(f"{title}, {label}", "ms", measure, name, made[2], against=f"{first}, {label}")


def make_layers(form: MakeLayer, stored: list[Any]) -> list[nn.Module]:
    """Make the layers of a block in a form, in memory of their own. Raises ValueError where one has no such form."""
    layers = []
    for linear in stored:
        own = copy.deepcopy(linear)
        for name, part in linear.named_parameters():
            setattr(own, name, frozen_parameter(empty_weight(part.shape, part.dtype, part.device).copy_(part)))
        layer = form(own)
        if layer is None:
            raise ValueError(f"no kernel takes {len(linear.weight)} x {num_columns(linear)} here")
        layers.append(layer)
    return layers


@torch.inference_mode()
def compile_form(
    form: MakeLayer, stored: list[Any], inputs: list[list[Tensor]], device: str
) -> tuple[list[Callable[[], Any]], int, int]:
    """Compile blocks in a form, for each of the inputs; return them, how many blocks they are and the bytes of one.

    Raises ValueError where the first block's outputs are wrong.
    """
    layers = make_layers(form, stored)
    num_bytes = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    copies = min(MOST_COPIES, math.ceil(BYTES[torch.device(device).type] / num_bytes))
    for _ in range(copies - 1):
        layers += make_layers(form, stored)
    allow_many_graphs()
    on_gpu = decode_mode(device) is not None
    options: dict[str, Any] = {"triton.cudagraphs": on_gpu, "coordinate_descent_tuning": on_gpu}
    chains = []
    for xs in inputs:
        chains.append(torch.compile(Chain(layers, xs * copies), fullgraph=True, dynamic=False, options=options))
        for y, x, linear in zip(chains[-1](), xs, stored, strict=False):
            weight = linear.weight.float() if isinstance(linear, Linear) else linear.dequantize()
            expected = x.float() @ weight.T
            wrong = ((y.float() - expected).abs().max() / expected.abs().max()).item()
            if not wrong < TOLERANCE:
                raise ValueError(f"its outputs are wrong by {wrong:.0%} of the largest")
    return chains, copies, num_bytes


@torch.inference_mode()
def block_ms(run: Callable[[], Any], device: str, copies: int) -> float:
    return time_median(run, device) / copies
