"""Run thousands of turns in one process, and check that nothing grows, nothing recompiles and nothing gets slower.

    python -m bench.soak --turns 2000

A turn continues a prompt of 1 to 700 tokens by 8 to 64, plainly, with the demo's draft or by prompt lookup, compiled.
The same 100 turns come again and again, so that a turn must give the very text that it gave the first time.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from bench import results
from bench.runner import Runner, make_steps
from checkpoint import load_model
from cli.arguments import ArgumentParser, check_device, number
from cli.errors import user_errors
from scripts.train_demo import CALIBRATION_MODULES, library_text
from steps import Sampling
from tokenizer import load_tokenizer

DEMO, DRAFT = results.ROOT / "checkpoints/demo", results.ROOT / "checkpoints/demo-draft"
NUM_DIFFERENT = 100  # turns; the first round of them warms up
SAMPLING = Sampling(temperature=0.8, top_k=200)
# What may change between the first 100 turns after the warm-up and the last: memory, and tokens a second.
MAX_GROWTH, MAX_SLOWDOWN = 0.02, 0.10


def make_turns(device: str, mode: str) -> Callable[[int], Iterator[list[list[int]]]]:
    """Return the function from a turn's number to its new ids, as they come."""
    model, draft_model = (load_model(path, device) for path in (DEMO, DRAFT))
    runner = Runner(model, make_steps(mode, device), model.config.max_position_embeddings)
    draft_model.setup_caches(1, runner.length)
    kinds = [None, runner.speculation(draft_model), runner.speculation(None)]
    ids = load_tokenizer(DEMO).encode(library_text(CALIBRATION_MODULES), bos=False)
    generator = torch.Generator(device)

    def turn(i: int) -> Iterator[list[list[int]]]:
        chance = random.Random(i % NUM_DIFFERENT)
        begin = chance.randrange(len(ids) - 700)
        prompt, count = ids[begin : begin + chance.randint(1, 700)], chance.randint(8, 64)
        generator.manual_seed(i % NUM_DIFFERENT)
        speculation = kinds[i % NUM_DIFFERENT % len(kinds)]
        return runner.generate([prompt], count, SAMPLING, generator=generator, speculation=speculation)

    return turn


def read_memory(device: str) -> int:
    """Return the memory that this process holds: the host's, and what torch has taken of the GPU's."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    on_gpu = torch.cuda.memory_reserved(device) if torch.device(device).type == "cuda" else 0
    return pages * 4096 + on_gpu


def count_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def soak(num_turns: int, device: str, mode: str) -> dict[str, Any]:
    """Run the turns, after a round of all that are different; return what they took, and what of it is a fault."""
    turn = make_turns(device, mode)
    texts, tokens, seconds, memory, changed = [], [], [], [], []
    graphs_at_first = graphs_before = count_graphs()
    for i in tqdm(range(NUM_DIFFERENT + num_turns), desc="soak", unit="turn", disable=None):
        if i == NUM_DIFFERENT:
            gc.collect()
            graphs_before = count_graphs()
        began = time.perf_counter()
        text = [token for [ids] in turn(i) for token in ids]
        if i < NUM_DIFFERENT:
            texts.append(text)
            continue
        seconds.append(time.perf_counter() - began)
        tokens.append(len(text))
        memory.append(read_memory(device))
        if text != texts[i % NUM_DIFFERENT]:
            changed.append(i)
    window = min(NUM_DIFFERENT, num_turns)
    windows = [slice(i, i + window) for i in range(0, num_turns, window)]
    rates = [sum(tokens[span]) / sum(seconds[span]) for span in windows]
    levels = [statistics.median(memory[span]) for span in windows]
    growth, slowdown, new_graphs = levels[-1] / levels[0] - 1, 1 - rates[-1] / rates[0], count_graphs() - graphs_before
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
    check_device(args.device)
    header = results.make_header("soak", args.device)
    path = results.new_path(args.output_dir, results.make_slug(header["hardware"]), "soak")
    report = soak(args.turns, args.device, "eager" if args.eager else "compile")
    print(
        f"{report['turns']} turns, {report['tokens']} tokens: memory {report['memory_growth']:+.2%}, tokens/s "
        f"{-report['slowdown']:+.1%}, {report['graphs']['after']} new graphs",
        file=sys.stderr,
    )
    results.finish(path, header | report)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=number(int, 2), default=2000, metavar="N", help="after a warm-up of 100 (2000)")
    parser.add_argument("--eager", action="store_true", help="without compiling")
    results.add_device(parser)
    results.add_output_dir(parser)
    with user_errors():
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
