"""A checkpoint is a stranger's folder: whatever stands in it is read, or refused in one line with exit status 2.

Every case runs the commands themselves, in this process. bench/faults.py goes on where this table ends.
"""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
import eval as evaluation
import generate
import quantize
from bench import faults
from checkpoint import is_finite
from cli.errors import one_line, user_errors
from files import new_folder, write_whole
from scripts import convert_hf_checkpoint
from tests.conftest import HANG, REPO, assert_user_error, run_command, small_disk
from tokenizer import Tokenizer

SOURCE = REPO / "checkpoints/demo-draft"
SECRET = "correct horse battery staple"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"

Change = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint for a case to damage; what is outside of it is not the checkpoint's."""
    path = tmp_path / "home" / "model"
    shutil.copytree(SOURCE, path)
    (tmp_path / "secret").write_text(SECRET)
    shutil.copyfile(SOURCE / "model.safetensors", tmp_path / "outside.safetensors")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What is done to the folder


def content(file: str, data: bytes | str) -> Change:
    return lambda path: (path / file).write_bytes(data.encode() if isinstance(data, str) else data)


def truncated(file: str, size: int) -> Change:
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:size])


def removed(file: str) -> Change:
    return lambda path: (path / file).unlink()


def linked(file: str, target: str) -> Change:
    """target: relative to the folder."""

    def change(path: Path) -> None:
        (path / file).unlink(missing_ok=True)
        (path / file).symlink_to(target)

    return change


def replaced_by(file: str, make: Callable[[Path], Any]) -> Change:
    """By what is not a file."""

    def change(path: Path) -> None:
        (path / file).unlink(missing_ok=True)
        make(path / file)

    return change


def config(**changes: Any) -> Change:
    def change(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**raw, **changes}))

    return change


def tensors(change_them: Callable[[dict[str, Tensor]], Any]) -> Change:
    def change(path: Path) -> None:
        held = load_file(path / "model.safetensors")
        change_them(held)
        save_file(held, path / "model.safetensors")

    return change


def extra(name: str) -> Change:
    return tensors(lambda held: held.update({name: torch.ones(1)}))


def value(name: str, index: int, number: float, dtype: torch.dtype = torch.bfloat16) -> Change:
    """Set one number of a tensor."""

    def change_them(held: dict[str, Tensor]) -> None:
        held[name] = held[name].to(dtype)
        held[name].view(-1)[index] = number

    return tensors(change_them)


def header(change_it: Callable[[dict[str, Any]], Any]) -> Change:
    """Change what a safetensors header says, and none of the data after it."""

    def change(path: Path) -> None:
        data = (path / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + size])
        change_it(entries)
        changed = json.dumps(entries).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])

    return change


def entry(name: str, **fields: Any) -> Change:
    return header(lambda entries: entries[name].update(fields))


def header_bytes(text: bytes, size: int | None = None) -> Change:
    return content("model.safetensors", struct.pack("<Q", len(text) if size is None else size) + text)


def overlap(entries: dict[str, Any]) -> None:
    first, second = (n for n in sorted(entries) if "input_layernorm" in n)
    entries[second]["data_offsets"] = entries[first]["data_offsets"]


def index(norm: Any = "model-1.safetensors", **changes: Any) -> Change:
    """Put the weights into a shard, and change where the index says that tensors are."""

    def change(path: Path) -> None:
        (path / "model.safetensors").rename(path / "model-1.safetensors")
        names = load_file(path / "model-1.safetensors")
        shards = dict.fromkeys(names, "model-1.safetensors") | {NORM: norm}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards, **changes}))

    return change


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


def settings(**changes: Any) -> Change:
    return content("tokenizer_config.json", json.dumps(changes))


def tokenizer_json(**changes: Any) -> Change:
    vocabulary = {letter: 5000 + i for i, letter in enumerate("def")}
    raw: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        **changes,
    }
    return content("tokenizer.json", json.dumps(raw))


NOT_WHOLE = "is not a whole safetensors file"
DEEP = b"[" * 100_000

