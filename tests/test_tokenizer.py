"""tokenizer.py against the published vectors, and against the libraries and `transformers` that read the same files."""

import base64
import functools
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS, TextStream, Tokenizer, load_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LLAMA2, LLAMA3, STORIES = DATA / "llama2-tokenizer", DATA / "llama3-tokenizer", DATA / "stories260k"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the test data is not at {DATA}")

TEXTS = [
    "",
    "Once upon a time, there was a girl.",
    "  two spaces,\ttab\r\nand\n\n\nnewlines   ",
    "naïve café, Ⅷ ½ ﬁ 12345",
    "你好，世界 — 안녕하세요 — नमस्ते — สวัสดี",
    "🦙🚀 👩‍👩‍👧‍👦 e\u0301 \u200b\ufeff\x00\x7f",
    "<|eot_id|></s><s><pad><bos>",
]
MULTIBYTE = ["é", "你好", "🦙", "👩\u200d👩\u200d👧", "e\u0301", "\uffff"]
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------------------------------------------------------------
# Folders made for the tests


def byte_level_backend(bos: bool = False) -> tokenizers.Tokenizer:
    """Train a byte-level BPE as Llama 3's tokenizer.json has it; <bos> is 0, <eos> 1."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        backend.post_processor = post_processor("<bos> $A", ["<bos>"])
    return backend


def post_processor(template: str, names: list[str]) -> processors.PostProcessor:
    return processors.TemplateProcessing(single=template, special_tokens=[(name, i) for i, name in enumerate(names)])


def llama2_style_backend(model: Path) -> tokenizers.Tokenizer:
    """Make the tokenizer.json of a SentencePiece BPE model as Llama 2's is: a normalizer puts the space before."""
    processor = SentencePieceProcessor(model_file=str(model))
    ids = range(processor.vocab_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    merges = generate_merges(vocab, {processor.id_to_piece(i): processor.get_score(i) for i in ids})
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def save(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    return configure(folder, config or {})


def configure(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def copy_model(source: Path, folder: Path, config: dict[str, Any] | None = None) -> Path:
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    return configure(folder, config or {})


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    """Write a small tokenizer.model that keeps all white space and puts none before a text."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "hello tokens"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@functools.cache
def shared_tokenizer(kind: str) -> Tokenizer:
    return load_tokenizer({"sentencepiece": LLAMA2, "tiktoken": LLAMA3, "stories": STORIES}[kind])


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save(tmp_path_factory.mktemp("json"), byte_level_backend(bos=True)))


@pytest.fixture(scope="module", params=["tokenizer.json", "sentencepiece", "tiktoken", "stories"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One of each kind of file, and a second SentencePiece model that has few pieces and falls back to bytes often."""
    if request.param == "tokenizer.json":
        return request.getfixturevalue("byte_level")
    if not DATA.is_dir():
        pytest.skip(f"the test data is not at {DATA}")
    return shared_tokenizer(request.param)


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def read_vectors(folder: Path) -> list[tuple[str, list[int]]]:
    texts = (folder / "vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "vectors.out").read_text().split("\n")
    vectors = [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]
    assert len(vectors) == 47
    return vectors


@needs_data
@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"], ids=["llama2", "llama3"])
def test_vectors_match_both_ways(kind):
    tokenizer = shared_tokenizer(kind)
    for text, ids in read_vectors({"sentencepiece": LLAMA2, "tiktoken": LLAMA3}[kind]):
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.encode(text) == [tokenizer.bos_id, *ids]
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == text


@needs_data
def test_stories260k_text_and_ids_match_both_ways():
    tokenizer = shared_tokenizer("stories")
    expected = json.loads((STORIES / "expected.json").read_text())
    assert tokenizer.decode(expected["greedy_ids"]) == expected["greedy_text"]
    assert tokenizer.encode(expected["greedy_text"]) == expected["greedy_ids"]
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (512, 1)


@needs_data
@quick
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_survives_llama2_and_llama3(text):
    for kind in ("sentencepiece", "tiktoken"):
        tokenizer = shared_tokenizer(kind)
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@needs_data
def test_sentencepiece_kind_equals_the_library():
    processor = SentencePieceProcessor(model_file=str(LLAMA2 / "tokenizer.model"))
    tokenizer = shared_tokenizer("sentencepiece")
    for text in TEXTS:
        assert tokenizer.encode(text, bos=False, parse_special=False) == processor.encode(text)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(259, 32000) for _ in range(6)]
        assert tokenizer.decode(ids) == processor.decode(ids)


def transformers_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no-bos"])
def test_tokenizer_json_equals_transformers(tmp_path, bos):
    backend = byte_level_backend(bos)
    backend.add_tokens(["<tool>", AddedToken("    ", normalized=False), AddedToken("<pad>", rstrip=True)])
    folder = save(
        tmp_path, backend, {"eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": ["upon"]}
    )
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    assert ours.bos_id == (0 if bos else None)
    assert ours.vocab_size == len(theirs)
    for text in [*TEXTS, "a<pad>  b<tool>c    d<eos>hello upon"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(ours.vocab_size) for _ in range(8)]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def added(content: str, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": content, **off, **flags}


TOOL = {"additional_special_tokens": ["<tool>"]}


@pytest.mark.parametrize(
    ("config", "is_special"),
    [
        ({}, False),
        ({"sep_token": "<tool>"}, True),
        ({"tool_token": "<tool>"}, True),
        (TOOL, False),
        ({"extra_special_tokens": ["<tool>"]}, False),
        ({"extra_special_tokens": {"tool_token": "<tool>"}}, True),
        ({"added_tokens_decoder": {"340": added("<tool>", special=True)}}, True),
        ({"added_tokens_decoder": {"340": added("<tool>")}, **TOOL}, False),
    ],
)
def test_what_makes_an_added_token_special_is_what_does_in_transformers(tmp_path, config, is_special):
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    folder = save(tmp_path, backend, config)
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    ids = theirs.encode("a<tool>b")
    text = "ab" if is_special else "a<tool>b"
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


def test_what_the_library_fails_on_is_a_line(tmp_path, monkeypatch):
    backend = byte_level_backend()
    strips = [AddedToken("[INST]", rstrip=True, normalized=False), AddedToken("  ", lstrip=True, normalized=False)]
    backend.add_tokens(strips)
    tokenizer = load_tokenizer(save(tmp_path, backend))
    with pytest.raises(ValueError, match=r"tokenizer.json: package tokenizers fails on '\[INST\]   '"):
        tokenizer.encode("[INST]   ")
    assert tokenizer.decode(tokenizer.encode("[INST] a")) == "[INST]a"


GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
BPE_FOLDERS = {
    "all defaults": {"tokenizer_config": GPT2},
    "bos": {"tokenizer_config": GPT2 | {"add_bos_token": True, "bos_token": "<bos>", "unk_token": None}},
    "default bos": {"tokenizer_config": GPT2 | {"add_bos_token": True}},
    "prefix space": {
        "tokenizer_config": GPT2 | {"add_prefix_space": True, "additional_special_tokens": ["<x>", "<y>"]}
    },
    "added_tokens.json": {
        "tokenizer_config": GPT2,
        "added_tokens": {"<|im_end|>": 341, "<tool>": 340},
        "special_tokens_map": {"bos_token": "<bos>", "eos_token": added("<|im_end|>", rstrip=True)},
    },
    "added_tokens_decoder": {
        "tokenizer_config": {
            "tokenizer_class": "GPT2TokenizerFast",
            "pad_token": "<pad>",
            "added_tokens_decoder": {
                "341": added("<think>", normalized=True),
                "340": added("<tool>", lstrip=True),
                "1": added("<eos>", special=True),
            },
        }
    },
    "qwen 2": {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}},
    "qwen 3 by its family": {"config": {"model_type": "qwen3", "vocab_size": 340}},
    "qwen 2 of no own class": {
        "config": {"model_type": "qwen2"},
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
    },
}


def bpe_folder(folder: Path, files: dict[str, Any]) -> Path:
    """Write vocab.json, merges.txt and what is beside them."""
    byte_level_backend().model.save(str(folder))
    for name, content in ({"config": {"model_type": "llama"}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", BPE_FOLDERS)
def test_vocab_json_and_merges_txt_equal_transformers(tmp_path, kind):
    folder = bpe_folder(tmp_path, BPE_FOLDERS[kind])
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    special = "a <tool> b<|im_end|>  c<|endoftext|> <x><eos><pad> 12345 e\u0301<think>"
    for text in [*TEXTS, special]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_an_added_token_beyond_the_next_free_id_is_refused(tmp_path):
    """`transformers` would give it another id than the model was trained with."""
    folder = bpe_folder(tmp_path, {"added_tokens": {"<tool>": 345}})
    assert_refused(folder, "'<tool>' has id 345, and 340 is the next free")


@pytest.mark.parametrize(("file", "text"), [("vocab.json", "{"), ("merges.txt", "no merge at all\n")])
def test_broken_bpe_files_are_refused(tmp_path, file, text):
    (bpe_folder(tmp_path, {}) / file).write_text(text)
    assert_refused(tmp_path, "vocab.json and merges.txt", "download")


def test_literal_encoding_equals_transformers_split_special_tokens(tmp_path):
    folder = save(tmp_path, byte_level_backend())
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    text = "a<eos><bos> b<bos"
    assert ours.encode(text, parse_special=False) == theirs.encode(text, split_special_tokens=True)
    assert ours.encode(text, parse_special=True) == theirs.encode(text)


@needs_data
def test_llama2_style_tokenizer_json_equals_transformers_and_sentencepiece(tmp_path):
    folder = save(tmp_path, llama2_style_backend(STORIES / "tokenizer.model"))
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    assert ours.bos_id == 1
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    for text in ("", "Once upon a time", "\nLily and 🦙\n"):
        assert ours.encode(text) == shared_tokenizer("stories").encode(text)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(259, 512) for _ in range(6)]
        assert ours.decode(ids) == theirs.decode(ids)


@needs_data
def test_sentencepiece_decoder_without_a_strip_keeps_the_leading_space(tmp_path):
    backend = llama2_style_backend(STORIES / "tokenizer.model")
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    folder = save(tmp_path, backend)
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.decode(ours.encode(" Once")) == " Once"


@needs_data
def test_tokenizer_json_made_from_the_tiktoken_file_gives_the_same_ids(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken's reader would leave a copy in the temporary folder
    converter = TikTokenConverter(
        str(LLAMA3 / "tokenizer.model"), pattern=LLAMA3_PATTERN, extra_special_tokens=LLAMA3_SPECIAL_TOKENS
    )
    backend = converter.converted()
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    converted, ours = load_tokenizer(save(tmp_path, backend)), shared_tokenizer("tiktoken")
    assert converted.token_bytes == ours.token_bytes
    assert (converted.vocab_size, converted.bos_id) == (ours.vocab_size, ours.bos_id) == (128256, 128000)
    everything = "".join(LLAMA3_SPECIAL_TOKENS)
    for text in [*TEXTS, *(text for text, _ in read_vectors(LLAMA3)), everything]:
        for parse_special in (True, False):
            assert converted.encode(text, True, parse_special) == ours.encode(text, True, parse_special)


@needs_data
def test_llama3_special_tokens_have_the_hubs_ids():
    """The ids are those of tokenizer.json in meta-llama/Llama-3.1-8B-Instruct and Llama-3.2-1B."""
    tokenizer = shared_tokenizer("tiktoken")
    ids = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_1|>": 128003,
        "<|finetune_right_pad_id|>": 128004,
        "<|reserved_special_token_2|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_3|>": 128011,
        "<|reserved_special_token_247|>": 128255,
    }
    assert tokenizer.encode("".join(ids)) == list(ids.values())
    assert tokenizer.decode(ids.values()) == ""


# ---------------------------------------------------------------------------------------------------------------------
# BOS and special tokens


@pytest.mark.parametrize(
    ("own_bos", "config", "bos_id"),
    [
        (True, {}, 0),
        (False, {}, None),
        (False, {"bos_token": "<bos>"}, None),
        (True, {"add_bos_token": None, "bos_token": "<eos>"}, 0),
        (True, {"add_bos_token": True}, 0),
        (True, {"add_bos_token": False, "bos_token": "<bos>"}, 0),
        (False, {"add_bos_token": True, "bos_token": "<bos>"}, None),
        (False, {"add_bos_token": True, "bos_token": {"content": "<eos>", "__type": "AddedToken"}}, None),
    ],
)
def test_bos_of_a_tokenizer_json_is_its_post_processors_whatever_add_bos_token_says(tmp_path, own_bos, config, bos_id):
    tokenizer = load_tokenizer(save(tmp_path, byte_level_backend(own_bos), config))
    plain = tokenizer.encode("hello", bos=False)
    assert tokenizer.bos_id == bos_id
    assert tokenizer.encode("hello") == ([] if bos_id is None else [bos_id]) + plain


def test_bos_is_found_where_the_vocabulary_lacks_most_letters(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE({"<bos>": 0, "0": 1}, []))
    backend.add_special_tokens(["<bos>"])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = post_processor("<bos> $A", ["<bos>"])
    assert load_tokenizer(save(tmp_path, backend)).encode("0a0") == [0, 1, 1]


@needs_data
@pytest.mark.parametrize(("source", "bos_id"), [(LLAMA2, 1), (LLAMA3, 128000)], ids=["sentencepiece", "tiktoken"])
@pytest.mark.parametrize("add", [False, None])
def test_add_bos_token_false_leaves_bos_out_of_tokenizer_model(tmp_path, source, bos_id, add):
    tokenizer = load_tokenizer(copy_model(source, tmp_path, {"add_bos_token": add}))
    expected = None if add is False else bos_id
    assert tokenizer.bos_id == expected
    assert tokenizer.encode("") == ([] if expected is None else [expected])


@pytest.mark.parametrize("template", ["$A <eos>", "<bos> $A <eos>"])
def test_an_appended_eos_is_left_out(tmp_path, template):
    backend = byte_level_backend()
    backend.post_processor = post_processor(template, ["<bos>", "<eos>"])
    tokenizer = load_tokenizer(save(tmp_path, backend))
    assert tokenizer.bos_id == (0 if "<bos>" in template else None)
    assert 1 not in tokenizer.encode("hello")


def test_a_text_that_begins_with_the_bos_string_gets_no_second_bos(tokenizer):
    names = {0: "<bos>", 1: "<s>", 128000: "<|begin_of_text|>"}
    name = names[tokenizer.bos_id]
    assert tokenizer.encode(name) == [tokenizer.bos_id]
    assert tokenizer.encode(name + name) == [tokenizer.bos_id] * 2
    literal = tokenizer.encode(name, parse_special=False)
    assert literal.count(tokenizer.bos_id) == 1 and len(literal) > 2
    assert tokenizer.decode(literal) == name


@needs_data
@pytest.mark.parametrize("legacy", [True, False, None])
def test_legacy_decides_the_space_after_a_special_token(tmp_path, legacy):
    """The ids are those of transformers 5.23 for this file and setting."""
    config = {} if legacy is None else {"legacy": legacy}
    tokenizer = load_tokenizer(copy_model(LLAMA2, tmp_path, config))
    after = [727] if legacy else [12711]
    assert tokenizer.encode("Hi</s>there", bos=False) == [6324, 2, *after]
    assert tokenizer.encode("<s>Hi") == ([1, 6324] if legacy else [1, 18567])


def test_a_sentencepiece_model_without_bos_and_dummy_prefix_adds_and_strips_nothing(tmp_path):
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path, bos_id=-1))
    assert tokenizer.bos_id is None
    for text in ("hello", " hello  world", "", " "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "".join(stream(tokenizer, [ids])) == text


def test_the_unknown_token_is_parsed_and_decodes_to_nothing(tmp_path):
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path))
    assert tokenizer.encode("<unk>", bos=False) == [0]
    assert tokenizer.decode([0]) == ""


def test_the_longer_of_two_added_tokens_is_parsed(tmp_path):
    tokens = {"300": {"content": "<a>", "special": True}, "301": {"content": "<a><b>", "special": True}}
    tokenizer = load_tokenizer(configure(train_sentencepiece(tmp_path), {"added_tokens_decoder": tokens}))
    assert tokenizer.encode("<a><a><b>", bos=False) == [300, 301]


def added_token_files(folder: Path, new: bool) -> None:
    """Add <|im_start|> and <|im_end|>, special, and <think>, not special, to a SentencePiece folder."""
    ids = {"<|im_start|>": 32001, "<|im_end|>": 32002, "<think>": 32004}
    if new:
        decoder = {str(i): {"content": name, "special": name != "<think>"} for name, i in ids.items()}
        configure(folder, {"added_tokens_decoder": decoder})
    else:
        (folder / "added_tokens.json").write_text(json.dumps(ids))
        named = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}
        (folder / "special_tokens_map.json").write_text(json.dumps(named))


