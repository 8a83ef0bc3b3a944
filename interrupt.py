"""Ctrl-C while a command is not in `cli.user_errors`, as when it imports torch: the process ends without a traceback.

A command's file has this in force before it imports anything else.
"""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn


def end_quietly() -> None:
    """Let Ctrl-C end the process at once with status 130, unless it is ignored, as in a shell's background job."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
        sys.excepthook = report


def end(number: int, frame: FrameType | None) -> NoReturn:
    # No exception: what runs when it comes, a callback of the garbage collector for one, may print or swallow it.
    os._exit(130)


def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if kind is KeyboardInterrupt:  # it came where `user_errors` begins or ends
        os._exit(130)
    sys.__excepthook__(kind, error, traceback)
