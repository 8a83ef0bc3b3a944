"""Where drafts come from, a draft model or the text itself, and how many there are.

Before each round a `Drafter` is asked and answers with a `Proposal`, or with a number of tokens to decode plainly
first. `speculate.py` runs the round, whichever it is.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from eagle import Head
from kernels.cpu import own_threads
from model import KVCache, Transformer
from steps import Sampling, Text, prefill, prompt_chunks, visible_slots
from suffix import Suffixes

GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Proposal:
    """What a round verifies."""

    drafts: Transformer | Tensor  # the model that drafts on the device, or ids [B, k] that were found
    k: int
    lengths: list[int]  # how many of the k are meant for each text; those beyond are there for other rows
    num_latest: int = 1  # how many of a text's last ids the step is given
    first: int = 0  # the lowest position of these; a shorter text repeats what stands there


class Drafter(Protocol):
    def begin(self, target: Transformer, num_rows: int) -> None:
        """Begin to draft for so many texts of a target."""

    def propose(self, texts: list[Text]) -> Proposal | int:
        """Return drafts for the texts, of which one that has ended needs none, or how many tokens to decode first."""

    def note(self, proposal: Proposal, texts: list[Text], counts: list[int]) -> None:
        """Take in how many of its drafts each text, as it was when they were proposed, accepted."""


# ---------------------------------------------------------------------------------------------------------------------
# How many drafts


# The most drafts of a round. What is found costs nothing, and with the last token fills the 16 rows of a kernel.
MODEL_K, LOOKUP_K = 5, 15
# The assumed cost of one more draft, in steps of the target: by a model a tenth its size and verified; verified alone.
DRAFT_COST, VERIFY_COST = 0.25, 0.1
HEAD_COST = 0.15  # of a layer and an output layer, and verified
# Where more of what was found is accepted than a draft model drafts at most, its caches fall behind, and it has a
# prefill to do. So for this many tokens the model is not asked.
CATCHING_UP = 4
# By this factor a past round weighs less with each new one.
DECAY = 0.92
# Drafts counted as accepted at the beginning: enough to begin with the largest k.
PRIOR = 1.0
# Where drafts do not pay, this many tokens are decoded plainly before the next try, twice as many after each failure.
FIRST_WAIT, LONGEST_WAIT = 32, 256
# Where nothing is found, looking has its price too: after each so many vain looks the next comes a token later.
VAIN_PER_TOKEN, MOST_BETWEEN_LOOKS = 8, 4


def expected_tokens(acceptance: float, k: int) -> float:
    """Return how many tokens a round of k drafts yields on average: 1 + a + ... + a^k."""
    return (1 - acceptance ** (k + 1)) / (1 - acceptance) if acceptance < 1 else k + 1


class Pace:
    """Choose how many tokens to draft, by how many were accepted lately.

    Never by the clock: the same seed must give the same text.
    """

    def __init__(self, levels: tuple[int, ...], cost: float = DRAFT_COST):
        self.levels = levels  # the numbers to choose from, in falling order; the last may be 0, plain decoding
        self.cost = cost  # of one more draft
        self.accepted, self.rejected = PRIOR, 0.0
        self.wait = FIRST_WAIT
        self.k = self.best()
        self.due_room, self.due_k = 0, 0  # how many to draft once no more room than that is left; 0: not planned

    def gain(self, k: int) -> float:
        """Return how many tokens a round of k drafts is expected to yield in the time of a step."""
        acceptance = self.accepted / (self.accepted + self.rejected)
        return expected_tokens(acceptance, k) / (1 + self.cost * k)

    def best(self) -> int:
        return max(self.levels, key=self.gain)

    def plan(self, room: int) -> tuple[int, int]:
        """Return how many tokens to decode plainly, and how many to draft then, 0 for none; room: of the text."""
        if room == 1:
            return 1, 0
        if self.k == 0:
            smallest = min(level for level in self.levels if level)
            return (self.wait, smallest) if self.wait < room - 1 else (room, 0)
        return 0, min(self.k, level_that_fills(self.levels, room))

    def next_plan(self, room: int) -> tuple[int, int]:
        """Return what to do before asking again: as `plan`, and one of the two is 0. It may be asked earlier."""
        if self.due_k == 0:
            num_plain, k = self.plan(room)
            self.due_room, self.due_k = room - num_plain, k
        if room > self.due_room:
            return room - self.due_room, 0
        k, self.due_k = self.due_k, 0
        return 0, k

    def update(self, counts: list[int], lengths: list[int]) -> None:
        """Record a round: how many drafts were meant for each row, perhaps none, and how many ids it accepted."""
        num_accepted = sum(map(min, counts, lengths))
        self.accepted = DECAY * self.accepted + num_accepted
        self.rejected = DECAY * self.rejected + sum(n < length for n, length in zip(counts, lengths, strict=True))
        failed = self.k == 0 and num_accepted == 0
        self.wait = min(2 * self.wait, LONGEST_WAIT) if failed else FIRST_WAIT
        self.k = self.best()


def level_that_fills(levels: tuple[int, ...], room: int) -> int:
    """Return the least number of drafts that fills the room with the id that a round adds to them, else the most."""
    return min([level for level in levels if level >= room - 1], default=levels[0])


def levels_below(max_k: int) -> tuple[int, ...]:
    """Return max_k, three fifths of it, and so on down to 1 and 0: few numbers, since each needs a graph of its own."""
    return (max_k, *levels_below(max_k * 3 // 5)) if max_k else (0,)


# ---------------------------------------------------------------------------------------------------------------------
# The drafters


@dataclass
class Held:
    """What a row of a draft model's caches holds: the first `count` ids of a text, which may have grown since."""

    ids: list[int]
    count: int


