"""bench.run, as its user runs it on a tiny config, and what it compares us with."""

import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import gpt_fast, ladder, llama_cpp, peers, products, projection, results, run, soak, speculation
from bench.process import Processes
from bench.results import Rung, format_line
from bench.run import main
from bench.runner import GREEDY, NUM_STEPS, PROMPT, Runner, make_steps
from bench.subject import Subject
from checkpoint import meta_model
from cli.report import step_weight_bytes
from config import parse_config
from engine import generate
from kernels.cpu import library
from kernels.layers import AtenInt4
from linears import Form
from model import RopeScaling
from random_weights import random_model
from steps import compiled, decode
from tests.conftest import REPO, assert_user_error, randomize_

RAW = {
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(RAW))
    return path


def command(config, *arguments, script=REPO / "scripts" / "benchmark.py", launcher=()):
    options = ["--config", config, "--output_dir", config.parent, "--device", "cpu", *arguments]
    return [sys.executable, *launcher, str(script), *map(str, options)]


def subject(forms=None, **changes):
    return Subject("tiny", RAW | changes, torch.bfloat16, {"": None, **(forms or {})})


def mistake(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, end.value.code, *capsys.readouterr())


# ---------------------------------------------------------------------------------------------------------------------
# The ladder


# A ladder whose steps are traced and not compiled, and whose roof takes no time.
QUICK = f"""
import sys; sys.path[0] = {str(REPO)!r}
import bench.run, torch
compile = torch.compile
torch.compile = lambda step, options, **how: compile(step, backend="eager", **how)
bench.run.measure_roof = lambda device: {{"read_gb_per_s": 2.0}}
bench.run.main()
"""


def test_ranks_share_the_ladder_and_rank_0_writes_it_with_its_drawing(config):
    options = ["--samples", 1, "--only", "decode", "--quantize", "--speculate_k", 1, "--new_tokens", 8]
    script = config.parent / "ladder.py"
    script.write_text(QUICK)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    command_line = command(config, *options, script=script, launcher=launcher)
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    [path] = config.parent.glob("*_decode-tp2.json")
    report = json.loads(path.read_text())
    rungs = {rung["name"]: rung for rung in report["rungs"]}
    assert list(rungs) == ["eager", "compile", "compile + speculation"]
    assert all(len(rung["samples"]) == 1 and rung["median"] > 0 for rung in rungs.values())
    assert report["tp"] == 2
    [roof] = report["roofs"]["decode"]
    share = rungs["eager"]["gb_per_s"] / roof["read_gb_per_s"]
    assert rungs["eager"]["share_of_roof"] == pytest.approx(share)
    assert rungs["compile + speculation"]["against"] == "compile"
    assert "compile + speculation" in path.with_suffix(".svg").read_text()
    assert done.stdout.count("compile + speculation") == 1


