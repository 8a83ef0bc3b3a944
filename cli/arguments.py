"""What the commands' options share: argparse with one-line errors, checked ranges, folders, files and devices."""

import argparse
import difflib
import importlib.util
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from cli.errors import one_line
from files import is_writable

ROOT = Path(__file__).resolve().parents[1]


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
        namespace = super().parse_args(*args, **kwargs)
        if "checkpoint_path" in namespace and "revision" in namespace:  # after all options: one depends on the other
            try:
                namespace.checkpoint_path = checkpoint_folder(str(namespace.checkpoint_path), namespace.revision)
            except argparse.ArgumentTypeError as error:
                self.error(f"argument --checkpoint_path: {error}")
        return namespace

    def error(self, message: str) -> NoReturn:
        for word in message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else ():
            if close := difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, 1, 0.8):
                message += f"; did you mean {close[0]}?"
        self.exit(2, f"error: {one_line(message)}\n")


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


def checkpoint_folder(text: str, revision: str | None = None) -> Path:
    """Find the folder of a checkpoint, given by its path or as the Hub's organization/name: an argparse type.

    A name stands for the folder that scripts/download.py writes, and for the model in the Hub's own cache (HF_HOME);
    with a revision for the latter alone, since the former does not say which one it is. What begins with checkpoints/
    may also be beside the program, as the demo is.
    """
    path, text = Path(text), text.rstrip("/") or text
    try:
        text.encode()
        is_there = path.exists()
    except UnicodeEncodeError:  # SentencePiece and safetensors take no other names
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; rename the folder") from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be a folder: {error.strerror}") from None
    if not is_there and path.parts[:1] == ("checkpoints",) and (ROOT / path).is_dir():
        path = ROOT / path  # typed in another folder than the program's
    is_path = path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", text)
    downloaded = Path("checkpoints") / path
    if path.resolve().name.startswith("models--") and (path / "snapshots").is_dir():
        path = repository = path.resolve()
    elif is_path:
        if revision is not None:
            raise argparse.ArgumentTypeError(
                f"--revision {revision} is for a model of the Hub by its name, and {text} is a folder; leave it out"
            )
        if mistake := find_mistake(path):
            raise argparse.ArgumentTypeError(f"{path} {mistake}")
        return path
    elif downloaded.is_dir() and revision is None:
        return downloaded
    else:
        from huggingface_hub.constants import HF_HUB_CACHE  # here, since it is slow to load

        repository = Path(HF_HUB_CACHE, f"models--{text.replace('/', '--')}")
    try:
        found = cached_snapshot(repository, revision)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if found is None and revision is None and repository != path and path.parent.is_dir():  # a path rather
        if mistake := find_mistake(path):
            raise argparse.ArgumentTypeError(f"{path} {mistake}")
        return path
    if found is None and revision is not None:
        raise argparse.ArgumentTypeError(
            f"revision {revision} of {text} is not in the Hub's cache; run `python scripts/download.py --repo_id "
            f"{repository.name.removeprefix('models--').replace('--', '/')} --revision {revision} --output_dir DIR` "
            "and name DIR without --revision"
        )
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text} is neither a folder in {Path.cwd()} nor a model in the Hub's cache; for one of the Hub run "
            f"`python scripts/download.py --repo_id {text}` first"
            if repository != path
            else f"{text} has no snapshot of main; download the model again"
        )
    return found


def find_mistake(path: Path) -> str | None:
    """Say why a path is not a checkpoint's folder, and what to name in its place; None where nothing shows it."""
    if path.is_dir():
        models = [file.parent for file in path.glob("*/config.json") if file.is_file()]
        if (path / "config.json").exists() or not models:
            return None
        return f"has no config.json; name a folder in it, such as {min(models)}"
    if path.suffix == ".gguf":  # `read_config` says what to do
        return None
    if path.is_file() and (path.parent / "config.json").is_file():
        return f"is not a folder; name the one that it is in, {path.parent}"
    close = difflib.get_close_matches(path.name, [folder.name for folder in path.parent.glob("*/")], 1)
    meant = f"; did you mean {path.parent / close[0]}?" if close else ""
    return f"is not a folder; name one or organization/name of the Hub{meant}"


