"""config.json -> ModelConfig, or a refusal that names the key and its value.

Both forms that the Hub has are read: `rope_theta` beside `rope_scaling` with `torch_dtype`, and `rope_parameters` with
`dtype`. A key that would change the arithmetic and is not supported is an error, never a wrong text.
"""

import re
from pathlib import Path
from typing import Any

import torch

from families import FAMILIES, GRANITE_DEFAULTS, heeds
from files import own_file, read_flag, read_json, read_number
from linears import Form
from model import ModelConfig
from quantization import CONFIG_KEYS, quantization_options, read_quantization
from rope import parse_rope

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Far above any real model: larger values are mistakes that would exhaust memory or overflow a tensor's size.
MAX_COUNT, MAX_SIZE = 2**12, 2**24

# Keys of a model that sees too which its `text_config` may leave out.
OUTER_KEYS = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings", *CONFIG_KEYS)
# Such models -> the family of their text, where `text_config` names none.
TEXT_FAMILIES = {"mistral3": "mistral", "gemma3": "gemma3_text"}
# What `transformers` assumes for keys that any config.json may leave out.
COMMON_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
# Keys of config.json that would change the arithmetic, and the values with which they do not: 0 is 0.0 and false too.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "mlp_only_layers": ([], None), "is_causal": (True,),
    # `transformers` divides by a cap of 0.
    **dict.fromkeys(
        ("attention_multiplier", "clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"), (None,)
    ),
    **dict.fromkeys((
        "partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
        "decoder_sparse_step", "norm_topk_prob",
    ), (1, None)),
    **dict.fromkeys((
        "attention_bias", "mlp_bias", "attention_out_bias",
        "use_bidirectional_attention", "use_qk_norm", "use_mrope", "num_local_experts", "num_experts",
        "moe_intermediate_size", "shared_expert_intermediate_size", "is_encoder_decoder", "add_cross_attention",
    ), (0, None)),
}  # fmt: skip
# Files beside config.json in which older programs said how a model is quantized, and their keys that have other names.
OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
OLDER_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}
# Files that stand for a model in a layout that is not read, and what to do.
OTHER_LAYOUTS = {
    "adapter_config.json": "an adapter is not read; merge it into its base model (peft's merge_and_unload)",
    "*.gguf": "GGUF is read by scripts/convert_gguf.py alone, which makes a folder of it",
    "consolidated*": "the maker's own layout is not read; download the model in the Hub's, with config.json",
    "params.json": "the maker's own layout is not read; download the model in the Hub's, with config.json",
}


def read_config(checkpoint_path: Path) -> dict[str, Any]:
    """Read config.json as it stands. Raises FileNotFoundError where there is none."""
    path = own_file(checkpoint_path, "config.json")
    if not checkpoint_path.is_dir():
        convert = f"; run `python scripts/convert_gguf.py {checkpoint_path}`" * (checkpoint_path.suffix == ".gguf")
        raise FileNotFoundError(f"{checkpoint_path} is not a folder; name one or organization/name of the Hub{convert}")
    if not any(next(checkpoint_path.glob(weights), None) for weights in ("model*.safetensors*", "pytorch_model*.bin*")):
        for pattern, cure in OTHER_LAYOUTS.items():
            if found := next(checkpoint_path.glob(pattern), None):
                raise FileNotFoundError(f"{checkpoint_path} has {found.name} and no model.safetensors: {cure}")
    if not path.is_file():
        what = "has no config.json" if any(checkpoint_path.glob("[!.]*")) else "is an empty folder"
        raise FileNotFoundError(f"{checkpoint_path} {what}; download the model's whole folder (scripts/download.py)")
    raw = read_json(path)
    for name, method in OLDER_FILES.items():
        if not quantization_options(raw) and own_file(checkpoint_path, name).is_file():
            held = read_json(checkpoint_path / name)
            held = held["quantization"] if isinstance(held.get("quantization"), dict) else held
            held = {OLDER_KEYS.get(key, key): value for key, value in held.items() if value is not None}
            raw["quantization_config"] = {"quant_method": method, **held}
    return text_config(raw)


