"""A folder with an EAGLE-3 head -> a `Head` for a target.

Three forms are read, told apart by config.json: that of the speculators package, which nests the layers' config; and
EAGLE's own, which is also SpecForge's, and NVIDIA's with an `eagle_config`.

    model = load_model("checkpoints/demo")
    head = load_head("checkpoints/demo-eagle3", model)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import check_depth, check_names, checked_tensor, is_finite, write_config
from config import MAX_SIZE, parse_config, read_config
from eagle import Head, HeadConfig
from files import TensorFiles, read_flag, read_number, write_safetensors
from kernels.optimize import optimize_
from model import ModelConfig, Transformer
from names import hub_parts, hub_shapes
from random_weights import random_parameter

# The families that the layers of a head are of.
FAMILIES = ("llama", "qwen3")
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# Keys that would change the arithmetic, and the values with which they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True, None),
    "use_input_layernorm_in_first_layer": (True, None),
    "use_last_layernorm": (True, None),
    "use_mtp_layernorm": (False, None),
    "next_layer_regular": (True, None),
    "parallel_draft_step": (1, None),
    "quantization_config": (None,),
}
# By which a head is told from a model.
HEAD_KEYS = ("architectures", "speculators_model_type", "draft_vocab_size")
# Tensors that a draft does not depend on: a mask that says again what d2t does, and the target's own.
UNUSED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight")

# ---------------------------------------------------------------------------------------------------------------------
# The config


def parse_head_config(raw: dict[str, Any], target: ModelConfig) -> HeadConfig:
    """Read a head's config.json. Raises ValueError where it is malformed, or of a head for another target."""
    kind, nested = raw.get("speculators_model_type"), raw.get("transformer_layer_config")
    if kind not in ("eagle3", None):
        raise ValueError(f"config.json: speculators_model_type {kind!r} is not supported; supported: 'eagle3'")
    if kind and not isinstance(nested, dict):
        raise ValueError(f"config.json: transformer_layer_config is {nested!r}, expected an object")
    inner = {} if raw.get("eagle_config") is None else raw["eagle_config"]
    if not isinstance(inner, dict):
        raise ValueError(f"config.json: eagle_config is {inner!r}, expected an object")
    # Where the residual branches off is left out by EAGLE, which has it before the norm; of the speculators package's
    # form vLLM assumes the opposite.
    values: dict[str, Any] = {**dict.fromkeys(FLAGS, False), "norm_before_residual": bool(kind)}
    values |= {key: value for key, value in {**raw, **inner}.items() if value is not None}
    check_flags(values)
    layers = {"model_type": "qwen3", **nested} if kind and nested else dict(raw)
    if layers.get("model_type") not in FAMILIES:
        raise ValueError(f"config.json: model_type {layers.get('model_type')!r} of a head; supported: llama, qwen3")
    layers = {key: value for key, value in layers.items() if key not in HEAD_KEYS} | {"tie_word_embeddings": False}
    types, windows = layers.get("layer_types"), dict[str, Any]()
    if kind and layers["model_type"] == "llama" and isinstance(types, list) and "sliding_attention" in types:
        # Layers of a llama slide in that package, all of them by default; in transformers none does.
        full = tuple(i for i, name in enumerate(types) if name == "full_attention")
        windows = {"sliding_window": read_number(layers, "sliding_window"), "full_attention_layers": full}
        layers |= {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * len(types)}
    config = replace(parse_config(layers), **windows)
    values = {"draft_vocab_size": config.vocab_size, "target_hidden_size": config.hidden_size, **values}
    head = HeadConfig(
        config,
        read_number(values, "draft_vocab_size", high=config.vocab_size),
        read_number(values, "target_hidden_size", high=MAX_SIZE),
        parse_tap_layers(raw, inner, target.num_hidden_layers),
        **{key: read_flag(values, key) for key in FLAGS},
    )
    for what, its, ours in (
        ("hidden_size", head.target_hidden_size, target.hidden_size),
        ("vocab_size", config.vocab_size, target.vocab_size),
    ):
        if its != ours:
            raise ValueError(f"it is the head of another model, with {what} {its}, and this one's is {ours}")
    return head


