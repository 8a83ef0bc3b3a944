"""speculate.py: the accept rule, rounds with a draft and with prompt lookup, eager and compiled, and the command."""

import copy
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import generate as generate_module
import speculate as speculate_module
from drafters import (
    CATCHING_UP,
    FIRST_WAIT,
    LONGEST_WAIT,
    Both,
    DraftModel,
    Lookup,
    Pace,
    expected_tokens,
    levels_below,
)
from eagle import Head, HeadConfig
from engine import generate
from generate import warm_up
from kernels.optimize import optimize_
from linears import Form, quantizable_linears, quantize_linear
from speculate import Speculation, accept, draft_and_verify
from steps import Noise, Sampling, Text, compiled, decode, likeliest, prefill, probabilities
from suffix import Suffixes
from tests.conftest import REPO, assert_user_error, run_forked
from tests.test_eagle import TAP_LAYERS, taught_head
from tests.test_generate import GREEDY, rows_of, tiny_model, tokens_of

DEMO, DEMO_DRAFT = REPO / "checkpoints" / "demo", REPO / "checkpoints" / "demo-draft"
DEMO_HEAD = REPO / "checkpoints" / "demo-eagle3"
LENGTH = 128
MAX_K = 5
FILTERED = Sampling(0.9, top_k=20, top_p=0.95, min_p=0.01)
PROMPTS = [[3], [9, 8, 7, 6, 5], list(range(1, 40)), [11, 12]]


def nearly(model, noise=0.02):
    """Make of a target a draft that is right most of the time."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


def random_draft():
    model = tiny_model(num_hidden_layers=1, hidden_size=16)
    for parameter in model.parameters():
        parameter.neg_()
    return model


def quantized(model, form):
    for name, child in quantizable_linears(model).items():
        model.set_submodule(name, quantize_linear(child, form.head if name == "lm_head" else form))
    optimize_(model)
    return model


# A further kind of draft is a line here: a function of the target.
DRAFTS = {
    "the target in int8": lambda model: quantized(model, Form(8)),
    "the target in int4": lambda model: quantized(model, Form(4, 32, has_zeros=True)),
    "the target": lambda model: model,
    "nearly the target": nearly,
    "random": lambda model: random_draft(),
    "fewer ids": lambda model: tiny_model(num_hidden_layers=1, vocab_size=40),
    "a shorter context": lambda model: tiny_model(num_hidden_layers=1, max_position_embeddings=16),
    "more ids": lambda model: tiny_model(num_hidden_layers=1, vocab_size=80),
    "prompt lookup": lambda model: None,
    "a head": lambda model: taught_head(),
    "a head of three layers": lambda model: taught_head(3),
}


@pytest.fixture(scope="module")
def target():
    model = tiny_model()
    model.tap_layers = TAP_LAYERS
    model.setup_caches(4, LENGTH + MAX_K)
    return model


def make_draft(name):
    draft_model = DRAFTS[name](tiny_model())
    if draft_model:
        draft_model.setup_caches(4, LENGTH + MAX_K)
    return draft_model


@pytest.fixture(scope="module")
def plain(target):
    """Each prompt's greedy text, decoded alone and without speculation, up to the end of its slots."""
    return [tokens_of(generate(target, [p], LENGTH - len(p), GREEDY)) for p in PROMPTS]


# ---------------------------------------------------------------------------------------------------------------------
# The accept rule


def by_the_rule(p, q, draws=40_000, rule=accept, seed=0):
    """Draw the first two ids of many rounds of two drafts, each from q, where the target's distribution is p."""
    generator = torch.Generator().manual_seed(seed)
    drafted = q.expand(draws, -1).multinomial(2, replacement=True, generator=generator)
    uniform = torch.rand(draws, 2, generator=generator)
    clocks = torch.empty(draws, len(p)).exponential_(generator=generator)
    logits = p.log().expand(draws, 3, -1)
    counts, ids = rule(logits, drafted, q.expand(draws, 2, -1), Sampling(1.0), (uniform, clocks))
    return ids, counts


def chi_square(ids, p):
    expected = p * len(ids)
    kept = expected > 0
    counts = ids.bincount(minlength=len(p)).float()
    assert counts[~kept].sum() == 0, "an id was drawn that the filters exclude"
    return ((counts - expected)[kept].square() / expected[kept]).sum().item()


P = torch.tensor([0.4, 0.3, 0.2, 0.08, 0.02])
Q = torch.tensor([0.1, 0.2, 0.1, 0.3, 0.3])


def take_always(logits, drafted, q, sampling, noise):
    return accept(logits, drafted, q, sampling, (torch.zeros_like(noise[0]), noise[1]))


def follow_p(logits, drafted, q, sampling, noise):
    """Draw the id after a rejection from p, and not from what q has left of it."""
    counts, _ = accept(logits, drafted, q, sampling, noise)
    _, following = accept(logits, drafted, torch.zeros_like(q), sampling, (torch.ones_like(noise[0]), noise[1]))
    return counts, F.pad(drafted, (0, 1)).scatter(1, counts.unsqueeze(1), following[:, :1])


