"""Folders on disk: what is read, how exactly, and what is refused with which words."""

import contextlib
import json
import math
import shutil
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import files as files_module
import quantize
from checkpoint import load_model, save_hub_checkpoint
from config import (
    DTYPES,
    MAX_COUNT,
    MAX_SIZE,
    NEUTRAL_VALUES,
    eos_token_ids,
    parse_config,
    parse_dtype,
    read_config,
    text_config,
)
from files import TensorFiles, locked, new_folder, write_safetensors
from model import ModelConfig, Transformer, rope_frequencies
from names import hub_shapes
from random_weights import random_model
from scripts.convert_hf_checkpoint import convert
from steps import Noise
from tests.conftest import LENGTH, MINISTRAL, NEWER, REPO, HubCheckpoint, randomize_, small_disk

GetCheckpoint = Callable[[str], HubCheckpoint]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, **SIZES}
MISTRAL: dict[str, Any] = {**LLAMA, "model_type": "mistral"}
MIXTRAL: dict[str, Any] = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2: dict[str, Any] = {**LLAMA, "model_type": "qwen2"}
QWEN3: dict[str, Any] = {**LLAMA, "model_type": "qwen3"}
SMALL_IDS = {"pad_token_id": 0}  # within the vocabulary
NEW_FAMILIES: list[dict[str, Any]] = [
    {**LLAMA, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    {**LLAMA, "model_type": "smollm3", **SMALL_IDS},
    {**LLAMA, "model_type": "granite"},
    {**LLAMA, "model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention"] * 2},
    {**LLAMA, "model_type": "phi3", **SMALL_IDS},
    {**LLAMA, "model_type": "seed_oss"},
    {**LLAMA, "model_type": "olmo2"},
    {**LLAMA, "model_type": "olmo3"},
    {**LLAMA, "model_type": "ministral3", **SMALL_IDS},
    {**LLAMA, "model_type": "gemma3_text"},
]
FAMILY = {raw["model_type"]: raw for raw in NEW_FAMILIES}
BY_KIND = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e3}}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
# The second frequency of four with theta 5e5 turns 1.53 times within the original length, between once and 4 times.
KEPT = (256 * 5e5**-0.25 / (2 * math.pi) - 1) / 3
BETWEEN = 5e5**-0.25 * (KEPT + (1 - KEPT) / 8)


