"""Ctrl-C at any moment ends a command without a traceback."""

import os
import signal
import subprocess
import sys

import pytest

from cli.errors import user_errors
from tests.conftest import HANG, REPO

SCRIPTS = "benchmark convert_hf_checkpoint download train_demo"
BENCHES = "faults footprint launches process projection quality run soak"
# What a command imports, sooner or later, or says at its end.
GENERATE = ("argparse", "torch._C", "torch", "safetensors", "tp", "peak memory")
MOMENTS = [("generate.py", moment) for moment in GENERATE]
MOMENTS += [("quantize.py", "tqdm"), ("eval.py", "difflib")]
MOMENTS += [(f"scripts/{name}.py", "torch._C" if name != "download" else "argparse") for name in SCRIPTS.split()]
MOMENTS += [(f"-m bench.{name}", "torch._C") for name in BENCHES.split()]


@pytest.mark.parametrize(("script", "moment"), MOMENTS)
def test_ctrl_c_ends_a_command_without_a_traceback_while_it_imports_and_while_it_ends(script, moment):
    options = ["--max_new_tokens", "1"] if "generate" in script else []
    command = [sys.executable, "-X", "importtime", *script.split(), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPO, env=environment, text=True, **pipes) as process:
        for line in process.stderr:
            name = line.rpartition("|")[2].strip()
            if name == moment or moment in line.partition("import time:")[0]:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=HANG)
    said = [line for line in rest.splitlines() if line and not line.startswith("import time:")]
    # Before and after its work it is the signal itself that ends the process.
    assert process.returncode in ((130, 0, -signal.SIGINT) if moment == "peak memory" else (-signal.SIGINT,))
    assert said == []


def test_in_a_command_ctrl_c_raises_so_that_what_was_begun_is_removed():
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a command has it while it imports
    try:
        removed = False
        with pytest.raises(SystemExit, match="130"), user_errors():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                removed = True
        assert removed
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("script", ["generate.py", "scripts/download.py"])
def test_a_background_jobs_ctrl_c_stays_ignored_while_a_command_imports_and_while_it_works(script):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a process that is started inherits
    try:
        command = [sys.executable, "-X", "importtime", script, "--help"]
        with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            next(line for line in process.stderr if line.rpartition("|")[2].strip() == "argparse")
            process.send_signal(signal.SIGINT)
            stdout, _ = process.communicate(timeout=HANG)
        assert process.returncode == 0 and stdout.startswith("usage: ")
        with user_errors():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


CALLBACK = """
import signal, sys, time, weakref
signal.signal(signal.SIGINT, signal.SIG_DFL)
from cli.errors import user_errors
class Thing: pass
with user_errors():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(int(sys.argv[1])))
    del thing
    while True:
        time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "\n"), (signal.SIGTERM, 143, "ended by SIGTERM\n")]
)
def test_a_signal_in_a_callback_whose_exceptions_python_forgets_ends_the_command_too(number, status, said):
    command = [sys.executable, "-c", CALLBACK, str(int(number))]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=HANG)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", said)
