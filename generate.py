"""Generate text: the loop over prefill, decode and rounds of speculation, and the command.

    python generate.py
    python generate.py --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B --prompt "Once upon a time" --compile

Prefill runs the prompt, decode one token at a time; each is one function that torch.compile captures whole. The text
goes to stdout as it is made, all else to stderr.
"""

import argparse
import contextlib
import json
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import (
    DTYPES,
    eos_token_ids,
    load_model,
    meta_model,
    parse_config,
    parse_dtype,
    quantization_scheme,
    random_model,
    read_config,
    tensor_specs,
)
from cli import ArgumentParser, check_device, number, read_text, user_errors, write_whole
from model import ONE_RANK, ModelConfig, Ranks, Transformer
from quantize import Scheme
from report import report_rows, run_metrics, run_sample
from speculate import Speculation, draft, levels_below, verify
from steps import Sampling, compiled, decode, exponential, prefill, prompt_chunks, visible_slots
from tokenizer import Tokenizer, load_tokenizer
from tp import check_sizes, draft_ranks, from_rank_0, local_device, process_group, together

# ---------------------------------------------------------------------------------------------------------------------
# The loop


def read_behind(steps: Iterator[Tensor], lag: int) -> Iterator[list[int]]:
    """Read ids [B] on the host `lag` steps after they were launched, so that an accelerator never waits for it."""
    in_flight: deque[tuple[Tensor, Any]] = deque()

    def read() -> list[int]:
        ids, copied = in_flight.popleft()
        if copied is not None:
            copied.synchronize()
        return ids.tolist()

    for ids in steps:
        if ids.device.type == "cpu":
            in_flight.append((ids, None))
        else:
            on_host = ids.to("cpu", non_blocking=True)
            in_flight.append((on_host, torch.accelerator.current_stream(ids.device).record_event()))
        if len(in_flight) > lag:
            yield read()
    while in_flight:
        yield read()


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  # it is frozen
    *,
    eos_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    start: int = 0,
    prefill: Callable[..., Any] = prefill,
    decode: Callable[..., Any] = decode,
    speculation: Speculation | None = None,
) -> Iterator[list[list[int]]]:
    """Yield, step by step, the new ids of each row: [] for a row that has ended, several where drafts were accepted.

    model: its caches set up for at least len(prompts) rows. prompts: ids, at least one a row; they continue the first
    `start` cache slots. A row ends with one of eos_ids (yielded too), after max_new_tokens, or when prompt and new
    tokens fill the cache, of which speculation keeps the last max_k slots for drafts that go too far. prefill, decode:
    the plain steps or `compiled` ones. Raises ValueError where a prompt is empty or does not fit.
    """
    device = model.device
    capacity = model.max_seq_length - (speculation.max_k if speculation else 0)
    longest = start + max(map(len, prompts))
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one token, the BOS")
    if longest > capacity:
        raise ValueError(f"a prompt needs {longest} cache slots, the cache has {capacity}; set up a longer one")
    drafter = speculation.draft_model if speculation else None
    if drafter and drafter.max_seq_length < model.max_seq_length:
        raise ValueError(
            f"the draft's caches have {drafter.max_seq_length} slots, the model's {model.max_seq_length}: too few"
        )
    ends = frozenset(eos_ids)
    texts = [list(p) for p in prompts]
    rooms = [min(max_new_tokens, capacity - start - len(p)) for p in prompts]  # 0 when a row has ended

    slots = partial(visible_slots, torch.arange(model.max_seq_length, device=device))

    def noise() -> Tensor | None:
        if sampling.temperature == 0:
            return None
        return exponential(len(prompts), model.config.vocab_size, generator=generator, device=device)

    def take(step: list[list[int]]) -> list[list[int]]:
        """Cut what each row was given at its end, and add the rest to its text."""
        taken = [ids[:room] for ids, room in zip(step, rooms, strict=True)]
        for row, ids in enumerate(taken):
            eos = next((i for i, token in enumerate(ids) if token in ends), None)
            if eos is not None:
                del ids[eos + 1 :]
            texts[row] += ids
            rooms[row] = rooms[row] - len(ids) if eos is None else 0
        return taken

    def plain_steps(count: int) -> Iterator[Tensor]:
        ids = torch.tensor([text[-1] for text in texts], device=device)
        lengths = [start + len(text) for text in texts]
        at = torch.tensor(lengths, device=device) - 1
        for n in range(count):
            longest = max(length for length, room in zip(lengths, rooms, strict=True) if room)
            ids, at = decode(model, ids, at, slots(longest + n), sampling, noise())
            yield ids

    def plain(count: int) -> Iterator[list[list[int]]]:
        for ids in read_behind(plain_steps(count), lag=0 if device.type == "cpu" else 1):
            yield [[token] for token in ids]

    def steps() -> Iterator[list[list[int]]]:
        while speculation:
            num_plain, k = speculation.plan()
            yield from plain(num_plain)
            new_ids = speculation.round(model, texts, rooms, k, sampling, generator)
            yield from plain(1) if new_ids is None else [new_ids]
        yield from plain(max(rooms))

    if speculation:
        speculation.begin(len(prompts), start)
    if not any(room > 0 for room in rooms):
        return
    for tokens, positions, filled in prompt_chunks(prompts, [start] * len(prompts), device):
        ids = prefill(model, tokens, positions, slots(filled), sampling, noise())
    yield take([[token] for token in ids.tolist()])
    if not any(rooms):
        return
    for step in steps():
        if speculation:
            speculation.count(step, rooms)
        yield take(step)
        if not any(rooms):
            return


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="generate.py", description="Generate text with a Llama-family model.")
    what = parser.add_argument_group("what to generate")
    what.add_argument("--checkpoint_path", type=Path, default=Path(__file__).parent / "checkpoints/demo", metavar="DIR",
                      help="a folder from the Hub, or a converted one (checkpoints/demo)")  # fmt: skip
    source = what.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may repeat: a batch of prompts ('def')")
    source.add_argument("--prompt_file", type=Path, metavar="FILE", help="a batch of prompts, one a line")
    source.add_argument("--prompt_length", type=number(int, 1), metavar="N", help="a prompt of N random tokens")
    what.add_argument("--max_new_tokens", type=number(int, 0), default=200, metavar="N", help="per row (200)")
    what.add_argument("--num_samples", type=number(int, 1), default=1, metavar="N", help="one after the other (1)")
    what.add_argument("--batch_size", type=number(int, 1), metavar="N",
                      help="rows at a time: copies of one prompt, or so many of several (all)")  # fmt: skip
    what.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may repeat")
    what.add_argument("--ignore_eos", action="store_true", help="go on after the end-of-text token")
    how = parser.add_argument_group("sampling")
    how.add_argument("--temperature", type=number(float, 0), default=0.8, metavar="T", help="0 is argmax (0.8)")
    how.add_argument("--top_k", type=number(int, 0), default=200, metavar="K", help="the K likeliest; 0 is all (200)")
    how.add_argument("--top_p", type=number(float, 0, 1, above=True), default=1.0, metavar="P",
                     help="the likeliest of total probability P (1)")  # fmt: skip
    how.add_argument("--min_p", type=number(float, 0, 1), default=0.0, metavar="P",
                     help="those of at least P times the likeliest (0)")  # fmt: skip
    how.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="the same seed, the same text (random)"
    )
    drafts = parser.add_argument_group("speculation (the text stays the model's own)")
    source = drafts.add_mutually_exclusive_group()
    source.add_argument("--draft_checkpoint_path", type=Path, metavar="DIR",
                        help="a smaller model of the same vocabulary drafts")  # fmt: skip
    source.add_argument(
        "--prompt_lookup", action="store_true", help="what followed the last n-gram before is the draft"
    )
    drafts.add_argument(
        "--speculate_k", type=number(int, 1, 64), metavar="K", help="draft at most K tokens a round (5)"
    )
    run = parser.add_argument_group("how to run")
    run.add_argument("--compile", action="store_true", help="compile decode")
    run.add_argument("--compile_prefill", action="store_true", help="compile prefill too")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    run.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    run.add_argument("--random_weights", action="store_true", help="for speed work; the folder needs only config.json")
    run.add_argument("--profile", type=Path, metavar="FILE", help="write a chrome trace of the last sample")
    run.add_argument("--metrics_path", type=Path, metavar="FILE", help="write the run as JSON")
    args = parser.parse_args(argv)
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    return args


