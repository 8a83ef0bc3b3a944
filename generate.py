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
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from checkpoint import load_model, meta_model, tensor_specs
from cli.chat import Conversation, chat
from cli.errors import outlive_readers, user_errors
from cli.options import Job, check, parse_args
from cli.ranks import check_copies, from_rank_0, process_group, together
from cli.report import TextPrinter, report_plain_linears, report_rows, report_run, run_batch, run_metrics
from collectives import draft_ranks
from config import is_head, quantization_form, read_config
from drafters import DraftModel, level_that_fills
from eagle_checkpoint import load_head, random_head
from engine import Engine, batch_size_for, generate
from files import write_whole
from model import ONE_RANK, Ranks, Transformer
from random_weights import random_model
from rows import Row
from speculate import Speculation
from steps import Sampling, compiled, decode, prefill

__all__ = ["Sampling", "generate", "main"]  # what a program imports from here


def load_one(args: argparse.Namespace, path: Path, job: Job, dtype: torch.dtype, ranks: Ranks) -> Transformer:
    if args.random_weights:
        return random_model(read_config(path), job.device, dtype, ranks=ranks)
    return load_model(path, job.device, dtype, ranks)


def load(args: argparse.Namespace, job: Job, ranks: Ranks) -> tuple[Transformer, Speculation | None]:
    """Load the model and what drafts for it, with caches for the longest text and for drafts beyond its end."""
    model = load_one(args, args.checkpoint_path, job, job.dtype, ranks)
    draft_model = load_draft(args, job, model) if args.draft_checkpoint_path else None
    speculation = None
    if draft_model or args.prompt_lookup:
        speculation = Speculation(draft_model, args.speculate_k or 0, lookup=args.prompt_lookup)
    for loaded in filter(None, (model, draft_model)):
        num_spare = speculation.most_drafts if speculation else 0
        loaded.setup_caches(job.num_rows, job.max_seq_length + num_spare, num_spare)
    return model, speculation


def load_draft(args: argparse.Namespace, job: Job, target: Transformer) -> Transformer:
    """Load a smaller model, or a head for the target."""
    path, raw = args.draft_checkpoint_path, read_config(args.draft_checkpoint_path)
    if is_head(raw):
        return random_head(raw, target) if args.random_weights else load_head(path, target)
    assert job.draft_dtype is not None
    whole = meta_model(raw)
    num_bytes = sum(dtype.itemsize * shape.numel() for dtype, shape in tensor_specs(whole, job.draft_dtype).values())
    shared_by = draft_ranks(whole.config, quantization_form(raw), num_bytes, target.ranks)
    return load_one(args, path, job, job.draft_dtype, shared_by)


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
        engine.speculation = replace(speculation, prefill=engine.prefill)
        if args.compile:
            engine.speculation.compile_(decode_mode)
    return engine


class Case(NamedTuple):
    """A form of the steps that a run can reach: each is compiled on its own."""

    num_rows: int
    num_drafts: int | None  # 0: decode; None: prefill alone
    are_found: bool = False  # the drafts, in the text

    def __str__(self) -> str:
        rows = f"batch of {self.num_rows}"
        if self.num_drafts is None:
            return f"{rows}, prefill"
        drafts = f"{self.num_drafts} draft{'s' * (self.num_drafts > 1)}{' found' * self.are_found}"
        return rows + (f", {drafts}" if self.num_drafts else "")


def reachable_levels(levels: tuple[int, ...], room: int) -> list[int]:
    """Return the numbers of drafts that a text with room for so many ids can have, in rising order; as `Pace.plan`."""
    most = level_that_fills(levels, room) if room > 0 else -1
    return [level for level in reversed(levels) if level <= most]


def reachable_cases(rooms: list[int], levels: tuple[int, ...], are_found: bool) -> set[Case]:
    """Return the cases that a batch can reach whose rows can take so many ids after prefill, with drafts of one kind.

    Any row may end early, at EOS or a stop text.
    """
    sizes = {batch_size_for(num, len(rooms)) for num in range(1, sum(room > 0 for room in rooms) + 1)}
    return {Case(size, k, are_found and k > 0) for size in sizes for k in reachable_levels(levels, max(rooms))}


