"""Speculative decoding: a draft proposes k tokens, the target verifies them in one forward (arXiv:2211.17192).

The text is the target's own, whatever the draft: exactly so at temperature 0, and in distribution above it. As in the
paper, p is the target's distribution and q the draft's; both use the same temperature and filters.

A round is one call that torch.compile captures whole, `draft_and_verify`, and one read on the host. Where drafts come
from, and how many there are, is said in `drafters.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drafters import LOOKUP_K, MODEL_K, Both, Drafter, DraftModel, HeadModel, Lookup, levels_below
from eagle import Head
from kernels.cpu import own_threads
from model import Transformer
from steps import Noise, Sampling, Text, compiled, draw, likeliest, prefill, probabilities, visible_slots

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

    tokens, positions [B, n]: the last n ids of the text. A model gets two: the caches lack the first of them if the
    last round accepted every draft; else it is written again. A head gets k + 1, all that a round may have added, which
    it has to run again with the target's taps. noise [B, k, V]: as in `sample`. vocab_size: the target's V. Only ids
    that both models have are proposed.
    """
    tokens = tokens.clamp(max=model.config.vocab_size - 1)  # the last id stands for those that only the target has
    known = model.ids if isinstance(model, Head) else None  # of the target's ids, those that the logits are of
    ids: list[Tensor] = []
    q: list[Tensor] = []
    features: tuple[Tensor, ...] = ()  # of a head, at first from the target's taps
    for i in range(k):
        hidden = model.hidden_states(tokens, positions, slots, *features)
        features = (hidden[:, -1:],) if known is not None else ()
        logits = model.logits(hidden[:, -1])[:, :vocab_size]
        if noise is None:
            # Where logits are not finite, any id is a valid guess. On a CPU argmax takes three times as long as max.
            chosen = logits.max(dim=-1, keepdim=True).indices
        else:
            q.append(probabilities(logits, sampling))
            chosen = draw(q[-1], noise[:, i, : logits.shape[-1]]).unsqueeze(-1).clamp(min=0)
        chosen = chosen if known is None else known[chosen]
        # The ranks that share the embedding take the same id into the next step: a head has its target's, or its own.
        ids.append(model.embed_tokens.ranks.broadcast(chosen))
        tokens, positions = ids[-1], positions[:, -1:] + 1
    return torch.cat(ids, dim=1), over_all_ids(torch.stack(q, dim=1), known, vocab_size) if q else None


