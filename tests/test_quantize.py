"""int8, int4 and GPTQ: the arithmetic, the quantizable_linears, and the command."""

import copy
import itertools
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quantize
from calibration import write_windows
from checkpoint import load_model, meta_model, save_hub_checkpoint
from cli.report import step_weight_bytes, weight_bytes
from compressed import quantization_config
from config import parse_config, read_config
from engine import generate
from generate import main
from gptq import Calibration, gptq, gptq_stack
from kernels.cpu import CpuInt4, CpuInt8, dtypes
from kernels.layers import MAX_ROWS, AtenInt4, AtenInt8
from kernels.optimize import optimize_
from linears import (
    GROUP_SIZES,
    Form,
    StoredLinear,
    dequantize,
    pack_nibbles,
    quantizable_linears,
    quantize_linear,
    quantize_weight,
    unpack_nibbles,
)
from model import Experts, Linear, MoE, Transformer
from names import hub_shapes
from random_weights import random_model
from speculate import Speculation
from steps import Sampling, compiled, decode, prefill
from tests.conftest import (
    NEWER,
    REPO,
    HubCheckpoint,
    assert_user_error,
    run_command,
    run_forked,
    shared_data,
    small_disk,
)
from tests.rounded import quantize_int4, quantize_int8
from tests.test_model import choices, keep_only_
from tokenizer import load_tokenizer

GetCheckpoint = Callable[[str], HubCheckpoint]
DEMO = REPO / "checkpoints/demo"
INT4 = Form(4, 32, has_zeros=True)
ROUNDED = [Form(8), Form(8, 64), Form(4, 32, has_zeros=True), Form(4, 128), Form(4, has_zeros=True)]
MODES_AND_FORMS = [(f"int{form.bits}", form) for form in ROUNDED]
MODES_AND_FORMS += [("int4-gptq", Form(4, 32, has_zeros=True)), ("int4-gptq", Form(4, 64)), ("int8-gptq", Form(8, 64))]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(N: int, K: int, bias: bool = False, seed: int = 0) -> Linear:
    child = Linear(K, N, bias)
    child.weight.data = normal(N, K, seed=seed)
    if child.bias is not None:
        child.bias.data = normal(N, seed=seed + 1)
    return child.requires_grad_(False)


