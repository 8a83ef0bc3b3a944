"""Speculative decoding: a draft proposes k tokens, the target verifies them in one forward (arXiv:2211.17192).

The text is the target's own, whatever the draft: exactly so at temperature 0, and in distribution above it. As in the
paper, p is the target's distribution and q the draft's; both use the same temperature and filters.

A round is one call that torch.compile captures whole, `draft_and_verify`, and one read on the host. With prompt lookup
the host searches the text for drafts, and the call is `verify`. Either call accepts the drafts too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import own_threads
from model import Transformer
from steps import Noise, Sampling, Text, compiled, draw, likeliest, prefill, probabilities, prompt_chunks, visible_slots

GREEDY = Sampling(temperature=0)

# ---------------------------------------------------------------------------------------------------------------------
# The steps of a round


def draft(
    model: Transformer,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    sampling: Sampling,
    noise: Tensor | None,
    k: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Propose k ids per row, [B, k]; return them and the q [B, k, V] they were drawn from, None at temperature 0.

    tokens, positions [B, 2]: the last two of the text. The first of them is missing in the caches if the round before
    accepted every draft, and is otherwise written again. noise [B, k, V]: as in `sample`. vocab_size: the target's V.
    Only ids that both models have are proposed.
    """
    tokens = tokens.clamp(max=model.config.vocab_size - 1)  # the last id stands for those that only the target has
    ids: list[Tensor] = []
    q: list[Tensor] = []
    for i in range(k):
        logits = model.logits(model.hidden_states(tokens, positions, slots)[:, -1])
        if logits.shape[-1] != vocab_size:
            logits = F.pad(logits[:, :vocab_size], (0, max(0, vocab_size - logits.shape[-1])), value=-torch.inf)
        if noise is None:
            # Where logits are not finite, any id is a valid guess. On a CPU argmax takes three times as long as max.
            chosen = logits.max(dim=-1, keepdim=True).indices
        else:
            q.append(probabilities(logits, sampling))
            chosen = draw(q[-1], noise[:, i]).unsqueeze(-1).clamp(min=0)
        ids.append(model.ranks.broadcast(chosen))
        tokens, positions = ids[-1], positions[:, -1:] + 1
    return torch.cat(ids, dim=1), torch.stack(q, dim=1) if q else None


