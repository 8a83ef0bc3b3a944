"""The processes that torchrun starts: how they meet, agree on a user's mistake, and end."""

import contextlib
import functools
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from checkpoint import read_files
from cli.errors import user_errors
from collectives import collectives
from model import ONE_RANK, Ranks

T = TypeVar("T")

# Set in torchrun's store by the first rank that ends before the work is done: its exit status.
ENDED = "ended"
GONE = "torchrun is gone, and so this rank ends"
MOMENT = 2  # seconds
SILENT = 30  # seconds without a sign of a rank, after which it counts as lost
STUCK = timedelta(minutes=10)  # that a rank may wait for another within a step, as when that one compiles longer
LONG = 10  # seconds, in which torchrun's store answers


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the ranks that torchrun started, and leave them at the end; without it there is one.

    A rank that ends early, by SystemExit or an error, ends all others: it alone says why.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1":
        yield ONE_RANK
        return
    # While a rank waits for the others, Python would not handle Ctrl-C: it ends the process instead.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with user_errors(signals_raise=False):
        if "LOCAL_WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"WORLD_SIZE is {world_size}, but torchrun has not started this; unset it, or use torchrun"
            )
        store, rank, count = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=STUCK)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's setting, which leaves cores idle
        torch.set_num_threads(max(1, num_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    done = threading.Event()
    threading.Thread(target=end_with_the_others, args=(store.clone(), done), daemon=True).start()
    threading.Thread(target=end_with_the_launcher, args=(os.getppid(), done), daemon=True).start()
    threading.Thread(target=end_without_a_sign, args=(store.clone(), rank, count, done), daemon=True).start()
    try:
        yield collectives(rank, count)
        dist.barrier()  # if the group were torn down while others still work, its threads would abort them
    except SystemExit as end:
        leave(store, end.code if isinstance(end.code, int) else 1 if end.code else 0)
    except Exception as error:
        end_in(LONG)
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


def end_in(seconds: float) -> None:
    """End this process in so many seconds, if it has not ended by itself: a store may be lost without an answer."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


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
            say(GONE)
    if not done.is_set():
        os._exit(status)


def end_with_the_launcher(launcher: int, done: threading.Event) -> None:
    """Wait, in a thread, until this node's torchrun, which may be killed alone, is no longer the parent process."""
    while os.getppid() == launcher:
        if done.wait(MOMENT):
            return
    say(GONE)
    os._exit(1)


def end_without_a_sign(store: dist.Store, rank: int, count: int, done: threading.Event) -> None:
    """Count in torchrun's store that this rank lives, in a thread, and end all when another has stopped to count.

    Gloo tells of a lost rank at once, but not always: of 300 that were killed between all-reduces two left the other
    waiting (torch 2.13). Where a machine lost its power, nothing tells. What passes is counted, not taken from a clock:
    a machine that slept does not count the others as lost.
    """
    signs, passed = [0] * count, [0] * count
    with contextlib.suppress(RuntimeError):  # torchrun is gone
        while not done.wait(MOMENT):
            for other in range(count):
                sign = store.add(f"sign of {other}", int(other == rank))
                passed[other] = passed[other] + MOMENT if sign == signs[other] else 0
                signs[other] = sign
            if max(passed) >= SILENT:
                end_in(LONG)
                if store.add("lost", 1) == 1:  # others see it at the same time
                    say(f"rank {rank} lost rank {passed.index(max(passed))}: no sign of it for {SILENT} seconds")
                leave(store, 1)


def say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone too
        print(message, file=sys.stderr, flush=True)


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
    dist.barrier()  # with a timeout: ranks that make a group wait for one that is lost as long as its own allows
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


def checkpoint_digests(path: Path) -> dict[Path, str]:
    """Hash the files of a folder that a text depends on; of weights 64 places, nearly all of which training changes."""
    digests = {}
    for file in read_files(path):
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for place in range(0, size, max(4096, size // 64) if file.suffix == ".safetensors" else 4096):
                stream.seek(place)
                digest.update(stream.read(4096))
        digests[file] = digest.hexdigest()
    return digests


def check_copies(checkpoint_paths: Collection[Path], ranks: Ranks) -> None:
    """Raise ValueError where a rank's copy of a checkpoint is not rank 0's: mixed weights would write a wrong text."""
    for path in checkpoint_paths if ranks.count > 1 else ():
        digests = checkpoint_digests(path)
        expected = from_rank_0(lambda: digests, ranks)  # noqa: B023  # it is called at once
        differ = sorted(file for file in {*expected, *digests} if expected.get(file) != digests.get(file))
        together(functools.partial(refuse_copies, differ), ranks)


def refuse_copies(differ: list[Path]) -> None:
    if differ:
        raise ValueError(f"{differ[0]} is not the one that rank 0 has; copy the checkpoint's folder from its node")