def text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the text in that of a model that sees too; any other as it is."""
    default = TEXT_FAMILIES.get(raw["model_type"]) if isinstance(raw.get("model_type"), str) else None
    if default is None:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"config.json: text_config is {text!r}, expected an object")
    beside = {key: raw[key] for key in OUTER_KEYS if raw.get(key) is not None}
    if beside.keys() & {"dtype", "torch_dtype"}:
        text = {**text, "dtype": None, "torch_dtype": None}
    return {"model_type": default, **text, "tie_word_embeddings": True, **beside}


def is_head(raw: dict[str, Any]) -> bool:
    """Say whether config.json is that of an EAGLE-3 head, or of another drafter of the speculators package.

    EAGLE's own heads call themselves LlamaForCausalLM.
    """
    is_eagle = re.search("eagle-?3", str(raw.get("architectures")), re.IGNORECASE)
    return bool(is_eagle) or any(raw.get(key) is not None for key in ("draft_vocab_size", "speculators_model_type"))


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turn the Hub's config.json into a ModelConfig.

    Raises ValueError, with the key and its value, where a key is missing or malformed or asks for arithmetic that
    model.py does not have.
    """
    if is_head(raw):
        raise ValueError("config.json is that of a draft head; give it to generate.py as --draft_checkpoint_path")
    raw = text_config(raw)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = [*FAMILIES, *TEXT_FAMILIES]
        raise ValueError(f"config.json: model_type {family!r} is not supported, only {', '.join(known)}")
    values = {**COMMON_DEFAULTS, **FAMILIES[family].defaults, "rope_parameters": None, **raw}
    quantization_form(raw)  # for what it refuses
    refuse_unheeded_values_(values)
    fields = {**parse_layers(values), **parse_heads(values), **parse_experts(values), **parse_attention_bias(values)}
    fields |= {**FAMILIES[family].fields, **parse_multipliers(values, fields["head_dim"])}
    fields |= parse_rope(values, fields["head_dim"])
    return ModelConfig(
        vocab_size=read_number(values, "vocab_size", high=MAX_SIZE),
        rms_norm_eps=read_number(values, "rms_norm_eps", float, low=0),
        **fields,
        mlp_bias=read_flag(values, "mlp_bias"),
        tie_word_embeddings=read_flag(values, "tie_word_embeddings"),
        model_type=family,
    )


def parse_heads(values: dict[str, Any]) -> dict[str, Any]:
    """Read the sizes of attention: fields of ModelConfig."""
    heads = read_number(values, "num_attention_heads", high=MAX_COUNT)
    hidden_size = read_number(values, "hidden_size", high=MAX_SIZE)
    head_dim = FAMILIES[values["model_type"]].null_head_dim or hidden_size // heads
    defaults = {"num_key_value_heads": heads, "head_dim": head_dim}
    values = values | {key: default for key, default in defaults.items() if values.get(key) is None}
    kv_heads = read_number(values, "num_key_value_heads", high=MAX_COUNT)
    head_dim = read_number(values, "head_dim", low=2, high=MAX_COUNT)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads {heads}, not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    return {
        "hidden_size": hidden_size, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
    }  # fmt: skip


