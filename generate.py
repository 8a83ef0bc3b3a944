"""Generate text: sampling, prefill, decode, and the command.

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
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import DTYPES, eos_token_ids, load_model, parse_config, parse_dtype, random_model, read_config
from cli import ArgumentParser, number, user_errors, write_whole
from model import MAX_REDUCTION_ROWS, ModelConfig, Transformer
from report import report_rows, run_metrics, run_sample
from tokenizer import Tokenizer, load_tokenizer

# Attention reads a whole number of these cache slots: few enough to follow the position, and always a multiple of
# the vector width.
SLOTS_STEP = 64
# What fp32 takes for a positive number, where a user's is so small that it would become 0.
TINY = 1e-30
# Longer prompts are prefilled in pieces, which bounds the memory of the attention mask.
PREFILL_CHUNK = 2048

# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: argmax at temperature 0, else a draw from the filtered distribution."""

    temperature: float = 0.8
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the likeliest that together reach this mass (arXiv:1904.09751)
    min_p: float = 0.0  # keep those at least this share of the likeliest (arXiv:2407.01082)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Turn logits [..., V] into the fp32 distribution to draw from, at a temperature above 0.

    The filters come in the order `transformers` has them: top-k, top-p, min-p.
    """
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, TINY)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[..., -1:]
        logits = torch.where(logits < smallest, -torch.inf, logits)
    p = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, ids = p.sort(dim=-1, descending=True)
        kept = ordered.cumsum(dim=-1) - ordered < max(sampling.top_p, TINY)  # the likeliest always is
        p = torch.zeros_like(p).scatter(-1, ids, torch.where(kept, ordered, 0))
    if sampling.min_p > 0:
        p = torch.where(p < sampling.min_p * p.amax(dim=-1, keepdim=True), 0, p)
    return p / p.sum(dim=-1, keepdim=True)


def sample(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """Choose one id [B] from logits [B, V].

    noise [B, V]: draws from Exp(1), made by the caller so that a seed gives the same text compiled and not; unused at
    temperature 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    assert noise is not None
    p = probabilities(logits, sampling)
    # The first of exponential clocks with rates p to ring is distributed as p.
    return torch.where(p > 0, p / noise, -1).argmax(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The two steps


def prefill(
    model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor, sampling: Sampling, noise: Tensor | None
) -> Tensor:
    """Run tokens [B, S] at positions [B, S]; return the ids [B] that follow the last column."""
    hidden = model.hidden_states(tokens, positions, slots)[:, -1]
    return sample(model.lm_head(hidden), sampling, noise)


def decode(
    model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor, sampling: Sampling, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run one token [B] a row at positions [B]; return the next ids and their positions."""
    # A row that has ended may have walked past the slots that the others still need.
    positions = positions.clamp(max=slots.shape[0] - 1)
    hidden = model.hidden_states(tokens.unsqueeze(-1), positions.unsqueeze(-1), slots)[:, -1]
    return sample(model.lm_head(hidden), sampling, noise), positions + 1


def compiled(step: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """Compile prefill or decode: one graph for every prompt length and position.

    Another batch size or set of filters makes another graph, and so do more than 4,096 slots, over which inductor sums
    in another way. mode: torch.compile's; "reduce-overhead" replays decode as a CUDA graph.
    """
    graph = torch.compile(step, fullgraph=True, mode=mode)

    def call(
        model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor, sampling: Sampling, noise: Tensor | None
    ) -> Any:
        if tokens.ndim == 2:  # prefill: any number of columns
            torch._dynamo.mark_dynamic(tokens, 1)
            torch._dynamo.mark_dynamic(positions, 1)
        torch._dynamo.mark_dynamic(slots, 0)
        result = graph(model, tokens, positions, slots, sampling, noise)
        # The next replay of a CUDA graph writes over its outputs.
        return tuple(tensor.clone() for tensor in result) if mode and tokens.ndim == 1 else result

    return call


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def visible_slots(slots: Tensor, length: int) -> Tensor:
    """Return the first slots of arange(capacity) that a text of `length` reads, in whole steps."""
    return slots[: -(-length // SLOTS_STEP) * SLOTS_STEP]


def prompt_chunks(prompts: list[list[int]], start: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield tokens [B, S], positions [B, S] and the length up to which they fill the longest row's cache.

    Rows end together. A shorter one is filled up at its left with its own first token at its own first position,
    which only writes that slot once more. So are very short prompts, which would be compiled apart.
    """
    shortest = MAX_REDUCTION_ROWS + 1
    length = max(shortest, *map(len, prompts))
    tokens = torch.tensor([[p[0]] * (length - len(p)) + p for p in prompts], device=device)
    columns = torch.arange(length, device=device)
    fill = torch.tensor([length - len(p) for p in prompts], device=device)
    positions = start + (columns - fill.unsqueeze(-1)).clamp(min=0)
    first = length % PREFILL_CHUNK  # the odd piece comes first: a last one could be too short
    first = first if first >= shortest else first + PREFILL_CHUNK
    bounds = [0, *range(min(first, length), length + 1, PREFILL_CHUNK)]
    for begin, end in pairwise(bounds):
        # Copies, since a compiled prefill would take a slice's strides for another case.
        piece = slice(begin, end)
        yield copy_of(tokens[:, piece]), copy_of(positions[:, piece]), start + end


def copy_of(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


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
    sampling: Sampling = Sampling(),
    *,
    eos_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    start: int = 0,
    prefill: Callable[..., Any] = prefill,
    decode: Callable[..., Any] = decode,
) -> Iterator[list[list[int]]]:
    """Yield, step by step, the new ids of each row: [] for a row that has ended.

    model: its caches set up for at least len(prompts) rows. prompts: ids, at least one a row; they continue the first
    `start` cache slots. A row ends with one of eos_ids (yielded too), after max_new_tokens, or when prompt and new
    tokens fill the cache. prefill, decode: the plain steps or `compiled` ones. Raises ValueError where a prompt is
    empty or does not fit.
    """
    capacity, device = model.max_seq_length, model.device
    lengths = [start + len(p) for p in prompts]
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one token, the BOS")
    if max(lengths) > capacity:
        raise ValueError(f"a prompt needs {max(lengths)} cache slots, the cache has {capacity}; set up a longer one")
    rooms = [min(max_new_tokens, capacity - n) for n in lengths]
    ended = [room <= 0 for room in rooms]

    slots = partial(visible_slots, torch.arange(capacity, device=device))

    def noise() -> Tensor | None:
        if sampling.temperature == 0:
            return None
        return torch.empty(len(prompts), model.config.vocab_size, device=device).exponential_(generator=generator)

    def steps() -> Iterator[Tensor]:
        for tokens, positions, filled in prompt_chunks(prompts, start, device):
            ids = prefill(model, tokens, positions, slots(filled), sampling, noise())
        yield ids
        at = torch.tensor(lengths, device=device)
        for n in range(1, max(rooms)):
            longest = max(length for length, done in zip(lengths, ended, strict=True) if not done)
            ids, at = decode(model, ids, at, slots(longest + n), sampling, noise())
            yield ids

    if all(ended):
        return
    ends = frozenset(eos_ids)
    for n, ids in enumerate(read_behind(steps(), lag=0 if device.type == "cpu" else 1), start=1):
        yield [[] if done else [token] for token, done in zip(ids, ended, strict=True)]
        ended = [done or n >= room or i in ends for i, done, room in zip(ids, ended, rooms, strict=True)]
        if all(ended):
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
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    batches: list[list[list[int]]]  # of prompts, of ids
    max_seq_length: int
    sampling: Sampling


def check_device(name: str) -> None:
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError(f"--device {name} is not supported; cpu and cuda are")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def check(args: argparse.Namespace) -> Job:
    """Refuse what cannot work, before the weights load. Raises ValueError or FileNotFoundError."""
    raw = read_config(args.checkpoint_path)
    config = parse_config(raw)
    check_device(args.device)
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
        DTYPES[args.dtype] if args.dtype else parse_dtype(raw),
        tokenizer,
        () if args.ignore_eos else eos_token_ids(args.checkpoint_path),
        [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)] * args.num_samples,
        min(config.max_position_embeddings, max(map(len, prompts)) + args.max_new_tokens),
        Sampling(args.temperature, args.top_k, args.top_p, args.min_p),
    )


