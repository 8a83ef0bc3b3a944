"""Run bench/run.py from any folder: `python scripts/benchmark.py OPTIONS` is `python -m bench.run OPTIONS`."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0], sys.argv[0] = str(Path(__file__).resolve().parent.parent), "-m"  # as python has them then
    runpy.run_module("bench.run", run_name="__main__", alter_sys=True)
