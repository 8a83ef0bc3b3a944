"""Generate text: the command.

    python generate.py
    python generate.py --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B --prompt "Once upon a time" --compile

It loads a model, compiles its steps and warms them up, and prints what engine.py writes: the text goes to stdout as it
comes, everything else to stderr. The command line's options are in cli/options.py.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import load_model, meta_model, random_model, tensor_specs
from cli.chat import Conversation, chat
from cli.errors import one_line, outlive_readers, user_errors
from cli.options import Job, check, parse_args
from cli.ranks import check_copies, from_rank_0, process_group, together
from cli.report import TextPrinter, report_rows, report_run, run_batch, run_metrics
from config import quantization_scheme, read_config
from engine import Engine, batch_sizes, generate
from files import write_whole
from model import ONE_RANK, Ranks, Transformer
from rows import Row
from speculate import Speculation, levels_below
from steps import Sampling, compiled, decode, prefill
from tp import draft_ranks

__all__ = ["Sampling", "generate", "main"]  # what a program imports from here


def load_one(args: argparse.Namespace, path: Path, job: Job, dtype: torch.dtype, ranks: Ranks) -> Transformer:
    if args.random_weights:
        return random_model(read_config(path), job.device, dtype, ranks=ranks)
    return load_model(path, job.device, dtype, ranks)


def load(args: argparse.Namespace, job: Job, ranks: Ranks) -> tuple[Transformer, Speculation | None]:
    """Load the model and what drafts for it, with caches for the longest text and for drafts beyond its end."""
    model = load_one(args, args.checkpoint_path, job, job.dtype, ranks)
    if job.draft_dtype is None and not args.prompt_lookup:
        model.setup_caches(job.num_rows, job.max_seq_length)
        return model, None
    draft_model = None
    if job.draft_dtype is not None:
        raw = read_config(args.draft_checkpoint_path)
        whole = meta_model(raw)
        num_bytes = sum(
            dtype.itemsize * shape.numel() for dtype, shape in tensor_specs(whole, job.draft_dtype).values()
        )
        shared_by = draft_ranks(whole.config, quantization_scheme(raw), num_bytes, ranks)
        draft_model = load_one(args, args.draft_checkpoint_path, job, job.draft_dtype, shared_by)
    speculation = Speculation(draft_model, *([args.speculate_k] if args.speculate_k else []))
    for loaded in filter(None, (model, draft_model)):
        loaded.setup_caches(job.num_rows, job.max_seq_length + speculation.max_k)
    return model, speculation


def make_engine(args: argparse.Namespace, job: Job, model: Transformer, speculation: Speculation | None) -> Engine:
    """Put the model, its steps, compiled if asked for, and the sampling together."""
    decode_mode = "reduce-overhead" if model.device.type == "cuda" else None
    engine = Engine(
        model,
        job.sampling,
        job.eos_ids,
        torch.Generator(job.device),
        compiled(prefill) if args.compile_prefill else prefill,
        compiled(decode, decode_mode) if args.compile else decode,
        speculation,
    )
    if speculation:
        speculation.prefill = engine.prefill
        if args.compile:
            speculation.compile_(decode_mode)
    return engine


def warm_up(engine: Engine, job: Job, quiet: bool) -> None:
    """Compile all that a run may need: every batch size and number of drafts, few slots and all (see `compiled`)."""
    batches = job.batches or [[[0]]]  # any id stands for what will be typed
    shortest = sorted(chain(*batches), key=len)  # the rows that go on may be these: few slots must hold no long one
    sizes = {size for batch in batches for size in batch_sizes(len(batch))}
    levels = levels_below(engine.speculation.max_k) if engine.speculation else (0,)
    cases = [
        (shortest[:size], cached, k)
        for size in sizes
        for cached in {0, max(0, job.max_seq_length - len(shortest[size - 1]) - 3)}
        for k in reversed(levels)
    ]
    for prompts, cached, k in tqdm(cases, desc="compile", leave=False, dynamic_ncols=True, disable=quiet or None):
        speculation = replace(engine.speculation, levels=(k,)) if engine.speculation and k else None
        if speculation:
            speculation.filled = [cached] * len(prompts)
        run = replace(engine, eos_ids=(), speculation=speculation).run
        for _ in run([[0] * cached + ids for ids in prompts], 3, cached=cached):
            pass


def run_batches(args: argparse.Namespace, job: Job, engine: Engine, ranks: Ranks) -> Iterator[list[Row]]:
    """Run one batch of prompts after the other; yield the rows of each."""
    assert job.batches is not None
    printer = TextPrinter(job.tokenizer, sum(map(len, job.batches)), echo=job.template is None, quiet=ranks.rank > 0)
    for i, prompts in enumerate(job.batches, start=1):
        is_traced = args.profile and i == len(job.batches) and ranks.rank == 0
        with torch.profiler.profile() if is_traced else contextlib.nullcontext() as profiler:
            rows = run_batch(engine, prompts, args.max_new_tokens, args.stop, printer)
        if profiler:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder, "trace.json")
                profiler.export_chrome_trace(str(trace))
                write_whole(args.profile, trace.read_text())
        if engine.speculation:
            for row, counts in zip(rows, engine.speculation.accept_counts, strict=True):
                row.accept_counts, row.num_drafted = counts, engine.speculation.num_drafted
        if ranks.rank == 0:
            report_rows(rows, job.config.max_position_embeddings)
        yield rows


def run(args: argparse.Namespace, ranks: Ranks = ONE_RANK) -> None:
    job = together(partial(check, args, ranks), ranks)
    check_copies(list(filter(None, (args.checkpoint_path, args.draft_checkpoint_path))), ranks)
    # Where other files differ between nodes, rank 0's are used.
    batches, max_seq_length = from_rank_0(lambda: (job.batches, job.max_seq_length), ranks)
    job = replace(job, batches=batches, max_seq_length=max_seq_length)
    if job.unsupported and ranks.rank == 0:
        print(one_line(f"generation_config.json asks for {job.unsupported}: not supported, left out"), file=sys.stderr)
    if args.metrics_path or args.profile:
        outlive_readers()
    began = time.perf_counter()
    model, speculation = together(partial(load, args, job, ranks), ranks)
    loaded = time.perf_counter()

    engine = make_engine(args, job, model, speculation)
    compiles = args.compile or args.compile_prefill
    if compiles:
        if ranks.rank == 0:
            print("compiling ...", file=sys.stderr)
        warm_up(engine, job, quiet=ranks.rank > 0)
    ready = time.perf_counter()

    assert engine.generator is not None
    engine.generator.manual_seed(args.seed)
    if args.interactive:
        assert job.tokenizer is not None
        conversation = Conversation(job.tokenizer, job.template, args.system, job.max_seq_length, args.max_new_tokens)
        samples = chat(conversation, engine, args.stop, args.max_new_tokens, ranks)
    else:
        samples = list(run_batches(args, job, engine, ranks))
    if ranks.rank or not samples:
        return
    metrics = {
        "load_s": loaded - began,
        "compile_s": ready - loaded if compiles else 0,
        **run_metrics(samples, model, speculation),
        "quantization": job.quantization and str(job.quantization),
        "tp": ranks.count,
        "seed": args.seed,
        "sampling": asdict(job.sampling),
    }
    report_run(metrics, compiles)
    if args.metrics_path:
        write_whole(args.metrics_path, json.dumps(metrics, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    with process_group() as ranks, user_errors(signals_raise=ranks.count == 1):
        run(from_rank_0(partial(parse_args, argv), ranks), ranks)


if __name__ == "__main__":
    main()
