"""Fast equals plain: what `optimize_` makes of a model, eager and compiled, gives the plain model's logits."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from checkpoint import load_model
from kernels.optimize import optimize_
from linears import Form, quantizable_linears, quantize_linear
from model import Transformer
from steps import compiled
from tests.conftest import FAMILIES, HubCheckpoint

GetCheckpoint = Callable[[str], HubCheckpoint]
FORMS = {
    "plain": None,
    "int8": Form(8),
    "int4-g32": Form(4, 32, has_zeros=True),
    "int4-g64": Form(4, 64, has_zeros=True),
}
# A compilation takes seconds: each family whose layers are compiled in another form, and each form, in one of them.
COMPILED = [
    ("biased", "int8", torch.float32),
    ("qwen3", "int4-g32", torch.bfloat16),
    ("gemma3", "plain", torch.bfloat16),
    ("phi4_mini", "plain", torch.float32),
    ("qwen3_moe", "int4-g32", torch.float32),
]
NUM_SLOTS = 64
# In bfloat16 of a token's norm. Where two experts are nearly level, rounding may choose the other for a few tokens,
# which later ones see: of a model with experts half of the tokens of a call have to be within.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def plain_model(reference: HubCheckpoint, form: str, dtype: torch.dtype) -> Transformer:
    """Load a checkpoint without kernels, its linears in one of the FORMS."""
    model = load_model(reference.path, dtype=dtype, optimize=False)
    if held_as := FORMS[form]:
        for name, child in quantizable_linears(model).items():
            model.set_submodule(name, quantize_linear(child, held_as.head if name == "lm_head" else held_as))
    model.setup_caches(2, NUM_SLOTS)
    return model


def logits_of(model: Transformer, tokens: Tensor, step: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Run a prompt and then steps of one token and of five; return the logits of each call, in fp32."""
    logits, begin = [], 0
    for size in (20, 1, 1, 5):
        positions = torch.arange(begin, begin + size).expand(2, size)
        call = step if step and begin else lambda model, *args: model(*args)
        logits.append(call(model, tokens[:, begin : begin + size].contiguous(), positions, torch.arange(NUM_SLOTS)))
        begin += size
    return [values.float() for values in logits]


def assert_equal(fast: list[Tensor], plain: list[Tensor], dtype: torch.dtype, has_experts: bool) -> None:
    for ours, twin in zip(fast, plain, strict=True):
        if dtype == torch.float32:
            assert (ours - twin).abs().max() <= TOLERANCE[dtype]
        else:
            errors = ((ours - twin).norm(dim=-1) / twin.norm(dim=-1)).flatten()
            assert (errors.median() if has_experts else errors.max()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_fast_equals_plain(hub_checkpoint: GetCheckpoint, family: str, form: str, dtype: torch.dtype) -> None:
    reference = hub_checkpoint(family)
    plain = plain_model(reference, form, dtype)
    fast = copy.deepcopy(plain)
    optimize_(fast)
    calls = logits_of(fast, reference.tokens[:2]), logits_of(plain, reference.tokens[:2])
    assert_equal(*calls, dtype, plain.config.num_local_experts > 0)


def logits_step(model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
    return model(tokens, positions, slots)


@pytest.mark.parametrize(("family", "form", "dtype"), COMPILED)
@torch.inference_mode()
def test_compiled_equals_plain(hub_checkpoint: GetCheckpoint, family: str, form: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    reference = hub_checkpoint(family)
    plain = plain_model(reference, form, dtype)
    fast = copy.deepcopy(plain)
    optimize_(fast)
    step = compiled(logits_step)
    calls = logits_of(fast, reference.tokens[:2], step), logits_of(plain, reference.tokens[:2])
    assert_equal(*calls, dtype, plain.config.num_local_experts > 0)
