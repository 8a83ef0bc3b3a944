"""bench/gpu.sh without a GPU: what it does where steps fail or the time is over."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPO

# Of the groups the first fails as it does by itself, and the others as fast as they can.
PYTHON = f"""#!/usr/bin/env bash
[[ $* == *bench.run* && $* != *positions* ]] && exit 2
exec {sys.executable} "$@"
"""


def start(tmp_path, limit, device="cpu"):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "DEVICE": device, "LIMIT": str(limit),
                   "CONFIGS": str(tmp_path / "no-such.json")}  # fmt: skip
    command = ["bash", str(REPO / "scripts" / "gpu.sh"), "out"]
    return subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def script(tmp_path, limit):
    process = start(tmp_path, limit)
    output, errors = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_a_failed_step_is_named_and_the_next_one_begins(tmp_path):
    result = script(tmp_path, 120)
    for group in ("positions", "kernels", "products", "--compare", "prefill", "verify", "decode --speculate_k 1"):
        assert f"failed: no-such: {group}, exit status 2" in result.stderr, result.stderr
        assert f"not done: no-such: {group}" in result.stderr
    assert result.returncode == 7
    assert "skipped" in (tmp_path / "out" / "gpu-tests.xml").read_text()


def test_what_the_time_does_not_allow_is_named(tmp_path):
    result = script(tmp_path, 10)
    assert result.stderr.count("skipped: ") == 9 == result.returncode, result.stderr
    assert "skipped: tests; 10 seconds are over" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_ends_before_it_measures(tmp_path):
    process = start(tmp_path, 120, "cuda")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert errors.splitlines()[1:] == ["error: torch finds no GPU here; nothing was measured"]


def test_ctrl_c_ends_the_step_and_those_that_would_follow(tmp_path):
    process = start(tmp_path, 120)
    assert process.stderr is not None
    assert "packages" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "==" not in errors and "not done" not in errors
