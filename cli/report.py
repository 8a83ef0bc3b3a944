"""What a run shows and writes: the text as it comes, lines about each row on stderr, and the metrics."""

import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch

from eagle import Head
from engine import Engine
from kernels.cpu import dtypes
from kernels.layers import AtenInt4, AtenInt8
from linears import StoredLinear
from model import MoE, Transformer
from rows import Row
from speculate import Speculation
from tokenizer import TextStream, Tokenizer


def bytes_per_step(model: Transformer, rows: list[Row], draft_model: Transformer | None = None) -> int:
    """Return the bytes that an average step must read: weights, and the keys and values of the text so far.

    With speculation a step is a forward of the target, however many tokens it accepts, and its share of the draft's.
    """
    drafts = max(row.num_drafted for row in rows) / max(1, *(sum(row.accept_counts) for row in rows))
    return int(forward_bytes(model, rows) + (drafts * forward_bytes(draft_model, rows) if draft_model else 0))


def step_weight_bytes(model: Transformer) -> int:
    """Return the bytes of weights that decoding a token reads, on this rank.

    That is all of them but the experts that are not chosen and, unless it is the head too, the embedding table.
    """
    config, idle = model.config, 0
    for mlp in (block.mlp for block in model.layers if isinstance(block.mlp, MoE)):
        for stack in (*mlp.gate_up_proj.parameters(), *mlp.down_proj.parameters()):
            idle += stack.nbytes // config.num_local_experts * (config.num_local_experts - config.num_experts_per_tok)
    return weight_bytes(model) - idle - (0 if model.tied else model.embed_tokens.weight.nbytes)


def weight_bytes(model: Transformer) -> int:
    """Return the bytes of all weights of this rank; a tied head counts once."""
    return sum(p.nbytes for p in model.parameters())


def slot_bytes(model: Transformer) -> int:
    """Return the bytes of a token's keys and values, on this rank."""
    config, num_kv_heads = model.config, model.layers[0].self_attn.num_local_kv_heads
    return 2 * config.num_hidden_layers * num_kv_heads * config.head_dim * model.embed_tokens.weight.itemsize


def forward_bytes(model: Transformer, rows: list[Row]) -> float:
    longest = max(1, *(len(row.arrivals) for row in rows))  # a row that has ended is read no more
    slots = sum((len(row.prompt_ids) + len(row.tokens) / 2) * len(row.arrivals) / longest for row in rows)
    return step_weight_bytes(model) + slot_bytes(model) * slots


@dataclass
class TextPrinter:
    """Prints the texts of a run: one that is alone in its batch as it comes, others when all have ended."""

    tokenizer: Tokenizer | None
    total: int  # rows of all batches, which are numbered unless there is only one
    echo: bool  # the prompt too
    quiet: bool = False
    count: int = 0

    def begin(self, row: Row) -> None:
        """Print what stands before a row's text."""
        self.count += 1
        if self.tokenizer and not self.quiet and self.total > 1:
            print(f"--- {self.count} of {self.total}", file=sys.stderr, flush=True)
        if self.tokenizer and self.echo:
            self.show(self.tokenizer.decode(row.prompt_ids))

    def show(self, text: str) -> None:
        if self.tokenizer and not self.quiet:
            print(text, end="", flush=True)


def run_batch(
    engine: Engine, prompts: list[list[int]], max_new_tokens: int, stops: list[str], printer: TextPrinter
) -> list[Row]:
    """Continue a batch of prompts, each up to EOS, a stop text or max_new_tokens; return its rows."""
    tokenizer = printer.tokenizer
    rows = [Row(ids, TextStream(tokenizer, ids) if tokenizer else None, stops) for ids in prompts]
    alone = len(rows) == 1
    ended: set[int] = set()
    if alone:
        printer.begin(rows[0])
    for step in engine.run(prompts, max_new_tokens, ended=ended):
        for row, ids in zip(rows, step, strict=True):
            text = row.push(ids, engine.eos_ids)
            if alone:
                printer.show(text)
        ended |= {i for i, row in enumerate(rows) if row.finish_reason}
    for row in rows:
        rest = row.finish_full(max_new_tokens)
        if not alone:
            printer.begin(row)
        printer.show((rest if alone else row.text) + "\n")
    note_drafts(rows, engine)
    return rows


