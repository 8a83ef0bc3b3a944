"""generate.py: the sampler, the loop, eager and compiled, and the command."""

import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine as engine_module
import generate as generate_module
import steps as steps_module
from checkpoint import load_model
from cli.options import check, parse_args
from config import read_config
from engine import Engine, generate, read_behind
from generate import cases_to_compile, warm_up
from kernels.optimize import optimize_
from model import ONE_RANK, ModelConfig, Transformer
from speculate import Speculation, draft_and_verify
from steps import PREFILL_CHUNK, Sampling, compiled, decode, prefill, probabilities, sample
from tests import conftest
from tests.conftest import assert_user_error
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "checkpoints" / "demo"
SMALL = ROOT / "checkpoints" / "demo-draft"  # of two layers, which compile sooner
STORIES = ROOT.parent / "shared" / "data" / "stories260k"
GREEDY = Sampling(temperature=0)
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")


def tiny_model(**changes):
    """A random fp32 model small enough for hundreds of steps a second."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256} | changes
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**sizes, rms_norm_eps=1e-5, rope_theta=10000.0))
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if name.endswith("norm.weight") else torch.nn.init.normal_(parameter, std=0.3)
    model.eval().requires_grad_(False)
    optimize_(model)
    return model


@pytest.fixture
def model():
    model = tiny_model()
    model.setup_caches(4, 256)
    return model


@pytest.fixture(scope="module")
def stories():
    return json.loads((STORIES / "expected.json").read_text())["greedy_ids"]


def rows_of(steps):
    """Collect the items of `generate` into one list of ids a row."""
    rows = [list(row) for row in zip(*steps, strict=True)]
    return [[token for ids in row for token in ids] for row in rows]


def tokens_of(steps):
    return rows_of(steps)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (Sampling(1.0, top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (Sampling(1.0, top_k=1), [1, 0, 0, 0, 0]),
        (Sampling(1.0, top_k=9), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (Sampling(1.0, top_p=0.75), [2 / 3, 1 / 3, 0, 0, 0]),
        (Sampling(1.0, top_p=0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        (Sampling(1.0, top_p=1e-6), [1, 0, 0, 0, 0]),
        (Sampling(1.0, top_p=1e-46), [1, 0, 0, 0, 0]),
        (Sampling(1e-46), [1, 0, 0, 0, 0]),
        (Sampling(1.0, min_p=0.29), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        (Sampling(1.0, min_p=1.0), [1, 0, 0, 0, 0]),
        # top-k first: of 0.5, 0.25 the likeliest alone has 2/3, which reaches 0.6
        (Sampling(1.0, top_k=2, top_p=0.6), [1, 0, 0, 0, 0]),
        # at temperature 1/2 the probabilities are squared
        (Sampling(0.5, top_k=2), [0.8, 0.2, 0, 0, 0]),
    ],
)
def test_probabilities_match_the_hand_computed(sampling, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(probabilities(LOGITS, sampling), expected, atol=1e-5, rtol=0)


def test_filters_agree_with_transformers():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * 3
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)]
    expected = LogitsProcessorList(warpers)(torch.zeros(50, 1), logits).softmax(-1)
    ours = probabilities(logits, Sampling(0.7, top_k=40, top_p=0.9, min_p=0.02))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_samples_follow_the_distribution():
    """Chi-square over 20,000 draws: 4 degrees of freedom, 18.5 is passed by chance once in a thousand seeds."""
    draws, generator = 20_000, torch.Generator().manual_seed(1)
    noise = torch.empty(draws, 5).exponential_(generator=generator)
    ids = sample(LOGITS.expand(draws, 5), Sampling(1.0), noise)
    expected = LOGITS.exp() * draws
    assert ((ids.bincount(minlength=5) - expected).square() / expected).sum() < 18.5


def test_filtered_ids_are_never_drawn():
    noise = torch.zeros(1, 5)  # the harshest draw: every quotient is infinite or undefined
    assert sample(LOGITS[None], Sampling(1.0, top_k=2), noise).item() in (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@needs_stories
def test_greedy_text_is_the_published_one(stories):
    model = load_model(STORIES, dtype=torch.float32)
    model.setup_caches(1, 256)
    assert tokens_of(generate(model, [[1]], 200, GREEDY)) == stories[1:]


@pytest.fixture(scope="module")
def compiled_steps():
    return {"prefill": compiled(prefill), "decode": compiled(decode)}


@needs_stories
def test_compiled_text_is_the_published_one_and_no_second_prompt_recompiles(stories, compiled_steps):
    model = load_model(STORIES, dtype=torch.float32)
    model.setup_caches(1, 512)
    assert tokens_of(generate(model, [[1]], 200, GREEDY, **compiled_steps)) == stories[1:]
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (2, 3, 64, 65, 100):
            ids = tokens_of(generate(model, [stories[:length]], 80, GREEDY, **compiled_steps))
            assert ids == stories[length : length + 80]
        # a second turn: the cache holds 50 tokens already
        list(generate(model, [stories[:50]], 1, GREEDY, **compiled_steps))
        ids = tokens_of(generate(model, [stories[:90]], 20, GREEDY, cached=50, **compiled_steps))
        assert ids == stories[90:110]


KINDS = {"plain": {}, "biased": {"attention_bias": True, "mlp_bias": True}, "window": {"sliding_window": 20}}


@pytest.mark.parametrize(("first", "kind"), [(1, "plain"), (64, "biased"), (69, "window")])
def test_nothing_recompiles_up_to_the_last_slot_whatever_came_first(monkeypatch, first, kind):
    """The sizes under which the graphs are made leave no trace: as many tokens as slots, a full cache, pieces."""
    monkeypatch.setattr(steps_module, "PREFILL_CHUNK", 66)
    torch._dynamo.reset()
    model = tiny_model(**KINDS[kind], num_hidden_layers=1)
    steps = {"prefill": compiled(prefill), "decode": compiled(decode)}
    model.setup_caches(1, 70)
    list(generate(model, [[1] * first], 2, GREEDY, **steps))
    if first == 69:  # no room for a second token: decode was not needed
        list(generate(model, [[1, 2]], 2, GREEDY, **steps))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (1, 3, 63, 64, 65, 68, 69):
            prompt = [[i % 64 for i in range(length)]]
            assert rows_of(generate(model, prompt, 99, GREEDY, **steps)) == rows_of(generate(model, prompt, 99, GREEDY))


def test_a_second_turn_continues_the_first(model):
    ids = tokens_of(generate(model, [[3, 1, 4, 1, 5]], 30, GREEDY))
    list(generate(model, [[3, 1, 4]], 1, GREEDY))
    assert tokens_of(generate(model, [[3, 1, 4, 1, 5, *ids[:10]]], 20, GREEDY, cached=3)) == ids[10:]


@pytest.mark.parametrize("cached", [3, 4, -1])
def test_a_prompt_of_which_all_or_less_than_nothing_is_cached_is_refused(model, cached):
    with pytest.raises(ValueError, match=f"a prompt has 3 ids and {cached} are cached"):
        next(generate(model, [[3, 1, 4]], 1, GREEDY, cached=cached))


@pytest.mark.parametrize("token", [64, -1])
def test_a_token_id_that_the_model_lacks_is_refused(model, token):
    with pytest.raises(ValueError, match=f"token id {token} and the model 64 ids"):
        next(generate(model, [[3, 1], [3, token, 4]], 1, GREEDY))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 20, 0.95, 0.01)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value, sampling):
    model = tiny_model()
    model.setup_caches(1, 70)
    steps = generate(model, [[3, 1, 4]], 9, sampling)
    next(steps)
    with torch.no_grad():
        model.lm_head.weight[6:8, 0] = torch.tensor([value, -value])
    with pytest.raises(ValueError, match="logits are not finite"):
        next(steps)


def test_a_seed_gives_the_same_ids_compiled_and_not(model, compiled_steps):
    def run(seed, **steps):
        generator = torch.Generator().manual_seed(seed)
        return tokens_of(generate(model, [[5, 6, 7]], 60, Sampling(0.9, 20, 0.95, 0.01), generator=generator, **steps))

    assert run(1) == run(1)
    assert run(1) == run(1, **compiled_steps)
    assert run(1) != run(2)


def test_each_row_of_a_batch_equals_its_own_run(model):
    prompts = [[3], [9, 8, 7, 6, 5], list(range(1, 40)), [11, 12]]
    single = [tokens_of(generate(model, [p], 40, GREEDY)) for p in prompts]
    assert rows_of(generate(model, prompts, 40, GREEDY)) == single


def test_a_batch_of_many_rows_of_which_most_end_early_equals_their_own_runs(model):
    model.setup_caches(20, 128)
    prompts = [[(7 * i + j) % 64 for j in range(1 + 5 * i % 23)] for i in range(20)]
    single = [tokens_of(generate(model, [p], 40, GREEDY)) for p in prompts]
    counts = Counter(token for ids in single for token in set(ids))
    eos = next(token for token, count in counts.most_common() if count < 18)
    ended = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in single]
    assert 8 < sum(len(ids) < 40 for ids in ended) < 20
    assert rows_of(generate(model, prompts, 40, GREEDY, eos_ids=[eos])) == ended


def test_a_run_whose_caches_were_taken_says_so_and_touches_them_no_more():
    model = tiny_model()
    model.setup_caches(4, 128)
    prompts, others = [[3], [9, 8, 7], [11, 12], [1, 2, 3, 4]], [[5], [6, 7], [8], [9, 10]]
    expected = rows_of(generate(model, others, 20, GREEDY))

    def begin():
        run = generate(model, prompts, 60, GREEDY, ended=ended)
        for _ in range(3):
            next(run)
        return run

    ended = [0, 1, 2]  # so that the last text moves to the first row
    older = begin()
    newer = generate(model, others, 20, GREEDY)
    first = next(newer)
    with pytest.raises(ValueError, match="another run, or setup_caches, has taken the model's caches"):
        next(older)
    older.close()
    assert rows_of([first, *newer]) == expected
    ended = []
    older = begin()
    model.setup_caches(4, 128)
    with pytest.raises(ValueError, match="has taken the model's caches"):
        next(older)
    # What an older run has moved is put back before a turn goes on.
    texts = [ids + new for ids, new in zip(prompts, rows_of(generate(model, prompts, 20, GREEDY)), strict=True)]
    turns, cached = [text + [7] for text in texts], min(map(len, texts)) - 1
    whole = rows_of(generate(model, turns, 20, GREEDY))
    rows_of(generate(model, texts, 1, GREEDY))
    older = generate(model, texts, 9, GREEDY, cached=cached, ended=[0, 1, 2])
    for _ in range(3):
        next(older)
    assert rows_of(generate(model, turns, 20, GREEDY, cached=cached)) == whole
    older = generate(model, prompts, 20, GREEDY)
    first = next(older)
    list(generate(model, prompts, 0, GREEDY))  # which takes nothing
    assert len(rows_of([first, *older])[0]) == 20
    for wrong, words in (({"max_new_tokens": -1}, "max_new_tokens is -1"), ({"ended": [-1]}, "ended names row -1")):
        with pytest.raises(ValueError, match=words):
            list(generate(model, prompts, **{"max_new_tokens": 5, "sampling": GREEDY, **wrong}))


def test_a_draft_models_caches_are_taken_too_and_nothing_is_kept():
    model, draft = tiny_model(), tiny_model(num_hidden_layers=1)
    for each in (model, draft):
        each.setup_caches(4, 128)
    prompts = [[3], [9, 8, 7], [11, 12], [1, 2, 3, 4]]
    alone = rows_of(generate(draft, [[5, 6]], 20, GREEDY))
    older = generate(model, prompts, 60, GREEDY, speculation=Speculation(draft, 4), ended=[0, 1, 2])
    for _ in range(4):
        next(older)
    assert rows_of(generate(draft, [[5, 6]], 20, GREEDY)) == alone
    with pytest.raises(ValueError, match="has taken the model's caches"):
        next(older)
    older = generate(model, prompts, 60, GREEDY, speculation=Speculation(draft, 4), ended=[0, 1, 2])
    for _ in range(4):
        next(older)
    draft.setup_caches(1, 128)  # what the older run moved there is no more
    assert len(rows_of(generate(model, prompts[:1], 10, GREEDY))[0]) == 10
    older.close()
    gc.disable()  # nothing needs it to be freed
    try:
        run = generate(model, prompts, 60, GREEDY)
        next(run)
        run.close()
        kept = weakref.ref(model.layers[0].self_attn.cache)
        model.setup_caches(1, 8)
        assert kept() is None
    finally:
        gc.enable()


def test_a_row_that_has_ended_changes_no_other(model):
    prompts = [[3], [9, 8, 7, 6, 5], [11, 12]]
    plain = rows_of(generate(model, prompts, 40, GREEDY))
    eos = plain[1][4]
    ended = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in plain]
    assert rows_of(generate(model, prompts, 40, GREEDY, eos_ids=[eos])) == ended
    assert len(ended[1]) <= 5


EIGHT = [[(7 * i + j) % 64 for j in range(1 + 5 * i % 23)] for i in range(8)]


def watched_sizes(step=decode):
    """Return a list and a step that notes in it how many rows it is given."""
    sizes = []

    def watched(model, tokens, *rest):
        sizes.append(len(tokens))
        return step(model, tokens, *rest)

    return sizes, watched


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_that_have_ended_leave_and_the_others_go_on_as_before(monkeypatch, lag):
    """With a lag too, as on an accelerator, where a step is read after the next one is launched."""
    monkeypatch.setattr(engine_module, "read_behind", lambda steps, lag, read=read_behind, to=lag: read(steps, to))
    model = tiny_model()
    model.setup_caches(8, 128)
    plain = rows_of(generate(model, EIGHT, 40, GREEDY))
    ends = [3, 40, 9, 5, 40, 3, 12, 7]
    sizes, watched = watched_sizes()
    ended, found = set(), [[] for _ in EIGHT]
    for step in generate(model, EIGHT, 40, GREEDY, ended=ended, decode=watched):
        for row, ids in enumerate(step):
            found[row] += ids
        ended |= {row for row, end in enumerate(ends) if len(found[row]) >= end}
    assert found == [ids[:end] for ids, end in zip(plain, ends, strict=True)]
    # After 7 tokens four rows are left, after 12 two.
    assert sizes[:-1] == ([8] * (6 + lag) + [4] * 5 + [2] * 28)[: len(sizes) - 1]
    assert sizes[-1] == 2


def test_what_a_row_draws_does_not_depend_on_rows_that_have_ended():
    model = tiny_model()
    model.setup_caches(8, 128)

    def run(**options):
        generator = torch.Generator().manual_seed(3)
        return rows_of(generate(model, EIGHT, 40, Sampling(0.9, 20), generator=generator, **options))

    plain, (sizes, watched) = run(), watched_sizes()
    eos = Counter(token for ids in plain for token in set(ids)).most_common(1)[0][0]
    found = run(eos_ids=[eos], decode=watched)
    assert found == [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in plain]
    assert sizes[-1] < 8


def test_a_batch_of_which_rows_have_left_can_be_continued():
    """The caches then hold what each row's own turn left there, though one that had ended was longer than the rest."""
    model = tiny_model()
    model.setup_caches(4, 200)
    prompts = [[(7 * i + j * j) % 64 for j in range(length)] for i, length in enumerate((130, 61, 62, 61))]
    plain = rows_of(generate(model, prompts, 30, GREEDY))
    for _ in generate(model, prompts, 30, GREEDY, ended={0, 2}):
        pass
    texts = [prompt + ids[:1] for prompt, ids in zip(prompts, plain, strict=True)]
    assert rows_of(generate(model, texts, 29, GREEDY, cached=61)) == [ids[1:] for ids in plain]


