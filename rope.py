"""The rotary embeddings of config.json -> fields of ModelConfig."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from families import FAMILIES, heeds
from files import read_flag, read_number
from model import RopeScaling, default_frequencies

# The keys of rope_parameters and rope_scaling that every type may have, and those that one alone heeds.
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor",
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip
ROPE_TYPES: dict[str, set[str]] = {
    "default": set(), "linear": set(), "llama3": set(), "dynamic": set(),
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"attention_factor", "short_factor", "long_factor"},
}  # fmt: skip
LAYERS = ("full_attention", "sliding_attention")  # the types of layers of which each may have a rotary embedding


def parse_rope(values: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Read rotary embeddings, from `rope_parameters` or from `rope_theta` and `rope_scaling`: fields of ModelConfig."""
    if heeds(values, "rope_local_base_freq"):
        return parse_ropes_by_layer_type(values, head_dim)
    objects = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key) not in (None, {})}
    if not objects:
        objects = {"rope_parameters": FAMILIES[values["model_type"]].defaults.get("rope_parameters", {})}
    parsed = [parse_rope_object(values, key, rope, head_dim) for key, rope in objects.items()]
    if parsed[0] != parsed[-1]:
        scaling, parameters = objects.values()
        raise ValueError(f"config.json: rope_scaling {scaling!r} and rope_parameters {parameters!r} differ")
    return parsed[0]


