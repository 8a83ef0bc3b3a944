"""What stands beside us in a comparison: transformers, llama.cpp and gpt-fast, on the same shapes, threads and device.

bench.run --compare measures it. None of them is required. Each is called a forward a token, so that no sampler or text
is timed; the argmax over the logits is, everywhere.
"""

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpt_fast, llama_cpp
from bench.ladder import Ladder, beside_another
from bench.results import Rung, attempt, leave_out
from bench.runner import Peer, Runner, decode_mode
from bench.subject import Subject

POSITION, PREFILL = 1900, 512


class Transformers(Peer):
    """transformers' model with random weights in the subject's shapes, eager, with its default cache."""

    def __init__(self, model: Any, device: str):
        super().__init__(device)
        self.model = model
        self.cache: Any = None

    def likeliest(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1].argmax(dim=-1, keepdim=True)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        self.num_filled += ids.shape[1]
        return self.likeliest(ids)

    def keep(self, length: int) -> None:
        if length == 0:
            self.cache = None
        elif too_many := self.num_filled - length:
            self.cache.crop(-too_many)
        super().keep(length)


class CompiledTransformers(Transformers):
    """The same with a static cache of `length`, a step of one token compiled."""

    def __init__(self, model: Any, device: str, length: int):
        from transformers import StaticCache

        super().__init__(model, device)
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.compiled = torch.compile(self.likeliest, mode=decode_mode(device), dynamic=False)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        self.num_filled += 1
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(ids).clone()

    def keep(self, length: int) -> None:
        self.num_filled = length
        for layer in self.cache.layers:  # what is behind it is masked, and written before it is seen
            layer.cumulative_length.fill_(length)


def name_versions() -> dict[str, str]:
    """Return those of who is installed beside us."""
    installed = importlib.util.find_spec("transformers") is not None
    others = {"transformers": importlib.metadata.version("transformers")} if installed else {}
    return others | ({"llama.cpp": build} if (build := llama_cpp.name_build()) else {})


def make_transformers(subject: Subject, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**subject.raw), dtype=subject.dtype).eval()


def make_contenders(ladder: Ladder, folder: Path, checkout: Path | None) -> Iterator[tuple[str, str, Any]]:
    """Yield everyone's name, the form of the weights and who runs it; checkout: of gpt-fast.

    Those of one form follow each other, before the machine's speed has changed much: ours, to which the ratios are,
    then llama.cpp, and then those that take longest.
    """
    subject, device = ladder.subject, ladder.device
    config, dtype = ladder.models[""].config, subject.dtype_name
    length = 64 * (2 + max(ladder.new_tokens, POSITION, PREFILL) // 64)
    plain, counterparts = folder / "plain.gguf", {"": dtype, **llama_cpp.COUNTERPARTS}
    if reason := llama_cpp.find_obstacle(device, config):
        leave_out("llama.cpp", reason)
        counterparts = {}
    else:
        llama_cpp.write_gguf(ladder.models[""], plain)
    for weights, form in subject.forms.items():
        yield f"ours, {weights or dtype}", weights, ladder.runner("compile", weights, length)
        yield f"ours eager, {weights or dtype}", weights, ladder.runner("eager", weights, length)
        if kind := counterparts.get(weights):
            file = llama_cpp.quantize_gguf(plain, kind) if weights else plain
            yield f"llama.cpp, {kind}", weights, llama_cpp.LlamaCpp(file, device, length)
        if not weights and importlib.util.find_spec("transformers"):
            model = make_transformers(subject, device)
            yield f"transformers, {dtype}", "", Transformers(model, device)
            yield f"transformers compiled, {dtype}", "", CompiledTransformers(model, device, length)
        elif not weights:
            leave_out("transformers", "pip install transformers")
        if checkout and (reason := gpt_fast.find_obstacle(config, form, device)):
            leave_out(f"gpt-fast, {weights or dtype}", reason)
        elif checkout:
            runner = gpt_fast.GptFast(checkout, config, form, device, subject.dtype, length)
            yield f"gpt-fast, {weights or dtype}", weights, runner


def after_a_pause(measure: Callable[[], float]) -> float:
    """Measure when the threads of whoever was measured before have ceased to look for work."""
    time.sleep(0.5)
    return measure()


def make_rungs(ladder: Ladder, folder: Path, checkout: Path | None) -> Iterator[Rung]:
    everyone = [
        (name, weights, contender)
        for name, weights, contender in make_contenders(ladder, folder, checkout)
        if isinstance(contender, Runner) or attempt(name, partial(contender.decode, 2))
    ]
    for method, label, size in (
        ("decode", "decode", ladder.new_tokens),
        ("decode_at", f"decode at {POSITION}", POSITION),
        ("prefill", f"prefill of {PREFILL}", PREFILL),
        ("decode", "decode beside a busy program", ladder.new_tokens),
    ):
        first: dict[str, str] = {}  # ours, by the form of the weights
        for name, weights, contender in everyone:
            title, run = f"{name}, {label}", partial(getattr(contender, method), size)
            run = partial(beside_another, run) if "beside" in label else run
            yield Rung(title, "tok/s", partial(after_a_pause, run), weights, against=first.setdefault(weights, title))
