"""Measure a model of random weights against the roof of the same machine, in rungs, and draw the ladder.

    python scripts/benchmark.py --config configs/tinyllama-1.1b.json --device cpu
    python scripts/benchmark.py --config configs/tinyllama-1.1b.json --only decode prefill --samples 3
    python scripts/benchmark.py --config configs/tinyllama-1.1b.json --compare --only
    python scripts/benchmark.py --config configs/tinyllama-1.1b.json --speculate
    torchrun --nproc_per_node=2 scripts/benchmark.py --config configs/tinyllama-1.1b.json

Each rung has a warm-up, then samples in turns with its group: A B A B. What is finished is written at once to
results/<date>_<hardware>_<what>.json, so that an interrupted run keeps it. --compare adds what is installed beside us:
transformers and llama.cpp.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import datetime
import json
import platform
import re
import shlex
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import DTYPES, meta_model
from cli import ArgumentParser, check_device, number, user_errors, write_whole
from model import Ranks
from quantize import parse_scheme
from scripts import compare, speculation
from scripts.fresh import Fresh
from scripts.ladder import Bench
from scripts.measure import (
    Rung,
    config_name,
    hardware,
    left_out,
    line,
    measure_roof,
    read_config_file,
    run_dtype,
    weight_forms,
)
from tp import from_rank_0, local_device, process_group, together

# ---------------------------------------------------------------------------------------------------------------------
# The run


FRESH_GROUPS = ("start", "memory", "compile")  # first, while this process holds no model
WARM_GROUPS = ("products", "positions", "kernels", "options", "verify")  # whose rungs warm up themselves, each time
ALONE = (*FRESH_GROUPS, "products")  # of one process
IF_NAMED = ("kernels", "options")  # what they say is for who changes a step
GROUPS = (*ALONE, "decode", "batch", "prefill", "positions", "verify", *IF_NAMED)


class Results:
    """What has been measured, on the disk after every group; only rank 0 writes."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks, what: str):
        self.writes = ranks.rank == 0
        left_out.clear()
        self.groups: list[str] = []
        name = "-".join("".join(c if c.isalnum() else " " for c in hardware(args.device).lower()).split())
        what = args.name or what + (f"-tp{ranks.count}" if ranks.count > 1 else "")
        self.path = args.output_dir / f"{datetime.date.today()}_{name}_{what}.json"
        if self.path.exists():
            raise ValueError(f"{self.path} exists already; remove it, or choose another --name or --output_dir")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.report: dict[str, Any] = {
            "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
            "config": config_name(args.config),
            "hardware": hardware(args.device),
            "tp": ranks.count,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "system": platform.platform(),
            },
        }

    def write(self) -> None:
        if self.writes:
            write_whole(self.path, json.dumps(self.report, indent=1) + "\n")

    def add(self, group: str, rungs: list[Rung], roofs: list[dict[str, float]]) -> None:
        """Take in the rungs that have samples: all, unless the group was interrupted. roofs: of each turn."""
        sampled = {rung.name: rung for rung in rungs if rung.samples}
        if not sampled:
            return
        self.groups.append(group)
        entries = [rung.entry(sampled, roofs) for rung in sampled.values()]
        self.report["rungs"] += [{"group": group, **entry} for entry in entries]
        if roofs:
            self.report["roofs"][group] = roofs
        if left_out:
            self.report["left_out"] = left_out
        self.write()
        if self.writes and group == "decode":
            draw(self.report, self.path.with_suffix(".svg"))
        if self.writes:
            print("\n".join([group, *map(line, entries)]), flush=True)


def measure_group(group: str, rungs: list[Rung], args: argparse.Namespace, results: Results, device: str) -> None:
    """Sample the rungs in turns, and report those that have samples, however it ends."""
    fresh = group in FRESH_GROUPS
    unsampled = 0 if fresh or group in WARM_GROUPS else 1  # turns that warm up and compile
    turns = args.samples + unsampled
    bar = tqdm(total=len(rungs) * turns, desc=group, unit="sample", dynamic_ncols=True, leave=False,
               disable=None if results.writes else True)  # fmt: skip
    roofs = []
    try:
        for turn in range(turns):
            if not fresh:  # again, since other work on the machine comes and goes
                roof = measure_roof(device)
                roofs += [roof] if turn >= unsampled else []
            # Back and forth, since what has just run may slow down what comes next.
            for rung in rungs if turn % 2 == 0 else reversed(rungs):
                value = rung.measure()
                if turn >= unsampled:
                    rung.samples.append(value)
                bar.update()
    finally:
        bar.close()
        results.add(group, rungs, roofs)


def all_groups(
    args: argparse.Namespace, raw: dict[str, Any], device: str, ranks: Ranks, folder: Path
) -> Iterator[tuple[str, list[Rung]]]:
    groups = chosen_groups(args, ranks)
    for group in (g for g in FRESH_GROUPS if g in groups):
        yield group, list(getattr(Fresh(args, raw, folder), group)())
    bench = Bench(args, raw, device, ranks)
    for group in (g for g in GROUPS if g in groups and g not in FRESH_GROUPS):
        yield group, list(getattr(bench, group)())
    if args.compare:
        yield "compare", list(compare.rungs(bench, raw, folder))


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    raw, device = together(partial(check, args, ranks), ranks)
    what = "-".join(["ladder"] if args.only is None else args.only) or "peers"
    results = Results(args, ranks, what + ("-compare" if args.compare and args.only != [] else ""))
    results.report |= {"dtype": str(run_dtype(args, raw)).removeprefix("torch."), "rungs": [], "roofs": {}}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for group, rungs in all_groups(args, raw, device, ranks, Path(folder)):
                measure_group(group, rungs, args, results, device)
    except KeyboardInterrupt:
        kept = f"{', '.join(results.groups)} in {results.path}" if results.groups else "nothing was measured"
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        sys.exit(130)
    if results.writes:
        print(f"wrote {results.path}", file=sys.stderr)