def parse_ropes_by_layer_type(values: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Read one for each type of layer; rope_scaling is for those with full attention."""
    given, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    # With both types there, what stands beside them has no say, and gptqmodel writes something there.
    if not isinstance(given, dict) or not (given.keys() <= set(LAYERS) or given.keys() >= set(LAYERS)):
        raise ValueError(f"config.json: rope_parameters is {given!r}, expected an object with {' and '.join(LAYERS)}")
    if given.get("truncate") is not None:  # alone of them heeded there by `transformers`
        raise ValueError(f"config.json: truncate {given['truncate']!r} beside {' and '.join(LAYERS)} is not supported")
    ropes = [given.get(name) or {} for name in LAYERS]
    if any(not isinstance(rope, dict) for rope in (*ropes, scaling)):
        raise ValueError(f"config.json: rope_parameters {given!r} or rope_scaling {scaling!r} is no object")
    where = [f"{name} of rope_parameters" for name in LAYERS]
    fields = parse_rope_object(values, where[0], {**ropes[0], **scaling}, head_dim)
    local = parse_rope_object({**values, "rope_theta": values["rope_local_base_freq"]}, where[1], ropes[1], head_dim)
    if local["rope_scaling"] is not None:
        raise ValueError(f"config.json: rope_parameters {ropes[1]!r} of sliding_attention is scaled, not supported")
    return {**fields, "local_rope_theta": local["rope_theta"]}


def parse_rope_object(values: dict[str, Any], key: str, rope: Any, head_dim: int) -> dict[str, Any]:
    """Read one object, with the keys beside it that it lacks: fields of ModelConfig."""
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: {key} is {rope!r}, expected an object")
    family = FAMILIES[values["model_type"]]
    given = {name: value for name, value in rope.items() if value is not None}
    # A factor whose type is null is for no type that `transformers` knows either.
    default = None if "rope_type" in rope and "factor" in given else "default"
    rope_type = given.get("rope_type", given.get("type", default))
    types = tuple(dict.fromkeys(family.rope_types.values())) or tuple(ROPE_TYPES)
    if isinstance(rope_type, str):
        rope_type = family.rope_types.get(rope_type, rope_type)
    if rope_type not in types:
        raise ValueError(f"config.json: rope type {rope_type!r} is not supported; supported: {', '.join(types)}")
    own_keys = ROPE_KEYS | ROPE_TYPES[rope_type] | family.defaults.get("rope_parameters", {}).keys()
    if heeds(values, "rope_local_base_freq"):
        own_keys -= {"truncate"}  # which `transformers` does not look for there
    if "truncate" in own_keys & rope.keys() and rope["truncate"] is None:
        given["truncate"] = False  # as which null is taken
    for name, value in given.items():
        if name not in own_keys or (name == "partial_rotary_factor" and value != 1 and not heeds(values, name)):
            raise ValueError(f"config.json: {name} {value!r} in {key} is not supported")
    partial = values.get("partial_rotary_factor")
    given = {"rope_theta": values["rope_theta"], "partial_rotary_factor": 1 if partial is None else partial, **given}

    def number(name: str, low: float = 0.001) -> float:  # within bounds that keep every frequency finite in fp32
        return read_number(given, name, float, low=low, high=2**40, where=f" in {key}")

    share = read_number(given, "partial_rotary_factor", float, low=0, high=1, where=f" in {key}")
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        what = f"partial_rotary_factor {share:g} of head_dim {head_dim} lets {rotary_dim} channels rotate"
        raise ValueError(f"config.json: {what}, expected an even number")
    context = read_number(values, "max_position_embeddings")
    scaling = parse_rope_scaling(values, given, rope_type, rotary_dim, number)
    if scaling is not None and rope_type in ("dynamic", "yarn"):  # the configs of many models have the context before
        context = max(context, min(int(scaling.factor * scaling.original_max_position_embeddings), 2**31 - 1))
    fields = {"rope_theta": number("rope_theta"), "rope_scaling": scaling, "partial_rotary_factor": share}
    beta = number("llama_4_scaling_beta", low=0) if "llama_4_scaling_beta" in own_keys else 0.0
    return {**fields, "query_scaling_beta": beta, "max_position_embeddings": context}


def parse_rope_scaling(
    values: dict[str, Any], given: dict[str, Any], rope_type: str, rotary_dim: int, number: Callable[..., float]
) -> RopeScaling | None:
    """Read what a rope type has, with the defaults of `transformers`; number: reads one of `given`."""
    if rope_type == "default":
        return None
    context = read_number(values, "max_position_embeddings")
    if rope_type == "dynamic":
        if rotary_dim < 4:
            raise ValueError(f"config.json: rope type 'dynamic' needs head_dim of at least 4, and it is {rotary_dim}")
        return RopeScaling("dynamic", number("factor", low=1), original_max_position_embeddings=context)
    original = context if rope_type == "linear" else original_length(values, given, context)
    factor = context / original if rope_type in ("yarn", "longrope") and "factor" not in given else number("factor")
    frequencies, attention_factor = FREQUENCIES[rope_type](given, factor, original, rotary_dim, number)
    if "attention_factor" in given:
        attention_factor = number("attention_factor", low=0)
    short_and_long = tuple(tuple(values.tolist()) for values in frequencies)
    return RopeScaling(rope_type, factor, original, attention_factor, short_and_long)


def parse_linear(
    given: dict[str, Any], factor: float, original: int, rotary_dim: int, number: Callable[..., float]
) -> tuple[tuple[Tensor, Tensor], float]:
    """Return the frequencies of short and of long texts, here the same, and what cos and sin are multiplied by.

    Positions are interpolated (arXiv:2306.15595).
    """
    frequencies = default_frequencies(number("rope_theta"), rotary_dim) / factor
    return (frequencies, frequencies), 1.0


def parse_llama3(
    given: dict[str, Any], factor: float, original: int, rotary_dim: int, number: Callable[..., float]
) -> tuple[tuple[Tensor, Tensor], float]:
    """Return what `parse_linear` does, of Llama 3.1: long wavelengths are stretched, short ones kept."""
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if low >= high:
        raise ValueError(f"config.json: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
    frequencies = default_frequencies(number("rope_theta"), rotary_dim)
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    frequencies = kept * frequencies + (1 - kept) * (frequencies / factor)
    return (frequencies, frequencies), 1.0


def parse_longrope(
    given: dict[str, Any], factor: float, original: int, rotary_dim: int, number: Callable[..., float]
) -> tuple[tuple[Tensor, Tensor], float]:
    """Return what `parse_linear` does, with other frequencies for long texts (arXiv:2402.13753)."""
    wavelengths = number("rope_theta") ** (torch.arange(0, rotary_dim, 2, device="cpu").float() / rotary_dim)
    factors = [parse_factors(given, name, rotary_dim // 2) for name in ("short_factor", "long_factor")]
    short, long = (1.0 / (torch.tensor(values, dtype=torch.float32, device="cpu") * wavelengths) for values in factors)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return (short, long), attention


def parse_yarn(
    given: dict[str, Any], factor: float, original: int, rotary_dim: int, number: Callable[..., float]
) -> tuple[tuple[Tensor, Tensor], float]:
    """Return what `parse_linear` does (arXiv:2309.00071).

    Frequencies that turn more than beta_fast times within the original length are kept, those below beta_slow are
    divided by the factor, and those between interpolated.
    """
    theta = number("rope_theta")
    if theta <= 1:
        raise ValueError(f"config.json: rope type 'yarn' needs rope_theta above 1, and it is {theta:g}")

    def pair(key: str, default: float) -> float:
        turns = number(key) if given.get(key) else default
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def attention_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = pair("beta_fast", 32.0), pair("beta_slow", 1.0)
    if read_flag({"truncate": True, **given}, "truncate"):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    kept = 1 - ((torch.arange(rotary_dim // 2, device="cpu").float() - low) / (high - low or 0.001)).clamp(0, 1)
    wavelengths = theta ** (torch.arange(0, rotary_dim, 2, device="cpu").float() / rotary_dim)
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    both = given.get("mscale") and given.get("mscale_all_dim")
    scales = (number("mscale"), number("mscale_all_dim")) if both else (1.0, 0.0)
    return (frequencies, frequencies), attention_scale(scales[0]) / attention_scale(scales[1])


FREQUENCIES = {"linear": parse_linear, "llama3": parse_llama3, "yarn": parse_yarn, "longrope": parse_longrope}


def original_length(values: dict[str, Any], given: dict[str, Any], context: int) -> int:
    """Return original_max_position_embeddings, as in `transformers`: beside the object, in it, else the context.

    Beside the objects for types of layers it is not heeded.
    """
    name = "original_max_position_embeddings"
    beside = None if heeds(values, "rope_local_base_freq") else values.get(name)
    length = given.get(name, context) if beside is None else beside
    if isinstance(length, float) and length.is_integer():  # which is a number in there, and a size nowhere else
        length = int(length)
    return read_number({name: length}, name)


def parse_factors(given: dict[str, Any], name: str, count: int) -> tuple[float, ...]:
    """Read longrope's factors, one for each of `count` pairs of channels."""
    factors = given.get(name)
    if not isinstance(factors, list) or len(factors) != count:
        size = f"{len(factors)} of them" if isinstance(factors, list) else repr(factors)
        raise ValueError(f"config.json: {name} is {size}, expected a list of {count}, half the channels that rotate")
    return tuple(read_number({name: factor}, name, float, low=0.001, high=2**20) for factor in factors)