# Chi-square with 4 degrees of freedom: 18.5 is passed by chance once in a thousand seeds.
LIMIT = 18.5


def test_the_first_id_of_a_round_is_distributed_as_p():
    ids, counts = by_the_rule(P, Q)
    assert chi_square(ids[:, 0], P) < LIMIT
    # ... and the second, where the first draft was accepted
    assert chi_square(ids[counts > 0, 1], P) < LIMIT
    assert chi_square(ids[counts == 2, 2], P) < LIMIT


@pytest.mark.parametrize("rule", [take_always, follow_p])
def test_chi_square_finds_a_broken_accept_rule(rule):
    ids, _ = by_the_rule(P, Q, rule=rule)
    assert chi_square(ids[:, 0], P) > 10 * LIMIT


def test_as_many_drafts_are_accepted_as_p_and_q_have_in_common():
    _, counts = by_the_rule(P, Q)
    assert (counts > 0).float().mean().item() == pytest.approx(torch.minimum(P, Q).sum().item(), abs=0.01)


def test_a_certain_draft_is_accepted_with_its_probability_and_leaves_the_rest_of_p():
    draws, generator = 40_000, torch.Generator().manual_seed(0)
    noise = (torch.rand(draws, 1, generator=generator), torch.empty(draws, 5).exponential_(generator=generator))
    drafted = torch.full((draws, 1), 1)
    counts, ids = accept(P.log().expand(draws, 2, -1), drafted, None, Sampling(1.0), noise)
    assert counts.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(ids[:, 0] == 1, counts == 1)
    assert chi_square(ids[:, 0], P) < LIMIT


def test_equal_distributions_accept_everything_even_at_the_largest_draw():
    p = probabilities(torch.randn(1000, 50, generator=torch.Generator().manual_seed(0)), Sampling(1.0))
    drafted = p.multinomial(1, generator=torch.Generator().manual_seed(0))
    largest = torch.full((1000, 1), 1 - 2**-24)
    logits = p.log().unsqueeze(1).expand(-1, 2, -1)
    q = probabilities(logits[:, :1], Sampling(1.0))
    counts, ids = accept(logits, drafted, q, Sampling(1.0), (largest, torch.ones(1000, 50)))
    assert counts.min() == 1
    # Without a draw left over from rounding: p itself.
    assert torch.equal(ids, torch.cat((drafted, p.argmax(dim=-1, keepdim=True)), dim=1))


def test_a_rejection_by_rounding_alone_still_draws_from_p():
    p = torch.tensor([0.0, 0.5, 0.5])
    noise = (torch.ones(1, 1), torch.ones(1, 3))  # the draw 1 does not occur: it stands for p a little below q
    counts, ids = accept(p.log().expand(1, 2, 3), torch.tensor([[1]]), p.expand(1, 1, 3), Sampling(1.0), noise)
    assert (counts.item(), ids[0, 0].item()) == (0, 1)


SMALL = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1}
SMALL_DRAFTS = {
    "nearly the target": lambda: nearly(tiny_model(**SMALL), noise=0.1),
    "random": lambda: tiny_model(**SMALL | {"num_hidden_layers": 2}),
    "prompt lookup": lambda: None,
    "a head of fewer ids": lambda: small_head(),
}


def small_head():
    config = HeadConfig(tiny_model(**SMALL).config, 9, SMALL["hidden_size"], (0,), norm_before_residual=False)
    head = Head(config)
    for name, parameter in head.named_parameters():
        parameter.data.fill_(1) if name.endswith("norm.weight") else parameter.data.normal_(0, 0.2)
    head.ids = torch.tensor([1, 2, 3, 4, 6, 7, 9, 10, 11])
    return head.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("name", SMALL_DRAFTS)
def test_sampled_text_follows_the_targets_distribution_under_filters(name):
    """The second and third new token of 3,000 texts, against what the target's logits give."""
    target, draft_model = tiny_model(**SMALL), SMALL_DRAFTS[name]()
    target.tap_layers = (0,)
    sampling, prompt, rows = Sampling(1.2, top_k=8, top_p=0.9, min_p=0.02), [5, 6, 7, 5, 6], 3000
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12))  # all first and second tokens
    texts = torch.cat((torch.tensor(prompt).expand(144, -1), pairs), dim=1)
    target.setup_caches(144, 7)
    p = probabilities(target(texts, torch.arange(7)), sampling).view(12, 12, 7, 12)
    first, second, third = p[0, 0, 4], p[:, 0, 5], p[:, :, 6]
    joint = first.unsqueeze(1) * second

    for model in (target, draft_model):
        if model:
            model.setup_caches(rows, 16)
    speculation = Speculation(draft_model, max_k=2, levels=(2,))
    generator = torch.Generator().manual_seed(3)
    steps = generate(target, [prompt] * rows, 3, sampling, generator=generator, speculation=speculation)
    ids = torch.tensor(rows_of(steps))
    # 11 degrees of freedom: 31.3 is passed by chance once in a thousand seeds.
    assert chi_square(ids[:, 1], joint.sum(0)) < 31.3
    assert chi_square(ids[:, 2], (joint.unsqueeze(-1) * third).sum((0, 1))) < 31.3
    accepted = sum(torch.tensor(speculation.accept_counts))
    assert accepted[0] > 100 and accepted[1:].sum() > 100, "both kinds of round have to occur"


