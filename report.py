"""What a run shows and writes: the text as it comes, lines about each row on stderr, and the metrics."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from model import Transformer
from speculate import Speculation
from tokenizer import TextStream, Tokenizer


@dataclass
class Row:
    """One row of a sample: what has come of it so far, and what the metrics report."""

    prompt_ids: list[int]
    stream: TextStream | None
    stops: list[str]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    held: str = ""  # decoded, but perhaps the beginning of a stop text
    finish_reason: str | None = None
    began: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)
    accept_counts: list[int] = field(default_factory=list)  # as in `Speculation`
    num_drafted: int = 0
    num_cached: int = 0  # of the prompt's ids, those that the model's caches held before

    def push(self, ids: list[int], eos_ids: tuple[int, ...]) -> str:
        """Take the row's new ids; return the text that is now certain."""
        if self.finish_reason or not ids:
            return ""
        self.arrivals.append(time.perf_counter())
        ready = ""
        for token in ids:
            self.tokens.append(token)
            if token in eos_ids:
                return ready + self.finish("eos")
            ready += self._release(self.stream.push([token]) if self.stream else "")
            if self.finish_reason:  # a stop: the ids after it are not part of the text
                break
        return ready

    def finish(self, reason: str) -> str:
        """End the row, for `reason` unless it has ended already; return the rest of its text."""
        if self.finish_reason:
            return ""
        self.finish_reason = reason
        return self._release(self.stream.flush() if self.stream else "", last=True)

    def _release(self, piece: str, last: bool = False) -> str:
        self.held += piece
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            ready, self.held = self.held[: min(found)], ""
        else:
            certain = len(self.held) - (0 if last else held_back(self.held, self.stops))
            ready, self.held = self.held[:certain], self.held[certain:]
        self.text += ready
        return ready

    @property
    def ttft_s(self) -> float | None:
        return self.arrivals[0] - self.began if self.arrivals else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        if len(self.arrivals) < 2:
            return None
        return (len(self.tokens) - 1) / (self.arrivals[-1] - self.arrivals[0])

    @property
    def steps_per_s(self) -> float | None:
        """Forwards of the model a second: as many as tokens, or fewer where drafts were accepted."""
        if len(self.arrivals) < 2:
            return None
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    @property
    def tokens_per_round(self) -> float | None:
        if not self.accept_counts or len(self.arrivals) < 2:
            return None
        return (len(self.tokens) - 1) / (len(self.arrivals) - 1)

    def metrics(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "text": self.text,
            "prompt_tokens": len(self.prompt_ids),
            "new_tokens": len(self.tokens),
            "finish_reason": self.finish_reason,
            "ttft_ms": self.ttft_s and self.ttft_s * 1e3,
            "prefill_tokens_per_s": self.ttft_s and (len(self.prompt_ids) - self.num_cached) / self.ttft_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "accept_counts": self.accept_counts,
            "num_drafted": self.num_drafted,
        }