@pytest.mark.parametrize(("lengths", "slots"), [((1, 3), 140), ((4100, 3), 4300)], ids=["short", "long, then short"])
def test_nothing_recompiles_when_rows_leave(lengths, slots):
    """Neither where the last row needs few slots and the one that has left needed more than inductor sums at once."""
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1)
    model.setup_caches(2, slots)
    prompts = [[3] * length for length in lengths]
    engine = Engine(model, Sampling(0.9), decode=compiled(decode))
    warm_up(engine, SimpleNamespace(batches=[prompts], max_seq_length=slots), quiet=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for ends in ({}, {0: 4}, {1: 70}):
            ended = set()
            for count, _ in enumerate(engine.run(prompts, 100, ended=ended), start=1):
                ended |= {row for row, end in ends.items() if count >= end}


def job_of(lengths, slots):
    prompts = [[(7 * i + j) % 5 for j in range(length)] for i, length in enumerate(lengths)]
    return SimpleNamespace(batches=[prompts], max_seq_length=slots)


def cases_named(job, *, max_new_tokens, max_k=0, prefill=prefill):
    speculation = Speculation(max_k=max_k) if max_k else None
    engine = SimpleNamespace(speculation=speculation, decode=compiled(decode), prefill=prefill)
    return list(map(str, cases_to_compile(engine, job, max_new_tokens)))


def test_only_what_a_run_can_reach_is_compiled():
    four = job_of((3, 3, 3, 3), 200)
    assert cases_named(four, max_new_tokens=1, max_k=5) == []
    assert cases_named(four, max_new_tokens=0, prefill=compiled(prefill)) == []
    assert cases_named(four, max_new_tokens=1, prefill=compiled(prefill)) == ["batch of 4, prefill"]
    assert cases_named(four, max_new_tokens=9) == ["batch of 1", "batch of 2", "batch of 4"]
    assert cases_named(job_of((3, 3, 9, 9, 9), 9), max_new_tokens=9) == ["batch of 1", "batch of 2"]
    prefilled = ["batch of 1", "batch of 2", "batch of 3, prefill"]
    assert cases_named(job_of((3, 3, 9), 9), max_new_tokens=9, prefill=compiled(prefill)) == prefilled
    assert cases_named(job_of((3, 3), 200), max_new_tokens=3, max_k=5) == [
        "batch of 1", "batch of 1, 1 draft found", "batch of 2", "batch of 2, 1 draft found",
    ]  # fmt: skip
    one = job_of((3,), 200)
    assert cases_named(one, max_new_tokens=2, max_k=5) == ["batch of 1"]
    assert cases_named(one, max_new_tokens=3, max_k=5) == ["batch of 1", "batch of 1, 1 draft found"]
    drafts = [f"batch of 1, {k}" for k in ("1 draft found", "3 drafts found", "5 drafts found")]
    assert cases_named(one, max_new_tokens=5, max_k=5) == ["batch of 1", *drafts[:2]]
    assert cases_named(one, max_new_tokens=6, max_k=5) == ["batch of 1", *drafts]


@pytest.mark.parametrize("max_k", [0, 1, 5], ids=["plain", "1 draft", "5 drafts"])
@pytest.mark.parametrize("eos_ids", [(), (7, 21, 40)], ids=["to the end", "eos"])
def test_a_run_reaches_nothing_that_is_not_compiled_before(max_k, eos_ids):
    model = tiny_model()
    reached = set()

    def watched_decode(model, tokens, *rest):
        reached.add((len(tokens), 0, False))
        return decode(model, tokens, *rest)

    def watched_round(model, tokens, positions, slots, drafted, *rest):
        reached.add((*drafted.shape, True))
        return draft_and_verify(model, tokens, positions, slots, drafted, *rest)

    for seed, lengths in enumerate(((3,), (3, 3), (4, 9, 4), (2, 9, 11, 3, 5, 12), (5,) * 8)):
        for max_new_tokens in (1, 2, 3, 4, 7, 40):
            slots = min(30, max(lengths) + max_new_tokens)
            job = job_of(lengths, slots)
            model.setup_caches(len(lengths), slots + max_k)
            speculation = Speculation(max_k=max_k, draft_and_verify=watched_round) if max_k else None
            generator = torch.Generator().manual_seed(seed)
            engine = Engine(model, Sampling(1.5), eos_ids, generator, decode=watched_decode, speculation=speculation)
            reached.clear()
            for _ in range(3):
                for _ in engine.run(job.batches[0], max_new_tokens):
                    pass
            expected = {tuple(case) for case in cases_to_compile(engine, job, max_new_tokens)}
            assert reached <= expected


def test_rows_end_at_the_cache_each_at_its_own_length(model):
    model.setup_caches(2, 64)
    rows = rows_of(generate(model, [[1] * 60, [2] * 10], 100, GREEDY))
    assert [len(row) for row in rows] == [4, 54]
    model.setup_caches(1, 64)
    assert rows[1] == tokens_of(generate(model, [[2] * 10], 100, GREEDY))


@pytest.mark.parametrize("chunk", [3, 4, 7, 16])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 17, 31])
def test_prefill_in_pieces_equals_prefill_at_once(model, monkeypatch, chunk, length):
    prompts = [[(7 * i) % 64 for i in range(length)], [5, 4]]
    whole = rows_of(generate(model, prompts, 8, GREEDY))
    monkeypatch.setattr(steps_module, "PREFILL_CHUNK", chunk)
    assert rows_of(generate(model, prompts, 8, GREEDY)) == whole


