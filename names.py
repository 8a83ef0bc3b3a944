"""The model's parameters by the names that the Hub has for them, and how they are cut there."""

import torch
from torch import Tensor

from families import FAMILIES
from model import ModelConfig

# A parameter of the model that is several of the Hub's tensors stacked along the output features.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# A stack of experts: such tensors of one expert after the other.
EXPERTS_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def is_stack(name: str, config: ModelConfig) -> bool:
    return config.num_local_experts > 0 and name.split(".")[-2] in EXPERTS_STACKED


def family_name(name: str, config: ModelConfig) -> str:
    """Return what a family calls a tensor, given Llama's name for it."""
    for ours, theirs in FAMILIES[config.model_type].names.items():
        name = name.replace(ours, theirs)
    return name


def expert_names(experts: str, module: str, suffix: str, num_experts: int) -> list[str]:
    """Return Llama's names for the tensors of a stack, expert after expert."""
    return [f"{experts}.{i}.{part}.{suffix}" for i in range(num_experts) for part in EXPERTS_STACKED[module]]


def hub_shapes(
    name: str, shape: torch.Size, config: ModelConfig, stacked: tuple[str, ...] | None = None
) -> dict[str, torch.Size]:
    """Return the Hub's tensors that make up the model's parameter `name` of this shape, in order, and their shapes.

    stacked: the modules that a folder stores as they are stacked in the model; None: those of its family.
    """
    if name.startswith("lm_head."):
        return {name: shape}
    *path, module, suffix = name.split(".")
    names = [name]
    if is_stack(name, config):
        names = expert_names(".".join([*path, "experts"]), module, suffix, config.num_local_experts)
    elif module in STACKED and module not in (FAMILIES[config.model_type].stacked if stacked is None else stacked):
        names = [".".join([*path, part, suffix]) for part in STACKED[module]]
    num_rows, columns = (shape[0] * shape[1], shape[2:]) if len(shape) == 3 else (shape[0], shape[1:])
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    counts = [q, kv, kv] if module == "qkv_proj" and len(names) > 1 else [num_rows // len(names)] * len(names)
    hub = ["model." + family_name(part, config) for part in names]
    return {part: torch.Size([count, *columns]) for part, count in zip(hub, counts, strict=True)}


def hub_parts(
    name: str, tensor: Tensor, config: ModelConfig, stacked: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Cut parameter `name` into the tensors of `hub_shapes`."""
    shapes = hub_shapes(name, tensor.shape, config, stacked)
    matrix = tensor.flatten(0, 1) if tensor.ndim == 3 else tensor  # of a stack: expert below expert
    return dict(zip(shapes, matrix.split([shape[0] for shape in shapes.values()]), strict=True))
