"""Several ranks give what one gives, read only their share, refuse what cannot be shared, and end together."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import eval as evaluate
import generate
import quantize
from checkpoint import load_model, meta_model, tensor_specs
from cli import ranks as processes
from cli.ranks import local_device, num_cores
from cli.report import weight_bytes
from collectives import BYTES_READ_PER_SUM, draft_ranks
from config import parse_config, read_config
from files import write_safetensors
from linears import Form
from model import ONE_RANK, Ranks
from scripts.convert_hf_checkpoint import convert
from tests import ranks as on_ranks
from tests.conftest import HANG, NEWER, free_port
from tp import check_sizes, local_part

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "checkpoints" / "demo"
FAMILIES = (
    "gqa",
    "llama3",
    "wide_heads",
    "tied",
    "biased",
    "odd_vocabulary",
    "mistral_window",
    "qwen2",
    "qwen3",
    "mixtral",
    *NEWER,
    "three_kv_heads",  # two ranks have unlike shares of them
)
FUSED = ("gqa", "biased", "mixtral", "phi4_mini", "three_kv_heads")
EXPERTS_QUANTIZED = (("int8",), ("int4", "--groupsize", "32"))
QUANTIZED = (("int8",), ("int4", "--groupsize", "32"), ("int4-gptq", "--groupsize", "32"))
MODELS = [*FAMILIES, *(f"{name}-converted" for name in FUSED), "demo", *(f"demo-{mode}" for mode, *_ in QUANTIZED)]
MODELS += [f"mixtral_tied-{mode}" for mode, *_ in EXPERTS_QUANTIZED]
GPTQ = ("--calibration_samples", "2", "--calibration_length", "32")
# More ranks than some models have kv heads.
FOUR = (
    "gqa", "llama3", "biased", "biased-converted", "odd_vocabulary", "qwen3", "mixtral-converted", "demo",
    *(f"demo-{mode}" for mode, *_ in QUANTIZED),
)  # fmt: skip
MODELS_OF = {2: MODELS, 4: FOUR}
COUNTS = tuple(MODELS_OF)
CASES = [(count, name) for count, names in MODELS_OF.items() for name in names]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status (a signal's is negative), and what it wrote."""

    status: int
    stdout: str
    stderr: str


def on_all(folder, count, job, *arguments, num_nodes=1):
    """Do a job of ranks.py on `count` ranks, forked from a process that has imported torch: torchrun takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    ranks = [
        context.Process(target=on_ranks.as_rank, args=(rank, count, num_nodes, store.port, folder, job, arguments))
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.perf_counter() + HANG
    for rank in ranks:
        rank.join(max(0, deadline - time.perf_counter()))
        rank.kill()
        rank.join()
    return [
        Ended(rank.exitcode, *((folder / f"{name}-{i}").read_text() for name in ("stdout", "stderr")))
        for i, rank in enumerate(ranks)
    ]


def torchrun(*arguments, nproc=2):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", *map(str, arguments)]


@contextlib.contextmanager
def started(command, **environment):
    """Start a command in a process group of its own, and leave none of it behind."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    environment = {**os.environ, **own, **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in (*ranks_of(process), process.pid):  # the ranks have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def ranks_of(agent):
    """Return the process ids of the ranks of a torchrun agent that have not ended, in order."""
    children = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(agent.pid)], capture_output=True, text=True)
    return sorted(int(pid) for pid, state in map(str.split, children.stdout.splitlines()) if "Z" not in state)


def finished(command, **environment):
    with started(command, **environment) as process:
        stdout, stderr = process.communicate(timeout=HANG)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def our_lines(stderr):
    """Return what the ranks wrote, without what torchrun itself says of a rank that failed."""
    return [line for line in stderr.splitlines() if line.startswith(("error:", "rank ")) or "tok/s" in line]