def test_a_long_prompt_is_prefilled_in_pieces():
    model = tiny_model(max_position_embeddings=2 * PREFILL_CHUNK)
    model.setup_caches(1, 2 * PREFILL_CHUNK)
    prompt = [i % 64 for i in range(PREFILL_CHUNK + 5)]
    logits = model(torch.tensor([prompt]), torch.arange(len(prompt)))
    assert tokens_of(generate(model, [prompt], 1, GREEDY)) == [logits[0, -1].argmax().item()]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_max_new_tokens_is_exact(model, count):
    rows = rows_of(generate(model, [[1, 2]], count, GREEDY))
    assert [len(row) for row in rows] == ([count] if count else [])


def test_a_position_outside_the_caches_is_refused(model):
    with pytest.raises(ValueError, match="positions 256 to 256 are not in the caches' 256 slots"):
        model(torch.tensor([[1]]), torch.tensor([256]))


def test_unused_slots_may_hold_nan(model):
    clean = tokens_of(generate(model, [[3, 4, 5]], 20, GREEDY))
    for block in model.layers:
        block.self_attn.cache.k.fill_(math.nan)
        block.self_attn.cache.v.fill_(math.nan)
    assert tokens_of(generate(model, [[3, 4, 5]], 20, GREEDY)) == clean