@needs_data
@pytest.mark.parametrize("new", [True, False], ids=["added_tokens_decoder", "added_tokens.json"])
def test_tokens_added_to_a_sentencepiece_model_have_their_ids(tmp_path, new):
    copy_model(LLAMA2, tmp_path)
    added_token_files(tmp_path, new)
    tokenizer = load_tokenizer(tmp_path)
    text = "<|im_start|>user\nHi<|im_end|></s><think>"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i >= 32000 or i < 3] == [1, 32001, 32002, 2, 32004]
    assert tokenizer.decode(ids) == "user\nHi<think>"
    assert tokenizer.vocab_size == 32005
    literal = tokenizer.encode(text, bos=False, parse_special=False)
    assert all(2 < i < 32000 for i in literal)
    assert tokenizer.decode(literal) == text


def test_literal_encoding_reaches_no_added_token_whatever_its_flag(tmp_path):
    backend = byte_level_backend()
    backend.add_tokens(["<|user|>", AddedToken("<think>", normalized=False)])
    tokenizer = load_tokenizer(save(tmp_path, backend))
    text = "a<|user|> <think>"
    parsed, literal = tokenizer.encode(text), tokenizer.encode(text, parse_special=False)
    ids = {backend.token_to_id("<|user|>"), backend.token_to_id("<think>")}
    assert ids <= set(parsed) and not ids & set(literal)
    assert tokenizer.decode(parsed) == tokenizer.decode(literal) == text


