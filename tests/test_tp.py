"""tp.py: several ranks give what one gives, read only their share, refuse what cannot be shared, and end together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quantize
from checkpoint import load_model, meta_model, parse_config, read_config, tensor_specs, write_safetensors
from model import ONE_RANK, Ranks
from quantize import Scheme
from scripts import project_tp
from scripts.convert_hf_checkpoint import convert
from tests import ranks as on_ranks
from tests.conftest import run_command
from tp import BYTES_READ_PER_SUM, check_sizes, draft_ranks, local_device, num_cores

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "checkpoints" / "demo"
FAMILIES = ("gqa", "llama3", "wide_heads", "tied", "biased", "mistral_window", "qwen2", "qwen3", "mixtral")
FUSED = ("gqa", "biased", "mixtral")
EXPERTS_QUANTIZED = (("int8",), ("int4", "--groupsize", "32"))
QUANTIZED = (("int8",), ("int4", "--groupsize", "32"), ("int4-gptq", "--groupsize", "32"))
MODELS = [*FAMILIES, *(f"{name}-converted" for name in FUSED), "demo", *(f"demo-{mode}" for mode, *_ in QUANTIZED)]
MODELS += [f"mixtral_tied-{mode}" for mode, *_ in EXPERTS_QUANTIZED]
GPTQ = ("--calibration_samples", "2", "--calibration_length", "32")
# More ranks than some models have kv heads.
FOUR = ("gqa", "llama3", "biased", "biased-converted", "qwen3", "mixtral-converted", "demo", "demo-int8", "demo-int4")
MODELS_OF = {2: MODELS, 4: FOUR}
COUNTS = tuple(MODELS_OF)
CASES = [(count, name) for count, names in MODELS_OF.items() for name in names]


def torchrun(*arguments, nproc=2):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", *map(str, arguments)]


@contextlib.contextmanager
def started(command, **environment):
    """Start a command in a process group of its own, and leave none of it behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finished(command, timeout=120, **environment):
    with started(command, **environment) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def our_lines(stderr):
    """Return what the ranks wrote, without what torchrun itself says of a rank that failed."""
    return [line for line in stderr.splitlines() if line.startswith(("error:", "rank ")) or "tok/s" in line]


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks against one


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hub_checkpoint):
    folder = tmp_path_factory.mktemp("tp")
    models = folder / "models"
    models.mkdir()
    for name in FAMILIES:
        (models / name).symlink_to(hub_checkpoint(name).path)
    for name in FUSED:
        convert(models / name, models / f"{name}-converted")
    (models / "demo").symlink_to(DEMO)
    for mode, *options in QUANTIZED:
        options += GPTQ if mode == "int4-gptq" else []
        output = ["--output_path", str(models / f"demo-{mode}")]
        quantize.main(["--checkpoint_path", str(DEMO), "--mode", mode, *options, *output])
    for mode, *options in EXPERTS_QUANTIZED:
        output = ["--output_path", str(models / f"mixtral_tied-{mode}")]
        source = str(hub_checkpoint("mixtral_tied").path)
        quantize.main(["--checkpoint_path", source, "--mode", mode, *options, *output])
    raw = {**json.loads((ROOT / "configs" / "tinyllama-1.1b.json").read_text()), "layout": "fused"}
    raw["num_hidden_layers"] = 2
    (folder / "large").mkdir()
    (folder / "large" / "config.json").write_text(json.dumps(raw))
    specs = tensor_specs(meta_model(raw), torch.bfloat16)
    write_safetensors(
        folder / "large" / "model.safetensors", specs, lambda name: torch.ones(specs[name][1], dtype=torch.bfloat16)
    )
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What every rank found, by the number of ranks."""
    found = {}
    for count in COUNTS:
        result = finished(torchrun("tests/ranks.py", folder, *MODELS_OF[count], nproc=count), timeout=300)
        assert result.returncode == 0, result.stderr
        found[count] = [torch.load(folder / f"{count}-{rank}.pt") for rank in range(count)]
    return found


@pytest.fixture(scope="module")
def alone(folder):
    return {name: on_ranks.logits_and_greedy(folder / "models" / name, ONE_RANK) for name in MODELS}


@pytest.mark.parametrize(("count", "name"), CASES)
def test_logits_of_a_batch_equal_one_ranks(found, alone, name, count):
    expected = alone[name]["logits"]
    # The demo's logits reach 20, where a float's last bit is 2e-6.
    tolerance = 1e-5 if not name.startswith("demo") else 2e-6 * expected.abs().max().item()
    for rank in found[count]:
        torch.testing.assert_close(rank[name]["logits"], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("count", "name"), CASES)
def test_greedy_texts_of_a_batch_equal_one_ranks(found, alone, name, count):
    assert all(rank[name]["greedy"] == alone[name]["greedy"] for rank in found[count])


@pytest.mark.parametrize("count", COUNTS)
def test_all_ways_of_generating_give_one_ranks_text_on_every_rank_whatever_the_seeds_of_the_others(found, count):
    expected = on_ranks.texts(DEMO, ONE_RANK)
    assert expected["plain drawn"] != expected["plain greedy"]
    assert all(rank["texts"] == expected for rank in found[count])
    assert all(expected[f"{name} greedy"] == expected["plain greedy"] for name in ("lookup", "replicated", "sharded"))


def test_compiled_steps_give_the_eager_text(found, alone):
    expected = alone["biased"]["greedy"][:1]
    assert [rank["compiled"] for rank in found[2]] == [{"plain": expected, "speculation": expected}] * 2


@pytest.mark.parametrize("count", COUNTS)
def test_every_weight_but_norms_and_shared_kv_heads_is_cut(found, alone, count):
    """The embedding and the output head too. Two kv heads are replicated on four ranks."""
    model = load_model(DEMO, dtype=torch.float32)
    config = model.config
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    kv = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * config.hidden_size * 4
    copies = max(1, count // config.num_key_value_heads)
    expected = norms + (model.weight_bytes - norms - kv + copies * kv) // count
    assert [rank["demo"]["bytes"] for rank in found[count]] == [expected] * count


@pytest.mark.parametrize("count", COUNTS)
def test_a_rank_reads_its_share_of_the_file_and_no_more(found, folder, count):
    size = (folder / "large" / "model.safetensors").stat().st_size
    for rank in found[count]:
        assert rank["memory"]["grown"] < 1.1 * size / count + 2**24


@pytest.mark.parametrize("count", COUNTS)
def test_the_cores_are_divided_among_the_ranks(found, count):
    assert [rank["threads"] for rank in found[count]] == [max(1, num_cores() // count)] * count


@pytest.mark.parametrize("count", COUNTS)
def test_random_weights_are_shared_too(found, count):
    assert all(rank["random"] == (1, 2, 96) for rank in found[count])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_one_ranks_text_once_and_says_how_many_ranks_there_were(tmp_path):
    options = ["--dtype", "float32", "--seed", "5", "--max_new_tokens", "30", "--num_samples", "2"]
    options += ["--draft_checkpoint_path", str(ROOT / "checkpoints" / "demo-draft"), "--prompt", "def f"]
    path = tmp_path / "metrics.json"
    result = finished(torchrun("generate.py", *options, "--metrics_path", path, "--profile", tmp_path / "trace.json"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == run_command("generate.py", *options, cwd=ROOT).stdout
    assert len([line for line in our_lines(result.stderr) if "ended by" in line]) == 2
    metrics = json.loads(path.read_text())
    assert metrics["tp"] == 2
    assert metrics["weight_bytes"] < 0.6 * load_model(DEMO, dtype=torch.float32).weight_bytes
    assert (tmp_path / "trace.json").is_file()


def test_the_random_prompt_is_one_prompt_though_no_seed_is_given(tmp_path):
    """Else the ranks would add up the states of different tokens."""
    path = tmp_path / "metrics.json"
    options = ["--prompt_length", "40", "--max_new_tokens", "20", "--temperature", "0", "--dtype", "float32"]
    result = finished(torchrun("generate.py", *options, "--metrics_path", path))
    assert result.returncode == 0, result.stderr
    metrics = json.loads(path.read_text())
    single = tmp_path / "single.json"
    run_command("generate.py", *options, "--seed", metrics["seed"], "--metrics_path", single, cwd=ROOT)
    assert metrics["samples"][0]["tokens"] == json.loads(single.read_text())["samples"][0]["tokens"]


def test_two_nodes_give_one_ranks_text_and_only_the_first_prints():
    """Two torchrun agents, as two machines would run them: both have a local rank 0."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    except OSError as error:
        pytest.skip(f"this machine forbids sockets on loopback: {error}")
    options = ["--dtype", "float32", "--temperature", "0", "--max_new_tokens", "20"]
    environment = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    with contextlib.ExitStack() as stack:
        nodes = []
        for node in range(2):
            where = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            nodes.append(stack.enter_context(started(torchrun(*where, "generate.py", *options), **environment)))
        outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert outputs[0][0] == run_command("generate.py", *options, cwd=ROOT).stdout
    assert outputs[1][0] == ""
    assert our_lines(outputs[0][1]) and not our_lines(outputs[1][1])