def held_back(text: str, stops: list[str]) -> int:
    """Return the length of the longest end of text that a stop text begins with."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


def bytes_per_step(model: Transformer, rows: list[Row], draft_model: Transformer | None = None) -> int:
    """Return the bytes that an average step must read: weights, and the keys and values of the text so far.

    With speculation a step is a forward of the target, however many tokens it accepts, and its share of the draft's.
    """
    drafts = max(row.num_drafted for row in rows) / max(1, *(sum(row.accept_counts) for row in rows))
    return int(forward_bytes(model, rows) + (drafts * forward_bytes(draft_model, rows) if draft_model else 0))


def forward_bytes(model: Transformer, rows: list[Row]) -> float:
    config = model.config
    slot = 2 * config.num_hidden_layers * model.layers[0].self_attn.num_local_kv_heads * config.head_dim
    slot *= model.embed_tokens.weight.itemsize
    longest = max(1, *(len(row.arrivals) for row in rows))  # a row that has ended is read no more
    slots = sum((len(row.prompt_ids) + len(row.tokens) / 2) * len(row.arrivals) / longest for row in rows)
    return model.step_weight_bytes + slot * slots


def run_sample(
    prompts: list[list[int]],
    launch: Callable[..., Iterator[list[list[int]]]],
    max_new_tokens: int,
    tokenizer: Tokenizer | None,
    eos_ids: tuple[int, ...],
    stops: list[str],
    quiet: bool = False,
    echo: bool = True,
    first: int = 1,
    total: int = 1,
) -> list[Row]:
    """Print a batch's text unless quiet, as it comes for one row and row by row for several; return the rows.

    launch: `generate`, but for prompts, max_new_tokens and ended. echo: the prompt too. Texts are numbered from `first`
    on, unless the `total` of all batches is 1.
    """

    def begin(i: int) -> None:
        if tokenizer and not quiet and total > 1:
            print(f"--- {first + i} of {total}", file=sys.stderr, flush=True)

    ended: set[int] = set()
    rows = [Row(ids, TextStream(tokenizer, ids) if tokenizer else None, stops) for ids in prompts]

    def show(text: str) -> None:
        if len(rows) == 1 and not quiet:
            print(text, end="", flush=True)

    if len(rows) == 1:
        begin(0)
    if tokenizer and echo:
        show(tokenizer.decode(prompts[0]))
    for step in launch(prompts, max_new_tokens, ended=ended):
        for row, ids in zip(rows, step, strict=True):
            show(row.push(ids, eos_ids))
        ended |= {i for i, row in enumerate(rows) if row.finish_reason}
    for row in rows:
        show(row.finish("length" if len(row.tokens) >= max_new_tokens else "context"))
    if tokenizer and not quiet:
        show("\n")
        for i, row in enumerate(rows if len(rows) > 1 else []):
            begin(i)
            print((tokenizer.decode(row.prompt_ids) if echo else "") + row.text, flush=True)
    return rows


def counted(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def report_rows(rows: list[Row], context: int) -> None:
    for row in rows:
        metrics = row.metrics()
        line = f"{counted(metrics['new_tokens'])}, ended by {row.finish_reason}"
        if row.finish_reason == "context":
            line += f": the model's context of {context} tokens is full"
        if metrics["ttft_ms"]:
            prefilled = counted(len(row.prompt_ids) - row.num_cached)
            line += f"; {prefilled} prefilled, first after {metrics['ttft_ms']:.0f} ms"
        if metrics["decode_tokens_per_s"]:
            line += f", then {metrics['decode_tokens_per_s']:.1f} tok/s"
        if row.tokens_per_round:
            line += f", {row.tokens_per_round:.1f} tokens a round"
        print(line, file=sys.stderr)
    if len(rows) > 1 and (rate := sum(row.decode_tokens_per_s or 0 for row in rows)):
        print(f"{len(rows)} rows together: {rate:.1f} tok/s", file=sys.stderr)


def run_metrics(samples: list[list[Row]], model: Transformer, speculation: Speculation | None) -> dict[str, Any]:
    """Collect what `--metrics_path` writes, but for the times and settings that only the caller knows.

    Bytes and bandwidth are those of this rank.
    """
    device = model.device
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        name, peak = str(device), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    draft_model = speculation.draft_model if speculation else None
    step_bytes = [bytes_per_step(model, rows, draft_model) for rows in samples]
    # The row that ran longest saw every step of its batch.
    rates = [max(rows, key=lambda row: len(row.arrivals)).steps_per_s for rows in samples]
    bandwidths = [rate * size / 1e9 for rate, size in zip(rates, step_bytes, strict=True) if rate]
    return {
        "samples": [row.metrics() for rows in samples for row in rows],
        "speculation": speculation
        and {"drafts": "prompt lookup" if draft_model is None else "model", "speculate_k": speculation.max_k},
        "weight_bytes": model.weight_bytes,
        "bytes_per_step": int(statistics.median(step_bytes)),
        "bandwidth_gb_per_s": statistics.median(bandwidths) if bandwidths else None,
        "peak_memory_bytes": peak,
        "device": name,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def report_run(metrics: dict[str, Any], compiled: bool) -> None:
    line = (
        f"seed {metrics['seed']}; {metrics['weight_bytes'] / 1e9:.2f} GB of weights loaded in {metrics['load_s']:.1f} s"
    )
    if compiled:
        line += f", compiled in {metrics['compile_s']:.1f} s"
    if metrics["bandwidth_gb_per_s"]:
        line += f"; {metrics['bandwidth_gb_per_s']:.1f} GB/s read while decoding"
    print(line + f"; peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB", file=sys.stderr)
