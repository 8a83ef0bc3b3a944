"""Mistral's tekken.json -> a byte-level BPE of package `tokenizers`, with the ids that `transformers` gives.

The file has the bytes of each token in the order in which BPE merges them, the expression that splits a text, and the
special tokens, which take the first ids.
"""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detokenizer import BYTE_ALPHABET
from files import read_json

if TYPE_CHECKING:
    import tokenizers

# What the file does not say: these are Mistral's in all of them, and a text begins with BOS.
TEKKEN_SETTINGS: dict[str, Any] = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True,
}  # fmt: skip
# Those of files that list none, the first ones.
FIRST_SPECIAL_TOKENS = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip
MAX_SPECIAL_TOKENS = 2**16


def read_tekken(path: Path) -> "tokenizers.Tokenizer":
    """Raises ValueError where the file is not a tekken.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    raw = read_json(path)
    try:
        special, tokens = special_tokens(raw), vocabulary(raw)
        characters = {byte: character for character, byte in BYTE_ALPHABET.items()}
        ranks = {token: rank for rank, token in enumerate(tokens)}
        names = {token: "".join(characters[byte] for byte in token) for token in tokens}
        merges = [(names[left], names[right]) for token in tokens for left, right in halves(token, ranks)]
        ids = {names[token]: len(special) + rank for token, rank in ranks.items()}
        ids |= {name: i for i, name in enumerate(special)}
        backend = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=True))
        split = pre_tokenizers.Split(tokenizers.Regex(raw["config"]["pattern"]), "isolated")
    except Exception as error:  # the package raises no narrower kind
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a tekken.json ({reason}); download it again") from None
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in special])
    return backend


def special_tokens(raw: dict[str, Any]) -> list[str]:
    """Return the special tokens in the order of their ids, with those that have no name yet."""
    entries = raw.get("special_tokens")
    names = FIRST_SPECIAL_TOKENS
    if entries is not None:
        by_rank = {entry["rank"]: entry["token_str"] for entry in entries}
        names = [by_rank[rank] for rank in range(len(entries))]
    count = raw["config"].get("default_num_special_tokens", len(names))
    if not len(names) <= count <= MAX_SPECIAL_TOKENS:
        raise ValueError(f"default_num_special_tokens is {count!r} and {len(names)} have names")
    return names + [f"<SPECIAL_{i}>" for i in range(len(names), count)]


def vocabulary(raw: dict[str, Any]) -> list[bytes]:
    """Return the bytes of the other tokens that a model has: a file may have more."""
    tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in raw["vocab"]]
    size = raw["config"].get("default_vocab_size")
    tokens = tokens if size is None else tokens[: size - len(special_tokens(raw))]
    if len(set(tokens)) < len(tokens) or not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise ValueError("a token is there twice, or one of the 256 bytes is not")
    return tokens


def halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pairs of tokens that a token may be merged from, the earliest tokens first."""
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