def over_all_ids(q: Tensor, known: Tensor | None, vocab_size: int) -> Tensor:
    """Spread q [B, k, N] of the known ids [N], or of the first ones, over all: [B, k, vocab_size]."""
    if known is None:
        return F.pad(q, (0, vocab_size - q.shape[-1]))
    return q.new_zeros(*q.shape[:-1], vocab_size).index_copy(-1, known, q)


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
    index = num_accepted.view(-1, 1, 1).expand(-1, 1, p.shape[-1])
    p_after = p.gather(1, index).squeeze(1)
    rest = (p_after - F.pad(q, (0, 0, 0, 1)).gather(1, index).squeeze(1)).clamp(min=0)
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

    tokens, positions [B, n]: as in `draft`. drafted [B, k], q and noise: as in `accept`. Returns n and ids, as `accept`
    does, in one tensor for one read: [B, k + 2].
    """
    k = drafted.shape[1]
    verified = positions[:, -1:] + torch.arange(k + 1, device=positions.device)
    logits = model(torch.cat((tokens[:, -1:], drafted), dim=1), verified, slots)
    num_accepted, ids = accept(logits, drafted, q, sampling, noise)
    return model.ranks.broadcast(torch.cat((num_accepted.unsqueeze(1), ids), dim=1))


def draft_and_verify(
    model: Transformer,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    drafts: Transformer | Tensor,
    k: int,
    sampling: Sampling,
    noise: tuple[Tensor | None, tuple[Tensor, Tensor]] | None,
) -> Tensor:
    """Verify k drafts per row with model; returns what `verify` does.

    drafts: the ids [B, k], or the model that drafts them. noise: that of `draft` and that of `accept`.
    """
    draft_noise, accept_noise = noise or (None, None)
    if isinstance(drafts, Tensor):
        return verify(model, tokens, positions, slots, drafts, sampling, accept_noise, None)
    drafted, q = draft(drafts, tokens, positions, slots, sampling, draft_noise, k, model.config.vocab_size)
    drafted = model.ranks.broadcast(drafted)  # where each rank drafts alone, they may differ
    return verify(model, tokens, positions, slots, drafted, sampling, accept_noise, q)


# ---------------------------------------------------------------------------------------------------------------------
# A round


@dataclass
class Speculation:
    """Where drafts come from, how many there may be, and what became of them.

    draft_model: a model or a head, with caches as long as the target's, and as many rows; beyond the context that it
    was trained for it merely guesses worse. lookup: search the text for drafts too; without a draft model it always is.
    max_k: the most drafts a round, 0 for MODEL_K and LOOKUP_K. levels: the numbers of drafts to choose from, by default
    `levels_below` the most. The steps are the plain ones until `compile_`; prefill may be a compiled one.
    """

    draft_model: Transformer | None = None
    max_k: int = 0
    levels: tuple[int, ...] = ()
    draft_and_verify: Callable[..., Any] = draft_and_verify
    prefill: Callable[..., Any] = prefill
    lookup: bool = False

    drafter: Drafter = field(init=False)
    # The numbers of drafts that a draft model may be asked for, and that may be found in the text; () without.
    model_levels: tuple[int, ...] = field(init=False)
    lookup_levels: tuple[int, ...] = field(init=False)
    most_drafts: int = field(init=False)  # of a round, for which slots are kept beyond the end of a text
    # accept_counts[row][n]: how many forwards of the target accepted n drafts in the latest text; plain steps accept 0.
    accept_counts: list[list[int]] = field(default_factory=list, init=False)
    num_drafted: int = field(default=0, init=False)  # per row, in the latest text

    def __post_init__(self) -> None:
        if self.max_k < 0 or max(self.levels, default=1) < 1:
            raise ValueError(f"max_k is {self.max_k} and levels {self.levels}; a round has at least one draft")
        is_searched = self.lookup or self.draft_model is None
        self.model_levels = (self.levels or levels_below(self.max_k or MODEL_K)) if self.draft_model else ()
        self.lookup_levels = (self.levels or levels_below(self.max_k or LOOKUP_K)) if is_searched else ()
        self.most_drafts = max(self.max_k, *self.model_levels, *self.lookup_levels)
        self.drafter = lookup = Lookup(self.lookup_levels)
        if self.draft_model:
            kind = HeadModel if isinstance(self.draft_model, Head) else DraftModel
            draft_model = kind(self.draft_model, self.model_levels, self.prefill)
            self.drafter = Both(lookup, draft_model) if self.lookup else draft_model

    def compile_(self, mode: str | None = None) -> None:
        """Let torch.compile capture a round's call; mode: as in `steps.compiled`."""
        self.draft_and_verify = compiled(draft_and_verify, mode)

    def begin(self, target: Transformer, num_rows: int) -> None:
        """Begin so many texts of a target."""
        self.slots = torch.arange(target.max_seq_length, device=target.device)
        self.accept_counts = [[0] * (self.most_drafts + 1) for _ in range(num_rows)]
        self.num_drafted = 0
        self.drafter.begin(target, num_rows)

    def count(self, texts: list[Text], step: list[list[int]]) -> None:
        """Record the ids that a forward of the target gave each text, before they are cut to its room."""
        for text, ids in zip(texts, step, strict=True):
            if text.room:
                self.accept_counts[text.number][len(ids) - 1] += 1

    def round(self, target: Transformer, texts: list[Text], sampling: Sampling, noise: Noise) -> list[list[int]] | int:
        """Draft and verify: return each text's new ids, or how many tokens to decode plainly before the next round.

        texts: those that the first rows of the caches hold, of at least two ids; the target's caches hold all but the
        last. One that has ended runs along, and what it gets is not used.
        """
        proposal = self.drafter.propose(texts)
        if isinstance(proposal, int):
            return proposal
        device, k = self.slots.device, proposal.k
        ends = [len(text.ids) for text in texts]
        slots = visible_slots(self.slots, max(ends) + k)
        # The last ids and their positions: all that the step needs of the text, in one copy to the device.
        places = [[max(proposal.first, end - i) for i in range(proposal.num_latest, 0, -1)] for end in ends]
        ids = [[text.ids[place] for place in row] for text, row in zip(texts, places, strict=True)]
        tokens, positions = torch.tensor([ids, places], device=device)
        drafts, draft_noise, round_noise = proposal.drafts, None, None
        models = [target] if isinstance(drafts, Tensor) else [target, drafts]
        if isinstance(drafts, Tensor):
            drafts = drafts.to(device)
        elif sampling.temperature > 0:
            draft_noise = noise.exponential(k, target.config.vocab_size)
        if sampling.temperature > 0:
            round_noise = draft_noise, (noise.uniform(k), noise.exponential(target.config.vocab_size))
        with own_threads(len(texts) * (k + 1), *models):
            result = self.draft_and_verify(target, tokens, positions, slots, drafts, k, sampling, round_noise)
        rows = result.tolist()  # the round's only read
        self.num_drafted += k
        self.drafter.note(proposal, texts, [n for n, *_ in rows])
        return [ids[: n + 1] for n, *ids in rows]