@dataclass(frozen=True)
class Job:
    """A command line that has been checked: everything but the weights."""

    config: ModelConfig
    device: str
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    batches: list[list[list[int]]]  # of prompts, of ids
    max_seq_length: int
    sampling: Sampling
    quantization: Scheme | None
    draft_dtype: torch.dtype | None


def check(args: argparse.Namespace, ranks: Ranks) -> Job:
    """Refuse what cannot work, before the weights load. Raises ValueError or FileNotFoundError."""
    raw = read_config(args.checkpoint_path)
    config, quantization = parse_config(raw), quantization_scheme(raw)
    check_sizes(config, quantization, ranks.count)
    device = local_device(args.device, ranks)
    check_device(device)
    for option, path in (("--metrics_path", args.metrics_path), ("--profile", args.profile)):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{option} {path} cannot be written: expected a file in a folder that exists")
    if "" in args.stop:
        raise ValueError("--stop is empty; give the text to end before")
    try:
        tokenizer = load_tokenizer(args.checkpoint_path)
    except FileNotFoundError as error:
        if not args.prompt_length:
            raise ValueError(f"{error}; or give --prompt_length for a prompt of random tokens") from None
        if args.stop:
            raise ValueError(f"--stop needs a tokenizer: {error}") from None
        tokenizer = None
    prompts = read_prompts(args, tokenizer, config)
    batch_size = args.batch_size or len(prompts)
    return Job(
        config,
        device,
        DTYPES[args.dtype] if args.dtype else parse_dtype(raw),
        tokenizer,
        () if args.ignore_eos else eos_token_ids(args.checkpoint_path),
        [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)] * args.num_samples,
        min(config.max_position_embeddings, max(map(len, prompts)) + args.max_new_tokens),
        Sampling(args.temperature, args.top_k, args.top_p, args.min_p),
        quantization,
        check_draft(args, tokenizer, config.vocab_size),
    )