# ---------------------------------------------------------------------------------------------------------------------
# Rounds


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_text_is_the_plain_one_to_the_last_slot(target, plain, name):
    speculation = Speculation(make_draft(name), MAX_K)
    for prompt, expected in zip(PROMPTS, plain, strict=True):
        assert tokens_of(generate(target, [prompt], LENGTH, GREEDY, speculation=speculation)) == expected


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_each_row_of_a_batch_equals_its_own_run_at_every_number_of_drafts(target, plain, name, k):
    speculation = Speculation(make_draft(name), max_k=MAX_K, levels=(k,))
    assert rows_of(generate(target, PROMPTS, LENGTH, GREEDY, speculation=speculation)) == plain


@pytest.mark.parametrize(
    ("name", "sampling"),
    [("nearly the target", GREEDY), ("nearly the target", Sampling(0.9, top_k=20)), ("a head", GREEDY)],
)
def test_a_draft_model_and_the_text_both_propose_and_greedy_text_is_the_plain_one(target, sampling, name):
    sources = set()

    def watched(model, tokens, positions, slots, drafts, *rest):
        sources.add("text" if isinstance(drafts, torch.Tensor) else "model")
        return draft_and_verify(model, tokens, positions, slots, drafts, *rest)

    speculation = Speculation(make_draft(name), 2, draft_and_verify=watched, lookup=True)
    prompts = [[*range(5, 15), 5, 6, 7], [9, 8, 7]]
    generator = torch.Generator().manual_seed(1)
    rows = rows_of(generate(target, prompts, 60, sampling, generator=generator, speculation=speculation))
    assert sources == {"text", "model"}
    assert list(map(len, rows)) == [60, 60]
    assert sampling != GREEDY or rows == rows_of(generate(target, prompts, 60, GREEDY))


@pytest.mark.parametrize("name", ["nearly the target", "fewer ids", "prompt lookup", "a head"])
@pytest.mark.parametrize("levels", [(3,), ()], ids=["always", "at will"])
def test_rows_that_have_ended_leave_and_the_others_go_on_as_before(target, plain, name, levels):
    sizes, ends, ended = [], [3, 60, 20, 80], set()

    def watched(step):
        def call(model, tokens, *rest):
            sizes.append(len(tokens))
            return step(model, tokens, *rest)

        return call

    speculation = Speculation(make_draft(name), MAX_K, levels, watched(draft_and_verify))
    found = [[] for _ in PROMPTS]
    for step in generate(target, PROMPTS, 80, GREEDY, ended=ended, speculation=speculation):
        for row, ids in enumerate(step):
            found[row] += ids
        ended |= {row for row, end in enumerate(ends) if len(found[row]) >= end}
    assert all(len(ids) >= end for ids, end in zip(found, ends, strict=True))
    assert [ids[:end] for ids, end in zip(found, ends, strict=True)] == [
        ids[:end] for ids, end in zip(plain, ends, strict=True)
    ]
    assert sizes[0] == 4 and (levels == () or sizes[-1] == 1)
    # Counted for the row that the ids went to.
    for ids, counts in zip(found, speculation.accept_counts, strict=True):
        given = 1 + sum((n + 1) * count for n, count in enumerate(counts))
        assert len(ids) <= given <= len(ids) + MAX_K
    if name == "prompt lookup":
        return
    # The draft's caches hold each row's own text again: the next turn has nothing to prefill that they had.
    texts = [prompt + ids for prompt, ids in zip(PROMPTS, plain, strict=True)]
    counts = [speculation.drafter.held[row].count for row in range(len(texts))]
    assert all(count <= len(text) for count, text in zip(counts, texts, strict=True))
    texts = [text[: max(2, count)] for count, text in zip(counts, texts, strict=True)]
    again = generate(target, texts, 9, GREEDY, cached=1, speculation=speculation)
    expected = [(prompt + ids)[len(text) :][:9] for prompt, ids, text in zip(PROMPTS, plain, texts, strict=True)]
    assert rows_of(again) == expected