# What a stranger may send: its name, what is done to a good folder, and what the line says.
WEIGHTS: dict[str, tuple[Change, str]] = {
    "an empty file": (content("model.safetensors", b""), NOT_WHOLE),
    "seven bytes": (content("model.safetensors", bytes(7)), NOT_WHOLE),
    "a header of no bytes": (header_bytes(b""), NOT_WHOLE),
    "a header longer than the file": (header_bytes(b"{}", 3), NOT_WHOLE),
    "a header longer than any file": (header_bytes(b"{}", 2**63), NOT_WHOLE),
    "a header of 2^64 - 1 bytes": (header_bytes(b"{}", 2**64 - 1), NOT_WHOLE),
    "a header that is no JSON": (header_bytes(b"{hello}"), NOT_WHOLE),
    "a header that is no UTF-8": (header_bytes(b'{"\xff": 1}'), NOT_WHOLE),
    "a header that is a list": (header_bytes(b"[1, 2]"), NOT_WHOLE),
    "a header nested 100,000 deep": (header_bytes(DEEP), NOT_WHOLE),
    "a header without tensors": (header_bytes(b"{}"), "the weights have tensors of 0 layers, the first none"),
    "all but the last byte": (truncated("model.safetensors", -1), NOT_WHOLE),
    "half of the file": (truncated("model.safetensors", 600_000), NOT_WHOLE),
    "a byte too many": (lambda path: (path / "model.safetensors").open("ab").write(b"\0"), NOT_WHOLE),
    "an offset past the end": (entry(NORM, data_offsets=[10**7, 10**7 + 256]), NOT_WHOLE),
    "an offset of 2^64": (entry(NORM, data_offsets=[0, 2**64]), NOT_WHOLE),
    "a negative offset": (entry(NORM, data_offsets=[-256, 0]), NOT_WHOLE),
    "an offset that is no integer": (entry(NORM, data_offsets=[0.5, 256.5]), NOT_WHOLE),
    "one offset": (entry(NORM, data_offsets=[0]), NOT_WHOLE),
    "an end before its beginning": (header(lambda e: e[NORM]["data_offsets"].reverse()), NOT_WHOLE),
    "two tensors on the same bytes": (header(overlap), NOT_WHOLE),
    "bytes that no tensor has": (header(lambda e: e.pop(NORM)), NOT_WHOLE),
    "a shape that disagrees with its bytes": (entry(NORM, shape=[129]), NOT_WHOLE),
    "a shape whose size overflows": (entry(NORM, shape=[2**33, 2**33]), NOT_WHOLE),
    "a negative shape": (entry(NORM, shape=[-128]), NOT_WHOLE),
    "a shape of 100,000 ones": (entry(NORM, shape=[96] + [1] * 100_000), "has shape"),
    "a dtype that disagrees with its bytes": (entry(NORM, dtype="F32"), NOT_WHOLE),
    "a dtype that there is not": (entry(NORM, dtype="F128"), NOT_WHOLE),
    "a dtype that is a number": (entry(NORM, dtype=16), NOT_WHOLE),
    "a dtype of no floats": (entry(NORM, dtype="I16"), f"tensor {NORM} is torch.int16, expected floats"),
    "metadata that is no text": (header(lambda e: e.update(__metadata__={"format": 3})), NOT_WHOLE),
    "another shape of the same size": (tensors(lambda t: t.update({NORM: t[NORM].view(2, -1)})), "has shape [2, "),
    "a tensor of another size": (tensors(lambda t: t.update({QUERY: t[QUERY][:-1].clone()})), "has shape"),
    "a tensor missing": (tensors(lambda t: t.pop(QUERY)), f"lacks tensor {QUERY}"),
    "a tensor too many": (extra("more"), "has unexpected tensor more"),
    "a name that moves the cursor": (extra("\x1b[2J\x9b\u202e"), r"\x1b[2J\x9b\u202e"),
    "a name of a million letters": (extra("x" * 10**6), "is config.json the model's own?"),
    "a name of many lines": (extra("a\nerror: b\r\n"), "tensor a error: b"),
    "a NaN in a matrix": (value(QUERY, 77, torch.nan), "qkv_proj.weight has values that are not finite"),
    "a NaN at the very end": (value(EMBEDDING, -1, torch.nan), "embed_tokens.weight has values that are not finite"),
    "an infinite embedding": (value(EMBEDDING, 5, -torch.inf), "embed_tokens.weight has values that are not finite"),
    "an infinite norm": (value(NORM, 0, torch.inf), "norm.weight has values that are not finite"),
    "float64 beyond bfloat16": (value(NORM, 3, 1e300, torch.float64), "not finite in torch.bfloat16"),
    "a pointer of git-lfs": (content("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), NOT_WHOLE),
    "a page of HTML": (content("model.safetensors", "<!DOCTYPE html><html>404</html>"), NOT_WHOLE),
    "a pickle under the name of weights": (content("model.safetensors", pickle.dumps({NORM: 1})), NOT_WHOLE),
    "no weights": (removed("model.safetensors"), "has no model.safetensors"),
    "a folder in place of weights": (replaced_by("model.safetensors", Path.mkdir), "has no model.safetensors"),
    "a pipe in place of weights": (replaced_by("model.safetensors", os.mkfifo), "has no model.safetensors"),
    "weights linked to what is no weights": (linked("model.safetensors", "../../secret"), "outside of its folder"),
    "weights linked to others": (linked("model.safetensors", "../../outside.safetensors"), "outside of its folder"),
    "weights linked to /dev/zero": (linked("model.safetensors", "/dev/zero"), "outside of its folder"),
    "weights linked to themselves": (linked("model.safetensors", "model.safetensors"), "a link to nothing"),
    "a name up and out in the index": (index(norm="../../etc/passwd"), "file of its own folder"),
    "other weights up and out in the index": (index(norm="../../outside.safetensors"), "file of its own folder"),
    "an absolute path in the index": (index(norm="/etc/passwd"), "expected a .safetensors file of its own folder"),
    "a NUL in the index": (index(norm="a\0.safetensors"), "file of its own folder"),
    "a number in the index": (index(norm=7), "expected a .safetensors file of its own folder"),
    "a pickle in the index": (index(norm="pytorch_model.bin"), "expected a .safetensors file of its own folder"),
    "a shard that is not there": (index(norm="model-2.safetensors"), "model-2.safetensors is missing"),
    "a shard that is a link out": (
        both(index(norm="model-2.safetensors"), linked("model-2.safetensors", "../../outside.safetensors")),
        "outside of its folder",
    ),
    "a tensor that its shard lacks": (
        both(index(norm="model-2.safetensors"), content("model-2.safetensors", struct.pack("<Q", 2) + b"{}")),
        f"lacks tensor {NORM}",
    ),
    "an index without a map": (index(weight_map=None), "has no weight_map"),
    "an index that is a list": (both(index(), content("model.safetensors.index.json", "[]")), "expected an object"),
    "an index nested 100,000 deep": (both(index(), content("model.safetensors.index.json", DEEP)), "not valid JSON"),
    "an index linked out": (both(index(), linked("model.safetensors.index.json", "../../secret")), "outside of its"),
}  # fmt: skip
CONFIGS: dict[str, tuple[Change, str]] = {
    "no config": (removed("config.json"), "has no config.json"),
    "a folder in place of config": (replaced_by("config.json", Path.mkdir), "has no config.json"),
    "a pipe in place of config": (replaced_by("config.json", os.mkfifo), "has no config.json"),
    "a config linked out": (linked("config.json", "../../secret"), "outside of its folder"),
    "an empty config": (content("config.json", b""), "not valid JSON"),
    "a config of bytes": (content("config.json", bytes(range(256))), "not valid JSON"),
    "a config nested 100,000 deep": (content("config.json", DEEP), "not valid JSON"),
    "a number of 5,000 digits": (content("config.json", '{"hidden_size": ' + "9" * 5000 + "}"), "not valid JSON"),
    "a config that is null": (content("config.json", "null"), "expected an object"),
    "another architecture": (config(model_type="bert"), "model_type 'bert' is not supported"),
    "a model_type of an odd kind": (config(model_type={"a": []}), "model_type {'a': []} is not supported"),
    "a model_type of 100,000 letters": (config(model_type="x" * 100_000), "is not supported"),
    "a size that is text": (config(hidden_size="96"), "hidden_size is '96', expected int"),
    "a size that is true": (config(hidden_size=True), "hidden_size is True, expected int"),
    "a size that is half a number": (config(hidden_size=95.5), "hidden_size is 95.5, expected int"),
    "a size that is NaN": (config(vocab_size=float("nan")), "vocab_size is nan, expected int"),
    "a size that is infinite": (config(vocab_size=float("inf")), "vocab_size is inf, expected int"),
    "a hidden size of zero": (config(hidden_size=0), "hidden_size is 0, expected int of at least 1"),
    "no vocabulary": (config(vocab_size=0), "vocab_size is 0, expected int of at least 1"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads is 0, expected int of at least 1"),
    "no kv heads": (config(num_key_value_heads=0), "num_key_value_heads is 0, expected int of at least 1"),
    "negative layers": (config(num_hidden_layers=-2), "num_hidden_layers is -2, expected int of at least 1"),
    "a huge hidden size": (config(hidden_size=2**40), "hidden_size is 1099511627776, expected int"),
    "a huge vocabulary": (config(vocab_size=2**63), "vocab_size is 9223372036854775808, expected int"),
    "a googol of layers": (config(num_hidden_layers=10**100), "num_hidden_layers is 1"),
    "a vocabulary of 16 million": (config(vocab_size=2**24), "config.json asks for [16777216, "),
    "300 layers more": (config(num_hidden_layers=302), "num_hidden_layers 302 and the weights have"),
    "heads that kv heads do not divide": (config(num_key_value_heads=3), "not a multiple of num_key_value_heads 3"),
    "an odd head_dim": (config(head_dim=7), "head_dim 7 is odd"),
    "no context": (config(max_position_embeddings=0), "max_position_embeddings is 0, expected int"),
    "a negative epsilon": (config(rms_norm_eps=-1.0), "rms_norm_eps is -1.0, expected float"),
    "a rope_theta of zero": (config(rope_theta=0), "rope_theta in rope_parameters is 0, expected float"),
    "a rope that is a list": (config(rope_scaling=[8]), "rope_scaling is [8], expected an object"),
    "a rope that there is not": (config(rope_scaling={"rope_type": "x"}), "rope type 'x' is not supported"),
    "another activation": (config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "a flag that is text": (config(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', expected true or false"),
    "a dtype that we do not run": (config(dtype="float8"), "dtype 'float8' is not supported"),
    "a dtype that is a path": (config(dtype="../x"), "dtype '../x' is not supported"),
    "another quantization": (config(quantization={"mode": "int3"}), "quantiz"),
    "the weights of another model": (config(intermediate_size=172), "config.json asks for"),
}  # fmt: skip
# What only those commands read that make text.
TEXTS: dict[str, tuple[Change, str]] = {
    "an EOS below 0": (both(removed("generation_config.json"), config(eos_token_id=-1)), "eos_token_id is [-1]"),
    "an EOS beyond the vocabulary": (content("generation_config.json", '{"eos_token_id": [2, 4096]}'), "0 to 4095"),
    "an EOS that is null in a list": (content("generation_config.json", '{"eos_token_id": [null]}'), "[None]"),
    "a generation_config that is no JSON": (content("generation_config.json", "{"), "not valid JSON"),
    "a generation_config linked out": (linked("generation_config.json", "../../secret"), "outside of its folder"),
    "no tokenizer": (removed("tokenizer.model"), "has no tokenizer.json and no tokenizer.model"),
    "an empty tokenizer": (content("tokenizer.model", b""), "tokenizer.model is neither"),
    "half a tokenizer": (truncated("tokenizer.model", 30_000), "tokenizer.model is neither"),
    "a tokenizer of bytes": (content("tokenizer.model", bytes(range(256)) * 99), "tokenizer.model is neither"),
    "a tokenizer linked out": (linked("tokenizer.model", "../../secret"), "outside of its folder"),
    "a tokenizer of tiktoken cut short": (content("tokenizer.model", b"IQ== 0\nIg== 1\n"), "has 2 tokens and Llama 3"),
    "a tokenizer of tiktoken of no base64": (content("tokenizer.model", b"IQ== 0\n%% 1\n"), "not a base64 token"),
    "a tokenizer of another vocabulary": (both(settings(), tokenizer_json()), "and the model 4096 ids"),
    "a tokenizer.json that is no JSON": (content("tokenizer.json", "{"), "cannot be read as a tokenizer.json"),
    "a tokenizer.json without a model": (tokenizer_json(model=None), "cannot be read as a tokenizer.json"),
    "a tokenizer.json nested 100,000 deep": (content("tokenizer.json", DEEP), "cannot be read as a tokenizer.json"),
    "merges of tokens that are not there": (
        tokenizer_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
        "cannot be read as a tokenizer.json",
    ),
    "a decoder that nobody knows": (tokenizer_json(decoder={"type": "Glue"}), "cannot be read as a tokenizer.json"),
    "a tokenizer.json linked out": (linked("tokenizer.json", "../../secret"), "outside of its folder"),
    "settings that are a list": (content("tokenizer_config.json", "[]"), "expected an object"),
    "settings nested 100,000 deep": (content("tokenizer_config.json", DEEP), "not valid JSON"),
    "settings with 5,000 digits": (content("tokenizer_config.json", '{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
    "settings linked out": (linked("tokenizer_config.json", "../../secret"), "outside of its folder"),
    "a BOS that is not in the vocabulary": (settings(add_bos_token=True, bos_token="<x>"), "bos_token '<x>' is not in"),
    "an added token without text": (settings(added_tokens_decoder={"5": {}}), "is malformed"),
    "an added token of no id": (settings(added_tokens_decoder={"-5": {"content": "x"}}), "is malformed"),
}  # fmt: skip
COMMANDS: dict[str, Callable[[Path], tuple[ModuleType, list[str]]]] = {
    "generate": lambda path: (generate, ["--checkpoint_path", str(path), "--max_new_tokens", "3"]),
    "quantize": lambda path: (quantize, ["--checkpoint_path", str(path), "--mode", "int4"]),
    "convert": lambda path: (convert_hf_checkpoint, ["--checkpoint_dir", str(path)]),
    "eval": lambda path: (evaluation, ["--checkpoint_path", str(path), "--text_file", str(SOURCE / "README.md")]),
}


def ends(capfd: Any, module: ModuleType, args: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command's main in this process."""
    status: Any = 0
    capfd.readouterr()
    try:
        module.main(args)
    except SystemExit as end:
        status = end.code
    return subprocess.CompletedProcess(args, status, *capfd.readouterr())


def is_refused(capfd: Any, folder: Path, command: str, change: Change, words: str) -> None:
    change(folder)
    result = ends(capfd, *COMMANDS[command](folder))
    assert_user_error(result, words)
    line = result.stderr.splitlines()[-1]
    assert result.stdout == "" and len(line) < 1100 and line.isprintable()
    assert SECRET not in result.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "nothing is left behind"


@pytest.mark.parametrize("command", ["generate", "quantize", "convert"])
@pytest.mark.parametrize("case", [*WEIGHTS, *CONFIGS])
def test_weights_and_config_of_a_stranger_are_one_line(folder: Path, capfd: Any, case: str, command: str) -> None:
    is_refused(capfd, folder, command, *{**WEIGHTS, **CONFIGS}[case])


@pytest.mark.parametrize("command", ["generate", "eval"])
@pytest.mark.parametrize("case", TEXTS)
def test_a_tokenizer_of_a_stranger_is_one_line(folder: Path, capfd: Any, case: str, command: str) -> None:
    is_refused(capfd, folder, command, *TEXTS[case])


def test_the_table_has_sixty_cases_and_its_good_folder_is_good(folder: Path, capfd: Any) -> None:
    assert len({**WEIGHTS, **CONFIGS, **TEXTS}) >= 60
    for command in COMMANDS:
        assert ends(capfd, *COMMANDS[command](folder)).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# What the table does not hold


def in_cache(folder: Path) -> Path:
    """Move a checkpoint into a repository of the Hub's cache, as a snapshot of links; return that."""
    repository = folder.parent / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    folder.rename(repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_works_also_through_a_link_to_it(
    folder: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)  # beside the cache nothing is written: what it becomes goes to checkpoints/
    snapshot = in_cache(folder)
    (folder.parent / "mine").symlink_to(snapshot)
    for path in (snapshot, folder.parent / "mine"):
        for command in COMMANDS:
            assert ends(capfd, *COMMANDS[command](path)).returncode == 0


@pytest.mark.parametrize("target", ["../../../outside.safetensors", "../../../models--c--d/blobs/model.safetensors"])
def test_a_snapshot_leads_only_to_its_own_blobs(folder: Path, capfd: Any, target: str) -> None:
    shutil.copytree(folder, folder.parent / "models--c--d" / "blobs")
    snapshot = in_cache(folder)
    shutil.copyfile(SOURCE / "model.safetensors", folder.parent / "outside.safetensors")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(target)
    assert (snapshot / "model.safetensors").is_file()
    assert_user_error(ends(capfd, *COMMANDS["generate"](snapshot)), "outside of its folder")


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_license_linked_to_a_secret_is_not_copied_into_what_may_be_shared(
    folder: Path, capfd: Any, command: str
) -> None:
    linked("LICENSE", "../../secret")(folder)
    assert (folder / "LICENSE").read_text() == SECRET
    assert_user_error(ends(capfd, *COMMANDS[command](folder)), "LICENSE is a link to", "outside of its folder")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


class Mark:
    """Pickled, it asks whoever loads it to make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "tokenizer.model", "tokenizer.json"])
def test_a_pickle_in_place_of_any_file_does_not_run(folder: Path, tmp_path: Path, capfd: Any, file: str) -> None:
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    torch.save({NORM: Mark(tmp_path / "ran")}, folder / file)
    for command in ("generate", "eval") if "tokenizer" in file else COMMANDS:  # the others do not read it
        assert_user_error(ends(capfd, *COMMANDS[command](folder)))
    assert not (tmp_path / "ran").exists()
    torch.load((folder / file).rename(tmp_path / "pickle"), weights_only=False)
    assert (tmp_path / "ran").is_dir(), "the pickle does what it threatens"


@pytest.mark.parametrize(
    "weights",
    [
        {NORM: torch.ones(96, device="meta")},
        {NORM: torch.ones(96).to_sparse()},
        {NORM: torch.nn.Parameter(torch.ones(1)).expand(2**40)},
        {NORM: {"a": torch.ones(96)}},
        {"state_dict": {NORM: torch.ones(96)}},
        torch.ones(96),
    ],
    ids=["without memory", "sparse", "a trillion of one", "nested", "a level deeper", "no names"],
)
def test_a_pickle_of_odd_tensors_is_one_line(folder: Path, capfd: Any, weights: Any) -> None:
    held: Any = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**held, **weights} if isinstance(weights, dict) else weights, folder / "pytorch_model.bin")
    assert_user_error(ends(capfd, *COMMANDS["convert"](folder)))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_old_pickle_is_read_once_and_not_once_a_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    reads: list[Path] = []
    load = torch.load

    def counted(path: Path, **options: Any) -> Any:
        reads.append(path)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", counted)
    convert_hf_checkpoint.main(["--checkpoint_dir", str(folder)])
    assert reads == [folder / "pytorch_model.bin"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(dtype: torch.dtype) -> None:
    for number in (torch.nan, torch.inf, -torch.inf):
        for size in (1, 7, 64, 1000):
            for at in range(0, size, max(1, size // 50)):
                tensor = torch.linspace(-3, 3, size).to(dtype)
                assert is_finite(tensor)
                tensor[at] = number
                assert not is_finite(tensor), (number, size, at)


def test_weights_too_large_for_float16_are_told_what_to_do(folder: Path, capfd: Any) -> None:
    value(NORM, 3, 1e30)(folder)
    module, args = COMMANDS["generate"](folder)
    assert ends(capfd, module, args).returncode == 0
    assert_user_error(ends(capfd, module, [*args, "--dtype", "float16"]), "give --dtype bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

EVERY_PLANE = "".join(chr(plane << 16 | at) for plane in range(17) for at in (0x41, 0x100, 0xE000, 0xFFFD))
PROMPTS = {
    "every plane": EVERY_PLANE,
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9b\u2028\u202e\ufeff",
    "marks on a mark": "a" + "\u0301" * 200,
    "special tokens": "<s></s><unk><|eot_id|>" * 20,
    "spaces": " " * 900,
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_of_any_characters_is_continued(capfd: Any, name: str) -> None:
    args = ["--checkpoint_path", str(SOURCE), "--max_new_tokens", "2", "--ignore_eos", "--prompt", PROMPTS[name]]
    result = ends(capfd, generate, args)
    assert result.returncode == 0, result.stderr
    shown = PROMPTS[name] if name != "special tokens" else "<|eot_id|>" * 20
    assert result.stdout.replace("\r\n", "\n").startswith(shown.replace("\r\n", "\n"))


@pytest.mark.parametrize("prompt", ["\ud800", "a\udfff", "\udcff", EVERY_PLANE + "\udbff" + "x"])
def test_a_lone_surrogate_in_a_prompt_is_one_line(capfd: Any, prompt: str) -> None:
    result = ends(capfd, generate, ["--checkpoint_path", str(SOURCE), "--prompt", prompt])
    assert_user_error(result, "lone surrogate", "which is no character")


@pytest.mark.parametrize("option", ["--system", "--stop", "--checkpoint_path"])
def test_bytes_that_are_no_text_are_one_line_that_names_their_option(capfd: Any, option: str) -> None:
    result = ends(capfd, generate, ["--checkpoint_path", str(SOURCE), "--chat", "--prompt", "x", option, "caf\udce9"])
    assert_user_error(result, option, "UTF-8")


@pytest.mark.parametrize(
    "words",
    [
        ["--num_samples", "9" * 20], ["--batch_size", "9" * 20], ["--prompt_length", "9" * 20],
        ["--prompt_length", "300000000"], ["--temperature", "inf"], ["--temperature", "1e400"],
        ["--checkpoint_path", "a" * 300],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_number_or_a_name_beyond_all_measure_is_one_line(capfd: Any, words: list[str]) -> None:
    assert_user_error(ends(capfd, generate, words), words[0])


LEFT: dict[str, dict[str, bytes | None]] = {
    "a link to nothing": {"model.safetensors": None},
    "a shard without its index": {"model-00001-of-00002.safetensors": b""},
    "a shard of .bin without its index": {"pytorch_model-00001-of-00002.bin": b""},
    "what a trainer left": {"training_args.bin": b""},
    "a whole .bin": {"pytorch_model.bin": b""},
    "another name": {"model.fp16.safetensors": b""},
}
CURES = ["a link to nothing; download", "there is no index; download it", "there is no index; download it",
         "download them", "run `python scripts/convert_hf_checkpoint.py", "rename model.fp16.safetensors"]  # fmt: skip


@pytest.mark.parametrize(("name", "cure"), list(zip(LEFT, CURES, strict=True)))
def test_weights_that_are_not_there_are_one_line_with_a_cure(
    folder: Path, tmp_path: Path, capfd: Any, name: str, cure: str
) -> None:
    (folder / "model.safetensors").unlink()
    for file, content in LEFT[name].items():
        (folder / file).symlink_to(folder / "gone") if content is None else (folder / file).write_bytes(content)
    assert_user_error(ends(capfd, generate, ["--checkpoint_path", str(folder)]), cure)
    if "convert" not in cure:  # the converter reads it: an empty one is another mistake
        options = ["--checkpoint_dir", str(folder), "--output_dir", str(tmp_path / "out")]
        assert_user_error(ends(capfd, convert_hf_checkpoint, options), cure)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_small_file_that_is_a_link_to_nothing_is_not_taken_for_absent(folder: Path, capfd: Any, file: str) -> None:
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(folder / "gone")
    words = ["--checkpoint_path", str(folder), "--prompt", "x", "--chat"]
    assert_user_error(ends(capfd, generate, words), f"{file} is a link to nothing; download the model again")


def test_a_prompt_of_10_mb_is_one_line_and_is_not_encoded_whole(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def encode(self: Tokenizer, text: str) -> list[int]:
        lengths.append(len(text))
        return self.encode_text(text, True)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    (tmp_path / "long").write_text("a" * 10**7)
    args = ["--checkpoint_path", str(SOURCE), "--prompt_file", str(tmp_path / "long")]
    assert_user_error(ends(capfd, generate, args), "--prompt_file: 10000000 characters", "the model's context 1024")
    assert lengths == [16 * 1024]


def test_a_long_prompt_of_few_tokens_is_not_refused(tmp_path: Path, capfd: Any, folder: Path) -> None:
    prompt = "=" * 1200  # 76 tokens of 16 characters
    config(max_position_embeddings=74)(folder)
    result = ends(capfd, generate, ["--checkpoint_path", str(folder), "--prompt", prompt])
    assert_user_error(result, "--prompt has 76 tokens and the model's context 74")
    config(max_position_embeddings=80)(folder)
    args = ["--checkpoint_path", str(folder), "--prompt", 1090 * "=" + 110 * " ", "--max_new_tokens", "1"]
    assert ends(capfd, generate, args).returncode == 0


def test_layers_that_the_weights_lack_are_missed_before_any_is_made(
    folder: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(num_hidden_layers=4096)(folder)
    monkeypatch.setattr(checkpoint, "meta_model", lambda *_: pytest.fail("4,096 layers were made"))
    for module in (generate, evaluation):
        args = ["--text_file", str(folder / "config.json")] if module is evaluation else []
        result = ends(capfd, module, ["--checkpoint_path", str(folder), *args])
        assert_user_error(result, "num_hidden_layers 4096 and the weights have tensors of 2 layers")


# ---------------------------------------------------------------------------------------------------------------------
# Faults of the machine


def catches_sigterm(process: Any) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def wait_for(condition: Callable[[], bool], child: Any) -> None:
    began = time.monotonic()
    while not condition():
        assert child.is_alive() and time.monotonic() - began < HANG
        time.sleep(0.001)


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_sigterm_while_a_folder_is_written_is_a_line_and_leaves_nothing(tmp_path: Path, command: str) -> None:
    faults.write_source(tmp_path / "source", num_layers=60)
    output = tmp_path / "new" / "output"
    child = faults.start_child(faults.make_commands(tmp_path / "source", output)[command], tmp_path / "said")
    wait_for(lambda: any((tmp_path / "new").glob(".output.*.tmp/model.safetensors")), child)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 143
    assert (tmp_path / "said").read_text().endswith("ended by SIGTERM\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said", "source"]


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_sigterm_ends_a_run_with_a_line_and_no_metrics(tmp_path: Path, command: str) -> None:
    (tmp_path / "text").write_text("def main():\n" * 20_000)
    endless = {"generate": ["--num_samples", "100000"], "eval": ["--text_file", str(tmp_path / "text")]}[command]
    module = {"generate": generate, "eval": evaluation}[command]
    args = [*endless, "--metrics_path", str(tmp_path / "metrics.json")]
    child = faults.start_child(lambda: module.main(args), tmp_path / "said")
    wait_for(lambda: catches_sigterm(child), child)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 143
    assert (tmp_path / "said").read_text().endswith("ended by SIGTERM\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said", "text"]


def test_sigterm_in_a_thread_or_where_signals_are_to_end_the_process_is_left_alone() -> None:
    seen = []

    def see(signals_raise: bool) -> None:
        with user_errors(signals_raise):
            seen.append(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)

    see(True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    see(False)  # as a rank of several has it
    thread = threading.Thread(target=see, args=(True,))
    thread.start()
    thread.join()
    assert seen == [True, False, False]


def test_kills_leave_a_whole_folder_or_none_and_a_second_run_succeeds(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert threads == 1, "a forked child has no others"
    found = faults.report_kills(2, tmp_path, num_layers=20)
    assert len(found["kills"]) == 4 and found["faults"] == []


def test_a_killed_runs_folder_is_removed_by_the_next_and_a_living_runs_is_not(tmp_path: Path) -> None:
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    (tmp_path / ".out.mine.tmp").mkdir()
    with new_folder(tmp_path / "other") as other, new_folder(tmp_path / "out") as first, new_folder(tmp_path / "out"):
        assert first.is_dir() and other.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.mine.tmp", "other", "out"]


def test_changed_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    seen = [outcome for _, _, outcome, _ in faults.try_mutations(300, tmp_path / "forms")]
    assert set(seen) == {"read", "refused"}


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_read_only_folder_is_one_line_and_parents_that_were_made_are_removed(
    folder: Path, tmp_path: Path, capfd: Any, command: str
) -> None:
    option = {"convert": "--output_dir", "quantize": "--output_path"}[command]
    module, args = COMMANDS[command](folder)
    with small_disk(tmp_path / "disk", 2**20) as disk:
        result = ends(capfd, module, [*args, option, str(disk / "a" / "b" / "c")])
        assert_user_error(result, "are free; make room on the disk")
        assert not any(disk.iterdir())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = ends(capfd, module, [*args, option, str(disk / "a" / "b" / "c")])
        assert_user_error(result, f"{disk} is no folder that can be written to")


def test_a_full_disk_says_which_file_it_was_and_keeps_no_part_of_it(tmp_path: Path, capfd: Any) -> None:
    with small_disk(tmp_path / "disk", 2**16) as disk:
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.json'"):
            write_whole(disk / "metrics.json", "x" * 2**17)
        assert not any(disk.iterdir())


def test_a_stdout_that_cannot_be_written_is_one_line() -> None:
    command = [sys.executable, "generate.py", "--max_new_tokens", "2"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True)
    assert_user_error(result, "No space left on device")


LIMITED = """
import resource, sys
import generate, quantize
from scripts import convert_hf_checkpoint
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), used + int(sys.argv[2])))
{"generate": generate, "quantize": quantize, "convert": convert_hf_checkpoint}[sys.argv[1]].main(sys.argv[3:])
"""


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_memory_that_does_not_suffice_is_one_line(folder: Path, command: str) -> None:
    room, args = {
        "generate": (100 * 2**20, ["--prompt", "def", "--batch_size", "400", "--max_new_tokens", "1000"]),
        "convert": (2**17, []),
    }[command]
    run = [sys.executable, "-c", LIMITED, command, str(room), *COMMANDS[command](folder)[1][:2], *args]
    result = subprocess.run(run, cwd=REPO, capture_output=True, text=True, timeout=HANG)
    assert_user_error(result, "memory")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_message_is_one_printable_line_of_bounded_length() -> None:
    assert one_line("a\n b\t\x1b[31m\u202e\ud800 é 漢") == "a b \\x1b[31m\\u202e\\ud800 é 漢"
    assert len(one_line("x" * 10**6)) < 1100 and one_line("x" * 10**6 + " do this").endswith("do this")


@pytest.mark.parametrize("script", ["generate.py", "eval.py", "quantize.py", "scripts/convert_hf_checkpoint.py"])
def test_a_strangers_folder_is_one_line_of_a_process_of_its_own(folder: Path, script: str) -> None:
    WEIGHTS["a NaN in a matrix"][0](folder)
    option = "--checkpoint_dir" if "convert" in script else "--checkpoint_path"
    more = {"eval.py": ["--text_file", str(SOURCE / "README.md")], "quantize.py": ["--mode", "int8"]}
    result = run_command(script, option, folder, *more.get(script, []), cwd=folder.parent)
    assert_user_error(result, "values that are not finite")