def test_a_prompt_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="needs 257 cache slots, the cache has 256"):
        next(generate(model, [[1] * 257], 5, GREEDY))
    with pytest.raises(ValueError, match="empty"):
        next(generate(model, [[]], 5, GREEDY))


def test_a_step_reads_the_slots_of_its_position_and_not_the_whole_cache(model):
    seen = []

    def watched(model, tokens, positions, slots, *rest):
        seen.append(len(slots))
        return decode(model, tokens, positions, slots, *rest)

    list(generate(model, [[1] * 60], 10, GREEDY, decode=watched))
    assert seen == [64] * 4 + [128] * 5


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run_command(*arguments, **environment):
    return conftest.run_command("generate.py", *arguments, cwd=ROOT, **environment)


def run_here(*arguments):
    return conftest.run_forked(generate_module.main, *arguments, cwd=ROOT)


def test_no_argument_is_needed():
    result = run_command()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def")
    assert len(result.stdout) > len("def\n")
    assert "tok/s" in result.stderr and "---" not in result.stderr


LONGER = {
    "longrope": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 32,
            "long_factor": [1 + i / 4 for i in range(32)],
        },
    },
    "dynamic": {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
}


@pytest.mark.parametrize("rope_type", LONGER)
def test_slots_for_drafts_do_not_make_the_text_longer(tmp_path, rope_type):
    """By the length of the text, which ends where the original length does, such a model's rotary embeddings change."""
    shutil.copytree(ROOT / "checkpoints/demo", tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | LONGER[rope_type]))
    words = ["--checkpoint_path", path.parent, "--prompt", "import os", "--dtype", "float32", "--temperature", "0"]
    plain, found = (run_here(*words, "--max_new_tokens", "61", *more) for more in ([], ["--prompt_lookup"]))
    assert plain.returncode == found.returncode == 0, found.stderr
    assert plain.stdout == found.stdout
    assert len(plain.stdout) > 64


