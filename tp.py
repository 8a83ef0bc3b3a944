"""Tensor parallelism: which rank holds which part of a model, and how the ranks communicate.

    torchrun --nproc_per_node=2 generate.py --prompt "import " --compile

Every rank runs the same program on its slice of each weight (Megatron's split, arXiv:1909.08053). They communicate
where the model calls `ranks`: an all-reduce after the embedding, after attention and after the feed-forward, an
all-gather after the output head, and a broadcast of rank 0's token ids after sampling. It is the broadcast, and not a
seed, that makes all ranks write the same text. The backend is NCCL on GPUs and gloo on CPUs; ranks are counted over all
nodes, as torchrun's RANK and WORLD_SIZE do.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cli import user_errors
from model import ONE_RANK, ModelConfig, Ranks
from quantize import Scheme

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# The plan

# Module -> how each of its stacked parts is cut; in a stack of experts, those of each expert. «column» and «vocabulary»
# cut the output features, «row» the input features, as Megatron names them. A head's features are adjacent, so that
# equal pieces are whole heads. There may be fewer kv heads than ranks: then several ranks hold the same one.
PLAN = {
    "embed_tokens": ("vocabulary",),
    "qkv_proj": ("column", "kv_heads", "kv_heads"),
    "o_proj": ("row",),
    "gate_up_proj": ("column", "column"),
    "down_proj": ("row",),
    "lm_head": ("vocabulary",),
}


def local_part(name: str, index: int, part: Tensor, config: ModelConfig, ranks: Ranks) -> Tensor:
    """Cut this rank's share out of a part of parameter `name`; of a mapped file only that share is read.

    The sum over ranks would add a row-parallel bias once per rank: rank 0 has it, the others have zeros.
    """
    *_, module, kind = name.split(".")
    if ranks.count == 1 or module not in PLAN:  # a norm, or a router
        return part
    how = PLAN[module][index % len(PLAN[module])]
    if how == "row" and part.ndim == 1:  # a bias, or the scales of int8's output channels
        return torch.zeros_like(part) if kind == "bias" and ranks.rank else part
    dim = 1 if how == "row" else 0
    num_pieces = min(ranks.count, config.num_key_value_heads) if how == "kv_heads" else ranks.count
    size = part.shape[dim] // num_pieces
    return part.narrow(dim, ranks.rank * num_pieces // ranks.count * size, size).contiguous()


def check_sizes(config: ModelConfig, scheme: Scheme | None, count: int) -> None:
    """Raise ValueError, with both numbers, where a model cannot be cut for `count` ranks."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        if (size := getattr(config, name)) % count:
            raise ValueError(f"{name} {size} is not a multiple of the {count} ranks; start as many as divide it")
    if kv_heads % count and count % kv_heads:
        raise ValueError(
            f"num_key_value_heads {kv_heads} is neither a multiple nor a divisor of the {count} ranks; start another "
            "number of them"
        )
    if count == 1 or scheme is None or scheme.group_size is None:
        return
    for name, size in (("o_proj", heads * config.head_dim), ("down_proj", config.intermediate_size)):
        if size % (count * scheme.group_size):
            raise ValueError(
                f"{name} has {size} inputs in groups of {scheme.group_size}, which is not a whole number of groups for "
                f"each of the {count} ranks; start fewer, or quantize with a smaller --groupsize"
            )


# The all-reduces of a small draft cost more than reading all of it on every rank, those of a large one less. They break
# even where the bytes that a rank need not read take as long as they do: on H200s, at an assumed 3.4 TB/s and 8 us each
# (see docs/gpus.md).
BYTES_READ_PER_SUM = 3.4e12 * 8e-6


def draft_ranks(config: ModelConfig, scheme: Scheme | None, step_bytes: int, ranks: Ranks) -> Ranks:
    """Say who computes the draft: the ranks together where that is faster and its sizes allow it, else each on its own.

    step_bytes: what a step of the whole draft reads. Even if each rank computes it, only rank 0's drafts are used.
    """
    num_sums = 2 * config.num_hidden_layers + 3  # the 3: the embedding's, the head's all-gather, the ids' broadcast
    if step_bytes * (1 - 1 / ranks.count) <= num_sums * BYTES_READ_PER_SUM:
        return ONE_RANK
    try:
        check_sizes(config, scheme, ranks.count)
    except ValueError:
        return ONE_RANK
    return ranks


# ---------------------------------------------------------------------------------------------------------------------
# How the ranks communicate: custom operators, opaque to torch.compile. Not made by `torch.library.custom_op`, which
# imports the compiler at the first call: an eager run's first token came a second later.

for operator in ("all_reduce", "all_gather", "broadcast"):
    torch.library.define(f"tp::{operator}", "(Tensor x) -> Tensor")


