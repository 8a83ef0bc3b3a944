"""The kernels for CUDA without a GPU: run by Triton's interpreter, and compiled by its compiler for GPUs elsewhere."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import footprint, launches
from bench.footprint import ARCHITECTURES, compile_variants, count_instructions
from bench.launches import LAUNCHED, list_launches
from compressed import quantization_config
from kernels.inductor import streamed_linear
from kernels.optimize import cuda_kernels, optimize_
from linears import Form
from random_weights import random_model
from tests.conftest import HANG, REPO
from tests.test_bench import RAW

pytest.importorskip("triton", reason="triton is not installed; it has no build for this system")

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}  # bf16: the twin's weight is rounded to it, the kernel's is not


def said_by(module, *args, **env):
    """Run one of the modules beside this one as a process; return what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", f"tests.{module}", *map(str, args)], cwd=REPO, capture_output=True, text=True,
        timeout=HANG, env={**os.environ, **env},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def distances():
    return {name: float(distance) for name, distance in said_by("interpreted", TRITON_INTERPRET="1").items()}


@pytest.mark.parametrize(("kind", "count"), [("int4", 19), ("int8", 6), ("attention", 14)])
def test_kernels_match_their_twins(distances, kind, count):
    ours = {name: distance for name, distance in distances.items() if name.startswith(kind)}
    assert len(ours) == count
    far = {n: d for n, d in ours.items() if not d <= TOLERANCE.get(n.split()[-1], TOLERANCE["fp32"])}  # nan is far
    assert not far


@pytest.fixture(scope="module")
def compiled_kernels():
    made = [(sm, kind) for sm in ARCHITECTURES for kind in compile_variants(["Llama-3.1-8B"], sm, rows=(1, 6))]
    others = [kind for name in ("Llama-2-7B", "Llama-3.1-70B/8") for kind in compile_variants([name], 90, rows=(1,))]
    made += [(90, kind) for kind in others if kind.kernel.name == "int4_row"]
    return [(kind.kernel.name, sm, kind.measure(), kind.used_by) for sm, kind in made]


def test_kernels_keep_their_numbers_in_registers(compiled_kernels):
    assert {name for name, *_ in compiled_kernels} == {
        "int4_row", "int4_rows", "int8_rows", "attend_split", "combine_splits",
    }  # fmt: skip
    assert not [(*kind, used) for *kind, took, used in compiled_kernels if took["spilled_bytes"]]
    # Of 65,536 registers 512 threads may have 128 each, three programs of attention 170.
    bounds = {"attend_split": 170}
    over = [(name, took) for name, _, took, _ in compiled_kernels if took["registers"] > bounds.get(name, 128)]
    assert not over


def test_a_weight_takes_few_instructions(compiled_kernels):
    """On sm_90. An H200 reads an int4 weight in the time of 4.3 instructions, with groups of 128 in that of 3.65.

    A norm in a kernel takes 0.5 of one more, where eight rows of the weight share an x, and saves a launch.
    """
    most = {"int4_row": 4.1, "int4_rows": 6.6, "int8_rows": 5.5}
    counts = [(name, took["instructions_a_weight"], used_by) for name, sm, took, used_by in compiled_kernels
              if sm == 90 and name in most]  # fmt: skip
    assert {name for name, *_ in counts} == set(most)
    assert {K for _, of, _ in counts for K in of} >= {4096, 11008, 14336, 8192, 3584}
    for name, of, used_by in counts:
        few, normed = "/8" in used_by[0], name == "int4_row" and "down" not in used_by[0]
        bound = (5.0 if few else most[name]) + (0.6 if few else 0.45) * normed  # few rows share an x there
        assert all(3 < count <= bound for count in of.values()), (name, of, used_by)


def test_int4_takes_more_rows_of_a_weight_that_has_many():
    cuda = cuda_kernels()
    assert [cuda.int4_tile(N, 4096, 32)["ROWS"] for N in (1280, 2047, 2048, 4096)] == [4, 4, 8, 8]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("I I .L_1: I I J1 I E", (4, 3)),
        ("I .L_1: I .L_2: I I J2 I J1 E", (5, 3)),  # the innermost
        ("I .L_1: I J1 I I J1 E", (2, 5)),  # one loop, which jumps back in two places
        ("I .L_1: I J1 .L_2: I I I J2 E .L_3: J3", (4, 4)),  # the longer one; what is behind the end stands still
    ],
)
def test_instructions_are_counted_in_the_longest_innermost_loop(body, expected):
    lines = []
    for word in body.split():
        jump = f"@P0 BRA `(.L_{word[1:]}) ;" if word[0] == "J" else {"I": "FFMA R0 ;", "E": "EXIT ;"}.get(word)
        lines.append(word if jump is None else f"        /*{16 * len(lines):04x}*/                   {jump}")
    assert count_instructions("\n".join(lines)) == expected
    with pytest.raises(ValueError, match="no loop"):
        count_instructions(lines[0])


def test_int8_of_a_row_is_scaled_after_the_sum():
    """Compiled, for which a scale in the sum would be one instruction in five more."""
    seen = []

    def keep(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op != "placeholder")
        return graph

    weight, scales = torch.randint(-127, 128, (8, 64), dtype=torch.int8), torch.rand(8)
    x = torch.randn(1, 64)
    y = torch.compile(streamed_linear, backend=keep)(x, weight, scales=scales)
    assert torch.allclose(y, x @ (weight * scales.unsqueeze(1)).T, rtol=1e-4, atol=1e-3)
    products = [i for i, target in enumerate(seen) if "mul" in target]
    assert len(products) == 2 and products[0] < seen.index("sum") < products[1]


