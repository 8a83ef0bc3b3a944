"""The converter and the downloader, run as their users run them; the Hub is a server of this process."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import load_model
from config import read_config
from scripts.convert_hf_checkpoint import convert, main
from tests.conftest import FAMILIES, LENGTH, REPO, HubCheckpoint, assert_user_error, run_command, small_disk

GetCheckpoint = Callable[[str], HubCheckpoint]
CONVERT, DOWNLOAD = "scripts/convert_hf_checkpoint.py", "scripts/download.py"


def assert_same_logits(path: Path, reference: HubCheckpoint) -> None:
    logits = load_model(path, dtype=torch.float32)(reference.tokens, torch.arange(LENGTH))
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=0)


def names_in(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def tree(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# convert_hf_checkpoint.py

RunCommand = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_here(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """Run the converter's `main` in this process, which spares a test the seconds of importing torch again."""

    def run(*args: str | Path, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        status: Any = 0
        capfd.readouterr()
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(args, status, *capfd.readouterr())

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_logits_match_transformers(tmp_path: Path, hub_checkpoint: GetCheckpoint, family: str) -> None:
    reference = hub_checkpoint(family)
    convert(reference.path, tmp_path / "out")
    assert_same_logits(tmp_path / "out", reference)


def save_single(source: Path, path: Path) -> None:
    shutil.copytree(source, path)


def save_sharded(source: Path, path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(path, max_shard_size="60kB")
    assert len(list(path.glob("model-*.safetensors"))) > 2


def save_bin(source: Path, path: Path, legacy: bool = False) -> None:
    path.mkdir()
    shutil.copyfile(source / "config.json", path / "config.json")
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)


def save_legacy_bin(source: Path, path: Path) -> None:
    save_bin(source, path, legacy=True)
    assert not (path / "pytorch_model.bin").read_bytes().startswith(b"PK")


def save_sharded_bin(source: Path, path: Path) -> None:
    path.mkdir()
    shutil.copyfile(source / "config.json", path / "config.json")
    tensors = load_file(source / "model.safetensors")
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": sorted(tensors)[i::2] for i in range(2)}
    for file, names in shards.items():
        torch.save({name: tensors[name] for name in names}, path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("family", ["gqa", "tied"])
@pytest.mark.parametrize("save", [save_single, save_sharded, save_bin, save_legacy_bin, save_sharded_bin])
def test_every_layout_converts_to_the_same_model(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, run_here: RunCommand, save: Callable[[Path, Path], None], family: str
) -> None:
    reference = hub_checkpoint(family)
    save(reference.path, tmp_path / "model")
    result = run_here("--checkpoint_dir", "model")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert names_in(tmp_path) == ["model", "model-converted"]
    assert_same_logits(tmp_path / "model-converted", reference)


def test_the_command_converts_as_a_process_of_its_own(tmp_path: Path, hub_checkpoint: GetCheckpoint) -> None:
    reference = hub_checkpoint("tied")
    save_sharded_bin(reference.path, tmp_path / "model")
    result = run_command(CONVERT, "--checkpoint_dir", "model", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert_same_logits(tmp_path / "model-converted", reference)


def test_the_output_is_one_file_of_stacked_matrices_in_the_run_dtype(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, run_here: RunCommand
) -> None:
    source = hub_checkpoint("gqa").path
    result = run_here("--checkpoint_dir", source, "--output_dir", tmp_path / "a" / "b", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert {"config.json", "model.safetensors"} <= set(tree(tmp_path / "a" / "b"))
    tensors = load_file(tmp_path / "a" / "b" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert list(tensors["layers.1.self_attn.qkv_proj.weight"].shape) == [64 + 2 * 32, 64]
    config = read_config(tmp_path / "a" / "b")
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    model = load_model(tmp_path / "a" / "b")
    theirs = load_file(source / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.state_dict()["layers.1.mlp.gate_up_proj.weight"][112:], theirs.bfloat16())


def test_tokenizer_and_generation_config_come_along_and_weights_do_not(
    tmp_path: Path, hub_checkpoint: GetCheckpoint
) -> None:
    source = tmp_path / "model"
    shutil.copytree(hub_checkpoint("gqa").path, source)
    taken = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "LICENSE.txt"]
    taken += ["chat_template.jinja", "README.md", "generation_config.json"]
    left = ["optimizer.pt", "consolidated.00.pth", "training_args.bin", "model.safetensors.index.json"]
    for name in taken + left:
        (source / name).write_text(name)
    convert(source, tmp_path / "out")
    assert tree(tmp_path / "out") == sorted(["config.json", "model.safetensors", *taken])
    assert all((tmp_path / "out" / name).read_text() == name for name in taken)


@pytest.mark.parametrize("spelling", [".", "../model", "{parent}/model/", "sub/.."])
def test_the_default_output_stands_beside_the_folder_however_it_is_spelled(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, run_here: RunCommand, spelling: str
) -> None:
    shutil.copytree(hub_checkpoint("gqa").path, tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    result = run_here("--checkpoint_dir", spelling.format(parent=tmp_path), cwd=tmp_path / "model")
    assert result.returncode == 0, result.stderr
    assert names_in(tmp_path) == ["model", "model-converted"]


def test_an_output_that_exists_is_refused_and_kept(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, run_here: RunCommand
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    result = run_here("--checkpoint_dir", hub_checkpoint("gqa").path, "--output_dir", "out")
    assert_user_error(result, "out exists already")
    assert tree(tmp_path) == ["out", "out/mine"]


def test_a_conversion_says_when_there_is_no_tokenizer(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, run_here: RunCommand
) -> None:
    source = shutil.copytree(hub_checkpoint("gqa").path, tmp_path / "in")
    assert "no tokenizer" in run_here("--checkpoint_dir", "in", "--output_dir", "out").stderr
    for name in ("tokenizer.model", "tokenizer.json"):
        (source / name).write_text("{}")
        assert "no tokenizer" not in run_here("--checkpoint_dir", "in", "--output_dir", f"out-{name}").stderr
        (source / name).unlink()


def test_a_converted_folder_is_not_converted_again(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, run_here: RunCommand
) -> None:
    convert(hub_checkpoint("gqa").path, tmp_path / "out")
    assert_user_error(run_here("--checkpoint_dir", "out"), "out is converted already")
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("args", [[], ["--checkpoint_dir"], ["--checkpoint_dir", "x", "--dtype", "int3"], ["--what"]])
def test_a_mistake_on_the_converters_command_line_is_one_line(run_here: RunCommand, args: list[str]) -> None:
    assert_user_error(run_here(*args))


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, run_here: RunCommand) -> None:
    assert_user_error(run_here("--checkpoint_dir", "absent", "--output_dir", "a/b"), "absent is not a folder")
    assert tree(tmp_path) == []


def test_a_wrong_last_tensor_leaves_nothing_behind(
    tmp_path: Path, gqa_config: dict[str, Any], gqa_tensors: dict[str, Tensor]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(gqa_config))
    gqa_tensors["lm_head.weight"] = torch.ones(96, 65)
    save_file(gqa_tensors, tmp_path / "model" / "model.safetensors")
    before = tree(tmp_path)
    result = run_command(CONVERT, "--checkpoint_dir", "model", cwd=tmp_path)
    assert_user_error(result, "lm_head.weight", "[96, 65]", "[96, 64]")
    assert "convert:" in result.stderr, "it had begun to write"
    assert tree(tmp_path) == before


class Mark:
    """Pickled, it asks whoever loads it to make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, gqa_config: dict[str, Any], run_here: RunCommand, legacy: bool
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(gqa_config))
    weights = tmp_path / "model" / "pytorch_model.bin"
    torch.save({"lm_head.weight": Mark(tmp_path / "ran")}, weights, _use_new_zipfile_serialization=not legacy)
    result = run_here("--checkpoint_dir", "model")
    assert_user_error(result, "pytorch_model.bin cannot be read as weights", "asks to run code")
    assert names_in(tmp_path) == ["model"]
    torch.load(weights, weights_only=False)
    assert (tmp_path / "ran").is_dir(), "the pickle does what it threatens"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as weights"),
        (b"PK\x03\x04 and no more", "cannot be read as weights"),
        (b"hello", "cannot be read as weights"),
        ([torch.ones(2)], "more than tensors by name"),
        ({"lm_head.weight": 3}, "more than tensors by name"),
        ({"state_dict": {"lm_head.weight": torch.ones(2)}}, "more than tensors by name"),
        ({3: torch.ones(2)}, "more than tensors by name"),
        ({}, "tensors of 0 layers"),
    ],
    ids=repr,
)
def test_a_bin_file_that_holds_no_weights_is_refused_by_its_path(
    tmp_path: Path, gqa_config: dict[str, Any], content: Any, words: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(gqa_config))
    weights = tmp_path / "model" / "pytorch_model.bin"
    if isinstance(content, bytes):
        weights.write_bytes(content)
    else:
        torch.save(content, weights)
    with pytest.raises(ValueError, match=words) as error:
        convert(tmp_path / "model", tmp_path / "out")
    assert str(tmp_path / "model") in str(error.value)
    assert names_in(tmp_path) == ["model"]


def test_sparse_and_quantized_tensors_of_a_bin_file_are_refused_by_name(tmp_path: Path, hub_checkpoint: Any) -> None:
    changes: list[Callable[[Tensor], Tensor]] = [lambda t: t.to_sparse(), lambda t: t.char()]
    for number, change in enumerate(changes):
        path = tmp_path / f"model{number}"
        save_bin(hub_checkpoint("gqa").path, path)
        tensors = torch.load(path / "pytorch_model.bin")
        tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
        torch.save(tensors, path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is "):
            convert(path, tmp_path / "out")


@pytest.mark.parametrize("room_for_weights", [False, True])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, hub_checkpoint: GetCheckpoint, run_here: RunCommand, room_for_weights: bool
) -> None:
    source = tmp_path / "model"
    shutil.copytree(hub_checkpoint("gqa").path, source)
    size = (source / "model.safetensors").stat().st_size
    (source / "tokenizer.json").write_bytes(bytes(2 * size))
    with small_disk(tmp_path / "disk", size * 2 if room_for_weights else size // 2) as disk:
        result = run_here("--checkpoint_dir", source, "--output_dir", disk / "out")
        assert_user_error(result, "No space left on device" if room_for_weights else "are free; make room on the disk")
        assert tree(disk) == []


def test_a_write_that_fails_half_way_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, hub_checkpoint: GetCheckpoint
) -> None:
    source = hub_checkpoint("gqa").path
    half = (source / "model.safetensors").stat().st_size // 2

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))

    command = [sys.executable, str(REPO / CONVERT), "--checkpoint_dir", str(source), "--output_dir", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=1200
    )
    assert_user_error(result, "File too large", "model.safetensors")
    assert tree(tmp_path) == []


PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def peak_bytes(source: Path, output: Path) -> int:
    """Convert, and return the most memory that it held at once."""
    command = [sys.executable, "-c", PEAK, str(REPO / CONVERT), "--checkpoint_dir", str(source)]
    command += ["--output_dir", str(output), "--dtype", "bfloat16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=1200)
    return int(result.stdout) * 1024


def write_blank(path: Path, sizes: dict[str, Any], dtype: str) -> int:
    """Write a Hub folder whose weights are all zero and take no room on the disk; returns the largest one's bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        tensors = LlamaForCausalLM(LlamaConfig(**sizes)).state_dict()
    itemsize, end = {"BF16": 2, "F32": 4}[dtype], 0
    header: dict[str, Any] = {}
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * itemsize
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    encoded = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return max(tensor.numel() for tensor in tensors.values()) * itemsize


def test_memory_follows_the_largest_tensor_and_not_the_model(tmp_path: Path) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs Linux's /proc")
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 4096, "vocab_size": 16000}
    write_blank(tmp_path / "tiny", {**sizes, "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8}, "F32")
    largest = write_blank(tmp_path / "model", {**sizes, "num_hidden_layers": 5}, "F32")
    held = peak_bytes(tmp_path / "model", tmp_path / "out") - peak_bytes(tmp_path / "tiny", tmp_path / "tiny-out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 230e6
    shutil.rmtree(tmp_path / "out")  # pytest would keep it for days
    assert held < largest + 110e6, f"{held / 1e6:.0f} MB, where the largest tensor has {largest / 1e6:.0f} MB"