def check_flags(values: dict[str, Any]) -> None:
    for key, value in values.items():
        is_unknown = "norm" in key and key not in (*FLAGS, "rms_norm_eps") and value is not False
        if value not in NEUTRAL_VALUES.get(key, () if is_unknown else (value,)):
            raise ValueError(f"config.json: {key} {value!r} of a head is not supported")
    if values["norm_before_fc"] and values["fc_norm"]:
        raise ValueError("config.json: norm_before_fc and fc_norm are both true, and one excludes the other")


def parse_tap_layers(raw: dict[str, Any], inner: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the layers of the target whose inputs a head reads.

    An eagle_config counts as SpecForge and SGLang do, by the layers whose outputs these are.
    """
    key = "eagle_aux_hidden_state_layer_ids"
    ids, shift = (raw[key], 0) if raw.get(key) is not None else (inner.get(key), 1)
    if ids in (None, []):
        ids, shift = [2, num_layers // 2, num_layers - 3], 0
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i + shift < num_layers for i in ids):
        raise ValueError(f"config.json: a head that taps layers {ids!r}, and the model has {num_layers} layers")
    return tuple(i + shift for i in ids)


# ---------------------------------------------------------------------------------------------------------------------
# The weights


def stored_shapes(name: str, shape: torch.Size, config: ModelConfig) -> dict[str, torch.Size]:
    """Return the tensors that a head's parameter is made of, and their shapes."""
    return {part.removeprefix("model."): own for part, own in hub_shapes(name, shape, config).items()}


class HeadReader:
    """The tensors of a head's folder, one at a time."""

    def __init__(self, path: Path, target: ModelConfig):
        """Raises FileNotFoundError or ValueError where they are not those that config.json asks for."""
        self.path, self.files = path, TensorFiles(path)
        raw = read_config(path)
        if any("midlayer." in name for name in self.files.files):  # EAGLE's own form has no more, whatever it says
            raw["num_hidden_layers"] = 1
            raw["layer_types"] = raw["layer_types"][:1] if isinstance(raw.get("layer_types"), list) else None
        self.config = parse_head_config(raw, target)
        for name in list(self.files.files):
            plain = name.removeprefix("model.")
            if (used := plain.replace("midlayer.", "layers.0.")) != name:
                if used in self.files.files:
                    raise ValueError(f"{path} has {name} and {used}, which are one tensor of a head; remove one")
                self.files.alias(used, name)
        check_depth(self.files, self.config.layers)
        with torch.device("meta"):
            head = Head(self.config)
        self.specs = {name: value.shape for name, value in head.named_parameters()}
        self.has_embedding = "embed_tokens.weight" in self.files.files
        if not self.has_embedding:
            del self.specs["embed_tokens.weight"]
        names = [part for name, shape in self.specs.items() for part in stored_shapes(name, shape, self.config.layers)]
        check_names(self.files, names, [*UNUSED, "d2t"])
        self._check_taps()

    def _check_taps(self) -> None:
        spec, size, count = self.files.spec("fc.weight"), self.config.target_hidden_size, len(self.config.tap_layers)
        if spec and len(spec[1]) == 2 and spec[1][1] != count * size:
            raise ValueError(
                f"{self.path}: fc.weight reads {spec[1][1]} numbers, and {count} taps of the model are {count * size}"
            )
        if not self.has_embedding and self.config.layers.hidden_size != size:
            raise ValueError(
                f"{self.path} has no embedding, and the model's has {size} numbers a token where the head has "
                f"{self.config.layers.hidden_size}"
            )

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        shapes = stored_shapes(name, self.specs[name], self.config.layers)
        parts = [checked_tensor(self.files, part, (dtype, shape)) for part, shape in shapes.items()]
        value = torch.cat([part.to(dtype) for part in parts])
        if not is_finite(value):
            raise ValueError(f"{self.path}: {name} has values that are not finite in {dtype}; the head is damaged")
        return value

    def ids(self) -> Tensor:
        """Return which ids of the target the head's logits are of. Raises ValueError where d2t does not say it."""
        count, vocab_size = self.config.draft_vocab_size, self.config.layers.vocab_size
        if "d2t" not in self.files.files:
            if count != vocab_size:
                raise ValueError(f"{self.path} has {count} ids of the model's {vocab_size}, and no d2t says which")
            return torch.arange(vocab_size)
        offsets = self.files.get("d2t")
        if offsets.dtype not in (torch.int64, torch.int32) or list(offsets.shape) != [count]:
            raise ValueError(f"{self.path}: d2t is {offsets.dtype}, shape {[*offsets.shape]}, not {count} integers")
        ids = torch.arange(count) + offsets
        if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) < count:
            raise ValueError(
                f"{self.path}: d2t maps to ids from {ids.min()} to {ids.max()}, {len(ids.unique())} of them; expected "
                f"{count} from 0 to {vocab_size - 1}"
            )
        return ids


