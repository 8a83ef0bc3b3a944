"""The steps of text generation: sampling, prefill and decode, each captured whole by torch.compile, and their inputs.

`engine.py` runs them in a loop; `speculate.py` adds those of speculative decoding.
"""

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kernels.cpu import library
from kernels.layers import MAX_ROWS
from model import Transformer

# Attention reads a multiple of this many cache slots: small enough to follow the position, and a multiple of the
# vector width.
SLOTS_STEP = 64
# The id that is chosen where logits are not finite; no token has it.
NOT_A_NUMBER = -1
# A positive option is raised to at least this: a smaller one would underflow to 0 in fp32.
TINY = 1e-30
# The most graphs that a step may have: one for each batch size and number of drafts, with few slots and with all.
RECOMPILE_LIMIT = 256
# Longer prompts are prefilled in chunks, which bounds the memory of the attention mask.
PREFILL_CHUNK = 2048

# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at temperature 0, else drawn from the filtered distribution.

    Raises ValueError where a value is out of range.
    """

    temperature: float = 0.8
    top_k: int = 200  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the likeliest that together reach this mass (arXiv:1904.09751)
    min_p: float = 0.0  # keep those at least this share of the likeliest (arXiv:2407.01082)

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(f"{self} is out of range; temperature and top_k are at least 0, top_p and min_p at most 1")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Turn logits [..., V] into the fp32 distribution to draw from, at a temperature above 0.

    The filters apply in the order of `transformers`: top-k, top-p, min-p.
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

    noise [B, V]: draws from Exp(1), unused at temperature 0. The caller makes them, so that a seed gives the same text
    compiled and eager.
    """
    if sampling.temperature == 0:
        return likeliest(logits)
    assert noise is not None
    return draw(probabilities(logits, sampling), noise)


def likeliest(logits: Tensor) -> Tensor:
    """Return the id with the largest of logits [..., V], NOT_A_NUMBER where that is not finite."""
    largest, ids = logits.max(dim=-1)
    return torch.where(largest.isfinite(), ids, NOT_A_NUMBER)


def draw(p: Tensor, noise: Tensor) -> Tensor:
    """Draw an id from weights p [..., V], which need not sum to 1, with noise [..., V] from Exp(1).

    Returns NOT_A_NUMBER where p is NaN.
    """
    # Of exponential clocks with rates p, the first to ring is distributed as p.
    largest, ids = torch.where(p > 0, p / noise, -torch.inf).max(dim=-1)
    return torch.where(largest > 0, ids, NOT_A_NUMBER)


@dataclass(frozen=True)
class Noise:
    """Random draws for rows of a batch: those of a row do not depend on which other rows have ended."""

    num_rows: int  # of the whole batch, which are all drawn
    rows: list[int]  # those that are returned, in this order
    generator: torch.Generator | None
    device: torch.device

    def exponential(self, *shape: int) -> Tensor:
        """Draw from Exp(1): [len(rows), *shape]."""
        noise = torch.empty(self.num_rows, *shape, dtype=torch.float32, device=self.device)
        return self._select(noise.exponential_(generator=self.generator))

    def uniform(self, *shape: int) -> Tensor:
        """Draw from [0, 1): [len(rows), *shape]."""
        noise = torch.empty(self.num_rows, *shape, dtype=torch.float32, device=self.device)
        return self._select(noise.uniform_(generator=self.generator))

    def _select(self, noise: Tensor) -> Tensor:
        return noise if len(self.rows) == self.num_rows else noise[self.rows]


# ---------------------------------------------------------------------------------------------------------------------
# The two steps


def prefill(
    model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor, sampling: Sampling, noise: Tensor | None
) -> Tensor:
    """Run tokens [B, S] at positions [B, S]; return the ids [B] that follow the last column."""
    hidden = model.hidden_states(tokens, positions, slots)[:, -1]
    return model.ranks.broadcast(sample(model.logits(hidden), sampling, noise))


