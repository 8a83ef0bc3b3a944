"""What the commands share: one-line errors with exit status 2, options that check their range, files."""

import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import interrupt


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not the whole usage.

    ranks: whether several processes, as torchrun starts them, share the command's work.
    """

    def __init__(self, *args: Any, ranks: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ranks = ranks

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:  # type: ignore[override]
        # Some schedulers set WORLD_SIZE too, around a process that is alone; LOCAL_WORLD_SIZE is torchrun's.
        count = os.environ.get("WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else "1"
        if count != "1" and not self.ranks:
            if os.environ.get("RANK") != "0":  # the first one says so
                sys.exit(2)
            self.error(f"{self.prog} is for one process, and torchrun has started {count}; run it without torchrun")
        return super().parse_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        for word in message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else ():
            if close := difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, 1, 0.8):
                message += f"; did you mean {close[0]}?"
        self.exit(2, f"error: {one_line(message)}\n")


class Terminated(BaseException):
    """SIGTERM came."""


def one_line(message: str) -> str:
    """Return a message as one line of bounded length, control characters escaped: it may quote a stranger's file."""
    words = " ".join(message.split())
    words = words if len(words) <= 1000 else f"{words[:600]} ... {words[-400:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit status 2.

    Ctrl-C and a closed pipe end quietly, SIGTERM with a line and status 143, each after what was begun is removed.
    """
    try:
        with ctrl_c_raises(), sigterm_raises():
            yield
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except Terminated:
        print("ended by SIGTERM", file=sys.stderr)
        sys.exit(143)
    except BrokenPipeError:  # the reader of our stdout left, as in `| head -1`
        drop_stdout()
        sys.exit(0)
    except (ValueError, OSError) as error:
        fail(str(error))
    except (RuntimeError, MemoryError) as error:
        reason = next((line for line in str(error).splitlines() if "allocate" in line), None)
        if reason is None and not isinstance(error, MemoryError):
            raise
        fail(f"out of memory ({reason or 'in Python'}); give fewer rows, a shorter text or a smaller --dtype")


def fail(message: str) -> NoReturn:
    print("error:", one_line(message), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # it was stdout that failed; Python would try again at its end
        drop_stdout()
    sys.exit(2)


def drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt where it would end the process at once, as it does again afterwards."""
    if signal.getsignal(signal.SIGINT) is not interrupt.end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt.end)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise Terminated, so that `finally` runs; not where Ctrl-C too ends the process at once."""
    taken = signal.getsignal(signal.SIGTERM) != signal.SIG_DFL or signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    if taken or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add to an OSError of a write which file it was; Python says so only where one is opened."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint folder's file, whether it is there or not.

    Raises ValueError where it is a link that leads out: the folder is a stranger's, what else is on the disk is not.
    In the Hub's cache the files of REPO/snapshots/REVISION are links into REPO/blobs.
    """
    path, home = folder / name, Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(folder) for folder in homes):
        raise ValueError(f"{path} is a link to {target}, outside of its folder; put the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's file of one JSON object. Raises ValueError where it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_text(option: str, path: Path) -> str:
    """Read the file that `option` names, line ends untouched. Raises ValueError where it is empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8: {error}") from None
    if not text:
        raise ValueError(f"{option} {path} is empty")
    return text


def checkpoint_folder(text: str) -> Path:
    """Find the folder of a checkpoint, given by its path or as the Hub's organization/name: an argparse type.

    A name stands for the folder that scripts/download.py writes, and for the model in the Hub's own cache (HF_HOME).
    """
    path = Path(text)
    # What begins with a folder that is there is meant as a path.
    if path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or path.parent.is_dir():
        return path
    downloaded = Path("checkpoints") / path
    if downloaded.is_dir():
        return downloaded
    from huggingface_hub import errors, snapshot_download  # here, since it is slow to load

    try:
        return Path(snapshot_download(text, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a folder in {Path.cwd()} nor a model in the Hub's cache; for one of the Hub run "
            f"`python scripts/download.py --repo_id {text}` first"
        ) from None


def need_triton(command: str) -> None:
    """Raise ValueError where a command's compiler for GPUs is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{command} needs Triton, which is in requirements-dev.txt")


def check_device(name: str) -> None:
    """Raise ValueError where --device `name` is not one that works here; a GPU becomes the current one, for Triton."""
    import torch  # here, since not every command needs it

    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; cpu and cuda are")
    try:
        device = torch.empty(0, device=name).device  # with its index, without which set_device refuses «cuda»
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], Any]:
    """Make an argparse type for int or float from low (excluded if `above`) to high."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not low <= value <= high or (above and value == low):
            bound = f"{'above' if above else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < float("inf") else ""
            )
            raise argparse.ArgumentTypeError(f"{value} is out of range, expected {bound}")
        return value

    return parse
