"""The forms that the products of a block can take on a device: which of them a backend repacks to is measured.

bench.run measures them, as the group «products»: all linears of one block after another, compiled, on as many copies
as no cache holds.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.rung import Rung, leave_out
from bench.runner import decode_mode, time_median
from bench.subject import Subject
from checkpoint import meta_model
from config import quantization_scheme
from kernels.cpu import empty_weight
from kernels.inductor import MAX_REDUCTION_ROWS, num_partial_sums, streamed_linear, streamed_product
from kernels.layers import AtenInt4, AtenInt8
from kernels.optimize import AnyLinear, cpu_layer, cuda_kernels, gpu_layer
from linears import (
    Scheme,
    StoredLinear,
    constant,
    dequantize,
    pack_nibbles,
    quantizable_linears,
    quantize_int4,
    quantize_int8,
    unpack_nibbles,
)
from model import Linear, RMSNorm
from steps import allow_many_graphs

ROWS = (1, 5)  # of x: a decode step, and what speculation verifies
# That a measurement reads, of small blocks less: far more than a cache has, and on a GPU for longer than it takes to
# launch it.
BYTES = {"cpu": 2**28, "cuda": 2**31}
MOST_COPIES = 16
EPS = 1e-5
TOLERANCE = 0.02  # of a form's outputs, as a share of the largest

# From the tensors of a weight, in memory of their own, to a layer; None where it does not take their shape.
Form = Callable[..., nn.Module | None]


class Product(nn.Module):
    """A function of x and tensors, which are parameters so that a CUDA graph reads them where they are."""

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor):
        super().__init__()
        self.function, self.tensors = function, nn.ParameterList(tensors)

    def forward(self, x: Tensor, **around: Any) -> Tensor:
        return self.function(x, *self.parameters(), **around)  # torch 2.11 does not compile `*self.tensors`


class Normed(nn.Module):
    """A layer behind a norm, of an x that it leaves as it is; folded, it is the layer that normalizes."""

    def __init__(self, layer: nn.Module, norm: RMSNorm, folded: bool):
        super().__init__()
        self.layer, self.norm, self.folded = layer, norm, folded

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, norm=self.norm) if self.folded else self.layer(self.norm(x))


class Chain(nn.Module):
    def __init__(self, layers: list[nn.Module], inputs: list[Tensor]):
        super().__init__()
        self.layers, self.inputs = nn.ModuleList(layers), nn.ParameterList([constant(x) for x in inputs])

    def forward(self) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, self.inputs, strict=True)]


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply a row or two by a multiply and a sum, and more by GEMM."""
    if x.shape[0] > MAX_REDUCTION_ROWS:
        return F.linear(x, weight)
    parts = 1 if weight.device.type == "cuda" else num_partial_sums(weight.shape[1])
    return streamed_product(x, weight, parts).type_as(x)