def write_checkpoint(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


def write_shards(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], **changes: Any) -> Path:
    """Write two shards and their index, whose weight_map is updated with `changes`."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, path / file)
    weight_map = {name: file for file, members in shards.items() for name in members} | changes
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# config.json: what is read


@pytest.mark.parametrize(
    ("older", "newer", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}, 5e5, None),
        ({}, {}, 1e4, None),
        (
            {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_theta": 2e4, "rope_type": "linear", "factor": 4.0},
            2e4,
            ("linear", 4.0, [2e4 ** (-i / 4) / 4 for i in range(4)]),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
            {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3_ROPE},
            5e5,
            ("llama3", 8.0, [1, BETWEEN, 5e5**-0.5 / 8, 5e5**-0.75 / 8]),
        ),
    ],
)
def test_both_forms_of_config_mean_the_same(
    older: dict[str, Any], newer: dict[str, Any], theta: float, scaling: tuple[str, float, list[float]] | None
) -> None:
    old = {**LLAMA, **older, "torch_dtype": "float16"}
    new = {**LLAMA, "rope_parameters": newer, "dtype": "float16"}
    found = parse_config(old)
    expected = ModelConfig(**SIZES, head_dim=8, rms_norm_eps=1e-5, rope_theta=theta, rope_scaling=found.rope_scaling)
    assert found == parse_config(new) == expected
    if scaling is None:
        assert found.rope_scaling is None
    else:
        assert found.rope_scaling and (found.rope_scaling.rope_type, found.rope_scaling.factor) == scaling[:2]
        assert list(found.rope_scaling.frequencies) == [pytest.approx(scaling[2], rel=1e-6)] * 2
    assert parse_dtype(old) == parse_dtype(new) == torch.float16


def test_type_is_read_where_rope_type_is_not_there() -> None:
    scaling = {"type": "llama3", **LLAMA3_ROPE}
    named = parse_config({**LLAMA, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}}).rope_scaling
    assert named and parse_config({**LLAMA, "rope_scaling": scaling}).rope_scaling == named


SILENT = ["num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "sliding_window"]


@pytest.mark.parametrize("silent", SILENT)
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3"])
def test_a_key_left_out_means_what_transformers_assumes(family: str, silent: str) -> None:
    from transformers import AutoConfig

    heads = 32 if family.startswith("qwen") else 16  # of which the default kv heads are a part
    raw = {**LLAMA, "model_type": family, "num_attention_heads": heads, "hidden_size": 128, "sliding_window": 7}
    raw.pop(silent, None)
    ours, theirs = parse_config(raw), AutoConfig.for_model(**raw)
    expected = getattr(theirs, silent, None)
    if silent == "head_dim" and expected is None:  # modeling_*.py then divides
        expected = 128 // heads
    assert getattr(ours, silent) == expected
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("silent", [*SILENT, "tie_word_embeddings", "rope_theta"])
@pytest.mark.parametrize("raw", NEW_FAMILIES, ids=lambda raw: raw["model_type"])
def test_a_key_left_out_means_what_transformers_assumes_in_the_newer_families(raw: dict[str, Any], silent: str) -> None:
    from transformers import AutoConfig

    raw = {key: value for key, value in raw.items() if key != silent}
    ours, theirs = parse_config(raw), AutoConfig.for_model(**raw)
    if silent == "rope_theta":
        rope = theirs.rope_parameters
        assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    else:
        expected = getattr(theirs, silent, None)
        assert getattr(ours, silent) == (8 if silent == "head_dim" and expected is None else expected)


def test_three_experts_are_cut_alike_and_not_as_q_k_and_v() -> None:
    config = parse_config({**MIXTRAL, "num_local_experts": 3})
    shapes = hub_shapes("layers.0.mlp.down_proj.weight", torch.Size([3, 64, 96]), config)
    assert [*shapes.values()] == [torch.Size([64, 96])] * 3


def test_experts_left_out_are_those_of_8x7b() -> None:
    config = parse_config({**LLAMA, "model_type": "mixtral"})
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 16}, [None] * 4),
        ({"use_sliding_window": True}, [None] * 4),  # the first 28 layers see all the way
        ({"use_sliding_window": True, "max_window_layers": 0}, [4096] * 4),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, [None] * 3 + [16]),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 4),
        ({"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0}, [None] * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 3,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [16, None] * 2,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_a_qwen_slides_its_window_where_transformers_does(
    family: dict[str, Any], changes: dict[str, Any], windows: list[int | None]
) -> None:
    from transformers import AutoConfig

    raw = {**family, "num_hidden_layers": 4, **changes}
    config, theirs = parse_config(raw), AutoConfig.for_model(**raw)
    assert [config.window(layer) for layer in range(4)] == windows
    slides = [kind == "sliding_attention" for kind in theirs.layer_types]
    assert [theirs.sliding_window if each else None for each in slides] == windows


def test_only_a_qwen2_has_a_bias_on_q_k_and_v_alone_and_only_a_qwen3_norms_q_and_k() -> None:
    configs = {raw["model_type"]: parse_config(raw) for raw in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3)}
    assert [name for name, config in configs.items() if config.qkv_bias] == ["qwen2"]
    assert [name for name, config in configs.items() if config.qk_norm] == ["qwen3"]
    assert parse_config({**QWEN3, "attention_bias": True}).attention_bias


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPO / "configs").glob("*.json")))
def test_every_config_of_the_repository_has_the_size_in_its_name(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(parse_config(json.loads((REPO / "configs" / f"{name}.json").read_text())))
    billions = {"8x7b": 46.7, "qwen3-8b": 8.2, "llama-3.1-70b": 70.6, "405b": 405.9, "tinyllama-1.1b": 1.1}
    billions |= {"llama-2-7b": 6.74, "llama-3.1-8b": 8.03, "llama-3.2-1b": 1.24, "llama-2-70b": 68.98}
    billions |= {"smollm2-135m": 0.135, "a3b-4-layers": 3.12}
    [expected] = [size for part, size in billions.items() if name.endswith(part)]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(expected, abs=0.05)


def test_a_llama_sees_all_the_way_whatever_its_sliding_window_says() -> None:
    assert parse_config({**LLAMA, "sliding_window": 4}).sliding_window is None


@pytest.mark.parametrize(
    ("beside", "inside", "expected"), [(None, 256, 256), (128, 256, 128), (128, None, 128), (None, None, 2048)]
)
def test_original_length_beside_rope_scaling_goes_before_the_one_in_it_and_before_the_context(
    beside: int | None, inside: int | None, expected: int
) -> None:
    rope = {"rope_type": "llama3", **LLAMA3_ROPE, "original_max_position_embeddings": inside}
    raw = {**LLAMA, "rope_scaling": rope, "original_max_position_embeddings": beside, "max_position_embeddings": 2048}
    scaling = parse_config(raw).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == expected


def test_null_heads_mean_their_defaults() -> None:
    config = parse_config({**LLAMA, "num_key_value_heads": None, "head_dim": None})
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 16}, 16),
        ({"sliding_window": 16, "layer_types": ["sliding_attention"] * 2}, 16),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 16, "use_sliding_window": False}, 16),  # `transformers` does not look at it either
        ({"sliding_window": None, "use_sliding_window": True}, None),
    ],
)
def test_sliding_window_is_for_all_layers_or_none(changes: dict[str, Any], window: int | None) -> None:
    assert parse_config({**MISTRAL, **changes}).sliding_window == window


def test_what_a_family_assumes_of_rope_gives_way_to_either_form() -> None:
    raw = {key: value for key, value in LLAMA.items() if "rope" not in key} | {"model_type": "ministral3"}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.2}
    assumed = parse_config(raw)
    assert assumed.rope_scaling is not None and assumed.rope_scaling.factor == 16
    assert parse_config({**raw, "rope_parameters": None}) == assumed
    new = parse_config({**raw, "rope_parameters": {**yarn, "rope_theta": 1e4}})
    assert new.rope_scaling is not None and (new.rope_scaling.factor, new.query_scaling_beta) == (4, 0.2)
    for more in ({}, {"rope_parameters": None}):
        assert parse_config({**raw, "rope_theta": 1e4, "rope_scaling": yarn, **more}) == new


def test_rope_theta_of_a_million_token_context_is_read() -> None:
    assert parse_config({**LLAMA, "rope_theta": 3580165449.0}).rope_theta == 3580165449.0


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [
        ({}, None),
        ({"dtype": None, "torch_dtype": "float32"}, torch.float32),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
        ({"torch_dtype": "torch.float16"}, torch.float16),
    ],
)
def test_dtype_goes_before_torch_dtype_and_null_is_silence(raw: dict[str, Any], dtype: torch.dtype | None) -> None:
    assert parse_dtype(raw) == dtype


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 2}, (7, 8)),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, (0,)),
        ({}, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": [2, 3]}, (2, 3)),
        ({"eos_token_id": None}, {"eos_token_id": 2}, ()),
        (None, {"eos_token_id": None}, ()),
        ({"bos_token_id": 1}, {}, (9,)),
        (None, {"vocab_size": 10}, (9,)),
        (None, {"vocab_size": 9}, ()),
    ],
)
def test_eos_ids_come_from_generation_config_else_from_config_else_from_the_tokenizer(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], ids: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(tmp_path, 9) == ids


# Every key that is read, and what means the same as its absence. `transformers` refuses other nulls, as it does whole
# floats where an int stands; a null among the rope keys is silence.
L3 = {"rope_type": "llama3", **LLAMA3_ROPE}
LINEAR = {"rope_type": "linear", "factor": 4.0}
SAME_AS_SILENCE: dict[str, tuple[Any, ...]] = {
    "head_dim": (None, 8),
    "hidden_act": ("silu", "swish"),
    "rope_scaling": (None, {}, {"rope_type": "default"}, {"type": "default", "factor": None}, {"rope_type": None}),
    "rope_parameters": (None, {}, {"rope_theta": 1e4}, {"rope_theta": 10000, "factor": None}, {"rope_theta": None}),
    "rope_theta": (10000.0, 10000),
    "partial_rotary_factor": (None, 1, 1.0),
    "sliding_window": (None, 0, 4096),
    "use_sliding_window": (None, False),
    "layer_types": (None, ["full_attention"] * 2),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "quantization_config": (None, {}),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (True,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "attention_out_bias": (None, False),
    "clip_qkv": (None,),
    "use_bidirectional_attention": (None, False),
    "use_qk_norm": (None, False),
    "use_mrope": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "norm_topk_prob": (None, True),
    "moe_intermediate_size": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


def test_the_table_of_silence_has_every_key_that_must_be_neutral() -> None:
    assert SAME_AS_SILENCE.keys() >= NEUTRAL_VALUES.keys()


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in SAME_AS_SILENCE.items() for value in values], ids=repr
)
def test_forms_that_mean_the_same_are_the_same(key: str, value: Any) -> None:
    from transformers import LlamaConfig

    assert parse_config({**LLAMA, key: value}) == parse_config(LLAMA)
    if key not in ("rope_scaling", "rope_parameters", "quantization_config"):  # where it has more to say or less
        assert LlamaConfig(**SIZES, **{key: value}).head_dim == 8


@pytest.mark.parametrize(
    ("raw", "changes", "silent"),
    [
        (QWEN2, {"sliding_window": 0}, {}),
        (QWEN2, {"attention_bias": None, "mlp_bias": None}, {}),
        (QWEN3, {"head_dim": None}, {"head_dim": 128}),
        (QWEN3, {"mlp_bias": None}, {}),
        (FAMILY["qwen3_moe"], {"use_qk_norm": True, "qkv_bias": False}, {}),  # as Qwen3-Coder-30B-A3B has them
        (
            FAMILY["gemma3_text"],
            {"rope_parameters": {**BY_KIND, "rope_type": "default", "rope_theta": {"local": 1}}},
            {"rope_parameters": BY_KIND},
        ),
        (MISTRAL, {"attention_bias": None, "num_local_experts": 0, "num_experts": 0}, {}),
        (MIXTRAL, {"num_experts": 4}, {}),
        (MIXTRAL, {"sliding_window": None, "num_experts": 0}, {}),
        (LLAMA, {"rms_norm_eps": 1}, {"rms_norm_eps": 1.0}),
    ],
    ids=str,
)
def test_forms_that_mean_the_same_in_a_family_are_the_same(
    raw: dict[str, Any], changes: dict[str, Any], silent: dict[str, Any]
) -> None:
    assert parse_config({**raw, **changes}) == parse_config({**raw, **silent})


@pytest.mark.parametrize(
    ("form", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": {**LINEAR, "short_factor": None, "rope_theta": None}}, "linear"),
        ({"rope_theta": 500000, "rope_scaling": {"rope_type": None, "type": "linear", "factor": 4}}, "linear"),
        ({"rope_theta": None, "rope_parameters": {**LINEAR, "rope_theta": 5e5, "type": None}}, "linear"),
        ({"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 5e5}}, "linear"),
        ({"rope_theta": 5e5, "rope_scaling": {}, "rope_parameters": LINEAR}, "linear"),
        ({"rope_theta": 5e5, "rope_scaling": {**L3, "factor": 8, "attention_factor": None}}, "llama3"),
        ({"rope_parameters": {**L3, "rope_theta": 500000, "high_freq_factor": 4, "mscale": None}}, "llama3"),
        ({"rope_theta": 5e5, "rope_scaling": {**L3, "original_max_position_embeddings": 256.0}}, "llama3"),
    ],
    ids=str,
)
def test_rope_keys_mean_the_same_inside_and_beside_and_null_is_silence(form: dict[str, Any], scaling: str) -> None:
    rope = L3 if scaling == "llama3" else LINEAR
    assert parse_config({**LLAMA, **form}) == parse_config({**LLAMA, "rope_parameters": {**rope, "rope_theta": 5e5}})


@pytest.mark.parametrize("config", [QWEN2, QWEN3, MISTRAL, MIXTRAL, LLAMA], ids=lambda raw: raw["model_type"])
@pytest.mark.parametrize("key", ["sliding_window", "num_key_value_heads", "head_dim", "rope_theta", "layer_types"])
def test_null_means_what_transformers_takes_it_for(config: dict[str, Any], key: str) -> None:
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.for_model(**{**config, key: None})
    except Exception as error:
        assert "expected int, got NoneType" in str(error)
        return
    if key == "rope_theta":  # it goes on and fails in its model
        assert theirs.rope_parameters["rope_theta"] is None
        with pytest.raises(ValueError, match="rope_theta in rope_parameters is None"):
            parse_config({**config, key: None})
        return
    ours = parse_config({**config, key: None})
    for name in ("num_key_value_heads", "head_dim"):
        expected = getattr(theirs, name, None)
        assert getattr(ours, name) == (8 if expected is None else expected)
    assert ours.sliding_window == (None if key == "sliding_window" else getattr(theirs, "sliding_window", None))


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("float", torch.float32)])
def test_a_dtype_may_have_torchs_other_name(name: str, dtype: torch.dtype) -> None:
    assert parse_dtype({"dtype": name}) == dtype


# ---------------------------------------------------------------------------------------------------------------------
# config.json: what is refused

REQUIRED = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
NUMBERS = [*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"]
NOT_SIZES = [-1, 0, 2**40, 10**30, "64", True, 1.5, 64.0, [64], {"a": 1}, float("nan"), float("inf")]


@pytest.mark.parametrize("value", NOT_SIZES, ids=repr)
@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_no_size_is_refused_by_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} is ") as error:
        parse_config({**LLAMA, key: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_required_key_that_is_null_or_missing_is_refused(key: str) -> None:
    for raw in ({**LLAMA, key: None}, {k: v for k, v in LLAMA.items() if k != key}):
        with pytest.raises(ValueError, match=f"{key} is None"):
            parse_config(raw)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "head_dim"])
def test_a_size_above_any_real_model_is_refused_before_memory_is_asked_for(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is .* at most"):
        parse_config({**LLAMA, key: (MAX_COUNT if key in ("num_hidden_layers", "head_dim") else MAX_SIZE) + 2})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", "'gpt2'", "llama, mistral"]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"model_type": ["llama"]}, ["model_type", "['llama']"]),
        ({"model_type": {"llama": 1}}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"hidden_act": ["silu"]}, ["hidden_act", "['silu']"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, ["bits 3 of gptq"]),
        ({"num_local_experts": 8}, ["num_local_experts", "8"]),
        ({"num_experts": 64}, ["num_experts", "64"]),
        ({"mlp_only_layers": [0]}, ["mlp_only_layers", "[0]"]),
        ({"decoder_sparse_step": 2}, ["decoder_sparse_step", "2"]),
        ({"norm_topk_prob": False}, ["norm_topk_prob", "False"]),
        ({"moe_intermediate_size": 768}, ["moe_intermediate_size", "768"]),
        ({"shared_expert_intermediate_size": 5632}, ["shared_expert_intermediate_size", "5632"]),
        ({"use_mrope": True}, ["use_mrope", "True"]),
        ({"model_type": "qwen2_moe"}, ["model_type", "'qwen2_moe'"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0"]),
        ({"final_logit_softcapping": 0.0}, ["final_logit_softcapping", "0.0"]),
        ({"is_causal": False}, ["is_causal", "False"]),
        ({"is_causal": None}, ["is_causal", "None"]),
        ({"logits_scaling": 8}, ["logits_scaling", "8"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder", "True"]),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, ["num_attention_heads 8", "num_key_value_heads 3"]),
        ({"num_key_value_heads": 16}, ["num_attention_heads 8", "num_key_value_heads 16"]),
        ({"head_dim": 7}, ["head_dim 7", "odd"]),
        ({"num_attention_heads": 128, "num_key_value_heads": 128}, ["head_dim is 0"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
        ({"attention_bias": None}, ["attention_bias", "None"]),
        ({"mlp_bias": 1}, ["mlp_bias", "1"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps", "-1e-05"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "'1e-5'"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps", "None"]),
        ({"rope_theta": 0}, ["rope_theta", "0"]),
        ({"rope_theta": "10000"}, ["rope_theta", "'10000'"]),
        ({"rope_theta": None}, ["rope_theta", "None"]),
        ({"rope_theta": float("inf")}, ["rope_theta", "inf"]),
        ({"rope_theta": True}, ["rope_theta", "True"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
        ({"rope_scaling": ["linear", 2]}, ["rope_scaling", "['linear', 2]"]),
        ({"rope_scaling": False}, ["rope_scaling", "False"]),
        ({"rope_parameters": 3}, ["rope_parameters", "3"]),
        ({"rope_scaling": {**YARN, "rope_type": "proportional"}}, ["rope type", "'proportional'"]),
        ({"rope_scaling": {**YARN, "beta_fast": "32"}}, ["beta_fast", "'32'"]),
        ({"rope_scaling": {**YARN, "truncate": 1}}, ["truncate", "1"]),
        ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, ["attention_factor", "-1.0"]),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, ["yarn", "rope_theta", "1"]),
        ({"rope_scaling": {**YARN, "short_factor": [1.0] * 4}}, ["short_factor", "[1.0, 1.0, 1.0, 1.0]"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, ["dynamic", "head_dim", "2"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "beta_slow": 1}}, ["beta_slow", "1"]),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, ["short_factor", "1 of them", "4"]),
        ({"rope_parameters": {**LONGROPE, "long_factor": 2.0}}, ["long_factor", "2.0", "4"]),
        ({"rope_parameters": {**LONGROPE, "long_factor": [1.0, 0.0, 1.0, 1.0]}}, ["long_factor", "0.0"]),
        ({"rope_parameters": {**LONGROPE, "long_factor": None}}, ["long_factor", "None"]),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, ["rope type", "['linear']"]),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, ["rope type", "None"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor", "None", "rope_scaling"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor", "'2'"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor", "0"]),
        ({"rope_scaling": {"type": "linear", "factor": [2.0]}}, ["factor", "[2.0]"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mystery": 3}}, ["mystery", "3", "rope_scaling"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ["full_attention", "1000000.0"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}}, ["differ"]),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE, "low_freq_factor": 4.0}},
            ["low_freq_factor 4", "high_freq_factor 4"],
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE, "original_max_position_embeddings": 0.5}},
            ["original_max_position_embeddings", "0.5"],
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"layer_types": ["chunked_attention"] * 2}, ["layer_types", "chunked_attention"]),
        ({"layer_types": {"full_attention": [0]}}, ["layer_types", "{'full_attention': [0]}"]),
        ({"layer_types": [["full_attention"], {}]}, ["layer_types"]),
        ({"layer_types": 3}, ["layer_types", "3"]),
    ],
    ids=str,
)
def test_arithmetic_we_do_not_have_is_refused_by_key_and_value(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        parse_config({**LLAMA, **changes})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, ["attention_bias", "True", "mistral"]),
        ({"mlp_bias": True}, ["mlp_bias", "True", "mistral"]),
        ({"sliding_window": 0}, ["sliding_window", "0"]),
        ({"sliding_window": "8"}, ["sliding_window", "'8'"]),
        ({"sliding_window": True}, ["sliding_window", "True"]),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 2}, ["layer_types", "sliding_window 8"]),
        ({"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, ["layer_types", "sliding_window None"]),
    ],
    ids=str,
)
def test_a_mistral_of_another_arithmetic_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        parse_config({**MISTRAL, **changes})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("raw", "changes", "words"),
    [
        (MIXTRAL, {"num_local_experts": 0}, ["num_local_experts", "0"]),
        (MIXTRAL, {"num_local_experts": None}, ["num_local_experts", "None"]),
        (MIXTRAL, {"num_local_experts": "8"}, ["num_local_experts", "'8'"]),
        (MIXTRAL, {"num_experts_per_tok": 5}, ["num_experts_per_tok", "5", "at most 4"]),
        (MIXTRAL, {"num_experts_per_tok": 0}, ["num_experts_per_tok", "0"]),
        (MIXTRAL, {"num_experts": 8}, ["num_experts", "8"]),
        (MIXTRAL, {"norm_topk_prob": False}, ["norm_topk_prob", "False"]),
        (MIXTRAL, {"mlp_only_layers": [1]}, ["mlp_only_layers", "[1]"]),
        (MIXTRAL, {"shared_expert_intermediate_size": 64}, ["shared_expert_intermediate_size", "64"]),
        (MIXTRAL, {"attention_bias": True}, ["attention_bias", "True", "mixtral"]),
        (MIXTRAL, {"mlp_bias": True}, ["mlp_bias", "True", "mixtral"]),
        (QWEN2, {"attention_bias": True}, ["attention_bias", "True", "qwen2"]),
        (QWEN2, {"num_local_experts": 8}, ["num_local_experts", "8"]),
        (QWEN3, {"mlp_bias": True}, ["mlp_bias", "True", "qwen3"]),
        (QWEN3, {"attention_bias": "yes"}, ["attention_bias", "'yes'"]),
        (QWEN3, {"use_sliding_window": True, "max_window_layers": -1}, ["max_window_layers", "-1"]),
        (QWEN3, {"use_sliding_window": 1}, ["use_sliding_window", "1"]),
        (QWEN3, {"layer_types": ["sliding_attention"] * 2}, ["layer_types", "sliding_window None"]),
        (
            QWEN3,
            {"use_sliding_window": True, "layer_types": ["full_attention"]},
            ["layer_types ['full_attention']", "each of the 2 layers is full_attention or sliding_attention"],
        ),
    ],
    ids=str,
)
def test_a_mixtral_or_qwen_of_another_arithmetic_is_refused(
    raw: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        parse_config({**raw, **changes})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "at most 8"]),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ["mlp_only_layers", "[1]"]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step", "2"]),
        ("qwen3_moe", {"moe_intermediate_size": 0}, ["moe_intermediate_size", "0"]),
        ("qwen3_moe", {"norm_topk_prob": None}, ["norm_topk_prob", "None"]),
        ("qwen3_moe", {"num_local_experts": 6}, ["num_local_experts 6", "num_experts 8"]),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, ["shared_expert_intermediate_size", "8"]),
        ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", "[1]", "2 layers"]),
        ("smollm3", {"no_rope_layers": [1, 2]}, ["no_rope_layers", "[1, 2]"]),
        ("smollm3", {"no_rope_layer_interval": 0}, ["no_rope_layer_interval", "0"]),
        ("smollm3", {"layer_types": ["sliding_attention"] * 2}, ["layer_types", "sliding_window None"]),
        ("granite", {"logits_scaling": 0}, ["logits_scaling", "0"]),
        ("granite", {"residual_multiplier": None}, ["residual_multiplier", "None"]),
        ("granite", {"embedding_multiplier": "12"}, ["embedding_multiplier", "'12'"]),
        ("granitemoehybrid", {"num_local_experts": 8}, ["num_local_experts", "8"]),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, ["layer_types", "mamba"]),
        ("granitemoehybrid", {"layer_types": None}, ["layer_types", "None"]),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, ["position_embedding_type", "'alibi'"]),
        ("granitemoehybrid", {"mlp_bias": True}, ["mlp_bias", "True"]),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope type", "'linear'", "longrope"]),
        ("phi3", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5", "at most 1"]),
        ("phi3", {"partial_rotary_factor": 0.4}, ["partial_rotary_factor 0.4", "head_dim 8", "3 channels"]),
        ("phi3", {"attention_bias": True}, ["attention_bias", "True", "phi3"]),
        ("seed_oss", {"attention_bias": False, "attention_out_bias": True}, ["attention_out_bias True"]),
        ("seed_oss", {"attention_out_bias": "no"}, ["attention_out_bias", "'no'"]),
        ("olmo2", {"clip_qkv": 8.0}, ["clip_qkv", "8.0"]),
        ("olmo2", {"mlp_bias": True}, ["mlp_bias", "True"]),
        ("olmo3", {"rope_parameters": {"rope_theta": 1e4}}, ["rope_parameters", "full_attention"]),
        ("olmo3", {"rope_parameters": {"sliding_attention": YARN}}, ["sliding_attention", "yarn"]),
        ("olmo3", {"rope_parameters": {"full_attention": {**YARN, "truncate": False}}}, ["truncate", "False"]),
        ("olmo3", {"layer_types": ["full_attention", "chunked_attention"]}, ["layer_types", "chunked_attention"]),
        ("olmo3", {"sliding_window": "8"}, ["sliding_window", "'8'"]),
        ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": None}}, ["llama_4_scaling_beta", "None"]),
        ("ministral3", {"rope_parameters": {"rope_type": "default"}}, ["rope type", "'default'", "yarn"]),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0"]),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention", "True"]),
        ("gemma3_text", {"hidden_activation": "gelu"}, ["hidden_activation", "'gelu'"]),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar", "0"]),
        ("gemma3_text", {"sliding_window_pattern": 0}, ["sliding_window_pattern", "0"]),
    ],
    ids=str,
)
def test_a_newer_family_of_another_arithmetic_is_refused_by_key_and_value(
    family: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        parse_config({**FAMILY[family], **changes})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["float64", "int8", "float8_e4m3fn", "fp16", "", 16, ["float16"], {"a": 1}, False])
def test_a_dtype_we_do_not_run_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="dtype") as error:
        parse_dtype({"torch_dtype": name})
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("ids", [2.0, "2", True, [2, "3"], {"a": 1}, [[2]]])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_eos_ids_that_are_no_ids_are_refused_with_their_file(tmp_path: Path, file: str, ids: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=f"^{file}: eos_token_id"):
        eos_token_ids(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [*LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window",
     "layer_types", "attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_act", "partial_rotary_factor",
     "max_window_layers", "num_local_experts", "num_experts_per_tok", "mlp_only_layers",
     "no_rope_layers", "layers_block_type", "query_pre_attn_scalar", "sliding_window_pattern", "hidden_activation",
     "norm_topk_prob", "residual_multiplier", "shared_intermediate_size", "position_embedding_type", "text_config",
     "quantization_config", "use_qk_norm", "logit_scale", "original_max_position_embeddings", "dtype", "torch_dtype"]
)  # fmt: skip
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "dynamic", "yarn", "longrope"]) | JSON},
    optional=dict.fromkeys((*LLAMA3_ROPE, "rope_theta", "partial_rotary_factor", "type"), JSON)
    | {"short_factor": st.just([1.0] * 4) | JSON, "long_factor": st.just([2.0] * 4) | JSON, "beta_fast": JSON},
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    base=st.sampled_from([LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, *NEW_FAMILIES]),
    changes=st.dictionaries(KEYS, JSON, min_size=1, max_size=3),
    rope=st.none() | ROPES,
)
def test_no_config_raises_anything_but_value_error(
    base: dict[str, Any], changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    raw = {**base, **({} if rope is None else {"rope_scaling": rope}), **changes}
    for parse in (parse_config, parse_dtype):
        try:
            parse(raw)
        except ValueError as error:
            assert str(error).startswith("config.json: ")


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", "null", '"llama"', "", "\x00", "{'a': 1}", '{"a": ' + "9" * 5000 + "}", "[" * 100_000]
)
def test_a_config_that_is_no_json_object_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="JSON") as error:
        load_model(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_config_that_is_not_text_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(tmp_path)


def test_a_path_that_is_no_folder_or_has_no_config_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match=f"{path} is not a folder; name one or organization/name"):
            load_model(path)
    for path in (tmp_path, tmp_path / "odd"):
        with pytest.raises(FileNotFoundError, match=f"{path} has no config.json"):
            load_model(path)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: what is read


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(hub_checkpoint: GetCheckpoint, default: torch.dtype) -> None:
    for family in ("phi4_mini", "smollm3"):  # factors by length; layers that do not rotate
        path, tokens = hub_checkpoint(family).path, torch.arange(20).unsqueeze(0)
        expected = load_model(path, dtype=torch.float32)(tokens, torch.arange(20))
        torch.set_default_dtype(default)
        try:
            model = load_model(path, dtype=torch.float32)
            model.setup_caches(1, 200)
            assert {p.dtype for p in (*model.parameters(), *model.buffers())} == {torch.float32}
            found = load_model(path, dtype=torch.float32)(tokens, torch.arange(20))
            noise = Noise(1, [0], torch.Generator().manual_seed(0), torch.device("cpu"))
            assert {noise.exponential(3).dtype, noise.uniform(3).dtype} == {torch.float32}
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", DTYPES)
def test_every_parameter_has_the_dtype_asked_for_and_rope_stays_fp32(hub_checkpoint: GetCheckpoint, name: str) -> None:
    model = load_model(hub_checkpoint("rope_llama3").path, dtype=DTYPES[name])
    assert {p.dtype for p in model.parameters()} == {DTYPES[name]}
    assert model.inv_freq.dtype == torch.float32
    torch.testing.assert_close(model.inv_freq[0, 1], rope_frequencies(model.config), atol=0, rtol=0)


@pytest.mark.parametrize("name", DTYPES)
def test_the_default_dtype_is_the_configs(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor], name: str
) -> None:
    config = {key: value for key, value in gqa_config.items() if key != "dtype"} | {"torch_dtype": name}
    model = load_model(write_checkpoint(tmp_path / "model", config, gqa_tensors))
    assert {p.dtype for p in model.parameters()} == {DTYPES[name]}


def test_a_loaded_model_is_for_inference_only(hub_checkpoint: GetCheckpoint) -> None:
    model = load_model(hub_checkpoint("gqa").path)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path, hub_checkpoint: GetCheckpoint) -> None:
    from transformers import LlamaForCausalLM

    reference = hub_checkpoint("gqa")
    LlamaForCausalLM.from_pretrained(reference.path).save_pretrained(tmp_path, max_shard_size="60kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    logits = load_model(tmp_path)(reference.tokens, torch.arange(LENGTH))
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=0)


def test_a_folder_of_links_is_read_as_the_hubs_cache_has_them(tmp_path: Path, hub_checkpoint: GetCheckpoint) -> None:
    reference = hub_checkpoint("gqa")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(reference.path.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    logits = load_model(snapshot)(reference.tokens, torch.arange(LENGTH))
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=0)


def test_a_tied_model_may_store_its_head_too(tmp_path: Path, hub_checkpoint: GetCheckpoint) -> None:
    reference = hub_checkpoint("tied")
    tensors = load_file(reference.path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = load_model(write_checkpoint(tmp_path / "model", read_config(reference.path), tensors))
    assert model.lm_head.weight is model.embed_tokens.weight
    logits = model(reference.tokens, torch.arange(LENGTH))
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=0)


def test_rotary_frequencies_that_old_releases_stored_are_passed_over(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor]
) -> None:
    gqa_tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    load_model(write_checkpoint(tmp_path / "model", gqa_config, gqa_tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_follow_the_seed_and_dtype(dtype: torch.dtype) -> None:
    raw = {**LLAMA, "attention_bias": True, "tie_word_embeddings": True}
    first, same, other = (random_model(raw, dtype=dtype, seed=seed) for seed in (1, 1, 2))
    assert {p.dtype for p in first.parameters()} == {dtype} and first.inv_freq.dtype == torch.float32
    tokens, positions = torch.tensor([[1, 2, 3]]), torch.arange(3)
    assert first.lm_head.weight is first.embed_tokens.weight
    assert first(tokens, positions).isfinite().all()
    assert torch.equal(first(tokens, positions), same(tokens, positions))
    assert not torch.equal(first(tokens, positions), other(tokens, positions))


# ---------------------------------------------------------------------------------------------------------------------
# Weights: what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ["lacks", "model.layers.1.mlp.up_proj.weight"]),
        (lambda t: t.pop("lm_head.weight"), ["lacks", "lm_head.weight"]),
        (lambda t: t.pop("model.norm.weight"), ["lacks", "model.norm.weight"]),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}),
            ["unexpected", "model.layers.0.self_attn.q_norm.weight"],
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(112, 64)}),
            ["unexpected", "model.layers.2.mlp.up_proj.weight"],
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            ["unexpected", "model.layers.0.self_attn.q_proj.bias"],
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.gate_proj.weight": torch.ones(113, 64)}),
            ["model.layers.1.mlp.gate_proj.weight", "[113, 64]", "[112, 64]"],
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.v_proj.weight": torch.ones(64, 64)}),
            ["model.layers.1.self_attn.v_proj.weight", "[64, 64]", "[32, 64]"],
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(96 * 64)}),
            ["model.embed_tokens.weight", "[6144]", "[96, 64]"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_missing_unexpected_and_misshapen_tensors_are_refused_by_name(
    tmp_path: Path,
    gqa_config: dict[str, Any],
    gqa_tensors: dict[str, Tensor],
    change: Callable[[dict[str, Tensor]], Any],
    words: list[str],
) -> None:
    change(gqa_tensors)
    for write in (write_checkpoint, write_shards):
        with pytest.raises(ValueError, match="tensor") as error:
            load_model(write(tmp_path / write.__name__, gqa_config, gqa_tensors))
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "qwen3_biased", "mixtral", "mixtral_tied", *NEWER])
def test_shards_of_the_other_families_are_the_same_model(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, family: str
) -> None:
    reference = hub_checkpoint(family)
    tensors = load_file(reference.path / "model.safetensors")
    path = write_shards(tmp_path / "model", read_config(reference.path), tensors)
    logits = load_model(path, dtype=torch.float32)(reference.tokens, torch.arange(LENGTH))
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, p: t.pop(f"{p}.experts.3.w2.weight"), ["lacks", "experts.3.w2.weight"]),
        (lambda t, p: t.update({f"{p}.experts.5.w1.weight": torch.ones(112, 64)}), ["unexpected", "experts.5.w1"]),
        (lambda t, p: t.update({f"{p}.experts.1.w2.weight": torch.ones(112, 64)}), ["experts.1.w2", "[64, 112]"]),
        (lambda t, p: t.update({f"{p}.gate.weight": torch.ones(4, 64)}), ["gate.weight", "[4, 64]", "[5, 64]"]),
    ],
    ids=["missing", "unexpected", "turned", "router"],
)
def test_an_experts_tensor_is_missed_and_refused_by_name(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, change: Callable[[dict[str, Tensor], str], Any], words: list[str]
) -> None:
    reference = hub_checkpoint("mixtral")
    tensors = load_file(reference.path / "model.safetensors")
    change(tensors, "model.layers.1.block_sparse_moe")
    with pytest.raises(ValueError, match="tensor") as error:
        load_model(write_checkpoint(tmp_path / "model", read_config(reference.path), tensors))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_weights_stored_in_a_quantized_dtype_are_refused_by_name(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    gqa_tensors[name] = gqa_tensors[name].to(dtype)
    said = f"lacks tensor {name}_scale" if dtype.is_floating_point else f"{name} is {dtype}"
    with pytest.raises(ValueError, match=said):
        load_model(write_checkpoint(tmp_path / "model", gqa_config, gqa_tensors))


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -4000, -1])
def test_a_truncated_file_is_refused_by_its_path(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor], kept: int
) -> None:
    file = write_checkpoint(tmp_path / "model", gqa_config, gqa_tensors) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a whole safetensors file") as error:
        load_model(file.parent)
    assert str(file) in str(error.value)


def test_a_pointer_of_git_lfs_in_place_of_the_weights_is_refused(tmp_path: Path, gqa_config: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path / "model", gqa_config, {})
    (path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2200000000\n"
    )
    with pytest.raises(ValueError, match=r"bytes\) is not a whole safetensors file .* download it again"):
        load_model(path)


def test_a_header_longer_than_any_file_is_refused(tmp_path: Path, gqa_config: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path / "model", gqa_config, {})
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(path)


def test_a_shard_that_is_missing_is_refused_by_its_path(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor]
) -> None:
    path = write_shards(tmp_path / "model", gqa_config, gqa_tensors)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_model(path)


def test_a_tensor_that_the_index_promises_and_no_shard_has_is_refused_by_name(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor]
) -> None:
    name = "model.norm.weight"
    elsewhere = sorted(gqa_tensors).index(name) % 2  # the shard that does not hold it
    shard = f"model-0000{2 - elsewhere}-of-00002.safetensors"
    with pytest.raises(ValueError, match=f"{shard} lacks tensor {name}"):
        load_model(write_shards(tmp_path / "model", gqa_config, gqa_tensors, **{name: shard}))


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, None, ["x"]]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor], file: Any
) -> None:
    save_file(gqa_tensors, tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file of its own folder"):
        load_model(write_shards(tmp_path / "model", gqa_config, gqa_tensors, **{"model.norm.weight": file}))


def test_an_index_of_safetensors_cannot_bring_in_a_pickle(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor]
) -> None:
    path = write_shards(tmp_path / "model", gqa_config, gqa_tensors, **{"model.norm.weight": "norm.bin"})
    torch.save({"model.norm.weight": torch.ones(64)}, path / "norm.bin")
    with pytest.raises(ValueError, match=r"'norm\.bin'"):
        load_model(path)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["model.safetensors"]}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, gqa_config: dict[str, Any], index: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(gqa_config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused_and_bin_weights_name_the_converter(
    tmp_path: Path, gqa_config: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(gqa_config))
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_model(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=f"convert_hf_checkpoint.py --checkpoint_dir {tmp_path}"):
        load_model(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize(
    "family", ["gqa", "tied", "biased", "mistral_window", "qwen2", "qwen3", "mixtral", "mixtral_tied", *NEWER]
)
def test_transformers_reads_what_we_save(tmp_path: Path, hub_checkpoint: GetCheckpoint, family: str) -> None:
    from transformers import AutoModelForCausalLM

    reference = hub_checkpoint(family)
    model = load_model(reference.path, dtype=torch.float32, optimize=False)
    save_hub_checkpoint(model, read_config(reference.path), tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(reference.tokens).logits, reference.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        load_model(tmp_path)(reference.tokens, torch.arange(LENGTH)), reference.logits, atol=1e-4, rtol=0
    )


def test_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "not_contiguous": torch.randn(4, 6).t(),
        "bf16": torch.randn(7).bfloat16(),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "é": torch.ones(1),
    }
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, tensors.__getitem__)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_only_one_tensor_is_alive_while_a_file_is_written(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = torch.ones(4)
        alive.append(weakref.ref(tensor))
        return tensor

    specs = {name: (torch.float32, torch.Size([4])) for name in "abc"}
    write_safetensors(tmp_path / "x.safetensors", specs, read)
    assert len(alive) == 3


def test_what_cannot_fit_on_the_disk_is_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    def never(name: str) -> Tensor:
        raise AssertionError(name)

    with pytest.raises(OSError, match=r"needs 4000000000\.000 GB, but .* GB are free"):
        write_safetensors(tmp_path / "x", {"x": (torch.float32, torch.Size([10**9, 10**9]))}, never)
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "good") as folder:
        (folder / "x").touch()
        assert not (tmp_path / "a" / "good").exists()
    assert (tmp_path / "a" / "good" / "x").is_file()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "bad") as folder:
        (folder / "x").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["good"]


def test_a_folder_that_is_not_locked_yet_is_not_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another() -> None:
        with contextlib.suppress(OSError), new_folder(tmp_path / "out"):
            pass

    others: list[threading.Thread] = []

    @contextlib.contextmanager
    def late(folder: Path, wait: bool = False) -> Iterator[None]:
        if folder.suffix == ".tmp" and not others:
            others.append(threading.Thread(target=another))
            others[0].start()
            others[0].join(timeout=0.5)
        with locked(folder, wait):
            yield

    monkeypatch.setattr(files_module, "locked", late)
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
        assert len(others) == 1
    others[0].join()
    assert (tmp_path / "out" / "x").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_replaces_an_empty_one_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "x").touch()
    (tmp_path / "file").touch()
    for taken in ("empty", "file"):
        with pytest.raises(ValueError, match="exists already"), new_folder(tmp_path / taken):
            raise AssertionError("not reached")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_new_folder_takes_no_place_that_has_to_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "protected").mkdir(mode=0o555)
    (tmp_path / "here" / "mine").touch()  # nobody should be told to remove the current folder
    monkeypatch.chdir(tmp_path / "here")
    with small_disk(tmp_path / "disk", 2**16) as disk:
        places = {Path(): "name a folder in it", disk: "name a folder in it", tmp_path / "protected": "be written to"}
        for path, words in places.items():
            with pytest.raises(ValueError, match=words), new_folder(path):
                raise AssertionError("not reached")


def test_a_file_is_mapped_only_while_its_tensors_live(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor]
) -> None:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs Linux's /proc")
    file = write_checkpoint(tmp_path / "model", gqa_config, gqa_tensors) / "model.safetensors"
    files = TensorFiles(file.parent)
    held = [files.get(name) for name in files.files]
    assert str(file) in maps.read_text()
    del held
    assert str(file) not in maps.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What other programs store


def rewrite(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Copy a checkpoint, its tensors changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def logits_in_every_form(path: Path, tokens: Tensor) -> list[Tensor]:
    """Return the fp32 logits of a folder and of what the converter makes of it."""
    convert(path, path.with_name("converted"))
    positions = torch.arange(tokens.shape[1])
    return [
        load_model(folder, dtype=torch.float32)(tokens, positions) for folder in (path, path.with_name("converted"))
    ]


def test_a_stored_head_that_differs_from_a_tied_embedding_is_used_and_named(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, capsys: Any
) -> None:
    reference = hub_checkpoint("tied")
    head = torch.randn(reference.logits.shape[-1], 64, generator=torch.Generator().manual_seed(5))
    path = rewrite(reference.path, tmp_path / "model", lambda tensors: tensors | {"lm_head.weight": head})
    untied = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "untied").mkdir()
    shutil.copyfile(path / "model.safetensors", tmp_path / "untied/model.safetensors")
    (tmp_path / "untied/config.json").write_text(json.dumps(untied))
    positions = torch.arange(LENGTH)
    expected = load_model(tmp_path / "untied", dtype=torch.float32)(reference.tokens, positions)
    capsys.readouterr()
    for logits in logits_in_every_form(path, reference.tokens):
        assert torch.equal(logits, expected)
    assert "lm_head.weight is used, which is not the embedding" in capsys.readouterr().err
    quantize.main(["--checkpoint_path", str(path), "--mode", "int8", "--output_path", str(tmp_path / "int8")])
    rounded = load_model(tmp_path / "int8", dtype=torch.float32)(reference.tokens, positions)
    assert (rounded - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_a_stored_head_that_equals_a_tied_embedding_says_nothing(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, capsys: Any
) -> None:
    reference = hub_checkpoint("tied")
    path = rewrite(
        reference.path,
        tmp_path / "model",
        lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    )
    model = load_model(path, dtype=torch.float32)
    assert model.tied and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()},
        lambda tensors: {name.replace("model.embed_tokens", "lm_head"): value for name, value in tensors.items()},
    ],
    ids=["names without model.", "only the head is stored"],
)
def test_names_that_other_programs_write_are_read(hub_checkpoint: GetCheckpoint, tmp_path: Path, change: Any) -> None:
    reference = hub_checkpoint("tied")
    path = rewrite(reference.path, tmp_path / "model", change)
    for logits in logits_in_every_form(path, reference.tokens):
        torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.rotary_emb.cos_cached", "rotary_emb.inv_freq", "score.weight", "v_head.bias",
     "qa_outputs.weight"],
)  # fmt: skip
def test_tensors_that_no_text_depends_on_are_ignored_with_a_line(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, capsys: Any, name: str
) -> None:
    reference = hub_checkpoint("gqa")
    path = rewrite(reference.path, tmp_path / "model", lambda tensors: tensors | {name: torch.ones(3)})
    capsys.readouterr()  # the bar of who makes the reference
    logits = load_model(path, dtype=torch.float32)(reference.tokens, torch.arange(LENGTH))
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=0)
    assert capsys.readouterr().err == f"{path}: ignored {name}, which no text depends on\n"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_without_a_dtype_in_the_config_the_weights_own_is_taken(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    source = hub_checkpoint("gqa").path
    path = rewrite(source, tmp_path / "model", lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in ("dtype", "torch_dtype")}))
    assert load_model(path).embed_tokens.weight.dtype == dtype
    convert(path, tmp_path / "converted")
    assert load_model(tmp_path / "converted").embed_tokens.weight.dtype == dtype


def test_of_several_dtypes_that_of_most_weights_is_taken(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor]
) -> None:
    config = gqa_config | {"dtype": None}
    tensors = {name: tensor.half() for name, tensor in gqa_tensors.items()}
    norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    mixed = tensors | norms | {"lm_head.weight": gqa_tensors["lm_head.weight"]}  # the first by name
    assert load_model(write_checkpoint(tmp_path / "mixed", config, mixed)).embed_tokens.weight.dtype == torch.float16
    double = {name: tensor.double() for name, tensor in gqa_tensors.items()}
    assert load_model(write_checkpoint(tmp_path / "double", config, double)).embed_tokens.weight.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Folders that hold something else


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ["adapter_config.json", "adapter", "merge"]),
        (["adapter_config.json", "adapter_model.bin", "config.json", "tokenizer.json"], ["adapter", "merge"]),
        (["model-Q4_0.gguf", "README.md"], ["model-Q4_0.gguf", "convert_gguf.py"]),
        (["a.gguf", "config.json"], ["convert_gguf.py"]),
        (["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"], ["own layout", "the Hub's"]),
        (["consolidated.safetensors", "params.json", "tekken.json"], ["own layout", "the Hub's"]),
        (["params.json"], ["params.json", "own layout"]),
        ([], ["is an empty folder", "download"]),
        ([".cache"], ["is an empty folder", "download"]),
        (["README.md"], ["has no config.json", "download"]),
    ],
    ids=str,
)
def test_a_folder_of_another_form_is_named_with_the_cure(tmp_path: Path, names: list[str], words: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps(LLAMA))
    for read in (read_config, load_model):
        with pytest.raises(FileNotFoundError) as error:
            read(tmp_path)
        assert all(word in str(error.value) for word in (str(tmp_path), *words)), error.value
        assert len(str(error.value)) < len(str(tmp_path)) + 180


def test_files_of_another_form_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    model = random_model(LLAMA, optimize=False)
    save_hub_checkpoint(model, LLAMA, tmp_path, torch.float32)
    for name in ("a.gguf", "consolidated.00.pth", "params.json"):
        (tmp_path / name).write_text("")
    load_model(tmp_path)


def test_a_family_that_is_not_read_is_said_before_its_weights_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_text("damaged")
    with pytest.raises(ValueError, match="gpt2"):
        load_model(tmp_path)


def test_an_adapter_beside_whole_weights_is_said_not_to_be_applied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(LLAMA, optimize=False)
    (tmp_path / "a").mkdir()
    save_hub_checkpoint(model, LLAMA, tmp_path / "a", torch.float32)
    (tmp_path / "a/adapter_config.json").write_text("{}")
    for read in (load_model, lambda path: convert(path, tmp_path / "b")):
        read(tmp_path / "a")
        assert "adapter beside the weights is not applied" in capsys.readouterr().err
    load_model(tmp_path / "b")
    assert "adapter" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The text of models that see too


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral3", {"head_dim": 24, "sliding_window": None}),
    "ministral3": ("mistral3", {"head_dim": 24, "rope_parameters": MINISTRAL, **SMALL_IDS}),
    "gemma3_text": ("gemma3", {"head_dim": 24, "sliding_window": 8, "sliding_window_pattern": 2}),
}


@pytest.fixture(scope="module", params=[(family, tied) for family in SEEING for tied in (True, False)], ids=str)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HubCheckpoint:
    from transformers import AutoConfig, AutoModelForImageTextToText

    family, tied = request.param
    kind, extra = SEEING[family]
    eye = {"model_type": "pixtral", "head_dim": 16} if kind == "mistral3" else {"model_type": "siglip_vision_model"}
    text = {**SIZES, "model_type": family, "vocab_size": 96, "num_key_value_heads": 2, **extra}
    sees = {"vision_config": {**VISION, **eye}, **({"mm_tokens_per_image": 4} if kind == "gemma3" else {})}
    config = AutoConfig.for_model(kind, text_config=text, **sees, tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    randomize_(model, seed=7)
    tokens = torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("seeing") / "model"
    model.save_pretrained(path)
    with torch.no_grad():
        return HubCheckpoint(path, tokens, model(input_ids=tokens).logits)


def test_the_text_of_a_model_that_sees_is_read_and_the_rest_ignored_with_a_line(
    seeing: HubCheckpoint, tmp_path: Path, capsys: Any
) -> None:
    def other_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        prefixes = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
        for old, new in prefixes.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
        return tensors

    for number, change in enumerate((lambda tensors: tensors, other_prefix)):
        path = rewrite(seeing.path, tmp_path / str(number) / "model", change)
        for logits in logits_in_every_form(path, seeing.tokens):
            torch.testing.assert_close(logits, seeing.logits, atol=1e-4, rtol=0)
        said = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
        assert len(said) == 2 and all("multi_modal_projector." in line and "no text" in line for line in said)
        raw = read_config(path.with_name("converted"))
        assert raw["model_type"] in SEEING and "vision_config" not in raw


def test_a_model_that_sees_without_a_text_config_is_refused_by_key_and_value() -> None:
    for kind in ("mistral3", "gemma3"):
        with pytest.raises(ValueError, match="text_config is None"):
            parse_config({"model_type": kind})
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        parse_config({"model_type": "mistral3", "text_config": {**LLAMA, "model_type": "gpt2"}})
    with pytest.raises(ValueError, match="quantization_config of hqq"):
        parse_config({"model_type": "mistral3", "text_config": MISTRAL, "quantization_config": {"quant_method": "hqq"}})


def test_the_outer_dtype_goes_before_the_texts() -> None:
    text = {**MISTRAL, "dtype": "float16"}
    outer = {"model_type": "mistral3", "text_config": text, "torch_dtype": "bfloat16"}
    assert parse_dtype(text_config(outer)) == torch.bfloat16
    assert parse_dtype(text_config({"model_type": "mistral3", "text_config": text})) == torch.float16


def test_rope_of_layer_types_is_read_where_transformers_reads_it() -> None:
    from transformers import AutoConfig

    olmo = {**FAMILY["olmo3"], "rope_local_base_freq": 77.0}
    theirs = AutoConfig.for_model(**olmo).rope_parameters["sliding_attention"]["rope_theta"]
    assert parse_config(olmo).local_rope_theta == theirs == 5e5
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e6}
    both = {**FAMILY["gemma3_text"], "rope_parameters": {**BY_KIND, "full_attention": yarn}}
    inside = parse_config(both)
    assert parse_config({**both, "original_max_position_embeddings": 32}) == inside
    with pytest.raises(ValueError, match="truncate False beside full_attention"):
        parse_config({**both, "rope_parameters": {**both["rope_parameters"], "truncate": False}})
    flat = {**LLAMA, "rope_parameters": {**yarn, "truncate": None}}
    assert parse_config(flat) == parse_config({**LLAMA, "rope_parameters": {**yarn, "truncate": False}})
    assert parse_config(flat) != parse_config({**LLAMA, "rope_parameters": yarn})


@pytest.mark.parametrize("name", ["norm.weight", "language_model.model.norm.weight"])
def test_one_tensor_under_two_names_is_refused(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor], name: str
) -> None:
    path = write_checkpoint(tmp_path / "m", gqa_config, gqa_tensors | {name: 3 * gqa_tensors["model.norm.weight"]})
    with pytest.raises(ValueError, match=rf"both {name} and model\.norm\.weight"):
        load_model(path)


def test_a_text_config_that_says_little_means_what_transformers_assumes() -> None:
    little = {"hidden_size": 256, "intermediate_size": 64, "model_type": "gemma3_text", "num_hidden_layers": 3}
    little |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 16}
    from transformers import AutoConfig

    theirs = AutoConfig.for_model("gemma3", text_config=dict(little)).text_config
    ours = parse_config({"model_type": "gemma3", "text_config": little})
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.tie_word_embeddings and ours.query_multiplier == 1.0 and ours.embedding_multiplier == 16.0
    slides = [kind == "sliding_attention" for kind in theirs.layer_types]
    assert [ours.window(i) for i in range(3)] == [16 if each else None for each in slides]
    assert ours.rope_scaling and (ours.rope_scaling.rope_type, ours.rope_scaling.factor) == ("linear", 8)
    assert (ours.rope_theta, ours.local_rope_theta) == (1e6, 1e4)
