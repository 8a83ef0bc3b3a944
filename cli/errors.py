"""How a command ends: a user's mistake is one line on stderr and exit status 2, Ctrl-C and a closed pipe are quiet."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO

INTERRUPTED, TERMINATED = 130, 143  # the exit statuses that a shell gives to SIGINT and SIGTERM


def one_line(message: str) -> str:
    """Return a message as one line of bounded length, control characters escaped: it may quote a stranger's file."""
    words = " ".join(message.split())
    words = words if len(words) <= 1000 else f"{words[:600]} ... {words[-400:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)


@contextlib.contextmanager
def user_errors(signals_raise: bool = True) -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit status 2.

    Ctrl-C and a closed pipe end quietly, SIGTERM with a line and status 143, each after what was begun is removed.
    signals_raise: False leaves both signals alone, for a rank that may be waiting for the others.
    """
    received: list[int] = []
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us, as in `>&-`
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # until the process ends
    try:
        with catch_signals(received) if signals_raise else contextlib.nullcontext():
            yield
            sys.stdout.flush()
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, OutlivingStream) and stream.lost:
                    raise stream.lost
    except GeneratorExit:  # a signal came where this begins or ends
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code != TERMINATED:  # what ends here has said why
            raise
        if signal.SIGTERM in received:  # whatever it became: C code may replace the exception that a signal raises
            print("ended by SIGTERM", file=sys.stderr)
            sys.exit(TERMINATED)
        if signal.SIGINT in received or isinstance(error, KeyboardInterrupt):
            print(file=sys.stderr)
            sys.exit(INTERRUPTED)
        if isinstance(error, BrokenPipeError):  # the reader of our stdout left, as in `| head -1`
            drop_stdout()
            sys.exit(0)
        if isinstance(error, ValueError | OSError):
            fail(str(error))
        reason = next((line for line in str(error).splitlines() if "allocate" in line), None)
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and reason):
            fail(f"out of memory ({reason or 'in Python'}); give fewer rows, a shorter text or a smaller --dtype")
        raise


def catch_signals(received: list[int]) -> contextlib.ExitStack:
    """Let Ctrl-C and SIGTERM raise where they would end the process at once, so that `finally` runs, and note them."""

    def handle(number: int, _: FrameType | None) -> NoReturn:
        received.append(number)
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)  # a second one would cut short what is removed
            sys.exit(TERMINATED)
        raise KeyboardInterrupt

    def raise_again(lost: "sys.UnraisableHookArgs") -> None:
        """Send a signal again that raised in a callback, whose exceptions Python prints and forgets."""
        if not received or lost.exc_type not in (KeyboardInterrupt, SystemExit):
            sys.__unraisablehook__(lost)
            return
        signal.signal(received[-1], handle)
        leaving = threading.Event()

        def send() -> None:
            leaving.wait()
            time.sleep(0.1)  # until this hook and the callback are over: in them it would be lost once more
            os.kill(os.getpid(), received[-1])

        threading.Thread(target=send, daemon=True).start()
        leaving.set()

    stack = contextlib.ExitStack()
    is_main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if is_main and signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, handle)
        stack.callback(signal.signal, number, signal.SIG_DFL)
    if numbers:
        stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = raise_again
        sys.excepthook = report_exception  # which stays: a signal may come once this is over
    return stack


def report_exception(error_class: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if error_class is not KeyboardInterrupt:  # which came where `user_errors` begins or ends
        sys.__excepthook__(error_class, error, trace)


class OutlivingStream:
    """A text stream whose reader may leave, or whose disk may be full: what is written then is dropped."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.lost: OSError | None = None  # why, where it is a mistake

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._outlive(lambda: self.stream.write(text))

    def flush(self) -> None:
        self._outlive(self.stream.flush)

    def _outlive(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            self.lost = None if isinstance(error, BrokenPipeError) else error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def outlive_readers() -> None:
    """Let a run that also writes a file go on to it when its text can be written no more, as in `| head -1`."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), OutlivingStream):
            setattr(sys, name, OutlivingStream(getattr(sys, name)))


def fail(message: str) -> NoReturn:
    print("error:", one_line(message), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # it was stdout that failed; Python would try again at its end
        drop_stdout()
    sys.exit(2)


def drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
