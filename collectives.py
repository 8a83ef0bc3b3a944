"""How the ranks of a model communicate: where the model calls `ranks`.

That is an all-reduce after the embedding, after attention and after the feed-forward, and in the norms of q and k where
these take all heads at once; an all-gather after the output head; and a broadcast of rank 0's token ids after sampling,
after each draft and after a round. It is the broadcast, and not a seed, that makes all ranks write the same text. The
backend is NCCL on GPUs and gloo on CPUs; ranks are counted over all nodes, as torchrun's RANK and WORLD_SIZE do.
`draft_ranks` shares a draft model where that saves more than they cost.

These are custom operators, opaque to torch.compile. Not made by `torch.library.custom_op`, which imports the compiler
at the first call: an eager run's first token came a second later.
"""

import functools
import os

import torch
import torch.distributed as dist
from torch import Tensor

from linears import Form
from model import ONE_RANK, ModelConfig, Ranks
from tp import check_sizes

for operator in ("all_reduce", "all_gather", "broadcast"):
    torch.library.define(f"tp::{operator}", "(Tensor x) -> Tensor")


@torch.library.impl("tp::all_reduce", "CompositeExplicitAutograd")
def all_reduce(x: Tensor) -> Tensor:
    """Return the sum over all ranks, in one kernel where x is small."""
    if x.device.type == "cuda" and x.dtype in ONE_SHOT_DTYPES and x.nbytes <= ONE_SHOT_BYTES and x.nbytes % 16 == 0:
        buffer = symmetric_buffer(x.device)
        if buffer is not None:
            # The kernel begins and ends with a barrier of all ranks: none reads before all have copied, and none copies
            # its next summand before all have read. A CUDA graph replays both.
            summand = buffer.view(x.dtype)[: x.numel()].view(x.shape).copy_(x)
            return torch.ops.symm_mem.one_shot_all_reduce(summand, "sum", world().group_name)
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


@torch.library.impl("tp::all_gather", "CompositeExplicitAutograd")
def all_gather(x: Tensor) -> Tensor:
    """Return the x of all ranks, concatenated along the last dimension."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=-1)


@torch.library.impl("tp::broadcast", "CompositeExplicitAutograd")
def broadcast(x: Tensor) -> Tensor:
    """Return rank 0's x."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, src=0)
    return x


@torch.library.register_fake("tp::all_reduce")
@torch.library.register_fake("tp::broadcast")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("tp::all_gather")
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] * dist.get_world_size())


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


# Up to this many bytes each rank reads all summands itself, in one kernel; NCCL's rings are for more.
ONE_SHOT_BYTES = 2**18
ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)  # those that the kernel is compiled for


@functools.cache
def symmetric_buffer(device: torch.device) -> Tensor | None:
    """Allocate ONE_SHOT_BYTES that the GPUs of all ranks can read; None where that is impossible.

    No GPU has run this yet.
    """
    if int(os.environ["LOCAL_WORLD_SIZE"]) != dist.get_world_size():  # it does not reach GPUs of another node
        return None
    try:
        from torch.distributed import _symmetric_memory

        buffer = _symmetric_memory.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
        _symmetric_memory.rendezvous(buffer, world())
    except (ImportError, RuntimeError):  # not in this torch, or not between these GPUs
        return None
    return buffer


def collectives(rank: int, count: int) -> Ranks:
    """Return the ranks of the process group that is there, with its collectives."""
    return Ranks(rank, count, torch.ops.tp.all_reduce, torch.ops.tp.all_gather, torch.ops.tp.broadcast)


# The all-reduces of a small draft cost more than reading all of it on every rank, those of a large one less. They break
# even where the bytes that a rank need not read take as long as they do: on H200s, at an assumed 3.4 TB/s and 8 us each
# (see docs/gpus.md).
BYTES_READ_PER_SUM = 3.4e12 * 8e-6


def draft_ranks(config: ModelConfig, form: Form | None, step_bytes: int, ranks: Ranks) -> Ranks:
    """Say who computes the draft: the ranks together where that is faster and its sizes allow it, else each on its own.

    step_bytes: what a step of the whole draft reads. Even if each rank computes it, only rank 0's drafts are used.
    """
    sums_of_layer = 4 if config.qk_norm_over_heads else 2
    # Besides, the embedding's, the head's all-gather and the ids' broadcast.
    num_sums = sums_of_layer * config.num_hidden_layers + 3
    if step_bytes * (1 - 1 / ranks.count) <= num_sums * BYTES_READ_PER_SUM:
        return ONE_RANK
    try:
        check_sizes(config, form, ranks.count)
    except ValueError:
        return ONE_RANK
    return ranks