def read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_file {path} is not UTF-8: {error}") from None
    if not text:
        raise ValueError(f"--prompt_file {path} is empty")
    return text.removesuffix("\n").split("\n")  # splitlines would cut at form feeds too


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer | None, config: ModelConfig) -> list[list[int]]:
    """Return the ids of every prompt. Raises ValueError where one does not fit the model."""
    if args.prompt_length:
        generator = torch.Generator().manual_seed(args.seed)
        prompts = [torch.randint(config.vocab_size, (args.prompt_length,), generator=generator).tolist()]
    else:
        assert tokenizer is not None
        texts = read_lines(args.prompt_file) if args.prompt_file else args.prompt or ["def"]
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


def run(args: argparse.Namespace) -> None:
    job = check(args)
    began = time.perf_counter()
    if args.random_weights:
        model = random_model(job.config, args.device, job.dtype)
    else:
        model = load_model(args.checkpoint_path, args.device, job.dtype)
    model.setup_caches(len(job.batches[0]), job.max_seq_length)
    loaded = time.perf_counter()

    generator = torch.Generator(args.device)
    run_prefill = compiled(prefill) if args.compile_prefill else prefill
    decode_mode = "reduce-overhead" if model.device.type == "cuda" else None
    run_decode = compiled(decode, decode_mode) if args.compile else decode
    launch = partial(
        generate, model, sampling=job.sampling, generator=generator, prefill=run_prefill, decode=run_decode
    )
    if args.compile or args.compile_prefill:
        print("compiling ...", file=sys.stderr)
        for prompts in {len(batch): batch for batch in job.batches}.values():
            for start in {0, job.max_seq_length - max(map(len, prompts)) - 2}:  # few slots, and all: see `compiled`
                for _ in launch(prompts, 2, start=max(0, start)):
                    pass
    ready = time.perf_counter()

    generator.manual_seed(args.seed)
    samples = []
    for i, prompts in enumerate(job.batches, start=1):
        trace = args.profile and i == len(job.batches)
        with torch.profiler.profile() if trace else contextlib.nullcontext() as profiler:
            new_ids = launch(prompts, args.max_new_tokens, eos_ids=job.eos_ids)
            samples.append(run_sample(prompts, new_ids, args.max_new_tokens, job.tokenizer, job.eos_ids, args.stop))
        if profiler:
            profiler.export_chrome_trace(str(args.profile))
        report_rows(samples[-1], job.config.max_position_embeddings)

    metrics = {
        "load_s": loaded - began,
        "compile_s": ready - loaded,
        **run_metrics(samples, model),
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
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