def check_draft(args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int) -> torch.dtype | None:
    """Return the draft's dtype, None without a draft. Raises ValueError where its vocabulary is another."""
    path = args.draft_checkpoint_path
    if args.speculate_k and not path and not args.prompt_lookup:
        raise ValueError("--speculate_k needs a draft; give --draft_checkpoint_path or --prompt_lookup")
    if not path:
        return None
    raw = read_config(path)
    try:
        config = parse_config(raw)
        quantization_scheme(raw)
    except ValueError as error:
        raise ValueError(f"--draft_checkpoint_path {path}: {error}") from None
    try:
        theirs = load_tokenizer(path).token_bytes
        ours = (tokenizer or load_tokenizer(args.checkpoint_path)).token_bytes
    except FileNotFoundError as error:
        if not args.random_weights:
            raise ValueError(f"{error}; the draft's vocabulary and the model's have to be compared") from None
        if config.vocab_size != vocab_size:
            raise ValueError(
                f"the draft {path} has {config.vocab_size} ids and the model {vocab_size}; they must have the same"
            ) from None
    else:
        differ = sorted(i for i in {*theirs, *ours} if theirs.get(i) != ours.get(i))
        if differ:
            raise ValueError(
                f"the draft {path} has another vocabulary than the model: {len(differ)} ids differ, the first is "
                f"{differ[0]}: {theirs.get(differ[0])!r} and {ours.get(differ[0])!r}; they must be one"
            )
    return DTYPES[args.dtype] if args.dtype else parse_dtype(raw)


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer | None, config: ModelConfig) -> list[list[int]]:
    """Return the ids of every prompt. Raises ValueError where one does not fit the model."""
    if args.prompt_length:
        generator = torch.Generator().manual_seed(args.seed)
        prompts = [torch.randint(config.vocab_size, (args.prompt_length,), generator=generator).tolist()]
    else:
        assert tokenizer is not None
        texts = args.prompt or ["def"]
        if args.prompt_file:  # splitlines would cut at form feeds too
            texts = read_text("--prompt_file", args.prompt_file).replace("\r\n", "\n").removesuffix("\n").split("\n")
        prompts = [tokenizer.encode(text) for text in texts]
    for ids in prompts:
        if not ids:
            raise ValueError("the prompt is empty and the tokenizer has no BOS token; give a --prompt")
        if len(ids) >= config.max_position_embeddings:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model's context {config.max_position_embeddings}; shorten it"
            )
        if max(ids) >= config.vocab_size:
            raise ValueError(
                f"the prompt has token id {max(ids)} and the model {config.vocab_size} ids; is the tokenizer its own?"
            )
    return prompts * (args.batch_size or 1) if len(prompts) == 1 else prompts


