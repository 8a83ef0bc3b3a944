"""Generate text: the loop over prefill, decode and rounds of speculation, and the command.

    python generate.py
    python generate.py --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B --prompt "Once upon a time" --compile

Prefill runs the prompt, decode one token at a time; torch.compile captures each of them whole. The text goes to stdout
as it is generated, everything else to stderr. The command line's options are in options.py.
"""

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from chat import Conversation, chat
from checkpoint import (
    check_copies,
    load_model,
    meta_model,
    quantization_scheme,
    random_model,
    read_config,
    tensor_specs,
)
from cli import user_errors, write_whole
from model import ONE_RANK, Ranks, Transformer
from options import Job, check, parse_args
from report import Row, report_rows, report_run, run_metrics, run_sample
from speculate import Speculation, levels_below
from steps import (
    Batch,
    Sampling,
    batch_sizes,
    compiled,
    decode,
    exponential,
    prefill,
    prompt_chunks,
    read_behind,
    visible_slots,
)
from tokenizer import check_ids
from tp import draft_ranks, from_rank_0, process_group, together

# ---------------------------------------------------------------------------------------------------------------------
# The loop

# From ids [B], their positions [B] and the length of the longest text to the ids that follow and their positions.
DecodeOne = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def check_room(model: Transformer, prompts: list[list[int]], cached: int, speculation: Speculation | None) -> int:
    """Return how many slots of the caches a text may fill. Raises ValueError if a prompt needs more or is empty."""
    capacity = model.max_seq_length - (speculation.max_k if speculation else 0)
    longest = max(map(len, prompts))
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one token, the BOS")
    if cached < 0 or min(map(len, prompts)) <= cached:
        raise ValueError(f"a prompt has {min(map(len, prompts))} ids and {cached} are cached; at least one must be new")
    check_ids(chain(*prompts), model.config.vocab_size, "a prompt")
    if longest > capacity:
        raise ValueError(f"a prompt needs {longest} cache slots, the cache has {capacity}; set up a longer one")
    drafter = speculation.draft_model if speculation else None
    if drafter and drafter.max_seq_length < model.max_seq_length:
        raise ValueError(
            f"the draft's caches have {drafter.max_seq_length} slots, the model's {model.max_seq_length}: too few"
        )
    return capacity


def launch_steps(decode: DecodeOne, batch: Batch, device: torch.device, count: int) -> Iterator[Tensor]:
    """Launch `count` steps of the running rows, each on the ids [B] of the step before; stop once rows can leave."""
    texts = [batch.texts[row] for row in batch.running]
    ids = torch.tensor([text[-1] for text in texts], device=device)
    lengths = [len(text) for text in texts]
    at = torch.tensor(lengths, device=device) - 1
    for n in range(count):
        if batch.needed < len(batch.running):
            return
        ids, at = decode(ids, at, max(lengths) + n)
        yield ids