@pytest.mark.parametrize("name", ["nearly the target", "prompt lookup", "a head"])
def test_what_a_row_draws_does_not_depend_on_rows_that_have_ended(target, name):
    def run(**options):
        generator, speculation = torch.Generator().manual_seed(5), Speculation(make_draft(name), levels=(3,))
        return rows_of(generate(target, PROMPTS, 60, FILTERED, generator=generator, speculation=speculation, **options))

    plain = run()
    found = run(ended={0, 1, 2})  # the last row goes on alone
    assert found[:3] == [ids[:1] for ids in plain[:3]]
    assert found[3][:50] == plain[3][:50]  # at the end of its room the number of drafts follows the others' room


@pytest.mark.parametrize("sampling", [GREEDY, FILTERED], ids=["greedy", "sampled"])
def test_the_target_as_its_own_draft_has_every_token_accepted(target, sampling):
    speculation = Speculation(make_draft("the target"))
    generator = torch.Generator().manual_seed(0)
    ids = tokens_of(generate(target, [[1, 2, 3]], 61, sampling, generator=generator, speculation=speculation))
    assert speculation.accept_counts == [[0, 0, 0, 0, 0, 10]]
    assert len(ids) == 61


def test_a_random_draft_is_soon_asked_no_more(target):
    speculation = Speculation(make_draft("random"))
    list(generate(target, [[1, 2, 3]], 100, GREEDY, speculation=speculation))
    assert 5 < speculation.num_drafted < 20


def test_counts_add_up_to_the_tokens(target):
    speculation = Speculation(make_draft("nearly the target"))
    ids = tokens_of(generate(target, [[1, 2, 3]], 100, GREEDY, speculation=speculation))
    [counts] = speculation.accept_counts
    given = 1 + sum((n + 1) * count for n, count in enumerate(counts))
    assert len(ids) <= given < len(ids) + MAX_K + 1
    assert sum(counts[1:]) > 10


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6, 7, 8])
def test_max_new_tokens_is_exact_inside_a_round(target, plain, count):
    speculation = Speculation(make_draft("the target"))
    rows = rows_of(generate(target, PROMPTS, count, GREEDY, speculation=speculation))
    assert rows == ([ids[:count] for ids in plain] if count else [])


@pytest.mark.parametrize("name", ["the target", "a head"])
def test_eos_inside_accepted_drafts_ends_the_row_there_and_changes_no_other(target, plain, name):
    for place in range(1, 8):
        eos = plain[1][place]
        expected = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in plain]
        speculation = Speculation(make_draft(name))
        assert rows_of(generate(target, PROMPTS, LENGTH, GREEDY, eos_ids=[eos], speculation=speculation)) == expected


@pytest.mark.parametrize("form", [Form(8), Form(4, 32, has_zeros=True)], ids=str)
def test_a_head_drafts_for_a_quantized_target(form):
    target, speculation = quantized(tiny_model(), form), Speculation(taught_head(), levels=(3,))
    target.tap_layers = TAP_LAYERS
    for model in (target, speculation.draft_model):
        model.setup_caches(4, LENGTH + 3)
    plain = rows_of(generate(target, PROMPTS, 40, GREEDY))
    assert rows_of(generate(target, PROMPTS, 40, GREEDY, speculation=speculation)) == plain
    assert sum(sum(counts[1:]) for counts in speculation.accept_counts) > 10, speculation.accept_counts


@pytest.mark.parametrize("name", ["nearly the target", "a head"])
def test_a_second_turn_continues_the_first(target, plain, name):
    speculation = Speculation(make_draft(name))
    list(generate(target, [PROMPTS[1][:3]], 1, GREEDY, speculation=speculation))
    text = [*PROMPTS[1], *plain[1][:10]]
    assert tokens_of(generate(target, [text], 20, GREEDY, cached=3, speculation=speculation)) == plain[1][10:30]


def test_after_a_turn_without_it_the_draft_still_sees_the_whole_text(target, plain):
    speculation = Speculation(make_draft("the target"))
    list(generate(target, [PROMPTS[1]], 1, GREEDY, speculation=speculation))
    first = tokens_of(generate(target, [PROMPTS[1]], 11, GREEDY))  # by the target alone
    text = PROMPTS[1] + first
    ids = tokens_of(generate(target, [[*text, 3]], 25, GREEDY, cached=len(text) - 1, speculation=speculation))
    assert speculation.accept_counts == [[0, 0, 0, 0, 0, 4]]
    assert ids == tokens_of(generate(target, [[*text, 3]], 25, GREEDY))


def test_a_draft_sees_the_text_whichever_run_has_used_the_caches(target):
    """By the target alone, or by others who draft with the same model: each text is another."""
    draft = make_draft("the target")
    speculation, others = Speculation(draft), Speculation(draft)
    list(generate(target, [PROMPTS[0]], 20, GREEDY, speculation=speculation))
    text = [9, 8, 7, 6] * 5
    for between in (speculation, None, others):
        turn = text + tokens_of(generate(target, [text], 20, GREEDY, speculation=between))
        list(generate(target, [[*turn, 5]], 5, GREEDY, cached=len(turn) - 1, speculation=speculation))
        assert speculation.accept_counts == [[0, 0, 0, 1, 0, 0]], between
        text = [*reversed(text)]
    # A text that ends before the last draft of a round: the caches hold drafts behind its end, and the next has others.
    eos = tokens_of(generate(target, [text], 3, GREEDY))[-1]
    turn = text + tokens_of(generate(target, [text], 20, GREEDY, speculation=speculation, eos_ids=[eos]))
    assert speculation.drafter.held[0].count > len(turn)
    assert speculation.drafter.num_held(Text(0, [*turn, *range(11, 20)], room=5)) == len(turn)