def cases_to_compile(engine: Engine, job: Job, max_new_tokens: int) -> list[Case]:
    """Return what is to be compiled for a run, in rising order."""
    speculation = engine.speculation
    assert speculation is None or isinstance(speculation, Speculation)
    kinds = ((speculation.model_levels, False), (speculation.lookup_levels, True)) if speculation else (((0,), False),)
    cases: set[Case] = set()
    for prompts in job.batches or [[[0]]]:
        rooms = [min(max_new_tokens, job.max_seq_length - len(ids)) - 1 for ids in prompts]
        for levels, are_found in kinds:
            cases |= reachable_cases(rooms, levels, are_found) if levels else set()
        if engine.prefill is not prefill and max(rooms) >= 0:
            cases.add(Case(len(prompts), None))
    kept = without_needless(cases, engine)
    return sorted(
        kept, key=lambda case: (case.num_rows, -1 if case.num_drafts is None else case.num_drafts, case.are_found)
    )


def without_needless(cases: set[Case], engine: Engine) -> set[Case]:
    """Leave out the cases that stay eager, and prefill alone where another case of as many rows begins with it."""
    if engine.decode is decode:  # prefill alone is compiled: the model's, and before a round that of a draft model
        kept = {None, 1} if engine.speculation and engine.speculation.draft_model else {None}
        cases = {case for case in cases if case.num_drafts in kept and not case.are_found}
    begun = {case.num_rows for case in cases if case.num_drafts is not None}
    return {case for case in cases if case.num_drafts is not None or case.num_rows not in begun}


def warm_up(engine: Engine, job: Job, quiet: bool, max_new_tokens: int = 2**31) -> None:
    """Compile all that a run can reach, of which each case is named on stderr: few slots and all (see `compiled`)."""
    cases = cases_to_compile(engine, job, max_new_tokens)
    with tqdm(total=len(cases), leave=False, dynamic_ncols=True, disable=quiet or None) as bar:
        for i, case in enumerate(cases, start=1):
            if not bar.disable:
                bar.set_description(f"compiling {case}")
            elif not quiet:
                print(f"compiling {i} of {len(cases)}: {case}", file=sys.stderr, flush=True)
            compile_case(engine, job, case)
            bar.update()


def compile_case(engine: Engine, job: Job, case: Case) -> None:
    batches = job.batches or [[[0]]]  # any id stands for what will be typed
    # The rows that go on may be the shortest of all: few slots must hold no long one.
    by_length = sorted(chain(*batches), key=len)
    shortest, longest = by_length[: case.num_rows], len(by_length[-1])
    speculation = None
    if isinstance(engine.speculation, Speculation) and case.num_drafts:
        source = {"draft_model": None} if case.are_found else {"lookup": False}
        speculation = replace(engine.speculation, levels=(case.num_drafts,), **source)
    is_whole = case.num_rows in map(len, batches)  # else rows have left, and only a draft model is prefilled
    for cached in sorted({0, max(0, job.max_seq_length - len(shortest[-1]) - 3)}):
        drafter = speculation.drafter if speculation else None
        if isinstance(drafter, DraftModel):
            drafter.hold([[0] * cached] * case.num_rows)
        # A prompt is at the beginning of its text, but in a conversation.
        prefills = is_whole and (not cached or not job.batches or longest > len(shortest[-1]))
        used = replace(engine, eos_ids=(), speculation=speculation, prefill=engine.prefill if prefills else prefill)
        for _ in used.run([[0] * cached + ids for ids in shortest], 1 if case.num_drafts is None else 3, cached=cached):
            pass
        if isinstance(drafter, DraftModel):
            drafter.hold([])


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
        print(job.unsupported, file=sys.stderr)
    if args.metrics_path or args.profile:
        outlive_readers()
    began = time.perf_counter()
    model, speculation = together(partial(load, args, job, ranks), ranks)
    gc.freeze()  # the collector searches nothing that is there by now: else it may begin in the midst of a first token
    loaded = time.perf_counter()
    if ranks.rank == 0:
        report_plain_linears(model, speculation)

    engine = make_engine(args, job, model, speculation)
    compiles = args.compile or args.compile_prefill
    if compiles:
        warm_up(engine, job, ranks.rank > 0, args.max_new_tokens)
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
