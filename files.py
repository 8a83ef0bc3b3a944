"""Files and folders that are there whole or not at all, and what is read of a stranger's folder."""

import contextlib
import ctypes
import glob
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int8: "I8",
    torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip

# Those too that are read and never written. A name that is missing is of no form that is looked for.
READ_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

Spec = tuple[torch.dtype, torch.Size]  # of a tensor

# A weight of one of these is cast to the run dtype; codes of a quantized weight are never cast.
FLOAT_DTYPES = {torch.bfloat16, torch.float16, torch.float32, torch.float64}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint folder's file, whether it is there or not.

    Raises ValueError where it is a link that leads out: the folder is a stranger's, what else is on the disk is not.
    In the Hub's cache the files of REPO/snapshots/REVISION are links into REPO/blobs. The models in the user's own
    cache may be linked to from anywhere, and only there `blobs` may be a link itself, to another disk.
    """
    path, home = folder / name, Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(folder) for folder in homes):
        from huggingface_hub.constants import HF_HUB_CACHE  # here, since few folders need it

        cached = (Path(os.path.realpath(part)) for part in Path(HF_HUB_CACHE).glob("models--*/*"))
        if not any(target.is_relative_to(folder) for folder in cached if folder.is_dir()):
            raise ValueError(f"{path} is a link to {target}, outside of its folder; put the file itself there")
    if path.is_symlink() and not path.exists():  # else the run would go on as if there were no such file
        raise ValueError(f"{path} is a link to nothing; download the model again")
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


def read_number(
    values: dict[str, Any], key: str, number_type: type = int, low: float = 1, high: int = 2**31 - 1, where: str = ""
) -> Any:
    """Return a number of config.json, from low to high. Raises ValueError, which names the key and its value."""
    value: Any = values.get(key)
    if type(value) not in {int, number_type} or not low <= value <= high:  # a bool is an int, but not of that type
        expected = f"{number_type.__name__} of at least {low} and at most {high}"
        raise ValueError(f"config.json: {key}{where} is {value!r}, expected {expected}")
    return number_type(value)


def read_flag(values: dict[str, Any], key: str) -> bool:
    """Return a flag of config.json. Raises ValueError where it is no bool."""
    if not isinstance(values[key], bool):
        raise ValueError(f"config.json: {key} is {values[key]!r}, expected true or false")
    return values[key]


class TensorFiles:
    """The tensors of a checkpoint folder by name, read one at a time.

    Each read opens its file anew, so that nothing but the tensors handed out stays mapped.
    """

    singles: tuple[str, ...] = ("model.safetensors",)  # what a file that holds all of a model may be called

    def __init__(self, checkpoint_path: Path):
        self.path = checkpoint_path
        # By name: the file, and the name in it, which is another where `alias` has said so; the place and number of
        # the parts that `cut` has made of it.
        self.files = {name: (file, name, 0, 0) for name, file in self._index().items()}
        self._specs: dict[str, dict[str, Spec]] = {}  # by file

    def _index(self) -> dict[str, str]:
        for single in self.singles:
            index = own_file(self.path, f"{single}.index.json")
            if own_file(self.path, single).is_file():
                return dict.fromkeys(self._names_in(single), single)
            if index.is_file():
                return self._sharded(index, Path(single).suffix)
        names = " ".join(sorted(file.name for file in self.path.glob("*model*.*")))
        cures = {
            r"pytorch_model\.bin": f"run `python scripts/convert_hf_checkpoint.py --checkpoint_dir {self.path}`",
            r"\S*-\d+-of-\d+\.\w+": "of {} and its like there is no index; download it again",
            r"\S+\.safetensors": "rename {}, if that is it",
            "": "download them (scripts/download.py)",
        }
        found, cure = next((match[0], cure) for pattern, cure in cures.items() if (match := re.search(pattern, names)))
        what = f"{self.path} has no model.safetensors and no model.safetensors.index.json"
        raise FileNotFoundError(f"{what}; {cure.replace('{}', found)}")

    def _sharded(self, index: Path, suffix: str) -> dict[str, str]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{index} has no weight_map")
        for file in sorted(set(map(str, files.values()))):
            if Path(file).name != file or Path(file).suffix != suffix or "\0" in file:
                raise ValueError(f"{index} names {file!r}, expected a {suffix} file of its own folder")
            if not own_file(self.path, file).is_file():
                raise FileNotFoundError(f"{self.path / file} is missing, but {index.name} names it; download it again")
            missing = {name for name, where in files.items() if where == file} - {*self._names_in(file)}
            if missing:
                raise ValueError(f"{self.path / file} lacks tensor {min(missing)}, which {index.name} promises")
        return files

    def _names_in(self, file: str) -> list[str]:
        with self._open(file) as tensors:
            return list(tensors.keys())

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = own_file(self.path, file)
        try:
            with safe_open(path, framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            what = f"{path} ({path.stat().st_size} bytes)"
            raise ValueError(f"{what} is not a whole safetensors file ({error}); download it again") from None

    def get(self, name: str) -> Tensor:
        file, stored, part, count = self.files[name]
        with self._open(file) as tensors:
            return part_of(tensors.get_tensor(stored), part, count)

    def spec(self, name: str) -> Spec | None:
        """Return a tensor's dtype and shape without reading it; None where there is no such tensor."""
        if name not in self.files:
            return None
        file, stored, part, count = self.files[name]
        if file not in self._specs:
            with self._open(file) as tensors:
                self._specs[file] = {key: spec_of(tensors.get_slice(key)) for key in list(tensors.keys())}
        dtype, shape = self._specs[file][stored]
        return dtype, part_of(torch.empty(shape, device="meta"), part, count).shape

    def alias(self, name: str, old: str) -> None:
        """Let a tensor be read under another name than the old one. Raises ValueError where another has that name."""
        if name in self.files and name != old:
            raise ValueError(f"{self.path} has both {old} and {name}, which are one tensor's names; download it again")
        self.files[name] = self.files.pop(old)

    def cut(self, names: Sequence[str], old: str) -> None:
        """Let a stack [X, R, ..] be read as so many tensors, one below the other; not where one is there already."""
        if self.files.keys().isdisjoint(names):
            file, stored, *_ = self.files.pop(old)
            self.files |= {name: (file, stored, part, len(names)) for part, name in enumerate(names)}

    def dtype(self) -> torch.dtype | None:
        """Return the dtype of most of the floats, of those that run; None where there are none."""
        counts = dict.fromkeys(FLOAT_DTYPES, 0)
        for dtype, shape in filter(None, map(self.spec, self.files)):
            if dtype in counts:
                counts[dtype] += shape.numel()
        dtype = max(counts, key=lambda dtype: counts[dtype])
        return None if not counts[dtype] else torch.float32 if dtype == torch.float64 else dtype


