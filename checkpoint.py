"""A checkpoint folder on disk -> a model on a device.

Two layouts are read, told apart by `layout` in config.json:
- the Hub's: config.json and model.safetensors, or model.safetensors.index.json with its shards;
- ours (`"layout": "fused"`): the same config.json and one model.safetensors that holds the model's own parameters,
  q, k, v and gate, up each stacked into one matrix, so that loading maps the file and copies nothing.

    model = load_model("checkpoints/demo", device="cpu", dtype=torch.float32)
"""

import contextlib
import ctypes
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from cli import naming, own_file, read_json
from kernels import empty_weight
from model import ONE_RANK, ModelConfig, Ranks, RopeScaling, Transformer, rope_frequencies
from quantize import Scheme, parse_scheme, quantize_linears_, repack_
from tp import check_sizes, from_rank_0, local_part, together

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}

# A weight of one of these is cast to the run dtype; codes of a quantized weight are never cast.
FLOAT_DTYPES = {*DTYPES.values(), torch.float64}
Spec = tuple[torch.dtype, torch.Size]  # of a tensor
# Far above any real model: larger values are mistakes that would exhaust memory or overflow a tensor's size.
MAX_COUNT, MAX_SIZE = 2**12, 2**24

# Files beside the weights that influence the text too.
TEXT_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.json", "merges.txt",
)  # fmt: skip
# Files beside the weights that are copied with them into another form.
COMPANIONS = (*TEXT_FILES, "README*", "LICENSE*", "USE_POLICY*")

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
# Keys of config.json that would change the arithmetic, and the values with which they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "use_qk_norm": (False, None),
    "use_mrope": (False, None),
    "num_experts": (None,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "norm_topk_prob": (True, None),
    "moe_intermediate_size": (None,),
    "shared_expert_intermediate_size": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor",
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def read_config(checkpoint_path: Path) -> dict[str, Any]:
    """Read config.json as it stands. Raises FileNotFoundError where there is none."""
    path = own_file(checkpoint_path, "config.json")
    if not checkpoint_path.is_dir():
        raise FileNotFoundError(f"{checkpoint_path} is not a folder; expected a checkpoint folder with a config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint_path} has no config.json; download the model's whole folder")
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
    for key, neutral in NEUTRAL_VALUES.items():
        if key in values and values[key] not in neutral:
            raise ValueError(f"config.json: {key} {values[key]!r} is not supported")
    for key, families in FLAGS.items():
        if family not in families and values[key] is not False:
            raise ValueError(f"config.json: {key} {values[key]!r} is not supported for model_type {family!r}")
    heads = read_number(values, "num_attention_heads", high=MAX_COUNT)
    hidden_size = read_number(values, "hidden_size", high=MAX_SIZE)
    for key, default in (("num_key_value_heads", heads), ("head_dim", hidden_size // heads)):
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


def read_flag(values: dict[str, Any], key: str) -> bool:
    if not isinstance(values[key], bool):
        raise ValueError(f"config.json: {key} is {values[key]!r}, expected true or false")
    return values[key]


def parse_experts(values: dict[str, Any]) -> tuple[int, int]:
    """Return how many experts there are and how many of them a token takes; 0 and 0 in the families without."""
    if values["model_type"] != "mixtral":
        if values.get("num_local_experts") is not None:
            raise ValueError(f"config.json: num_local_experts {values['num_local_experts']!r} is not supported")
        return 0, 0
    num_experts = read_number(values, "num_local_experts", high=MAX_COUNT)
    return num_experts, read_number(values, "num_experts_per_tok", high=num_experts)


def parse_sliding_window(values: dict[str, Any], num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the sliding window, None where there is none, and the layers with full attention in spite of it.

    As in `transformers`, a Llama has full attention, and so have the first `max_window_layers` of a Qwen, unless
    `layer_types` says otherwise; only a Qwen heeds `use_sliding_window`.
    """
    window = None if values["sliding_window"] is None else read_number(values, "sliding_window")
    family, kinds = values["model_type"], values.get("layer_types")
    is_qwen = "max_window_layers" in FAMILY_DEFAULTS[family]
    switched_off = (
        is_qwen and values.get("use_sliding_window") is not None and not read_flag(values, "use_sliding_window")
    )
    if family == "llama" or switched_off:
        window = None
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
    given = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key) is not None}
    key, rope = next(iter(given.items()), ("rope_parameters", {}))
    if any(other != rope for other in given.values()):
        raise ValueError(f"config.json: rope_scaling {rope!r} and rope_parameters {given['rope_parameters']!r} differ")
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: {key} is {rope!r}, expected an object")
    rope = {"rope_theta": values["rope_theta"], **rope}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear", "llama3"):
        raise ValueError(f"config.json: rope type {rope_type!r} is not supported; supported: default, linear, llama3")
    for name in rope:
        if name not in ROPE_KEYS or (name == "partial_rotary_factor" and rope[name] not in (1, None)):
            raise ValueError(f"config.json: {name} {rope[name]!r} in {key} is not supported")

    def number(name: str) -> float:  # within bounds that keep every frequency finite in fp32
        return read_number(rope, name, float, low=0.001, high=2**40, where=f" in {key}")

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
    original = read_number(rope if values.get(name) is None else values, name)
    return theta, RopeScaling("llama3", number("factor"), low, high, original)


def parse_dtype(raw: dict[str, Any]) -> torch.dtype:
    """Return the dtype the weights were saved in: `dtype`, or `torch_dtype` as older configs call it."""
    given = (raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None)
    name = next(given, "bfloat16")
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"config.json: dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


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


# ---------------------------------------------------------------------------------------------------------------------
# Tensors by name


# A parameter of the model that is several of the Hub's tensors stacked along the output features.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# A stack of experts: such tensors of one expert after the other, by Mixtral's names.
EXPERTS_STACKED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def is_stack(name: str, config: ModelConfig) -> bool:
    return config.num_local_experts > 0 and name.split(".")[-2] in EXPERTS_STACKED


def unstacked(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return a stack of experts as one matrix, expert below expert; any other tensor as it is."""
    return tensor.flatten(0, 1) if is_stack(name, config) else tensor


def hub_names(name: str, config: ModelConfig) -> list[str]:
    """Name the Hub's tensors that make up the model's parameter `name`, in order."""
    if name.startswith("lm_head."):
        return [name]
    if config.num_local_experts:
        name = name.replace(".mlp.", ".block_sparse_moe.")
    if is_stack(name, config):
        *path, module, kind = name.split(".")
        prefix = ".".join(["model", *path, "experts"])
        numbers = range(config.num_local_experts)
        return [f"{prefix}.{i}.{part}.{kind}" for i in numbers for part in EXPERTS_STACKED[module]]
    for stacked, parts in STACKED.items():
        if f".{stacked}." in name:
            return ["model." + name.replace(stacked, part) for part in parts]
    return ["model." + name]


def part_rows(name: str, config: ModelConfig, total: int) -> list[int]:
    """Return how many rows of parameter `name` each of its Hub tensors has."""
    if "qkv_proj" in name:
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return [q, kv, kv]
    if "gate_up_proj" in name:
        return [config.intermediate_size] * 2 * max(1, config.num_local_experts)
    return [config.hidden_size] * config.num_local_experts if is_stack(name, config) else [total]


class TensorFiles:
    """The tensors of a checkpoint folder by name, read one at a time.

    Each read opens its file anew, so that nothing but the tensors handed out stays mapped.
    """

    def __init__(self, checkpoint_path: Path, allow_pickle: bool = False):
        self.path = checkpoint_path
        self.allow_pickle = allow_pickle
        # A file in the format before torch 1.6 cannot be mapped but is read whole, so the last one is kept.
        self._read_legacy = functools.lru_cache(maxsize=1)(read_pickle)
        self.files: dict[str, str] = self._index()

    def _index(self) -> dict[str, str]:
        patterns = ["model.safetensors"] + ["pytorch_model.bin"] * self.allow_pickle
        for single in patterns:
            index = own_file(self.path, f"{single}.index.json")
            if own_file(self.path, single).is_file():
                return dict.fromkeys(self._names_in(single), single)
            if index.is_file():
                return self._sharded(index, Path(single).suffix)
        if any(self.path.glob("*.bin")):
            raise FileNotFoundError(
                f"{self.path} has .bin weights only; convert them: python scripts/convert_hf_checkpoint.py "
                f"--checkpoint_dir {self.path}"
            )
        raise FileNotFoundError(f"{self.path} has no model.safetensors and no model.safetensors.index.json")

    def _sharded(self, index: Path, suffix: str) -> dict[str, str]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{index} has no weight_map")
        for file in sorted(set(map(str, files.values()))):
            if Path(file).name != file or Path(file).suffix != suffix or "\0" in file:
                raise ValueError(f"{index} names {file!r}, expected a {suffix} file of its own folder")
            if not own_file(self.path, file).is_file():
                raise FileNotFoundError(f"{self.path / file} is missing, but {index.name} names it; download it again")
            present = set(self._names_in(file))
            for name in (name for name, where in files.items() if where == file):
                if name not in present:
                    raise ValueError(f"{self.path / file} lacks tensor {name}, which {index.name} promises")
        return files

    def _names_in(self, file: str) -> list[str]:
        with self._open(file) as tensors:
            return list(tensors.keys())

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = own_file(self.path, file)
        if file.endswith(".bin"):
            yield read_pickle(path) if is_zip(path) else self._read_legacy(path)
            return
        try:
            with safe_open(path, framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            size = path.stat().st_size
            raise ValueError(
                f"{path} ({size} bytes) is not a whole safetensors file ({error}); download it again"
            ) from None

    def get(self, name: str) -> Tensor:
        file = self.files[name]
        with self._open(file) as tensors:
            return tensors[name] if file.endswith(".bin") else tensors.get_tensor(name)


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a .bin state dict without running code from it; mapped, unless it is in the format before torch 1.6."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        reason = "it asks to run code" if "GLOBAL" in str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights ({reason}); download it again") from None
    entries = tensors.items() if isinstance(tensors, dict) else [(None, tensors)]
    if not all(isinstance(name, str) and isinstance(t, Tensor) and not t.is_meta for name, t in entries):
        raise ValueError(f"{path} holds more than tensors by name, which is all that weights are")
    return tensors


def hub_parts(files: TensorFiles, config: ModelConfig, name: str, spec: Spec) -> Iterator[Tensor]:
    """Map the Hub tensors that the model's parameter `name` is made of."""
    dtype, shape = spec
    columns = shape[2:] if is_stack(name, config) else shape[1:]
    for part, rows in zip(hub_names(name, config), part_rows(name, config, shape[0]), strict=True):
        yield checked_tensor(files, part, (dtype, torch.Size([rows, *columns])))


def checked_tensor(files: TensorFiles, name: str, spec: Spec) -> Tensor:
    """Map a tensor, whose shape must be that of `spec`; its dtype too, unless both are floats."""
    tensor = files.get(name)
    dtype, shape = spec
    if (tensor.dtype != dtype and not {tensor.dtype, dtype} <= FLOAT_DTYPES) or tensor.layout != torch.strided:
        expected = "floats" if dtype in FLOAT_DTYPES else str(dtype)
        raise ValueError(
            f"{files.path}: tensor {name} is {tensor.dtype}, expected {expected}; "
            "of quantized weights only those that quantize.py wrote are supported"
        )
    if tensor.shape != shape:
        raise ValueError(
            f"{files.path}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
        )
    return tensor


def check_depth(files: TensorFiles, config: ModelConfig) -> None:
    """Raise ValueError where the weights have fewer layers than config.json says, before that many are made."""
    found = {match[1] for name in files.files if (match := re.match(r"(?:model\.)?layers\.(\d+)\.", name))}
    if len(found) < config.num_hidden_layers:
        raise ValueError(
            f"{files.path}: config.json has num_hidden_layers {config.num_hidden_layers} and the weights have tensors "
            f"of {len(found)} layers; is config.json the model's own?"
        )


def check_names(files: TensorFiles, expected: Collection[str], tied: Collection[str] = ()) -> None:
    """Raise ValueError where a tensor is missing, or is not the model's. A tied head may be there or not."""
    missing = sorted(set(expected) - set(files.files))
    # Old releases of transformers stored the rotary frequencies.
    unexpected = sorted(n for n in set(files.files) - {*expected, *tied} if not n.endswith(".rotary_emb.inv_freq"))
    for what, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{files.path} {what} tensor {names[0]}{more}; is config.json the model's own?")


def quantization_scheme(raw_config: dict[str, Any]) -> Scheme | None:
    scheme = parse_scheme(raw_config.get("quantization"))
    if scheme is not None and raw_config.get("layout") != "fused":
        raise ValueError(f"config.json: quantization with layout {raw_config.get('layout')!r}, expected 'fused'")
    return scheme


def meta_model(raw_config: dict[str, Any], ranks: Ranks = ONE_RANK) -> Transformer:
    """Make the model that config.json describes, or this rank's share, on the meta device: shapes without memory.

    Raises ValueError where its sizes cannot be divided among the ranks.
    """
    scheme = quantization_scheme(raw_config)
    config = parse_config(raw_config)
    check_sizes(config, scheme, ranks.count)
    with torch.device("meta"):
        model = Transformer(config, ranks)
        if scheme is not None:
            quantize_linears_(model, scheme)
    return model


def tensor_specs(model: Transformer, dtype: torch.dtype) -> dict[str, Spec]:
    """Return what each parameter of a meta model is stored as: fp32 ones in `dtype`, codes and scales in their own."""
    return {name: (dtype if p.dtype == torch.float32 else p.dtype, p.shape) for name, p in model.named_parameters()}


def model_tensors(
    checkpoint_path: Path, dtype: torch.dtype, allow_pickle: bool = False, ranks: Ranks = ONE_RANK
) -> tuple[dict[str, Spec], Callable[[str], Tensor]]:
    """Return the specs of the model's parameters, and the function that reads this rank's share of one.

    Both layouts are read.
    """
    raw = read_config(checkpoint_path)
    files = TensorFiles(checkpoint_path, allow_pickle)
    check_depth(files, parse_config(raw))
    model = meta_model(raw)
    specs = tensor_specs(model, dtype)
    if raw.get("layout") == "fused":
        check_names(files, specs)
    else:
        tied = ["lm_head.weight"] if model.tied else []
        check_names(files, [part for name in specs for part in hub_names(name, model.config)], tied)

    def read(name: str) -> Tensor:
        stored: Iterable[Tensor] = hub_parts(files, model.config, name, specs[name])
        if raw.get("layout") == "fused":
            whole = checked_tensor(files, name, specs[name])
            if ranks.count == 1:
                return whole.to(specs[name][0])
            stored = unstacked(name, whole, model.config).split(part_rows(name, model.config, whole.shape[0]))
        parts = [local_part(name, i, part, model.config, ranks).to(specs[name][0]) for i, part in enumerate(stored)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not is_finite(value):
            large = " or too large for it; give --dtype bfloat16" if value.dtype == torch.float16 else ""
            raise ValueError(
                f"{checkpoint_path}: {name} has values that are not finite in {value.dtype}; the checkpoint is damaged"
                + large
            )
        return value.unflatten(0, (model.config.num_local_experts, -1)) if is_stack(name, model.config) else value

    return specs, read


def is_finite(tensor: Tensor) -> bool:
    """Say whether no value is NaN or infinite; codes never are. Unlike isfinite(), one pass at memory speed."""
    return not tensor.is_floating_point() or all(math.isfinite(bound) for bound in tensor.aminmax())


def load_model(
    checkpoint_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    ranks: Ranks = ONE_RANK,
) -> Transformer:
    """Load a checkpoint folder, or this rank's share of it; dtype None keeps the one that config.json names.

    Raises FileNotFoundError or ValueError, each naming the file, key or tensor.
    """
    path = Path(checkpoint_path)
    raw = read_config(path)
    dtype = parse_dtype(raw) if dtype is None else dtype
    specs, read = model_tensors(path, dtype, ranks=ranks)
    model = meta_model(raw, ranks)
    hidden = True if ranks.rank else None  # None: shown on a terminal
    bar = tqdm(specs, desc="load", unit="tensor", delay=2, leave=False, dynamic_ncols=True, disable=hidden)
    return assign_parameters(model, {name: read(name).to(device) for name in bar}, device)


def assign_parameters(model: Transformer, state: dict[str, Tensor], device: str | torch.device) -> Transformer:
    """Give a model made on the meta device its parameters, the tied head and the buffers."""
    tied = model.tied
    model.load_state_dict({**state, "lm_head.weight": state["embed_tokens.weight"]} if tied else state, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    state.clear()  # so that a weight is freed as soon as it is repacked
    model.inv_freq = rope_frequencies(model.config).to(device)
    repack_(model)
    return model.eval().requires_grad_(False)


def random_model(
    raw_config: dict[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    ranks: Ranks = ONE_RANK,
) -> Transformer:
    """Make the model that config.json describes, quantized or not, with random weights: for speed work.

    Each of several ranks draws its own share: together these are another model than one rank alone would draw.
    """
    model = meta_model(raw_config, ranks)
    generator = torch.Generator(device).manual_seed(seed + ranks.rank)
    state = {}
    for name, (kind, shape) in tensor_specs(model, dtype).items():
        value = empty_weight(shape, kind, device)
        if kind in (torch.int8, torch.uint8):
            info = torch.iinfo(kind)
            value.random_(info.min, 16 if name.endswith(".zeros") else info.max + 1, generator=generator)
        elif name.endswith("norm.weight"):
            value.fill_(1)
        elif name.endswith(".scales"):
            value.fill_(0.001)
        else:
            value.normal_(0, 0.02, generator=generator)
        state[name] = value
    return assign_parameters(model, state, device)


# ---------------------------------------------------------------------------------------------------------------------
# Copies on several nodes


# Of a file of weights, this many places of this many bytes are compared: training changes nearly all of them.
NUM_PLACES, PLACE_SIZE = 64, 4096


def digest(path: Path) -> str:
    """Return the SHA-256 of a file; for weights, of its size and of places spread over it."""
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        found = hashlib.sha256(str(size).encode())
        for i in range(NUM_PLACES):
            file.seek(max(0, size - PLACE_SIZE) * i // (NUM_PLACES - 1))
            found.update(file.read(PLACE_SIZE))
    return found.hexdigest()


def check_copies(checkpoint_paths: Collection[Path], ranks: Ranks) -> None:
    """Raise ValueError where a rank's copy of a checkpoint is not rank 0's.

    The ranks might disagree about where a text ends and wait for each other, or compute with mixed weights.
    """
    if ranks.count == 1:
        return

    def digests() -> dict[Path, str]:
        patterns = ("config.json", *TEXT_FILES, "model*.safetensors")
        found = {file for path in checkpoint_paths for pattern in patterns for file in path.glob(pattern)}
        return {file: digest(file) for file in found if file.is_file()}

    expected = from_rank_0(digests, ranks)

    def compare() -> None:
        own = digests()
        differ = sorted(file for file in {*expected, *own} if expected.get(file) != own.get(file))
        if differ:
            raise ValueError(f"{differ[0]} is not the one that rank 0 has; copy the checkpoint's folder from its node")

    together(compare, ranks)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_safetensors(path: Path, specs: dict[str, Spec], read: Callable[[str], Tensor]) -> None:
    """Write the tensors that `read` returns, one in memory at a time. Format: the safetensors README."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # data starts on a cache line
    check_free_space(path, 8 + len(encoded) + end)
    with naming(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (dtype, shape) in specs.items():
            write_tensor(file, read(name), dtype, shape)


def check_free_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"{path} needs {needed / 1e9:.3f} GB, but {free / 1e9:.3f} GB are free; make room on the disk")


def write_tensor(file: BinaryIO, tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    assert tensor.dtype == dtype and tensor.shape == shape, (tensor.dtype, dtype, tensor.shape, shape)
    tensor = tensor.detach().to("cpu").contiguous()
    file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that is renamed to it if all goes well, and is removed if not.

    A run that is killed leaves its temporary folder, which the next one to the same path removes. Raises ValueError
    where `path` holds something already.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ValueError(f"{path} exists already; remove it or name another output")
    absent = [folder for folder in path.parents if not folder.exists()]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as ours:
            with locked(path.parent, wait=True):  # else another run could take ours for abandoned before it is locked
                for abandoned in path.parent.glob(f".{glob.escape(path.name)}.{8 * '[0-9a-f]'}.tmp"):
                    with contextlib.suppress(OSError), locked(abandoned):
                        shutil.rmtree(abandoned)
                temporary.mkdir()
                ours.enter_context(locked(temporary))
            with naming(path):
                yield temporary
                for file in (*temporary.iterdir(), temporary):
                    sync(file)
                temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in absent:
            with contextlib.suppress(OSError):  # it is not empty: all went well
                folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder; it ends with the process, however that ends.

    Where another process holds it, wait for it or raise BlockingIOError.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk: a loss of power cannot leave half of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sibling(path: Path, suffix: str) -> Path:
    """Return the folder beside `path` whose name has `suffix` too; in ./checkpoints for one of the Hub's cache."""
    if path.name in ("", ".."):  # "." and ".." do not say what the folder is called
        path = path.resolve()
    cached = path.parent.parent.name  # as models--organization--name/snapshots/commit
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        path = Path("checkpoints", *cached.split("--")[1:])
    return path.with_name(path.name + suffix)


def write_fused_config(source: Path, raw_config: dict[str, Any], dtype: torch.dtype, path: Path) -> None:
    """Write config.json of the fused layout into the folder `path`, and copy the files beside the weights."""
    raw_config = {key: value for key, value in raw_config.items() if key != "torch_dtype"}
    raw_config |= {"dtype": str(dtype).removeprefix("torch."), "layout": "fused"}
    (path / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
    for pattern in COMPANIONS:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(own_file(source, file.name), path / file.name)


def save_hub_checkpoint(model: Transformer, raw_config: dict[str, Any], path: Path, dtype: torch.dtype) -> None:
    """Write model.safetensors and config.json in the Hub's layout into the folder `path`."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.named_parameters():  # a tied head is named once
        parts = unstacked(name, value.detach(), model.config).split(part_rows(name, model.config, value.shape[0]))
        tensors |= zip(hub_names(name, model.config), parts, strict=True)
    specs = {name: (dtype, value.shape) for name, value in tensors.items()}
    write_safetensors(path / "model.safetensors", specs, lambda name: tensors[name].to(dtype))
    raw_config = {**raw_config, "dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
