"""The engine: ids in, ids out. It runs prefill, decode and rounds of speculation over texts that grow side by side.

    for [new_ids] in generate(model, [prompt], max_new_tokens=40, sampling=Sampling(temperature=0)):
        ...

It knows nothing of tokenizers, files or terminals; `generate.py` is the command.
"""

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.cpu import own_threads
from model import KVCache, Transformer
from steps import NOT_A_NUMBER, Noise, Sampling, Text, decode, prefill, prompt_chunks, visible_slots


class Rounds(Protocol):
    """Steps that may add several ids at once, as `speculate.Speculation` has them: what the engine and reports need."""

    # Of the latest texts: accept_counts[row][n], how many steps accepted n drafts; and how many were drafted per row.
    accept_counts: list[list[int]]
    num_drafted: int
    draft_model: Transformer | None  # whose caches have the same rows
    most_drafts: int  # so many slots of the caches are kept beyond the end of a text

    def begin(self, target: Transformer, num_rows: int) -> None:
        """Begin so many texts of a target."""

    def round(self, target: Transformer, texts: list[Text], sampling: Sampling, noise: Noise) -> list[list[int]] | int:
        """Return each text's new ids, or how many tokens to decode plainly before the next round."""

    def count(self, texts: list[Text], step: list[list[int]]) -> None:
        """Take in what a step gave each text, before it is cut to its room."""


# The caches of a first layer -> the batch that has used them last.
BATCHES: weakref.WeakKeyDictionary[KVCache, "weakref.ref[Batch]"] = weakref.WeakKeyDictionary()


class Batch:
    """Texts that grow side by side, and the rows of the caches that hold them.

    Texts that have ended leave the steps as soon as a smaller power of two holds the others, so that few batch sizes
    are compiled. Then rows of the caches change places; a text keeps its number.
    """

    def __init__(self, prompts: list[list[int]], rooms: list[int], eos_ids: Iterable[int], models: list[Transformer]):
        """models: those with the caches."""
        self.texts = [Text(row, ids, room) for row, (ids, room) in enumerate(zip(prompts, rooms, strict=True))]
        self.eos_ids = frozenset(map(int, eos_ids))
        self.models = models
        self.order = list(self.texts)  # which text each row of the caches holds
        self.running = list(self.texts)  # the first of these, which take part in a step
        self.slots = torch.arange(models[0].max_seq_length, device=models[0].device)
        self.caches = [model.layers[0].self_attn.cache for model in models]
        for cache in filter(None, self.caches):
            if earlier := BATCHES.get(cache, lambda: None)():  # of a run that is neither at its end nor closed
                earlier.arrange_(earlier.texts)
            BATCHES[cache] = weakref.ref(self)

    def has_caches_of(self, model: Transformer) -> bool:
        """Say whether no later run, and no setup_caches, has taken the caches of a model."""
        cache = self.caches[self.models.index(model)]
        return cache is model.layers[0].self_attn.cache and (cache is None or BATCHES[cache]() is self)

    @property
    def has_caches(self) -> bool:
        return all(map(self.has_caches_of, self.models))

    @property
    def most_room(self) -> int:
        """How many more ids the text with the most room can take."""
        return max(text.room for text in self.texts)

    @property
    def num_needed_rows(self) -> int:
        """How many rows have to run: a power of two, or all."""
        return batch_size_for(sum(text.room != 0 for text in self.texts), len(self.running))

    def take(self, step: list[list[int]]) -> list[list[int]]:
        """Cut each running text's new ids where it ends, and add them to it; return the new ids of every text."""
        new_ids: list[list[int]] = [[] for _ in self.texts]
        for text, step_ids in zip(self.running, step, strict=True):
            ids = step_ids[: text.room]
            if NOT_A_NUMBER in ids:
                raise ValueError("the model's logits are not finite; its weights are damaged or its dtype too narrow")
            eos = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
            if eos is not None:
                del ids[eos + 1 :]
            text.ids += ids
            text.room = text.room - len(ids) if eos is None else 0
            new_ids[text.number] = ids
        return new_ids

    def end(self, rows: Iterable[int]) -> None:
        for row in rows:
            if not 0 <= row < len(self.texts):
                raise ValueError(f"ended names row {row}, and there are {len(self.texts)}")
            self.texts[row].room = 0

    def noise(self, generator: torch.Generator | None) -> Noise:
        return Noise(len(self.texts), [text.number for text in self.running], generator, self.models[0].device)

    def shrink_(self) -> None:
        """Drop texts that have ended, if the others fit a smaller batch."""
        if (needed := self.num_needed_rows) < len(self.running):
            unfinished_first = sorted(self.running, key=lambda text: text.room == 0)
            self.arrange_(unfinished_first + self.order[len(self.running) :])
            self.running = self.order[:needed]

    def arrange_(self, order: list[Text]) -> None:
        """Move the rows of the caches so that row i holds the text order[i]."""
        if order != self.order:
            places = [self.order.index(text) for text in order]
            for model in filter(self.has_caches_of, self.models):
                model.arrange_rows_(places)
            self.order = order


