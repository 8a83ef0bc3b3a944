"""The rungs that run in one process, such as decode, prefill and positions, for every form of the weights.

benchmark.py measures them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import meta_model, quantization_scheme, random_model
from model import Ranks, Transformer
from scripts import anatomy, products, speculation
from scripts.measure import (
    Rung,
    Steps,
    decode_rate,
    kv_bytes,
    make_steps,
    median_ms,
    prefill_flops,
    prefill_rate,
    run_dtype,
    step_at,
    verify_at,
    weight_forms,
)
from speculate import levels_below
from tp import draft_ranks

PREFILL = (128, 512, 2048)
POSITIONS = (128, 2048, 8192)
VERIFIED = 5  # tokens in one forward
ROWS = 8  # of a batch


class Bench:
    """The models that the groups share: the config's own dtype and each scheme of --quantize, with random weights."""

    def __init__(self, args: argparse.Namespace, raw: dict[str, Any], device: str, ranks: Ranks):
        self.args, self.device, self.ranks = args, device, ranks
        self.dtype = run_dtype(args, raw)
        self.raw, self.forms = raw, weight_forms(args, raw)
        self.steps = make_steps(device)
        # One length for all, since the compiled steps are made for it.
        self.length = 64 * (2 + max(args.new_tokens, speculation.SHORTEST, *PREFILL) // 64)

    @cached_property
    def models(self) -> dict[str, Transformer]:
        return {
            name: random_model(form, self.device, self.dtype, ranks=self.ranks) for name, form in self.forms.items()
        }

    def on(
        self, weights: str, length: int, measure: Callable[..., float], *args: Any, num_rows: int = 1
    ) -> Callable[[], float]:
        """Return a measurement of a model with caches of `length`."""

        def run() -> float:
            model = self.models[weights]
            cache = model.layers[0].self_attn.cache
            if cache is None or model.max_seq_length != length or cache.k.shape[0] != num_rows:
                model.setup_caches(num_rows, length)
            self.ranks.all_reduce(torch.ones(1, device=self.device))  # they begin together
            return measure(model, *args)

        return run

    def each(self) -> Iterator[tuple[str, Steps, str, Transformer]]:
        """Yield every way to run every form of the weights: what its rungs are called, its steps, scheme and model."""
        for mode, steps in self.steps.items():
            for weights, model in self.models.items():
                yield f"{mode}, {weights}" if weights else mode, steps, weights, model

    def products(self) -> Iterator[Rung]:
        return products.rungs(self.args.quantize, self.raw, self.device, self.dtype)

    def kernels(self) -> Iterator[Rung]:
        return anatomy.kernels(self, max(POSITIONS) + 64)  # as the positions, whose graphs inductor has kept

    def options(self) -> Iterator[Rung]:
        return anatomy.options(self, max(POSITIONS) + 64)

    def decode(self) -> Iterator[Rung]:
        for name, steps, weights, model in self.each():
            measure = self.on(weights, self.length, decode_rate, steps, self.args.new_tokens)
            against = "eager" if name != "eager" else ""
            yield Rung(name, "tok/s", measure, weights, read_bytes=self.token_bytes(model), against=against)
        for weights in self.models:
            name = f"compile, {weights}" if weights else "compile"
            yield Rung(f"{name} + speculation", "tok/s", self.speculating(weights), weights, against=name)

    def token_bytes(self, model: Transformer) -> float:
        """Return what a token of the decode rungs reads: the weights, and a text half as long as it gets."""
        return model.step_weight_bytes + kv_bytes(model, 6 + self.args.new_tokens // 2)

    def speculating(self, weights: str) -> Callable[[], float]:
        """Return a measurement of decode with drafts of 2 layers in the same weights, accepted by chance."""
        raw = self.forms[weights] | {"num_hidden_layers": min(2, self.forms[weights]["num_hidden_layers"])}
        small = meta_model(raw)
        shared_by = draft_ranks(small.config, quantization_scheme(raw), small.step_weight_bytes, self.ranks)
        duel = None

        def measure(model: Transformer) -> float:
            nonlocal duel
            num_tokens = max(speculation.SHORTEST, self.args.new_tokens)
            levels = levels_below(max(self.args.speculate_k))
            if duel is None:
                draft_model = random_model(raw, self.device, self.dtype, seed=1, ranks=shared_by)
                draft_model.setup_caches(1, self.length)
                by_chance = speculation.accept_by_chance
                duel = speculation.Duel("", model, draft_model, [speculation.PROMPT], num_tokens, by_chance, [levels])
                duel.warm_up()
            return duel.take(levels, num_tokens)["tok_per_s"]

        return self.on(weights, self.length, measure)

    def batch(self) -> Iterator[Rung]:
        for name, steps, weights, _ in self.each():
            for num_rows in (1, ROWS):
                measure = self.on(
                    weights, self.length, decode_rate, steps, self.args.new_tokens, num_rows, num_rows=num_rows
                )
                against = f"{name}, batch of 1" if num_rows > 1 else ""
                yield Rung(f"{name}, batch of {num_rows}", "tok/s", measure, weights, against=against)

    def prefill(self) -> Iterator[Rung]:
        for size in PREFILL:
            for name, steps, weights, model in self.each():
                measure = self.on(weights, self.length, prefill_rate, steps, size)
                yield Rung(f"{name}, prefill of {size}", "tok/s", measure, weights, flops=prefill_flops(model, size))

    def positions(self) -> Iterator[Rung]:
        def measure(run_decode: Callable[..., Any], position: int, model: Transformer) -> float:
            return median_ms(step_at(model, run_decode, position), self.device)

        longest = max(POSITIONS) + 64
        for name, steps, weights, model in self.each():
            for position in POSITIONS:
                run = self.on(weights, longest, partial(measure, steps.decode, position))
                read = model.step_weight_bytes + kv_bytes(model, position + 1)
                first = f"{name}, step at {POSITIONS[0]}" if position != POSITIONS[0] else ""
                yield Rung(f"{name}, step at {position}", "ms", run, weights, read_bytes=read, against=first)
        for mode, steps in self.steps.items():
            run = self.on("", 256, partial(measure, steps.decode, POSITIONS[0]))
            first = f"{mode}, step at {POSITIONS[0]}"
            yield Rung(f"{first}, cache of 256 instead of {longest}", "ms", run, against=first)

    def verify(self) -> Iterator[Rung]:
        def one(steps: Steps, model: Transformer) -> float:
            return median_ms(step_at(model, steps.decode, 128), self.device)

        def several(steps: Steps, model: Transformer) -> float:
            return median_ms(verify_at(model, steps.verify, 128, VERIFIED), self.device)

        for name, steps, weights, _ in self.each():
            first = f"{name}, 1 token"
            yield Rung(first, "ms", self.on(weights, self.length, partial(one, steps)), weights)
            run = self.on(weights, self.length, partial(several, steps))
            yield Rung(f"{name}, verify of {VERIFIED} tokens", "ms", run, weights, against=first)