def accept(
    logits: Tensor, drafted: Tensor, q: Tensor | None, sampling: Sampling, noise: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Decide how many drafts each row accepts, n [B], and which id follows them (algorithm 1 of the paper).

    logits [B, k + 1, V]: the target's. drafted [B, k], drawn from q [B, k, V]; q None: they were not drawn but found.
    noise: uniform draws [B, k] and draws from Exp(1) [B, V], unused at temperature 0. Returns n and ids [B, k + 1], of
    which the first n + 1 join the text: the accepted drafts and the id that follows.
    """
    if sampling.temperature == 0:
        ids = likeliest(logits)
        return count_leading(drafted == ids[:, :-1]), ids
    assert noise is not None
    uniform, clocks = noise
    p = probabilities(logits, sampling)
    chosen = drafted.unsqueeze(-1)
    if q is None:
        q = torch.zeros_like(p[:, :-1]).scatter(-1, chosen, 1)
    # A draft is accepted with probability p / q.
    accepted = uniform * q.gather(-1, chosen).squeeze(-1) < p.gather(-1, chosen).squeeze(-1)
    num_accepted = count_leading(accepted)
    # The id after them is drawn from max(p - q, 0); after the last draft q is 0.
    after = num_accepted.view(-1, 1, 1).expand(-1, 1, p.shape[-1])
    p_after = p.gather(1, after).squeeze(1)
    rest = (p_after - F.pad(q, (0, 0, 0, 1)).gather(1, after).squeeze(1)).clamp(min=0)
    # Where p and q differ by no more than rounding, nothing may be left.
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p_after)
    following = draw(rest, clocks).unsqueeze(1)
    return num_accepted, F.pad(drafted, (0, 1)).scatter(1, num_accepted.unsqueeze(1), following)


def count_leading(accepted: Tensor) -> Tensor:
    """Count how many of each row's [B, k] are true before the first that is not."""
    return F.pad(accepted, (0, 1)).int().argmin(dim=-1)  # the first zero


def verify(
    model: Transformer,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    drafted: Tensor,
    sampling: Sampling,
    noise: tuple[Tensor, Tensor] | None,
    q: Tensor | None,
) -> Tensor:
    """Run the text's last token and its k drafts through the target.

    tokens, positions [B, 2]: as in `draft`. drafted [B, k], q and noise: as in `accept`. Returns n and ids, as `accept`
    does, in one tensor for one read: [B, k + 2].
    """
    k = drafted.shape[1]
    at = positions[:, -1:] + torch.arange(k + 1, device=positions.device)
    logits = model(torch.cat((tokens[:, -1:], drafted), dim=1), at, slots)
    num_accepted, ids = accept(logits, drafted, q, sampling, noise)
    return model.ranks.broadcast(torch.cat((num_accepted.unsqueeze(1), ids), dim=1))


def draft_and_verify(
    model: Transformer,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    draft_model: Transformer,
    k: int,
    sampling: Sampling,
    noise: tuple[Tensor, tuple[Tensor, Tensor]] | None,
) -> Tensor:
    """Draft k ids per row with draft_model and verify them with model; returns what `verify` does.

    noise: that of `draft` and that of `accept`.
    """
    draft_noise, accept_noise = noise or (None, None)
    drafted, q = draft(draft_model, tokens, positions, slots, sampling, draft_noise, k, model.config.vocab_size)
    drafted = model.ranks.broadcast(drafted)  # where each rank drafts alone, they may differ
    return verify(model, tokens, positions, slots, drafted, sampling, accept_noise, q)


# ---------------------------------------------------------------------------------------------------------------------
# How many drafts


# The assumed cost of one more draft, in steps of the target: a draft a tenth its size, and the verifying.
DRAFT_COST = 0.25
# By this factor a past round weighs less with each new one.
DECAY = 0.92
# Drafts counted as accepted at the beginning: enough to begin with the largest k.
PRIOR = 1.0
# Where drafts do not pay, this many tokens are decoded plainly before the next try, twice as many after each failure.
FIRST_WAIT, LONGEST_WAIT = 32, 256


def expected_tokens(acceptance: float, k: int) -> float:
    """Return how many tokens a round of k drafts yields on average: 1 + a + ... + a^k."""
    return (1 - acceptance ** (k + 1)) / (1 - acceptance) if acceptance < 1 else k + 1


class Pace:
    """Choose how many tokens to draft, by how many were accepted lately.

    Never by the clock: the same seed must give the same text.
    """

    def __init__(self, levels: tuple[int, ...]):
        self.levels = levels  # the numbers to choose from, in falling order; the last may be 0, plain decoding
        self.accepted, self.rejected = PRIOR, 0.0
        self.wait = FIRST_WAIT
        self.k = self.best()

    def best(self) -> int:
        a = self.accepted / (self.accepted + self.rejected)
        return max(self.levels, key=lambda k: expected_tokens(a, k) / (1 + DRAFT_COST * k))

    def plan(self, room: int) -> tuple[int, int]:
        """Return how many tokens to decode plainly and then how many to draft, for a text with room for `room`."""
        if room == 1:
            return 1, 0
        if self.k == 0:
            smallest = min(level for level in self.levels if level)
            return (self.wait, smallest) if self.wait < room - 1 else (room, 0)
        # A round adds one id besides the drafts: draft no more than the least level that fills the room with it.
        return 0, min([level for level in self.levels if level >= room - 1] + [self.k])

    def update(self, counts: list[int], k: int) -> None:
        """Record a round: how many of its k drafts each row accepted, of the rows that had any."""
        was_plain = self.k == 0
        self.accepted = DECAY * self.accepted + sum(counts)
        self.rejected = DECAY * self.rejected + sum(n < k for n in counts)
        self.k = self.best()
        failed = was_plain and not any(counts)
        self.wait = min(2 * self.wait, LONGEST_WAIT) if failed else FIRST_WAIT


def levels_below(max_k: int) -> tuple[int, ...]:
    """Return max_k, three fifths of it, and so on down to 1 and 0: few numbers, since each needs a graph of its own."""
    return (max_k, *levels_below(max_k * 3 // 5)) if max_k else (0,)


# ---------------------------------------------------------------------------------------------------------------------
# Prompt lookup


class Ngrams:
    """Where each n-gram of a text last ended, to guess that the text goes on as it did there."""

    SIZES = (3, 2)

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> the index after it, for those before the text's last

    def extend(self, ids: list[int]) -> None:
        for i in ids:
            for size in self.SIZES:
                if len(self.ids) >= size:
                    self.ends[tuple(self.ids[-size:])] = len(self.ids)
            self.ids.append(i)

    def continuation(self, k: int) -> list[int]:
        """Return the k ids that followed the previous occurrence of the text's last n-gram; [] where it is new."""
        for size in self.SIZES:
            end = self.ends.get(tuple(self.ids[-size:]))
            if end is not None:
                period = len(self.ids) - end
                return [self.ids[end + i % period] for i in range(k)]
        return []


# ---------------------------------------------------------------------------------------------------------------------
# A round


@dataclass
class Speculation:
    """Where drafts come from, how many there may be, and what became of them.

    draft_model: with caches as long as the target's, and as many rows; None: prompt lookup. Beyond the context that it
    was trained for it merely guesses worse. levels: the numbers of drafts to choose from, by default
    `levels_below(max_k)`. The steps are the plain ones until `compile_`; prefill may be set to a compiled one.
    """

    draft_model: Transformer | None = None
    max_k: int = 5
    levels: tuple[int, ...] = ()
    draft_and_verify: Callable[..., Any] = draft_and_verify
    verify: Callable[..., Any] = verify
    prefill: Callable[..., Any] = prefill

    # For each row, how many slots of the draft's caches hold the text.
    filled: list[int] = field(default_factory=list, init=False)
    # Of the latest text: for each row, how many forwards of the target accepted 0, 1, ..., max_k drafts, where those of
    # plain decoding count as 0; and how many tokens were drafted per row.
    accept_counts: list[list[int]] = field(default_factory=list, init=False)
    num_drafted: int = field(default=0, init=False)

    def compile_(self, mode: str | None = None) -> None:
        """Let torch.compile capture a round's call; mode: as in `steps.compiled`."""
        self.draft_and_verify, self.verify = compiled(draft_and_verify, mode), compiled(verify, mode)

    def begin(self, target: Transformer, num_rows: int, cached: int) -> None:
        """Begin a text that shares no more than its first `cached` ids with the latest."""
        self.slots = torch.arange(target.max_seq_length, device=target.device)
        self.pace = Pace(self.levels or levels_below(self.max_k))
        self.accept_counts = [[0] * (self.max_k + 1) for _ in range(num_rows)]
        self.num_drafted = 0
        before = self.filled if len(self.filled) == num_rows else [0] * num_rows
        self.filled = [min(filled, cached) for filled in before]
        self.ngrams = [Ngrams() for _ in range(num_rows)]

    def plan(self, room: int) -> tuple[int, int]:
        return self.pace.plan(room)

    def count(self, texts: list[Text], step: list[list[int]]) -> None:
        """Record the ids that a forward of the target gave each text, before they are cut to its room."""
        for text, ids in zip(texts, step, strict=True):
            if text.room:
                self.accept_counts[text.number][len(ids) - 1] += 1

    def round(
        self, target: Transformer, texts: list[Text], k: int, sampling: Sampling, noise: Noise
    ) -> list[list[int]] | None:
        """Draft k tokens and verify them: return each text's new ids, or None where prompt lookup finds nothing.

        texts: those that the first rows of the caches hold, of at least two ids; the target's caches hold all but the
        last. One that has ended runs along, and what it gets is not used.
        """
        device = self.slots.device
        ends = [len(text.ids) for text in texts]
        slots = visible_slots(self.slots, max(ends) + k)
        # The last two ids and their positions: all that the steps need of the text, in one copy to the device.
        latest = [text.ids[-2:] for text in texts], [[end - 2, end - 1] for end in ends]
        tokens, positions = torch.tensor(latest, device=device).unbind()
        is_random, vocab_size = sampling.temperature > 0, target.config.vocab_size

        if self.draft_model is None:
            guesses = self.look_up(texts, k)
            drafting = list(map(bool, guesses))
            if not any(drafting) and 0 in self.pace.levels:
                return None
            drafted = torch.tensor([ids or [text.ids[-1]] * k for ids, text in zip(guesses, texts, strict=True)])
            accept_noise = (noise.uniform(k), noise.exponential(vocab_size)) if is_random else None
            with own_threads(target, drafted.numel() + len(texts)):
                result = self.verify(target, tokens, positions, slots, drafted.to(device), sampling, accept_noise, None)
        else:
            drafting = [text.room > 0 for text in texts]
            self.catch_up(texts)
            round_noise = None
            if is_random:
                draft_noise = noise.exponential(k, vocab_size)
                round_noise = draft_noise, (noise.uniform(k), noise.exponential(vocab_size))
            with own_threads(target, len(texts) * (k + 1)):
                result = self.draft_and_verify(
                    target, tokens, positions, slots, self.draft_model, k, sampling, round_noise
                )  # fmt: skip
        rows = result.tolist()  # the round's only read

        counts = [n for n, *_ in rows]
        for text, end, n in zip(texts, ends, counts, strict=True):
            self.filled[text.number] = end - 1 + n
        self.num_drafted += k
        self.pace.update([n for n, had_drafts in zip(counts, drafting, strict=True) if had_drafts], k)
        return [ids[: n + 1] for n, *ids in rows]

    def look_up(self, texts: list[Text], k: int) -> list[list[int]]:
        """Return k guesses for each text, [] for one that has ended or whose last n-gram is new."""
        guesses = []
        for text in texts:
            ngrams = self.ngrams[text.number]
            ngrams.extend(text.ids[len(ngrams.ids) :])
            guesses.append(ngrams.continuation(k) if text.room else [])
        return guesses

    def catch_up(self, texts: list[Text]) -> None:
        """Prefill the draft's caches with what they lack: at first the prompt, later what was decoded plainly."""
        assert self.draft_model is not None
        if all(self.filled[text.number] >= len(text.ids) - 2 for text in texts):
            return
        # Up to the last token but one, which `draft` would write too: so each row has at least one to prefill.
        starts = [min(self.filled[text.number], len(text.ids) - 2) for text in texts]
        missing = [text.ids[start:-1] for text, start in zip(texts, starts, strict=True)]
        last_id = self.draft_model.config.vocab_size - 1
        for tokens, positions, length in prompt_chunks(missing, starts, self.slots.device):
            slots = visible_slots(self.slots, length)
            self.prefill(self.draft_model, tokens.clamp(max=last_id), positions, slots, GREEDY, None)
