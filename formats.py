"""Quantized checkpoints of the Hub: which tensors stand for the weight of a linear, and in which form it is stored.

Read are compressed-tensors, GPTQ, AWQ, auto-round and FP8, told apart by `quantization_config` of config.json and by
the tensors that are there. A module that a program left alone has a plain weight, and needs nothing of this.

Shapes: N outputs, K inputs, G groups of a row. A word is an int32, which holds 8 codes of 4 bits or 4 of 8, the
first in the lowest bits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from files import FLOAT_DTYPES, TensorFiles
from linears import Form, StoredLinear, pack_nibbles, unpack_nibbles
from quantization import Kind, Quantization

FLOAT8_DTYPES = {torch.float8_e4m3fn, torch.float8_e5m2}
# Scales of activations and KV caches, which other programs quantize and this one does not.
OTHER_SCALES = re.compile(
    r"(\.|_proj_)(act|activation|input|output|prob_output|q|k|v|kv)_(scale|zero_point|global_scale)$"
)
Shape = tuple[int, ...]
ReadParameters = Callable[[], dict[str, Tensor]]
# Column 8 w + i of a word of AWQ is its code AWQ_ORDER[i].
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Packed:
    """A weight [N, K] that a folder holds in another form than as one tensor of floats."""

    form: Form | None  # None: none that is stored here
    names: tuple[str, ...]  # of its tensors
    parameters: ReadParameters  # of a StoredLinear of this form; without one, the weight in fp32
    shape: torch.Size
    order: Tensor | None = None  # of a StoredLinear too

    def dense(self) -> Tensor:
        """Return the weight in fp32."""
        parameters = self.parameters()
        if self.form is None:
            return parameters["weight"]
        with torch.device("meta"):
            stored = StoredLinear(self.shape, self.form)
        stored.load_state_dict(parameters, assign=True)
        return stored.dequantize()


def find_packed(files: TensorFiles, base: str, shape: torch.Size, quantization: Quantization | None) -> Packed | None:
    """Find out how the weight of a module is held; None: as a plain tensor. Reads no weight.

    Raises ValueError where its tensors do not have the shapes that it needs.
    """
    method, options, kinds = quantization or Quantization("no quantization_config", {})
    tensors = ModuleTensors(files, base, shape, kinds or [Kind(8, None, symmetric=True)])
    weight = files.spec(f"{base}.weight")
    for suffix, methods in (("weight_packed", ("compressed-tensors",)), ("qweight", ("gptq", "awq"))):
        if tensors.has(suffix) and method not in methods:
            told = f"is of {' or '.join(methods)}, and config.json speaks of {method}; download it again"
            raise tensors.error(suffix, told)
    if tensors.has("qweight"):
        return read_gptq(tensors, options) if method == "gptq" else read_awq(tensors)
    if tensors.has("weight_packed"):
        return read_pack_quantized(tensors)
    dtype = weight[0] if weight else None
    is_float8 = dtype in FLOAT8_DTYPES
    if (is_float8 or dtype == torch.int8) and kinds and is_float8 not in {kind.bits is None for kind in kinds}:
        raise tensors.error("weight", f"is {dtype}, and config.json speaks of {'codes' if is_float8 else 'floats'}")
    if is_float8:
        return read_float8(tensors, options)
    if dtype in FLOAT_DTYPES and tensors.has("weight_scale"):
        raise tensors.error("weight", f"is {dtype}, not rounded yet; save it with save_compressed=True")
    return read_int_quantized(tensors) if dtype == torch.int8 and tensors.has("weight_scale") else None


class ModuleTensors:
    """The tensors of one module: looked up with the shape that each must have."""

    def __init__(self, files: TensorFiles, base: str, shape: torch.Size, kinds: Sequence[Kind]):
        self.files, self.base, self.shape, self.kinds = files, base, shape, kinds
        self.widths = sorted({kind.bits for kind in kinds if kind.bits})
        self.group_sizes = list(dict.fromkeys(kind.group_size for kind in kinds))
        self.strategies = {kind.strategy for kind in kinds}
        self.of_tensor: list[Shape] = [(1,), ()] if self.strategies & {None, "tensor"} else []
        self.names: list[str] = []

    def has(self, suffix: str) -> bool:
        return self.files.spec(f"{self.base}.{suffix}") is not None

    def get(self, suffix: str) -> Tensor:
        return self.files.get(f"{self.base}.{suffix}")

    def error(self, suffix: str, what: str) -> ValueError:
        return ValueError(f"{self.files.path}: tensor {self.base}.{suffix} {what}")

    def check(self, suffix: str, *shapes: Shape, floats: bool = False) -> tuple[torch.dtype, Shape]:
        """Return a tensor's dtype and shape, which must be one of these."""
        name = f"{self.base}.{suffix}"
        spec = self.files.spec(name)
        if spec is None:
            raise ValueError(f"{self.files.path} lacks tensor {name}; download them again")
        dtype, shape = spec[0], tuple(spec[1])
        if shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.error(suffix, f"has shape {list(shape)}, config.json asks for {expected}")
        if floats != dtype.is_floating_point:
            raise self.error(suffix, f"is {dtype}, expected {'floats' if floats else 'integers'}")
        self.names.append(name)
        return dtype, shape

    def check_words(self, suffix: str, *shapes: Shape, unpacked: Sequence[Shape] = ()) -> Shape:
        """Return the shape of a tensor of words, which must be one of these; unpacked: shapes that need no words."""
        dtype, shape = self.check(suffix, *shapes, *unpacked)
        if dtype != torch.int32 and shape in shapes:
            raise self.error(suffix, f"is {dtype}, expected torch.int32")
        return shape

    def check_scales(self, suffix: str, N: int, transposed: bool = False) -> tuple[torch.dtype, int, int | None]:
        """Return the dtype of a tensor of scales [N, G], transposed [G, N], G, and the group size, None of a row."""
        K = self.shape[-1]
        sizes: dict[int, int | None] = {}
        for size in self.group_sizes:  # of two with as many groups the first counts
            sizes.setdefault(-(-K // (size or K)), size if size and size < K else None)
        shapes = [(G, N) if transposed else (N, G) for G in sizes]
        one = self.of_tensor if not transposed and 1 in sizes else []
        dtype, shape = self.check(suffix, *shapes, *one, floats=True)
        if dtype not in FLOAT_DTYPES - {torch.float64}:
            raise self.error(suffix, f"is {dtype}, not of 16 or 32 bits")
        G = shape[0] if transposed else (1, *shape)[-1]
        return dtype, G, sizes[G]

    def has_zeros(self, bits: int) -> bool:
        """Say whether there are zero points, or have to be."""
        kinds = [kind for kind in self.kinds if kind.bits == bits] or self.kinds  # codes of 4 bits may fill a byte each
        return self.has("weight_zero_point") or not any(kind.symmetric for kind in kinds)

    def read_zeros(self, bits: int) -> Tensor:
        """Return zero points that are not packed. Raises ValueError for one that is no code."""
        zeros = self.get("weight_zero_point").long()  # torch would compare an int8 with 128 as int8
        if zeros.numel() and (zeros.min() < -(2 ** (bits - 1)) or zeros.max() >= 2 ** (bits - 1)):
            raise self.error("weight_zero_point", f"goes beyond {bits} bits; it is damaged")
        return zeros

    def packed(self, form: Form | None, parameters: ReadParameters, order: Tensor | None = None) -> Packed:
        return Packed(form, tuple(self.names), parameters, self.shape, order)

    def read_order(self, suffix: str, group_size: int, is_needed: bool = False) -> Tensor | None:
        """Return the order that puts a group's columns beside each other; None where they are so, or have no g_idx.

        Raises ValueError where the groups that a g_idx gives are not of this size, or where it is needed and missing.
        """
        if not self.has(suffix) and not is_needed:
            return None
        K = self.shape[-1]
        self.check(suffix, (K,))
        groups, own = self.get(suffix).long(), torch.arange(K) // group_size
        if torch.equal(groups, own) or (not is_needed and bool((groups == -1).all())):
            return None
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], own):
            what = f"does not put {group_size} columns into each of {-(-K // group_size)} groups"
            raise self.error(suffix, f"{what}; it is damaged")
        return order.int()

    @staticmethod
    def stored(
        bits: int, as_bytes: Tensor, scales: Tensor, zeros: Tensor | None = None, order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the parameters of a StoredLinear. as_bytes: codes as a folder has them, [N, K * bits / 8]."""
        if order is not None:
            codes = as_bytes if bits == 8 else unpack_nibbles(as_bytes, len(order))
            as_bytes = codes[:, order] if bits == 8 else pack_nibbles(codes[:, order])
        if bits == 8:
            as_bytes, zeros = center_codes(as_bytes), None if zeros is None else center_codes(zeros)
        parameters = {"weight": as_bytes, "scales": scales, "zeros": zeros, "order": order}
        return {name: tensor for name, tensor in parameters.items() if tensor is not None}


def view_rows_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """View the bytes of each row as another type; a row alone may have strides that torch does not view."""
    return tensor.contiguous().flatten().view(dtype).view(*tensor.shape[:-1], -1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes of int32 [..., W] as uint8 [..., W * 32 / bits]."""
    as_bytes = view_rows_as(words, torch.uint8)
    return as_bytes if bits == 8 else unpack_nibbles(as_bytes, 2 * as_bytes.shape[-1])


def center_codes(codes: Tensor) -> Tensor:
    """Take 128 off codes of 8 bits: uint8 -> int8."""
    return (codes ^ 128).view(torch.int8)


def read_pack_quantized(tensors: ModuleTensors) -> Packed:
    """compressed-tensors: codes along K, zero points along N, which its releases before 0.9 did not pack."""
    N, K = tensors.shape
    widths: dict[Shape, int] = {(N, -(-K * bits // 32)): bits for bits in tensors.widths}
    bits = widths[tensors.check_words("weight_packed", *widths)]
    dtype, G, size = tensors.check_scales("weight_scale", N)
    has_zeros = tensors.has_zeros(bits)
    words = (-(-N // (32 // bits)), G)
    zeros_in_words = (
        has_zeros and tensors.check_words("weight_zero_point", words, unpacked=((N, G), *tensors.of_tensor)) == words
    )
    if tensors.has("weight_shape"):
        tensors.check("weight_shape", (2,))
        if tensors.get("weight_shape").tolist() != [N, K]:
            raise tensors.error("weight_shape", f"is not {[N, K]}")
    order = tensors.read_order("weight_g_idx", size or K)  # left out where a module has none, whatever actorder says

    def parameters() -> dict[str, Tensor]:
        as_bytes = view_rows_as(tensors.get("weight_packed"), torch.uint8)[:, : -(-K * bits // 8)]
        zeros = None
        if zeros_in_words:
            zeros = unpack_words(tensors.get("weight_zero_point").t(), bits)[:, :N].t()
        elif has_zeros:  # that of a whole tensor, and all in 2024, are codes one by one, less their middle
            zeros = (tensors.read_zeros(bits) + 2 ** (bits - 1)).to(torch.uint8).expand(N, G)
        return tensors.stored(bits, as_bytes, tensors.get("weight_scale").expand(N, G), zeros, order)

    return tensors.packed(Form(bits, size, has_zeros, dtype, order is not None), parameters, order)


def read_gptq(tensors: ModuleTensors, options: Mapping[str, Any]) -> Packed:
    """GPTQ: codes along K of [K, N], zero points along N; a group for each column in g_idx."""
    N, K = tensors.shape
    widths: dict[Shape, int] = {(-(-K * bits // 32), N): bits for bits in tensors.widths}
    bits = widths[tensors.check_words("qweight", *widths)]
    dtype, G, size = tensors.check_scales("scales", N, transposed=True)
    tensors.check_words("qzeros", (G, -(-N * bits // 32)))
    order = tensors.read_order("g_idx", size or K, options.get("desc_act") is True and size is not None)
    # The first version takes 1 off the words of zero points, with borrow, and not off each zero point.
    is_first = str(options.get("checkpoint_format", options.get("format"))).lower() != "gptq_v2"
    added = (0x11111111 if bits == 4 else 0x01010101) if is_first else 0
    is_symmetric = all(kind.symmetric for kind in tensors.kinds if kind.bits == bits)

    def parameters() -> dict[str, Tensor]:
        as_bytes = view_rows_as(tensors.get("qweight").t(), torch.uint8)[:, : -(-K * bits // 8)]
        zeros = unpack_words(tensors.get("qzeros") + added, bits).t()[:N]
        if is_symmetric and bool((zeros != 2 ** (bits - 1)).any()):
            told = f"is not {2 ** (bits - 1)} everywhere, as sym says; it is damaged, or of another checkpoint_format"
            raise tensors.error("qzeros", told)
        return tensors.stored(bits, as_bytes, tensors.get("scales").t(), None if is_symmetric else zeros, order)

    return tensors.packed(Form(bits, size, not is_symmetric, dtype, order is not None), parameters, order)


def read_awq(tensors: ModuleTensors) -> Packed:
    """AWQ's gemm: codes along N of [K, N], zero points too, eight of a word in an order of their own."""
    N, K = tensors.shape
    tensors.check_words("qweight", (K, -(-N // 8)))
    dtype, G, size = tensors.check_scales("scales", N, transposed=True)
    tensors.check_words("qzeros", (G, -(-N // 8)))

    def in_order(suffix: str) -> Tensor:
        return unpack_words(tensors.get(suffix), 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2).t()[:N]

    def parameters() -> dict[str, Tensor]:
        return tensors.stored(4, pack_nibbles(in_order("qweight")), tensors.get("scales").t(), in_order("qzeros"))

    return tensors.packed(Form(4, size, True, dtype), parameters)


def read_int_quantized(tensors: ModuleTensors) -> Packed:
    """compressed-tensors: a code a byte, zero points too."""
    N, _ = tensors.shape
    tensors.check("weight", tuple(tensors.shape))
    dtype, G, size = tensors.check_scales("weight_scale", N)
    has_zeros = tensors.has_zeros(8)
    if has_zeros:
        tensors.check("weight_zero_point", (N, G), *tensors.of_tensor)

    def parameters() -> dict[str, Tensor]:
        zeros = {"zeros": tensors.read_zeros(8).to(torch.int8).expand(N, G)} if has_zeros else {}
        return {"weight": tensors.get("weight"), "scales": tensors.get("weight_scale").expand(N, G), **zeros}

    return tensors.packed(Form(8, size, has_zeros, dtype), parameters)


def read_float8(tensors: ModuleTensors, options: Mapping[str, Any]) -> Packed:
    """FP8: scales of a tensor, of channels, of groups, or of blocks. There is no kernel for it.

    What is called weight_scale_inv multiplies, but in gptqmodel's folders, which say so, it divides.
    """
    N, K = tensors.shape
    block = next((kind.block for kind in tensors.kinds if kind.block), [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise ValueError(f"config.json: blocks of {str(block)[:60]} weights are not supported, say [128, 128] is")
    tensors.check("weight", (N, K), floats=True)
    suffix = "weight_scale_inv" if tensors.has("weight_scale_inv") else "weight_scale"
    by_strategy: dict[str, dict[Shape, Sequence[int]]] = {  # scales' shapes -> rows and columns that share one
        "block": {(-(-N // block[0]), -(-K // block[1])): block},
        "channel": {(N, 1): (1, K), (N,): (1, K)},
        "tensor": {(1, 1): (N, K), (1,): (N, K), (): (N, K)},
        "group": {(N, -(-K // size)): (1, size) for size in filter(None, tensors.group_sizes)},
    }
    sizes: dict[Shape, Sequence[int]] = {}
    for strategy, shapes in by_strategy.items():  # of two with one shape the first counts
        if tensors.strategies & {None, strategy}:
            sizes = shapes | sizes
    shape = tensors.check(suffix, *sizes, floats=True)[1]
    rows, columns = sizes[shape]
    divides = options.get("weight_scale_semantics") == "inverse"

    def parameters() -> dict[str, Tensor]:
        scale = tensors.get(suffix).float()
        scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
        for dim, (size, length) in enumerate(((rows, N), (columns, K))):
            if scale.shape[dim] > 1:
                scale = scale.repeat_interleave(size, dim=dim).narrow(dim, 0, length)
        weight = tensors.get("weight").float()
        return {"weight": weight / scale if divides else weight * scale}

    return tensors.packed(None, parameters)