def test_a_second_turn_is_looked_up_in_the_first(target):
    speculation = Speculation(None)
    text = [*range(1, 21), 40, 41]
    list(generate(target, [text], 1, GREEDY, speculation=speculation))
    list(generate(target, [[*text, 1, 2]], 1, GREEDY, cached=len(text), speculation=speculation))
    assert speculation.drafter.look_up(Text(0, [*text, 1, 2], 9), 3) == [3, 4, 5]


@pytest.mark.parametrize("sampling", [GREEDY, FILTERED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["the target", "prompt lookup"])
def test_logits_that_are_not_finite_are_refused(target, sampling, name):
    speculation = Speculation(make_draft(name), levels=(2,))
    broken = copy.deepcopy(target)
    steps = generate(broken, [[1, 2, 1, 2]], 20, sampling, speculation=speculation)
    next(steps)
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        next(steps)


def test_rows_that_lookup_finds_nothing_for_are_not_taken_for_rejected_drafts(target):
    speculation = Speculation(None, levels=(2, 0))
    updates = []
    speculation.begin(target, 2)
    speculation.drafter.pace.update = lambda counts, lengths: updates.append(lengths)
    texts = [[1, 2, 3, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    for column in range(5):  # into the caches
        target(torch.tensor([[text[column]] for text in texts]), torch.tensor([column]))
    noise = Noise(2, [0, 1], None, target.device)
    speculation.round(target, [Text(row, ids, 9) for row, ids in enumerate(texts)], GREEDY, noise)
    assert updates == [[2, 0]]
    pace = Pace((2, 0))
    pace.update([2, 0], [2, 0])
    assert pace.rejected == 0


@pytest.mark.parametrize("name", ["nearly the target", "a head"])
def test_unused_slots_may_hold_nan_in_both_caches(target, plain, name):
    draft_model = make_draft(name)
    target.taps.fill_(math.nan)
    for model in (target, draft_model):
        for block in model.layers:
            block.self_attn.cache.k.fill_(math.nan)
            block.self_attn.cache.v.fill_(math.nan)
    speculation = Speculation(draft_model)
    assert rows_of(generate(target, PROMPTS, LENGTH, GREEDY, speculation=speculation)) == plain
    assert sum(speculation.accept_counts[0][1:]) > 10


def test_a_draft_that_missed_plain_tokens_guesses_as_well_as_one_that_saw_all(target, monkeypatch):
    """Whatever the order of plain steps and rounds: a draft equal to the target is never wrong."""
    speculation = Speculation(make_draft("the target"))
    asked = itertools.cycle([(7, 0), (0, 2)])
    monkeypatch.setattr(Pace, "next_plan", lambda pace, room: next(asked))
    list(generate(target, PROMPTS, 60, GREEDY, speculation=speculation))
    for counts in speculation.accept_counts:
        assert counts[2] > 4
        assert sum(counts) == counts[0] + counts[2]
        assert counts[0] == 7 * (counts[2] + (counts[0] % 7 > 0)) - (-counts[0] % 7)


def test_a_round_is_one_call(target):
    calls = []

    def watched(name, step):
        def call(*args):
            calls.append(name)
            return step(*args)

        return call

    speculation = Speculation(
        make_draft("the target"),
        draft_and_verify=watched("round", draft_and_verify),
        prefill=watched("prefill of the draft", prefill),
    )
    list(generate(target, [[1, 2, 3]], 61, GREEDY, decode=watched("decode", decode), speculation=speculation))
    assert calls == ["prefill of the draft"] + ["round"] * 10


def test_slots_kept_for_drafts_are_not_for_prompts(target):
    with pytest.raises(ValueError, match=f"needs {LENGTH + 1} cache slots, the cache has {LENGTH}"):
        next(generate(target, [[1] * (LENGTH + 1)], 5, GREEDY, speculation=Speculation(max_k=MAX_K)))


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.fixture(scope="module")
def steps():
    return {"prefill": compiled(prefill), "decode": compiled(decode)}


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("nearly the target", GREEDY), ("nearly the target", FILTERED), ("prompt lookup", GREEDY), ("a head", FILTERED),
    ],
)  # fmt: skip
def test_compiled_rounds_equal_eager_ones_and_nothing_recompiles(target, plain, steps, name, sampling):
    levels = levels_below(2) if name == "prompt lookup" else (2, 0)  # each needs a graph, which takes seconds
    plain_rounds = Speculation(make_draft(name), max_k=2, levels=levels)
    rounds = replace(plain_rounds, prefill=steps["prefill"])
    rounds.compile_()
    list(generate(target, [[1, 2]], 3, sampling, **steps))
    for k in levels[:-1]:
        list(generate(target, [[1, 2]], 3, sampling, **steps, speculation=replace(rounds, levels=(k,))))
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompt, expected in zip(PROMPTS, plain, strict=True):
            texts = [
                tokens_of(
                    generate(
                        target,
                        [prompt],
                        LENGTH,
                        sampling,
                        generator=torch.Generator().manual_seed(4),
                        speculation=speculation,
                        **how,
                    )
                )
                for speculation, how in ((plain_rounds, {}), (rounds, steps))
            ]
            assert texts[0] == texts[1]
            assert texts[0][: len(expected)] == expected or sampling is FILTERED
            assert rounds.accept_counts == plain_rounds.accept_counts


# ---------------------------------------------------------------------------------------------------------------------
# How many drafts


def test_levels_fall_to_plain_decoding():
    assert levels_below(5) == (5, 3, 1, 0)
    assert levels_below(16) == (16, 9, 5, 3, 1, 0)
    assert levels_below(2) == (2, 1, 0)


LONG = 10**6  # room for any text


def test_drafts_grow_while_they_are_accepted_and_shrink_when_not():
    pace = Pace(levels_below(5))
    assert pace.plan(LONG) == (0, 5)
    seen = []
    for _ in range(8):
        seen.append(pace.plan(LONG)[1] if pace.k else 0)
        pace.update([0], [seen[-1] or 1])
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0
    for _ in range(20):
        k = pace.plan(LONG)[1]
        pace.update([k], [k])
    assert pace.plan(LONG) == (0, 5)


def test_tries_of_a_bad_draft_come_rarer_and_rarer():
    pace = Pace(levels_below(5))
    waits = []
    for _ in range(20):
        waits.append(pace.plan(LONG)[0])
        pace.update([0], [pace.plan(LONG)[1]])
    waits = [wait for wait in waits if wait]
    assert waits[:4] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT, 8 * FIRST_WAIT]
    assert max(waits) == waits[-1] == LONGEST_WAIT