def batch_size_for(num_texts: int, num_rows: int) -> int:
    """Return how many of so many rows run for so many texts: a power of two, or all."""
    return min(2 ** max(0, num_texts - 1).bit_length(), num_rows)


def check_ids(ids: Iterable[int], vocab_size: int, what: str) -> None:
    """Raise ValueError where `what`, a text, has an id that a model of so many ids lacks."""
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise ValueError(f"{what} has token id {outside} and the model {vocab_size} ids; is the tokenizer its own?")


def read_behind(steps: Iterator[Tensor], lag: int) -> Iterator[list[list[int]]]:
    """Read ids [B] on the host `lag` steps after they were launched, so that an accelerator need not wait for it."""
    in_flight: deque[tuple[Tensor, Any]] = deque()

    def read() -> list[list[int]]:
        ids, copied = in_flight.popleft()
        if copied is not None:
            copied.synchronize()
        return [[token] for token in ids.tolist()]

    for ids in steps:
        on_host = ids.to("cpu", non_blocking=True)
        copied = None if ids.is_cpu else torch.accelerator.current_stream(ids.device).record_event()
        in_flight.append((on_host, copied))
        if len(in_flight) > lag:
            yield read()
    while in_flight:
        yield read()


def checked_capacity(model: Transformer, prompts: list[list[int]], cached: int, speculation: Rounds | None) -> int:
    """Return how many slots of the caches a text may fill. Raises ValueError if a prompt needs more or is empty."""
    capacity = model.max_seq_length - (speculation.most_drafts if speculation else 0)
    if not prompts or not all(map(len, prompts)):
        raise ValueError("a prompt is empty; give at least one token, the BOS")
    draft = speculation.draft_model if speculation else None
    for what, each in (("caches", model), ("caches of the draft", draft or model)):
        cache = each.layers[0].self_attn.cache
        if cache is None or len(cache.k) < len(prompts):
            rows = 0 if cache is None else len(cache.k)
            raise ValueError(f"there are {len(prompts)} prompts and {what} for {rows} rows; call setup_caches first")
    if cached < 0 or min(map(len, prompts)) <= cached:
        raise ValueError(f"a prompt has {min(map(len, prompts))} ids and {cached} are cached; at least one must be new")
    check_ids(chain(*prompts), model.config.vocab_size, "a prompt")
    if (longest := max(map(len, prompts))) > capacity:
        raise ValueError(f"a prompt needs {longest} cache slots, the cache has {capacity}; set up a longer one")
    if draft and draft.max_seq_length < model.max_seq_length:
        raise ValueError(f"the draft's caches have {draft.max_seq_length} slots, of {model.max_seq_length} it needs")
    return capacity


