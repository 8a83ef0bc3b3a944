"""Tensor parallelism: which rank holds which part of a model. How the ranks communicate is in `collectives.py`.

    torchrun --nproc_per_node=2 generate.py --prompt "import " --compile

Every rank runs the same program on its slice of each weight (Megatron's split, arXiv:1909.08053).
"""

import torch
from torch import Tensor

from linears import Form
from model import ModelConfig, Ranks

# Module -> how each of its stacked parts is cut; in a stack of experts, those of each expert. «column» and «vocabulary»
# cut the output features, «row» the input features, as Megatron names them, into as many equal pieces as ranks.
# «kv_heads» cuts output features too, into kv heads: a rank has some of them, or shares one with others. «heads» and
# «heads_row» cut what the queries of these have.
PLAN = {
    "embed_tokens": ("vocabulary",),
    "qkv_proj": ("heads", "kv_heads", "kv_heads"),
    "q_norm": ("heads",),  # this and the next: where one takes all heads
    "k_norm": ("kv_heads",),
    "o_proj": ("heads_row",),
    "gate_up_proj": ("column", "column"),
    "down_proj": ("row",),
    "lm_head": ("vocabulary",),
}


def local_part(name: str, index: int, part: Tensor, config: ModelConfig, ranks: Ranks) -> Tensor:
    """Cut this rank's share out of a part of parameter `name`; of a mapped file only that share is read.

    The sum over ranks would add a row-parallel bias once per rank: rank 0 has it, the others have zeros.
    """
    *_, module, suffix = name.split(".")
    whole = module not in PLAN or (module in ("q_norm", "k_norm") and not config.qk_norm_over_heads)
    if ranks.count == 1 or whole:  # a norm, or a router
        return part
    how = PLAN[module][index % len(PLAN[module])]
    if suffix == "order":
        return part
    dim = 1 if how.endswith("row") else 0
    if dim == 1 and (part.ndim == 1 or (suffix in ("scales", "zeros") and part.shape[1] == 1)):  # a row has one
        return torch.zeros_like(part) if suffix == "bias" and ranks.rank else part
    if how == "vocabulary":  # the last ranks' shares may be padded, with ids that no text has
        size = -(-part.shape[0] // ranks.count)
        share = part[ranks.rank * size : (ranks.rank + 1) * size]
        padding = size - len(share)
        return torch.cat((share, share.new_zeros(padding, *share.shape[1:]))) if padding else share.contiguous()
    kv_heads = config.num_key_value_heads
    num_pieces = kv_heads if how == "kv_heads" else max(ranks.count, kv_heads) if "heads" in how else ranks.count
    pieces, total = ranks.share(num_pieces), part.shape[dim]  # of groups there may be fewer than pieces
    return part.narrow(dim, pieces.start * total // num_pieces, len(pieces) * total // num_pieces).contiguous()


def check_sizes(config: ModelConfig, form: Form | None, count: int) -> None:
    """Raise ValueError, with both numbers, where a model cannot be cut for `count` ranks."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for name, size in (("num_attention_heads", heads), ("intermediate_size", config.intermediate_size)):
        if size % count and (name == "intermediate_size" or count > kv_heads):
            raise ValueError(f"{name} {size} is not a multiple of the {count} ranks; start as many as divide it")
    if count > kv_heads and count % kv_heads:
        raise ValueError(f"num_key_value_heads {kv_heads} does not divide the {count} ranks; start another number")
    if has_unlike_ranks(kv_heads, count) and config.qk_norm_over_heads:
        what = f"num_key_value_heads {kv_heads} is not a multiple of the {count} ranks"
        raise ValueError(f"{what}, as a norm over all heads needs; start as many as divide it")
    if form is None or form.group_size is None:
        return
    for name, size in (("o_proj", heads * config.head_dim), ("down_proj", config.intermediate_size)):
        check_group(name, size, form.group_size, config, count)


def has_unlike_ranks(kv_heads: int, count: int) -> bool:
    """Say whether some ranks have a kv head more than others."""
    return count < kv_heads and kv_heads % count > 0


def is_row_parallel(name: str) -> bool:
    """Say whether the ranks cut the inputs of a module."""
    return PLAN.get(name.rpartition(".")[2], ("",))[0].endswith("row")


def check_group(name: str, size: int, group_size: int, config: ModelConfig, count: int) -> None:
    """Raise ValueError where the groups of a module's inputs cannot be shared out."""
    kv_heads = config.num_key_value_heads
    pieces = kv_heads if name.endswith("o_proj") and has_unlike_ranks(kv_heads, count) else count
    if count > 1 and size % (pieces * group_size):
        raise ValueError(
            f"{name} has {size} inputs in groups of {group_size}, which is not a whole number of groups for each of "
            f"the {count} ranks; start fewer, or quantize with a smaller --groupsize"
        )