def on_this_device(stored: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return what `optimize_` makes of one linear in a model of this dtype."""
    model = random_model(read_config(DEMO), dtype=dtype, optimize=False)
    model.lm_head = stored  # type: ignore[assignment]
    if getattr(stored, "bias", None) is not None:
        stored.bias.data = stored.bias.data.to(dtype)
    optimize_(model)
    return model.lm_head


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@given(st.integers(1, 9), st.integers(1, 99), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_unpacking_undoes_packing(N: int, K: int, seed: int) -> None:
    codes = torch.randint(16, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(codes)
    assert packed.shape == (N, math.ceil(K / 2))
    assert torch.equal(unpack_nibbles(packed, K), codes)


def test_an_even_column_is_the_low_half_of_its_byte() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 15]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


@given(st.integers(1, 6), st.integers(1, 300), st.sampled_from([1e-20, 1e-3, 1.0, 1e4]), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_no_weight_moves_by_more_than_half_a_step(N: int, K: int, size: float, seed: int) -> None:
    weight = size * normal(N, K, seed=seed)
    for group_size in (K, *GROUP_SIZES):
        codes, scales = quantize_int8(weight, group_size)
        error = (dequantize(codes, scales, 0, group_size) - weight).abs()
        assert (error <= 0.51 * scales.float().repeat_interleave(group_size, dim=1)[:, :K]).all()
        for symmetric in (False, True):
            codes, scales, zeros = quantize_int4(weight, group_size, symmetric)
            error = (dequantize(codes, scales, zeros, group_size) - weight).abs()
            # Half a step, and what bf16 rounds the scale by, 15 times. Symmetric, one end has a code less.
            step = scales.float().abs().repeat_interleave(group_size, dim=1)[:, :K]
            assert (error <= ((1 if symmetric else 0.5) + 15 / 256) * step).all()
            assert not symmetric or (zeros == 8).all()


def test_a_row_of_equal_weights_or_zeros_stays_what_it_is() -> None:
    weight = torch.tensor([0.0, 0.5, -2.0]).unsqueeze(1).expand(3, 40)
    codes, scales = quantize_int8(weight)
    torch.testing.assert_close(dequantize(codes, scales), weight, rtol=1 / 128, atol=0)
    torch.testing.assert_close(dequantize(*quantize_int4(weight, 32), 32), weight, rtol=1 / 128, atol=1e-9)


def test_int8_codes_are_symmetric_and_use_the_whole_range() -> None:
    codes, _ = quantize_int8(normal(64, 256))
    assert codes.min() >= -127
    assert (codes.abs().amax(dim=1) >= 126).all()


# ---------------------------------------------------------------------------------------------------------------------
# The linears


# What the kernels take, and what they do not: rows of 12 or 63, columns that no group divides.
SHAPES = [(64, 128), (128, 256), (12, 64), (63, 61), (64, 172), (16, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [Form(8), Form(4, 32, has_zeros=True), Form(4, 64, has_zeros=True)], ids=str)
def test_a_quantized_linear_equals_its_explicit_dequantized_product(
    form: Form, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    stored = quantize_linear(filled(*shape, bias=True), form)
    assert stored.bias is not None
    weight, bias = stored.dequantize().double(), stored.bias.data.to(dtype).double()
    ready = on_this_device(stored, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for leading in ((1,), (3,), (MAX_ROWS,), (MAX_ROWS + 1,), (2, 5)):
        x = normal(*leading, shape[1], seed=7).to(dtype)
        expected = x.double() @ weight.t() + bias
        y = ready(x)
        assert y.dtype == dtype and y.shape == (*leading, shape[0])
        assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [None, Form(8), Form(4, 32, has_zeros=True)], ids=str)
def test_each_row_of_a_stack_is_multiplied_with_its_experts_dequantized_weight(
    form: Form | None, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    child = Experts(3, shape[1], shape[0])
    child.weight.data = normal(3, *shape)
    if form is None:
        stored: nn.Module = child.to(dtype).requires_grad_(False)
        weight = child.weight.double()
    else:
        stored = quantize_linear(child.requires_grad_(False), form)
        weight = stored.dequantize().double()
    ready = on_this_device(stored, dtype)
    for M, A in ((1, 2), (5, 1), (MAX_ROWS, 2), (2 * MAX_ROWS, 2)):
        x = normal(M, A, shape[1], seed=7).to(dtype)
        experts = torch.randint(3, (M, A), generator=torch.Generator().manual_seed(M))
        y = ready(x, experts)
        expected = torch.stack([x.double()[m] @ weight[0].t() for m in range(M)])
        for m, a in [(m, a) for m in range(M) for a in range(A)]:
            expected[m, a] = weight[experts[m, a]] @ x[m, a].double()
        assert y.dtype == dtype and y.shape == (M, A, shape[0])
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [Form(8), Form(4, 32, has_zeros=True)], ids=str)
def test_experts_that_are_not_chosen_are_not_read(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, form: Form, dtype: torch.dtype
) -> None:
    path = quantized(hub_checkpoint("mixtral").path, tmp_path / "out", *arguments(form))
    model = load_model(path, dtype=dtype)
    expected, chosen = choices(model, torch.tensor([[5]]))
    keep_only_(model, chosen)
    assert torch.equal(model(torch.tensor([[5]]), torch.arange(1)), expected)
    of_stacks = sum(p.nbytes for name, p in model.named_parameters() if "_up_proj" in name or "down_proj" in name)
    assert step_weight_bytes(model) == weight_bytes(model) - model.embed_tokens.weight.nbytes - of_stacks * 3 // 5


@pytest.mark.parametrize("form", [Form(8), Form(4, 32, has_zeros=True)], ids=str)
def test_scales_below_float16_are_not_lost_in_it(form: Form) -> None:
    child = filled(64, 128)
    child.weight.data *= 1e-6
    ready = on_this_device(quantize_linear(child, form), torch.float16)
    x = 1000 * normal(1, 128, seed=7).half()
    expected = x.double() @ quantize_linear(child, form).dequantize().double().t()
    # A kernel holds the scales as they are; without one float16 holds the weight, of which it keeps the first bits.
    assert (ready(x).double() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_layers_stay_alike_where_float16_loses_the_scales_of_one() -> None:
    """Else a graph compiled for a model, guarded by its first layer, would read another's scales as another dtype."""
    model = random_model(read_config(DEMO), dtype=torch.float16, optimize=False)
    for i, block in enumerate(model.layers):
        for child in (block.mlp.gate_up_proj, block.mlp.down_proj):
            child.weight.data = normal(*child.weight.shape) * (1e-6 if i == 1 and child is block.mlp.down_proj else 1)
        block.mlp.gate_up_proj = quantize_linear(block.mlp.gate_up_proj, Form(8))
        block.mlp.down_proj = quantize_linear(block.mlp.down_proj, Form(8))
    optimize_(model)
    kinds = [
        {type(getattr(layer, "stored", layer)) for layer in layers}
        for layers in zip(*((block.mlp.down_proj, block.mlp.gate_up_proj) for block in model.layers), strict=True)
    ]
    # A kernel that takes float16 holds the scales as they are.
    assert kinds == ([{CpuInt8}] * 2 if torch.float16 in dtypes() else [{StoredLinear}, {AtenInt8}])


def test_the_kernels_run_where_the_shape_allows() -> None:
    def kind(form: Form, N: int, K: int, dtype: torch.dtype = torch.float32) -> type:
        layer = on_this_device(quantize_linear(filled(N, K), form), dtype)
        return type(getattr(layer, "stored", layer))

    assert kind(Form(8), 64, 128) is AtenInt8
    assert kind(Form(8), 63, 61) is StoredLinear
    assert kind(Form(4, 32, has_zeros=True), 64, 128) is AtenInt4
    assert kind(Form(4, 32, has_zeros=True), 64, 172) is StoredLinear
    taken = torch.bfloat16 in dtypes()  # which need no whole blocks of outputs
    for N in (48, 36, 33):
        assert kind(Form(8), N, 128, torch.bfloat16) is (CpuInt8 if taken else StoredLinear if N == 33 else AtenInt8)
        assert kind(Form(8, 32), N, 128, torch.bfloat16) is (CpuInt8 if taken else StoredLinear)
    assert kind(Form(4, 32, has_zeros=True), 33, 128, torch.bfloat16) is (CpuInt4 if taken else StoredLinear)


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ


def correlated_inputs(num: int, K: int) -> Tensor:
    return normal(num, K, seed=3) @ normal(K, K, seed=4) / K**0.5 * torch.linspace(0.1, 3, K)


def output_error(weight: Tensor, quantized: tuple[Tensor, Tensor, Tensor], group_size: int, x: Tensor) -> float:
    return (x @ (dequantize(*quantized, group_size) - weight).t()).square().mean().item()


@pytest.mark.parametrize("K", [96, 172, 320])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_nearer_on_its_calibration_inputs_than_rounding(
    K: int, act_order: bool, group_size: int, bits: int
) -> None:
    weight, x = normal(48, K), correlated_inputs(500, K)
    form = Form(bits, group_size, has_zeros=bits == 4)
    rounded = output_error(weight, quantize_weight(weight, form), group_size, x)
    chosen = output_error(weight, gptq(weight, form, x.t() @ x, act_order), group_size, x)
    assert chosen < 0.8 * rounded


def test_int8_of_gptq_chooses_the_head_on_what_comes_out_of_the_last_norm(hub_checkpoint: GetCheckpoint) -> None:
    reference = hub_checkpoint("gqa")
    plain, by_gptq = (load_model(reference.path, dtype=torch.float32, optimize=False) for _ in range(2))
    form, state = Form(8), dict(plain.named_parameters())
    calibration = Calibration(by_gptq, plain.embed_tokens.weight, reference.tokens, form)
    *_, last = quantize.quantized_parts(by_gptq, state.__getitem__, form, calibration)
    x = plain.norm(torch.cat(calibration.hidden)).flatten(0, 1)
    x /= x.norm(dim=-1, keepdim=True)
    weight = plain.lm_head.weight.detach()
    chosen = dequantize(last["lm_head.weight"].data, last["lm_head.scales"].data)
    rounded = dequantize(*quantize_int8(weight))
    errors = [(x @ (values - weight).t()).square().mean() for values in (chosen, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_the_column_with_the_largest_inputs_is_rounded_first_unless_told_otherwise() -> None:
    weight, x = normal(48, 64), correlated_inputs(500, 64)
    largest = x.square().sum(dim=0).argmax()
    rounded = quantize_int4(weight, 32)[0][:, largest]  # what nothing was compensated for before
    for options, first in (((), True), (("--act_order",), True), (("--no-act_order",), False)):
        args = quantize.parse_args(["--mode", "int4-gptq", *options])
        assert torch.equal(gptq(weight, INT4, x.t() @ x, args.act_order)[0][:, largest], rounded) == first


def test_gptq_on_independent_inputs_is_rounding_to_nearest() -> None:
    weight = normal(8, 64)
    for ours, theirs in zip(gptq(weight, INT4, torch.eye(64)), quantize_int4(weight, 32), strict=True):
        assert torch.equal(ours, theirs)


def test_gptq_takes_inputs_that_never_vary_and_fewer_inputs_than_columns() -> None:
    weight, x = normal(8, 64), correlated_inputs(5, 64)
    x[:, 10:20] = 0
    rounded = output_error(weight, quantize_int4(weight, 32), 32, x)
    assert output_error(weight, gptq(weight, INT4, x.t() @ x), 32, x) < rounded
    assert torch.equal(gptq(weight, INT4, torch.zeros(64, 64))[0], quantize_int4(weight, 32)[0])


def test_gptq_refuses_inputs_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        gptq(normal(8, 64), INT4, torch.full((64, 64), torch.inf))


def test_the_hessians_are_of_the_inputs_that_the_linears_see_each_as_long_as_the_others(
    hub_checkpoint: GetCheckpoint,
) -> None:
    reference = hub_checkpoint("gqa")
    model = load_model(reference.path, dtype=torch.float32, optimize=False)
    block, seen = model.layers[0], {}
    for name, child in quantizable_linears(block).items():
        child.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: inputs[0].flatten(0, 1)}))
    model(reference.tokens, torch.arange(reference.tokens.shape[1]))
    unit = {name: x / x.norm(dim=-1, keepdim=True) for name, x in seen.items()}
    expected = {name: x.t() @ x for name, x in unit.items()}
    calibration = Calibration(model, model.embed_tokens.weight, reference.tokens, Form(4, 32, has_zeros=True))
    for name, encoder in calibration.encoders(block).items():
        assert isinstance(encoder, partial)
        torch.testing.assert_close(encoder.keywords["hessian"], expected.pop(name), rtol=1e-4, atol=1e-3)
    assert not expected


