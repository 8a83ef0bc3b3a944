"""Download a model from the Hugging Face Hub: its config, tokenizer and weights, and nothing twice.

    python scripts/download.py --repo_id meta-llama/Llama-3.2-1B

The folder it writes is what `generate.py --checkpoint_path` takes. Run again after an interruption, it fetches the
files that are still missing.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import contextlib
import fnmatch
import glob
import json
from collections.abc import Iterator
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS
from typing import Any

from cli.arguments import ArgumentParser
from cli.errors import user_errors
from config import OTHER_LAYOUTS
from files import check_folder, locked

COMPANIONS = ["*.json", "tokenizer.model", "merges.txt", "*.jinja", "*.md", "LICENSE*", "USE_POLICY*"]
# How weights are named, best first: a repository with several of these holds the same weights several times. Beside an
# index, which names shards however they are called, it may be one file.
WEIGHTS = ["model.safetensors", "pytorch_model.bin"]
NOTES = Path(".cache", "huggingface", "download")  # where the Hub's client notes what it has put into a folder


@contextlib.contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into a ValueError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"--repo_id {repo_id!r} is not of the form organization/name: {error}") from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{repo_id} is gated: accept its licence on its page of the Hub, then log in (hf auth login) or pass "
            "--hf_token"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repo_id} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{repo_id} was not found: check the spelling, or log in (hf auth login) if it is private"
        ) from None
    except Exception as error:  # its HTTP library's errors too, and which library that is changes between releases
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG, EACCES, EPERM, EROFS):
            raise ValueError(
                f"{repo_id} could not be written ({error.strerror}); make room, or name another --output_dir"
            ) from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{repo_id} could not be downloaded ({reason}); check the network and the token, then run this again"
        ) from None


def download(repo_id: str, output_dir: Path, revision: str | None = None, token: str | None = None) -> None:
    """Fetch the repository's files into `output_dir`: safetensors, or .bin where there are none.

    Raises ValueError that says what to do where the folder cannot be written, or the Hub refuses, cannot be reached or
    has no weights there.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with hub_errors(repo_id, revision):
        info = api.model_info(repo_id, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    weights = next((name for name in WEIGHTS if {name, f"{name}.index.json"} & set(names)), None)
    if weights is None:
        raise ValueError(f"{repo_id} has {describe_others(names)}")
    check_folder(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output_dir):
            fetch_files(api, repo_id, output_dir, info.sha, names, weights)
    except BlockingIOError:
        raise ValueError(f"another run is downloading into {output_dir}; wait for it, or name another folder") from None
    print(f"wrote {output_dir}", file=sys.stderr)


def fetch_files(api: Any, repo_id: str, output_dir: Path, revision: str | None, names: list[str], weights: str) -> None:
    """Fetch a revision's files, which are those of `names` that are read; weights: one of WEIGHTS."""
    remove_leftovers(output_dir)
    check_own_files(output_dir, names)

    def fetch(*patterns: str) -> None:
        ignored = ["*/*", *([] if weights.endswith(".bin") else ["*.bin.index.json"])]
        with hub_errors(repo_id, revision):
            api.snapshot_download(
                repo_id, revision=revision, local_dir=output_dir, allow_patterns=list(patterns), ignore_patterns=ignored
            )

    if weights in names:
        shards = [weights]
    else:
        fetch(f"{weights}.index.json")
        shards = shards_of(output_dir / f"{weights}.index.json", names)
    fetch(*COMPANIONS, *map(glob.escape, shards))


def describe_others(names: list[str]) -> str:
    """Say what a repository without weights that are read has, and what to do."""
    for pattern, cure in OTHER_LAYOUTS.items():
        if found := fnmatch.filter(names, pattern):
            return f"{found[0]} and no model.safetensors: {cure}"
    return "no model.safetensors and no pytorch_model.bin, whole or with an index; name a model that has"


def shards_of(index: Path, names: list[str]) -> list[str]:
    """Return the repository's files that an index names. Raises ValueError where it is none, or names others."""
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    if not index.is_file():  # the client goes on without it where the network is gone; ask for all that it may name
        return [name for name in names if name.endswith(suffix) and "/" not in name]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        shards = []
    if not shards:
        raise ValueError(f"{index} is no index of weights; tell the model's authors")
    for shard in shards:
        if shard not in names or "/" in shard or not shard.endswith(suffix):
            raise ValueError(f"{index} names {shard!r}, which is no file of the repository; tell the model's authors")
    return shards


def remove_leftovers(output_dir: Path) -> None:
    """Delete the half files of a run that was killed, which the Hub's client neither takes up again nor deletes."""
    for file in (output_dir / NOTES).glob("*.incomplete"):
        file.unlink(missing_ok=True)


def check_own_files(output_dir: Path, names: list[str]) -> None:
    """Raise ValueError where a file of another revision would be read, or one that is not the client's be replaced."""
    for note in sorted((output_dir / NOTES).glob("*.metadata")):
        name = note.name.removesuffix(".metadata")
        if name not in names and (output_dir / name).is_file():
            what = "is of another revision or repository and would stay beside this one's files"
            raise ValueError(f"{output_dir / name} {what}; remove it, or name another --output_dir")
    for name in sorted({name for pattern in COMPANIONS for name in fnmatch.filter(names, pattern) if "/" not in name}):
        if (output_dir / name).exists() and not (output_dir / NOTES / f"{name}.metadata").exists():
            what = "was not put there by a download and would be replaced"
            raise ValueError(f"{output_dir / name} {what}; move it away, or name another --output_dir")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo_id", required=True, help="organization/name on the Hub")
    parser.add_argument("--output_dir", type=Path, help="default: checkpoints/REPO_ID")
    parser.add_argument("--revision", help="a branch, tag or commit; default: main")
    parser.add_argument("--hf_token", help="access token for gated models; default: the one `hf auth login` stored")
    args = parser.parse_args(argv)
    # A signal ends it at once: left to itself, the client first finishes the files it is at, however large.
    with user_errors(signals_raise=False):
        download(args.repo_id, args.output_dir or Path("checkpoints") / args.repo_id, args.revision, args.hf_token)


if __name__ == "__main__":
    main()