def part_of(tensor: Tensor, part: int, count: int) -> Tensor:
    """Return one of so many parts of a stack's rows [X * R, ..]; count 0: a tensor that is not cut."""
    if count == 0 or tensor.ndim < 2:
        return tensor
    rows = tensor.flatten(0, 1)
    return rows[part * len(rows) // count : (part + 1) * len(rows) // count]


def spec_of(tensor: Any) -> Spec:
    """Return the dtype and shape of a tensor, or of a safetensors' slice."""
    if isinstance(tensor, Tensor):
        return tensor.dtype, tensor.shape
    return READ_DTYPES.get(tensor.get_dtype(), torch.uint8), torch.Size(tensor.get_shape())


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def name_file(path: Path) -> Iterator[None]:
    """Add to an OSError of a write which file it was; Python says so only where one is opened."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def is_writable(folder: Path) -> bool:
    return folder.is_dir() and bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def check_folder(path: Path) -> None:
    """Raise ValueError where files could not be written into a folder, or it could not be made."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not is_writable(there):
        raise ValueError(f"{path} cannot be written: {there} is no folder that can be written to")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all; a link's target, and into what is a device or a pipe.

    Into a file of several names too, all of which mean it.
    """
    with name_file(path):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.tmp")  # a name has at most 255 bytes
        try:
            temporary.write_text(text, encoding="utf-8")
            if target.exists() and target.stat().st_nlink > 1:
                shutil.copyfile(temporary, target)
                return
            if target.exists():
                shutil.copymode(target, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, specs: dict[str, Spec], read: Callable[[str], Tensor]) -> None:
    """Write the tensors that `read` returns, one in memory at a time. Format: the safetensors README."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # data starts on a cache line
    check_free_space(path, 8 + len(encoded) + end)
    with name_file(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (dtype, shape) in specs.items():
            write_tensor(file, read(name), dtype, shape)


def check_free_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"{path} needs {needed / 1e9:.3f} GB, but {free / 1e9:.3f} GB are free; make room on the disk")


def write_tensor(file: BinaryIO, tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    assert tensor.dtype == dtype and tensor.shape == shape, (tensor.dtype, dtype, tensor.shape, shape)
    tensor = tensor.detach().to("cpu").contiguous()
    file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that is renamed to it if all goes well, and is removed if not.

    A run that is killed leaves its temporary folder, which the next one to the same path removes. Raises ValueError
    where `path` holds something already, or is a folder that has to stay.
    """
    if path.name in ("", "..") or (path.exists() and (path.is_mount() or path.samefile("."))):
        raise ValueError(f"{path} cannot be replaced by another folder; name a folder in it")
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ValueError(f"{path} exists already; remove it or name another output")
    check_folder(path)
    absent = [folder for folder in path.parents if not folder.exists()]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as ours:
            with locked(path.parent, wait=True):  # else another run could take ours for abandoned before it is locked
                for abandoned in path.parent.glob(f".{glob.escape(path.name)}.{8 * '[0-9a-f]'}.tmp"):
                    with contextlib.suppress(OSError), locked(abandoned):
                        shutil.rmtree(abandoned)
                temporary.mkdir()
                ours.enter_context(locked(temporary))
            with name_file(path):
                yield temporary
                for file in (*temporary.iterdir(), temporary):
                    sync(file)
                temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in absent:
            with contextlib.suppress(OSError):  # it is not empty: all went well
                folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder; it ends with the process, however that ends.

    Where another process holds it, wait for it or raise BlockingIOError.
    """
    import fcntl  # here, since only Unix has it, and loading a model does not need it

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk: a loss of power cannot leave half of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sibling(path: Path, suffix: str) -> Path:
    """Return the folder beside `path` whose name has `suffix` too; in ./checkpoints for one of the Hub's cache."""
    if path.name in ("", ".."):  # "." and ".." do not say what the folder is called
        path = path.resolve()
    cached = path.parent.parent.name  # as models--organization--name/snapshots/commit
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        path = Path("checkpoints", *cached.split("--")[1:])
    return path.with_name(path.name + suffix)
