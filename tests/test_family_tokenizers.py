"""Tokenizers in the forms in which the families publish them, and their templates' text, against `transformers`."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter

from cli.template import load_template
from tests.test_tokenizer import MULTIBYTE, TEXTS
from tokenizer import TextStream, load_tokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGER = [*TEXTS, *MULTIBYTE, "I'll say 1234567 THINGS, it's o'Clock\n\n  def f(x):\n\treturn x//2  ", "a" * 50]
# The byte-level ones: what splits a text before that, whether digits are cut apart, BOS, and tokens of the chat.
BYTE_LEVEL: dict[str, tuple[str | None, bool, str | None, list[str]]] = {
    "qwen3_moe": (CONTRACTIONS + REST.replace("NUMBERS", ""), False, None, ["<|im_start|>", "<|im_end|>", "<think>"]),
    "smollm3": (CONTRACTIONS + REST.replace("NUMBERS", "{1,3}"), False, None, ["<|im_start|>", "<|im_end|>"]),
    "granite": (None, True, None, ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]),
    "phi4": (CONTRACTIONS + REST.replace("NUMBERS", "{1,3}"), False, None, ["<|im_start|>", "<|im_sep|>", "<|end|>"]),
    "seed_oss": (REST.replace("NUMBERS", ""), False, None, ["<seed:bos>", "<seed:eos>", "<seed:think>"]),
    "olmo": (CONTRACTIONS + REST.replace("NUMBERS", "{1,3}"), False, None, ["<|endoftext|>", "<|im_start|>"]),
    "ministral3": (TEKKEN, False, "<s>", ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]"]),
}
CHATML = (
    "{{- bos_token if bos_token else '' }}{%- for message in messages %}"
    "{%- if loop.first and message.role != 'system' %}"
    "{{- '<|im_start|>system\\nToday is a day.<|im_end|>\\n' }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + '\\n\\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set loop_messages = messages -%}"
    "{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}"
    "{%- endif -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- else -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
MISTRAL = (
    "{%- set today = strftime_now('%Y') %}{{- bos_token }}{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}"
    "{%- elif message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}"
    "{%- else %}{{- message.content + eos_token }}{%- endif %}{%- endfor %}"
)
SMOLLM3 = (
    "{%- set ns = namespace(mode='/think') %}{%- for message in messages %}"
    "{%- if message.role == 'system' and '/no_think' in message.content %}{%- set ns.mode = '/no_think' %}{%- endif %}"
    "{%- if message.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\\n' + message.content }}{% endgeneration %}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if xml_tools or python_tools %}{{ tools | tojson }}{%- endif %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ns.mode }}{%- endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief. /no_think"},
    {"role": "user", "content": " Hello <|im_end|> & <b>you</b>\n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "¿Qué?"},
]


def byte_level(kind: str) -> tokenizers.Tokenizer:
    pattern, single_digits, bos, special = BYTE_LEVEL[kind]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=kind in ("smollm3", "ministral3")))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    if pattern:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    if kind == "qwen3_moe":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(LONGER * 3, trainer)
    backend.add_tokens([AddedToken(name, special=name != "<think>", normalized=False) for name in special])
    after: Any = processors.ByteLevel(trim_offsets=False)
    if bos:
        begin = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        after = processors.Sequence([after, begin])
    backend.post_processor = after
    return backend


def with_byte_fallback(kind: str) -> tokenizers.Tokenizer:
    """Make Phi-3's, with SentencePiece's space before a text, or Gemma's, which replaces spaces alone."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = ["<unk>", "<s>", "</s>"] if kind == "phi3" else ["<pad>", "<eos>", "<bos>", "<unk>"]
    data = [text.replace(" ", "▁") for text in LONGER[:4] * 3]
    backend.train_from_iterator(data, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    replace = normalizers.Replace(" ", "▁")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "phi3":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
        begin = "$A"
        chat = [AddedToken(name, special=True, rstrip=True) for name in ("<|user|>", "<|end|>", "<|assistant|>")]
    else:
        backend.normalizer, begin = replace, "<bos> $A"
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        chat = [AddedToken(name, special=True, normalized=False) for name in ("<start_of_turn>", "<end_of_turn>")]
        chat += [AddedToken(name, normalized=False) for name in ("\n\n", "\n\n\n", "▁▁", "[multimodal]")]
    backend.decoder = decoders.Sequence(steps)
    backend.add_tokens(chat)
    if begin != "$A":
        backend.post_processor = processors.TemplateProcessing(begin, special_tokens=[("<bos>", 2)])
    return backend


def save(folder: Path, backend: tokenizers.Tokenizer, **config: Any) -> PreTrainedTokenizerFast:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    kept = {key: value for key, value in config.items() if key.endswith("_token") or key == "chat_template"}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **kept)