def test_a_draft_that_becomes_good_is_soon_asked_in_every_round():
    pace = Pace(levels_below(5))
    for _ in range(40):
        pace.update([0], [1])
    pace.update([1], [1])
    assert pace.plan(LONG) == (FIRST_WAIT, 1)
    tokens = 0
    while pace.plan(LONG)[0]:
        tokens += pace.plan(LONG)[0] + 2
        pace.update([1], [1])
    assert tokens < LONGEST_WAIT, "a try that succeeds is no reason to wait longer"


@pytest.mark.parametrize(("room", "k"), [(1, 0), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (7, 5), (LONG, 5)])
def test_no_more_is_drafted_than_fills_the_room(room, k):
    assert Pace(levels_below(5)).plan(room) == (1 if room == 1 else 0, k)


def test_no_try_is_left_for_a_room_that_plain_decoding_fills():
    pace = Pace(levels_below(5))
    for _ in range(20):
        pace.update([0], [1])
    assert pace.plan(LONGEST_WAIT + 1) == (LONGEST_WAIT + 1, 0)
    assert pace.plan(LONGEST_WAIT + 2) == (LONGEST_WAIT, 1)


@pytest.mark.parametrize("k", [1, 5, 16])
def test_a_draft_that_is_always_wrong_costs_less_than_a_tenth(k):
    """In steps, over 200 tokens, where a draft costs as much as half a step and a prefill of the missed a whole one."""
    pace = Pace(levels_below(k))
    tokens, cost = 0, 0.0
    while tokens < 200:
        num_plain, drafts = pace.plan(LONG)
        tokens += num_plain + 1
        cost += num_plain + 1 + 0.5 * drafts + (1 if num_plain else 0)
        pace.update([0], [drafts])
    assert cost / tokens < 1.1


def test_expected_tokens_is_the_papers_formula():
    assert expected_tokens(0.7, 5) == pytest.approx((1 - 0.7**6) / 0.3)
    assert expected_tokens(1.0, 5) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Prompt lookup


def test_lookup_continues_as_the_text_did_after_its_longest_end():
    index = Suffixes()
    index.extend([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7])
    assert index.continuation(3) == []
    index.extend([2, 3])
    assert index.continuation(2) == [5, 6]  # the later of two
    index.extend([4])
    assert index.continuation(2) == [9, 1]
    index.extend([8, 3, 4, 9, 1, 2, 3])
    assert index.continuation(1) == [5], "after 9 1 2 3 there was a 5, though 4 follows 2 3 as often"