# The caches of a draft model's first layer -> what their rows hold, whichever run has filled them.
HELD: weakref.WeakKeyDictionary[KVCache, dict[int, Held]] = weakref.WeakKeyDictionary()


@dataclass
class DraftModel:
    """A smaller model, with caches as long as the target's and as many rows."""

    model: Transformer
    levels: tuple[int, ...]
    prefill: Callable[..., Any] = prefill

    def begin(self, target: Transformer, num_rows: int) -> None:
        self.slots = torch.arange(target.max_seq_length, device=target.device)
        self.pace = Pace(self.levels)
        self.held = HELD.setdefault(self.model.layers[0].self_attn.cache, {})

    def hold(self, rows: list[list[int]]) -> None:
        """Take the rows of the caches to hold these ids, so that a step behind them can be compiled."""
        HELD[self.model.layers[0].self_attn.cache] = {i: Held(ids, len(ids)) for i, ids in enumerate(rows)}

    def num_held(self, text: Text) -> int:
        """Return how many of a text's first ids its row of the caches holds."""
        held = self.held.setdefault(text.number, Held(text.ids, 0))
        if held.ids is not text.ids:  # but those of an earlier run
            both = list(zip(held.ids[: held.count], text.ids, strict=False))  # it may have ended before its last draft
            held.count = next((i for i, (old, new) in enumerate(both) if old != new), len(both))
            held.ids = text.ids
        return held.count

    def propose(self, texts: list[Text]) -> Proposal | int:
        num_plain, k = self.pace.next_plan(max(text.room for text in texts))
        return num_plain or self.prepare(texts, k)

    def note(self, proposal: Proposal, texts: list[Text], counts: list[int]) -> None:
        for text, n in zip(texts, counts, strict=True):
            self.held[text.number].count = len(text.ids) - 1 + n
        self.pace.update(counts, proposal.lengths)

    def prepare(self, texts: list[Text], k: int) -> Proposal:
        """Prefill the draft's caches with what they lack: at first the prompt, later what was decoded plainly."""
        if any(self.num_held(text) < len(text.ids) - 2 for text in texts):
            # Up to the last token but one, which `draft` would write too: so each row has at least one to prefill.
            starts = [min(self.num_held(text), len(text.ids) - 2) for text in texts]
            self.run([text.ids[:-1] for text in texts], starts)
        return Proposal(self.model, k, [k if text.room else 0 for text in texts], num_latest=2)

    def run(self, texts: list[list[int]], starts: list[int]) -> None:
        """Prefill the caches with the ids of each row, from place `starts` on."""
        last_id = self.model.config.vocab_size - 1
        missing = [ids[start:] for ids, start in zip(texts, starts, strict=True)]
        for tokens, positions, length in prompt_chunks(missing, starts, self.slots.device, self.prefill):
            slots = visible_slots(self.slots, length)
            with own_threads(tokens.numel(), self.model):
                self.prefill(self.model, tokens.clamp(max=last_id), positions, slots, GREEDY, None)


@dataclass
class HeadModel(DraftModel):
    """An EAGLE-3 head. What it has drafted it runs again, once the target has given taps for what was accepted."""

    def begin(self, target: Transformer, num_rows: int) -> None:
        super().begin(target, num_rows)
        assert isinstance(self.model, Head)
        self.model.follow_(target)
        self.pace, self.is_new = Pace(self.levels, HEAD_COST), True

    def prepare(self, texts: list[Text], k: int) -> Proposal:
        room = max(text.room for text in texts)
        # A round first runs the last k + 1 tokens. Where the latest one left more, draft as many again, if they fit.
        num_missing = max(len(text.ids) - self.num_held(text) for text in texts)
        most = level_that_fills(self.levels, room)
        k = min([level for level in self.levels if max(k, num_missing - 1) <= level <= most], default=k)
        # Prefill the prompt, even one that a round has room for, so that a first round compiles all; what was decoded
        # plainly; and what another drafter proposed.
        if self.is_new or num_missing > k + 1:
            self.is_new = False
            starts = [max(1, min(self.num_held(text), len(text.ids) - 1)) for text in texts]
            self.run([text.ids for text in texts], starts)
        return Proposal(self.model, k, [k if text.room else 0 for text in texts], num_latest=k + 1, first=1)

    def note(self, proposal: Proposal, texts: list[Text], counts: list[int]) -> None:
        for text in texts:
            self.held[text.number].count = len(text.ids)
        self.pace.update(counts, proposal.lengths)