def test_metrics_hold_what_the_design_names(tmp_path):
    path = tmp_path / "metrics.json"
    result = run_here("--temperature", 0, "--max_new_tokens", 20, "--prompt", "import ", "--metrics_path", path)
    metrics = json.loads(path.read_text())
    assert {
        "samples", "load_s", "compile_s", "weight_bytes", "bytes_per_step", "bandwidth_gb_per_s", "peak_memory_bytes",
        "device", "dtype", "quantization", "tp", "torch",
    } <= set(metrics)  # fmt: skip
    [row] = metrics["samples"]
    assert row["new_tokens"] == len(row["tokens"]) == 20
    assert row["finish_reason"] == "length"
    assert result.stdout == "import " + row["text"] + "\n"
    assert row["ttft_ms"] > 0
    assert row["decode_tokens_per_s"] > 0
    assert metrics["bandwidth_gb_per_s"] > 0
    assert metrics["compile_s"] == 0 < metrics["load_s"]
    weights = sum(p.nbytes for p in load_model(DEMO).parameters())
    assert metrics["weight_bytes"] == weights
    assert weights < metrics["bytes_per_step"] < weights + 2 * 6 * 2 * 2 * 64 * 40


def test_the_demo_ends_at_eos_and_goes_on_when_told(tmp_path):
    path = tmp_path / "metrics.json"
    prompt = "def clear(self):\n    self.data = None\n"
    options = ("--prompt", prompt, "--max_new_tokens", 300, "--seed", 3, "--num_samples", 4, "--metrics_path", path)
    assert run_here(*options).returncode == 0
    ended = [row for row in json.loads(path.read_text())["samples"] if row["finish_reason"] == "eos"]
    assert ended
    assert all(row["tokens"].index(2) == row["new_tokens"] - 1 for row in ended)
    assert run_here(*options, "--ignore_eos").returncode == 0
    rows = json.loads(path.read_text())["samples"]
    assert {row["finish_reason"] for row in rows} == {"length"}


