"""Quantized checkpoints of the Hub: which tensors stand for the weight of a linear, and in which form it is stored.

Read are compressed-tensors, GPTQ, AWQ, auto-round and FP8, told apart by `quantization_config` of config.json and by
the tensors that are there. A module that a program left alone has a plain weight, and needs nothing of this.

Shapes: N outputs, K inputs, G groups of a row. A word is an int32, which holds 8 codes of 4 bits or 4 of 8, the
first in the lowest bits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from files import FLOAT_DTYPES, TensorFiles
from linears import GROUP_SIZES, MODES, Form, Scheme, StoredLinear, pack_nibbles, unpack_nibbles

FLOAT8_DTYPES = {torch.float8_e4m3fn, torch.float8_e5m2}
# What becomes of activations or keys in another program: here they are not quantized.
OTHER_SCALES = re.compile(r"\.(activation|input|output|q|k|v)_(scale|zero_point|global_scale)$")
# Column 8 w + i of a word of AWQ is its code AWQ_ORDER[i].
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
READ = "compressed-tensors, gptq, awq, auto-round and fp8"


# ---------------------------------------------------------------------------------------------------------------------
# config.json


class Kind(NamedTuple):
    """What config.json says of some of the weights."""

    bits: int | None  # of a code; None: floats of 8 bits
    group_size: int | None  # None: a whole row
    block: Any = None  # rows and columns that share a scale, of floats
    symmetric: bool = False
    of_head: bool = False

    @property
    def scheme(self) -> Scheme | None:
        return Scheme(f"int{self.bits}", self.group_size, self.symmetric and self.bits == 4) if self.bits else None


class Quantization(NamedTuple):
    method: str
    options: Mapping[str, Any]
    kinds: Sequence[Kind] = ()

    def fail(self, key: str, expected: str, options: Mapping[str, Any] | None = None) -> ValueError:
        value = (self.options if options is None else options).get(key)
        return ValueError(
            f"config.json: {key} {repr(value)[:60]} of {self.method} is not supported, expected {expected}"
        )

    def read_size(self, options: Mapping[str, Any]) -> int | None:
        size = options.get("group_size")
        if size not in (None, -1) and (type(size) is not int or size <= 0):
            raise self.fail("group_size", "a number of columns, or -1", options)
        return None if size == -1 else size

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of the blocks' linears, of the first ones where they differ; None where they are no codes."""
        return next((kind.scheme for kind in self.kinds if not kind.of_head), None)

    @property
    def head(self) -> Scheme | None:
        """The scheme of the output head, where config.json has one for it."""
        return next((kind.scheme for kind in self.kinds if kind.of_head), None)


