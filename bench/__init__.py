"""Everything that measures; README.md lists the commands, `python -m bench.NAME`."""

import signal
import sys

# Of such a command Ctrl-C ends the imports without a traceback: python finds the command's file in this package first.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
