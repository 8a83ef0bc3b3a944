"""A GGUF file: its metadata and tensors by name, nothing copied and nothing trusted.

Package gguf has a reader too, but that loops past the end of a file whose lengths lie, and takes seconds for a
vocabulary. Its tables of types and its `dequantize` are used.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The numbers of the types of metadata, which struct calls so.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
ELEMENTS_AT_ONCE = 1 << 22  # that are dequantized: the arithmetic holds several copies in fp32


@dataclass(frozen=True)
class GgufTensor:
    kind: Any  # a gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as torch has it
    row_bytes: int
    offset: int  # in the file


class GgufFile:
    """The metadata and the tensors of one file."""

    def __init__(self, path: Path):
        """Raises FileNotFoundError where there is no such file, ValueError where it is no whole GGUF file."""
        self.path = path
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        if not path.is_file():
            inside = next((f", such as {file}" for file in sorted(path.glob("*.gguf"))), "")
            raise FileNotFoundError(f"{path} is not a file; expected a model's .gguf{inside}")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF")
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.position = 4
        try:
            self._read_header()
        except (struct.error, EOFError):
            raise ValueError(f"{path} ({len(self.bytes)} bytes) ends within its header; download it again") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: a name or token is not UTF-8 ({error}); download it again") from None

    def _read_header(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version} is not supported; 2 and 3 are, little-endian")
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_values):
            name = self._string()
            self.values[name] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}, expected a number of bytes")
        start = -(-self.position // alignment) * alignment
        for name, dimensions, kind, offset in infos:
            self.tensors[name] = self._make_tensor(name, dimensions, kind, start + offset)
            if offset % alignment:
                raise ValueError(f"{self.path}: {name} is at {offset}, no multiple of {alignment}; download it again")
        placed = sorted(self.tensors.items(), key=lambda item: item[1].offset)
        for (name, tensor), (following, its) in pairwise(placed):
            if tensor.offset + tensor.row_bytes * math.prod(tensor.shape[:-1]) > its.offset:
                raise ValueError(f"{self.path}: tensors {name} and {following} overlap; download it again")

    def _take(self, size: int) -> int:
        """Return where the next `size` bytes begin. Raises EOFError where the file has fewer."""
        begin = self.position
        if size > len(self.bytes) - begin:
            raise EOFError
        self.position += size
        return begin

    def _scalar(self, form: str) -> Any:
        return struct.unpack_from(f"<{form}", self.bytes, self._take(struct.calcsize(f"<{form}")))[0]

    def _string(self) -> str:
        size = self._scalar("Q")
        begin = self._take(size)
        return self.bytes[begin : begin + size].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"{self.path}: metadata of type {kind} is not supported; download it again")
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == STRING:
            return [self._string() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: metadata of arrays of type {kind} is not supported")
        form = SCALARS[kind]
        begin = self._take(count * struct.calcsize(f"<{form}"))
        return list(struct.unpack_from(f"<{count}{form}", self.bytes, begin))

    def _tensor_info(self) -> tuple[str, list[int], int, int]:
        name, num_dimensions = self._string(), self._scalar("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"{self.path}: tensor {name} has {num_dimensions} dimensions; download it again")
        return name, [self._scalar("Q") for _ in range(num_dimensions)], self._scalar("I"), self._scalar("Q")

    def _make_tensor(self, name: str, dimensions: list[int], kind: int, offset: int) -> GgufTensor:
        import gguf

        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError:
            unknown = f"{self.path}: tensor {name} is of type {kind}, which package gguf does not know"
            raise ValueError(unknown) from None
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[known]
        row_bytes, rest = divmod(dimensions[0] * block_bytes, block_size)
        if rest or not all(dimensions):
            raise ValueError(
                f"{self.path}: tensor {name} of {known.name} has rows of {dimensions[0]}, expected a multiple of "
                f"{block_size}"
            )
        end = offset + row_bytes * math.prod(dimensions[1:])
        if end > len(self.bytes):
            raise ValueError(
                f"{self.path} has {len(self.bytes)} bytes and tensor {name} ends at {end}; download it again"
            )
        return GgufTensor(known, tuple(reversed(dimensions)), row_bytes, offset)

    def blocks(self, name: str) -> Any:
        """Map the bytes of a tensor as numpy's uint8 [rows, bytes of a row]; those of experts lie below each other."""
        import numpy as np

        tensor = self.tensors[name]
        count = math.prod(tensor.shape[:-1]) * tensor.row_bytes
        return np.frombuffer(self.bytes, np.uint8, count, tensor.offset).reshape(-1, tensor.row_bytes)

    def read(self, name: str, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Dequantize a tensor, or some of its rows [rows, columns], some at a time."""
        import numpy as np
        from gguf.quants import dequantize

        tensor, blocks = self.tensors[name], self.blocks(name)[rows]
        value = torch.empty(len(blocks), tensor.shape[-1], dtype=dtype)
        step = max(1, ELEMENTS_AT_ONCE // tensor.shape[-1])
        for begin in range(0, len(blocks), step):
            part = slice(begin, begin + step)
            try:
                with np.errstate(all="ignore"):  # what is not finite, the caller finds
                    dequantized = dequantize(blocks[part], tensor.kind)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: tensor {name} is of {tensor.kind.name}, which package gguf does not dequantize"
                ) from None
            value[part] = torch.from_numpy(np.require(dequantized, requirements="W"))
        return value
