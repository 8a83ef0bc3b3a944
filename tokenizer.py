"""Text <-> token ids, for the tokenizer files that Llama-family checkpoints come with.

- tokenizer.json, read by package `tokenizers`, where the folder has one, or Mistral's tekken.json (tekken.py);
- tokenizer.model, a SentencePiece model (Llama 2, Mistral) or a tiktoken file (Llama 3), told apart by content;
- vocab.json and merges.txt, of which package `tokenizers` makes the same as of a tokenizer.json.

    ids = load_tokenizer("checkpoints/demo").encode("def main():")

Each becomes a table of the bytes that every id stands for, and a function that encodes. The package decodes what it
encodes (detokenizer.py); of the others the bytes are joined. A prompt is to be continued, so an EOS that a tokenizer
would append is left out.
"""

import base64
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from detokenizer import BytesText, Library, LibraryText, byte_level_bytes, decoder_steps, piece_bytes, read_library
from files import own_file
from special_tokens import (
    declared_special,
    named_special,
    read_settings,
    special_names,
    token_flags,
    token_name,
    tokenizer_settings,
)
from tekken import TEKKEN_SETTINGS, read_tekken

if TYPE_CHECKING:
    import tokenizers

# Appended to a serialized SentencePiece model this switches add_dummy_prefix off: to protobuf, bytes that follow a
# message are merged into it. The field is ModelProto.normalizer_spec (3) . add_dummy_prefix (3) = false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

LLAMA3_NUM_RANKS = 128000
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The expression fails on much longer runs of whitespace; Meta's own code cuts them here too.
LLAMA3_MAX_WHITESPACE = 25000
# The names of Llama 3.1 and 3.2, in the order of their ids; in 3.0 some of them are reserved ones.
LLAMA3_SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The interface


@dataclass(frozen=True, repr=False, eq=False)  # a table of 128,000 rows is neither to print nor to compare
class Tokenizer:
    token_bytes: dict[int, bytes]  # what each id stands for; empty for special tokens
    encode_text: Callable[[str, bool], list[int]]  # (text, parse_special) -> ids without BOS
    bos_id: int | None  # None: this tokenizer puts nothing before a text
    strips_leading_space: bool = False  # SentencePiece puts a space before a text, and decoding takes it away
    added_ids: dict[str, int] = field(default_factory=dict)  # the strings that parse_special turns into ids
    library: Library | None = None  # decodes instead of token_bytes, which then are there to be compared
    named_bos_id: int | None = None  # those that tokenizer_config.json names, put into texts or not
    named_eos_id: int | None = None

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1; a model may have more rows, as padding."""
        return max(self.token_bytes) + 1

    def encode(self, text: str, bos: bool = True, parse_special: bool = True) -> list[int]:
        """Encode a text, with BOS before it unless the text itself begins with the BOS string.

        parse_special: strings such as <|eot_id|> in the text become their ids, as in a rendered chat template; False
        takes every added token literally, as text that is not trusted needs.
        Raises ValueError where the text is not Unicode (lone surrogates).
        """
        check_unicode(text)
        ids = self.encode_text(text, parse_special)
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; special tokens and a model's padding rows are nothing, invalid UTF-8 becomes U+FFFD.

        Raises ValueError where an id is negative.
        """
        stream = TextStream(self)
        return stream.push(ids) + stream.flush()


class TextStream:
    """Turn ids into text as they come; a character split over several tokens waits for its last one.

    The pieces joined are decode(prompt_ids + ids) without the decode(prompt_ids) before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        library, table = tokenizer.library, tokenizer.token_bytes
        self.text = LibraryText(library, table) if library else BytesText(table, tokenizer.strips_leading_space)
        self.shown = ""
        self.push(prompt_ids)
        # decode(prompt_ids) shows what waits at the prompt's end, often as U+FFFD: it is not shown again.
        self.shown = self.text.rest()

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that is whole with these ids."""
        return self._new_text(self.text.push(list(map(self._checked, ids))))

    def flush(self) -> str:
        """Return what is left: U+FFFD for an unfinished character."""
        return self._new_text(self.text.rest())

    def _checked(self, token: int) -> int:
        if token < 0:
            raise ValueError(f"token id {token} is negative; the ids are 0 to {self.tokenizer.vocab_size - 1}")
        return token

    def _new_text(self, text: str) -> str:
        if self.shown.startswith(text):
            text, self.shown = "", self.shown[len(text) :]
        elif self.shown:
            text, self.shown = text.removeprefix(self.shown), ""
        return text


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has the lone surrogate {text[error.start]!r} at position {error.start}, which is no character; "
            "give valid UTF-8"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# From a folder