def test_the_hessians_of_one_block_are_held_at_a_time(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, held, most = Calibration.encoders, weakref.WeakSet[Tensor](), []

    def encoders(calibration: Calibration, block: nn.Module) -> Any:
        made = make(calibration, block)
        most.append(len(held))
        held.update(encoder.keywords["hessian"] for encoder in made.values() if isinstance(encoder, partial))
        return made

    monkeypatch.setattr(Calibration, "encoders", encoders)
    source, state = meta_model(read_config(stories)), dict(load_model(stories, optimize=False).named_parameters())
    form, tokens = Form(4, 32, has_zeros=True), torch.ones(2, 16, dtype=torch.long)
    calibration = Calibration(source, state["embed_tokens.weight"], tokens, form)
    list(quantize.quantized_parts(source, state.__getitem__, form, calibration))
    assert most == [0] * len(source.layers)


@pytest.mark.parametrize("family", NEWER)
@torch.no_grad()
def test_gptq_of_each_family_is_nearer_than_rounding_and_its_draft_leaves_the_text_alone(
    hub_checkpoint: GetCheckpoint, family: str
) -> None:
    reference = hub_checkpoint(family)
    model = load_model(reference.path, dtype=torch.float32, optimize=False)
    by_gptq, rounded = (copy.deepcopy(model) for _ in range(2))
    calibration = Calibration(model, model.embed_tokens.weight, reference.tokens, Form(4, 32, has_zeros=True))
    for i, block in enumerate(by_gptq.layers):
        encoders = calibration.encoders(block)
        for target in (block, rounded.layers[i]):
            for name, child in quantizable_linears(target).items():
                encode = encoders[name] if target is block else None
                target.set_submodule(name, quantize_linear(child, Form(4, 32, has_zeros=True), encode))
        calibration.advance(block)
    positions = torch.arange(reference.tokens.shape[1])
    ours, theirs = ((m(reference.tokens, positions) - reference.logits).norm() for m in (by_gptq, rounded))
    assert ours < 0.95 * theirs
    speculation = Speculation(by_gptq, levels=(3,))
    for each in (model, by_gptq):
        each.setup_caches(1, 64)
    texts = [
        list(
            itertools.chain(
                *(step[0] for step in generate(model, [[1, 5, 9]], 40, Sampling(temperature=0), speculation=draft))
            )
        )
        for draft in (None, speculation)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 40
    assert sum(speculation.accept_counts[0][1:]) > 0


def scarce_router_(model: Transformer) -> None:
    """Let every token go to two of the first four experts, never to the fifth."""
    for block in model.layers:
        assert isinstance(block.mlp, MoE)
        one = block.mlp.gate.weight.data[0].clone()
        block.mlp.gate.weight.data = torch.stack([one, -one, 2 * one, -2 * one, 0 * one])


def test_gptq_calibrates_each_expert_on_the_tokens_that_go_to_it(hub_checkpoint: GetCheckpoint) -> None:
    reference = hub_checkpoint("mixtral")
    model = load_model(reference.path, dtype=torch.float32, optimize=False)
    scarce_router_(model)
    block, seen = model.layers[0], {}
    hooks = [
        child.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: inputs}))
        for name, child in quantizable_linears(block).items()
        if name.startswith("mlp")
    ]
    model(reference.tokens, torch.arange(reference.tokens.shape[1]))
    for hook in hooks:
        hook.remove()
    calibration = Calibration(model, model.embed_tokens.weight, reference.tokens, Form(4, 32, has_zeros=True))
    encoders = calibration.encoders(block)
    for name, (x, experts) in seen.items():
        encoder, weight = encoders[name], quantizable_linears(block)[name].weight
        assert isinstance(encoder, partial)
        codes, scales, zeros = encoder(weight)
        for i in range(5):
            rows = x[experts == i]
            unit = rows / rows.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(encoder.keywords["hessian"][i], unit.t() @ unit, rtol=1e-4, atol=1e-3)
            rounded = quantize_int4(weight[i], 32)
            if i == 4:
                assert len(rows) == 0 and torch.equal(codes[i], rounded[0])
            else:
                ours = output_error(weight[i], (codes[i], scales[i], zeros[i]), 32, rows)
                assert len(rows) > 10 and ours < 0.95 * output_error(weight[i], rounded, 32, rows)
    calibration.advance(block)
    calibration.encoders(model.layers[1])
    warning = calibration.warning()
    assert warning is not None and "expert 4 of layer 0 the fewest: 0;" in warning and calibration.scarce[1, 4] == 0


