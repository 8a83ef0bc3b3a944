"""Run thousands of turns in one process, and check that nothing grows, nothing recompiles and nothing gets slower.

    python scripts/soak.py --turns 2000

A turn continues a prompt of 1 to 700 tokens by 8 to 64, plainly, with the demo's draft or by prompt lookup, compiled.
The same 100 turns come again and again, so that a turn must give the very text that it gave the first time.
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
import gc
import json
import platform
import random
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from checkpoint import load_model
from cli import ArgumentParser, check_device, number, user_errors, write_whole
from generate import generate
from gptq import CALIBRATION_MODULES, library_text
from speculate import Speculation
from steps import Sampling, compiled, decode, prefill
from tokenizer import load_tokenizer

DEMO, DRAFT = ROOT / "checkpoints/demo", ROOT / "checkpoints/demo-draft"
NUM_DIFFERENT = 100  # turns; the first round of them warms up
SAMPLING = Sampling(temperature=0.8, top_k=200)
# What may change between the first 100 turns after the warm-up and the last: memory, and tokens a second.
MAX_GROWTH, MAX_SLOWDOWN = 0.02, 0.10


def turns(device: str, compile_steps: bool) -> Callable[[int], Iterator[list[int]]]:
    """Return the function from a turn's number to its new ids, as they come."""
    model, draft_model = (load_model(path, device) for path in (DEMO, DRAFT))
    run_prefill, run_decode = prefill, decode
    drafting, lookup = Speculation(draft_model), Speculation(None)
    if compile_steps:
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        run_prefill, run_decode = compiled(prefill), compiled(decode, mode)
        drafting.prefill = run_prefill
        for speculation in (drafting, lookup):
            speculation.compile_(mode)
    kinds = [None, drafting, lookup]
    for each in (model, draft_model):
        each.setup_caches(1, model.config.max_position_embeddings)
    ids = load_tokenizer(DEMO).encode(library_text(CALIBRATION_MODULES), bos=False)
    generator = torch.Generator(device)

    def turn(i: int) -> Iterator[list[int]]:
        chance = random.Random(i % NUM_DIFFERENT)
        begin = chance.randrange(len(ids) - 700)
        prompt, count = ids[begin : begin + chance.randint(1, 700)], chance.randint(8, 64)
        generator.manual_seed(i % NUM_DIFFERENT)
        steps = generate(
            model, [prompt], count, SAMPLING, generator=generator, prefill=run_prefill, decode=run_decode,
            speculation=kinds[i % NUM_DIFFERENT % len(kinds)],
        )  # fmt: skip
        for step in steps:
            yield step[0]

    return turn


def resident_bytes(device: str) -> int:
    """Return the memory that this process holds: the host's, and what torch has taken of the GPU's."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    on_gpu = torch.cuda.memory_reserved(device) if torch.device(device).type == "cuda" else 0
    return pages * 4096 + on_gpu


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def soak(num_turns: int, device: str, compile_steps: bool) -> dict[str, Any]:
    """Run the turns, after a round of all that are different; return what they took, and what of it is a fault."""
    turn, first_texts = turns(device, compile_steps), {}
    tokens, seconds, memory, changed = [], [], [], []
    graphs_at_first = graphs_before = num_graphs()
    for i in tqdm(range(NUM_DIFFERENT + num_turns), desc="soak", unit="turn", disable=None):
        if i == NUM_DIFFERENT:
            gc.collect()
            graphs_before = num_graphs()
        began = time.perf_counter()
        text = [token for ids in turn(i) for token in ids]
        took = time.perf_counter() - began
        if i < NUM_DIFFERENT:
            first_texts[i] = text
            continue
        if text != first_texts[i % NUM_DIFFERENT]:
            changed.append(i)
        tokens.append(len(text))
        seconds.append(took)
        memory.append(resident_bytes(device))
    window = min(NUM_DIFFERENT, num_turns)
    rates = [sum(tokens[i : i + window]) / sum(seconds[i : i + window]) for i in range(0, num_turns, window)]
    levels = [statistics.median(memory[i : i + window]) for i in range(0, num_turns, window)]
    growth, slowdown, new_graphs = levels[-1] / levels[0] - 1, 1 - rates[-1] / rates[0], num_graphs() - graphs_before
    bounds = {
        f"memory grew by {growth:.1%}": growth > MAX_GROWTH,
        f"the last {window} turns were {slowdown:.1%} slower than the first": slowdown > MAX_SLOWDOWN,
        f"{new_graphs} graphs were compiled after the warm-up": new_graphs > 0,
        f"{len(changed)} turns gave another text than the first time": bool(changed),
    }
    return {
        "turns": num_turns,
        "tokens": sum(tokens),
        "memory_growth": growth,
        "slowdown": slowdown,
        "graphs": {"warm-up": graphs_before - graphs_at_first, "after": new_graphs},
        "changed_texts": changed,
        "faults": [what for what, is_fault in bounds.items() if is_fault],
        "window": window,
        "tokens_per_s": [round(rate, 1) for rate in rates],  # of each window, prefill included
        "memory_bytes": levels,  # the median of each window
    }


def run(args: argparse.Namespace) -> None:
    from scripts.benchmark import hardware

    if not args.output_dir.is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is not a folder that exists")
    check_device(args.device)
    machine = hardware(args.device)
    found = soak(args.turns, args.device, not args.eager)
    report = {
        "command": shlex.join(["python", "scripts/soak.py", *sys.argv[1:]]),
        "hardware": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **found,
    }
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine.lower()).split())
    path = args.output_dir / f"{datetime.date.today()}_{slug}_soak.json"
    write_whole(path, json.dumps(report, indent=1) + "\n")
    print(
        f"{found['turns']} turns, {found['tokens']} tokens: memory {found['memory_growth']:+.2%}, tokens/s "
        f"{-found['slowdown']:+.1%}, {found['graphs']['after']} new graphs; wrote {path}",
        file=sys.stderr,
    )
    for fault in found["faults"]:
        print(fault, file=sys.stderr)
    sys.exit(1 if found["faults"] else 0)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=number(int, 2), default=2000, metavar="N", help="after a warm-up of 100 (2000)")
    parser.add_argument("--eager", action="store_true", help="without compiling")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")
    with user_errors():
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
