"""What README.md and docs/ tell a reader to type works, and what they name exists."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import run_forked

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TOPICS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *TOPICS]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
HANG_S = 1800  # as conftest.HANG, for the longer of the two: make demo installs torch


def blocks(language, pages=PAGES):
    """Return the code blocks of a language as test parameters, named after their page."""
    return [
        pytest.param(block, id=f"{page.stem}-{i}")
        for page in pages
        for i, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL), start=1
        )
    ]


def python_lines(block):
    """Return the arguments of each line that starts Python."""
    lines = (shlex.split(line, comments=True) for line in block.splitlines())
    return [words[1:] for words in lines if words and words[0] == "python"]


def shown_commands():
    """Return the commands that are shown and not run: those of console blocks, and those within a sentence."""
    lines = [line for param in blocks("console") for line in param.values[0].splitlines()]
    lines = [line for line in lines if re.match(r"(\w+=\S+ )*(python|torchrun) ", line)]
    prose = [re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL) for page in LINKED]
    spans = [" ".join(span.split()) for text in prose for span in re.findall(r"`((?:python|torchrun) [^`]+)`", text)]
    return list(dict.fromkeys(lines + spans))


def run(arguments, cwd, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False, **kwargs,
    )  # fmt: skip


@cache
def help_of(*script):
    """Return what a script's --help prints; of `-m name`, a module's."""
    module = importlib.import_module(script[-1].removesuffix(".py").replace("/", "."))
    result = run_forked(module.main, "--help", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def project(tmp_path):
    """A folder that looks like the project's, so that what the commands write stays there."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("generate.py", "quantize.py", "eval.py", "checkpoints/demo", "checkpoints/demo-draft"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("block", [param for param in blocks("sh") if python_lines(param.values[0])])
def test_commands_run(block, project):
    for arguments in python_lines(block):
        result = run(arguments, project)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


@pytest.mark.parametrize("command", shown_commands())
def test_commands_that_are_only_shown_have_the_options_they_name(command):
    words = shlex.split(command)
    [first, *_] = [i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"]
    end = first + (2 if words[first] == "-m" else 1)
    shown = help_of(*words[first:end])
    for option in (word for word in words[end:] if word.startswith("--")):
        assert re.search(rf"{option}(?![\w-])", shown), option


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, project):
    result = run(["-c", block], project)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def main(")


def test_console_blocks_show_what_is_printed():
    """After «$ » stands the command, and below it all that the command writes to stdout."""
    text = "".join(page.read_text() for page in PAGES)
    shown = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", text, re.MULTILINE)
    assert len(shown) >= 2
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command, expected in shown:
        result = subprocess.run(
            command, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=HANG_S, check=True,
            env={**os.environ, "PATH": path},
        )  # fmt: skip
        assert result.stdout == expected


def test_make_targets_exist():
    targets = {target for param in blocks("sh") for target in re.findall(r"^make (\S+)", param.values[0], re.MULTILINE)}
    assert targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, timeout=HANG_S, check=True)


def anchors(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_links_point_to_files(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not target.startswith("http") and not (file.exists() and (not anchor or anchor in anchors(file))):
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_source_files_that_are_named_exist(page):
    names = re.findall(r"`([\w/]+\.(?:py|cpp|sh))`", page.read_text())
    folders = ("", "kernels", "cli", "bench", "scripts", "tests")
    assert not [name for name in names if not any((ROOT / folder / name).exists() for folder in folders)]


def test_the_readme_is_one_page_and_links_to_every_topic():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.encode()) <= 7000
    assert not [page.name for page in TOPICS if f"](docs/{page.name})" not in text]