def run_speculation(args: argparse.Namespace, ranks: Ranks) -> None:
    """Measure speculation against the paper's formula, with a and c of the same run."""
    raw, device = check(args, ranks)
    results = Results(args, ranks, "speculation")
    results.report["speculation"] = []
    name = results.report["config"]
    for duel in speculation.make_duels(raw, name, device, run_dtype(args, raw), args.new_tokens, args.speculate_k):
        entries = duel.run(args.samples)
        results.report["speculation"] += entries
        results.write()
        print("\n".join([duel.name, *map(speculation.describe, entries)]), flush=True)
    print(f"wrote {results.path}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the decode rungs as bars, each under the roof of the bytes that it reads."""
    try:
        import matplotlib
    except ImportError:
        print("the ladder is not drawn: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fixed"  # the same figures give the same file
    from matplotlib import pyplot

    bars = [rung for rung in report["rungs"] if rung["group"] == "decode"]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.45 * len(bars)))
    drawn = axes.barh([b["name"] for b in bars], [b["median"] for b in bars], color="#4878a8", height=0.6)
    axes.bar_label(drawn, [f" {b['median']:.1f}" for b in bars])
    roofs = {i: bar["median"] / bar["share_of_roof"] for i, bar in enumerate(bars) if "share_of_roof" in bar}
    for i, roof in roofs.items():
        axes.plot([roof, roof], [i - 0.4, i + 0.4], color="#b04030", linestyle="--")
    if roofs:
        axes.annotate("memory roof", (next(iter(roofs.values())), 1.02), xycoords=("data", "axes fraction"),
                      color="#b04030", ha="center")  # fmt: skip
    axes.set_xlim(0, max([*roofs.values(), *(bar["median"] for bar in bars)]) * 1.12)
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens a second, {report['config']}, {report['dtype']}, batch 1, {report['hardware']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def check(args: argparse.Namespace, ranks: Ranks) -> tuple[dict[str, Any], str]:
    """Refuse what cannot work before it takes time; return the config and this rank's device. Raises ValueError."""
    device = local_device(args.device, ranks)
    check_device(device)
    raw = read_config_file(args.config)
    run_dtype(args, raw)
    for form in weight_forms(args, raw).values():
        meta_model(form, ranks)
    if args.gpt_fast and not args.compare:
        raise ValueError("--gpt_fast is for --compare; add it")
    if args.gpt_fast and not (args.gpt_fast / "quantize.py").is_file():
        raise ValueError(f"--gpt_fast {args.gpt_fast} is no checkout of gpt-fast: it has no quantize.py")
    if args.speculate and (args.only is not None or args.compare):
        raise ValueError("--speculate measures nothing else; leave out --only and --compare")
    if ranks.count > 1:
        alone = [name for name in ("speculate", "compare") if getattr(args, name)]
        alone += [f"only {group}" for group in ALONE if group in (args.only or [])]
        if alone:
            raise ValueError(f"--{alone[0]} measures one process and there are {ranks.count} ranks; leave out torchrun")
    return raw, device


def chosen_groups(args: argparse.Namespace, ranks: Ranks) -> tuple[str, ...]:
    if args.only is not None:
        return tuple(args.only)
    return tuple(g for g in GROUPS if g not in IF_NAMED and (ranks.count == 1 or g not in ALONE))


def scheme(text: str) -> tuple[str, dict[str, Any]]:
    """Read a scheme of --quantize, such as int4-g32, into config.json's `quantization`."""
    mode, _, size = text.rpartition("-g") if re.search(r"-g\d+$", text) else (text, "", "")
    quantization = {"mode": mode, "groupsize": int(size) if size else None}
    try:
        return str(parse_scheme(quantization)), quantization
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a scheme; expected such as int8, int4-g32, int4-g128"
        ) from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(ranks=True, description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a config.json; the weights are random")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the config's own")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=GROUPS,
        metavar="GROUP",
        help=f"of {', '.join(GROUPS)} (all but {', '.join(IF_NAMED)})",
    )
    parser.add_argument(
        "--compare", action="store_true", help="add transformers and llama.cpp; with a bare --only nothing else"
    )
    parser.add_argument("--gpt_fast", type=Path, metavar="DIR", help="with --compare, a checkout of gpt-fast to add")
    parser.add_argument("--samples", type=number(int, 1), default=5, help="of each rung (5)")
    parser.add_argument("--new_tokens", type=number(int, 2), default=64, help="in a decode sample (64)")
    parser.add_argument("--quantize", type=scheme, nargs="*", default=[scheme("int8"), scheme("int4-g32")],
                        metavar="SCHEME", help="forms of the weights besides --dtype (int8 int4-g32)")  # fmt: skip
    parser.add_argument("--speculate", action="store_true",
                        help="measure speculation against its formula, and nothing else")  # fmt: skip
    parser.add_argument("--speculate_k", type=number(int, 1), nargs="+", default=[1, 3, 5], help="drafts (1 3 5)")
    parser.add_argument("--name", help="what the result file is called (by what is measured)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")
    args = parser.parse_args(argv)
    args.quantize = dict(args.quantize)
    return args


def main(argv: list[str] | None = None) -> None:
    with process_group() as ranks, user_errors():
        args = from_rank_0(partial(parse_args, argv), ranks)
        (run_speculation if args.speculate else run)(args, ranks)


if __name__ == "__main__":
    main()
