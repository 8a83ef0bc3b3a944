"""Run the steps as inductor writes them for a GPU, under Triton's interpreter, each beside its plain eager twin.

test_inductor_interpreted.py starts it, as a process of its own, since Triton reads TRITON_INTERPRET once, when it is
imported. With it inductor hands what it writes to the interpreter, with the grids that it would have on an H100. Prints
a JSON object: of every case the largest difference from the twin over the twin's largest value, in logits and KV
caches; whether all ids are the twin's; and which of our operators the code calls.

What a GPU would do by its libraries, a GEMM for example, the CPU does here. No CUDA graph is captured.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_helpers
from torch._inductor.utils import fresh_cache
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, ReduceOps, interpreter_builder

import checkpoint
from bench.launches import pretend
from compressed import quantization_config
from kernels import cuda
from kernels.optimize import optimize_
from linears import Form
from model import Transformer
from speculate import draft_and_verify, verify
from steps import NOT_A_NUMBER, Sampling, compiled, decode, prefill
from tests.interpreted import prepare_once

RAW: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
INT8: dict[str, Any] = {"quantization_config": quantization_config(Form(8))}
INT4: dict[str, Any] = {"quantization_config": quantization_config(Form(4, 32, has_zeros=True))}
QWEN3 = {"model_type": "qwen3", "head_dim": 24, "attention_bias": True}
WINDOW = {"model_type": "mistral", "sliding_window": 8}
BIASES = {"mlp_bias": True}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
WIDE = {"intermediate_size": 1200, "vocab_size": 1100}  # reductions in more than one block, of no power of 2
GREEDY, DRAWN = Sampling(temperature=0), Sampling(0.8, top_k=20, top_p=0.95, min_p=0.01)
V, NUM_SLOTS, K = 96, 192, 3
FILLED, NEVER_FILLED = 21, slice(64, 128)  # slots of the caches
DRAFT = "a draft model"  # in the arguments of a step

# ---------------------------------------------------------------------------------------------------------------------
# The interpreter


def reduce_in_halves(self: Any, values: Any, one_by_one: Any = ReduceOps.generic_reduce) -> Any:
    """Reduce blocks, whose sizes are powers of 2, in fewer calls than the interpreter's own, which takes one a number.

    Inductor's functions say `not`, which of an array is no array: they get NaN one by one.
    """
    halves = [np.moveaxis(value.handle.data, self.axis, 0) for value in values]
    if self.keep_dims or any(np.isnan(half).any() for half in halves):
        return one_by_one(self, values)
    kinds = [value.dtype for value in values]
    while (size := len(halves[0])) > 1:
        sides = [half[part] for part in (slice(size // 2), slice(size // 2, None)) for half in halves]
        found = self.combine_fn.fn(*map(self.to_tensor, sides, kinds * 2))
        halves = [each.handle.data for each in (found if isinstance(found, tuple) else (found,))]
    return [self.to_tensor(half[0], kind) for half, kind in zip(halves, kinds, strict=True)]


def dot(self: Any, a: Any, b: Any, *rest: Any, as_it_was: Any = InterpreterBuilder.create_dot) -> Any:
    """Multiply bf16 as fp32, since the interpreter would multiply its bits (Triton 3.7)."""
    return as_it_was(self, *(self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)), *rest)


def to_float(self: Any, x: Any, kind: Any, as_it_was: Any = InterpreterBuilder.create_si_to_fp) -> Any:
    """Make bf16 of whole numbers, which the interpreter would take for its bits (Triton 3.7)."""
    if kind.scalar != tl.bfloat16:
        return as_it_was(self, x, kind)
    return self.create_fp_trunc(as_it_was(self, x, tl.float32), tl.bfloat16)


def few_programs(self: AsyncCompile, *args: Any, load: Any = AsyncCompile.triton, **kwargs: Any) -> Any:
    """Have the interpreter take, of the sizes that a GPU would try, fewest programs, each with most loops."""
    kernel = load(self, *args, **kwargs)

    def order(config: Any) -> tuple[int, int]:
        sizes = config.kwargs
        return -sizes.get("XBLOCK", 1) * sizes.get("YBLOCK", 1), sizes.get("R0_BLOCK", 1)

    kernel.configs.sort(key=order)
    return kernel


def prepare() -> list[str]:
    """Let inductor write for a GPU, and what it writes be run here; return the list that its code is put in."""
    written = pretend()
    # Functions of CUDA's library have no interpreter.
    triton_helpers.libdevice = SimpleNamespace(rsqrt=lambda x: tl.rsqrt(x), exp=lambda x: tl.exp(x))
    interpreter_builder.options = InterpreterOptions(debug=True, sanitize_overflow=False)  # heeds device_assert
    ReduceOps.generic_reduce = reduce_in_halves
    InterpreterBuilder.create_dot, InterpreterBuilder.create_si_to_fp = dot, to_float
    prepare_once()
    AsyncCompile.triton = few_programs  # type: ignore[method-assign]
    operators: dict[str, Callable[..., Tensor]] = {
        "cuda_int4_product": cuda.int4_product,
        "cuda_int8_product": cuda.int8_product,
        "cuda_attention": cuda.split_attention,
    }
    for name, function in operators.items():
        torch.library.impl(f"kernels::{name}", "CPU")(function)
    return written


# ---------------------------------------------------------------------------------------------------------------------
# The models


def random_state(raw: dict[str, Any]) -> dict[str, Tensor]:
    """Draw weights of which every one matters: what a layer adds is as large as what it adds it to."""
    generator = torch.Generator().manual_seed(0)
    specs = checkpoint.tensor_specs(checkpoint.meta_model(raw), torch.float32)
    state = {}
    for name, (kind, shape) in specs.items():
        value = torch.empty(shape, dtype=kind)
        if name.endswith(".zeros"):
            value.random_(5, 11, generator=generator)
        elif kind in (torch.int8, torch.uint8):
            value.random_(torch.iinfo(kind).min, torch.iinfo(kind).max + 1, generator=generator)
        elif name.endswith(".scales"):
            largest = 8 if name.replace(".scales", ".zeros") in specs else 128
            value.uniform_(1, 4, generator=generator).div_(largest * 64**0.5)
        elif name.endswith("norm.weight"):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0, 2 * shape[-1] ** -0.5, generator=generator)
        state[name] = value
    return state


def models(changes: dict[str, Any], batch_size: int, dtype: torch.dtype) -> tuple[Transformer, Transformer]:
    """Make one as it is on CUDA, and its twin of plain fp32 layers: the same weights, the same in the caches."""
    raw, made = RAW | changes, []
    for its_dtype in (dtype, torch.float32):
        state = random_state(raw)
        state = {name: t.to(dtype).to(its_dtype) if t.dtype == torch.float32 else t for name, t in state.items()}
        made.append(checkpoint.meta_model(raw))
        checkpoint.load_parameters_(made[-1], state, "cpu")
    optimize_(made[0], "cuda")
    ours, twin = made
    for model in made:
        model.setup_caches(batch_size, NUM_SLOTS)
    for each in caches(twin):
        each.normal_(generator=torch.Generator().manual_seed(0))
        each[:, :, NEVER_FILLED] = torch.nan
    tokens, positions = columns(batch_size, FILLED, 0)
    twin(tokens.clamp(max=twin.config.vocab_size - 1), positions)
    for mine, its in zip(caches(ours), caches(twin), strict=True):
        mine.copy_(its)
        its.copy_(mine)
    return ours, twin


def caches(model: Transformer) -> list[Tensor]:
    found = [block.self_attn.cache for block in model.layers]
    return [each for cache in found if cache is not None for each in (cache.k, cache.v)]


# ---------------------------------------------------------------------------------------------------------------------
# The cases


def columns(batch_size: int, length: int, first: int) -> tuple[Tensor, Tensor]:
    """Return tokens and positions [B, S]; a row's are not another's."""
    rows = torch.arange(batch_size).unsqueeze(1)
    positions = first + torch.arange(length) - (3 * rows if first else 0 * rows)
    return (positions * 7 + rows * 5 + 3) % V, positions


def noise(*shape: int) -> Tensor:
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(1))


def distance(ours: Tensor, twin: Tensor) -> float:
    assert ours.shape == twin.shape
    if not torch.equal(ours.isnan(), twin.isnan()):
        return torch.inf
    return ((ours.float() - twin).nan_to_num().abs().amax() / twin.nan_to_num().abs().amax()).item()


def compare(
    written: list[str], step: Callable[..., Any], calls: Sequence[tuple[Any, ...]], changes: dict[str, Any],
    batch_size: int = 1, dtype: torch.dtype = torch.float32, draft: dict[str, Any] | None = None,
) -> tuple[float, bool, list[str]]:  # fmt: skip
    """Call a step, compiled and not, with the same arguments one after the other. draft: a draft model's changes."""
    pair = models(changes, batch_size, dtype)
    drafts = pair if draft is None else models(draft, batch_size, dtype)
    run = compiled(step, None if step is prefill else "reduce-overhead")
    far, same = [], True
    for tokens, positions, *rest in calls:
        given = []
        for function, model, its_draft in zip((run, step), pair, drafts, strict=True):
            args = [its_draft if arg is DRAFT else arg for arg in rest]
            slots = torch.arange(NUM_SLOTS)
            given.append(tree_leaves(function(model, tokens.clone(), positions.clone(), slots, *args)))
        for ours, twin in zip(*given, strict=True):
            if twin.is_floating_point():
                far.append(distance(ours, twin))
            else:
                same &= torch.equal(ours, twin)
    for ours, twin in (pair, drafts):
        far += map(distance, caches(ours), caches(twin))
    assert written and all("async_compile.triton" in code and "cpp_fused" not in code for code in written)
    return max(far), same, sorted(set(re.findall(r"torch\.ops\.kernels\.(\w+)", "".join(written))))