def load_head(path: str | Path, target: Transformer, optimize: bool = True) -> Head:
    """Load a head's folder, in its target's dtype; the target gets taps with its next caches.

    optimize: as in `load_model`. Raises FileNotFoundError or ValueError, each naming the file, key or tensor.
    """
    reader, like = HeadReader(Path(path), target.config), target.embed_tokens.weight
    parameters = {name: reader.read(name, like.dtype).to(like.device) for name in reader.specs}
    return make_head_(reader.config, parameters, reader.ids(), target, optimize)


def random_head(raw: dict[str, Any], target: Transformer, optimize: bool = True) -> Head:
    """Make the head that config.json describes with random weights and the target's embedding: for speed work."""
    config, like = parse_head_config(raw, target.config), target.embed_tokens.weight
    generator = torch.Generator(like.device).manual_seed(1)
    with torch.device("meta"):
        specs = {name: (like.dtype, value.shape) for name, value in Head(config).named_parameters()}
    if config.target_hidden_size == config.layers.hidden_size:
        del specs["embed_tokens.weight"]
    parameters = {name: random_parameter(name, spec, generator, like.device) for name, spec in specs.items()}
    return make_head_(config, parameters, torch.arange(config.draft_vocab_size), target, optimize)


def make_head_(
    config: HeadConfig, parameters: dict[str, Tensor], ids: Tensor, target: Transformer, optimize: bool
) -> Head:
    """Make a head of its parameters and the target's ids that it knows; let the target keep the taps that it reads."""
    with torch.device("meta"):
        head = Head(config)
    if "embed_tokens.weight" not in parameters:
        head.embed_tokens = target.embed_tokens
        parameters = {**parameters, "embed_tokens.weight": target.embed_tokens.weight}
    head.load_state_dict(parameters, assign=True)
    head.set_rope_(target.device)
    head.ids = ids.to(target.device)
    head.eval().requires_grad_(False)
    target.tap_layers = config.tap_layers
    if optimize:
        optimize_(head)
    return head


def save_head(head: Head, raw_config: dict[str, Any], ids: Tensor, path: Path, dtype: torch.dtype) -> None:
    """Write a head that knows these ids of its target, in rising order, into a folder: config.json as it is given."""
    config = head.config
    tensors: dict[str, Tensor] = {}
    for name, value in head.named_parameters():
        parts = hub_parts(name, value.detach().to(dtype), config)
        tensors |= {part.removeprefix("model."): held for part, held in parts.items()}
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, value=True)
    specs = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    write_safetensors(path / "model.safetensors", specs, tensors.__getitem__)
    write_config(raw_config, dtype, path)