def cached_snapshot(repository: Path, revision: str | None = None) -> Path | None:
    """Find a revision in a `models--ORGANIZATION--NAME` folder of the Hub's cache; None where it is not there.

    The revision is a branch, a tag or the beginning of a commit. Without one it is main, or else the only snapshot.
    Raises ValueError where there are several.
    """
    snapshots = sorted(folder for folder in repository.glob("snapshots/*") if folder.is_dir())
    ref = repository / "refs" / (revision or "main")
    commit = ref.read_text(errors="replace").strip() if ref.is_file() else revision
    found = [folder for folder in snapshots if folder.name == commit]
    if not found and (not revision or re.fullmatch("[0-9a-f]{7,40}", revision)):
        found = [folder for folder in snapshots if folder.name.startswith(revision or "")]
        if found and commit and not revision and os.environ.get("RANK", "0") == "0":
            print(f"{repository}: main is {commit[:12]}, which is not there; {found[0].name[:12]} is", file=sys.stderr)
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(
            f"{repository} has several snapshots {f'of {revision}' if revision else 'and none of main'}; name one's "
            f"folder or --revision: {names}"
        )
    return found[0] if found else None


def add_checkpoint_options(parser: argparse._ActionsContainer, default: Path, what: str) -> None:
    """Add --checkpoint_path, which `parse_args` makes a folder of, and --revision."""
    parser.add_argument("--checkpoint_path", default=default, metavar="DIR", help=f"{what} (checkpoints/demo)")
    parser.add_argument("--revision", metavar="NAME", help="with a name on the Hub: a branch, tag or commit (main)")


def check_writable(option: str, path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise ValueError where files.write_whole could not write what an option asks for, or would destroy something.

    inputs: the files that the run reads.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        status = None
    except OSError as error:  # links in a circle, a file where a folder should be
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}; name another file") from None
    if status is not None:
        mode = status.st_mode
        # The bits and not os.access, which grants root everything: a file that is protected is meant to be.
        if not mode & 0o222:
            raise ValueError(f"{option} {path} is protected against writing; change that, or name another file")
        if stat.S_ISDIR(mode) or stat.S_ISSOCK(mode):
            what = "folder" if stat.S_ISDIR(mode) else "socket"
            raise ValueError(f"{option} {path} cannot be written: it is a {what}, expected a file")
        if not stat.S_ISREG(mode):
            return
        if any(path.samefile(file) for file in inputs if file.exists()) or is_stream(status, 0):
            raise ValueError(f"{option} {path} is a file that this run reads; name another file")
        if is_stream(status, 1) or is_stream(status, 2):
            raise ValueError(f"{option} {path} is the file that this run prints to; name another file")
    if not is_writable(folder := Path(os.path.realpath(path)).parent):
        raise ValueError(f"{option} {path} cannot be written: {folder} is no folder that can be written to")


def is_stream(status: os.stat_result, descriptor: int) -> bool:
    """Say whether a file is the one of stdin (0), stdout (1) or stderr (2), which may be closed."""
    try:
        return os.path.samestat(status, os.fstat(descriptor))
    except OSError:
        return False


def check_stdout() -> None:
    """Raise ValueError where stdout's encoding lacks characters that a text may have.

    Before the run, since the first such character would end it half-way, and instead of escapes, which a reader could
    not tell from the text. An error handler that the user has named (PYTHONIOENCODING=ascii:replace) is their choice.
    """
    encoding = getattr(sys.stdout, "encoding", None)  # None: a program has put something of its own there
    try:
        "\U0001f600".encode(encoding or "utf-8", getattr(sys.stdout, "errors", None) or "strict")
    except UnicodeEncodeError:
        raise ValueError(
            f"stdout's encoding is {encoding}, which lacks characters that a text may have; set PYTHONIOENCODING=utf-8"
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
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        reason = f"{str(error).splitlines()[0]}, and PyTorch finds {count} GPUs here"
        raise ValueError(
            f"--device {name} cannot be used ({reason}); give --device cpu or a GPU that is there"
        ) from None


def number(number_type: type, low: float, high: float | None = None, *, above: bool = False) -> Callable[[str], Any]:
    """Make an argparse type for int or float from low (excluded if `above`) to high.

    high: None for the largest 32-bit int, or the largest float, which is below infinity.
    """
    highest = high if high is not None else 2**31 - 1 if number_type is int else sys.float_info.max

    def parse(text: str) -> Any:
        try:
            value = number_type(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {number_type.__name__}") from None
        if not low <= value <= highest or (above and value == low):
            is_told = high is not None or value > highest
            bound = f"{'above' if above else 'at least'} {low:g}" + f" and at most {highest}" * is_told
            raise argparse.ArgumentTypeError(f"{value} is out of range, expected {bound}")
        return value

    return parse
