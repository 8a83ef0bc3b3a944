"""config.json -> ModelConfig, or a refusal that names the key and its value.

Both forms that the Hub has are read: `rope_theta` beside `rope_scaling` with `torch_dtype`, and `rope_parameters` with
`dtype`. A key that would change the arithmetic and is not supported is an error, never a wrong text.
"""

from pathlib import Path
from typing import Any

import torch

from files import own_file, read_json
from linears import GROUP_SIZES, MODES, Scheme
from model import ModelConfig, RopeScaling

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Far above any real model: larger values are mistakes that would exhaust memory or overflow a tensor's size.
MAX_COUNT, MAX_SIZE = 2**12, 2**24

QWEN_DEFAULTS: dict[str, Any] = {
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768,
}  # fmt: skip
# What `transformers` assumes for keys that a family's config.json leaves out.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "mixtral": {
        "num_key_value_heads": 8, "sliding_window": None, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen2": {"num_key_value_heads": 32, **QWEN_DEFAULTS},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, **QWEN_DEFAULTS},
}  # fmt: skip
COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# Flags that only these families have; in the others they must be off.
FLAGS = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
# Keys of config.json that would change the arithmetic, and the values with which they do not: 0 is 0.0 and false too.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "attn_logit_softcapping": (0, None),
    "final_logit_softcapping": (0, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "use_qk_norm": (False, None),
    "use_mrope": (False, None),
    "num_experts": (0, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "norm_topk_prob": (True, None),
    "moe_intermediate_size": (0, None),
    "shared_expert_intermediate_size": (0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor",
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip

# Files that stand for a model in a form that is not read, and what to do.
OTHER_FORMS = {
    "adapter_config.json": "an adapter is not read; merge it into its base model (peft's merge_and_unload)",
    "*.gguf": "GGUF is read by scripts/convert_gguf.py alone, which makes a folder of it",
    "consolidated*": "the maker's own layout is not read; download the model in the Hub's, with config.json",
    "params.json": "the maker's own layout is not read; download the model in the Hub's, with config.json",
}


def read_config(checkpoint_path: Path) -> dict[str, Any]:
    """Read config.json as it stands. Raises FileNotFoundError where there is none."""
    path = own_file(checkpoint_path, "config.json")
    if not checkpoint_path.is_dir():
        convert = (
            f"; run `python scripts/convert_gguf.py {checkpoint_path}`" if checkpoint_path.suffix == ".gguf" else ""
        )
        raise FileNotFoundError(
            f"{checkpoint_path} is not a folder; expected a checkpoint folder with a config.json{convert}"
        )
    if not any(next(checkpoint_path.glob(weights), None) for weights in ("model*.safetensors*", "pytorch_model*.bin*")):
        for pattern, cure in OTHER_FORMS.items():
            if found := next(checkpoint_path.glob(pattern), None):
                raise FileNotFoundError(f"{checkpoint_path} has {found.name} and no model.safetensors: {cure}")
    if not path.is_file():
        what = "has no config.json" if any(checkpoint_path.glob("[!.]*")) else "is an empty folder"
        raise FileNotFoundError(f"{checkpoint_path} {what}; download the model's whole folder (scripts/download.py)")
    return read_json(path)


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turn the Hub's config.json into a ModelConfig.

    Raises ValueError, with the key and its value, where a key is missing or malformed or asks for arithmetic that
    model.py does not have.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILY_DEFAULTS:
        raise ValueError(
            f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILY_DEFAULTS)}"
        )
    values = {**COMMON_DEFAULTS, **FAMILY_DEFAULTS[family], **raw}
    check_not_quantized(raw.get("quantization_config"))
    silence_neutral_values_(values, family)
    heads = read_number(values, "num_attention_heads", high=MAX_COUNT)
    hidden_size = read_number(values, "hidden_size", high=MAX_SIZE)
    for key, default in (
        ("num_key_value_heads", heads),
        ("head_dim", FAMILY_DEFAULTS[family].get("head_dim", hidden_size // heads)),
    ):
        if values.get(key) is None:
            values[key] = default
    kv_heads = read_number(values, "num_key_value_heads", high=MAX_COUNT)
    head_dim = read_number(values, "head_dim", low=2, high=MAX_COUNT)
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    rope_theta, rope_scaling = parse_rope(values)
    num_layers = read_number(values, "num_hidden_layers", high=MAX_COUNT)
    sliding_window, full_attention_layers = parse_sliding_window(values, num_layers)
    num_experts, num_active = parse_experts(values)
    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=read_number(values, "intermediate_size", high=MAX_SIZE),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=read_number(values, "vocab_size", high=MAX_SIZE),
        max_position_embeddings=read_number(values, "max_position_embeddings"),
        rms_norm_eps=read_number(values, "rms_norm_eps", float, low=0),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=sliding_window,
        full_attention_layers=full_attention_layers,
        attention_bias=read_flag(values, "attention_bias"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        mlp_bias=read_flag(values, "mlp_bias"),
        num_local_experts=num_experts,
        num_experts_per_tok=num_active,
        tie_word_embeddings=read_flag(values, "tie_word_embeddings"),
    )


def read_number(
    values: dict[str, Any], key: str, kind: type = int, low: float = 1, high: int = 2**31 - 1, where: str = ""
) -> Any:
    value: Any = values.get(key)
    if type(value) not in {int, kind} or not low <= value <= high:  # a bool is an int, but not of that type
        raise ValueError(
            f"config.json: {key}{where} is {value!r}, expected {kind.__name__} of at least {low} and at most {high}"
        )
    return kind(value)


def silence_neutral_values_(values: dict[str, Any], family: str) -> None:
    """Raise ValueError where a key asks for other arithmetic; let one that says nothing in this family say it alike."""
    if family == "mixtral" and values.get("num_experts") == values["num_local_experts"]:
        values["num_experts"] = None  # its other name there
    for key, neutral in NEUTRAL_VALUES.items():
        if key in values and values[key] not in neutral:
            raise ValueError(f"config.json: {key} {values[key]!r} is not supported")
    for key, families in FLAGS.items():
        if family not in families:
            if values[key] not in (False, None):
                raise ValueError(f"config.json: {key} {values[key]!r} is not supported for model_type {family!r}")
            values[key] = False


def check_not_quantized(value: Any) -> None:
    """Raise ValueError where config.json has a `quantization_config`: what other programs quantized is not read."""
    if value is not None:
        method = value.get("quant_method") if isinstance(value, dict) else value
        raise ValueError(
            f"config.json: quantization_config of method {method!r} is not supported; "
            "name the model that it was made from, which quantize.py quantizes"
        )


def read_flag(values: dict[str, Any], key: str) -> bool:
    if not isinstance(values[key], bool):
        raise ValueError(f"config.json: {key} is {values[key]!r}, expected true or false")
    return values[key]


def parse_experts(values: dict[str, Any]) -> tuple[int, int]:
    """Return how many experts there are and how many of them a token takes; 0 and 0 in the families without."""
    if values["model_type"] != "mixtral":
        if values.get("num_local_experts") not in (0, None):
            raise ValueError(f"config.json: num_local_experts {values['num_local_experts']!r} is not supported")
        return 0, 0
    num_experts = read_number(values, "num_local_experts", high=MAX_COUNT)
    return num_experts, read_number(values, "num_experts_per_tok", high=num_experts)


def parse_sliding_window(values: dict[str, Any], num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the sliding window, None where there is none, and the layers with full attention in spite of it.

    As in `transformers`, a Llama has full attention, and so have the first `max_window_layers` of a Qwen, unless
    `layer_types` says otherwise; only a Qwen heeds `use_sliding_window`.
    """
    family, kinds = values["model_type"], values.get("layer_types")
    is_qwen = "max_window_layers" in FAMILY_DEFAULTS[family]
    switched_off = (
        is_qwen and values.get("use_sliding_window") is not None and not read_flag(values, "use_sliding_window")
    )
    no_window = family == "llama" or switched_off or values["sliding_window"] is None
    window = None if no_window else read_number(values, "sliding_window")
    mixed = window is not None and is_qwen
    num_full = read_number(values, "max_window_layers", low=0) if mixed else 0
    kind = "full_attention" if window is None else "sliding_attention"
    allowed = ("full_attention", "sliding_attention") if mixed else (kind,)
    if kinds is None:
        kinds = ["full_attention" if i < num_full else kind for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(k not in allowed for k in kinds):
        raise ValueError(
            f"config.json: layer_types {kinds!r} is not supported; with sliding_window {window} each of the "
            f"{num_layers} layers is {' or '.join(allowed)}"
        )
    full = () if window is None else tuple(i for i, k in enumerate(kinds) if k == "full_attention")
    return window, full


def parse_rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read rope theta and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    objects = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key) not in (None, {})}
    parsed = [parse_rope_object(values, key, rope) for key, rope in (objects or {"rope_parameters": {}}).items()]
    if parsed[0] != parsed[-1]:
        scaling, parameters = objects.values()
        raise ValueError(f"config.json: rope_scaling {scaling!r} and rope_parameters {parameters!r} differ")
    return parsed[0]


def parse_rope_object(values: dict[str, Any], key: str, rope: Any) -> tuple[float, RopeScaling | None]:
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: {key} is {rope!r}, expected an object")
    given = {name: value for name, value in rope.items() if value is not None}
    # A factor whose type is null is for no type that `transformers` knows either.
    default = None if "rope_type" in rope and "factor" in given else "default"
    rope_type = given.get("rope_type", given.get("type", default))
    if rope_type not in ("default", "linear", "llama3"):
        raise ValueError(f"config.json: rope type {rope_type!r} is not supported; supported: default, linear, llama3")
    for name, value in given.items():
        if name not in ROPE_KEYS or (name == "partial_rotary_factor" and value != 1):
            raise ValueError(f"config.json: {name} {value!r} in {key} is not supported")
    given = {"rope_theta": values["rope_theta"], **given}

    def number(name: str) -> float:  # within bounds that keep every frequency finite in fp32
        return read_number(given, name, float, low=0.001, high=2**40, where=f" in {key}")

    theta = number("rope_theta")
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", number("factor"))
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if low >= high:
        raise ValueError(f"config.json: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
    # Like `transformers`, prefer the one beside the object to the one in it.
    name = "original_max_position_embeddings"
    length = given.get(name) if values.get(name) is None else values[name]
    if isinstance(length, float) and length.is_integer():  # which is a number in there, and a size nowhere else
        length = int(length)
    original = read_number({name: length}, name)
    return theta, RopeScaling("llama3", number("factor"), low, high, original)


def parse_dtype(raw: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype that config.json names: `dtype`, or `torch_dtype` as older ones call it.

    None where it names none.
    """
    names = (raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None)
    name = next(names, None)
    dtype = getattr(torch, name, None) if isinstance(name, str) else None  # «half» is a name of float16
    if name is not None and dtype not in DTYPES.values():
        raise ValueError(f"config.json: dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return dtype


def eos_token_ids(checkpoint_path: str | Path) -> tuple[int, ...]:
    """Return every id that ends a text: generation_config.json's, else config.json's; () where neither has one."""
    folder = Path(checkpoint_path)
    raw, path = read_config(folder), own_file(folder, "generation_config.json")
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        path, ids = folder / "config.json", raw.get("eos_token_id")
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    num_ids = raw.get("vocab_size")
    num_ids = num_ids if isinstance(num_ids, int) else 2**31
    if not all(type(i) is int and 0 <= i < num_ids for i in ids):  # a bool is an int, but not of that type
        raise ValueError(f"{path.name}: eos_token_id is {ids!r}, expected ids from 0 to {num_ids - 1}")
    return tuple(ids)


def parse_scheme(value: Any) -> Scheme | None:
    """Read `quantization` of config.json. Raises ValueError where it is not one that quantize.py writes."""
    if value is None:
        return None
    try:
        scheme = Scheme(value["mode"], value.get("groupsize"))
        known = scheme.mode in MODES and scheme.group_size in ([None] if scheme.mode == "int8" else GROUP_SIZES)
    except (TypeError, KeyError, AttributeError):
        known = False
    if not known or type(scheme.group_size) not in (int, type(None)):
        raise ValueError(
            f"config.json: quantization {value!r} is not supported; expected mode {', '.join(MODES)} and for int4 a "
            f"groupsize of {', '.join(map(str, GROUP_SIZES))}"
        )
    return scheme


def quantization_scheme(raw_config: dict[str, Any]) -> Scheme | None:
    scheme = parse_scheme(raw_config.get("quantization"))
    if scheme is not None and raw_config.get("layout") != "fused":
        raise ValueError(f"config.json: quantization with layout {raw_config.get('layout')!r}, expected 'fused'")
    return scheme