@dataclass
class Lookup:
    """Drafts found in the text: what followed when its end stood there before, in this turn or an earlier one."""

    levels: tuple[int, ...]
    indexes: list[Suffixes] = field(default_factory=list)

    def begin(self, target: Transformer, num_rows: int) -> None:
        self.pace, self.num_vain = Pace(self.levels, VERIFY_COST), 0
        self.indexes = self.indexes if len(self.indexes) == num_rows else [Suffixes() for _ in range(num_rows)]
        self.is_new = [True] * num_rows

    def propose(self, texts: list[Text]) -> Proposal | int:
        room = max(text.room for text in texts)
        num_plain, most = self.pace.next_plan(room)
        if num_plain:
            return num_plain
        found = [self.look_up(text, most) for text in texts]
        longest = max(map(len, found))
        if longest == 0 and 0 in self.levels:
            self.num_vain += 1
            num_plain = min(1 + self.num_vain // VAIN_PER_TOKEN, MOST_BETWEEN_LOOKS, room)
            self.pace.due_room, self.pace.due_k = room - num_plain, most if self.pace.k == 0 else 0
            return num_plain
        self.num_vain = 0
        positive = [level for level in self.levels if level]
        k = min(most, max([level for level in positive if level <= longest], default=positive[-1]))
        ids = [(ids + [text.ids[-1]] * k)[:k] for text, ids in zip(texts, found, strict=True)]
        return Proposal(torch.tensor(ids), k, [min(k, len(ids)) for ids in found])

    def note(self, proposal: Proposal, texts: list[Text], counts: list[int]) -> None:
        self.pace.update(counts, proposal.lengths)

    def look_up(self, text: Text, most: int) -> list[int]:
        """Return up to `most` guesses for a text, [] for one that has ended or whose end is new."""
        index = self.indexes[text.number]
        if self.is_new[text.number] and index.ids != text.ids[: len(index.ids)]:  # not a further turn of the last one
            index = self.indexes[text.number] = Suffixes()
        self.is_new[text.number] = False
        index.extend(text.ids[len(index.ids) :])
        return index.continuation(most) if text.room else []


@dataclass
class Both:
    """A lookup and a draft model, of which the one whose drafts promise more tokens in the same time proposes."""

    lookup: Lookup
    other: DraftModel
    wait: int = 0  # how many tokens the other wants to be decoded without it
    # What was found and not verified: the text, how long it was, and the ids.
    passed_over: list[tuple[Text, int, list[int]]] = field(default_factory=list)

    def begin(self, target: Transformer, num_rows: int) -> None:
        self.wait, self.passed_over = 0, []
        self.lookup.begin(target, num_rows)
        self.other.begin(target, num_rows)

    def propose(self, texts: list[Text]) -> Proposal | int:
        self.judge_passed_over()
        found = self.lookup.propose(texts)
        k = self.other.pace.k if self.wait == 0 else 0
        if isinstance(found, Proposal) and self.lookup.pace.gain(max(found.lengths)) >= self.other.pace.gain(k):
            return found
        if isinstance(found, Proposal) and isinstance(found.drafts, Tensor):
            rows = zip(texts, found.drafts.tolist(), found.lengths, strict=True)
            self.passed_over = [(text, len(text.ids), ids[:length]) for text, ids, length in rows]
        if self.wait == 0:
            drafts = self.other.propose(texts)
            if isinstance(drafts, Proposal):
                return drafts
            self.wait = drafts
        num_plain = min(self.wait, 1 if isinstance(found, Proposal) else found)
        self.wait -= num_plain
        return num_plain

    def judge_passed_over(self) -> None:
        """Count what was passed over as if it had been verified, as far as the text has gone on by now.

        Else a lookup that was wrong for a while would never be asked again.
        """
        if self.passed_over:
            came = [(ids, text.ids[end : end + len(ids)]) for text, end, ids in self.passed_over]
            counts = [next((n for n, i in enumerate(new) if i != ids[n]), len(new)) for ids, new in came]
            self.lookup.pace.update(counts, [len(new) for _, new in came])
            self.passed_over = []

    def note(self, proposal: Proposal, texts: list[Text], counts: list[int]) -> None:
        source: Drafter = self.lookup if isinstance(proposal.drafts, Tensor) else self.other
        source.note(proposal, texts, counts)
        if source is self.lookup and max(map(min, counts, proposal.lengths)) > self.other.levels[0]:
            self.wait = max(self.wait, CATCHING_UP)
