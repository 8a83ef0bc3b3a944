"""The result files: what each says first, what it is called, and how it is written, whole or not at all.

A `Rung` is a figure in it, and `omissions` what is not, and why.
"""

import datetime
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cli.arguments import ArgumentParser
from files import check_folder, write_whole

ROOT = Path(__file__).resolve().parent.parent


def make_parser(description: str, device: bool = False, ranks: bool = False) -> ArgumentParser:
    """Make the parser of a command that is described in the first line; device: whether it asks for one."""
    parser = ArgumentParser(ranks=ranks, description=description.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")
    if device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", default=default, help="cpu, cuda, cuda:1, ...")
    return parser


def name_processor(cpuinfo: str) -> str:
    """Return the processor's name from /proc/cpuinfo, with family and model, which a virtual machine's name may hide.

    On ARM it has no name: then its kind, such as aarch64.
    """
    facts = dict(re.findall(r"^(?:cpu )?(model name|family|model)\s*: (.*)$", cpuinfo, re.MULTILINE))
    name = re.sub(r"\((R|TM)\)| Processor", "", facts.pop("model name", platform.machine()))
    return " ".join([name, *(f"{key} {number}" for key, number in facts.items())])


def name_hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    return f"{name_processor(info.read_text() if info.is_file() else '')} {torch.get_num_threads()} threads"


def make_slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


def name_command(module: str) -> str:
    """Return the command of this process, but for where it writes to, which is a place on one machine."""
    command = shlex.join(["python", "-m", f"bench.{module}", *sys.argv[1:]])
    return re.sub(r" --output_dir[ =]('[^']*'|\S+)", "", command)


@dataclass
class Report:
    """A result file and its content so far."""

    path: Path
    content: dict[str, Any]
    writes: bool = True  # False of all ranks but one
    parts: list[str] = field(default_factory=list)  # that it has, where it is measured in parts

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")

    def add(self, part: str, lines: Iterable[str]) -> None:
        """Write what the content has now, and print the lines of its latest part."""
        self.parts.append(part)
        if self.writes:
            self.write()
            print("\n".join([part, *lines]), flush=True)

    def finish(self) -> None:
        """Write it, and name what it calls faults, with which the process ends."""
        self.write()
        faults = self.content.get("faults", [])
        print(*faults, f"wrote {self.path}", sep="\n", file=sys.stderr)
        if faults:
            sys.exit(f"{len(faults)} faults")


def begin(module: str, folder: Path, *names: str, device: str | None = None, **content: Any) -> Report:
    """Begin today's report of a command, in a folder that is made.

    Raises ValueError where the file exists or could not be written: before the run, which may take hours.
    device: what is measured on, whose name the file has too; None: nothing runs on one.
    """
    hardware = [name_hardware(device)] if device else []
    path = folder / ("_".join([str(datetime.date.today()), *map(make_slug, hardware), *names]) + ".json")
    if path.parent != folder:
        raise ValueError(f"--name {names[-1]} names a folder too; leave out its slashes, and give that as --output_dir")
    if (size := len(path.name.encode())) > 255:
        raise ValueError(f"--name {names[-1][:40]}... makes a file's name of {size} bytes, and it may have 255")
    if os.path.lexists(path):  # a link to nowhere too
        raise ValueError(f"{path} exists already; remove it, or choose another --name or --output_dir")
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    where = {"hardware": hardware[0]} if device else {"ran_on_a_gpu": False}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    return Report(path, {"command": name_command(module), **where, "versions": versions, **content})


def format_row(cells: Iterable[str]) -> str:
    """Return a row of Markdown."""
    return f"| {' | '.join(cells)} |"


@dataclass
class Rung:
    """One figure to measure, in turns with the others of its group."""

    name: str
    unit: str  # tok/s, ms, s or GB
    measure: Callable[[], float]
    weights: str = ""  # the scheme they are quantized by
    read_bytes: float = 0  # that a token, or a step of so many ms, reads
    flops: float = 0  # that a token takes
    against: str = ""  # the rung of the group that it is compared with, turn by turn, unless it is that one
    samples: list[float] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)  # what a step spends its time in

    def entry(self, group: dict[str, "Rung"], roofs: list[dict[str, float]]) -> dict[str, Any]:
        """Return what the results say of it.

        The machine's own speed moves: ratios and shares of the roof are medians of those within each turn. group: the
        rungs with samples, by name. roofs: of each turn.
        """
        entry: dict[str, Any] = {"name": self.name, "unit": self.unit, "weights": self.weights or "plain"}
        entry |= {"median": statistics.median(self.samples), "samples": self.samples}
        for key, per_token in (("gb_per_s", self.read_bytes / 1e9), ("tflop_per_s", self.flops / 1e12)):
            if per_token:
                rates = [(s if self.unit == "tok/s" else 1e3 / s) * per_token for s in self.samples]
                best = [value for roof in roofs for name, value in roof.items() if name.endswith(key)]
                shares = [rate / roof for rate, roof in zip(rates, best, strict=False)]
                entry |= {key: statistics.median(rates), "share_of_roof": statistics.median(shares)}
        if self.against != self.name and self.against in group:
            ratios = [a / b for a, b in zip(self.samples, group[self.against].samples, strict=False)]
            entry |= {"against": self.against, "ratios": ratios, "ratio": statistics.median(ratios)}
        return entry | ({"kernels": self.kernels} if self.kernels else {})


RATES = {"gb_per_s": " {:7.1f} GB/s", "tflop_per_s": " {:7.2f} TFLOP/s", "share_of_roof": ", {:.0%} of the roof"}


def format_line(entry: dict[str, Any]) -> str:
    text = f"  {entry['name']:46} {entry['median']:9.2f} {entry['unit']:5}"
    text += "".join(form.format(entry[key]) for key, form in RATES.items() if key in entry)
    if "ratio" in entry:
        ratio = f"{entry['ratio']:.2f}x of" if entry["unit"] == "tok/s" else f"{entry['ratio']:.2f} times as long as"
        text += f"  {ratio} «{entry['against']}»"
    for kernel in entry.get("kernels", []):
        text += f"\n    {kernel['us']:9.1f} us, {kernel['us'] / 1e3 / entry['median']:4.0%}, in "
        text += f"{kernel['calls']:4} of {kernel['name'][:80]}"
    return text


omissions: list[str] = []  # of this process, and why


def leave_out(title: str, reason: str) -> None:
    """Say on stderr, and in the results, that something is not measured."""
    omissions.append(f"{title}: {reason}".partition("\n")[0])
    print(f"left out: {omissions[-1]}", file=sys.stderr)


def attempt(title: str, call: Callable[[], Any]) -> Any:
    """Return what a call returns, or None and leave it out where it fails, in whatever way code of others does."""
    try:
        return call()
    except Exception as error:
        leave_out(title, f"{type(error).__name__}: {error}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # which raises if the GPU is of no more use to what would come next
        return None