def decode(
    model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor | None, sampling: Sampling,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run one token per row, [B] at positions [B]; return the next ids and their positions."""
    # A row that has ended may go on beyond the caches, and NOT_A_NUMBER may not have been read yet.
    tokens, positions = tokens.clamp(min=0), positions.clamp(max=model.max_seq_length - 1)
    hidden = model.hidden_states(tokens.unsqueeze(-1), positions.unsqueeze(-1), slots)[:, -1]
    return model.ranks.broadcast(sample(model.logits(hidden), sampling, noise)), positions + 1


def keep_needed_guards(guards: Sequence[Any]) -> list[bool]:
    """Say which guards, the conditions for reusing a graph, to keep: all are checked at each token.

    Of the layers only the first one's, since they are alike, which `check_layers` sees to once for each model; and none
    of what nothing changes while a program runs: globals, functions, methods and hooks.
    """
    code = "CLASS_MATCH|CLOSURE_MATCH|DICT_NOT_CONTAINS|EMPTY_NN_MODULE_HOOKS_DICT|NOT_PRESENT_IN_GENERIC_DICT"
    dropped = re.compile(rf"({code}) |\S+ (.*(\['layers'\]\._modules\['|\.attentions\[)[1-9]|(dict\()?G\[)")
    return [dropped.match(f"{guard.guard_type} {guard.name}") is None for guard in guards]


def check_layers(model: Transformer) -> None:
    """Raise ValueError where a layer has other modules or tensors than the first: a graph takes them to be alike.

    The first of an EAGLE-3 head is of a class of its own, which has no other layer.
    """
    firsts: dict[type, Any] = {}
    for i, block in enumerate(model.layers):
        modules = [(name, type(child)) for name, child in block.named_modules()]
        tensors = [*block.named_parameters(), *block.named_buffers()]
        form = modules, [(name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in tensors]
        if firsts.setdefault(type(block), form) != form:
            raise ValueError(f"layer {i} has other tensors than layer 0; run it without compiling, or make them alike")


def allow_many_graphs() -> None:
    """Raise torch's limit of graphs per function to RECOMPILE_LIMIT, for the process: compile has no option in 2.11."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)


def vector_bits() -> int | None:
    """Return how long this CPU's vectors are, for inductor's setting `cpp.simdlen`; None leaves it to inductor.

    Its cache keeps code for vectors of one length. In torch 2.13 the key has not that, but all settings: code for AVX2,
    made on another CPU or with ATEN_CPU_CAPABILITY, wrote beyond its tensors with AVX-512.
    """
    return {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())


def compile_options(mode: str | None) -> dict[str, Any]:
    """Return the options of torch.compile for a step; mode: as in `compiled`."""
    return {
        "guard_filter_fn": keep_needed_guards,
        "triton.cudagraphs": mode == "reduce-overhead",
        # It tunes the tiles of the reductions that stream the weights, and compiles longer. No GPU has measured it yet.
        "coordinate_descent_tuning": mode == "reduce-overhead",
        # Kernels that share this many bytes are fused: keys and values are stored together, one launch less per layer.
        "score_fusion_memory_threshold": 1 if mode == "reduce-overhead" else 10,
        "size_asserts": False,  # they check the sizes of each tensor of each layer, which takes time at each token
        # With fewer iterations per thread, a loop is over before another thread has started.
        "cpp.min_chunk_size": 4096,
        "cpp.simdlen": vector_bits(),
        # Inductor would compile a test program for each vector instruction set; kernels/cpu.py has shown that it works.
        "cpp.vec_isa_ok": True if mode is None and library() is not None else None,
    }


def compiled(
    step: Callable[..., Any], mode: str | None = None, settings: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile prefill, decode or draft_and_verify, into one graph for all positions and prompt lengths.

    It also raises torch's limit of graphs, for the process. Another batch size, number of drafts or set of filters
    makes another graph, and so do more than 4,096 slots, which inductor sums in another way. mode: "reduce-overhead"
    replays a step as a CUDA graph. One such graph serves any number of slots: it gets the whole cache, of which the
    kernel for GPUs reads only what the mask shows. settings: further options of inductor's.
    """
    options = compile_options(mode) | (settings or {})
    allow_many_graphs()
    graph = torch.compile(step, fullgraph=True, dynamic=False, options=options)

    alike = weakref.WeakSet[Transformer]()

    def call(model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor, *rest: Any) -> Any:
        for argument in (model, *rest):  # of which draft_and_verify has its draft model
            if isinstance(argument, Transformer) and argument not in alike:
                check_layers(argument)
                alike.add(argument)
        if step is prefill:  # any number of columns
            torch._dynamo.mark_dynamic(tokens, 1)
            torch._dynamo.mark_dynamic(positions, 1)
        if mode is None:
            torch._dynamo.mark_dynamic(slots, 0)
            return graph(model, tokens, positions, slots, *rest)
        # This replay may overwrite what the one before returned, which has been cloned.
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, torch.clone, graph(model, tokens, positions, None, *rest))

    return call


# ---------------------------------------------------------------------------------------------------------------------
# The inputs of a step


@dataclass(eq=False)
class Text:
    """A text that grows: its ids so far, and how many more it can take, 0 when it has ended."""

    number: int  # counted from 0; the row of the caches that holds it is the batch's to know
    ids: list[int]
    room: int


def visible_slots(slots: Tensor, length: int) -> Tensor:
    """Return the first slots of arange(capacity), which a text of `length` reads, in whole SLOTS_STEPs."""
    return slots[: -(-length // SLOTS_STEP) * SLOTS_STEP]


def prompt_chunks(
    prompts: list[list[int]], starts: list[int], device: torch.device, step: Callable[..., Any] = prefill
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield tokens [B, S], positions [B, S] and the length to which they fill the longest row's cache.

    Each row continues its first `starts` slots. Rows end together: a shorter one is padded on the left with its first
    token at its first position, which only writes that slot again. For a compiled step very short prompts are padded
    too: up to MAX_ROWS columns take the kernels of decode, which would be another graph.
    """
    length = max(1 if step is prefill else MAX_ROWS + 1, *map(len, prompts))
    tokens = torch.tensor([[p[0]] * (length - len(p)) + p for p in prompts], device=device)
    ends = [start + len(p) for start, p in zip(starts, prompts, strict=True)]
    places = [[max(start, end - length + i) for i in range(length)] for start, end in zip(starts, ends, strict=True)]
    positions = torch.tensor(places, device=device)
    # The odd chunk comes first, since as the last it could be too short. Eager steps take the same chunks, so that a
    # seed draws the same noise.
    first = length % PREFILL_CHUNK
    first = first if first > MAX_ROWS else first + PREFILL_CHUNK
    bounds = [0, *range(min(first, length), length + 1, PREFILL_CHUNK)]
    for begin, end in pairwise(bounds):
        # Copies, since a compiled prefill would make another graph for a slice's strides.
        chunk = [values[:, begin:end].clone(memory_format=torch.contiguous_format) for values in (tokens, positions)]
        yield chunk[0], chunk[1], max(row[end - 1] for row in places) + 1