@pytest.mark.parametrize(("raw", "ids"), [({}, (2,)), ({"eos_token_id": None}, ()), ({"eos_token_id": 5}, (5,))])
def test_a_folder_that_names_no_eos_has_its_tokenizers(tmp_path, raw, ids):
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    config = {key: value for key, value in read_config(DEMO).items() if key != "eos_token_id"}
    (tmp_path / "config.json").write_text(json.dumps(config | raw))
    args = parse_args(["--checkpoint_path", str(tmp_path)])
    assert check(args, ONE_RANK).eos_ids == ids


def test_the_context_ends_a_text_with_a_word(tmp_path):
    path = tmp_path / "metrics.json"
    result = run_here("--prompt_length", 1000, "--ignore_eos", "--metrics_path", path)
    [row] = json.loads(path.read_text())["samples"]
    assert (row["new_tokens"], row["finish_reason"]) == (24, "context")
    assert "context of 1024 tokens is full" in result.stderr


def test_a_batch_prints_each_row_as_its_own_run_would(tmp_path):
    (tmp_path / "prompts.txt").write_text("def \nimport \nclass A")
    options = ("--temperature", 0, "--max_new_tokens", 12, "--dtype", "float32")
    batch = run_here("--prompt_file", tmp_path / "prompts.txt", *options)
    single = [run_here("--prompt", p, *options).stdout for p in ("def ", "import ", "class A")]
    assert batch.stdout == "".join(single)


