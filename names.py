"""The model's parameters by the names that the Hub has for them, and how they are cut there."""

from torch import Tensor

from families import FAMILIES
from model import ModelConfig

# A parameter of the model that is several of the Hub's tensors stacked along the output features.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# A stack of experts: such tensors of one expert after the other.
EXPERTS_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def is_stack(name: str, config: ModelConfig) -> bool:
    return config.num_local_experts > 0 and name.split(".")[-2] in EXPERTS_STACKED


def unstacked(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return a stack of experts as one matrix, expert below expert; any other tensor as it is."""
    return tensor.flatten(0, 1) if is_stack(name, config) else tensor


def family_name(name: str, config: ModelConfig) -> str:
    """Return what a family calls a tensor, given Llama's name for it."""
    for ours, theirs in FAMILIES[config.model_type].names.items():
        name = name.replace(ours, theirs)
    return name


def hub_names(name: str, config: ModelConfig, stacked: tuple[str, ...] = ()) -> list[str]:
    """Name the Hub's tensors that make up the model's parameter `name`, in order.

    stacked: the modules that a folder stores as they are stacked in the model, where its family stores others so.
    """
    if name.startswith("lm_head."):
        return [name]
    *path, module, suffix = name.split(".")
    names = [name]
    if is_stack(name, config):
        experts = [".".join([*path, "experts", str(i)]) for i in range(config.num_local_experts)]
        names = [f"{expert}.{part}.{suffix}" for expert in experts for part in EXPERTS_STACKED[module]]
    elif module in STACKED and module not in (stacked or FAMILIES[config.model_type].stacked):
        names = [".".join([*path, part, suffix]) for part in STACKED[module]]
    return ["model." + family_name(part, config) for part in names]


def part_rows(name: str, config: ModelConfig, total: int) -> list[int]:
    """Return how many rows of parameter `name` each of its Hub tensors has."""
    if "qkv_proj" in name:
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return [q, kv, kv]
    if "gate_up_proj" in name:
        return [config.intermediate_size] * 2 * max(1, config.num_local_experts)
    return [config.hidden_size] * config.num_local_experts if is_stack(name, config) else [total]


def hub_rows(name: str, config: ModelConfig, total: int, stacked: tuple[str, ...] = ()) -> list[int]:
    """Return how many rows of parameter `name`, of so many, each of the tensors has that `hub_names` names."""
    return [total] if len(hub_names(name, config, stacked)) == 1 else part_rows(name, config, total)
