"""The kernels for CUDA without a GPU: run by Triton's interpreter, and compiled by its compiler for GPUs elsewhere."""

import json
import os
import subprocess
import sys

import pytest
import torch

import kernels
import model
from scripts.ahead import ARCHITECTURES, compile_ahead, variants
from tests.conftest import REPO

pytest.importorskip("triton", reason="triton is not installed; it has no build for this system")

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}  # bf16: the twin's weight is rounded to it, the kernel's is not


def said_by(module, *args, **env):
    """Run one of the modules beside this one as a process; return what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", f"tests.{module}", *map(str, args)], cwd=REPO, capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def distances():
    return {name: float(distance) for name, distance in said_by("interpreted", TRITON_INTERPRET="1").items()}


@pytest.mark.parametrize(("kind", "count"), [("int4", 10), ("int8", 3), ("attention", 14)])
def test_kernels_match_their_twins(distances, kind, count):
    ours = {name: distance for name, distance in distances.items() if name.startswith(kind)}
    assert len(ours) == count
    far = {n: d for n, d in ours.items() if not d <= TOLERANCE.get(n.split()[-1], TOLERANCE["fp32"])}  # nan is far
    assert not far


@pytest.fixture(scope="module")
def compiled_kernels():
    made = variants(["Llama-2-7B", "Llama-3.1-8B"], rows=(1, 6))
    return [(k.__name__, sm, compile_ahead(k, of, sm), used_by) for k, of, used_by in made for sm in ARCHITECTURES]


def test_kernels_keep_their_numbers_in_registers(compiled_kernels):
    assert {name for name, *_ in compiled_kernels} == {
        "int4_row", "int4_rows", "int8_rows", "attend_split", "combine_splits",
    }  # fmt: skip
    assert not [(*kind, used) for *kind, took, used in compiled_kernels if took["spilled_bytes"]]
    # Of 65,536 registers: four programs of 128 threads fit with a product, three with attention.
    bounds = {"attend_split": 170}
    over = [(name, took) for name, _, took, _ in compiled_kernels if took["registers"] > bounds.get(name, 128)]
    assert not over


def test_weights_and_caches_are_loaded_16_bytes_a_thread(compiled_kernels):
    for name, _, took, used_by in compiled_kernels:
        # Of each of a program's 4 rows; of K and V, 16 KiB a block by so many threads, at least.
        least = {"int4_row": 4, "attend_split": 2 * 64 * 128 * 2 // 16 // took["threads"]}.get(name, 1)
        assert took["loads_of_16_bytes"] >= least, (name, used_by)


def test_on_cuda_a_model_gets_these_kernels():
    """Chosen by the device alone, which the meta device can be taken for: no weight is read."""
    cuda = kernels.for_cuda(torch.device("cuda"))
    assert cuda is not None and kernels.for_cuda(torch.device("cpu")) is None
    assert kernels.attention_of(torch.float32, torch.device("cuda"), model.attention) is cuda.attention


def test_a_row_by_an_int8_weight_is_one_reduction_that_reads_codes():
    """What inductor writes for it: no weight in another dtype in memory, no second kernel, no GEMM."""
    code = said_by("inductor_code", 1, 4096, 11008)
    assert code.count("async_compile.triton(") == 1 and "@triton_heuristics.reduction" in code
    assert "'in_ptr1': '*i8'" in code and "extern_kernels." not in code