def load(args: argparse.Namespace, job: Job, ranks: Ranks) -> tuple[Transformer, Speculation | None]:
    """Load the model and what speculates for it, with caches for the longest text and drafts that go beyond its end."""

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
            num_bytes = sum(
                kind.itemsize * shape.numel() for kind, shape in tensor_specs(whole, job.draft_dtype).values()
            )
            shared_by = draft_ranks(whole.config, scheme, num_bytes, ranks)
            draft_model = one(args.draft_checkpoint_path, job.draft_dtype, shared_by)
        speculation = Speculation(draft_model, *([args.speculate_k] if args.speculate_k else []))
    for each in (model, speculation and speculation.draft_model):
        if each:
            each.setup_caches(len(job.batches[0]), job.max_seq_length + (speculation.max_k if speculation else 0))
    return model, speculation


def warm_up(launch: Callable[..., Iterator[Any]], job: Job, speculation: Speculation | None) -> None:
    """Compile all that a run may need: every size of batch and number of drafts, few slots and all (see `compiled`)."""
    for prompts in {len(batch): batch for batch in job.batches}.values():
        for start in {0, max(0, job.max_seq_length - max(map(len, prompts)) - 2)}:
            for _ in launch(prompts, 2, start=start):
                pass
            if speculation is None:
                continue
            for k in levels_below(speculation.max_k)[:-1]:
                for _ in launch(prompts, 2, start=start, speculation=replace(speculation, levels=(k,))):
                    pass


def run(args: argparse.Namespace, ranks: Ranks = ONE_RANK) -> None:
    job = together(partial(check, args, ranks), ranks)
    job = replace(job, batches=from_rank_0(lambda: job.batches, ranks))
    if torch.device(job.device).type == "cuda":
        torch.cuda.set_device(job.device)
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
            speculation.draft, speculation.verify = compiled(draft, decode_mode), compiled(verify, decode_mode)
    launch = partial(
        generate, model, sampling=job.sampling, generator=generator, prefill=run_prefill, decode=run_decode
    )
    if args.compile or args.compile_prefill:
        if ranks.rank == 0:
            print("compiling ...", file=sys.stderr)
        warm_up(launch, job, speculation)
    ready = time.perf_counter()

    generator.manual_seed(args.seed)
    samples = []
    for i, prompts in enumerate(job.batches, start=1):
        trace = args.profile and i == len(job.batches) and ranks.rank == 0
        with torch.profiler.profile() if trace else contextlib.nullcontext() as profiler:
            new_ids = launch(prompts, args.max_new_tokens, eos_ids=job.eos_ids, speculation=speculation)
            rows = run_sample(
                prompts, new_ids, args.max_new_tokens, job.tokenizer, job.eos_ids, args.stop, ranks.rank > 0
            )
        if profiler:
            profiler.export_chrome_trace(str(args.profile))
        for row, counts in zip(rows, speculation.accept_counts if speculation else [], strict=False):
            row.accept_counts, row.num_drafted = counts, speculation.num_drafted if speculation else 0
        samples.append(rows)
        if ranks.rank == 0:
            report_rows(rows, job.config.max_position_embeddings)

    if ranks.rank:
        return
    metrics = {
        "load_s": loaded - began,
        "compile_s": ready - loaded,
        **run_metrics(samples, model, speculation.draft_model if speculation else None),
        "quantization": job.quantization and str(job.quantization),
        "tp": ranks.count,
        "seed": args.seed,
        "sampling": asdict(job.sampling),
    }
    line = f"seed {args.seed}; {metrics['weight_bytes'] / 1e9:.2f} GB of weights loaded in {metrics['load_s']:.1f} s"
    if args.compile or args.compile_prefill:
        line += f", compiled in {metrics['compile_s']:.1f} s"
    if metrics["bandwidth_gb_per_s"]:
        line += f"; {metrics['bandwidth_gb_per_s']:.1f} GB/s read while decoding"
    print(line + f"; peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB", file=sys.stderr)
    if args.metrics_path:
        write_whole(args.metrics_path, json.dumps(metrics, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    with process_group() as ranks, user_errors():
        run(from_rank_0(partial(parse_args, argv), ranks), ranks)


if __name__ == "__main__":
    main()
