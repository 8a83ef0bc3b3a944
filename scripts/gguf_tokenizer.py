"""The tokenizer in a GGUF file -> tokenizer.json, tokenizer_config.json and the chat template of a Hub folder.

A GGUF file has tokens and merges, or tokens and scores; of what cuts a text before that it has the name alone,
`tokenizer.ggml.pre`. The pre-tokenizers below are those of the models' own tokenizer.json.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizer import LLAMA3_PATTERN

if TYPE_CHECKING:
    import tokenizers

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # token types; others are tokens like any
# Splits of a text, one after the other. A first "digits" cuts digits apart; None is GPT-2's own expression.
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
# tokenizer.ggml.pre -> the expression that splits, GPT-2's where it is None.
PATTERNS: dict[str, str | None] = {
    "gpt-2": None, "smollm": None, "llama-bpe": LLAMA3_PATTERN, "llama3": LLAMA3_PATTERN, "llama-v3": LLAMA3_PATTERN,
    "smaug-bpe": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN, "deepseek-r1-qwen": QWEN2_PATTERN, "tekken": TEKKEN_PATTERN,
}  # fmt: skip
SINGLE_DIGITS = {"smollm"}
NORMALIZED = {"qwen2"}  # to NFC
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # a word that is a token is one, whatever the merges say
BEGINS_WITH_BOS = WHOLE_WORDS  # unless the file says otherwise; and every one with scores
# Control tokens that end a turn, whether the file names them as such or not.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>")


class GgufVocabulary:
    """The tokens of a file, checked."""

    def __init__(self, values: dict[str, Any]):
        """Raises ValueError where the metadata is malformed, or of a tokenizer that is not supported."""
        self.values = values
        self.tokens = self._array("tokens", str)
        self.types = self._array("token_type", int, [1] * len(self.tokens))
        self.ids = {t: i for i, t in enumerate(self.tokens) if self.types[i] != UNUSED}  # the rest pads the embedding
        self.has_merges = self._get("model") == "gpt2"
        if not self.has_merges and self._get("model") != "llama":
            raise ValueError(f"tokenizer.ggml.model {self._get('model')!r} is not supported; gpt2 and llama are")
        self.pre = self._get("pre") if self.has_merges else None
        if self.has_merges and str(self.pre) not in PATTERNS:
            raise ValueError(
                f"tokenizer.ggml.pre {self.pre!r} is not supported: how it splits a text is not known; supported: "
                f"{', '.join(PATTERNS)}. Download the model's own folder (scripts/download.py)"
            )

    def _get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"tokenizer.ggml.{key}", default)

    def _array(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        value = self._get(key, default)
        if not isinstance(value, list) or not value or not isinstance(value[0], kind):
            raise ValueError(f"tokenizer.ggml.{key} is missing or is not a list of {kind.__name__}; download it again")
        if default is not None and len(value) != len(default):
            raise ValueError(f"tokenizer.ggml.{key} has {len(value)} entries for {len(default)} tokens")
        return value

    def merges(self) -> list[tuple[str, str]]:
        if not self.has_merges:
            scores = self._array("scores", float, [0.0] * len(self.tokens))
            return merges_of_scores({t: scores[i] for t, i in self.ids.items()})
        pairs = [tuple(merge.split(" ")) for merge in self._array("merges", str)]
        if bad := next((pair for pair in pairs if len(pair) != 2), None):
            raise ValueError(f"tokenizer.ggml.merges has {' '.join(bad)!r}, which is not a pair; download it again")
        return pairs

    def special_id(self, kind: str) -> int | None:
        """Return the id of `bos`, `eos` and their like, None where the file has none."""
        i = self._get(f"{kind}_token_id")
        if i is not None and not (type(i) is int and 0 <= i < len(self.tokens)):
            raise ValueError(f"tokenizer.ggml.{kind}_token_id is {i!r}, and there are {len(self.tokens)} tokens")
        return i

    def named_tokens(self) -> dict[str, str]:
        """Return bos_token and its like, as tokenizer_config.json has them."""
        kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {f"{kind}_token": self.special_id(name) for kind, name in kinds.items()}
        return {key: self.tokens[i] for key, i in ids.items() if i is not None}

    def end_ids(self) -> list[int]:
        """Return every id that ends a text or a turn, the file's EOS first."""
        named = [self.special_id(kind) for kind in ("eos", "eot", "eom")]
        turns = [self.ids[name] for name in TURN_ENDS if name in self.ids and self.types[self.ids[name]] == CONTROL]
        return list(dict.fromkeys(i for i in [*named, *turns] if i is not None))

    def bos_before_text(self) -> int | None:
        begins = self._get("add_bos_token", not self.has_merges or self.pre in BEGINS_WITH_BOS)
        return self.special_id("bos") if begins else None


def merges_of_scores(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return the pairs that make up a token, those of the highest score first, as SentencePiece joins them."""
    splits = (
        (-score, scores.get(token[:at], 0), token[:at], token[at:])
        for token, score in scores.items()
        for at in range(1, len(token))
        if token[:at] in scores and token[at:] in scores
    )
    return [(left, right) for _, _, left, right in sorted(splits)]


def build_tokenizer(vocabulary: GgufVocabulary) -> "tokenizers.Tokenizer":
    """Make the tokenizer that a tokenizer.json describes. Raises ValueError where tokens and merges disagree."""
    import tokenizers
    from tokenizers import models, processors

    kinds: dict[str, Any] = {"ignore_merges": vocabulary.pre in WHOLE_WORDS}
    if not vocabulary.has_merges:
        kinds = {"byte_fallback": True, "fuse_unk": True, "unk_token": vocabulary.named_tokens().get("unk_token")}
    merges = vocabulary.merges()
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges, **kinds))
    except Exception as error:  # the package raises no narrower kind
        raise ValueError(f"the file's tokens and merges are no BPE ({error}); download it again") from None
    (set_byte_level_ if vocabulary.has_merges else set_sentencepiece_)(backend, vocabulary)
    added = [(t, i) for t, i in vocabulary.ids.items() if vocabulary.types[i] in (UNKNOWN, CONTROL, USER_DEFINED)]
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=vocabulary.types[i] != USER_DEFINED, normalized=False)
            for token, i in added
        ]
    )
    if (bos := vocabulary.bos_before_text()) is not None:
        name = vocabulary.tokens[bos]
        if not name or set(name) & set(" :$"):
            raise ValueError(f"the file's BOS token {name!r} is not supported")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, bos)]
        )
    return backend


def set_byte_level_(backend: "tokenizers.Tokenizer", vocabulary: GgufVocabulary) -> None:
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

    assert vocabulary.pre is not None
    pattern = PATTERNS[vocabulary.pre]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if vocabulary.pre in SINGLE_DIGITS else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    if vocabulary.pre in NORMALIZED:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()


def set_sentencepiece_(backend: "tokenizers.Tokenizer", vocabulary: GgufVocabulary) -> None:
    """Let a text begin with a space, and each part after a special token, as llama.cpp and Llama 2's own file do."""
    from tokenizers import decoders, normalizers

    has_prefix = vocabulary.values.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])


def write_tokenizer(values: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer's files into a folder."""
    vocabulary = GgufVocabulary(values)
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **vocabulary.named_tokens(),
    }
    write_json(folder / "tokenizer_config.json", settings)
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def has_tokenizer(values: dict[str, Any]) -> bool:
    return values.get("tokenizer.ggml.model", "no_vocab") not in ("no_vocab", "none")
