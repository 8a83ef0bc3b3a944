"""What a command writes for --metrics_path and --profile: whole, and never in the place of something else."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

import eval as evaluation
import generate
from files import write_whole
from tests.conftest import HANG, REPO, assert_user_error, run_forked

GENERATE = ("--prompt", "import", "--max_new_tokens", "2")
EVAL = ("--text_file", str(REPO / "checkpoints/demo/README.md"))
COMMANDS: list[tuple[Callable[..., None], tuple[str, ...], str]] = [
    (generate.main, GENERATE, "--metrics_path"),
    (generate.main, GENERATE, "--profile"),
    (evaluation.main, EVAL, "--metrics_path"),
]


@pytest.mark.parametrize(("main", "options", "output"), COMMANDS)
def test_a_link_stays_and_its_target_is_written(tmp_path, main, options, output):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    result = run_forked(main, *options, output, link, cwd=REPO)
    assert result.returncode == 0, result.stderr
    assert link.is_symlink() and json.loads(target.read_text())


@pytest.mark.parametrize(("main", "options", "output"), COMMANDS)
def test_a_pipe_gets_the_text_and_stays(tmp_path, main, options, output):
    pipe, texts = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: texts.append(pipe.read_text()))
    reader.start()
    result = run_forked(main, *options, output, pipe, cwd=REPO)
    reader.join()
    assert result.returncode == 0, result.stderr
    assert json.loads(texts[0]) and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_written_into(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device is not permitted here")
    write_whole(null, "text")
    assert stat.S_ISCHR(null.stat().st_mode)


@pytest.mark.parametrize(("main", "options", "output"), COMMANDS)
def test_a_protected_file_a_folder_and_a_file_in_none_are_refused_before_the_run(tmp_path, main, options, output):
    protected = tmp_path / "protected.json"
    protected.write_text("mine")
    protected.chmod(0o444)
    assert_user_error(run_forked(main, *options, output, protected, cwd=REPO), output, "protected against writing")
    assert protected.read_text() == "mine"
    assert_user_error(run_forked(main, *options, output, tmp_path, cwd=REPO), output, "it is a folder")
    absent = tmp_path / "absent" / "file.json"
    assert_user_error(run_forked(main, *options, output, absent, cwd=REPO), output, "cannot be written")


def test_a_run_whose_reader_leaves_still_writes_its_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    command = f"{sys.executable} generate.py --prompt import --max_new_tokens 60 --metrics_path {path} 2>&1 | head -1"
    subprocess.run(command, shell=True, cwd=REPO, stdout=subprocess.DEVNULL, timeout=HANG, check=True)
    assert json.loads(path.read_text())["samples"][0]["new_tokens"] > 0