def decode_plainly(decode: DecodeOne, batch: Batch, device: torch.device, count: int) -> Iterator[list[list[int]]]:
    """Yield the new id of each running row, `count` times. Rows that have ended leave the batch on the way."""
    while count > 0:
        batch.shrink_()
        for step in read_behind(launch_steps(decode, batch, device, count), lag=0 if device.type == "cpu" else 1):
            count -= 1
            yield step


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  # it is frozen
    *,
    eos_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    cached: int = 0,
    ended: Iterable[int] = (),
    prefill: Callable[..., Any] = prefill,
    decode: Callable[..., Any] = decode,
    speculation: Speculation | None = None,
) -> Iterator[list[list[int]]]:
    """Yield, step by step, the new ids of each row: [] for a row that has ended, several where drafts were accepted.

    model: with caches for at least len(prompts) rows. prompts: ids, at least one per row. cached: how many of each
    prompt's first ids the caches hold already, from an earlier turn. prefill, decode: the plain steps, or compiled.

    A row ends with one of eos_ids (which is yielded too), after max_new_tokens, when the caller adds its number to
    `ended`, or when prompt and new tokens fill the caches, whose last max_k slots speculation keeps for drafts beyond
    the end. Rows that have ended leave the batch as soon as a smaller power of two holds the others. Raises ValueError
    if a prompt is empty or does not fit, or if logits are not finite.
    """
    device = model.device
    capacity = check_room(model, prompts, cached, speculation)
    rooms = [min(max_new_tokens, capacity - len(p)) for p in prompts]
    models = [model, speculation.draft_model] if speculation and speculation.draft_model else [model]
    batch = Batch([list(p) for p in prompts], rooms, frozenset(eos_ids), models)
    slots = torch.arange(model.max_seq_length, device=device)

    def forward(step: Callable[..., Any], tokens: Tensor, positions: Tensor, length: int) -> Any:
        noise = None
        if sampling.temperature != 0:
            # For rows that have ended too, so that what the others draw does not depend on them.
            noise = exponential(len(prompts), model.config.vocab_size, generator=generator, device=device)
            noise = noise if len(batch.running) == len(prompts) else noise[batch.running]
        return step(model, tokens, positions, visible_slots(slots, length), sampling, noise)

    plain = partial(decode_plainly, partial(forward, decode), batch, device)

    def steps() -> Iterator[list[list[int]]]:
        while speculation:
            num_plain, k = speculation.plan(max(batch.rooms))
            yield from plain(num_plain)
            if k:
                batch.shrink_()
                new_ids = speculation.round(model, batch.texts, batch.rooms, batch.running, k, sampling, generator)
                yield from plain(1) if new_ids is None else [new_ids]
        yield from plain(max(batch.rooms))

    if speculation:
        speculation.begin(model, len(prompts), cached)
    if not any(room > 0 for room in batch.rooms):
        return
    new = [p[cached:] for p in prompts]
    for tokens, positions, filled in prompt_chunks(new, [cached] * len(prompts), device):
        ids = forward(prefill, tokens, positions, filled)
    yield batch.take([[token] for token in ids.tolist()])
    batch.end(ended)
    made = steps()
    try:
        while any(batch.rooms):
            step = next(made)
            if speculation:
                speculation.count(step, batch.rooms, batch.running)
            yield batch.take(step)
            batch.end(ended)
    finally:
        batch.arrange_(list(range(len(prompts))))  # for a later turn


# ---------------------------------------------------------------------------------------------------------------------
# The command


def load(args: argparse.Namespace, job: Job, ranks: Ranks) -> tuple[Transformer, Speculation | None]:
    """Load the model and what drafts for it, with caches for the longest text and for drafts beyond its end."""

    def one(path: Path, dtype: torch.dtype, ranks: Ranks) -> Transformer:
        if args.random_weights:
            return random_model(read_config(path), job.device, dtype, ranks=ranks)
        return load_model(path, job.device, dtype, ranks)

    model = one(args.checkpoint_path, job.dtype, ranks)
    speculation = draft_model = None
    if job.draft_dtype or args.prompt_lookup:
        if job.draft_dtype:
            raw = read_config(args.draft_checkpoint_path)
            whole, scheme = meta_model(raw), quantization_scheme(raw)
            specs = tensor_specs(whole, job.draft_dtype).values()
            num_bytes = sum(kind.itemsize * shape.numel() for kind, shape in specs)
            shared_by = draft_ranks(whole.config, scheme, num_bytes, ranks)
            draft_model = one(args.draft_checkpoint_path, job.draft_dtype, shared_by)
        speculation = Speculation(draft_model, *([args.speculate_k] if args.speculate_k else []))
    for each in (model, speculation and speculation.draft_model):
        if each:
            each.setup_caches(len(job.batches[0]), job.max_seq_length + (speculation.max_k if speculation else 0))
    return model, speculation


def warm_up(launch: Callable[..., Iterator[Any]], job: Job, speculation: Speculation | None, quiet: bool) -> None:
    """Compile all that a run may need: every batch size and number of drafts, few slots and all (see `compiled`)."""
    shortest = sorted(chain(*job.batches), key=len)  # the rows that go on may be these: few slots must hold no long one
    sizes = {size for batch in job.batches for size in batch_sizes(len(batch))}
    levels = levels_below(speculation.max_k) if speculation else (0,)
    cases = [
        (shortest[:size], cached, k)
        for size in sizes
        for cached in {0, max(0, job.max_seq_length - len(shortest[size - 1]) - 3)}
        for k in reversed(levels)
    ]
    for prompts, cached, k in tqdm(cases, desc="compile", leave=False, dynamic_ncols=True, disable=quiet or None):
        drafting = replace(speculation, levels=(k,)) if speculation and k else None
        if drafting:
            drafting.filled = [cached] * len(prompts)
        for _ in launch([[0] * cached + ids for ids in prompts], 3, cached=cached, speculation=drafting):
            pass