@pytest.mark.parametrize("num_rows", [1, 4, 16, 64, 128, 256, 1024])
@pytest.mark.parametrize("decay", [0, 1])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 256)])
def test_few_tokens_are_never_far_worse_than_rounding_on_others(
    num_rows: int, decay: float, bits: int, group_size: int
) -> None:
    K = 256
    mixing = normal(K, K, seed=1) @ torch.diag(torch.arange(1, K + 1) ** -float(decay)) @ normal(K, K, seed=2) / K
    weight = normal(48, K)
    x, others = normal(num_rows, K, seed=3) @ mixing, normal(2000, K, seed=4) @ mixing
    unit = F.normalize(x, dim=-1)
    form = Form(bits, group_size, has_zeros=bits == 4)
    chosen = gptq(weight, form, unit.t() @ unit)
    stacked = gptq_stack(weight[None], form, (unit.t() @ unit)[None])
    assert all(torch.equal(*both) for both in zip(chosen, (values[0] for values in stacked), strict=True))
    rounded = quantize_weight(weight, form)
    assert output_error(weight, chosen, group_size, others) < 1.05 * output_error(weight, rounded, group_size, others)


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint, quantized


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of odd sizes: 64 and 172 columns, head_dim 8."""
    return shared_data("stories260k")


def quantized(source: Path, output: Path, *args: object) -> Path:
    quantize.main(["--checkpoint_path", str(source), "--output_path", str(output), *map(str, args)])
    return output


def arguments(form: Form, mode: str | None = None) -> list[object]:
    mode = mode or f"int{form.bits}"
    group = ["--groupsize", form.group_size or -1, *["--symmetric"] * (form.bits == 4 and not form.has_zeros)]
    calibration = ["--calibration_samples", 4, "--calibration_length", 64] if mode.endswith("-gptq") else []
    return ["--mode", mode, *group, *calibration]


def plain_twin(path: Path) -> Transformer:
    """Load a quantized checkpoint as the plain model in fp32 whose weights its codes stand for."""
    from safetensors.torch import load_file

    stored = load_file(path / "model.safetensors")
    raw = read_config(path)
    groups = raw.pop("quantization_config")["config_groups"].values()
    for base in [name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed")]:
        words, scales = stored.pop(f"{base}_packed"), stored.pop(f"{base}_scale").double()
        N, K = stored.pop(f"{base}_shape").tolist()
        # As other programs find a module's group, which they need for more than its size.
        [group] = [g for g in groups if re.match(g["targets"][0].removeprefix("re:"), base.removesuffix(".weight"))]
        bits = 4 if words.shape[1] == -(-K // 8) else 8

        def codes(words: Tensor, bits: int = bits) -> Tensor:
            shifts = torch.arange(0, 32, bits)
            return (words.long().unsqueeze(-1) >> shifts & 2**bits - 1).flatten(-2)

        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if f"{base}_zero_point" in stored:
            zeros = codes(stored.pop(f"{base}_zero_point").t())[:, :N].t().double()
        group_size = group["weights"]["group_size"] or K
        group_of = torch.tensor([column // group_size for column in range(K)])
        stored[base] = (codes(words)[:, :K] - zeros[:, group_of]) * scales[:, group_of]
    model = Transformer(meta_model({**raw, "tie_word_embeddings": False}).config)
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        whole = torch.cat([stored[part] for part in hub_shapes(name, parameter.shape, model.config)]).float()
        state[name] = whole.view(parameter.shape)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", [*("gqa", "tied", "biased", "qwen2", "qwen3", "mixtral", "mixtral_tied"), *NEWER])
@pytest.mark.parametrize("form", [Form(8), Form(4, 32, has_zeros=True), Form(4, 256, has_zeros=True)], ids=str)
def test_a_loaded_checkpoint_computes_with_the_stored_codes(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, family: str, form: Form
) -> None:
    reference = hub_checkpoint(family)
    path = quantized(reference.path, tmp_path / "out", *arguments(form))
    positions = torch.arange(reference.tokens.shape[1])
    logits = load_model(path, dtype=torch.float32)(reference.tokens, positions)
    torch.testing.assert_close(logits, plain_twin(path)(reference.tokens, positions), atol=1e-4, rtol=0)
    # And those are the model's own, rounded: not another model's.
    assert (logits - reference.logits).std() < 0.5 * reference.logits.std()


def test_the_head_is_int8_and_in_groups_where_int8_blocks_are(hub_checkpoint: GetCheckpoint, tmp_path: Path) -> None:
    for form, size in ((Form(8), None), (Form(8, 32), 32), (Form(4, 32, has_zeros=True), None)):
        path = quantized(hub_checkpoint("gqa").path, tmp_path / str(form), *arguments(form))
        head = load_model(path, dtype=torch.float32, optimize=False).lm_head
        assert isinstance(head, StoredLinear) and (head.form.bits, head.form.group_size) == (8, size)


@pytest.mark.parametrize(("mode", "form"), MODES_AND_FORMS, ids=str)
def test_save_load_and_generate_give_the_text_of_the_plain_twin(
    stories: Path, tmp_path: Path, mode: str, form: Form
) -> None:
    path = quantized(stories, tmp_path / "out", *arguments(form, mode))
    texts = []
    for model in (load_model(path, dtype=torch.float32), plain_twin(path)):
        model.setup_caches(1, 64)
        texts.append(list(generate(model, [[1, 403]], 40, Sampling(temperature=0))))
    assert texts[0] == texts[1] and len(texts[0]) == 40


def assert_compiled_once_and_equal(model: Transformer) -> None:
    torch._dynamo.reset()
    steps = {"prefill": compiled(prefill), "decode": compiled(decode)}
    model.setup_caches(1, 256)

    def text(prompt: list[int], **steps: Any) -> list[list[list[int]]]:
        return list(generate(model, [prompt], 12, Sampling(temperature=0), **steps))

    assert text([1, 5, 9], **steps) == text([1, 5, 9])
    for prompt in ([1], list(range(1, 60)), list(range(1, 90))):
        with torch.compiler.set_stance("fail_on_recompile"):
            found = text(prompt, **steps)
        assert found == text(prompt)


@pytest.mark.parametrize("form", [Form(8), Form(4, 32, has_zeros=True)], ids=str)
def test_compiled_equals_eager_and_compiles_once(form: Form) -> None:
    raw = {**read_config(DEMO), "num_hidden_layers": 2, "quantization_config": quantization_config(form)}
    assert_compiled_once_and_equal(random_model(raw, dtype=torch.float32))


def test_compiled_experts_equal_eager_and_compile_once(hub_checkpoint: GetCheckpoint, tmp_path: Path) -> None:
    # Of its stacks a kernel takes one, and the plain path the other, of 112 columns.
    path = quantized(hub_checkpoint("mixtral").path, tmp_path / "out", *arguments(Form(4, 32, has_zeros=True)))
    model = load_model(path, dtype=torch.float32)
    assert_compiled_once_and_equal(model)


def test_the_command_calibrates_a_mixtral_and_says_which_experts_saw_little(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "model"
    source.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    raw = {"model_type": "mixtral", "vocab_size": 4096, "max_position_embeddings": 256, **sizes, **experts}
    model = random_model(raw, dtype=torch.float32, optimize=False)
    save_hub_checkpoint(model, raw, source, torch.float32)
    for file in DEMO.glob("tokenizer*"):
        shutil.copyfile(file, source / file.name)
    few = ("--calibration_samples", 1)
    path = quantized(source, tmp_path / "out", *arguments(Form(4, 32, has_zeros=True), "int4-gptq"), *few)
    assert "experts saw fewer calibration tokens than they have inputs" in capsys.readouterr().err
    positions, tokens = torch.arange(64), torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(0))
    logits = load_model(path, dtype=torch.float32)(tokens, positions)
    torch.testing.assert_close(logits, plain_twin(path)(tokens, positions), atol=1e-4, rtol=0)


def test_one_rounded_block_after_another_is_what_gptq_sees(stories: Path) -> None:
    # With the blocks before it left unquantized, a block's inputs and so its codes would be others.
    model = load_model(stories, dtype=torch.float32, optimize=False)
    tokens = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))
    source = meta_model(read_config(stories))
    state = dict(model.named_parameters())
    form = Form(4, 32, has_zeros=True)
    calibration = Calibration(source, state["embed_tokens.weight"], tokens, form)
    parts = list(quantize.quantized_parts(source, state.__getitem__, form, calibration))
    # The hidden states that came out at the end are those of the quantized model.
    twin = load_model(stories, dtype=torch.float32, optimize=False)
    merged = {name: value for part in parts for name, value in part.items()}
    for name, child in quantizable_linears(twin).items():
        if name != "lm_head":
            codes = unpack_nibbles(merged[f"{name}.weight"].data, child.weight.shape[1])
            weight = dequantize(codes, merged[f"{name}.scales"], merged[f"{name}.zeros"], 32)
            child.weight = nn.Parameter(weight)
    expected = twin.hidden_states(tokens, torch.arange(64))
    torch.testing.assert_close(torch.cat(calibration.hidden), expected, atol=1e-4, rtol=1e-4)


def test_perplexity_int8_keeps_and_gptq_loses_least(tmp_path: Path) -> None:
    text = Path(shutil.__file__).with_name("shlex.py").read_text()
    ids = load_tokenizer(DEMO).encode(text)[:1025]
    windows = torch.tensor(ids[:-1]).view(2, 512), torch.tensor(ids[1:]).view(2, 512)

    def loss(model: Transformer) -> float:
        logits = model(windows[0], torch.arange(512))
        return nn.functional.cross_entropy(logits.flatten(0, 1), windows[1].flatten()).item()

    plain = loss(load_model(DEMO, dtype=torch.float32))
    calibration = ["--calibration_length", 256, "--calibration_samples", 32]
    commands: dict[str, list[object]] = {
        "int8": ["int8"],
        "int4-g64": ["int4", "--groupsize", 64],
        "int4-g128": ["int4", "--groupsize", 128],
        "int4-gptq-g128": ["int4-gptq", "--groupsize", 128, *calibration],
    }
    added = {
        name: loss(plain_twin(quantized(DEMO, tmp_path / name, "--mode", *options))) - plain
        for name, options in commands.items()
    }
    assert abs(added["int8"]) < 0.003
    assert added["int4-gptq-g128"] < min(added["int4-g64"], added["int4-g128"]) < 0.3


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_says_what_became_of_every_layer(tmp_path: Path) -> None:
    source = tmp_path / "mödel"
    shutil.copytree(DEMO, source)
    options = ("--checkpoint_path", source, "--mode", "int4", "--groupsize", 256)
    result = run_command("quantize.py", *options, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    assert lines["down_proj"] == "int4, groups of 256 2.359 0.604"
    assert lines["norm"] == "as it was 0.001 0.001"
    assert "int8" in lines["lm_head"] and "as it was" in lines["embed_tokens"] and "as it was" in lines["norm"]
    output = tmp_path / "mödel-int4-g256"
    before, after = (float(size) for size in lines["all"].split())
    assert before == pytest.approx((source / "model.safetensors").stat().st_size / 1e6, abs=0.02)
    assert after == pytest.approx((output / "model.safetensors").stat().st_size / 1e6, abs=0.02)
    assert {file.name for file in source.iterdir()} == {file.name for file in output.iterdir()}
    result = run_forked(main, "--checkpoint_path", output, "--max_new_tokens", 5, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_group_that_does_not_divide_is_told(stories: Path, tmp_path: Path, capsys: Any) -> None:
    quantized(stories, tmp_path / "out", "--mode", "int4", "--groupsize", 32)
    assert "down_proj" in (out := capsys.readouterr().out) and "int4, groups of 32, last of 12" in out


def test_a_calibration_text_that_is_short_is_told(stories: Path, tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text"
    text.write_text("A short text. " * 20)
    options = ("--mode", "int4-gptq", "--calibration_file", text, "--calibration_length", 32)
    quantized(stories, tmp_path / "out", *options)
    found = re.search(r"calibrated on (\d+) of 64 windows of 32 tokens\n", capsys.readouterr().out)
    assert found and 1 < int(found[1]) < 64
    quantized(stories, tmp_path / "one", *options, "--calibration_samples", 1)
    assert "calibrated on 1 of 1 windows of 32 tokens\n" in capsys.readouterr().out


def test_the_table_keeps_its_columns_where_a_group_is_shorter(stories: Path, tmp_path: Path, capsys: Any) -> None:
    quantized(stories, tmp_path / "out", "--mode", "int4", "--groupsize", 256)
    table = capsys.readouterr().out.splitlines()[:-1]
    assert any("groups of 256, last of 172" in line for line in table) and len({len(line) for line in table}) == 1


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--mode", "int4", "--groupsize", 33], ["--groupsize", "33", "-1, 32, 64, 128, 256"]),
        (["--mode", "int8", "--symmetric"], ["--symmetric", "int8"]),
        (["--mode", "int5"], ["--mode", "int5"]),
        (["--mode", "int8", "--no-act_order"], ["--no-act_order", "int8-gptq"]),
        ([], ["--mode"]),
        (["--mode", "int4", "--calibration_length", 64], ["--calibration_length", "int4-gptq"]),
        (["--mode", "int4-gptq", "--calibration_length", 2000], ["--calibration_length 2000", "1024"]),
        (["--mode", "int4-gptq", "--calibration_file", "none.txt"], ["none.txt"]),
        (["--mode", "int4-gptq", "--calibration_file", "short.txt"], ["tokens", "--calibration_length"]),
        (["--mode", "int4-gptq", "--calibration_file", "bytes.txt"], ["bytes.txt", "UTF-8"]),
        (["--mode", "int8", "--device", "cuda:77"], ["--device cuda:77"]),
        (["--mode", "int8", "--checkpoint_path", "nowhere"], ["nowhere"]),
        (["--mode", "int8", "--output_path", "full"], ["full", "exists"]),
        (["--mode", "int4-gptq", "--output_path", "full", "--calibration_file", "none.txt"], ["full", "exists"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: Any, args: list[object], fragments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("def")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(SystemExit) as exit:
        quantize.main(["--output_path", "out", *map(str, args)])
    assert exit.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.txt", "full", "short.txt"]


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    path = quantized(DEMO, tmp_path / "once", "--mode", "int8")
    result = run_forked(quantize.main, "--checkpoint_path", path, "--mode", "int4", cwd=tmp_path)
    assert_user_error(result, path, "quantized already")
    assert [file.name for file in tmp_path.iterdir()] == ["once"]


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for room in (2**20, 7 * 2**20):  # neither the weights fit, nor, after them, the tokenizer
        with small_disk(tmp_path / f"disk{room}", room) as disk:
            source = tmp_path / f"model{room}"
            shutil.copytree(DEMO, source)
            (source / "tokenizer.json").write_bytes(bytes(2**21))
            result = run_forked(
                quantize.main,
                "--checkpoint_path",
                source,
                "--mode",
                "int4",
                "--output_path",
                disk / "out",
                cwd=tmp_path,
            )
            assert_user_error(result, "disk")
            assert not list(disk.iterdir())


def test_a_broken_chat_template_is_refused_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model"
    shutil.copytree(REPO / "checkpoints/demo", source)
    (source / "chat_template.jinja").write_text("{{")
    with pytest.raises(SystemExit) as exit:
        quantized(source, tmp_path / "out", "--mode", "int8-gptq")
    assert exit.value.code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert "chat_template.jinja" in error and "with --calibration_file it is not needed" in error


@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj", "layers.0.input_layernorm", "embed_tokens", "norm"])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    hub_checkpoint: GetCheckpoint, gqa_tensors: dict[str, Tensor], tmp_path: Path, capsys: Any, name: str
) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "model"
    shutil.copytree(hub_checkpoint("gqa").path, source)
    gqa_tensors[f"model.{name}.weight"].view(-1)[3] = torch.nan
    save_file(gqa_tensors, source / "model.safetensors")
    with pytest.raises(SystemExit):
        quantize.main(["--checkpoint_path", str(source), "--mode", "int8"])
    assert f"{name}.weight has values that are not finite" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def damaged(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((path / "config.json").read_text())
    change(raw)
    (path / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_folder_of_an_earlier_version_is_refused_with_the_command_that_makes_it_anew(mode: str) -> None:
    size = {"groupsize": 64} if mode == "int4" else {"groupsize": None}
    raw = {**read_config(DEMO), "layout": "fused", "quantization": {"mode": mode, **size}}
    with pytest.raises(ValueError, match="earlier version") as error:
        parse_config(raw)
    assert str(error.value).endswith(f"--mode {mode}" + (" --groupsize 64" if mode == "int4" else ""))


def test_codes_that_config_does_not_announce_are_refused(tmp_path: Path) -> None:
    path = quantized(DEMO, tmp_path / "out", "--mode", "int8")
    kept = read_config(path)["quantization_config"]
    damaged(path, lambda raw: raw.pop("quantization_config"))
    with pytest.raises(ValueError, match="weight_packed"):
        load_model(path)
    for group in kept["config_groups"].values():
        group["weights"] |= {"num_bits": 4, "strategy": "group", "group_size": 32}
    damaged(path, lambda raw: raw.update(quantization_config=kept))
    with pytest.raises(ValueError, match="weight_packed has shape"):
        load_model(path)


def test_every_parameter_of_a_random_quantized_model_is_set() -> None:
    raw = {**read_config(DEMO), "quantization_config": quantization_config(Form(4, 32, has_zeros=True))}
    model = random_model(raw, dtype=torch.float32)
    logits = model(torch.tensor([[1, 2, 3]]), torch.arange(3))
    assert logits.isfinite().all() and logits.std() > 0
    assert isinstance(model.layers[0].mlp.down_proj, AtenInt4) and isinstance(model.lm_head, AtenInt8)


def test_a_model_writes_its_own_calibration_text_half_of_it_as_a_chat():
    model, tokenizer = load_model(DEMO, dtype=torch.float32), load_tokenizer(DEMO)
    windows = write_windows(model, tokenizer, 3, 24, chat_opening=[7, 8, 9])
    assert windows.shape == (3, 24)
    assert [row[:3] == [7, 8, 9] for row in windows.tolist()] == [True, False, True]
    assert windows[0].tolist() != windows[2].tolist(), "each is drawn anew"
    assert torch.equal(windows, write_windows(model, tokenizer, 3, 24, chat_opening=[7, 8, 9]))