def test_weights_and_caches_are_loaded_16_bytes_a_thread(compiled_kernels):
    for name, _, took, used_by in compiled_kernels:
        # Of each of a program's rows; of K and V, 16 KiB a block by so many threads, at least.
        least = {"int4_row": 4, "attend_split": 2 * 64 * 128 * 2 // 16 // took["threads"]}.get(name, 1)
        assert took["loads_of_16_bytes"] >= least, (name, used_by)


def test_on_cuda_a_model_gets_these_kernels():
    """Chosen by the type of the device alone: nothing is run."""
    cuda = cuda_kernels()
    int4 = {"quantization_config": quantization_config(Form(4, 32, has_zeros=True))}
    fast = random_model(RAW | int4, dtype=torch.float32, optimize=False)
    optimize_(fast, "cuda")
    for block in fast.layers:
        assert block.self_attn.attend is cuda.attention
        assert isinstance(block.mlp.down_proj, cuda.CudaInt4)
    assert isinstance(fast.lm_head, cuda.CudaInt8)


PRODUCTS = ["2048 x 1024", "1024 x 1024", "11008 x 1024", "1024 x 11008"]
ATTENTION = ["pointwise 1024", "attend_split", "combine_splits"]  # k and v are stored where q is rotated


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What a layer launches on a GPU, by the form of its weights and the step."""
    folder = tmp_path_factory.mktemp("launches")
    raw = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 256, "max_position_embeddings": 2048,
           "rms_norm_eps": 1e-5, "rope_theta": 1e4, "torch_dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    command = [sys.executable, "-m", "bench.launches", "--config", str(folder / "config.json")]
    command += ["--output_dir", str(folder)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1].startswith("wrote "), result.stderr  # torch may have warned before
    [path] = folder.glob("*-launches.json")
    steps = json.loads(path.read_text())["steps"]
    head = "reduction 256 x 1024"
    assert all(len(step["besides"]) == 7 and head in step["besides"] for step in steps if step["step"] == "decode")
    assert all(step["launches"] == 32 * len(step["a_layer"]) + len(step["besides"]) for step in steps)
    return {(step["weights"], step["step"]): step["a_layer"] for step in steps}


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_a_row_by_a_weight_is_one_reduction(launched, weights):
    """What inductor writes for it and what stands around it: no weight in another dtype in memory, no GEMM."""
    qkv, o, gate_up, down = (f"reduction {shape}" for shape in PRODUCTS)
    assert launched[weights, "decode"] == [qkv, *ATTENTION, o, gate_up, down]


def test_a_layer_launches_no_more_than_it_needs(launched):
    assert {key: len(kernels) for key, kernels in launched.items()} == {
        ("plain", "decode"): 7, ("plain", "verify of 5"): 11, ("int8", "decode"): 7, ("int8", "verify of 5"): 9,
        ("int4-g32", "decode"): 7, ("int4-g32", "verify of 5"): 9,
    }  # fmt: skip
    assert launched["int4-g32", "decode"].count("int4_product") == launched["plain", "verify of 5"].count("mm") == 4


def test_what_is_launched_is_counted_and_nothing_else():
    code = """
def repeated_subgraph0(args):
    buf0 = torch.ops.aten.topk.default(arg0_1, 2)
    assert_alignment(buf0, 16, 'torch.ops.aten.topk.default')
    # buffer buf1 (op: torch.ops.kernels.cuda_attention.default) is assumed to be not aligned
    buf1 = torch.ops.kernels.cuda_attention.default(buf0, arg1_1)
    extern_kernels.mm(buf1, arg2_1, out=buf2)
    triton_for_fused_0.run(buf2, buf3, stream=raw_stream0)
    triton_per_fused_add_1.run(buf3, buf4, 5, 128, stream=raw_stream0)
    return (buf4, )

class Runner:
    def call(self, args):
        triton_poi_fused_neg_0.run(arg0_1, buf0, 64, stream=raw_stream0)
        (buf1,) = repeated_subgraph0(repeated_subgraph0_args)
        return (buf1, )
"""
    layer = ["topk", "attend_split", "combine_splits", "mm", "for", "reduction 5 x 128"]
    assert list_launches(code) == ([layer], ["pointwise 64"])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"num_hidden_layers": None}, [], "num_hidden_layers"),
        ({"num_hidden_layers": "2"}, [], "num_hidden_layers"),
        ({"num_attention_heads": 3}, [], "num_attention_heads"),
        ({}, ["--options", "no such"], "invalid choice: 'no such'"),
        ({}, ["--config", "absent.json"], "--config absent.json is no file; expected a config.json"),
    ],
)
def test_a_mistake_of_who_counts_launches_is_one_line(tmp_path, capsys, changes, options, message):
    raw = {name: value for name, value in (RAW | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(SystemExit) as end:
        launches.main(["--config", str(tmp_path / "config.json"), "--output_dir", str(tmp_path / "out"), *options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(("main", "options"), [(launches.main, ["--config", "absent.json"]), (footprint.main, [])])
def test_without_triton_a_command_that_needs_it_says_so(main, options, capsys, monkeypatch):
    monkeypatch.setattr("cli.arguments.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        main(options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "needs Triton, which is in requirements-dev.txt" in error and error.count("\n") == 1


def test_our_operators_launch_what_is_counted_for_them():
    calls = {"cuda_attention": footprint.make_attention("Llama-2-7B", 1)}
    calls |= {f"cuda_{call[1]}": call for call in footprint.list_products("Llama-2-7B", 6)}
    counts = {
        operator: len(footprint.record_launches(90, *call[1:2], *call[2], **call[3]))
        for operator, call in calls.items()
    }
    assert counts == {operator: len(kernels) for operator, kernels in LAUNCHED.items()}
