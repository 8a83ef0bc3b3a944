"""What holds for any input: of sampling, positions, stop texts, packed codes and cut texts.

The properties of one file's own functions stand with its other tests: packing in test_quantize.py, streams of text in
test_tokenizer.py, config.json in test_checkpoint.py; changed bytes of checkpoints in test_hostile.py.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import steps
from kernels.layers import MAX_ROWS
from linears import dequantize, pack_nibbles, unpack_nibbles
from rows import Row, num_pending
from steps import SLOTS_STEP, Sampling, draw, probabilities, prompt_chunks, sample, visible_slots
from tokenizer import TextStream, Tokenizer, cut_whitespace

thorough = settings(max_examples=200, deadline=None, derandomize=True, database=None)
# A few values, so that equal ones are common, and any others; -inf is what a mask leaves.
LOGITS = st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 20.0, -torch.inf]) | st.floats(-3e4, 3e4, width=32), min_size=1, max_size=40
).filter(lambda values: max(values) > -torch.inf)
TEMPERATURES = st.sampled_from([1e-300, 1e-30, 1e-3, 0.8, 1.0, 1e4, 1e30]) | st.floats(1e-6, 1e3)
SHARES = st.sampled_from([0.0, 1e-12, 0.5, 1.0]) | st.floats(0, 1)
SAMPLINGS = st.builds(
    Sampling, TEMPERATURES, st.integers(0, 45), SHARES.map(lambda share: share or 1.0), SHARES
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@thorough
@given(LOGITS, SAMPLINGS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_probabilities_are_a_distribution_over_the_likeliest(
    values: list[float], sampling: Sampling, dtype: torch.dtype
) -> None:
    logits = torch.tensor(values).to(dtype)
    p = probabilities(logits, sampling)
    assert p.isfinite().all() and (p >= 0).all()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    kept, equal = p > 0, 1e-6 * sampling.temperature  # what differs by less has the same p
    assert kept[logits >= logits.max() - equal].any(), "the likeliest is never filtered"
    assert not kept[logits == -torch.inf].any()
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max() - equal, "what is kept is likelier than what is not"


@thorough
@given(LOGITS, st.integers(1, 40))
def test_top_k_keeps_k_and_what_equals_the_last_of_them(values: list[float], k: int) -> None:
    logits = torch.tensor(values).clamp(-20, 20)
    kept = probabilities(logits, Sampling(1.0, top_k=k)) > 0
    smallest = logits.sort(descending=True).values[min(k, len(values)) - 1]
    assert torch.equal(kept, logits >= smallest)


@thorough
@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_the_mass(values: list[float], top_p: float) -> None:
    logits = torch.tensor(values).clamp(-20, 20)
    p = probabilities(logits, Sampling(1.0)).double()
    kept = probabilities(logits, Sampling(1.0, top_p=top_p)) > 0
    assert p[kept].sum() >= top_p - 1e-5
    assert p[kept].sum() - p[kept].min() < top_p + 1e-5, "without the least of them they would not"


@thorough
@given(LOGITS, st.floats(0, 1))
def test_min_p_keeps_what_is_that_share_of_the_likeliest(values: list[float], min_p: float) -> None:
    logits = torch.tensor(values).clamp(-20, 20)
    shares = (logits - logits.max()).double().exp()
    kept = probabilities(logits, Sampling(1.0, min_p=min_p)) > 0
    assert (shares[kept] >= min_p * (1 - 1e-5)).all() and (shares[~kept] <= min_p * (1 + 1e-5)).all()


@thorough
@given(LOGITS, SAMPLINGS, st.integers(0, 2**32))
def test_what_is_drawn_was_kept(values: list[float], sampling: Sampling, seed: int) -> None:
    logits = torch.tensor([values])
    noise = torch.empty(1, len(values)).exponential_(generator=torch.Generator().manual_seed(seed))
    p = probabilities(logits, sampling)
    for each in (noise, noise * 1e-38, noise * 1e30):  # the least and the largest that fp32 draws come near to
        assert p[0, draw(p, each)] > 0
    assert p[0, sample(logits, sampling, noise)] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Positions


@thorough
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), min_size=1, max_size=4), st.data())
def test_chunks_write_each_prompt_to_its_own_slots_and_end_together(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    chunk = data.draw(st.sampled_from([MAX_ROWS + 1, 32, 64, 2048]))
    prompts = [[100 * row + at for at in range(length)] for row, (length, _) in enumerate(rows, start=1)]
    starts = [start for _, start in rows]
    caches: list[dict[int, int]] = [{} for _ in rows]
    columns: tuple[Tensor, Tensor] | None = None
    num_chunks = 0
    is_compiled = data.draw(st.booleans())
    step, shortest = (steps.compiled(steps.prefill), MAX_ROWS + 1) if is_compiled else (steps.prefill, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "PREFILL_CHUNK", chunk)
        for tokens, positions, filled in prompt_chunks(prompts, starts, torch.device("cpu"), step):
            assert tokens.shape == positions.shape and tokens.is_contiguous() and positions.is_contiguous()
            assert shortest <= tokens.shape[1] <= max(chunk, MAX_ROWS + 1) + MAX_ROWS
            assert filled == positions.max() + 1
            for cache, ids, places in zip(caches, tokens.tolist(), positions.tolist(), strict=True):
                assert places == sorted(places)
                cache.update(zip(places, ids, strict=True))
            columns = tokens[:, -1], positions[:, -1]
            num_chunks += 1
        other_step = steps.prefill if is_compiled else steps.compiled(steps.prefill)
        others = [len(tokens[0]) for tokens, *_ in prompt_chunks(prompts, starts, torch.device("cpu"), other_step)]
    for cache, prompt, start in zip(caches, prompts, starts, strict=True):
        assert cache == dict(enumerate(prompt, start)), "no slot before its start, none after its end"
    assert len(others) == num_chunks, "a seed draws noise for each chunk, and the same compiled or not"
    assert columns is not None
    assert columns[0].tolist() == [prompt[-1] for prompt in prompts]
    assert columns[1].tolist() == [start + len(prompt) - 1 for prompt, start in zip(prompts, starts, strict=True)]


@thorough
@given(st.integers(1, 5000), st.integers(1, 6000))
def test_visible_slots_cover_the_text_in_whole_steps(capacity: int, length: int) -> None:
    slots = visible_slots(torch.arange(capacity), length)
    assert torch.equal(slots, torch.arange(len(slots)))
    assert len(slots) == min(capacity, SLOTS_STEP * math.ceil(length / SLOTS_STEP))


# ---------------------------------------------------------------------------------------------------------------------
# Texts

# Tokens that overlap in every way, and the bytes of é and 🦙, which come one by one.
PIECES = [b"", b"a", b"b", b"ab", b"ba", b"aab", *(bytes([byte]) for byte in "é🦙".encode()), b"\n"]
LETTERS = Tokenizer(dict(enumerate(PIECES)), lambda text, special: [], None)
IDS = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)
STOPS = st.lists(st.text("abé\n🦙", min_size=1, max_size=4), max_size=3)


def split(ids: list[int], data: st.DataObject) -> list[list[int]]:
    ends = [0, *sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8))), len(ids)]
    return [ids[begin:end] for begin, end in pairwise(ends)]


def shown(groups: list[list[int]], stops: list[str]) -> tuple[str, Row]:
    row = Row([], TextStream(LETTERS), stops)
    return "".join(row.push(ids, ()) for ids in groups) + row.finish("length"), row


@thorough
@given(IDS, STOPS, st.data())
def test_a_text_ends_before_a_stop_however_its_tokens_come(
    ids: list[int], stops: list[str], data: st.DataObject
) -> None:
    whole = LETTERS.decode(ids)
    text, row = shown(split(ids, data), stops)
    assert text == row.text == shown([[i] for i in ids], stops)[0]
    assert whole.startswith(text) and not any(stop in text for stop in stops)
    if row.finish_reason == "stop":
        assert any(whole[len(text) :].startswith(stop) for stop in stops)
        assert row.tokens == ids[: len(row.tokens)]
    else:
        assert text == whole and row.tokens == ids


@thorough
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_what_is_held_back_is_all_that_could_become_a_stop(text: str, stops: list[str]) -> None:
    assume(not any(stop in text for stop in stops))  # else it has ended already
    ends = [text[at:] for at in range(len(text))]
    sizes = [len(end) for end in ends if any(stop.startswith(end) for stop in stops)]
    assert num_pending(text, stops) == max(sizes, default=0)


@thorough
@given(st.text(" \n\ta\u3000", max_size=200), st.integers(1, 20))
def test_cut_whitespace_loses_nothing_and_leaves_no_run_longer(text: str, longest: int) -> None:
    pieces = cut_whitespace(text, longest)
    assert "".join(pieces) == text
    for piece in pieces:
        assert all(len(run) <= longest for run in "".join(" " if c.isspace() else "x" for c in piece).split("x"))
    if longest >= len(text):
        assert pieces == [text]


# ---------------------------------------------------------------------------------------------------------------------
# Packed codes


@thorough
@given(st.lists(st.binary(min_size=3, max_size=3), min_size=1, max_size=8), st.sampled_from([5, 6]))
def test_any_bytes_are_codes_that_pack_to_themselves(rows: list[bytes], num_columns: int) -> None:
    packed = torch.tensor([list(row) for row in rows], dtype=torch.uint8)
    codes = unpack_nibbles(packed, num_columns)
    assert codes.shape == (len(rows), num_columns) and codes.max() <= 15
    again = pack_nibbles(codes)
    assert torch.equal(again if num_columns == 6 else again[:, :2], packed if num_columns == 6 else packed[:, :2])
    scales, zeros = torch.ones(len(rows), 1), torch.full((len(rows), 1), 8, dtype=torch.uint8)
    assert torch.equal(dequantize(codes, scales, zeros, 32), codes.float() - 8)