def test_an_interrupted_run_keeps_the_groups_it_finished_and_says_where(config):
    options = ["--samples", 1, "--only", "decode", "start", "--quantize"]
    process = subprocess.Popen(command(config, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    [path] = config.parent.glob("*_decode-start.json")
    assert errors.splitlines()[-1] == f"interrupted; start in {path}"
    assert "Traceback" not in errors
    report = json.loads(path.read_text())
    assert lines[0] == "start\n" and [rung["group"] for rung in report["rungs"]] == ["start", "start"]
    assert all(len(rung["samples"]) == 1 for rung in report["rungs"])
    assert not path.with_suffix(".svg").exists(), "nothing of the ladder was measured"


def test_steps_interrupted_in_their_first_turn_keep_what_was_measured(tmp_path, monkeypatch):
    """On a GPU that turn compiles for minutes; each of these rungs has warmed up by itself."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_roof", lambda device: {"read_gb_per_s": 1.0})
    report = results.Report(tmp_path / "steps.json", {"rungs": [], "roofs": {}})
    rungs = [Rung("done", "ms", lambda: 2.0, read_bytes=1e6), Rung("begun", "ms", interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run.measure_group("positions", rungs, 3, report, "cpu")
    [rung] = json.loads(report.path.read_text())["rungs"]
    assert rung["name"] == "done" and rung["samples"] == [2.0] and rung["share_of_roof"] == pytest.approx(0.5)


def test_on_a_gpu_a_step_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    """One that fails later keeps its samples, which are those of the first turns."""
    numbers, calls = iter([1.0, 3.0]), []

    def fail():
        calls.append(1)
        return 1 / 0

    monkeypatch.setattr(run, "measure_roof", lambda device: {"read_gb_per_s": 1.0})
    report = results.Report(tmp_path / "steps.json", {"rungs": [], "roofs": {}})
    rungs = [Rung("first", "ms", fail), Rung("at last", "ms", lambda: next(numbers)), Rung("whole", "ms", lambda: 2.0)]
    run.measure_group("positions", rungs, 3, report, "cuda")
    found = {rung["name"]: rung["samples"] for rung in json.loads(report.path.read_text())["rungs"]}
    assert found == {"at last": [1.0, 3.0], "whole": [2.0, 2.0, 2.0]} and len(calls) == 1
    assert "first" in (said := capsys.readouterr().err) and "ZeroDivisionError" in said and "StopIteration" in said
    with pytest.raises(ZeroDivisionError):
        run.measure_group("positions", rungs[:1], 3, report, "cpu")


@pytest.mark.parametrize(("end", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_signal_keeps_what_was_measured_and_says_where_and_turns_are_named_without_a_terminal(
    config, monkeypatch, capsys, end, status
):
    def measure(args, subject, device, ranks, report):
        def interrupted():
            raise end

        report.content |= {"rungs": [], "roofs": {}}
        rungs = [Rung("done", "ms", lambda: 2.0), Rung("begun", "ms", interrupted)]
        run.measure_group("positions", rungs, 3, report, "cpu")

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "measure_roof", lambda device: {"read_gb_per_s": 1.0})
    result = mistake(capsys, "--config", config, "--device", "cpu", "--output_dir", config.parent)
    assert result.returncode == status
    [path] = config.parent.glob("*_ladder.json")
    assert json.loads(path.read_text())["rungs"][0]["samples"] == [2.0]
    assert "positions: turn 1 of 3, of 2 rungs\n" in result.stderr
    assert f"interrupted; positions in {path}\n" in result.stderr


def test_ratios_are_taken_turn_by_turn_and_shares_of_the_roof_too():
    rungs = {
        "slow": Rung("slow", "ms", lambda: 0.0, read_bytes=2e6, against="slow", samples=[1.0, 10.0, 4.0]),
        "fast": Rung("fast", "ms", lambda: 0.0, against="slow", samples=[2.0, 5.0, 4.0]),
        "alone": Rung("alone", "tok/s", lambda: 0.0, flops=1e9, against="absent", samples=[100.0]),
    }
    roofs = [{"read_gb_per_s": read, "gemm_tflop_per_s": 0.5} for read in (2.0, 1.0, 1.0)]
    entries = {name: rung.entry(rungs, roofs) for name, rung in rungs.items()}
    assert entries["fast"]["ratios"] == [2, 0.5, 1] and entries["fast"]["ratio"] == 1
    assert entries["slow"]["gb_per_s"] == 0.5 and entries["slow"]["share_of_roof"] == 0.5
    assert entries["alone"]["share_of_roof"] == 0.2
    assert "ratio" not in entries["alone"] and "ratio" not in entries["slow"]


# ---------------------------------------------------------------------------------------------------------------------
# Fresh processes


INT4 = Form(4, 32, has_zeros=True)


@pytest.fixture
def one_linear(monkeypatch):
    """One linear stands for all of a block: each takes seconds to compile, in each form."""
    monkeypatch.setattr(products, "quantizable_linears", lambda block: {"down_proj": block.mlp.down_proj})


def test_every_form_of_a_product_that_is_right_is_measured(capsys, monkeypatch, one_linear):
    """Traced and not compiled, which takes a second for each of thirty; the next test compiles."""
    traced = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda module, options, **how: traced(module, **how))
    monkeypatch.setattr(products, "MOST_COPIES", 2)
    rungs = list(products.make_rungs(subject({"int8": Form(8), "int4-g32": INT4, "int8-g64": Form(8, 64)}), "cpu"))
    names = [rung.name for rung in rungs]
    norms = ["norm, multiply and sum", "norm folded into the sum"]
    forms = ["multiply and sum", "GEMM", *norms, *(["ours"] if library() else [])]
    forms += [f"{name}, {form}" for name in ("int8", "int4-g32") for form in ("multiply and sum", "ATen", "ours")]
    forms += [f"int8, {form}" for form in norms]
    forms += ["int8-g64, multiply and sum", *(["int8-g64, ours"] if library() else [])]
    assert sorted(names) == sorted(f"{form}, {rows}" for form in forms for rows in ("1 row", "5 rows"))
    assert all(rung.measure() > 0 for rung in rungs)
    assert all(rung.against in names for rung in rungs if "multiply and sum, " not in rung.name)
    size = {rung.weights: rung.read_bytes for rung in rungs}
    assert size[""] == 2 * 128 * 256
    assert size["int8"] < 0.52 * size[""] and size["int4-g32"] < 0.34 * size[""]
    assert capsys.readouterr().err == ""


def test_a_form_with_other_outputs_is_named_and_left_out(capsys, monkeypatch, one_linear):
    monkeypatch.setattr(products, "MOST_COPIES", 1)
    monkeypatch.setattr(
        products, "AtenInt4", lambda codes, scales, zeros, bias: AtenInt4(codes, scales, zeros + 1, bias)
    )
    names = [rung.name for rung in products.make_rungs(subject({"int4-g32": INT4}), "cpu")]
    assert not [name for name in names if "ATen" in name] and "int4-g32, multiply and sum, 1 row" in names
    assert "left out: int4-g32, ATen: ValueError: its outputs are wrong by" in capsys.readouterr().err


def test_the_form_of_atens_kernel_for_cuda_has_the_shapes_that_it_takes():
    with FakeTensorMode():
        codes, zeros = (torch.empty(64, columns, dtype=torch.uint8) for columns in (256, 8))
        layer = products.tinygemm(codes, torch.empty(64, 8, dtype=torch.bfloat16), zeros)
        assert [tensor.shape for tensor in layer.tensors] == [(64 // 8, 256 // 128, 32, 4), (8, 64, 2)]
        assert layer(torch.empty(5, 256, dtype=torch.bfloat16)).shape == (5, 64)


def test_a_step_is_taken_apart_and_its_settings_are_compared(config, capfd, monkeypatch):
    made = []

    def compiled_with(step, mode=None, settings=None):
        made.append(settings)
        return compiled(step, mode, settings)

    monkeypatch.setattr(ladder, "compiled", compiled_with)
    monkeypatch.setattr(run, "measure_roof", lambda device: {"read_gb_per_s": 1.0})
    monkeypatch.setitem(ladder.OPTIONS, "cpu", {"size assertions": ladder.OPTIONS["cpu"]["size assertions"]})
    main(["--config", str(config), "--output_dir", str(config.parent), "--device", "cpu", "--samples", "2",
          "--only", "kernels", "options", "--quantize"])  # fmt: skip
    [path] = config.parent.glob("*_kernels-options.json")
    rungs = {rung["name"]: rung for rung in json.loads(path.read_text())["rungs"]}
    changed = [f", {name}" for name in ladder.OPTIONS["cpu"]]
    assert made == list(ladder.OPTIONS["cpu"].values())
    report = json.loads(path.read_text())["rungs"]
    assert all(rung["kernels"] for rung in report if rung["group"] == "kernels")
    assert all(rung["ratio"] > 0 for rung in report if rung["group"] == "options" and ", " in rung["name"])
    assert list(rungs) == ["plain weights", *(f"plain weights{change}" for change in changed)]
    output, errors = capfd.readouterr()
    assert "size assertions" in output and "USDT" not in errors
    assert all(rung["median"] > 0 and len(rung["samples"]) == 2 for rung in rungs.values())


def test_a_setting_that_torch_cannot_do_is_named_and_left_out(config, monkeypatch, capfd):
    def fail(graph):
        raise ValueError("no such luck")

    monkeypatch.setattr(run, "measure_roof", lambda device: {"read_gb_per_s": 1.0})
    odd = {"odd": {"post_grad_custom_pre_pass": fail}, "size assertions": {"size_asserts": True}}
    monkeypatch.setitem(ladder.OPTIONS, "cpu", odd)
    main(["--config", str(config), "--output_dir", str(config.parent), "--device", "cpu", "--samples", "1",
          "--only", "options", "--quantize"])  # fmt: skip
    [path] = config.parent.glob("*_options.json")
    names = [rung["name"] for rung in json.loads(path.read_text())["rungs"]]
    assert names == ["plain weights", "plain weights, size assertions"]
    [said] = json.loads(path.read_text())["left_out"]
    assert said.startswith("plain weights, odd: ") and said.endswith("ValueError: no such luck")
    assert f"left out: {said}\n" in capfd.readouterr().err


def test_a_step_that_fails_without_a_setting_ends_the_run(config, monkeypatch, capfd):
    def broken(*args, **kwargs):
        raise RuntimeError("no step")

    monkeypatch.setattr(Runner, "step_at", broken)
    with pytest.raises(RuntimeError, match="no step"):
        main(["--config", str(config), "--output_dir", str(config.parent), "--device", "cpu", "--samples", "1",
              "--only", "options", "--quantize"])  # fmt: skip


@pytest.mark.parametrize("device", ladder.OPTIONS)
def test_the_settings_that_are_tried_are_inductors(device):
    known = torch._inductor.list_options()
    assert [name for settings in ladder.OPTIONS[device].values() for name in settings if name not in known] == []
    with pytest.raises(RuntimeError, match="Unexpected optimization option no_such"):
        compiled(decode, None, {"no_such": True})


def test_without_matplotlib_the_ladder_is_measured_and_not_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run.draw({"rungs": []}, tmp_path / "ladder.svg")
    assert capsys.readouterr().err == "the ladder is not drawn: pip install matplotlib\n"
    assert list(tmp_path.iterdir()) == []


def test_what_a_step_is_made_of_is_counted_a_step(capsys):
    """One call for all blocks, or as many as the two have linears, and the head; the longest is named first."""
    model = random_model(RAW, "cpu", torch.bfloat16)
    runner = Runner(model, make_steps("eager", "cpu"), 192)
    kernels = ladder.profile_step(runner.step_at(128), "cpu")
    calls = {kernel["name"]: kernel["calls"] for kernel in kernels}
    expected = {"kernels::run_sublayers": 1, "kernels::product": 1} if library() else {"aten::mm": 2 * 4 + 1}
    assert {name: calls[name] for name in expected} == expected
    whole = runner.time_step(128) * 1e3
    assert whole / 10 < sum(kernel["us"] for kernel in kernels) < whole * 10  # the profiler takes time too
    assert [kernel["us"] for kernel in kernels] == sorted((kernel["us"] for kernel in kernels), reverse=True)
    entry = Rung("step", "ms", lambda: 0.0, samples=[2.0], kernels=kernels).entry({}, [])
    entry["kernels"] = [{"name": "a_kernel", "calls": 32, "us": 500.0}]
    assert format_line(entry).splitlines()[1] == "        500.0 us,  25%, in   32 of a_kernel"


def test_the_peak_of_a_fresh_process_is_its_own(tmp_path):
    large = torch.ones(2**28)  # 1 GiB here, which getrusage would tell the child as its own
    found = Processes(subject(), "cpu", tmp_path).run_process("", "eager", tmp_path)
    assert found["weight_bytes"] < found["peak_bytes"] < large.nbytes
    assert found["decode_s"] > 0 and found["prefill_s"] > 0


def test_compile_times_of_all_layers_are_compared_with_those_of_four(tmp_path):
    rungs = {rung.name: rung.against for rung in Processes(subject(num_hidden_layers=22), "cpu", tmp_path).compile()}
    assert rungs["cold, decode, 22 layers"] == "cold, decode, 4 layers"
    assert {against for against in rungs.values() if against} <= set(rungs)
    assert len(rungs) == 8
    assert len(list(Processes(subject(), "cpu", tmp_path).compile())) == 4, "two layers alone"


# ---------------------------------------------------------------------------------------------------------------------
# Who is compared


@pytest.fixture
def model():
    model = random_model(RAW, dtype=torch.float32)
    randomize_(model, seed=1)
    model.setup_caches(1, 256)
    return model


def greedy(model, num_tokens):
    return [token for [ids] in generate(model, [PROMPT], num_tokens, GREEDY) for token in ids]


@pytest.fixture
def gguf_file(model, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    llama_cpp.write_gguf(model, tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_a_changed_file_is_mostly_found_where_it_stood_before():
    prompt, answer = speculation.make_texts()["editing"]
    assert len(prompt) > 1900 and prompt != answer
    model = random_model(RAW | {"vocab_size": 4096}, "cpu", torch.float32)
    runner = Runner(model, make_steps("eager", "cpu"), speculation.EDITING_LENGTH)
    plain, ngrams, suffixes = speculation.editing_ways(runner, prompt, answer)
    for way in (plain, suffixes):
        text = way.runner.generate([prompt], 300, speculation=way.speculation())
        assert [i for [ids] in text for i in ids] == answer[:300]
    found = [speculation.tokens_a_round(way.decode([prompt], len(answer))) for way in (ngrams, suffixes)]
    assert found[1] > 10 and 2 < found[0] < found[1]


def test_a_duel_of_drafters_says_of_each_what_became_of_its_drafts(monkeypatch):
    monkeypatch.setattr(speculation, "DEMO_TEXTS", {"code": speculation.DEMO_TEXTS["code"][:1]})
    duel = next(speculation.make_duels("demo-eager", subject(), "cpu", 200, [4]))
    duel.num_tokens = 32
    entries = {(entry["drafts"], entry["k"]): entry for entry in duel.run(1)}
    plain, draft_model, head = (entries[name, k] for name, k in (("none", "adapts"), ("draft model", 4), ("head", 4)))
    assert plain["speedup"] == 1 and "a" not in plain
    assert head["a"] > draft_model["a"] and head["tokens_a_round"] > 1.25 * draft_model["tokens_a_round"]
    for entry in (draft_model, head):
        [sample] = entry["samples"]
        assert sample["right"] == [sum(sample["accept_counts"][i + 1 :]) for i in range(len(sample["right"]))]
        assert entry["acceptance"][0] == sample["right"][0] / sample["tried"][0] > 0
        assert entry["share_of_formula"] == pytest.approx(entry["speedup"] / entry["formula"])
    assert entries["head and suffix", "adapts"]["tokens_a_round"] > entries["suffix", "adapts"]["tokens_a_round"] > 1


def test_llama_cpp_writes_our_greedy_text_from_the_file_we_make(model, gguf_file):
    theirs = llama_cpp.LlamaCpp(gguf_file, "cpu", 256)
    ours = greedy(model, 40)
    ids = [theirs.forward(torch.tensor([PROMPT]))]
    while len(ids) < 40:
        ids.append(theirs.step(ids[-1]))
    assert [token.item() for token in ids] == ours
    assert len(set(ours)) > 10, "a text in which positions matter"
    theirs.close()


def test_llama_cpp_gives_our_logits_of_each_text_and_the_bytes_that_a_step_reads(model, gguf_file):
    theirs = llama_cpp.LlamaCpp(gguf_file, "cpu", 64)
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = torch.cat([model(text, torch.arange(40)) for text in ids.split(1)])
    assert (theirs.all_logits(ids) - expected).abs().max() < 0.05 * expected.abs().max()
    theirs.close()
    assert llama_cpp.step_bytes(gguf_file) == pytest.approx(step_weight_bytes(model), rel=0.01)


@pytest.mark.parametrize("kind", llama_cpp.COUNTERPARTS.values())
def test_llama_cpp_runs_its_quantized_form_and_every_measurement(gguf_file, kind):
    quantized = llama_cpp.quantize_gguf(gguf_file, kind)
    assert quantized.stat().st_size < 0.5 * gguf_file.stat().st_size
    theirs = llama_cpp.LlamaCpp(quantized, "cpu", 256)
    assert all(
        rate > 0 for rate in (theirs.decode(8), theirs.decode_at(100), theirs.prefill(64), theirs.decode_at(100))
    )
    assert theirs.num_filled == 100 + NUM_STEPS
    theirs.close()


def test_transformers_runs_every_measurement_from_the_same_position(model):
    eager = peers.Transformers(peers.make_transformers(replace(subject(), dtype=torch.float32), "cpu"), "cpu")
    randomize_(eager.model, seed=1)
    assert {p.dtype for p in eager.model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in eager.model.parameters()) == sum(p.numel() for p in model.parameters())
    compiled = peers.CompiledTransformers(eager.model, "cpu", 256)
    for theirs in (eager, compiled):
        assert all(
            rate > 0 for rate in (theirs.decode(8), theirs.prefill(32), theirs.decode_at(100), theirs.decode_at(100))
        )
        assert theirs.num_filled == theirs.cache.get_seq_length() == 100 + NUM_STEPS
    texts = []
    for theirs in (eager, compiled):
        theirs.keep(50)
        ids = [torch.tensor([[7]])]
        while len(ids) < 20:
            ids.append(theirs.step(ids[-1]))
        texts.append([each.item() for each in ids])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5, "a text in which positions matter"


def test_llama_cpp_is_left_out_where_its_file_would_need_more(monkeypatch):
    monkeypatch.setattr(llama_cpp, "PACKAGES", {})
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace())
    scaled = replace(meta_model(RAW).config, rope_scaling=RopeScaling("linear", 2.0))
    assert llama_cpp.find_obstacle("cpu", scaled).startswith("its file would need rope_scaling linear")


@pytest.mark.skipif("GPT_FAST" not in os.environ, reason="set GPT_FAST to a checkout of gpt-fast")
@pytest.mark.parametrize("form", [None, Form(8)])
def test_gpt_fast_writes_the_same_in_steps_and_at_once_and_leaves_our_files_alone(form):
    """Not compiled: in float32 torch 2.13 does not compile its attention on a CPU."""
    ours = sys.modules["model"]
    theirs = gpt_fast.GptFast(Path(os.environ["GPT_FAST"]), meta_model(RAW).config, form, "cpu", torch.float32, 256)
    assert sys.modules["model"] is ours and sys.modules.get("GPTQ", ours) is ours
    theirs.compiled = theirs.decode_one
    assert all(
        rate > 0 for rate in (theirs.decode(8), theirs.prefill(32), theirs.decode_at(100), theirs.decode_at(100))
    )
    assert theirs.num_filled == 100 + NUM_STEPS
    if form is None:
        randomize_(theirs.model, seed=1)
    ids = torch.arange(130)[None] % 64
    text = [theirs.forward(ids)]
    while len(text) < 20:
        text.append(theirs.step(text[-1]))
    assert text[-1] == theirs.forward(torch.cat((ids, *text[:-1]), dim=1))


@pytest.mark.parametrize(
    ("changes", "form", "device", "words"),
    [
        ({}, None, "cpu", ""), ({}, INT4, "cuda", ""), ({}, INT4, "cpu", "int4"),
        ({"qk_norm": True}, None, "cpu", "no qk_norm"), ({"head_dim": 64}, None, "cpu", "heads of 32 channels, not 64"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, None, "cpu", "rope type linear"),
    ],
)  # fmt: skip
def test_what_gpt_fast_cannot_run_is_said(changes, form, device, words):
    reason = gpt_fast.find_obstacle(replace(meta_model(RAW).config, **changes), form, device)
    assert words in reason and bool(words) == bool(reason)


def test_what_is_not_installed_is_named_by_its_package(monkeypatch):
    monkeypatch.setattr(llama_cpp, "PACKAGES", {"json": "json", "no_such_module": "no-such-package"})
    assert llama_cpp.find_obstacle("cpu", meta_model(RAW).config) == "pip install no-such-package"


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, and other machines


@pytest.mark.parametrize("scheme", ["int5", "int4", "int4-g7", "int8-sym", "-g32", ""])
def test_a_scheme_that_there_is_not_is_one_line_that_names_the_option(config, capsys, scheme):
    assert_user_error(mistake(capsys, "--config", config, f"--quantize={scheme}"), "--quantize", repr(scheme))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "speed"], "--only"),
        (["--device", "tpu"], "--device tpu"),
        (["--samples", "0"], "--samples"),
        (["--config", "absent.json"], "--config absent.json is no file"),
        (["--speculate", "demo", "--only", "decode"], "leave out --only"),
        (["--only"], "--only names no group; give some of start, "),
        (["--only", "decode", "--name", "a/b"], "--name a/b names a folder too; leave out its slashes"),
        (["--speculate", "absent"], "--speculate absent: expected demo, demo-eager, shapes or the folder"),
        (["--gpt_fast", "."], "--gpt_fast is for --compare"),
        (["--compare", "--gpt_fast", "."], "--gpt_fast . is no checkout of gpt-fast"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(config, capsys, monkeypatch, options, words):
    monkeypatch.chdir(config.parent)
    found = mistake(capsys, "--config", config, "--output_dir", "out", "--device", "cpu", *options)
    assert_user_error(found, words)
    assert not Path("out").exists()


def test_results_that_are_there_are_kept(tmp_path):
    report = results.begin("run", tmp_path, "decode", rungs=[])
    report.write()
    before = report.path.read_text()
    with pytest.raises(ValueError, match="exists already; remove it, or choose another --name"):
        results.begin("run", tmp_path, "decode")
    assert report.path.read_text() == before


@pytest.mark.parametrize("output", ["/dev/null", "file", "file/below", "nowhere", "protected", "protected/below"])
def test_a_folder_that_takes_no_results_is_one_line_before_the_run(config, capsys, monkeypatch, output):
    monkeypatch.chdir(config.parent)
    Path("file").write_text("keep")
    Path("nowhere").symlink_to("gone/away")
    Path("protected").mkdir(mode=0o555)
    monkeypatch.setattr(run, "measure", None)
    found = mistake(capsys, "--config", config, "--output_dir", output, "--device", "cpu")
    assert_user_error(found, output)
    assert Path("file").read_text() == "keep" and not Path("gone").exists() and not list(Path("protected").iterdir())


def test_a_link_to_nowhere_is_a_result_that_exists(tmp_path):
    results.begin("run", tmp_path, "decode").path.symlink_to("gone")
    with pytest.raises(ValueError, match="exists already"):
        results.begin("run", tmp_path, "decode")


def test_a_processor_without_a_name_is_called_by_its_kind():
    facts = "processor : 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC 9B45\nflags : x\n"
    assert results.name_processor(facts) == "AMD EPYC 9B45 family 26 model 2"
    assert results.name_processor("processor : 0\nBogoMIPS : 50.00\nCPU implementer : 0x41\n")
    assert results.name_processor("") == platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# bench.soak


def test_a_short_soak_finds_that_the_same_turns_give_the_same_texts(monkeypatch):
    monkeypatch.setattr(soak, "NUM_DIFFERENT", 3)
    found = soak.soak(6, "cpu", "eager")
    assert (found["turns"], found["graphs"], found["changed_texts"]) == (6, {"warm-up": 0, "after": 0}, [])
    assert 6 * 8 <= found["tokens"] <= 6 * 64
    assert len(found["memory_bytes"]) == len(found["tokens_per_s"]) == 2


def test_a_soak_sees_what_grows_and_slows_and_changes(monkeypatch):
    held = []
    clock = 0.0

    def worse(*_):
        def turn(i):
            nonlocal clock
            clock += 1.0 if i < 15 else 1.2
            held.append(bytearray(b"x" * 2**23))
            return [i if i == 17 else i % 5]

        return turn

    monkeypatch.setattr(soak, "NUM_DIFFERENT", 5)
    monkeypatch.setattr(soak, "make_turns", worse)
    monkeypatch.setattr(soak, "time", SimpleNamespace(perf_counter=lambda: clock))  # a busy machine's own is uneven
    found = soak.soak(20, "cpu", "eager")
    assert found["changed_texts"] == [17]
    assert found["slowdown"] == pytest.approx(1 / 6)
    assert [fault.split()[0] for fault in found["faults"]] == ["memory", "the", "1"]


# ---------------------------------------------------------------------------------------------------------------------
# The projection


def test_the_projection_is_the_formula_by_hand():
    config = parse_config(json.loads((REPO / "configs" / "llama-3.1-70b.json").read_text()))
    # 70.55e9 weights, the embedding not read; 1,024 positions of 80 layers' keys and values.
    block_and_head = 70_553_706_496 - 128256 * 8192 - 161 * 8192
    read = (block_and_head * 2 + 1024 * 80 * 2 * 8 * 128 * 2) / 8
    figures = projection.project(config, "bfloat16", 8, projection.INPUTS)
    assert abs(figures["bytes_per_rank_and_token"] - read) <= 1
    assert figures["tokens_per_s"] == round(1 / (read / (4.3e12 * 0.8) + 163 * 8e-6), 1)
    assert not projection.project(config, "bfloat16", 1, projection.INPUTS)["fits"]


def test_the_docs_and_the_results_hold_what_the_projection_gives(capsys, tmp_path):
    [kept] = (REPO / "results").glob("*_tp-projection.json")
    projection.main(["--output_path", str(tmp_path / "projection.json")])
    assert capsys.readouterr().out in (REPO / "docs" / "gpus.md").read_text()
    found, kept = (json.loads(path.read_text()) for path in (tmp_path / "projection.json", kept))
    assert {**found, "command": None} == {**kept, "command": None}


def test_a_result_names_its_command_but_not_where_it_was_written(monkeypatch):
    for place in (["--output_dir", "/a b"], ["--output_dir=c"], []):
        monkeypatch.setattr(sys, "argv", ["run.py", *place, "--only", *place, "--name", "n"])
        assert results.name_command("run") == "python -m bench.run --only --name n"