def one_ranks_text(capfd, *options):
    generate.main(list(map(str, options)))
    return capfd.readouterr().out


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
    (models / "draft").symlink_to(ROOT / "checkpoints" / "demo-draft")
    # A head that has the demo's embedding, which is cut.
    shutil.copytree(ROOT / "checkpoints" / "demo-eagle3", models / "head")
    weights = load_file(models / "head" / "model.safetensors")
    del weights["embed_tokens.weight"]
    save_file(weights, models / "head" / "model.safetensors", {"format": "pt"})
    for name, (mode, *options) in (*(("demo", each) for each in QUANTIZED), ("draft", ("int8",))):
        options += GPTQ if mode == "int4-gptq" else []
        output = ["--output_path", str(models / f"{name}-{mode}")]
        quantize.main(["--checkpoint_path", str(models / name), "--mode", mode, *options, *output])
    for mode, *options in EXPERTS_QUANTIZED:
        output = ["--output_path", str(models / f"mixtral_tied-{mode}")]
        source = str(hub_checkpoint("mixtral_tied").path)
        quantize.main(["--checkpoint_path", source, "--mode", mode, *options, *output])
    # Compiled, whatever it says: the first two layers.
    shutil.copytree(DEMO, folder / "short")
    short = read_config(DEMO) | {"num_hidden_layers": 2}
    (folder / "short" / "config.json").write_text(json.dumps(short))
    weights = load_file(DEMO / "model.safetensors")
    kept = {
        name: t for name, t in weights.items() if "layers." not in name or ".layers.0." in name or ".layers.1." in name
    }
    save_file(kept, folder / "short" / "model.safetensors", {"format": "pt"})
    for mode, *options in EXPERTS_QUANTIZED:
        output = ["--output_path", str(folder / f"short-{mode}")]
        quantize.main(["--checkpoint_path", str(folder / "short"), "--mode", mode, *options, *output])
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
        ended = on_all(folder, count, on_ranks.models, folder, MODELS_OF[count])
        assert [rank.status for rank in ended] == [0] * count, ended
        found[count] = [torch.load(folder / f"{count}-{rank}.pt") for rank in range(count)]
    return found


@pytest.fixture(scope="module")
def alone(folder):
    return {name: on_ranks.logits_and_greedy(folder / "models" / name, ONE_RANK) for name in MODELS}