def load_tokenizer(checkpoint_path: str | Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder.

    Raises FileNotFoundError where there is none, and ValueError where its file is broken or of a kind not supported.
    """
    folder = Path(checkpoint_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected a checkpoint folder with its tokenizer files")
    settings = tokenizer_settings(folder)
    if (path := own_file(folder, "tokenizer.json")).is_file():
        return load_backend(path, read_tokenizer_json(path), settings)
    if (path := own_file(folder, "tekken.json")).is_file():
        return load_backend(path, read_tekken(path), TEKKEN_SETTINGS | settings)
    if (path := own_file(folder, "tokenizer.model")).is_file():
        return load_tiktoken(path, settings) if is_tiktoken(path) else load_sentencepiece(path, settings)
    if (path := own_file(folder, "vocab.json")).is_file() and own_file(folder, "merges.txt").is_file():
        settings = {"model_type": read_settings(folder, "config.json").get("model_type")} | settings
        settings = bpe_defaults(settings) | settings
        return load_backend(path, read_bpe_files(path, settings), settings)
    raise FileNotFoundError(f"{folder} has no tokenizer.json and no tokenizer.model; download the model's whole folder")


def choose_bos(settings: dict[str, Any], own: int | None, id_of: Callable[[str], int | None]) -> int | None:
    """Return the id that a tokenizer.model puts before a text: its `own`, unless add_bos_token says otherwise."""
    add, name = settings.get("add_bos_token"), token_name(settings.get("bos_token"))
    if add is False:
        return None
    if add is None or name is None:
        return own
    bos = id_of(name)
    if bos is None:
        raise ValueError(f"tokenizer_config.json: bos_token {name!r} is not in the vocabulary; set add_bos_token false")
    return bos


def named_id(settings: dict[str, Any], key: str, own: int | None, id_of: Callable[[str], int | None]) -> int | None:
    """Return the id of the token that the settings name as `key`; the file's `own` where they lack the key."""
    name = token_name(settings.get(key))
    return own if key not in settings else id_of(name) if name else None


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def read_tokenizer_json(path: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower kind
        raise ValueError(f"{path} cannot be read as a tokenizer.json ({error}); download it again") from None
    backend.no_truncation()  # both may be left in the file from training
    backend.no_padding()
    return backend


def load_backend(path: Path, backend: "tokenizers.Tokenizer", settings: dict[str, Any]) -> Tokenizer:
    steps = decoder_steps(json.loads(backend.decoder.__getstate__())) if backend.decoder else []
    to_bytes = byte_level_bytes if any(step["type"] == "ByteLevel" for step in steps) else piece_bytes
    special_ids, id_of = mark_added_tokens_(backend, settings), backend.token_to_id

    def encode_text(text: str, parse_special: bool) -> list[int]:
        backend.encode_special_tokens = not parse_special
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # its panics are of no narrower kind
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{path}: package tokenizers fails on {text[:60]!r}: {error}; give another text") from None

    return Tokenizer(
        {i: b"" if i in special_ids else to_bytes(token) for token, i in backend.get_vocab().items()},
        encode_text,
        # `transformers` 5 reads no add_bos_token beside a tokenizer.json.
        post_processor_bos(path, backend) if path.name == "tokenizer.json" else choose_bos(settings, None, id_of),
        any(step.get("start") or step.get("prepend_scheme", "never") != "never" for step in steps),
        {token.content: i for i, token in backend.get_added_tokens_decoder().items()},
        read_library(backend, steps),
        named_id(settings, "bos_token", None, id_of),
        named_id(settings, "eos_token", None, id_of),
    )


def mark_added_tokens_(backend: "tokenizers.Tokenizer", settings: dict[str, Any]) -> set[int]:
    """Mark every added token as special, and return the ids of those that really are.

    As in `transformers`, these are those with the flag, here or in added_tokens_decoder, and those that have a key of
    their own; a list, such as additional_special_tokens, makes special what was not added yet.

    `encode_special_tokens` takes only marked tokens literally, and text that is not trusted must reach none of them:
    DeepSeek's <｜User｜> is not marked, for one.
    """
    from tokenizers import AddedToken

    added = list(backend.get_added_tokens_decoder().values())
    flags = settings.get("added_tokens_decoder")
    flagged = [token for token in (flags.values() if isinstance(flags, dict) else ()) if isinstance(token, dict)]
    special = [*named_special(settings).values(), *(token for token in flagged if token.get("special"))]
    listed = special_names(settings) - {token.content for token in added}
    names = listed | {name for name in map(token_name, special) if name}
    in_vocabulary = {name for name in names if backend.token_to_id(name) is not None}
    added += [AddedToken(name, special=True) for name in in_vocabulary - {token.content for token in added}]
    hidden = [token.content for token in added if token.special or token.content in names]
    backend.add_special_tokens(added)  # this sets their flag
    return {i for i in map(backend.token_to_id, hidden) if i is not None}


def post_processor_bos(path: Path, backend: "tokenizers.Tokenizer") -> int | None:
    encoding = backend.encode("a")
    num_before = [*encoding.special_tokens_mask, 0].index(0)
    if num_before > 1:
        raise ValueError(f"{path} puts {num_before} tokens before a text; at most one, BOS, is supported")
    return encoding.ids[0] if num_before else None


# ---------------------------------------------------------------------------------------------------------------------
# vocab.json and merges.txt


def bpe_defaults(settings: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens of a class that declares none; like all else below they are those of `transformers`."""
    kinds = ("eos", "unk", "pad") if is_qwen2(settings) else ("bos", "eos", "unk")
    return {f"{kind}_token": "<|endoftext|>" for kind in kinds}


def is_qwen2(settings: dict[str, Any]) -> bool:
    kind, family = str(settings.get("tokenizer_class")), str(settings["model_type"])
    return kind.startswith("Qwen2Tokenizer") or (family.startswith("qwen") and not kind.startswith("GPT2Tokenizer"))


def read_bpe_files(path: Path, settings: dict[str, Any]) -> "tokenizers.Tokenizer":
    """Build the byte-level BPE of Qwen2 where the settings or the family name it, else GPT-2's. path: vocab.json."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(path.with_name("merges.txt"))))
    except Exception as error:  # the package raises no narrower kind
        raise ValueError(f"{path} and merges.txt cannot be read as a BPE ({error}); download both again") from None
    pre_tokenizer: Any = pre_tokenizers.ByteLevel(bool(settings.get("add_prefix_space")), not is_qwen2(settings))
    if is_qwen2(settings):
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN.replace("{1,3}", "")), "isolated")
        pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizer])
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    added = sorted(read_added_tokens(path.parent, settings, special_names(settings)))
    for token in added:  # one at a time, since each takes the next free id
        backend.add_tokens([tokenizers.AddedToken(token.content, special=token.special, **token.flags)])
        if (i := backend.token_to_id(token.content)) != token.id:
            raise ValueError(f"{path}: added token {token.content!r} has id {token.id}, and {i} is the next free")
    for declared in declared_special(settings):
        if (name := token_name(declared)) not in {token.content for token in added}:
            backend.add_tokens([tokenizers.AddedToken(name, special=True, **token_flags(declared))])
    return backend


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece


class AddedToken(NamedTuple):
    id: int
    content: str
    special: bool
    flags: dict[str, bool]  # as package `tokenizers` has them


def load_sentencepiece(path: Path, settings: dict[str, Any]) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        first = SentencePieceProcessor(model_file=str(path))
        later = SentencePieceProcessor(model_proto=path.read_bytes() + NO_DUMMY_PREFIX)
    except RuntimeError:
        raise ValueError(f"{path} is neither a SentencePiece model nor a tiktoken file; download it again") from None
    if settings.get("legacy"):  # a space comes after each special token too, as it comes before a text
        later = first

    names = special_names(settings)
    pieces = {i: first.id_to_piece(i) for i in range(first.vocab_size())}
    tokens = [
        AddedToken(i, piece, special=True, flags={})
        for i, piece in pieces.items()
        if first.is_control(i) or first.is_unknown(i) or piece in names
    ]
    added = read_added_tokens(path.parent, settings, names)
    for flag, token in product(("lstrip", "rstrip", "single_word"), added):
        if token.flags.get(flag):
            raise ValueError(f"{path.parent}: {flag} of token {token.content!r} is supported in a tokenizer.json only")
    tokens += added
    parsed_ids = {token.content: token.id for token in tokens}
    longest_first = sorted(parsed_ids, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode_text(text: str, parse_special: bool) -> list[int]:
        parts = pattern.split(text) if parse_special else [text]  # [text, token, text, ..., token, text]
        ids = first.encode(parts[0])
        for token, part in zip(parts[1::2], parts[2::2], strict=True):
            ids += [parsed_ids[token], *later.encode(part)]
        return ids

    token_bytes = {i: piece_bytes(piece) for i, piece in pieces.items()}
    token_bytes |= {token.id: b"" if token.special else piece_bytes(token.content) for token in tokens}
    own_bos, own_eos = (i if i >= 0 else None for i in (first.bos_id(), first.eos_id()))
    return Tokenizer(
        token_bytes,
        encode_text,
        choose_bos(settings, own_bos, parsed_ids.get),
        first.decode(["▁"]) == "",
        parsed_ids,
        named_bos_id=named_id(settings, "bos_token", own_bos, parsed_ids.get),
        named_eos_id=named_id(settings, "eos_token", own_eos, parsed_ids.get),
    )


def read_added_tokens(folder: Path, settings: dict[str, Any], names: set[str]) -> list[AddedToken]:
    """Read the tokens of tokenizer_config.json, or of added_tokens.json as older folders have it."""
    fields = settings.get("added_tokens_decoder")
    if not isinstance(fields, dict):
        fields = {i: {"content": content} for content, i in read_settings(folder, "added_tokens.json").items()}
    tokens = []
    for i, token in fields.items():
        content = token_name(token)
        if not isinstance(token, dict) or not content or not str(i).isdecimal():
            raise ValueError(f"{folder}: added token {i!r}: {token!r} is malformed, expected an id and its content")
        special = bool(token.get("special")) or content in names
        tokens.append(AddedToken(int(i), content, special, token_flags(token)))
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# tiktoken


def is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read(1024)) is not None