def assert_same(folder: Path, theirs: PreTrainedTokenizerFast, names: list[str]) -> None:
    ours = load_tokenizer(folder)
    for text in [*LONGER, "".join(names) + " x".join(names), *names]:
        ids = theirs(text)["input_ids"]
        if theirs.bos_token and text.startswith(theirs.bos_token) and ids[:1] == ids[1:2]:
            ids = ids[1:]  # of ours, a text that begins with BOS gets no second one
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        stream = TextStream(ours)
        assert "".join([*(stream.push([i]) for i in ids), stream.flush()]) == ours.decode(ids)
    assert not {theirs.convert_tokens_to_ids(name) for name in names} & set(ours.encode("".join(names), False, False))


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_tokenizers_equal_transformers(tmp_path: Path, kind: str) -> None:
    bos, special = BYTE_LEVEL[kind][2:]
    theirs = save(tmp_path, byte_level(kind), **({"bos_token": bos} if bos else {}))
    assert_same(tmp_path, theirs, special)


@pytest.mark.parametrize("kind", ["phi3", "gemma"])
def test_tokenizers_with_byte_fallback_equal_transformers(tmp_path: Path, kind: str) -> None:
    theirs = save(tmp_path, with_byte_fallback(kind), bos_token="<s>" if kind == "phi3" else "<bos>")
    assert_same(tmp_path, theirs, ["<|user|>", "<|end|>"] if kind == "phi3" else ["<start_of_turn>", "<end_of_turn>"])


@pytest.mark.parametrize(
    ("template", "kind"), [(CHATML, "qwen3_moe"), (GEMMA, "gemma"), (MISTRAL, "ministral3"), (SMOLLM3, "smollm3")]
)
def test_templates_give_the_text_of_transformers(tmp_path: Path, template: str, kind: str) -> None:
    backend = with_byte_fallback(kind) if kind == "gemma" else byte_level(kind)
    names = {"gemma": ("<bos>", "<eos>"), "ministral3": ("<s>", "</s>")}.get(kind, (None, "<|im_end|>"))
    named = {key: name for key, name in zip(("bos_token", "eos_token"), names, strict=True) if name}
    theirs = save(tmp_path, backend, chat_template=template, **named)
    ours = load_template(tmp_path, load_tokenizer(tmp_path), kwargs={"enable_thinking": False})
    assert ours is not None
    for messages in (TALK, TALK[1:2], TALK[1:]):
        for add in (True, False):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add, enable_thinking=False
            )
            assert ours.render(messages, add) == expected


# ---------------------------------------------------------------------------------------------------------------------
# tekken.json


def tekken_file(folder: Path, *, named: bool = True, **changes: Any) -> Path:
    """Write a tekken.json of the ministral3 tokenizer's merges, with more tokens than the model has."""
    state = json.loads(byte_level("ministral3").to_str())["model"]["vocab"]
    from detokenizer import byte_level_bytes

    tokens = [byte_level_bytes(name) for name in sorted(state, key=state.__getitem__)]
    tokens = [token for token in tokens if token not in (b"<s>", b"</s>")]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    config = {"pattern": TEKKEN, "default_num_special_tokens": 30, "default_vocab_size": 30 + len(tokens) - 5}
    raw = {"config": config, "vocab": vocab, **({"special_tokens": special[::-1]} if named else {}), **changes}
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(raw))
    return folder


def test_tekken_json_gives_the_ids_of_transformers_after_its_bos(tmp_path: Path) -> None:
    ours = load_tokenizer(tekken_file(tmp_path))
    theirs = MistralConverter(str(tmp_path / "tekken.json")).converted()
    for text in [*LONGER, "<s>[INST]Hello[/INST] you</s>", "<SPECIAL_29>"]:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == (ids if ids[:1] == [1] else [1, *ids])
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos_id, ours.named_eos_id, ours.vocab_size) == (1, 2, theirs.get_vocab_size())
    assert ours.encode("[INST]", bos=False, parse_special=False) != [3]


def test_a_tekken_json_without_names_has_the_first_versions(tmp_path: Path) -> None:
    ours = load_tokenizer(tekken_file(tmp_path, named=False))
    assert ours.encode("<s>[INST][/INST][TOOL_CALLS]<pad>[SYSTEM_PROMPT][TOOL_CONTENT]<SPECIAL_20>", False) == [
        1, 3, 4, 9, 11, 17, 19, 20,
    ]  # fmt: skip


def test_tokenizer_json_goes_before_tekken_json(tmp_path: Path) -> None:
    save(tekken_file(tmp_path), byte_level("granite"))
    assert load_tokenizer(tmp_path).bos_id is None


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None},
        {"vocab": [{"rank": 0, "token_bytes": "AA=="}]},
        {"vocab": [{"rank": 0, "token_bytes": "not base64"}]},
        {"vocab": [{"rank": 0}]},
        {"vocab": 3},
        {"special_tokens": [{"rank": 1, "token_str": "<s>"}]},
        {"special_tokens": [{"rank": 0, "token_str": 3}]},
        {"config": {"pattern": "(", "default_num_special_tokens": 30}},
        {"config": {"pattern": TEKKEN, "default_num_special_tokens": 2}},
        {"config": {"pattern": TEKKEN, "default_num_special_tokens": 10**9}},
        {"config": {"pattern": TEKKEN, "default_num_special_tokens": "30"}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_tekken_json_is_refused_in_a_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"tekken\.json cannot be read as a tekken\.json .*; download it again"
    ) as error:
        load_tokenizer(tekken_file(tmp_path, **changes))
    assert "\n" not in str(error.value)
