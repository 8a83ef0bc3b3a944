"""What a command writes for --metrics_path and --profile: whole, and never in the place of something else."""

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

import eval as evaluation
import generate
from checkpoint import read_files
from cli.arguments import check_writable
from cli.options import are_same
from files import write_whole
from tests.conftest import HANG, REPO, assert_user_error, run_forked

GENERATE = ("--prompt", "import", "--max_new_tokens", "2")
EVAL = ("--text_file", str(REPO / "checkpoints/demo/README.md"))
COMMANDS: list[tuple[Callable[..., None], tuple[str, ...], str]] = [
    (generate.main, GENERATE, "--metrics_path"),
    (generate.main, GENERATE, "--profile"),
    (evaluation.main, EVAL, "--metrics_path"),
]


def test_a_file_of_several_names_keeps_what_it_held_where_no_other_can_be_written(tmp_path):
    (tmp_path / "metrics").write_text("old " * 100)
    (tmp_path / "other").hardlink_to(tmp_path / "metrics")
    write_whole(tmp_path / "metrics", "new")
    assert (tmp_path / "other").read_text() == "new"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "metrics", "newer " * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert (tmp_path / "other").read_text() == "new" and len(list(tmp_path.iterdir())) == 2


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


@pytest.mark.parametrize(("main", "options", "output"), COMMANDS)
def test_what_would_be_destroyed_is_refused_before_the_run(tmp_path, main, options, output):
    model, loop, folder = tmp_path / "model", tmp_path / "loop", tmp_path / "folder"
    shutil.copytree(REPO / "checkpoints/demo-draft", model)
    loop.symlink_to(loop)
    (folder / "protected").mkdir(parents=True)
    (folder / "protected").chmod(0o555)
    weights, shard = model / "model.safetensors", model / "part-a.safetensors"
    shard.write_text("")
    before = weights.read_bytes()
    for path, words in (
        (weights, "a file that this run reads"),
        (shard, "a file that this run reads"),
        (loop, "cannot be written"),
        (weights / "x", "cannot be written"),
        (folder / "protected/new.json", "no folder that can be written to"),
    ):
        result = run_forked(main, *options, "--checkpoint_path", model, output, path, cwd=REPO)
        assert_user_error(result, output, words)
    assert weights.read_bytes() == before and loop.is_symlink() and not list((folder / "protected").iterdir())


@pytest.mark.parametrize(("descriptor", "words"), [(0, "this run reads"), (1, "prints to"), (2, "prints to")])
def test_a_stream_of_a_run_is_not_written_over(tmp_path, descriptor, words):
    path = tmp_path / "both.json"
    with path.open("w") as stream, pytest.raises(ValueError, match=words):
        status = os.fstat(stream.fileno())
        saved = os.dup(descriptor)
        try:
            os.dup2(stream.fileno(), descriptor)
            check_writable("--metrics_path", path)
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)
    assert path.stat().st_ino == status.st_ino


def test_two_outputs_under_the_names_of_one_file_are_refused(tmp_path):
    path, link, hard_link = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    link.symlink_to(path)
    assert are_same(path, link), "which is not there yet"
    path.write_text("old")
    hard_link.hardlink_to(path)
    assert are_same(path, hard_link) and are_same(link, hard_link) and not are_same(path, tmp_path / "d")
    result = run_forked(generate.main, *GENERATE, "--metrics_path", link, "--profile", hard_link, cwd=REPO)
    assert_user_error(result, "--metrics_path", "--profile", "one file")
    assert path.read_text() == "old"


def test_whatever_a_run_reads_is_not_written_over(tmp_path):
    for name in ("model.safetensors.index.json", "quantize_config.json", "chat_template.jinja", "vocab.json"):
        (tmp_path / name).write_text("{}")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(name)
        with pytest.raises(ValueError, match="this run reads"):
            check_writable("--metrics_path", tmp_path / "link", read_files(tmp_path))
    task = tmp_path / "tasks/mine.yaml"
    task.parent.mkdir()
    task.write_text("task: mine")
    options = ("--tasks", "mine", "--include_path", tmp_path, "--metrics_path", task)
    assert_user_error(run_forked(evaluation.main, *options, cwd=REPO), "this run reads")


def test_a_file_of_several_names_keeps_them_and_a_private_one_stays_private(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("old")
    path.chmod(0o600)
    write_whole(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other.hardlink_to(path)
    write_whole(path, "newer")
    assert other.read_text() == "newer"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_do_not_matter(tmp_path, closed):
    script = "from cli.errors import user_errors\nwith user_errors(): print('text'); raise ValueError('a mistake')"
    command = f'{sys.executable} -c "{script}" {closed}'
    result = subprocess.run(command, shell=True, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ("text\n" if closed == "2>&-" else "")
    assert result.stderr == ("error: a mistake\n" if closed == ">&-" else "")


def test_a_run_whose_reader_leaves_still_writes_its_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    command = f"{sys.executable} generate.py --prompt import --max_new_tokens 60 --metrics_path {path} 2>&1 | head -1"
    subprocess.run(command, shell=True, cwd=REPO, stdout=subprocess.DEVNULL, timeout=HANG, check=True)
    assert json.loads(path.read_text())["samples"][0]["new_tokens"] > 0


@pytest.mark.parametrize("full", [">", "2>"])
def test_a_run_whose_text_finds_no_room_still_writes_its_metrics_and_fails(tmp_path, full):
    path = tmp_path / "metrics.json"
    command = f"{sys.executable} generate.py --max_new_tokens 3 --metrics_path {path} {full}/dev/full"
    result = subprocess.run(command, shell=True, cwd=REPO, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 2
    assert full == "2>" or "No space left on device" in result.stderr
    assert json.loads(path.read_text())["samples"][0]["new_tokens"] == 3


def test_a_file_may_have_the_longest_name_there_is(tmp_path):
    path = tmp_path / ("\u20ac" * 85)
    write_whole(path, "text")
    assert path.read_text() == "text"


@pytest.mark.parametrize("option", ["--interactive", "--prompt=-"])
def test_a_stdin_that_is_closed_is_an_empty_one(option):
    command = f"{sys.executable} generate.py {option} --max_new_tokens 2 <&-"
    result = subprocess.run(command, shell=True, cwd=REPO, capture_output=True, text=True, timeout=HANG)
    assert "Traceback" not in result.stderr
    assert result.returncode == 0 if option == "--interactive" else "the input is empty" in result.stderr