def sample_batches(
    args: argparse.Namespace, job: Job, launch: Callable[..., Any], speculation: Speculation | None, ranks: Ranks
) -> Iterator[list[Row]]:
    """Run one batch of prompts after the other; yield the rows of each."""
    sizes = [len(prompts) for prompts in job.batches]
    for i, prompts in enumerate(job.batches, start=1):
        trace = args.profile and i == len(job.batches) and ranks.rank == 0
        with torch.profiler.profile() if trace else contextlib.nullcontext() as profiler:
            rows = run_sample(
                prompts, launch, args.max_new_tokens, job.tokenizer, job.eos_ids, args.stop, ranks.rank > 0,
                echo=job.template is None, first=sum(sizes[: i - 1]) + 1, total=sum(sizes),
            )  # fmt: skip
        if profiler:
            profiler.export_chrome_trace(str(args.profile))
        for row, counts in zip(rows, speculation.accept_counts if speculation else [], strict=False):
            row.accept_counts, row.num_drafted = counts, speculation.num_drafted if speculation else 0
        if ranks.rank == 0:
            report_rows(rows, job.config.max_position_embeddings)
        yield rows


def run(args: argparse.Namespace, ranks: Ranks = ONE_RANK) -> None:
    job = together(partial(check, args, ranks), ranks)
    check_copies(list(filter(None, (args.checkpoint_path, args.draft_checkpoint_path))), ranks)
    # Where other files differ between nodes, rank 0's are used.
    batches, max_seq_length = from_rank_0(lambda: (job.batches, job.max_seq_length), ranks)
    job = replace(job, batches=batches, max_seq_length=max_seq_length)
    began = time.perf_counter()
    model, speculation = together(partial(load, args, job, ranks), ranks)
    loaded = time.perf_counter()

    generator = torch.Generator(job.device)
    run_prefill = compiled(prefill) if args.compile_prefill else prefill
    decode_mode = "reduce-overhead" if model.device.type == "cuda" else None
    run_decode = compiled(decode, decode_mode) if args.compile else decode
    if speculation:
        speculation.prefill = run_prefill
        if args.compile:
            speculation.compile_(decode_mode)
    launch = partial(
        generate, model, sampling=job.sampling, generator=generator, prefill=run_prefill, decode=run_decode
    )
    if args.compile or args.compile_prefill:
        if ranks.rank == 0:
            print("compiling ...", file=sys.stderr)
        warm_up(launch, job, speculation, quiet=ranks.rank > 0)
    ready = time.perf_counter()

    generator.manual_seed(args.seed)
    launch = partial(launch, eos_ids=job.eos_ids, speculation=speculation)
    if args.interactive:
        assert job.tokenizer is not None
        conversation = Conversation(job.tokenizer, job.template, args.system, job.max_seq_length, args.max_new_tokens)
        samples = chat(conversation, launch, job.eos_ids, args.stop, args.max_new_tokens, ranks, speculation)
    else:
        samples = list(sample_batches(args, job, launch, speculation, ranks))
    if ranks.rank or not samples:
        return
    metrics = {
        "load_s": loaded - began,
        "compile_s": ready - loaded if args.compile or args.compile_prefill else 0,
        **run_metrics(samples, model, speculation),
        "quantization": job.quantization and str(job.quantization),
        "tp": ranks.count,
        "seed": args.seed,
        "sampling": asdict(job.sampling),
    }
    report_run(metrics, args.compile or args.compile_prefill)
    if args.metrics_path:
        write_whole(args.metrics_path, json.dumps(metrics, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    with process_group() as ranks, user_errors():
        run(from_rank_0(partial(parse_args, argv), ranks), ranks)


if __name__ == "__main__":
    main()