@torch.library.impl("tp::all_reduce", "CompositeExplicitAutograd")
def all_reduce(x: Tensor) -> Tensor:
    """Return the sum over all ranks, in the fastest way there is for x."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The processes


# Set in torchrun's store by the first rank that ends before the work is done: its exit status.
ENDED = "ended"
GONE = "torchrun is gone, and so this rank ends"
MOMENT = 2  # seconds


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the ranks that torchrun started, and leave them at the end; without it there is one.

    A rank that ends early, by SystemExit or an error, ends all others: it alone says why.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield ONE_RANK
        return
    # While a rank waits for the others, Python would not handle Ctrl-C: it ends the process instead.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with user_errors():
        if "LOCAL_WORLD_SIZE" not in os.environ:
            raise ValueError(f"WORLD_SIZE is {count}, but torchrun has not started this; unset it, or use torchrun")
        store, rank, count = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's setting, which leaves cores idle
        torch.set_num_threads(max(1, num_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    done = threading.Event()
    threading.Thread(target=end_with_the_others, args=(store.clone(), done), daemon=True).start()
    threading.Thread(target=end_with_the_launcher, args=(os.getppid(), done), daemon=True).start()
    try:
        yield Ranks(rank, count, torch.ops.tp.all_reduce, torch.ops.tp.all_gather, torch.ops.tp.broadcast)
        dist.barrier()  # if the group were torn down while others still work, its threads would abort them
    except SystemExit as end:
        leave(store, end.code if isinstance(end.code, int) else 1 if end.code else 0)
    except Exception as error:
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            if not another_has_ended(store):
                print(f"rank {rank} lost the others: {str(error).split('. ')[0]}", file=sys.stderr)
        else:
            traceback.print_exc()
        leave(store, 1)
    done.set()
    dist.destroy_process_group()


def leave(store: dist.Store, status: int) -> NoReturn:
    """End this process at once and, through torchrun's store, all others, whatever they are waiting for."""
    with contextlib.suppress(RuntimeError):  # torchrun is gone
        status = int(store.compare_set(ENDED, "", str(status)))
    with contextlib.suppress(OSError):  # nobody reads what we print
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def another_has_ended(store: dist.Store) -> bool:
    try:
        return store.check([ENDED])
    except RuntimeError:  # torchrun is gone
        return False


def end_with_the_others(store: dist.Store, done: threading.Event) -> None:
    """Wait, in a thread, until another rank ends early, or torchrun itself, and then end this one."""
    status = 1
    try:
        store.wait([ENDED], timedelta(days=365))
        status = int(store.get(ENDED))
    except RuntimeError:
        # The store's host may be a rank that has just finished; then this one finishes in a moment too.
        if not done.wait(MOMENT):
            say_gone()
    if not done.is_set():
        os._exit(status)


def end_with_the_launcher(launcher: int, done: threading.Event) -> None:
    """Wait, in a thread, until this node's torchrun, which may be killed alone, is no longer the parent process."""
    while os.getppid() == launcher:
        if done.wait(MOMENT):
            return
    say_gone()
    os._exit(1)


def say_gone() -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone too
        print(GONE, file=sys.stderr, flush=True)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_device(name: str, ranks: Ranks) -> str:
    """Return this rank's device. Raises ValueError where --device `name` is a single device for several ranks."""
    if ranks.count == 1 or name == "cpu":
        return name
    if name != "cuda":
        raise ValueError(f"--device {name} is one device and there are {ranks.count} ranks; give cpu or cuda")
    return f"cuda:{os.environ['LOCAL_RANK']}"


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """Make a group of all ranks, without a timeout: a user may think for hours."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def together(function: Callable[[], T], ranks: Ranks) -> T:
    """Call function on every rank. If it raises a user's mistake on any of them, rank 0 alone says so and all end."""
    if ranks.count == 1:
        return function()
    raised: BaseException | None = None
    try:
        result = function()
    except (ValueError, OSError, SystemExit) as error:
        raised = error
    mistakes: list[Any] = [None] * ranks.count
    dist.all_gather_object(mistakes, None if raised is None else str(raised), group=patient_group())
    first = next((rank for rank, mistake in enumerate(mistakes) if mistake is not None), None)
    if first is None:
        return result
    if ranks.rank == 0:
        raise raised or ValueError(f"rank {first}: {mistakes[first]}")
    while True:  # rank 0 says so, and ends all
        time.sleep(1)


def from_rank_0(function: Callable[[], T], ranks: Ranks) -> T:
    """Call function on rank 0 alone and return its result on every rank."""
    values: list[Any] = [together(lambda: function() if ranks.rank == 0 else None, ranks)]
    if ranks.count > 1:
        dist.broadcast_object_list(values, group=patient_group())
    return values[0]