def test_texts_are_numbered_over_all_batches():
    prompts = ("--prompt", "a", "--prompt", "b", "--prompt", "c")
    said = run_here(*prompts, "--batch_size", 2, "--max_new_tokens", 2).stderr
    found = re.findall(r"^--- .*|ended by", said, re.M)
    assert found == ["--- 1 of 3", "--- 2 of 3", *["ended by"] * 2, "--- 3 of 3", "ended by"]


def test_batches_of_every_size_are_compiled_and_named_before_the_clock_starts(tmp_path):
    (tmp_path / "prompts.txt").write_text("def\nimport\nclass")
    options = ("--prompt_file", tmp_path / "prompts.txt", "--batch_size", 2, "--max_new_tokens", 8, "--compile")
    options += ("--checkpoint_path", SMALL)
    result = run_command(*options, TORCH_LOGS="recompiles")
    assert result.returncode == 0, result.stderr
    assert "Recompiling" in result.stderr  # the second size is another graph
    assert result.stderr.rindex("Recompiling") < result.stderr.index("tokens, ended by")
    named = re.findall("^compiling .*", result.stderr, re.M)
    assert named == ["compiling 1 of 2: batch of 1", "compiling 2 of 2: batch of 2"]


def test_a_prompt_file_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "metrics.json"
    (tmp_path / "prompts.txt").write_bytes("\ufeffa\x0cb\r\n\nc".encode())
    options = ("--prompt_file", tmp_path / "prompts.txt", "--max_new_tokens", 1, "--metrics_path", path)
    assert run_here(*options).returncode == 0
    encode = load_tokenizer(DEMO).encode
    counts = [row["prompt_tokens"] for row in json.loads(path.read_text())["samples"]]
    assert counts == [len(encode("a\x0cb")), 1, len(encode("c"))]


def test_compiled_text_equals_eager(tmp_path):
    options = ("--dtype", "float32", "--seed", 5, "--max_new_tokens", 60, "--checkpoint_path", SMALL)
    compiled_run = run_command(*options, "--compile", "--compile_prefill", "--profile", tmp_path / "trace.json")
    assert compiled_run.returncode == 0, compiled_run.stderr
    assert compiled_run.stdout == run_here(*options).stdout
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_random_weights_need_only_a_config(tmp_path):
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    result = run_here("--checkpoint_path", tmp_path, "--random_weights", "--prompt_length", 4, "--max_new_tokens", 3)
    assert result.returncode == 0, result.stderr
    assert "3 tokens" in result.stderr


@pytest.fixture
def demo_with(tmp_path):
    """Return a copy of the demo whose generation_config.json has further values."""

    def make(values):
        folder = tmp_path / "demo"
        shutil.copytree(DEMO, folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return make


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ({}, [], Sampling()),
        ({"temperature": None, "do_sample": None}, [], Sampling()),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, [], Sampling(0.6, 200, 0.9)),
        ({"do_sample": True, "temperature": 1, "top_k": 7, "min_p": 0.1}, [], Sampling(1.0, 7, 1.0, 0.1)),
        ({"do_sample": False, "temperature": -1}, [], Sampling(0.0)),
        ({"temperature": 0.6, "top_p": 0.9}, [], Sampling(0.0)),  # as in transformers
        ({"do_sample": False, "top_k": -1, "top_p": 0}, [], Sampling(0.0)),
        ({"do_sample": False, "top_p": 0.9}, ["--temperature", 0.5], Sampling(0.5, 200, 0.9)),
        ({"top_k": 5}, ["--temperature", 0.5], Sampling(0.5, 5)),
        ({"do_sample": False}, ["--temperature", 0.5], Sampling(0.5)),
        ({"do_sample": True, "top_k": 0}, ["--temperature", 0, "--top_k", 3], Sampling(0.0, 3)),
        ({"temperature": -1, "top_p": 0.9}, ["--temperature", 2, "--top_p", 1], Sampling(2.0)),
    ],
)
def test_sampling_is_what_is_given_else_the_checkpoints(demo_with, tmp_path, values, options, expected):
    path = tmp_path / "metrics.json"
    options = [*options, "--max_new_tokens", 2, "--metrics_path", path]
    result = run_here("--checkpoint_path", demo_with(values), *options)
    assert result.returncode == 0, result.stderr
    assert json.loads(path.read_text())["sampling"] == asdict(expected)
    last = result.stderr.splitlines()[-1]
    used = [f"{name} {value:g}" for name, value in asdict(expected).items()]
    assert ", ".join(used if expected.temperature else used[:1]) + ";" in last
    assert "generation_config" not in result.stderr