def test_lookup_goes_on_round_a_loop():
    index = Suffixes()
    index.extend([7, 1, 2, 1, 2])
    assert index.continuation(4) == [1, 2, 1, 2]


def test_lookup_guesses_the_further_the_longer_the_repeated_end_is():
    index, text = Suffixes(), list(range(100, 160))
    index.extend([*text, 7, *text[:2]])
    lengths = []
    for i in text[2:20]:
        lengths.append(len(index.continuation(15)))
        index.extend([i])
    assert lengths[0] < 10 and lengths[-1] == 15 and lengths == sorted(lengths)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_the_index_finds_the_longest_end_that_stood_before(ids):
    index = Suffixes()
    for end in range(1, len(ids) + 1):
        index.extend([ids[end - 1]])
        ends = (
            size for size in range(end) if any(ids[i : i + size] == ids[end - size : end] for i in range(end - size))
        )
        assert index.lengths[index.links[index.last]] == max(ends, default=0)
        assert len(index.lengths) <= max(2, 2 * end)


def test_of_what_is_found_and_a_draft_model_the_one_proposes_that_promises_more():
    model = tiny_model()
    model.setup_caches(1, 80)
    drafter = Both(Lookup((3, 1, 0)), DraftModel(model, (5, 3, 1, 0)))
    drafter.begin(model, 1)
    text = Text(0, [*range(20, 60), *range(20, 24)], 10)
    found = drafter.propose([text])
    assert found.k == 3 < drafter.other.pace.k, "what costs nothing, though it is less"
    for _ in range(3):
        drafter.note(found, [text], [0])
    assert drafter.propose([text]).drafts is model
    for i in range(24, 50):
        text.ids.append(i)
        again = drafter.propose([text])
    assert again.drafts is not model, "the text has gone on as was found, though that was passed over"


def test_a_draft_model_that_missed_more_than_a_round_takes_in_is_asked_once_nothing_more_is_found():
    model = tiny_model()
    model.setup_caches(1, 64)
    drafter = Both(Lookup((7, 3, 1, 0)), DraftModel(model, (3, 1, 0)))
    drafter.begin(model, 1)
    text = Text(0, [*range(20, 40), *range(20, 30)], 30)
    found = drafter.propose([text])
    assert found.k == 7
    drafter.note(found, [text], [7])
    text.ids += range(10, 18)  # of which none stood there before
    waited = 0
    while isinstance(step := drafter.propose([text]), int):
        waited += step
        text.ids += range(50 + waited - step, 50 + waited)
    assert waited == CATCHING_UP and step.drafts is model


def test_a_lookup_that_waits_is_not_asked_while_a_draft_model_proposes():
    model = tiny_model()
    model.setup_caches(1, 300)
    drafter = Both(Lookup((7, 3, 1, 0)), DraftModel(model, (3, 1, 0)))
    drafter.begin(model, 1)
    while drafter.lookup.pace.k:
        drafter.lookup.pace.update([0], [7])
    text, asked = Text(0, [*range(20, 40)] * 2, 250), []
    drafter.lookup.look_up = lambda text, most: asked.append(text.room) or []
    for _ in range(30):
        proposal = drafter.propose([text])
        drafter.note(proposal, [text], [3])
        text.ids, text.room = text.ids + [1, 2, 3, 4], text.room - 4
    assert asked == [*range(250 - FIRST_WAIT, 130, -4)]


def test_what_a_text_that_has_ended_accepts_lets_no_draft_model_wait():
    model = tiny_model()
    model.setup_caches(2, 64)
    drafter = Both(Lookup((7, 3, 1, 0)), DraftModel(model, (3, 1, 0)))
    drafter.begin(model, 2)
    texts = [Text(0, [*range(20, 40), *range(20, 30)], 30), Text(1, [5, 5, 5], 0)]
    found = drafter.propose(texts)
    assert found.lengths == [7, 0]
    drafter.note(found, texts, [3, 7])
    assert drafter.wait == 0


def test_the_index_grows_in_constant_time_a_token():
    """In edges that are set, and not by the clock: of a text of every kind of end."""
    index = Suffixes()
    generator = random.Random(0)
    index.extend([generator.randrange(3) for _ in range(2000)] + [1] * 2000 + [1, 2] * 1000)
    assert sum(map(len, index.edges)) < 3 * len(index.ids)