# ---------------------------------------------------------------------------------------------------------------------
# Ending


def ranks_of(agent):
    """Return the process ids of the ranks that a torchrun agent has started, in order."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True)
    return sorted(map(int, children.stdout.split()))


def generating(stack):
    """Start a run far longer than any test, and wait for its first text."""
    agent = stack.enter_context(started(torchrun("generate.py", "--ignore_eos", "--num_samples", 10000)))
    assert agent.stdout.read(20).startswith("def")
    return agent


def assert_all_gone(pids):
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_within_seconds(rank):
    with contextlib.ExitStack() as stack:
        agent = generating(stack)
        pids = ranks_of(agent)
        os.kill(pids[rank], signal.SIGKILL)
        began = time.perf_counter()
        _, stderr = agent.communicate(timeout=60)
        assert time.perf_counter() - began < 10
        assert agent.returncode != 0
        assert "SIGKILL" in stderr
        assert_all_gone(pids)


def test_a_rank_that_fails_ends_the_job_with_its_error():
    began = time.perf_counter()
    result = finished(torchrun("tests/ranks.py", "fail"), timeout=60)
    assert time.perf_counter() - began < 30
    assert result.returncode != 0
    assert "LookupError: this rank has lost its way" in result.stderr
    assert result.stderr.count("Traceback") <= 2  # its own, and torchrun's


def test_ctrl_c_ends_all_ranks_within_seconds():
    with contextlib.ExitStack() as stack:
        agent = generating(stack)
        pids = ranks_of(agent)
        os.killpg(agent.pid, signal.SIGINT)
        began = time.perf_counter()
        _, stderr = agent.communicate(timeout=60)
        assert time.perf_counter() - began < 10
        assert 'generate.py", line' not in stderr  # no traceback of ours
        assert_all_gone(pids)


def test_ctrl_c_ends_a_rank_that_waits_for_one_that_never_comes():
    with contextlib.ExitStack() as stack:
        agent = generating(stack)
        first, second = ranks_of(agent)
        os.kill(first, signal.SIGSTOP)
        time.sleep(1)  # by now the second waits for it
        os.kill(second, signal.SIGINT)
        deadline = time.perf_counter() + 5
        while second in ranks_of(agent) and time.perf_counter() < deadline:
            time.sleep(0.1)
        assert second not in ranks_of(agent)
        os.kill(first, signal.SIGCONT)
        agent.communicate(timeout=60)
        assert_all_gone([first, second])


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.fixture
def config():
    return parse_config(read_config(DEMO))


@pytest.mark.parametrize(
    ("changes", "scheme", "count", "message"),
    [
        ({}, None, 3, "num_attention_heads 4 is not a multiple of the 3 ranks"),
        ({"intermediate_size": 770}, None, 4, "intermediate_size 770 is not a multiple of the 4 ranks"),
        ({"vocab_size": 4097}, None, 2, "vocab_size 4097 is not a multiple of the 2 ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, None, 4, "num_key_value_heads 6 .* the 4 ranks"),
        ({}, Scheme("int4", 256), 2, "o_proj has 256 inputs in groups of 256, .* each of the 2 ranks"),
        ({"intermediate_size": 800}, Scheme("int4", 32), 2, "down_proj has 800 inputs in groups of 32"),
        ({"head_dim": 50}, Scheme("int4-gptq", 32), 2, "o_proj has 200 inputs in groups of 32"),
    ],
)
def test_sizes_that_cannot_be_shared_are_refused_with_both_numbers(config, changes, scheme, count, message):
    config = replace(config, **changes)
    check_sizes(config, scheme, 1)
    with pytest.raises(ValueError, match=message):
        check_sizes(config, scheme, count)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_kv_heads_may_be_fewer_or_more_than_ranks(config, count):
    config = replace(config, num_attention_heads=32, num_key_value_heads=4, intermediate_size=1024)
    check_sizes(config, Scheme("int8"), count)


def test_one_device_for_several_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    four = Ranks(count=4)
    assert local_device("cuda", four) == "cuda:3"
    assert local_device("cpu", four) == "cpu"
    assert local_device("cuda:1", ONE_RANK) == "cuda:1"
    with pytest.raises(ValueError, match="--device cuda:1 is one device and there are 4 ranks"):
        local_device("cuda:1", four)


def test_a_refusal_is_one_line_before_anything_loads(tmp_path):
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())  # no weights, no tokenizer
    result = finished(torchrun("generate.py", "--checkpoint_path", tmp_path, nproc=3))
    assert result.returncode != 0
    assert our_lines(result.stderr) == [
        "error: num_attention_heads 4 is not a multiple of the 3 ranks; start as many as divide it"
    ]
    assert "exitcode  : 2" in result.stderr


def test_a_mistake_that_only_one_rank_finds_is_one_line_that_names_it():
    result = finished(torchrun("tests/ranks.py", "mistake"))
    assert our_lines(result.stderr) == ["error: rank 1: Expecting value: line 1 column 1 (char 0)"]


def test_a_wrong_option_is_one_line():
    result = finished(torchrun("generate.py", "--nonsense"))
    assert our_lines(result.stderr) == ["error: unrecognized arguments: --nonsense"]


# ---------------------------------------------------------------------------------------------------------------------
# The draft


def test_a_draft_is_shared_where_reading_it_costs_more_than_its_sums(config):
    ranks = Ranks(count=2)
    even = 2 * (2 * config.num_hidden_layers + 2) * BYTES_READ_PER_SUM
    assert draft_ranks(config, None, int(0.9 * even), ranks) is ONE_RANK
    assert draft_ranks(config, None, int(1.1 * even), ranks) is ranks
    assert draft_ranks(config, Scheme("int4", 256), int(1.1 * even), ranks) is ONE_RANK  # its sizes do not allow it


# ---------------------------------------------------------------------------------------------------------------------
# The projection


def test_the_projection_is_the_formula_by_hand():
    config = parse_config(json.loads((ROOT / "configs" / "llama-3.1-70b.json").read_text()))
    # 70.55e9 weights, the embedding not read; 1,024 positions of 80 layers' keys and values.
    block_and_head = 70_553_706_496 - 128256 * 8192 - 161 * 8192
    read = (block_and_head * 2 + 1024 * 80 * 2 * 8 * 128 * 2) / 8
    found = project_tp.project(config, "bfloat16", 8, project_tp.INPUTS)
    assert abs(found["bytes_per_rank_and_token"] - read) <= 1
    assert found["tokens_per_s"] == round(1 / (read / (4.3e12 * 0.8) + 162 * 8e-6), 1)
    assert not project_tp.project(config, "bfloat16", 1, project_tp.INPUTS)["fits"]


def test_the_readme_and_the_results_hold_what_the_projection_gives(capsys, tmp_path):
    [kept] = (ROOT / "results").glob("*_tp-projection.json")
    project_tp.main(["--output_path", str(tmp_path / "projection.json")])
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()
    found, kept = (json.loads(path.read_text()) for path in (tmp_path / "projection.json", kept))
    assert {**found, "command": None} == {**kept, "command": None}