def logits(model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor | None) -> Tensor:
    return model(tokens, positions, slots)


def forward(length: int, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"step": logits, "calls": [columns(1, length, FILLED)], "changes": changes, "dtype": dtype}


def decoding(changes: dict[str, Any], starts: Sequence[int]) -> dict[str, Any]:
    steps = [(tokens[:, 0], at[:, 0]) for tokens, at in (columns(1, 1, first) for first in starts)]
    # What has walked past the slots is a row that has ended.
    calls = [(torch.where(at < NUM_SLOTS, tokens, NOT_A_NUMBER), at, GREEDY, None) for tokens, at in steps]
    return {"step": decode, "calls": calls, "changes": changes}


def speculating(
    sampling: Sampling, changes: dict[str, Any], batch_size: int = 1, draft: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A round with a draft model, or else the verifying of drafts that were found."""
    B, last = batch_size, columns(batch_size, 2, FILLED - 1)
    drawn = (noise(B, K) / 9, noise(B, V)) if sampling.temperature else None
    if draft is None:
        calls: list[tuple[Any, ...]] = [(*last, columns(B, K, FILLED + 1)[0], sampling, drawn, None)]
    else:
        calls = [(*last, DRAFT, K, sampling, (noise(B, K, V), drawn) if drawn else None)]
    step = verify if draft is None else draft_and_verify
    return {"step": step, "calls": calls, "changes": changes, "batch_size": B, "draft": draft}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "4 tokens, plain, fp32", forward(4, {})
    for length in (1, 4):
        yield f"{length} token{'s' * (length > 1)}, int4, fp32", forward(length, INT4)
    yield "1 token, qwen3, plain, fp32", forward(1, QWEN3)  # biases, and norms of q and k
    yield "4 tokens, biases, int4, bf16", forward(4, INT4 | BIASES, torch.bfloat16)
    yield "1 token, experts, plain, fp32", forward(1, MIXTRAL)  # two rows each of a stack
    yield "1 token, experts, int8, fp32", forward(1, MIXTRAL | INT8)
    lengths = [(*columns(1, length, FILLED), GREEDY, None) for length in (20, 33)]
    yield "prefill, int8, fp32", {"step": prefill, "calls": lengths, "changes": INT8}
    # The second reads NaN and gives NOT_A_NUMBER, the last is past the slots.
    starts = [FILLED, NEVER_FILLED.start, NUM_SLOTS + 4]
    yield "decode, window, int8, fp32", decoding(WINDOW | INT8, starts)
    yield "decode, wide, biases, int8, fp32", decoding(WIDE | BIASES | INT8, [FILLED, FILLED + 1])
    yield "verify of 2, drawn, biases, plain, fp32", speculating(DRAWN, BIASES, batch_size=2)
    yield "round of 2, drawn, int8, fp32", speculating(DRAWN, INT8, batch_size=2, draft={"vocab_size": 80})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    np.seterr(all="ignore")  # of lanes that are masked
    written, said = prepare(), {}
    for name, case in cases():
        written.clear()
        with fresh_cache():  # in which no code is found
            said[name] = compare(written, **case)
    print(json.dumps(said))
