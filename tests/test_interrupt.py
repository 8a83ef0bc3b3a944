"""interrupt.py: Ctrl-C at any moment ends a command without a traceback."""

import os
import signal
import subprocess
import sys

import pytest

import interrupt
from cli import user_errors
from tests.conftest import REPO

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
        _, rest = process.communicate(timeout=600)
    said = [line for line in rest.splitlines() if line and not line.startswith("import time:")]
    # At its end Python gives the signal back to the system, which ends the process as quietly.
    assert process.returncode in ((130, 0, -signal.SIGINT) if moment == "peak memory" else (130,))
    assert said == []


def test_in_a_command_ctrl_c_raises_so_that_what_was_begun_is_removed(monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever a test before this one has left
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(interrupt.os, "_exit", lambda status: pytest.fail("the process would have ended at once"))
    try:
        interrupt.end_quietly()
        removed = False
        with pytest.raises(SystemExit, match="130"), user_errors():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                removed = True
        assert removed
        assert signal.getsignal(signal.SIGINT) is interrupt.end
    finally:
        signal.signal(signal.SIGINT, before)


CALLBACK = """
import interrupt
interrupt.end_quietly()
import signal, time, weakref
from cli import user_errors
class Thing: pass
with user_errors():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    time.sleep(30)
"""


def test_ctrl_c_in_a_callback_whose_exceptions_python_forgets_ends_the_command_too():
    command = [sys.executable, "-c", CALLBACK]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\n")


def test_a_background_jobs_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt.end_quietly()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