@dataclass
class Engine:
    """A model, and how it writes. prefill, decode: the plain steps, or compiled."""

    model: Transformer
    sampling: Sampling = Sampling()  # noqa: RUF009  # it is frozen
    eos_ids: tuple[int, ...] = ()
    generator: torch.Generator | None = None
    prefill: Callable[..., Any] = prefill
    decode: Callable[..., Any] = decode
    speculation: Rounds | None = None

    @torch.inference_mode()
    def run(
        self, prompts: list[list[int]], max_new_tokens: int, *, cached: int = 0, ended: Collection[int] = ()
    ) -> Iterator[list[list[int]]]:
        """Yield, step by step, the new ids of each row; as `generate`."""
        model, speculation = self.model, self.speculation
        prompts = [list(map(int, prompt)) for prompt in prompts]  # of whatever kind they are
        capacity = checked_capacity(model, prompts, cached, speculation)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
        rooms = [min(max_new_tokens, capacity - len(prompt)) for prompt in prompts]
        models = [model, speculation.draft_model] if speculation and speculation.draft_model else [model]
        if speculation:
            speculation.begin(model, len(prompts))
        if max(rooms) <= 0:
            return
        batch = Batch(prompts, rooms, self.eos_ids, models)
        try:
            yield batch.take(self._prefill(batch, cached))
            batch.end(ended)
            steps = self._steps(batch)
            while batch.most_room:
                if not batch.has_caches:
                    raise ValueError("another run, or setup_caches, has taken the model's caches; end this run first")
                step = next(steps)
                if speculation:
                    speculation.count(batch.running, step)
                yield batch.take(step)
                batch.end(ended)
        finally:
            batch.arrange_(batch.texts)  # each has its own row of the caches again, for a later turn

    def _forward(self, step: Callable[..., Any], batch: Batch, tokens: Tensor, positions: Tensor, length: int) -> Any:
        """Launch prefill or decode for the running rows; length: of the longest text."""
        noise = None
        with own_threads(tokens.numel(), self.model):
            if self.sampling.temperature != 0:
                noise = batch.noise(self.generator).exponential(self.model.config.vocab_size)
            return step(self.model, tokens, positions, visible_slots(batch.slots, length), self.sampling, noise)

    def _prefill(self, batch: Batch, cached: int) -> list[list[int]]:
        """Run the prompts but for their first `cached` ids; return the id that follows each."""
        new = [text.ids[cached:] for text in batch.texts]
        for tokens, positions, length in prompt_chunks(new, [cached] * len(new), self.model.device, self.prefill):
            ids = self._forward(self.prefill, batch, tokens, positions, length)
        return [[token] for token in ids.tolist()]

    def _steps(self, batch: Batch) -> Iterator[list[list[int]]]:
        """Yield the new ids of each running row, step after step."""
        while self.speculation is not None:
            batch.shrink_()
            noise = batch.noise(self.generator)
            new_ids = self.speculation.round(self.model, batch.running, self.sampling, noise)
            if isinstance(new_ids, int):
                yield from self._decode(batch, new_ids)
            else:
                yield new_ids
        yield from self._decode(batch, batch.most_room)

    def _decode(self, batch: Batch, count: int) -> Iterator[list[list[int]]]:
        """Decode `count` tokens of each running row. Rows that have ended leave the batch on the way."""
        lag = 0 if self.model.device.type == "cpu" else 1
        while count > 0:
            batch.shrink_()
            for step in read_behind(self._launch_decode(batch, count), lag):
                count -= 1
                yield step

    def _launch_decode(self, batch: Batch, count: int) -> Iterator[Tensor]:
        """Launch `count` steps, each on the ids [B] of the step before; stop once rows can leave."""
        device = self.model.device
        ids = torch.tensor([text.ids[-1] for text in batch.running], device=device)
        lengths = [len(text.ids) for text in batch.running]
        positions = torch.tensor(lengths, device=device) - 1
        for n in range(count):
            if batch.num_needed_rows < len(batch.running):
                return
            ids, positions = self._forward(self.decode, batch, ids, positions, max(lengths) + n)
            yield ids


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  # it is frozen
    *,
    cached: int = 0,
    ended: Collection[int] = (),
    **options: Any,
) -> Iterator[list[list[int]]]:
    """Yield, step by step, the new ids of each row: [] for a row that has ended, several where drafts were accepted.

    model: with caches for at least len(prompts) rows. prompts: ids, at least one per row. cached: how many of each
    prompt's first ids the caches hold already, from an earlier turn. options: the other fields of `Engine`.

    A row ends with one of eos_ids (which is yielded too), after max_new_tokens, when the caller adds its number to
    `ended` between two steps, or when prompt and new tokens fill the caches, whose last slots speculation keeps
    for drafts beyond the end. A model, or a draft model, has one run at a time: a new one takes the caches, and an
    older one that goes on raises. Raises ValueError too if a prompt is empty or does not fit, or if logits are not
    finite; nothing is checked until the first step is asked for.
    """
    return Engine(model, sampling, **options).run(prompts, max_new_tokens, cached=cached, ended=ended)