def multiply_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return multiply(x, dequantize(codes, scales, 0, x.shape[-1] // scales.shape[-1]).to(x.dtype))


def multiply_int4(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    K = x.shape[-1]
    return multiply(x, dequantize(unpack_nibbles(packed, K), scales, zeros, K // scales.shape[-1]).to(x.dtype))


def stream(x: Tensor, weight: Tensor, scales: Tensor | None = None, norm: RMSNorm | None = None) -> Tensor:
    """Multiply as a layer does on a GPU: a row or two with everything in one loop. scales: of a weight in int8."""
    if x.shape[0] <= MAX_REDUCTION_ROWS:
        return streamed_linear(x, weight, None, None if scales is None else scales.flatten(), norm)
    x = x if norm is None else norm(x)
    return multiply(x, weight) if scales is None else multiply_int8(x, weight, scales)


def tinygemm(codes: Tensor, scales: Tensor, zeros: Tensor) -> nn.Module:
    """Make the layer of ATen's int4 kernel for CUDA: even columns in a byte's high half, zeros as AtenInt4."""
    weight = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    parameters = torch.stack((scales.mT, ((8 - zeros.to(scales.dtype)) * scales).mT), dim=-1).contiguous()
    group_size = codes.shape[1] // scales.shape[1]

    def multiply_packed(x: Tensor, weight: Tensor, parameters: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, weight, group_size, parameters)

    return Product(multiply_packed, constant(weight), constant(parameters))


def own_layer(scheme: Scheme | None, weight: Tensor, *parameters: Tensor) -> nn.Module | None:
    """Return the layer that a model gets on this device for a weight, or for codes and what they need."""
    stored: AnyLinear
    if scheme is None:
        stored = Linear(1, 1)
        stored.weight = constant(weight)
        dtype = weight.dtype
    else:
        stored = StoredLinear(weight.shape, scheme.form)
        stored.weight = constant(weight if scheme.form.bits == 8 else pack_nibbles(weight))
        stored.scales = constant(parameters[0])
        stored.zeros = constant(parameters[1]) if scheme.form.zeros else None
        dtype = parameters[0].dtype
    return gpu_layer(stored, dtype, cuda_kernels()) if weight.device.type == "cuda" else cpu_layer(stored, dtype)


def forms_of(weight: Tensor, scheme: Scheme | None) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Form]]:
    """Return what a weight [N, K] stands for under a scheme, in fp32, its tensors, and the forms that they can take.

    The first form is a multiply and a sum, which torch.compile fuses into one loop for few rows; «ours» is the kernel
    that a model gets on this device, if there is one.
    """
    # Which also defines the operators of Triton's kernels.
    on_cuda = weight.device.type == "cuda" and cuda_kernels() is not None
    ours = partial(own_layer, scheme)
    norm = RMSNorm(weight.shape[1], EPS)
    norm.weight = constant(weight.new_ones(weight.shape[1]))

    def behind_norm(form: Form, folded: bool) -> Form:
        return lambda *tensors: Normed(layer, norm, folded) if (layer := form(*tensors)) else None

    one_loop = partial(Product, stream)
    norms = {
        "norm, multiply and sum": behind_norm(one_loop, False),
        "norm folded into the sum": behind_norm(one_loop, True),
    }
    if scheme is None:
        forms: dict[str, Form] = {"multiply and sum": partial(Product, multiply), "GEMM": partial(Product, F.linear)}
        if on_cuda:  # which takes a weight of any kind
            ones = constant(weight.new_ones(len(weight)))
            forms["int8's kernel"] = lambda weight: Product(torch.ops.kernels.cuda_int8_product, weight, ones)
        return weight.float(), (weight,), forms | norms | {"ours": ours}
    if scheme.form.bits == 8:
        codes, scales = quantize_int8(weight, scheme.group_size)
        meaning, tensors = dequantize(codes, scales, 0, scheme.group_size), (codes, scales.to(weight.dtype))
        forms = {"multiply and sum": partial(Product, multiply_int8)}
        if scheme.group_size is None:
            forms |= {"ATen": partial(AtenInt8, bias=None)} | norms
            if on_cuda:
                forms["Triton"] = partial(Product, torch.ops.kernels.cuda_int8_product)
        return meaning, tensors, forms | {"ours": ours}
    group_size = scheme.group_size or weight.shape[-1]
    codes, scales, zeros = quantize_int4(weight, group_size, scheme.symmetric)
    forms = {
        "multiply and sum": lambda codes, *rest: Product(multiply_int4, constant(pack_nibbles(codes)), *rest),
        "ATen": tinygemm if on_cuda else partial(AtenInt4, bias=None),
        "ours": ours,
    }
    if on_cuda:
        forms |= {"norm, ours": behind_norm(ours, False), "norm folded into ours": behind_norm(ours, True)}
    meaning = dequantize(codes, scales, zeros, group_size)
    return meaning, (codes, scales.to(weight.dtype), zeros), forms


def make_rungs(subject: Subject, device: str) -> Iterator[Rung]:
    """Yield a rung for each form of the weights and number of rows; what fails or is wrong is named and left out."""
    block = quantizable_linears(meta_model(subject.raw).layers[0])
    shapes = [layer.weight.shape for layer in block.values() if layer.weight.ndim == 2]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(subject.dtype)

    weights = [random(*shape) for shape in shapes]
    inputs = [[F.rms_norm(random(rows, weight.shape[1]), weight.shape[1:]) for weight in weights] for rows in ROWS]
    for name, raw in subject.forms.items():
        scheme = quantization_scheme(raw)
        meanings, tensors, forms = zip(*(forms_of(weight, scheme) for weight in weights), strict=True)
        first = ", ".join(filter(None, [name, next(iter(forms[0]))]))
        for form in forms[0]:
            title = ", ".join(filter(None, [name, form]))
            try:
                layers = make_layers(form, forms, tensors)
                num_bytes = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
                copies = min(MOST_COPIES, math.ceil(BYTES[torch.device(device).type] / num_bytes))
                for _ in range(copies - 1):
                    layers += make_layers(form, forms, tensors)
                chains = [compile_chain(layers, row_inputs, meanings, device) for row_inputs in inputs]
            except (NotImplementedError, RuntimeError, ValueError) as error:
                leave_out(title, error)
                continue
            for rows, chain in zip(ROWS, chains, strict=True):
                label, measure = f"{rows} row{'s' * (rows > 1)}", partial(block_ms, chain, device, copies)
                against = f"{first}, {label}" if title != first else ""
                yield Rung(f"{title}, {label}", "ms", measure, name, read_bytes=num_bytes, against=against)


def make_layers(form: str, forms: tuple[dict[str, Form], ...], tensors: tuple[tuple[Tensor, ...], ...]) -> Any:
    """Make the layers of a block in a form, in memory of their own. Raises ValueError where one has no such form."""
    layers = []
    for layer_forms, parts in zip(forms, tensors, strict=True):
        N, K = parts[0].shape
        if form == "ATen" and (N % 16 or K % 32):
            raise ValueError(f"ATen's kernels crash on sizes like {N} x {K}")
        copies = [constant(empty_weight(part.shape, part.dtype, part.device).copy_(part)) for part in parts]
        layer = layer_forms[form](*copies)
        if layer is None:
            raise ValueError(f"no kernel takes {N} x {K} here")
        layers.append(layer)
    return layers


@torch.inference_mode()
def compile_chain(
    layers: list[nn.Module], inputs: list[Tensor], meanings: tuple[Tensor, ...], device: str
) -> Callable[[], Any]:
    """Compile blocks of layers, each block for the same inputs. Raises ValueError where the first block's are wrong."""
    on_gpu = decode_mode(device) is not None
    chain = Chain(layers, inputs * (len(layers) // len(inputs)))
    allow_many_graphs()
    options: dict[str, Any] = {"triton.cudagraphs": on_gpu, "coordinate_descent_tuning": on_gpu}
    run = torch.compile(chain, fullgraph=True, dynamic=False, options=options)
    for y, x, meaning in zip(run(), inputs, meanings, strict=False):
        expected = x.float() @ meaning.T
        wrong = ((y.float() - expected).abs().max() / expected.abs().max()).item()
        if not wrong < TOLERANCE:
            raise ValueError(f"its outputs are wrong by {wrong:.0%} of the largest")
    return run


@torch.inference_mode()
def block_ms(run: Callable[[], Any], device: str, copies: int) -> float:
    return time_median(run, device) / copies