def load_tiktoken(path: Path, settings: dict[str, Any]) -> Tokenizer:
    try:
        import tiktoken
    except ImportError:
        raise ValueError(f"{path} is a tiktoken file, which needs a package: pip install tiktoken") from None
    ranks = read_ranks(path)
    special_ids = {name: LLAMA3_NUM_RANKS + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special_ids)

    def encode_text(text: str, parse_special: bool) -> list[int]:
        allowed: Any = "all" if parse_special else set()
        ids: list[int] = []
        for piece in cut_whitespace(text, LLAMA3_MAX_WHITESPACE):
            ids += encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids

    token_bytes = {rank: token for token, rank in ranks.items()} | dict.fromkeys(special_ids.values(), b"")
    own_bos, own_eos = special_ids["<|begin_of_text|>"], special_ids["<|end_of_text|>"]
    return Tokenizer(
        token_bytes,
        encode_text,
        choose_bos(settings, own_bos, special_ids.get),
        added_ids=special_ids,
        named_bos_id=named_id(settings, "bos_token", own_bos, special_ids.get),
        named_eos_id=named_id(settings, "eos_token", own_eos, special_ids.get),
    )


def cut_whitespace(text: str, longest: int) -> list[str]:
    """Cut a text within its runs of whitespace that are too long, so that none is longer."""
    runs = re.finditer(r"\s+", text) if len(text) > longest else ()
    cuts = [at for run in runs for at in range(run.start() + longest, run.end(), longest)]
    return [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the lines `base64 rank` of Llama 3. tiktoken's own reader leaves a copy in the temporary folder."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise ValueError(f"{path} has a line that is not a base64 token and its rank; download it again") from None
    if sorted(ranks.values()) != list(range(LLAMA3_NUM_RANKS)):
        raise ValueError(
            f"{path} has {len(ranks)} tokens and Llama 3 {LLAMA3_NUM_RANKS}; download it again, or the tokenizer.json"
        )
    return ranks
