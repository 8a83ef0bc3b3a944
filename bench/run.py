"""Measure a model of random weights against the roof of the same machine, in rungs, and draw the ladder.

    python -m bench.run --config configs/tinyllama-1.1b.json --only decode prefill --samples 3
    python -m bench.run --config configs/tinyllama-1.1b.json --compare --only
    python -m bench.run --config configs/tinyllama-1.1b.json --speculate demo shapes
    torchrun --nproc_per_node=2 -m bench.run --config configs/tinyllama-1.1b.json

Each rung has a warm-up, then samples in turns with its group: A B A B. An interrupted run keeps what it has finished.
"""

import argparse
import sys
import tempfile
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch._inductor.config

from bench import peers, results, speculation
from bench.ladder import Ladder
from bench.process import Processes
from bench.results import Report, Rung, attempt, format_line, omissions
from bench.runner import measure_roof
from bench.subject import Subject, add_options, read_subject
from cli.arguments import check_device, number
from cli.errors import user_errors
from cli.ranks import from_rank_0, local_device, process_group, together
from drafters import MODEL_K
from kernels.cpu import instruction_set
from model import Ranks
from steps import vector_bits

PROCESS_GROUPS = ("start", "memory", "compile")  # first, while this process holds no model
WARM_GROUPS = ("products", "positions", "kernels", "options", "verify")  # whose rungs warm up themselves, each time
ALONE = (*PROCESS_GROUPS, "products")  # of one process
IF_NAMED = ("kernels", "options", "beside", "editing")  # what they say is for who changes a step
GROUPS = (*ALONE, "decode", "batch", "prefill", "positions", "verify", *IF_NAMED)


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw the decode rungs as bars, each under the roof of the bytes that it reads."""
    try:
        import matplotlib
    except ImportError:
        print("the ladder is not drawn: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fixed"  # the same figures give the same file
    from matplotlib import pyplot

    bars = [rung for rung in content["rungs"] if rung["group"] == "decode"]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.45 * len(bars)))
    drawing = axes.barh([b["name"] for b in bars], [b["median"] for b in bars], color="#4878a8", height=0.6)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line of a roof
    axes.bar_label(drawing, [f"{b['median']:.1f}" for b in bars], padding=3, bbox=box)
    for i, bar in enumerate(bars):
        if "share_of_roof" in bar:
            roof = bar["median"] / bar["share_of_roof"]
            axes.plot([roof, roof], [i - 0.4, i + 0.4], color="#b04030", linestyle="--", label="memory roof")
            axes.legend(handles=axes.lines[:1], loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens a second, {content['config']}, {content['dtype']}, batch 1, {content['hardware']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def measure_group(group: str, rungs: list[Rung], num_samples: int, report: Report, device: str) -> None:
    """Sample the rungs in turns, and report those that have samples, however it ends."""
    in_processes = group in PROCESS_GROUPS
    unsampled = 0 if in_processes or group in WARM_GROUPS else 1  # turns that warm up and compile
    turns = num_samples + unsampled
    roofs, running = [], list(rungs)
    try:
        for turn in range(turns):
            if report.writes:
                print(f"{group}: turn {turn + 1} of {turns}, of {len(rungs)} rungs", file=sys.stderr, flush=True)
            if not in_processes:  # again, since other work on the machine comes and goes
                roof = measure_roof(device)
                roofs += [roof] if turn >= unsampled else []
            # Back and forth, since what has just run may slow down what comes next, but for a process of its own.
            for rung in running[:: -1 if turn % 2 and not in_processes else 1]:
                # One that fails on a GPU, which has seen little of this, is named, and the others go on.
                alone = device != "cpu" and not torch.distributed.is_initialized()  # ranks would wait for each other
                value = attempt(rung.name, rung.measure) if alone else rung.measure()
                if value is None:
                    running.remove(rung)
                elif turn >= unsampled:
                    rung.samples.append(value)
    finally:
        sampled = {rung.name: rung for rung in rungs if rung.samples}
        entries = [{"group": group, **rung.entry(sampled, roofs)} for rung in sampled.values()]
        if entries:
            report.content["rungs"] += entries
            report.content["roofs"] |= {group: roofs} if roofs else {}
            report.add(group, map(format_line, entries))
            if report.writes and group == "decode":
                draw(report.content, report.path.with_suffix(".svg"))


def measure(args: argparse.Namespace, subject: Subject, device: str, ranks: Ranks, report: Report) -> None:
    torch._inductor.config.cpp.simdlen = vector_bits()  # for whoever compiles beside us too
    if device == "cpu":
        report.content["versions"]["kernels"] = instruction_set() or "none"
    if args.speculate is not None:
        report.content["speculation"] = []
        options = subject, device, args.new_tokens, args.speculate_k or [4]
        for duel in chain(*(speculation.make_duels(what, *options) for what in args.speculate)):
            entries = duel.run(args.samples)
            report.content["speculation"] += entries
            report.add(duel.name, map(speculation.describe, entries))
        return
    report.content |= {"dtype": subject.dtype_name, "rungs": [], "roofs": {}}
    names = args.only
    if names is None:
        names = [g for g in GROUPS if g not in IF_NAMED and (ranks.count == 1 or g not in ALONE)]
    with tempfile.TemporaryDirectory() as name:
        processes = Processes(subject, device, Path(name))
        ladder = Ladder(subject, device, ranks, args.new_tokens, max(args.speculate_k or [MODEL_K]))
        for group in (g for g in GROUPS if g in names):
            rungs = getattr(processes if group in PROCESS_GROUPS else ladder, group)()
            measure_group(group, list(rungs), args.samples, report, device)
        if args.compare:
            report.content["versions"] |= peers.name_versions()
            rungs = peers.make_rungs(ladder, Path(name), args.gpt_fast)
            measure_group("compare", list(rungs), args.samples, report, device)


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    subject, device = together(partial(check, args, ranks), ranks)
    name = args.name or default_name(args) + (f"-tp{ranks.count}" if ranks.count > 1 else "")
    omissions.clear()
    content = {"config": subject.name, "tp": ranks.count, "left_out": omissions}
    report = results.begin("run", args.output_dir, name, device=args.device, **content)
    report.writes = ranks.rank == 0
    try:
        measure(args, subject, device, ranks, report)
    except (KeyboardInterrupt, SystemExit) as end:  # SIGTERM, or a user's mistake
        kept = f"{', '.join(report.parts)} in {report.path}" if report.parts else "nothing was measured"
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        sys.exit(130 if isinstance(end, KeyboardInterrupt) else end.code)
    if report.writes:
        print(f"wrote {report.path}", file=sys.stderr)


def default_name(args: argparse.Namespace) -> str:
    if args.speculate is not None:
        return "-".join(["speculation", *(results.make_slug(Path(what).name) for what in args.speculate)])
    what = "-".join(["ladder"] if args.only is None else args.only) or "peers"
    return what + ("-compare" if args.compare and args.only != [] else "")


def check(args: argparse.Namespace, ranks: Ranks) -> tuple[Subject, str]:
    """Refuse what cannot work before it takes time; return the subject and this rank's device. Raises ValueError."""
    device = local_device(args.device, ranks)
    check_device(device)
    subject = read_subject(args, ranks)
    if args.gpt_fast and not args.compare:
        raise ValueError("--gpt_fast is for --compare; add it")
    if args.gpt_fast and not (args.gpt_fast / "quantize.py").is_file():
        raise ValueError(f"--gpt_fast {args.gpt_fast} is no checkout of gpt-fast: it has no quantize.py")
    for what in args.speculate or ():
        if what not in (names := (*speculation.DEMO_MODES, "shapes")) and not Path(what).is_dir():
            raise ValueError(f"--speculate {what}: expected {', '.join(names)} or the folder of a model made for chat")
    if args.speculate is not None and (args.only is not None or args.compare):
        raise ValueError("--speculate measures nothing else; leave out --only and --compare")
    if args.only == [] and not args.compare:
        raise ValueError(f"--only names no group; give some of {', '.join(GROUPS)}, or --compare too")
    alone = [name for name in ("speculate", "compare") if getattr(args, name)]
    alone += [f"only {group}" for group in ALONE if group in (args.only or [])]
    if alone and ranks.count > 1:
        raise ValueError(f"--{alone[0]} measures one process and there are {ranks.count} ranks; leave out torchrun")
    return subject, device


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = results.make_parser(__doc__, device=True, ranks=True)
    add_options(parser)
    parser.add_argument("--only", nargs="*", choices=GROUPS, metavar="GROUP",
                        help=f"of {', '.join(GROUPS)} (all but {', '.join(IF_NAMED)})")  # fmt: skip
    parser.add_argument("--compare", action="store_true",
                        help="add transformers and llama.cpp; with a bare --only nothing else")  # fmt: skip
    parser.add_argument("--gpt_fast", type=Path, metavar="DIR", help="with --compare, a checkout of gpt-fast to add")
    parser.add_argument("--samples", type=number(int, 1), default=5, help="of each rung (5)")
    parser.add_argument("--new_tokens", type=number(int, 2), default=64, help="in a decode sample (64)")
    parser.add_argument("--speculate", nargs="*", metavar="WHAT",
                        help="measure drafters, and nothing else: of demo and demo-eager, of the shapes of --config, "
                             "or of the folder of a model made for chat (demo shapes)")  # fmt: skip
    parser.add_argument("--speculate_k", type=number(int, 1), nargs="+", help="drafts (4; in the ladder 5)")
    parser.add_argument("--name", help="what the result file is called (by what is measured)")
    args = parser.parse_args(argv)
    args.speculate = ["demo", "shapes"] if args.speculate == [] else args.speculate
    return args


def main(argv: list[str] | None = None) -> None:
    with process_group() as ranks, user_errors():
        run(from_rank_0(partial(parse_args, argv), ranks), ranks)


if __name__ == "__main__":
    main()
