"""Ids to text as they come, by what tokenizer.py read: a table of bytes, or a decoder of package `tokenizers`.

Its decoders are of many kinds. None is written anew here.
"""

import codecs
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tokenizers


class Library(NamedTuple):
    """How package `tokenizers` decodes the ids of one tokenizer.json."""

    decode: Callable[[list[int]], str]
    is_local: bool  # what was decoded stays when ids follow, and depends on no more than the id before
    joins_bytes: bool  # of all tokens (ByteLevel): an unfinished character may be finished by the next
    byte_ids: frozenset[int]  # of one byte each (ByteFallback): a run of them is decoded whole, all of it or none


class BytesText:
    """The text of ids whose bytes are joined."""

    def __init__(self, token_bytes: dict[int, bytes], strips_space: bool):
        self.token_bytes, self.strips_space = token_bytes, strips_space
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: list[int]) -> str:
        data = b"".join(self.token_bytes.get(i, b"") for i in ids)
        if data and self.strips_space:
            data = data.removeprefix(b" ")
            self.strips_space = False
        return self.utf8.decode(data)

    def rest(self) -> str:
        return "\ufffd" if self.utf8.getstate()[0] else ""


class LibraryText:
    """The text of ids that package `tokenizers` decodes, a few at a time.

    Its own DecodeStream loses the space after a special token, fails where a byte makes those before it invalid, and
    never shows a U+FFFD at the end.
    """

    def __init__(self, library: Library, token_bytes: dict[int, bytes]):
        self.library, self.token_bytes = library, token_bytes
        # Ids that are decoded together, how many of them have been read, and the text of these.
        self.window, self.num_read, self.text = list[int](), 0, ""
        self.last = ""  # what the window was decoded to last, if that is not certain

    def push(self, ids: list[int]) -> str:
        self.window += [i for i in ids if self.token_bytes.get(i)]
        end = self.num_read + self._num_whole(self.window[self.num_read :])
        if end == self.num_read:
            return ""
        text, before = self.library.decode(self.window[:end]), self.text
        begin, self.num_read = self.num_read, end
        if not self.library.is_local:  # certain is what the last ids did not change
            text, self.last = os.path.commonprefix([text, self.last]), text  # noqa: RUF071  # of characters
            self.text = max(before, text, key=len)
            return self.text[len(before) :]
        self.text = text
        # The next window begins with ids of some text: before a first text a decoder may strip spaces.
        if alone := self.library.decode(self.window[begin:end]):
            self.window, self.num_read, self.text = self.window[begin:], end - begin, alone
        return text[len(before) :]

    def rest(self) -> str:
        return self.library.decode(self.window)[len(self.text) :]

    def _num_whole(self, ids: list[int]) -> int:
        """Return how many of the ids stand before those that wait for others."""
        num = len(ids)
        while num and (ids[num - 1] in self.library.byte_ids or (self.library.joins_bytes and self._is_cut(ids[:num]))):
            num -= 1
        return num

    def _is_cut(self, ids: list[int]) -> bool:
        joined = BytesText(self.token_bytes, strips_space=False)
        joined.push(ids)
        return joined.rest() != ""


def decoder_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in decoder_steps(inner)]


def read_library(backend: "tokenizers.Tokenizer", steps: list[dict[str, Any]]) -> Library:
    kinds = [step["type"] for step in steps]
    fused = next((i for i, kind in enumerate(kinds, start=1) if kind in ("Fuse", "ByteLevel")), len(kinds))

    def decode(ids: list[int]) -> str:
        try:  # all added tokens are marked special here
            return backend.decode(ids, skip_special_tokens=False) if ids else ""
        except BaseException as error:  # its panics are of no narrower kind
            if type(error).__name__ != "PanicException":
                raise
            return ""  # Strip panics where a text is shorter than what it strips

    return Library(
        decode,
        # CTC leaves out a token equal to the one before, both as the steps before it have made them.
        "CTC" not in kinds[1:] and all(map(is_local, steps[fused:])),
        "ByteLevel" in kinds,
        frozenset(i for token, i in backend.get_vocab().items() if "ByteFallback" in kinds and is_byte(token)),
    )


def is_local(step: dict[str, Any]) -> bool:
    """Say whether a step, which sees the whole text, changes a character for itself or at the text's beginning."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in ("Fuse", "Metaspace") or (step["type"] == "Strip" and not step["stop"])


def is_byte(piece: str) -> bool:
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece) is not None


# ---------------------------------------------------------------------------------------------------------------------
# What bytes a token of a vocabulary stands for


def byte_alphabet() -> dict[str, int]:
    """Return the printable characters that stand for the 256 bytes in byte-level BPE (GPT-2's choice)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in token])
    except KeyError:  # an added token, which is written as it is
        return token.encode()


def piece_bytes(piece: str) -> bytes:
    """Return what a SentencePiece piece stands for: ▁ is a space, <0x0A> the byte 10."""
    if is_byte(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
