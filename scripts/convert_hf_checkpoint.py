"""Convert a Hub folder to the form that loads fastest: one memory-mapped file, matrices stacked, in the run dtype.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

Reads safetensors and .bin weights (pickles with `weights_only=True`), one tensor in memory at a time. The output takes
its name only when it is whole.
"""

import contextlib
import functools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import ModelReader, checkpoint_dtype, companions, copy_texts, write_config
from cli.arguments import ArgumentParser, checkpoint_folder
from cli.errors import user_errors
from config import DTYPES, is_head, read_config
from files import (
    FLOAT_DTYPES,
    SAFETENSORS_DTYPES,
    Spec,
    TensorFiles,
    new_folder,
    own_file,
    sibling,
    spec_of,
    write_safetensors,
)
from quantization import CONFIG_KEYS


class AnyFiles(TensorFiles):
    """The tensors of a folder of safetensors or .bin files."""

    singles = ("model.safetensors", "pytorch_model.bin")

    def __init__(self, checkpoint_path: Path):
        # A file in the format before torch 1.6 cannot be mapped but is read whole, so the last one is kept.
        self._read_legacy = functools.lru_cache(maxsize=1)(read_pickle)
        super().__init__(checkpoint_path)

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        if file.endswith(".bin"):
            path = own_file(self.path, file)
            yield read_pickle(path) if is_zip(path) else self._read_legacy(path)
        else:
            with super()._open(file) as tensors:
                yield tensors


class StateDict(dict[str, Tensor]):
    """The tensors of a .bin file, read as those of an open safetensors file are."""

    get_tensor = get_slice = dict.__getitem__


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def read_pickle(path: Path) -> StateDict:
    """Read a .bin state dict without running code from it; mapped, unless it is in the format before torch 1.6."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        reason = "it asks to run code" if "GLOBAL" in str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights ({reason}); download it again") from None
    entries = tensors.items() if isinstance(tensors, dict) else [(None, tensors)]
    if not all(isinstance(name, str) and isinstance(t, Tensor) and not t.is_meta for name, t in entries):
        raise ValueError(f"{path} holds more than tensors by name, which is all that weights are")
    return StateDict(tensors)


def convert(checkpoint_dir: Path, output_dir: Path, dtype_name: str | None = None) -> None:
    """Write `checkpoint_dir` to `output_dir` in the fused layout; dtype None keeps the checkpoint's own.

    Raises ValueError or FileNotFoundError, and then leaves nothing behind.
    """
    raw = read_config(checkpoint_dir)
    if raw.get("layout") == "fused":
        raise ValueError(f"{checkpoint_dir} is converted already")
    companions(checkpoint_dir)  # for what it refuses, before the work
    dtype = DTYPES[dtype_name] if dtype_name else checkpoint_dtype(checkpoint_dir, raw, AnyFiles)
    if is_head(raw):
        copy_head(checkpoint_dir, output_dir, raw, dtype)
        return
    reader = ModelReader(checkpoint_dir, dtype, keep_codes=False, files_class=AnyFiles)
    with new_folder(output_dir) as folder:
        with tqdm(total=len(reader.specs), desc="convert", unit="tensor", dynamic_ncols=True) as bar:
            write_safetensors(
                folder / "model.safetensors", reader.specs, lambda name: (bar.update(), reader.read(name))[1]
            )
        raw = {key: value for key, value in reader.raw.items() if key not in CONFIG_KEYS}
        write_config(raw | {"layout": "fused"}, dtype, folder)
        copy_texts(checkpoint_dir, folder)
    print(f"wrote {output_dir}", file=sys.stderr)
    if not any(
        (output_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "merges.txt", "tekken.json")
    ):
        print(
            f"but no tokenizer, since {checkpoint_dir} has none: no .json, no .model and no merges.txt", file=sys.stderr
        )


def copy_head(checkpoint_dir: Path, output_dir: Path, raw: dict[str, Any], dtype: torch.dtype) -> None:
    """Write an EAGLE-3 head's tensors as they are called; only with a model it is known what they have to be."""
    files = AnyFiles(checkpoint_dir)
    specs: dict[str, Spec] = {}
    for name in files.files:
        held_as, shape = spec_of(files.get(name))
        if held_as not in SAFETENSORS_DTYPES:
            raise ValueError(f"{checkpoint_dir}: tensor {name} is {held_as}, which no head has")
        specs[name] = (dtype if held_as in FLOAT_DTYPES else held_as), shape
    with new_folder(output_dir) as folder:
        write_safetensors(folder / "model.safetensors", specs, lambda name: files.get(name).to(specs[name][0]))
        write_config(raw, dtype, folder)
        copy_texts(checkpoint_dir, folder)
    print(f"wrote {output_dir}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint_dir", type=checkpoint_folder, required=True, help="a folder as downloaded from the Hub"
    )
    parser.add_argument("--output_dir", type=Path, help="default: CHECKPOINT_DIR-converted")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    args = parser.parse_args(argv)
    with user_errors():
        convert(args.checkpoint_dir, args.output_dir or sibling(args.checkpoint_dir, "-converted"), args.dtype)


if __name__ == "__main__":
    main()