def test_lookup_finds_the_loop_of_a_model_that_sees_only_the_last_token():
    model = tiny_model()
    for block in model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    model.setup_caches(1, 128)
    speculation = Speculation()
    ids = tokens_of(generate(model, [[3, 4]], 100, GREEDY, speculation=speculation))
    assert ids == tokens_of(generate(model, [[3, 4]], 100, GREEDY))
    assert sum(speculation.accept_counts[0]) < 50


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    "how",
    [("--draft_checkpoint_path", DEMO_DRAFT), ("--draft_checkpoint_path", DEMO_HEAD), ("--prompt_lookup",)],
    ids=["draft", "head", "lookup"],
)
def test_the_command_prints_the_plain_text_up_to_a_stop_inside_a_round(tmp_path, how):
    path = tmp_path / "metrics.json"
    options = ("--prompt", "import ", "--temperature", 0, "--dtype", "float32", "--max_new_tokens", 150)
    options += ("--ignore_eos", "--stop", "__repr__", "--metrics_path", path)
    plain = run_forked(generate_module.main, *options, cwd=REPO)
    expected = json.loads(path.read_text())["samples"][0]
    result = run_forked(generate_module.main, *options, *how, "--speculate_k", 4, cwd=REPO)
    assert result.returncode == 0, result.stderr
    metrics = json.loads(path.read_text())
    [row] = metrics["samples"]
    assert result.stdout == plain.stdout
    assert {key: row[key] for key in ("tokens", "text", "finish_reason")} == {
        key: expected[key] for key in ("tokens", "text", "finish_reason")
    }
    assert len(row["accept_counts"]) == 5
    assert sum(row["accept_counts"][1:]) > 0
    assert sum((n + 1) * count for n, count in enumerate(row["accept_counts"])) >= row["new_tokens"] - 1
    assert "tokens a round" in result.stderr


def write_config(path: Path, **changes):
    path.mkdir()
    config = json.loads((DEMO_DRAFT / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("drafts", ["prompt lookup", "head"])
def test_the_command_compiles_all_before_the_clock_starts(tmp_path, monkeypatch, drafts):
    """The head is the demo's, and compiled it gives the eager text."""
    warmed_up = []

    def watched(*args, **options):
        warm_up(*args, **options)
        warmed_up.append(torch.compiler.set_stance("fail_on_recompile"))

    def likeliest_compiled(logits):
        assert torch.compiler.is_compiling(), "a round that was not compiled"
        return likeliest(logits)

    monkeypatch.setattr(speculate_module, "likeliest", likeliest_compiled)
    monkeypatch.setattr(generate_module, "warm_up", watched)
    options = ["--temperature", 0, "--max_new_tokens", 40, "--speculate_k", 1, "--device", "cpu"]
    options += ["--metrics_path", tmp_path / "metrics.json"]
    if drafts == "head":
        options += ["--dtype", "float32", "--prompt", "import ", "--draft_checkpoint_path", DEMO_HEAD]
    else:
        path = write_config(tmp_path / "a", num_hidden_layers=1)
        options += ["--random_weights", "--checkpoint_path", path, "--prompt_length", 3, "--prompt_lookup"]
    try:
        generate_module.main(["--compile", *map(str, options)])
    finally:
        torch.compiler.set_stance("default")
    assert warmed_up
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["speculation"] == {"drafts": drafts, "speculate_k": 1}
    [sample] = metrics["samples"]
    assert sample["num_drafted"] > 0
    if drafts == "head":
        monkeypatch.undo()
        generate_module.main([*map(str, options)])
        [eager] = json.loads((tmp_path / "metrics.json").read_text())["samples"]
        assert (sample["tokens"], sample["accept_counts"]) == (eager["tokens"], eager["accept_counts"])


def test_random_weights_need_only_the_configs(tmp_path):
    target, draft_model = write_config(tmp_path / "a"), write_config(tmp_path / "b", num_hidden_layers=1)
    options = ("--random_weights", "--prompt_length", 4, "--max_new_tokens", 30, "--ignore_eos")
    result = run_forked(
        generate_module.main, *options, "--checkpoint_path", target, "--draft_checkpoint_path", draft_model, cwd=REPO
    )
    assert result.returncode == 0, result.stderr
    assert "30 tokens" in result.stderr


def test_another_vocabulary_is_refused_by_content(tmp_path):
    other = write_config(tmp_path / "other")
    piece = (DEMO / "tokenizer.model").read_bytes()
    assert piece.count(b"return") > 0
    (other / "tokenizer.model").write_bytes(piece.replace(b"return", b"nruter"))
    result = run_forked(generate_module.main, "--draft_checkpoint_path", other, cwd=REPO)
    assert_user_error(result, other, "another vocabulary", "nruter", "return")


def test_another_number_of_ids_is_refused_where_there_is_no_tokenizer(tmp_path):
    options = ("--random_weights", "--prompt_length", 4, "--checkpoint_path", write_config(tmp_path / "a"))
    other = write_config(tmp_path / "b", vocab_size=5000)
    result = run_forked(generate_module.main, *options, "--draft_checkpoint_path", other, cwd=REPO)
    assert_user_error(result, "5000 ids", "4096")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculate_k", 3], "--speculate_k needs a draft"),
        (["--speculate_k", 0, "--prompt_lookup"], "--speculate_k"),
        (["--draft_checkpoint_path", "no/such/folder"], "--draft_checkpoint_path: no/such/folder is not a folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    assert_user_error(run_forked(generate_module.main, *arguments, cwd=REPO), message)