def parse_multipliers(values: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Read the multipliers of the families that have them: fields of ModelConfig."""
    if heeds(values, "query_pre_attn_scalar"):
        if values["hidden_activation"] != "gelu_pytorch_tanh":
            raise ValueError(f"config.json: hidden_activation {values['hidden_activation']!r} is not supported")
        scores = read_number(values, "query_pre_attn_scalar", float, low=2.0**-20) ** -0.5
        return {"embedding_multiplier": values["hidden_size"] ** 0.5, "query_multiplier": scores * head_dim**0.5}
    if not heeds(values, "attention_multiplier"):
        return {}
    fields = {key: read_number(values, key, float, low=2.0**-20) for key in GRANITE_DEFAULTS}
    fields["query_multiplier"] = fields.pop("attention_multiplier") * head_dim**0.5
    return fields


def parse_attention_bias(values: dict[str, Any]) -> dict[str, Any]:
    """Read the biases of attention, which Seed-OSS has one by one: fields of ModelConfig."""
    bias = read_flag(values, "attention_bias")
    if not heeds(values, "attention_out_bias"):
        return {"attention_bias": bias}
    output_bias = read_flag(values, "attention_out_bias")
    if output_bias and not bias:
        raise ValueError("config.json: attention_out_bias True with attention_bias False is not supported")
    return {"qkv_bias": bias, "attention_bias": output_bias}


def parse_no_rope_layers(values: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the layers without rotary embeddings: SmolLM3's, or all of a Granite 4 whose positions say «nope»."""
    if heeds(values, "position_embedding_type"):
        name = values.get("position_embedding_type")
        if name not in ("rope", "nope", None):
            raise ValueError(f"config.json: position_embedding_type {name!r} is not supported; supported: rope, nope")
        return () if name == "rope" else tuple(range(num_layers))
    if not heeds(values, "no_rope_layer_interval"):
        return ()
    flags = values.get("no_rope_layers")  # 1 where a layer rotates
    if flags is None:
        interval = read_number(values, "no_rope_layer_interval")
        flags = [int((i + 1) % interval != 0) for i in range(num_layers)]
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise ValueError(f"config.json: no_rope_layers is {flags!r}, expected 0 or 1 for each of {num_layers} layers")
    return tuple(i for i, flag in enumerate(flags[:num_layers]) if not flag)


def refuse_unheeded_values_(values: dict[str, Any]) -> None:
    """Raise ValueError where a key that the family does not heed asks for other arithmetic, else reset that key."""
    family = values["model_type"]
    if family == "mixtral" and values.get("num_experts") == values["num_local_experts"]:
        values["num_experts"] = None  # its other name there
    if family == "granitemoehybrid":
        values.setdefault("num_local_experts", 8)  # as `transformers` does: without the key there are experts
    if family == "olmo3":
        values["rope_local_base_freq"] = FAMILIES[family].defaults["rope_local_base_freq"]  # whatever config.json says
    for key, neutral in NEUTRAL_VALUES.items():
        if key in values and not heeds(values, key):
            if values[key] not in neutral:
                raise ValueError(f"config.json: {key} {values[key]!r} is not supported for model_type {family!r}")
            values[key] = COMMON_DEFAULTS.get(key)


def parse_experts(values: dict[str, Any]) -> dict[str, Any]:
    """Read the sizes of the feed-forward, and the experts of the families that have them: fields of ModelConfig."""
    names = ("moe_intermediate_size", "shared_intermediate_size")
    name = next((name for name in names if heeds(values, name)), "intermediate_size")
    fields = {"intermediate_size": read_number(values, name, high=MAX_SIZE)}
    if not heeds(values, "num_experts_per_tok"):
        return fields
    if heeds(values, "num_experts"):
        fields["norm_topk_prob"] = read_flag(values, "norm_topk_prob")
        numbers = [values[key] for key in ("num_local_experts", "num_experts") if values.get(key) is not None] or [128]
        if numbers[0] != numbers[-1]:
            raise ValueError(f"config.json: num_local_experts {numbers[0]!r} and num_experts {numbers[-1]!r} differ")
        values = {**values, "num_local_experts": numbers[0]}
    num_experts = read_number(values, "num_local_experts", high=MAX_COUNT)
    num_active = read_number(values, "num_experts_per_tok", high=num_experts)
    return {**fields, "num_local_experts": num_experts, "num_experts_per_tok": num_active}


def parse_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Read how many layers there are, which do not rotate and which have a window: fields of ModelConfig.

    As in `transformers`, some families have full attention whatever `sliding_window` says, some slide in all layers,
    and the others in those that `layer_types` names, or else by a pattern of their own; only those that have
    `use_sliding_window` heed it.
    """
    num_layers = read_number(values, "num_hidden_layers", high=MAX_COUNT)
    no_rope_layers = parse_no_rope_layers(values, num_layers)
    types = values.get("layer_types")
    is_switch = heeds(values, "use_sliding_window") and values.get("use_sliding_window") is not None
    switched_off = is_switch and not read_flag(values, "use_sliding_window")
    no_window = not heeds(values, "sliding_window") or switched_off or values["sliding_window"] is None
    window = None if no_window else read_number(values, "sliding_window")
    mixed = window is not None and FAMILIES[values["model_type"]].mixed_attention
    default = "full_attention" if window is None else "sliding_attention"
    allowed = ("full_attention", "sliding_attention") if mixed else (default,)
    if heeds(values, "layers_block_type"):  # it calls full attention so, and has Mamba's layers in its larger models
        types = values.get("layers_block_type") if types is None else types
        if isinstance(types, list):
            types = ["full_attention" if name == "attention" else name for name in types]
    elif types is None:
        full = full_attention_layers(values, num_layers, no_rope_layers) if mixed else ()
        types = ["full_attention" if i in full else default for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or any(name not in allowed for name in types):
        expected = f"with sliding_window {window} each of the {num_layers} layers is {' or '.join(allowed)}"
        raise ValueError(f"config.json: layer_types {types!r} is not supported; {expected}")
    full_layers = tuple(i for i, name in enumerate(types) if name == "full_attention" and window is not None)
    return {
        "num_hidden_layers": num_layers, "no_rope_layers": no_rope_layers, "sliding_window": window,
        "full_attention_layers": full_layers,
    }  # fmt: skip


def full_attention_layers(
    values: dict[str, Any], num_layers: int, no_rope_layers: tuple[int, ...]
) -> list[int] | range:
    """Return the layers with full attention of a family that mixes them, by its own pattern."""
    if heeds(values, "no_rope_layer_interval"):
        return [i for i in range(num_layers) if i not in no_rope_layers]
    if heeds(values, "max_window_layers"):
        return range(read_number(values, "max_window_layers", low=0))
    every = read_number(values, "sliding_window_pattern") if heeds(values, "sliding_window_pattern") else 4  # OLMo 3's
    return range(every - 1, num_layers, every)


def parse_dtype(raw: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype that config.json names: `dtype`, or `torch_dtype` as older ones call it.

    None where it names none.
    """
    name = next((raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None), None)
    # «half» is a name of float16, and str(torch.float16) has «torch.» before it.
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if name is not None and dtype not in DTYPES.values():
        raise ValueError(f"config.json: dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return dtype


def eos_token_ids(checkpoint_path: str | Path, default: int | None = None) -> tuple[int, ...]:
    """Return every id that ends a text: generation_config.json's, else config.json's, else the tokenizer's `default`.

    () where the first of the two that has the key says null, or nobody names one.
    """
    raw, path = read_config(Path(checkpoint_path)), own_file(Path(checkpoint_path), "generation_config.json")
    generation = read_json(path) if path.is_file() else {}
    num_ids = raw["vocab_size"] if isinstance(raw.get("vocab_size"), int) else 2**31
    own = default if default is None or default < num_ids else None  # a tokenizer may have more than the model
    ids = {"eos_token_id": own, **raw, **generation}["eos_token_id"]
    if not isinstance(ids, list):
        ids = [] if ids is None else [ids]
    if not all(type(i) is int and 0 <= i < num_ids for i in ids):  # a bool is an int, but not of that type
        file = path.name if "eos_token_id" in generation else "config.json"
        raise ValueError(f"{file}: eos_token_id is {ids!r}, expected ids from 0 to {num_ids - 1}")
    return tuple(ids)


def quantization_form(raw: dict[str, Any]) -> Form | None:
    """Return the form of most linears of a quantized checkpoint; None where they are no codes.

    Raises ValueError where config.json names a quantization that is not read.
    """
    quantization = read_quantization(raw)
    if quantization is not None and raw.get("layout") == "fused":
        raise ValueError(f"config.json: quantization_config of {quantization.method} in a layout of ours, 'fused'")
    return quantization and quantization.form()
