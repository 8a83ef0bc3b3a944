"""What config.json says of quantized weights: the method, and the sizes of codes and groups.

`formats.py` looks for the tensors.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from linears import GROUP_SIZES, MODES, Form

# Keys of config.json; the second is that of compressed-tensors in 2024, the third of MLX.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
READ = "compressed-tensors, gptq, awq, auto-round and fp8"
# Where no method is named, the first of these keys that is there tells it; others have the last one too.
OWN_KEYS = {"config_groups": "compressed-tensors", "desc_act": "gptq", "zero_point": "awq", "bits": "MLX"}
# Of auto-round: two store zero points as they are, as gptq_v2 does.
PACKINGS = {
    "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2", "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq", "auto": "gptq", "auto_round:auto_awq": "awq", "auto_round:awq": "awq",
}  # fmt: skip

# Options that would change the arithmetic, and the values that are read: rotated inputs, by gptqmodel and auto-round.
NEUTRAL_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("is_marlin_format", "rotation", "rotation_config", "spinquant_config"), ()),
    "weight_scale_semantics": ("inverse",),
}


class Kind(NamedTuple):
    """What config.json says of some of the weights."""

    bits: int | None  # of a code; None: floats of 8 bits
    group_size: int | None  # None: a whole row
    block: Any = None  # rows and columns that share a scale, of floats
    symmetric: bool = False
    of_head: bool = False
    strategy: str | None = None  # what shares a scale: a tensor, channel, group or block; None: it is not said

    @property
    def form(self) -> Form | None:
        return Form(self.bits, self.group_size, self.bits == 4 and not self.symmetric) if self.bits else None


class Quantization(NamedTuple):
    method: str
    options: Mapping[str, Any]
    kinds: Sequence[Kind] = ()

    def error(self, key: str, expected: str, options: Mapping[str, Any] | None = None) -> ValueError:
        value = repr((self.options if options is None else options).get(key))[:60]
        return ValueError(f"config.json: {key} {value} of {self.method} is not supported, expected {expected}")

    def read_size(self, options: Mapping[str, Any]) -> int | None:
        size = options.get("group_size")
        if size not in (None, -1) and (type(size) is not int or size <= 0):
            raise self.error("group_size", "a number of columns, or -1", options)
        return None if size == -1 else size

    def form(self, of_head: bool = False) -> Form | None:
        """Return the form of the blocks' linears, of the first ones where they differ, or that of the output head.

        None where they are no codes, or config.json has nothing for them.
        """
        return next((kind.form for kind in self.kinds if kind.of_head == of_head), None)


def read_quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """Read what config.json says of quantized weights; None where it says nothing.

    Raises ValueError, in a line that names the method and says what to do, where it is one that is not read.
    """
    refuse_old_folder(raw)
    options = quantization_options(raw)
    if not options:
        return None
    default = next((method for key, method in OWN_KEYS.items() if key in options), "an unknown method")
    method = str(options.get("quant_method", default))[:40].removeprefix("intel/")
    if method == "auto-round":
        data_type = str(options.get("data_type", "int"))[:40]
        packing = str(options.get("packing_format", options.get("backend", "auto")))[:40]
        unknown = f"auto-round with packing_format {packing} of {data_type}"
        # What follows a second colon is the kernel that was meant to run it.
        layout = PACKINGS.get(":".join(packing.split(":")[:2]), unknown) if "int" in data_type else unknown
        layout = "fp8" if data_type == "fp" else layout
        method = layout.removesuffix("_v2")
        options = {**options, "checkpoint_format": layout} if method == "gptq" else options
    method = other_format(options) or method
    is_fp8 = method in ("fp8", "fbgemm_fp8") or (method == "modelopt" and options.get("quant_algo") == "FP8")
    if method not in KIND_READERS and not is_fp8:
        raise ValueError(
            f"config.json: quantization_config of {method} is not read, only {READ}; download the model that it was "
            "made from, and run quantize.py on it"
        )
    quantization = Quantization(method, options)
    for key, values in NEUTRAL_OPTIONS.items():
        if options.get(key) and options[key] not in values:
            raise quantization.error(key, " or ".join(values) or "none")
    block = options.get("weight_block_size")
    floats = [Kind(None, None, block, strategy="block" if block else None)]
    return quantization._replace(kinds=KIND_READERS[method](quantization) if method in KIND_READERS else floats)


def refuse_old_folder(raw: Mapping[str, Any]) -> None:
    """Raise ValueError for a folder as quantize.py wrote them before compressed-tensors."""
    if isinstance(own := raw.get("quantization"), dict) and own.get("mode") in MODES:
        size = f" --groupsize {own['groupsize']}" if own.get("groupsize") in GROUP_SIZES else ""
        raise ValueError(
            "config.json: this folder is of an earlier version, whose form is read no more; make it anew: python "
            f"quantize.py --checkpoint_path MODEL --mode {own['mode']}{size}"
        )


def quantization_options(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object that config.json has for quantized weights, without what is null; {} where it has none."""
    options: Any = next((raw[key] for key in CONFIG_KEYS if raw.get(key) is not None), {})
    if not isinstance(options, dict):
        raise ValueError(f"config.json: quantization_config is {str(options)[:60]!r}, expected an object")
    return {key: value for key, value in options.items() if value is not None}


