"""Run thousands of turns in one process, and check that nothing grows, nothing recompiles and nothing gets slower.

    python -m bench.soak --turns 2000

A turn continues a prompt of 1 to 700 tokens by 8 to 64, plainly, with the demo's draft or by prompt lookup, compiled.
The same 100 turns come again and again, so that a turn must give the very text that it gave the first time.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from bench import results
from bench.runner import Runner, make_steps
from checkpoint import load_model
from cli.arguments import check_device, number
from cli.errors import user_errors
from scripts.train_demo import CALIBRATION_MODULES, library_text
from steps import Sampling
from tokenizer import load_tokenizer

NUM_DIFFERENT = 100  # turns; the first round of them warms up
# What may change between the first 100 turns after the warm-up and the last: memory, and tokens a second.
MAX_GROWTH, MAX_SLOWDOWN = 0.02, 0.10


def make_turns(device: str, mode: str) -> Callable[[int], list[int]]:
    """Return the function from a turn's number to the ids that it writes."""
    model, draft_model = (load_model(results.ROOT / f"checkpoints/{name}", device) for name in ("demo", "demo-draft"))
    runner = Runner(model, make_steps(mode, device), model.config.max_position_embeddings)
    draft_model.setup_caches(1, runner.length)
    kinds = [None, runner.speculation(draft_model), runner.speculation(None)]
    ids = load_tokenizer(results.ROOT / "checkpoints/demo").encode(library_text(CALIBRATION_MODULES), bos=False)
    generator = torch.Generator(device)

    def turn(i: int) -> list[int]:
        seed = i % NUM_DIFFERENT
        chance = random.Random(seed)
        begin = chance.randrange(len(ids) - 700)
        prompt, count = ids[begin : begin + chance.randint(1, 700)], chance.randint(8, 64)
        options = {"generator": generator.manual_seed(seed), "speculation": kinds[seed % len(kinds)]}
        return [token for [new] in runner.generate([prompt], count, Sampling(), **options) for token in new]

    return turn


def read_memory(device: str) -> int:
    """Return the memory that this process holds: the host's, and what torch has taken of the GPU's."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    on_gpu = torch.cuda.memory_reserved(device) if torch.device(device).type == "cuda" else 0
    return pages * 4096 + on_gpu


def soak(num_turns: int, device: str, mode: str = "compile") -> dict[str, Any]:
    """Run the turns, after a round of all that are different; return what they took, and what of it is a fault."""
    turn, num_graphs = make_turns(device, mode), [counters["stats"]["unique_graphs"]]
    texts = [turn(i) for i in range(NUM_DIFFERENT)]
    gc.collect()
    num_graphs.append(counters["stats"]["unique_graphs"])
    turns, changed = [], []
    for i in tqdm(range(NUM_DIFFERENT, NUM_DIFFERENT + num_turns), desc="soak", unit="turn", disable=None):
        began = time.perf_counter()
        text = turn(i)
        turns.append((len(text), time.perf_counter() - began, read_memory(device)))
        changed += [i] if text != texts[i % NUM_DIFFERENT] else []
    num_graphs.append(counters["stats"]["unique_graphs"])
    warm_up, after = (b - a for a, b in pairwise(num_graphs))
    window = min(NUM_DIFFERENT, num_turns)
    windows = [tuple(zip(*turns[i : i + window], strict=True)) for i in range(0, num_turns, window)]
    rates = [sum(tokens) / sum(seconds) for tokens, seconds, _ in windows]
    levels = [statistics.median(memory) for *_, memory in windows]
    growth, slowdown = levels[-1] / levels[0] - 1, 1 - rates[-1] / rates[0]
    bounds = {
        f"memory grew by {growth:.1%}": growth > MAX_GROWTH,
        f"the last {window} turns were {slowdown:.1%} slower than the first": slowdown > MAX_SLOWDOWN,
        f"{after} graphs were compiled after the warm-up": after > 0,
        f"{len(changed)} turns gave another text than the first time": bool(changed),
    }
    return {
        "turns": num_turns,
        "tokens": sum(tokens for tokens, *_ in turns),
        "memory_growth": growth,
        "slowdown": slowdown,
        "graphs": {"warm-up": warm_up, "after": after},
        "changed_texts": changed,
        "faults": [what for what, is_fault in bounds.items() if is_fault],
        "window": window,
        "tokens_per_s": [round(rate, 1) for rate in rates],  # of each window, prefill included
        "memory_bytes": levels,  # the median of each window
    }


def main(argv: list[str] | None = None) -> None:
    parser = results.make_parser(__doc__, device=True)
    parser.add_argument("--turns", type=number(int, 2), default=2000, metavar="N", help="after a warm-up of 100 (2000)")
    with user_errors():
        args = parser.parse_args(argv)
        check_device(args.device)
        report = results.begin("soak", args.output_dir, "soak", device=args.device)
        report.content |= soak(args.turns, args.device)
        report.finish()


if __name__ == "__main__":
    main()
