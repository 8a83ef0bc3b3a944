"""scripts/gpu.sh without a GPU: what it does where steps fail or the time is over."""

import os
import subprocess
import sys

from tests.conftest import REPO


def script(tmp_path, limit):
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "LIMIT": str(limit), "OMP_NUM_THREADS": "1",
                   "CONFIGS": str(tmp_path / "no-such.json")}  # fmt: skip
    command = ["bash", str(REPO / "scripts" / "gpu.sh"), str(tmp_path / "out")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_failed_step_is_named_and_the_next_one_begins(tmp_path):
    result = script(tmp_path, 120)
    for group in ("positions", "products", "prefill", "verify", "decode --speculate_k 1"):
        assert f"failed: no-such: {group}, exit status 2" in result.stderr, result.stderr
        assert f"not done: no-such: {group}" in result.stderr
    assert result.returncode == 5
    assert "skipped" in (tmp_path / "out" / "gpu-tests.xml").read_text()


def test_what_the_time_does_not_allow_is_named(tmp_path):
    result = script(tmp_path, 10)
    assert result.stderr.count("skipped: ") == 7 == result.returncode, result.stderr
    assert "skipped: tests; 10 seconds are over" in result.stderr