def test_padding_and_truncation_left_in_tokenizer_json_are_off(tmp_path):
    backend = byte_level_backend()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8)
    tokenizer = load_tokenizer(save(tmp_path, backend))
    text = "a longer text than that"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Text that is not a text, ids that are not ids


def test_a_lone_surrogate_is_one_line(tokenizer):
    for text in ("\ud800", "abc\udcffdef"):
        with pytest.raises(ValueError, match=r"lone surrogate '\\ud") as error:
            tokenizer.encode(text)
        assert "\n" not in str(error.value) and not isinstance(error.value, UnicodeError)


def test_a_models_padding_rows_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("Hello")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**9]) == "Hello"


def test_a_negative_id_is_refused_with_the_vocabulary_size(tokenizer):
    with pytest.raises(ValueError, match=f"-1 .* 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([5, -1])


# ---------------------------------------------------------------------------------------------------------------------
# TextStream


def stream(tokenizer: Tokenizer, pieces: Iterable[list[int]], prompt_ids: Iterable[int] = ()) -> list[str]:
    text = TextStream(tokenizer, prompt_ids)
    return [*map(text.push, pieces), text.flush()]


def reference_decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    data = b"".join(tokenizer.token_bytes.get(i, b"") for i in ids)
    return (data.removeprefix(b" ") if tokenizer.strips_leading_space else data).decode(errors="replace")


def cut(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    ends = [0, *sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8))), len(ids)]
    return [ids[a:b] for a, b in pairwise(ends)]