def read_quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """Read what config.json says of quantized weights; None where it says nothing.

    Raises ValueError, in a line that names the method and says what to do, where it is one that is not read.
    """
    if isinstance(own := raw.get("quantization"), dict) and own.get("mode") in MODES:
        size = f" --groupsize {own['groupsize']}" if own.get("groupsize") in GROUP_SIZES else ""
        raise ValueError(
            "config.json: this folder is of an earlier version, whose form is read no more; make it anew: python "
            f"quantize.py --checkpoint_path MODEL --mode {own['mode']}{size}"
        )
    options = raw.get("quantization") if raw.get("quantization_config") is None else raw["quantization_config"]
    if options in (None, {}):
        return None
    if not isinstance(options, dict):
        raise ValueError(f"config.json: quantization_config is {str(options)[:60]!r}, expected an object")
    method = str(options.get("quant_method", "MLX" if "bits" in options else None))[:40]
    name = {"None": "an unknown method"}.get(method, method)
    if method == "auto-round":  # in whose own packing zero points are stored as they are, as in gptq_v2
        packing = options.get("packing_format")
        packings = {"auto_round": "gptq_v2", "auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
        if packing not in [*packings]:
            raise Quantization(method, options).fail("packing_format", " or ".join(packings))
        method = packings[packing].removesuffix("_v2")
        options = {**options, "checkpoint_format": packings[packing]} if method == "gptq" else options
    groups = options.get("config_groups")
    kinds = [options, *(groups.values() if isinstance(groups, dict) else ())]
    words = " ".join(f"{kind.get('format')} {kind.get('quant_algo')}" for kind in kinds if isinstance(kind, dict))
    if other := re.search("nvfp4|mxfp4|mxfp8|marlin|bitmask", words.lower()):
        method = name = other[0].upper()
    if method not in (*KINDS, "fp8", "fbgemm_fp8") and not (
        method == "modelopt" and options.get("quant_algo") == "FP8"
    ):
        raise ValueError(
            f"config.json: quantization_config of {name} is not read, only {READ}; download the model that it was made "
            "from, and run quantize.py on it"
        )
    quantization = Quantization(method, options)
    block = options.get("weight_block_size")
    return quantization._replace(kinds=KINDS[method](quantization) if method in KINDS else [Kind(None, None, block)])


def read_compressed_kinds(quantization: Quantization) -> list[Kind]:
    for key in ("sparsity_config", "transform_config"):
        if quantization.options.get(key) and quantization.options[key] != {"format": "dense"}:
            raise quantization.fail(key, "none")
    groups = quantization.options.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else [None]
    if not all(isinstance(group, dict) and isinstance(group.get("weights"), dict | None) for group in groups):
        raise quantization.fail("config_groups", "groups with targets and weights")
    kinds = []
    for group in (group for group in groups if group.get("weights")):
        weights = group["weights"]
        is_int = weights.get("type", "int") == "int"
        expected = {"type": ("int", "float"), "num_bits": (4, 8) if is_int else (8,),
                    "strategy": ("group", "channel", "tensor", *["block"] * (not is_int))}  # fmt: skip
        for key, values in expected.items():
            if weights.get(key, "int" if key == "type" else None) not in values:
                raise quantization.fail(key, " or ".join(map(str, values)), weights)
        bits = weights["num_bits"] if is_int else None
        is_head, symmetric = "lm_head" in str(group.get("targets")), weights.get("symmetric") is True
        kinds.append(Kind(bits, quantization.read_size(weights), weights.get("block_structure"), symmetric, is_head))
    return kinds


def read_code_kinds(quantization: Quantization) -> list[Kind]:
    """Read the kinds of GPTQ and AWQ: that of all modules, and those of some."""
    options, is_gptq = quantization.options, quantization.method == "gptq"
    if options.get("bits") not in ((4, 8) if is_gptq else (4,)):
        raise quantization.fail("bits", "4 or 8" if is_gptq else "4")
    key = "version" if "version" in options else "checkpoint_format" if options.get("checkpoint_format") else "format"
    layouts = ("gptq", "gptq_v2") if is_gptq else ("gemm",)
    if options.get(key) is not None and str(options[key]).lower() not in layouts:
        raise quantization.fail(key, " or ".join(layouts))
    others = [options.get(key) for key in ("dynamic", "extra_config")]
    modules = [module for other in others if isinstance(other, dict) for module in other.values()]
    kinds = [{**options, **module} for module in ({}, *modules) if isinstance(module, dict)]
    return [Kind(kind["bits"], quantization.read_size(kind)) for kind in kinds if kind["bits"] in (4, 8)]


KINDS = {"compressed-tensors": read_compressed_kinds, "gptq": read_code_kinds, "awq": read_code_kinds}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Packed:
    """A weight [N, K] that a folder holds in another form than as one tensor of floats."""

    form: Form | None  # None: none that is stored here
    names: tuple[str, ...]  # of its tensors
    parameters: Callable[[], dict[str, Tensor]]  # of a StoredLinear of this form; without one, the weight in fp32
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


def find(files: TensorFiles, base: str, shape: torch.Size, quantization: Quantization | None) -> Packed | None:
    """Find out how the weight of a module is held; None: as a plain tensor. Reads no weight.

    Raises ValueError where its tensors do not have the shapes that it needs.
    """
    method, options, kinds = quantization or Quantization("nothing", {})
    reading = Reading(files, base, shape, kinds or [Kind(8, None)])
    weight = files.spec(f"{base}.weight")
    for kind, methods in (("weight_packed", ("compressed-tensors",)), ("qweight", ("gptq", "awq"))):
        if reading.has(kind) and method not in methods:
            raise ValueError(
                f"{files.path}: tensor {base}.{kind} is of {' or '.join(methods)}, and config.json speaks of {method}; "
                "download it again"
            )
    if reading.has("qweight"):
        return gptq(reading, options) if method == "gptq" else awq(reading)
    if reading.has("weight_packed"):
        return pack_quantized(reading)
    if weight and weight[0] in FLOAT8_DTYPES:
        return float8(reading)
    return int_quantized(reading) if weight and weight[0] == torch.int8 and reading.has("weight_scale") else None


class Reading:
    """The tensors of one module: looked up with the shape that each must have."""

    def __init__(self, files: TensorFiles, base: str, shape: torch.Size, kinds: Sequence[Kind]):
        self.files, self.base, self.shape, self.kinds = files, base, shape, kinds
        self.widths = sorted({kind.bits for kind in kinds if kind.bits})
        self.group_sizes = list(dict.fromkeys(kind.group_size for kind in kinds))
        self.names: list[str] = []

    def has(self, kind: str) -> bool:
        return self.files.spec(f"{self.base}.{kind}") is not None

    def get(self, kind: str) -> Tensor:
        return self.files.get(f"{self.base}.{kind}")

    def check(self, kind: str, *shapes: tuple[int, ...], floats: bool = False) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return a tensor's dtype and shape, which must be one of these."""
        name = f"{self.base}.{kind}"
        spec = self.files.spec(name)
        if spec is None:
            raise ValueError(f"{self.files.path} lacks tensor {name}; download them again")
        dtype, shape = spec[0], tuple(spec[1])
        if shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise ValueError(
                f"{self.files.path}: tensor {name} has shape {list(shape)}, config.json asks for {expected}"
            )
        if floats != dtype.is_floating_point:
            raise ValueError(
                f"{self.files.path}: tensor {name} is {dtype}, expected {'floats' if floats else 'integers'}"
            )
        self.names.append(name)
        return dtype, shape

    def check_words(self, kind: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor of words, which must be one of these."""
        dtype, shape = self.check(kind, *shapes)
        if dtype != torch.int32:
            raise ValueError(f"{self.files.path}: tensor {self.base}.{kind} is {dtype}, expected torch.int32")
        return shape

    def check_scales(self, kind: str, N: int, transposed: bool = False) -> tuple[torch.dtype, int, int | None]:
        """Return the dtype of a tensor of scales [N, G], transposed [G, N], G, and the group size, None of a row."""
        K = self.shape[-1]
        sizes = {-(-K // (size or K)): size if size and size < K else None for size in reversed(self.group_sizes)}
        shapes = [(G, N) if transposed else (N, G) for G in sizes]
        one = [] if transposed or 1 not in sizes else [(1,)]
        dtype, shape = self.check(kind, *shapes, *one, floats=True)
        if dtype not in FLOAT_DTYPES - {torch.float64}:
            raise ValueError(f"{self.files.path}: tensor {self.base}.{kind} is {dtype}, not of 16 or 32 bits")
        G = shape[0] if transposed else shape[-1]
        return dtype, G, sizes[G]

    def packed(
        self, form: Form | None, parameters: Callable[[], dict[str, Tensor]], order: Tensor | None = None
    ) -> Packed:
        return Packed(form, tuple(self.names), parameters, self.shape, order)

    def read_order(self, kind: str, group_size: int) -> Tensor | None:
        """Return the order that puts a group's columns beside each other; None where they are so, or have no g_idx.

        Raises ValueError where the groups that a g_idx gives are not of this size.
        """
        if not self.has(kind):
            return None
        K = self.shape[-1]
        self.check(kind, (K,))
        groups, own = self.get(kind).long(), torch.arange(K) // group_size
        if torch.equal(groups, own) or bool((groups == -1).all()):
            return None
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], own):
            raise ValueError(
                f"{self.files.path}: tensor {self.base}.{kind} does not put {group_size} columns into each of "
                f"{-(-K // group_size)} groups; the checkpoint is damaged"
            )
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
            as_bytes, zeros = centred(as_bytes), None if zeros is None else centred(zeros)
        parameters = {"weight": as_bytes, "scales": scales, "zeros": zeros, "order": order}
        return {name: tensor for name, tensor in parameters.items() if tensor is not None}


def retyped(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """View the bytes of each row as another type; a row alone may have strides that torch does not view."""
    return tensor.contiguous().flatten().view(dtype).view(*tensor.shape[:-1], -1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes of int32 [..., W] as uint8 [..., W * 32 / bits]."""
    as_bytes = retyped(words, torch.uint8)
    return as_bytes if bits == 8 else unpack_nibbles(as_bytes, 2 * as_bytes.shape[-1])


def centred(codes: Tensor) -> Tensor:
    """Take 128 off codes of 8 bits: uint8 -> int8."""
    return (codes ^ 128).view(torch.int8)


def pack_quantized(reading: Reading) -> Packed:
    """compressed-tensors: codes along K, zero points along N."""
    N, K = reading.shape
    bits = reading.check_words("weight_packed", *((N, -(-K // (32 // bits))) for bits in reading.widths))[1] * 32 // K
    bits = 4 if bits < 8 else 8
    dtype, G, size = reading.check_scales("weight_scale", N)
    has_zeros = reading.has("weight_zero_point")
    if has_zeros:
        reading.check_words("weight_zero_point", (-(-N // (32 // bits)), G))
    if reading.has("weight_shape"):
        reading.check("weight_shape", (2,))
        if reading.get("weight_shape").tolist() != [N, K]:
            raise ValueError(f"{reading.files.path}: tensor {reading.base}.weight_shape is not {[N, K]}")
    order = reading.read_order("weight_g_idx", size or K)

    def parameters() -> dict[str, Tensor]:
        as_bytes = retyped(reading.get("weight_packed"), torch.uint8)[:, : -(-K * bits // 8)]
        zeros = unpack_words(reading.get("weight_zero_point").t(), bits)[:, :N].t() if has_zeros else None
        return reading.stored(bits, as_bytes, reading.get("weight_scale").expand(N, G), zeros, order)

    return reading.packed(Form(bits, size, has_zeros, dtype, order is not None), parameters, order)


def gptq(reading: Reading, options: Mapping[str, Any]) -> Packed:
    """GPTQ: codes along K of [K, N], zero points along N; a group for each column in g_idx."""
    N, K = reading.shape
    words = reading.check_words("qweight", *((K * bits // 32, N) for bits in reading.widths))[0]
    bits = 4 if words == K // 8 else 8
    dtype, G, size = reading.check_scales("scales", N, transposed=True)
    reading.check_words("qzeros", (G, N * bits // 32))
    order = reading.read_order("g_idx", size or K)
    # The first version takes 1 off the words of zero points, with borrow, and not off each zero point.
    is_first = options.get("checkpoint_format", options.get("format")) != "gptq_v2"
    added = (0x11111111 if bits == 4 else 0x01010101) if is_first else 0

    def parameters() -> dict[str, Tensor]:
        as_bytes = retyped(reading.get("qweight").t(), torch.uint8)
        zeros = unpack_words(reading.get("qzeros") + added, bits).t()
        return reading.stored(bits, as_bytes, reading.get("scales").t(), zeros, order)

    return reading.packed(Form(bits, size, True, dtype, order is not None), parameters, order)


def awq(reading: Reading) -> Packed:
    """AWQ's gemm: codes along N of [K, N], zero points too, eight of a word in an order of their own."""
    N, K = reading.shape
    reading.check_words("qweight", (K, N // 8))
    dtype, G, size = reading.check_scales("scales", N, transposed=True)
    reading.check_words("qzeros", (G, N // 8))

    def in_order(kind: str) -> Tensor:
        return unpack_words(reading.get(kind), 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2).t()

    def parameters() -> dict[str, Tensor]:
        return reading.stored(4, pack_nibbles(in_order("qweight")), reading.get("scales").t(), in_order("qzeros"))

    return reading.packed(Form(4, size, True, dtype), parameters)


def int_quantized(reading: Reading) -> Packed:
    """compressed-tensors: a code a byte, zero points too."""
    N, _ = reading.shape
    reading.check("weight", tuple(reading.shape))
    dtype, G, size = reading.check_scales("weight_scale", N)
    has_zeros = reading.has("weight_zero_point")
    if has_zeros:
        reading.check("weight_zero_point", (N, G), (1,))

    def parameters() -> dict[str, Tensor]:
        zeros = {"zeros": reading.get("weight_zero_point").to(torch.int8).expand(N, G)} if has_zeros else {}
        return {"weight": reading.get("weight"), "scales": reading.get("weight_scale").expand(N, G), **zeros}

    return reading.packed(Form(8, size, has_zeros, dtype), parameters)


def float8(reading: Reading) -> Packed:
    """FP8: scales of a tensor, of channels, of groups, or of blocks. There is no kernel for it."""
    N, K = reading.shape
    block = next((kind.block for kind in reading.kinds if kind.block), [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise ValueError(
            f"config.json: blocks of {str(block)[:60]} weights are not supported, expected such as [128, 128]"
        )
    reading.check("weight", (N, K), floats=True)
    kind = "weight_scale_inv" if reading.has("weight_scale_inv") else "weight_scale"
    sizes = [size for size in reading.group_sizes if size]
    by_group = [(N, -(-K // size)) for size in sizes]
    by_block = (-(-N // block[0]), -(-K // block[1]))
    shape = reading.check(kind, by_block, (N, 1), (N,), (1, 1), (1,), (), *by_group, floats=True)[1]
    rows = block[0] if shape == by_block else 1
    columns = block[1] if shape == by_block else sizes[by_group.index(shape)] if shape in by_group else K

    def parameters() -> dict[str, Tensor]:
        scale = reading.get(kind).float()
        scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
        for dim, (size, length) in enumerate(((rows, N), (columns, K))):
            if scale.shape[dim] > 1:
                scale = scale.repeat_interleave(size, dim=dim).narrow(dim, 0, length)
        return {"weight": reading.get("weight").float() * scale}

    return reading.packed(None, parameters)