@pytest.mark.parametrize(("count", "name"), CASES)
def test_logits_of_a_batch_equal_one_ranks(found, alone, name, count):
    expected = alone[name]["logits"]
    # Logits reach 17 of the demo, 22 of odd_vocabulary, 12 of phi4_mini: their last bit is 2e-6, one rank's own error
    # 1e-5. The next test shows that it is no more.
    tolerance = max(1e-5, 2e-6 * expected.abs().max().item())
    for rank in found[count]:
        torch.testing.assert_close(rank[name]["logits"], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("count", COUNTS)
def test_in_double_precision_the_logits_equal_one_ranks_to_1e_9(found, count):
    expected = on_ranks.logits(load_model(DEMO, dtype=torch.float64))
    for rank in found[count]:
        torch.testing.assert_close(rank["doubles"], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("count", "name"), CASES)
def test_greedy_texts_of_a_batch_equal_one_ranks(found, alone, name, count):
    assert all(rank[name]["greedy"] == alone[name]["greedy"] for rank in found[count])


@pytest.mark.parametrize("count", COUNTS)
def test_all_ways_of_generating_give_one_ranks_text_on_every_rank_whatever_the_seeds_of_the_others(
    found, folder, count
):
    expected = on_ranks.texts(folder / "models", ONE_RANK)
    assert expected["plain drawn"] != expected["plain greedy"]
    assert all(rank["texts"] == {name: expected[name] for name in rank["texts"]} for rank in found[count])
    assert len(expected["ended greedy"][0]) < len(expected["ended greedy"][1])
    ways = ("lookup", "replicated", "sharded", "quantized", "head")
    assert all(expected[f"{name} greedy"] == expected["plain greedy"] for name in ways)
    assert sum(map(sum, (counts[1:] for counts in expected["accepted greedy"]))) > 2


def test_compiled_and_quantized_and_with_a_quantized_draft_the_text_is_the_eager_one(folder, tmp_path):
    ended = on_all(tmp_path, 2, on_ranks.compiled_texts, folder / "short-int4", folder / "short-int8")
    assert [rank.status for rank in ended] == [0, 0], ended
    expected = on_ranks.logits_and_greedy(folder / "short-int4", ONE_RANK)["greedy"][:1]
    for rank in ended:
        plain, speculated, num_accepted = json.loads(rank.stdout)
        assert plain == speculated == expected
        assert num_accepted > 0


@pytest.mark.parametrize("count", COUNTS)
def test_every_weight_but_norms_and_shared_kv_heads_is_cut(found, alone, count):
    """The embedding and the output head too. Two kv heads are replicated on four ranks."""
    model = load_model(DEMO, dtype=torch.float32)
    config = model.config
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    kv = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * config.hidden_size * 4
    copies = max(1, count // config.num_key_value_heads)
    expected = norms + (weight_bytes(model) - norms - kv + copies * kv) // count
    assert [rank["demo"]["bytes"] for rank in found[count]] == [expected] * count


@pytest.mark.parametrize("count", COUNTS)
def test_a_rank_reads_its_share_of_the_file_and_no_more(found, folder, count):
    size = (folder / "large" / "model.safetensors").stat().st_size
    for rank in found[count]:
        assert rank["memory"]["grown"] < 1.1 * size / count + 2**24


@pytest.mark.parametrize("count", COUNTS)
def test_random_weights_are_shared_too(found, count):
    assert all(rank["random"] == (1, 2, 96) for rank in found[count])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_one_ranks_text_once_and_says_how_many_ranks_there_were(tmp_path, capfd):
    options = ["--dtype", "float32", "--seed", "5", "--max_new_tokens", "30", "--num_samples", "2"]
    options += ["--draft_checkpoint_path", str(ROOT / "checkpoints" / "demo-draft"), "--prompt", "def f"]
    path = tmp_path / "metrics.json"
    files = ["--metrics_path", path, "--profile", tmp_path / "trace.json"]
    first, second = on_all(tmp_path, 2, on_ranks.command, *options, *files)
    assert (first.status, second.status) == (0, 0), first.stderr + second.stderr
    assert first.stdout == one_ranks_text(capfd, *options)
    assert len([line for line in our_lines(first.stderr) if "ended by" in line]) == 2
    assert second.stdout + second.stderr == ""
    metrics = json.loads(path.read_text())
    assert metrics["tp"] == 2
    assert metrics["weight_bytes"] < 0.6 * weight_bytes(load_model(DEMO, dtype=torch.float32))
    assert (tmp_path / "trace.json").is_file()


def test_the_random_prompt_is_one_prompt_though_no_seed_is_given(tmp_path):
    """Else the ranks would add up the states of different tokens."""
    path, single = tmp_path / "metrics.json", tmp_path / "single.json"
    options = ["--prompt_length", "40", "--max_new_tokens", "20", "--temperature", "0", "--dtype", "float32"]
    ended = on_all(tmp_path, 2, on_ranks.command, *options, "--metrics_path", path)
    assert [rank.status for rank in ended] == [0, 0], ended
    metrics = json.loads(path.read_text())
    generate.main([*options, "--seed", str(metrics["seed"]), "--metrics_path", str(single)])
    assert metrics["samples"][0]["tokens"] == json.loads(single.read_text())["samples"][0]["tokens"]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_the_cores_of_a_node_are_divided_among_its_ranks(tmp_path, num_nodes):
    ended = on_all(tmp_path, 2, on_ranks.threads, num_nodes=num_nodes)
    assert [rank.stdout for rank in ended] == [f"{max(1, num_cores() * num_nodes // 2)}\n"] * 2


@contextlib.contextmanager
def two_nodes(*options):
    """Start two torchrun agents, as two machines would run them: both have a local rank 0."""
    try:
        port = free_port()
    except OSError as error:
        pytest.skip(f"this machine forbids sockets on loopback: {error}")
    environment = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    with contextlib.ExitStack() as stack:
        nodes = []
        for node in range(2):
            where = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            command = torchrun(*where, "generate.py", *options, nproc=1)
            nodes.append(stack.enter_context(started(command, **environment)))
        yield nodes


def test_two_nodes_give_one_ranks_text_and_only_the_first_prints(capfd):
    options = ["--dtype", "float32", "--temperature", "0", "--max_new_tokens", "20"]
    with two_nodes(*options) as nodes:
        outputs = [node.communicate(timeout=HANG) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert outputs[0][0] == one_ranks_text(capfd, *options)
    assert outputs[1][0] == ""
    assert our_lines(outputs[0][1]) and not our_lines(outputs[1][1])


# ---------------------------------------------------------------------------------------------------------------------
# Ending


LONG = ("--ignore_eos", "--num_samples", 10000)  # far longer than any test


def generating(stack, **environment):
    """Start a long run, and wait for its first text."""
    agent = stack.enter_context(started(torchrun("generate.py", *LONG), **environment))
    assert agent.stdout.read(20).startswith("def")
    return agent


def ends_soon(agent, began):
    """Return what it writes to stderr until it ends: mostly at once, for gloo tells, else after so long a silence."""
    lost = time.perf_counter()
    try:
        return agent.communicate(timeout=2 * processes.SILENT + 5 * (lost - began))[1]
    except subprocess.TimeoutExpired:
        for pid in ranks_of(agent):
            os.kill(pid, signal.SIGABRT)  # it prints where its threads are
        pytest.fail(f"it still runs; its threads: {agent.communicate()[1]}")


def assert_all_gone(pids):
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_rank_ends_the_job_within_seconds():
    with contextlib.ExitStack() as stack:
        began = time.perf_counter()
        agent = generating(stack)
        pids = ranks_of(agent)
        os.kill(pids[1], signal.SIGKILL)
        stderr = ends_soon(agent, began)
        assert agent.returncode != 0
        assert "SIGKILL" in stderr
        assert_all_gone(pids)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_is_lost_ends_the_other_within_seconds(lost):
    began = time.perf_counter()
    with two_nodes(*LONG) as nodes:
        assert nodes[0].stdout.read(20).startswith("def")
        pids = [pid for node in nodes for pid in ranks_of(node)]
        os.kill(pids[lost], signal.SIGKILL)
        os.kill(nodes[lost].pid, signal.SIGKILL)
        stderr = ends_soon(nodes[1 - lost], began)
        assert nodes[1 - lost].returncode == 1
        assert "lost the others" in stderr or "lost rank" in stderr or "torchrun is gone" in stderr
        assert_all_gone(pids[1 - lost :][:1])


def test_a_node_whose_torchrun_alone_is_killed_ends_and_the_other_too():
    began = time.perf_counter()
    with two_nodes(*LONG) as nodes:
        assert nodes[0].stdout.read(20).startswith("def")
        [rank] = ranks_of(nodes[1])
        os.kill(nodes[1].pid, signal.SIGKILL)
        ends_soon(nodes[0], began)
        assert nodes[0].returncode == 1
        # Its parent is gone: it may stay a zombie.
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(rank)], capture_output=True, text=True).stdout
        assert state.strip() == "" or state.startswith("Z")


def test_a_rank_of_which_there_is_no_sign_ends_the_others(tmp_path):
    """What gloo does not tell: a rank that hangs, or was lost where gloo did not notice."""
    first, second = on_all(tmp_path, 2, on_ranks.hang)
    assert (first.status, second.status) == (1, 1)
    assert our_lines(first.stderr) == ["rank 0 lost rank 1: no sign of it for 3 seconds"]
    assert second.stderr == ""


def test_ranks_wait_for_the_user_as_long_as_it_takes(tmp_path):
    ended = on_all(tmp_path, 2, on_ranks.patience)
    assert [(rank.status, rank.stdout) for rank in ended] == [(0, "hello\n")] * 2, ended


@pytest.mark.parametrize("finishes", [True, False])
def test_the_stores_end_ends_a_rank_unless_it_is_about_to_finish(monkeypatch, capsys, finishes):
    """Of two that have met for the last time, one may be gone with its store before the other has noted that."""
    monkeypatch.setattr(processes, "MOMENT", HANG if finishes else 1)
    ended, done = [], threading.Event()
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    watch = threading.Thread(target=processes.end_with_the_others, args=(store, done))
    watch.start()
    time.sleep(0.3)
    del server
    time.sleep(0.3)
    if finishes:
        done.set()
    watch.join(timeout=HANG)
    assert not watch.is_alive()
    assert (ended, capsys.readouterr().err) == (([], "") if finishes else ([1], f"{processes.GONE}\n"))


def test_a_rank_ends_with_its_launcher_though_its_terminal_is_gone(monkeypatch):
    """Both at once, as when a window is closed: what cannot be said must not keep the rank."""
    ended = []
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    with Path("/dev/full").open("w") as nowhere:
        monkeypatch.setattr(processes.sys, "stderr", nowhere)
        processes.end_with_the_launcher(os.getppid() + 1, threading.Event())
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            nowhere.close()
    assert ended == [1]


def test_a_rank_that_fails_says_why_and_ends_the_others(tmp_path):
    first, second = on_all(tmp_path, 2, on_ranks.failure)
    assert (first.status, second.status) == (1, 1)
    assert second.stderr.count("Traceback") == 1
    assert second.stderr.endswith("RuntimeError: this rank has lost its way\n")
    assert first.stderr == ""


def test_a_rank_ends_though_the_store_does_not_answer(tmp_path):
    [alone] = on_all(tmp_path, 2, on_ranks.silence)[:1]
    assert (alone.status, alone.stdout, alone.stderr) == (1, "", "")


def test_ctrl_c_ends_all_ranks_and_one_too_that_waits_for_another():
    with contextlib.ExitStack() as stack:
        # In as many seconds torchrun kills what is left.
        agent = generating(stack, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(HANG))
        first, second = ranks_of(agent)
        os.kill(first, signal.SIGSTOP)
        time.sleep(1)  # by now the second waits for it
        os.killpg(agent.pid, signal.SIGINT)
        deadline = time.perf_counter() + HANG
        while second in ranks_of(agent) and time.perf_counter() < deadline:
            time.sleep(0.1)
        assert ranks_of(agent) == [first]
        os.kill(first, signal.SIGCONT)
        _, stderr = agent.communicate(timeout=HANG)
        assert 'generate.py", line' not in stderr  # no traceback of ours
        assert_all_gone([first, second])


def test_a_reader_that_leaves_ends_the_job_quietly():
    """As in `| head -1`."""
    with contextlib.ExitStack() as stack:
        agent = generating(stack)
        agent.stdout.close()
        assert agent.wait(timeout=HANG) == 0
        lines = agent.stderr.read().splitlines()
    assert all("tok/s" in line or line.startswith("--- ") for line in lines), lines


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.fixture
def config():
    return parse_config(read_config(DEMO))


@pytest.mark.parametrize(
    ("changes", "form", "count", "message"),
    [
        ({}, None, 3, "num_attention_heads 4 is not a multiple of the 3 ranks"),
        ({"intermediate_size": 770}, None, 4, "intermediate_size 770 is not a multiple of the 4 ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, None, 4, "num_key_value_heads 3 .* the 4 ranks"),
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, Form(4, 128), 2, "o_proj has 576 inputs"),
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "qk_norm_over_heads": True}, None, 2, "heads 3 is not a"),
        ({}, Form(4, 256), 2, "o_proj has 256 inputs in groups of 256, .* each of the 2 ranks"),
        ({"intermediate_size": 800}, Form(4, 32), 2, "down_proj has 800 inputs in groups of 32"),
        ({"head_dim": 50}, Form(4, 32), 2, "o_proj has 200 inputs in groups of 32"),
    ],
)
def test_sizes_that_cannot_be_shared_are_refused_with_both_numbers(config, changes, form, count, message):
    config = replace(config, **changes)
    check_sizes(config, form, 1)
    with pytest.raises(ValueError, match=message):
        check_sizes(config, form, count)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_kv_heads_may_be_fewer_or_more_than_ranks(config, count):
    config = replace(config, num_attention_heads=32, num_key_value_heads=4, intermediate_size=1024)
    check_sizes(config, Form(8), count)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "count"), [(6, 6, 16, 3), (8, 8, 8, 2), (9, 3, 32, 3), (6, 3, 32, 2)]
)
def test_groups_that_span_several_heads_are_cut_too(config, heads, kv_heads, head_dim, count):
    config = replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    check_sizes(config, Form(4, 32), count)
    scales = torch.arange(heads * head_dim // 32).expand(5, -1)
    parts = [local_part("layers.0.self_attn.o_proj.scales", 0, scales, config, Ranks(i, count)) for i in range(count)]
    assert torch.equal(torch.cat(parts, dim=1), scales)


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


def test_a_mistake_that_only_one_rank_finds_is_one_line_that_names_it(tmp_path):
    """Ten times, since a rank that is torn down while another is connected is aborted only sometimes."""
    for _ in range(10):
        first, second = on_all(tmp_path, 2, on_ranks.mistake)
        assert (first.status, second.status) == (2, 2)
        assert first.stderr == "error: rank 1: Expecting value: line 1 column 1 (char 0)\n"
        assert first.stdout + second.stdout + second.stderr == ""


def other_eos(folder):
    path = folder / "generation_config.json"
    path.write_text(path.read_text().replace('"eos_token_id": 2', '"eos_token_id": 3'))


def other_dtype(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("bfloat16", "float32"))


def other_pieces(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")


def other_weights(folder):
    """Change those of two projections of a layer, as fine-tuning may."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in ("q_proj", "v_proj"):
        weights[f"model.layers.0.self_attn.{name}.weight"] *= 1.5
    save_file(weights, path, {"format": "pt"})


def no_generation_config(folder):
    (folder / "generation_config.json").unlink()


@pytest.mark.parametrize(
    ("which", "change", "name"),
    [
        ("--checkpoint_path", other_eos, "generation_config.json"),
        ("--checkpoint_path", other_dtype, "config.json"),
        ("--checkpoint_path", other_weights, "model.safetensors"),
        ("--draft_checkpoint_path", other_pieces, "tokenizer_config.json"),
        ("--draft_checkpoint_path", no_generation_config, "generation_config.json"),
    ],
)
def test_a_node_whose_copy_of_a_checkpoint_is_another_is_refused_in_one_line(tmp_path, which, change, name):
    for rank in range(2):
        for folder in ("demo", "demo-draft"):
            shutil.copytree(ROOT / "checkpoints" / folder, tmp_path / str(rank) / folder)
    options = ["--checkpoint_path", "demo", "--draft_checkpoint_path", "demo-draft", "--max_new_tokens", "2"]
    changed = options[options.index(which) + 1]
    change(tmp_path / "1" / changed)
    first, second = on_all(tmp_path, 2, on_ranks.command_on_own_node, tmp_path, *options)
    assert (first.status, second.status) == (2, 2), first
    assert first.stderr.startswith(f"error: rank 1: {changed}/{name} is not the one that rank 0 has; copy ")
    assert first.stderr.count("\n") == 1
    assert first.stdout + second.stdout + second.stderr == ""


def test_a_wrong_option_is_one_line(tmp_path):
    first, second = on_all(tmp_path, 2, on_ranks.command, "--nonsense")
    assert (first.status, second.status) == (2, 2)
    assert first.stderr == "error: unrecognized arguments: --nonsense\n"
    assert first.stdout + second.stdout + second.stderr == ""


@pytest.mark.parametrize("command", [quantize.parse_args, evaluate.parse_args])
def test_a_command_for_one_process_refuses_several_and_one_of_them_says_so(monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    parsed = []
    with contextlib.suppress(SystemExit):  # a scheduler's, of which each process is alone
        parsed.append(command(["--text_file", "x"] if command is evaluate.parse_args else ["--mode", "int8"]))
    assert len(parsed) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as ended:
            command(["--mode", "int8"])
        assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is for one process, and torchrun has started 2" in said


@pytest.fixture
def keep_ctrl_c():
    """Give Ctrl-C back its handler, which a process that is one of several ranks sets to the system's."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keep_ctrl_c")
@pytest.mark.parametrize("count", ["2", "two"])
def test_ranks_that_torchrun_has_not_started_are_refused(monkeypatch, capsys, count):
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(SystemExit, match="2"):
        generate.main([])
    assert capsys.readouterr().err.startswith(f"error: WORLD_SIZE is {count}, but torchrun has not started this;")


# ---------------------------------------------------------------------------------------------------------------------
# The draft


def test_a_draft_is_shared_where_reading_it_costs_more_than_its_sums(config):
    ranks = Ranks(count=2)
    even = 2 * (2 * config.num_hidden_layers + 3) * BYTES_READ_PER_SUM
    assert draft_ranks(config, None, int(0.9 * even), ranks) is ONE_RANK
    assert draft_ranks(config, None, int(1.1 * even), ranks) is ranks
    assert draft_ranks(config, Form(4, 256), int(1.1 * even), ranks) is ONE_RANK  # its sizes do not allow it
    olmo = replace(config, qk_norm_over_heads=True)  # two sums a layer more
    assert draft_ranks(olmo, None, int(1.1 * even), ranks) is ONE_RANK