@functools.cache
def byte_ids(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {data: i for i, data in tokenizer.token_bytes.items() if len(data) == 1}


def single_byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [byte_ids(tokenizer)[bytes([byte])] for byte in data]


def draw_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Draw ids, most of them of single bytes, so that whole, broken and unfinished characters all come."""
    single = st.sampled_from(list(byte_ids(tokenizer).values()))
    return data.draw(st.lists(single | st.integers(0, tokenizer.vocab_size + 10), max_size=12))


@quick
@given(st.data())
def test_stream_of_any_ids_in_any_pieces_is_decode(tokenizer, data):
    ids = draw_ids(data, tokenizer)
    assert "".join(stream(tokenizer, cut(data, ids))) == tokenizer.decode(ids) == reference_decode(tokenizer, ids)


@quick
@given(st.data())
def test_stream_of_any_text_in_any_pieces_is_the_text(tokenizer, data):
    text = "".join(data.draw(st.lists(st.sampled_from(MULTIBYTE), max_size=6)))
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, cut(data, ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@quick
@given(st.data())
def test_stream_after_a_prompt_is_what_decode_adds_to_the_prompt(tokenizer, data):
    prompt, ids = draw_ids(data, tokenizer), draw_ids(data, tokenizer)
    whole, before = tokenizer.decode(prompt + ids), tokenizer.decode(prompt)
    if whole.startswith(before):
        assert "".join(stream(tokenizer, cut(data, ids), prompt)) == whole[len(before) :]


def test_first_word_after_a_prompt_keeps_its_space(tokenizer):
    prompt, ids = tokenizer.encode("Hello"), tokenizer.encode("Hello world")
    assert ids[: len(prompt)] == prompt
    assert "".join(stream(tokenizer, [ids[len(prompt) :]], prompt)) == " world"


def test_a_character_is_held_back_until_its_last_byte(tokenizer):
    ids = single_byte_ids(tokenizer, "🦙é".encode())
    assert stream(tokenizer, [[i] for i in ids]) == ["", "", "", "🦙", "", "é", ""]


def test_invalid_bytes_are_not_held_back(tokenizer):
    text = TextStream(tokenizer)
    for data, shown in (("\ufffd".encode(), "\ufffd"), (b"\xff", "\ufffd"), (b"\xf0\x9f", ""), (b"a", "\ufffda")):
        assert text.push(single_byte_ids(tokenizer, data)) == shown


def test_a_prompts_unfinished_character_is_finished_by_the_stream(tokenizer):
    *prompt, last = single_byte_ids(tokenizer, "x🦙".encode())
    assert stream(tokenizer, [[last]], prompt) == ["🦙", ""]


def test_a_push_reads_its_own_ids_only():
    class CountingBytes(dict[int, bytes]):
        num_reads = 0

        def get(self, *args):
            self.num_reads += 1
            return super().get(*args)

    table = CountingBytes({0: b"a", 1: b"\xe4"})
    text = TextStream(Tokenizer(table, lambda text, parse_special: [], None), [0] * 100)
    for n in range(1, 50):
        text.push([n % 2])
        assert table.num_reads == 100 + n


# ---------------------------------------------------------------------------------------------------------------------
# Decoders of package `tokenizers`

REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
STRIP = decoders.Strip(content=" ", left=1)
DECODERS = {
    "none": None,
    "llama 2": decoders.Sequence([REPLACE, FALLBACK, FUSE, STRIP]),
    "bytes first": decoders.Sequence([FALLBACK, REPLACE, FUSE]),
    "bytes last": decoders.Sequence([FUSE, REPLACE, FALLBACK]),
    "nested": decoders.Sequence([decoders.Sequence([FALLBACK, FUSE]), decoders.Metaspace()]),
    "metaspace": decoders.Metaspace(),
    "metaspace after bytes": decoders.Sequence([FALLBACK, decoders.Metaspace(prepend_scheme="first")]),
    "replace after fuse": decoders.Sequence([FUSE, REPLACE, STRIP]),
    "two characters": decoders.Sequence([FUSE, decoders.Replace("▁a", "-"), REPLACE]),
    "strip three": decoders.Sequence([REPLACE, FUSE, decoders.Strip(content=" ", left=3)]),
    "strip the end": decoders.Sequence([REPLACE, FUSE, decoders.Strip(content=" ", left=0, right=1)]),
    "word pieces": decoders.WordPiece(),
    "suffixes": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "word pieces, ctc": decoders.Sequence([decoders.WordPiece(), decoders.CTC()]),
    "strip both ends": decoders.Sequence([REPLACE, FUSE, decoders.Strip(content=" ", left=1, right=1)]),
    "fuse": FUSE,
    "byte level": decoders.ByteLevel(),
    "metaspace, byte level": decoders.Sequence([decoders.Metaspace(), decoders.ByteLevel()]),
}
DECODED = ["<s>", "▁", "▁▁", "a", "▁a", "b", "##b", "b</w>", "|", ".", "<pad>", "\ufffd", "Ġa", "ä", "½", "ł",
           *(f"<0x{byte:02X}>" for byte in "a你".encode()), "<0xFF>"]  # fmt: skip


@functools.cache
def decoding(kind: str) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(DECODED)}, []))
    backend.add_special_tokens(["<s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_tokens(["<tool>", AddedToken("<think>", normalized=False)])
    if DECODERS[kind]:
        backend.decoder = DECODERS[kind]
    with tempfile.TemporaryDirectory() as folder:
        return backend, load_tokenizer(save(Path(folder), backend))


def decode_or_nothing(backend: tokenizers.Tokenizer, ids: list[int]) -> str:
    """The library panics where a Strip has less text than it strips."""
    try:
        return backend.decode(ids)
    except BaseException as error:
        assert type(error).__name__ == "PanicException"
        return ""


@pytest.mark.parametrize("kind", DECODERS)
def test_the_librarys_text_is_ours_in_any_pieces_and_after_any_prompt(kind):
    backend, tokenizer = decoding(kind)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data):
        any_ids = st.lists(st.integers(0, len(DECODED) + 3), max_size=12)
        prompt, ids = data.draw(any_ids), data.draw(any_ids)
        before, whole = (decode_or_nothing(backend, each) for each in (prompt, prompt + ids))
        assert tokenizer.decode(prompt) == before
        assert "".join(stream(tokenizer, cut(data, prompt + ids))) == whole
        if whole.startswith(before):
            assert "".join(stream(tokenizer, [[i] for i in ids], prompt)) == whole[len(before) :]

    check()


def test_a_normalized_added_token_keeps_the_space_before_it(tmp_path):
    backend, tokenizer = decoding("llama 2")
    ids = [backend.token_to_id(token) for token in ("▁a", "<tool>", "▁a", "<think>", "<s>")]
    assert backend.decode(ids) == tokenizer.decode(ids) == "a <tool> a<think>"
    assert stream(tokenizer, [[i] for i in ids]) == ["a", " <tool>", " a", "<think>", "", ""]


@pytest.mark.parametrize("kind", ["llama 2", "metaspace", "word pieces", "byte level", "ctc", "none"])
def test_the_library_decodes_a_few_ids_at_a_time(kind):
    _, tokenizer = decoding(kind)
    sizes: list[int] = []
    library = tokenizer.library
    assert library

    def decode(ids: list[int]) -> str:
        sizes.append(len(ids))
        return library.decode(ids)

    text = TextStream(replace(tokenizer, library=library._replace(decode=decode)))
    for i in range(300):
        text.push([3 + i % 3])
    assert max(sizes) <= 4


# ---------------------------------------------------------------------------------------------------------------------
# Which file, and what is wrong with it


@needs_data
def test_the_content_of_tokenizer_model_decides_its_kind(tmp_path):
    for name, source, bos_id in (("Llama-2-7b", LLAMA3, 128000), ("Llama-3-8B-tiktoken", LLAMA2, 1)):
        folder = tmp_path / name
        folder.mkdir()
        assert load_tokenizer(copy_model(source, folder)).bos_id == bos_id


def test_tokenizer_json_goes_before_tokenizer_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not read")
    assert load_tokenizer(str(save(tmp_path, byte_level_backend()))).encode("<eos>") == [1]


def assert_refused(folder: Path, *words: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as info:
        load_tokenizer(folder)
    message = str(info.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message, message


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    assert_refused(tmp_path, "no tokenizer.json and no tokenizer.model", "download", error=FileNotFoundError)
    assert_refused(tmp_path / "nowhere", "is not a folder", error=FileNotFoundError)


@needs_data
def test_a_tiktoken_file_without_tiktoken_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert_refused(copy_model(LLAMA3, tmp_path), "tokenizer.model", "pip install tiktoken")
    assert load_tokenizer(copy_model(LLAMA2, tmp_path)).bos_id == 1


RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["SentencePiece", "tiktoken"]),
        (b"\xff" * 500, ["SentencePiece", "tiktoken"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["SentencePiece", "tiktoken"]),
        (RANKS, ["256 tokens", "128000"]),
        (RANKS + b"!!!! 256\n", ["base64"]),
        (RANKS + b"IQ==\n", ["base64"]),
    ],
    ids=["empty", "garbage", "git-lfs pointer", "short ranks", "broken base64", "no rank"],
)
def test_a_corrupt_tokenizer_model_is_refused(tmp_path, data, words):
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert_refused(tmp_path, "tokenizer.model", "download it again", *words)


@needs_data
@pytest.mark.parametrize("source", [LLAMA2, LLAMA3], ids=["sentencepiece", "tiktoken"])
def test_a_truncated_tokenizer_model_is_refused(tmp_path, source):
    (tmp_path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes()[:300_000])
    assert_refused(tmp_path, "tokenizer.model", "download it again")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_corrupt_tokenizer_json_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert_refused(tmp_path, "tokenizer.json", "download it again")


@pytest.mark.parametrize("data", ["{", "[]", "\x00"])
def test_a_corrupt_tokenizer_config_is_refused(tmp_path, data):
    save(tmp_path, byte_level_backend())
    (tmp_path / "tokenizer_config.json").write_text(data)
    assert_refused(tmp_path, "tokenizer_config.json")


def test_two_tokens_before_a_text_are_refused(tmp_path):
    backend = byte_level_backend()
    backend.post_processor = post_processor("<bos> <eos> $A", ["<bos>", "<eos>"])
    assert_refused(save(tmp_path, backend), "2 tokens", "BOS")


def test_a_bos_token_that_is_not_in_the_vocabulary_is_refused(tmp_path):
    folder = copy_model(
        Path(__file__).parents[1] / "checkpoints/demo", tmp_path, {"add_bos_token": True, "bos_token": "<begin>"}
    )
    with pytest.raises(ValueError, match="'<begin>' is not in the vocabulary"):
        load_tokenizer(folder)


@needs_data
@pytest.mark.parametrize(
    ("token", "words"),
    [
        ({"5x": {"content": "<x>"}}, ["5x"]),
        ({"-1": {"content": "<x>"}}, ["-1"]),
        ({"32000": {}}, ["32000"]),
        ({"32000": "<x>"}, ["32000"]),
        ({"32000": {"content": "<x>", "rstrip": True}}, ["rstrip", "<x>"]),
    ],
)
def test_an_added_token_that_is_malformed_or_not_supported_is_refused(tmp_path, token, words):
    assert_refused(copy_model(STORIES, tmp_path, {"added_tokens_decoder": token}), *words)


@needs_data
@pytest.mark.parametrize("space", [" ", "\n", "\t"])
def test_whitespace_that_its_regular_expression_cannot_take_is_cut(space):
    llama3 = load_tokenizer(LLAMA3)
    for text in (space * 10**6, "a" + space * 60_000 + "b"):
        assert llama3.decode(llama3.encode(text)) == text