def other_format(options: Mapping[str, Any]) -> str | None:
    """Return the format that the options, or one of their groups, name, if it is one that no method is read in."""
    parts = [options, *objects_in(options.get("config_groups"))]
    words = " ".join(f"{part.get('format')} {part.get('quant_algo')}" for part in parts)
    found = re.search("nvfp4|mxfp4|mxfp8|marlin|bitmask", words.lower())
    return found and found[0].upper()


def objects_in(held: Any) -> list[dict[str, Any]]:
    """Return the objects that stand right in an object or a list."""
    values = list(held.values()) if isinstance(held, dict) else held
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def read_compressed_kinds(quantization: Quantization) -> list[Kind]:
    sparsity, transform = (quantization.options.get(key) for key in ("sparsity_config", "transform_config"))
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise quantization.error("sparsity_config", "none")
    # A rotation of inputs or outputs, and not of weights alone, which are stored as they are after it.
    schemes = objects_in(transform.get("config_groups")) if isinstance(transform, dict) else []
    places = [use.get("location") for scheme in schemes for use in objects_in(scheme.get("apply"))]
    if transform and (not places or not all(str(place).startswith("weight_") for place in places)):
        raise quantization.error("transform_config", "rotations of weights alone")
    groups = quantization.options.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else [None]
    if not all(isinstance(group, dict) and isinstance(group.get("weights"), dict | None) for group in groups):
        raise quantization.error("config_groups", "groups with targets and weights")
    kinds = []
    for group in (group for group in groups if group.get("weights")):
        weights = {"type": "int", **{key: value for key, value in group["weights"].items() if value is not None}}
        is_int = weights["type"] == "int"
        expected = {"type": ("int", "float"), "num_bits": (4, 8) if is_int else (8,),
                    "strategy": ("group", "channel", "tensor", *["block"] * (not is_int))}  # fmt: skip
        for key, values in expected.items():
            if weights.get(key) not in values:
                raise quantization.error(key, " or ".join(map(str, values)), weights)
        block = weights.get("block_structure")
        if isinstance(block, str) and (sizes := re.fullmatch(r"(\d{1,6})x(\d{1,6})", block)):
            block = [int(size) for size in sizes.groups()]
        bits = int(weights["num_bits"]) if is_int else None  # 4.0 is 4
        targets = group["targets"] if isinstance(group.get("targets"), list) else []
        is_symmetric, is_head = weights.get("symmetric", True) is True, any("lm_head" in str(name) for name in targets)
        kinds.append(Kind(bits, quantization.read_size(weights), block, is_symmetric, is_head, weights["strategy"]))
    return kinds


def read_code_kinds(quantization: Quantization) -> list[Kind]:
    """Read the kinds of GPTQ and AWQ: that of all modules, and those of some."""
    options, is_gptq = quantization.options, quantization.method == "gptq"
    if options.get("bits") not in ((4, 8) if is_gptq else (4,)):
        raise quantization.error("bits", "4 or 8" if is_gptq else "4")
    layouts = ("gptq", "gptq_v2") if is_gptq else ("gemm",)
    for key in ("checkpoint_format", "format") if is_gptq else ("version", "checkpoint_format", "format"):
        if key in options and str(options[key]).lower() not in layouts:
            raise quantization.error(key, " or ".join(layouts))
    modules = [module for key in ("dynamic", "extra_config") for module in objects_in(options.get(key))]
    for module in modules:
        if isinstance(bits := module.get("bits"), int) and bits < 8 and bits != 4:
            raise quantization.error("bits", "4 or 8", module)
    kinds = [{**options, **{k: v for k, v in module.items() if v is not None}} for module in ({}, *modules)]
    return [
        Kind(int(kind["bits"]), quantization.read_size(kind), symmetric=is_gptq and kind.get("sym") is True)
        for kind in kinds
        if kind["bits"] in (4, 8)
    ]


KIND_READERS = {"compressed-tensors": read_compressed_kinds, "gptq": read_code_kinds, "awq": read_code_kinds}
