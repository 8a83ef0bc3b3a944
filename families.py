"""The families of models: a row for each, with what differs from Llama, in config.json and on disk."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """How a family differs from Llama."""

    # What `transformers` assumes for keys that config.json leaves out. Of the keys that not every family heeds, those
    # that stand here have an effect.
    defaults: Mapping[str, Any]
    fields: Mapping[str, Any] = {}  # of ModelConfig, whatever config.json says
    mixed_attention: bool = False  # some layers slide, and some have full attention
    rope_types: Mapping[str, str] = {}  # its names of them -> the types; {} for all, by their own names
    names: Mapping[str, str] = {}  # of tensors on disk: part of ours -> of theirs
    stacked: tuple[str, ...] = ()  # the parameters that it stores as they are stacked in the model
    null_head_dim: int | None = None  # what head_dim is where it is null; else the heads divide hidden_size


QWEN_DEFAULTS: dict[str, Any] = {
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768,
}  # fmt: skip
GRANITE_DEFAULTS: dict[str, Any] = {
    "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
OLMO_FIELDS: dict[str, Any] = {
    "qk_norm": True, "qk_norm_over_heads": True, "norm_inputs": False, "norm_outputs": True, "norm_offset": 0.0,
}  # fmt: skip
NORMS_AFTER = {".attn_output_norm.": ".post_attention_layernorm.", ".mlp_output_norm.": ".post_feedforward_layernorm."}
FAMILIES: dict[str, Family] = {
    "llama": Family({"attention_bias": False, "mlp_bias": False}),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}),
    "mixtral": Family({
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
    }, names={".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}),
    "qwen2": Family({"num_key_value_heads": 32, **QWEN_DEFAULTS}, fields={"qkv_bias": True}, mixed_attention=True),
    "qwen3": Family({
        "num_key_value_heads": 32, "head_dim": 128, **QWEN_DEFAULTS, "attention_bias": False,
        "use_qk_norm": True,  # without effect, here and below: q and k are always normed
    }, fields={"qk_norm": True}, mixed_attention=True, null_head_dim=128),
    "qwen3_moe": Family({
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "use_sliding_window": False,
        "sliding_window": 4096, "attention_bias": False, "use_qk_norm": True, "num_local_experts": None,
        "num_experts": None, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
    }, fields={"qk_norm": True}),
    "smollm3": Family({
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True,
        "use_sliding_window": False, "sliding_window": None, "no_rope_layer_interval": 4, "attention_bias": False,
        "mlp_bias": False,
    }, mixed_attention=True),
    "granite": Family({"attention_bias": False, "mlp_bias": False, **GRANITE_DEFAULTS}),
    "granitemoehybrid": Family({
        "attention_bias": False, **GRANITE_DEFAULTS, "position_embedding_type": None, "layers_block_type": None,
        "shared_intermediate_size": 1024,
    }, names={
        ".mlp.gate_up_proj.": ".shared_mlp.input_linear.", ".mlp.down_proj.": ".shared_mlp.output_linear.",
    }, stacked=("gate_up_proj",)),
    "phi3": Family({
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "sliding_window": None, "partial_rotary_factor": 1.0,
    }, rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
       stacked=("qkv_proj", "gate_up_proj")),
    "seed_oss": Family({
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True,
        "attention_out_bias": False, "mlp_bias": False,
    }),
    "olmo2": Family({"rms_norm_eps": 1e-5, "attention_bias": False}, fields=OLMO_FIELDS, names=NORMS_AFTER),
    "olmo3": Family({
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_local_base_freq": 5e5, "sliding_window": 4096,
        "attention_bias": False,
    }, fields=OLMO_FIELDS, mixed_attention=True, names=NORMS_AFTER),
    "ministral3": Family({
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5,
        "sliding_window": None, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
            "max_position_embeddings": 262144, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    }, rope_types={"yarn": "yarn"}),
    "gemma3_text": Family({
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 4096, "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256, "tie_word_embeddings": True, "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_act": None,  # which the first replaces
    }, fields={"qk_norm": True, "norm_outputs": True, "norm_offset": 1.0, "gelu": True},
       names={".post_attention_layernorm.": ".pre_feedforward_layernorm.", **NORMS_AFTER}, mixed_attention=True),
}  # fmt: skip


def heeds(values: dict[str, Any], key: str) -> bool:
    """Say whether the family of a config.json heeds a key that not every family does."""
    return key in FAMILIES[values["model_type"]].defaults