def note_drafts(rows: list[Row], engine: Engine) -> None:
    """Record what became of the drafts for the rows of the engine's latest run."""
    if engine.speculation:
        for row, counts in zip(rows, engine.speculation.accept_counts, strict=True):
            row.accept_counts, row.num_drafted = counts, engine.speculation.num_drafted


def report_plain_linears(model: Transformer, speculation: Speculation | None = None) -> None:
    """Say so where quantized linears have no fast kernel: that is slower, at times by far.

    ATen's are the fast ones only where cpu.cpp serves no dtype.
    """
    draft_model = speculation.draft_model if speculation else None
    layers = [*model.modules(), *(draft_model.modules() if draft_model else ())]
    plain = [layer for layer in layers if isinstance(getattr(layer, "stored", None), StoredLinear)]
    if plain := plain + [layer for layer in layers if isinstance(layer, AtenInt8 | AtenInt4) and dtypes()]:
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        print(
            f"{len(plain)} quantized weights have no fast kernel in {dtype} here, which is slower, at times by far; "
            "docs/quantize.md says which kernels there are",
            file=sys.stderr,
        )


def format_count(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def report_rows(rows: list[Row], context: int) -> None:
    for row in rows:
        metrics = row.metrics()
        line = f"{format_count(metrics['new_tokens'])}, ended by {row.finish_reason}"
        if row.finish_reason == "context":
            line += f": the context of {context} tokens is full"
        if metrics["ttft_ms"]:
            prefilled = format_count(len(row.prompt_ids) - row.num_cached)
            line += f"; {prefilled} prefilled, first after {metrics['ttft_ms']:.0f} ms"
        if metrics["decode_tokens_per_s"]:
            line += f", then {metrics['decode_tokens_per_s']:.1f} tok/s"
        if row.tokens_per_round:
            line += f", {row.tokens_per_round:.1f} tokens a round"
        print(line, file=sys.stderr)
    arrivals = [time for row in rows for time in row.arrivals]
    if len(rows) > 1 and max(arrivals, default=0) > min(arrivals, default=0):
        rate = sum(max(0, len(row.tokens) - 1) for row in rows) / (max(arrivals) - min(arrivals))
        print(f"{len(rows)} rows together: {rate:.1f} tok/s", file=sys.stderr)


def run_metrics(samples: list[list[Row]], model: Transformer, speculation: Speculation | None) -> dict[str, Any]:
    """Collect what `--metrics_path` writes, but for the times and settings that only the caller knows.

    Bytes and bandwidth are those of this rank.
    """
    device = model.device
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        import resource  # here, since only Unix has it

        name, peak = str(device), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    draft_model = speculation.draft_model if speculation else None
    sources = ["head" if isinstance(draft_model, Head) else "model"] * (draft_model is not None)
    sources += ["prompt lookup"] * bool(speculation and speculation.lookup_levels)
    step_bytes = [bytes_per_step(model, rows, draft_model) for rows in samples]
    # The row that ran longest saw every step of its batch.
    rates = [max(rows, key=lambda row: len(row.arrivals)).steps_per_s for rows in samples]
    bandwidths = [rate * size / 1e9 for rate, size in zip(rates, step_bytes, strict=True) if rate]
    return {
        "samples": [row.metrics() for rows in samples for row in rows],
        "speculation": speculation and {"drafts": " and ".join(sources), "speculate_k": speculation.most_drafts},
        "weight_bytes": weight_bytes(model),
        "bytes_per_step": int(statistics.median(step_bytes)),
        "bandwidth_gb_per_s": statistics.median(bandwidths) if bandwidths else None,
        "peak_memory_bytes": peak,
        "device": name,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def report_run(metrics: dict[str, Any], compiled: bool) -> None:
    sampling = metrics["sampling"]
    # At temperature 0 the filters leave the likeliest.
    how = (
        ", ".join(f"{name} {value:g}" for name, value in sampling.items())
        if sampling["temperature"]
        else "temperature 0"
    )
    line = f"seed {metrics['seed']}, {how}; "
    line += f"{metrics['weight_bytes'] / 1e9:.2f} GB of weights loaded in {metrics['load_s']:.1f} s"
    if compiled:
        line += f", compiled in {metrics['compile_s']:.1f} s"
    if metrics["bandwidth_gb_per_s"]:
        rate = metrics["bandwidth_gb_per_s"]
        line += f"; {f'{rate:.1f} GB/s' if rate >= 1 else f'{rate * 1e3:.0f} MB/s'} read while decoding"
    print(line + f"; peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB", file=sys.stderr)