def test_what_a_checkpoint_asks_for_and_is_not_supported_is_named_in_a_line(demo_with):
    asked = {"repetition_penalty": 1.1, "num_beams": 4, "suppress_tokens": [5], "presence_penalty": 1.5}
    neutral = {"typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": [], "token_healing": False}
    result = run_here("--checkpoint_path", demo_with(asked | neutral | {"pad_token_id": 0}), "--max_new_tokens", 2)
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if "generation_config" in line]
    assert line == (
        "generation_config.json asks for num_beams 4, repetition_penalty 1.1, suppress_tokens [5], presence_penalty "
        "1.5: not supported, left out"
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1}, "temperature: -1.0 is out of range, expected at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": -1}, "top_k: -1 is out of range"),
        ({"top_k": 2.5}, "top_k: '2.5' is not a number of type int"),
        ({"top_p": 0}, "top_p: 0.0 is out of range, expected above 0 and at most 1"),
        ({"min_p": 2}, "min_p: 2.0 is out of range"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
    ],
)
def test_a_checkpoints_value_out_of_range_is_one_line(demo_with, values, words):
    result = run_here("--checkpoint_path", demo_with({"do_sample": True} | values))
    assert_user_error(result, "generation_config.json: " + words)


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}, {"top_p": math.nan}]
)
def test_python_cannot_sample_out_of_range_either(values):
    with pytest.raises(ValueError, match="out of range"):
        Sampling(**values)


def test_an_empty_prompt_is_the_bos_alone(tmp_path):
    path = tmp_path / "metrics.json"
    assert run_here("--prompt", "", "--max_new_tokens", 2, "--metrics_path", path).returncode == 0
    assert json.loads(path.read_text())["samples"][0]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top_p", "0"], "--top_p"),
        (["--top_p", "1.5"], "--top_p"),
        (["--min_p", "-0.1"], "--min_p"),
        (["--top_k", "-1"], "--top_k"),
        (["--max_new_tokens", "-5"], "--max_new_tokens"),
        (["--max_new_tokens", "many"], "--max_new_tokens"),
        (["--batch_size", "0"], "--batch_size"),
        (["--dtype", "int3"], "--dtype"),
        (["--promt", "hi"], "unrecognized arguments: --promt hi; did you mean --prompt?"),
        (["--device", "abacus"], "--device abacus is not supported; cpu and cuda are"),
        (["--device", "cuda:99"], "GPUs here); give --device cpu"),
        (["--checkpoint_path", "no/such/folder"], "no/such/folder"),
        (["--checkpoint_path", "tests"], "config.json"),
        (["--prompt_length", "1024"], "1024 tokens and the model's context 1024"),
        (["--prompt_file", "no/such/file"], "no/such/file"),
        (["--prompt", "a", "--prompt_length", "3"], "--prompt"),
        (["--metrics_path", "no/such/folder/m.json"], "no/such/folder"),
        (["--profile", "no/such/folder/p.json"], "no/such/folder"),
        (["--metrics_path", "tests"], "--metrics_path tests"),
        (["--metrics_path", ""], "--metrics_path"),
        (["--profile", "tests"], "--profile tests"),
        (["--stop", ""], "--stop is empty"),
        (["--device", "meta"], "--device meta"),
        (["--device", "hpu"], "--device hpu"),
        (["--prompt_file", "checkpoints/demo/model.safetensors"], "not UTF-8"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, message):
    result = run_here(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} generate.py --seed 1 | head -c 4"
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=conftest.HANG, cwd=ROOT, check=False
    )
    assert result.stdout.startswith("def")
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Imports


MODULES = (
    "model linears kernels.optimize tokenizer config files checkpoint steps speculate engine generate rows likelihood "
    "harness tp cli.report cli.errors cli.arguments cli.ranks cli.options cli.chat cli.template cli.renderer"
)


def test_importing_changes_nothing():
    """Each alone, in a process that is forked from one that has imported torch, which takes seconds."""
    probe = f"""
import os, random, sys, traceback
import torch, torch._inductor.config, torch._dynamo.config
def state():
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(),
        torch.initial_seed(), torch.get_rng_state().sum().item(), random.getstate(), dict(os.environ),
        torch.cuda.is_initialized(), torch.distributed.is_available() and torch.distributed.is_initialized(),
        torch._inductor.config.save_config_portable(), torch._dynamo.config.save_config_portable(),
    )
def check(name):
    before = state()
    __import__(name)
    assert state() == before, name
    assert not any("matplotlib" == m or "transformers" == m or "tiktoken" == m for m in sys.modules), name
checked = 0
for name in {MODULES!r}.split():
    if (child := os.fork()) == 0:
        status = 1
        try:
            check(name)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, name
    checked += 1
print(checked)
"""
    result = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(MODULES.split())


def test_compile_without_a_compiler_is_one_line():
    result = run_command("--compile", "--max_new_tokens", 2, CXX="no-such-compiler")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --compile on a CPU needs a C++ compiler, and 'no-such-compiler' can")
    assert result.stderr.count("\n") == 1
