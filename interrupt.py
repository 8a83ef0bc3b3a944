"""Ctrl-C while a command is not in `cli.user_errors`, as when it imports torch: the process ends without a traceback.

A command's file has this in force before it imports anything else. So this imports no more than it must: until it is
done, Ctrl-C is Python's own.
"""

import os
import signal
import sys


def end_quietly() -> None:
    """Let Ctrl-C end the process at once with status 130, unless it is ignored, as in a shell's background job."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
        sys.excepthook = report
        sys.unraisablehook = once_more


def end(number: int, frame: object) -> None:
    # No exception: what runs when it comes, a callback of the garbage collector for one, may print or swallow it.
    os._exit(130)


def report(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    if kind is KeyboardInterrupt:  # it came where `user_errors` begins or ends
        os._exit(130)
    sys.__excepthook__(kind, error, traceback)  # type: ignore[arg-type]


def once_more(lost: "sys.UnraisableHookArgs") -> None:
    """Press Ctrl-C again where it raised in a callback, whose exceptions Python prints and forgets."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
        return
    import threading

    # When the callback is over.
    again = threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT])
    again.daemon = True
    again.start()
