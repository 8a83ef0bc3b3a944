"""What README.md tells a reader to type works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(language):
    """Return the command lines of all blocks of a language."""
    return [line for block in blocks(language) for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def project(tmp_path):
    """A folder that looks like the project's, so that what the commands write stays there."""
    (tmp_path / "checkpoints").mkdir()
    for name in (
        "generate.py", "quantize.py", "eval.py", "scripts", "bench", "README.md", "checkpoints/demo",
        "checkpoints/demo-draft",
    ):  # fmt: skip
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("block", [block for block in blocks("sh") if block.startswith("python ")])
def test_commands_run(block, project):
    for line in block.splitlines():
        result = run(shlex.split(line)[1:], project)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


@pytest.mark.parametrize("command", [c for c in commands("console") if c.startswith("python ")])
def test_commands_that_need_a_model_have_the_options_they_name(command):
    _, script, *arguments = shlex.split(command)
    shown = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for option in (a for a in arguments if a.startswith("--")):
        assert f"{option} " in shown or f"{option}\n" in shown, option


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, project):
    result = run(["-c", block], project)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def main(")


def test_make_targets_exist():
    for command in (c for c in commands("sh") if c.startswith("make ")):
        target = shlex.split(command)[1]
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, timeout=60, check=True)


def test_links_point_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
