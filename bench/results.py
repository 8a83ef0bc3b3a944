"""The result files: what each says first, what it is called, and how it is written, whole or not at all."""

import argparse
import datetime
import json
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from files import write_whole

ROOT = Path(__file__).resolve().parent.parent


def name_processor(cpuinfo: str) -> str:
    """Return the processor's name from /proc/cpuinfo, which on ARM has none: then its kind, such as aarch64."""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def name_hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    return f"{name_processor(info.read_text() if info.is_file() else '')} {torch.get_num_threads()} threads"


def make_slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


def name_command(module: str) -> str:
    return shlex.join(["python", "-m", f"bench.{module}", *sys.argv[1:]])


def make_header(module: str, device: str | None = None, **versions: str) -> dict[str, Any]:
    """Return what a result file says first. device: what was measured on; None: nothing ran on one."""
    where = {"hardware": name_hardware(device)} if device else {"ran_on_a_gpu": False}
    system = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    return {"command": name_command(module), **where, "versions": system | versions}


def add_device(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu, cuda, cuda:1, ...")


def add_output_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")


def new_path(folder: Path, *parts: str) -> Path:
    """Return the path of today's result file, in a folder that is made. Raises ValueError where the file exists."""
    path = folder / ("_".join([str(datetime.date.today()), *parts]) + ".json")
    if path.exists():
        raise ValueError(f"{path} exists already; remove it, or choose another --name or --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, report: dict[str, Any]) -> None:
    write_whole(path, json.dumps(report, indent=1) + "\n")


def finish(path: Path, report: dict[str, Any]) -> None:
    """Write the report of a check, print its faults and end the process, with status 1 where there are any."""
    write(path, report)
    print(*report["faults"], f"{len(report['faults'])} faults; wrote {path}", sep="\n", file=sys.stderr)
    sys.exit(1 if report["faults"] else 0)
