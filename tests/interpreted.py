"""Run the kernels of cuda.py under Triton's interpreter, each beside its plain twin.

test_kernels_triton.py starts it, as a process of its own, since Triton reads TRITON_INTERPRET once, when it is
imported. Prints a JSON object: of every case the largest difference from the twin over the twin's largest value.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

import model
from kernels import cuda
from linears import dequantize
from tests.rounded import quantize_int4, quantize_int8

# No bf16 where a kernel has a `tl.dot`, in which the interpreter takes it for whole numbers (Triton 3.7).
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def prepare_once() -> None:
    """Let functions be called in a kernel as it has prepared triton.language: the interpreter does it at each call."""
    as_it_was = InterpretedFunction.__call__

    def call(self: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Any:
        languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(language.static_print is not print for language in languages):
            return as_it_was(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


def distance(ours: Tensor, twin: Tensor) -> float:
    assert ours.shape == twin.shape and ours.dtype == twin.dtype
    return ((ours.float() - twin.float()).abs().amax() / twin.float().abs().amax()).item()


def around(M: int, N: int, K: int, dtype: str, what: str) -> dict[str, Any]:
    """Return what a product is asked to do besides: any of norm, bias, gated, residual."""
    given: dict[str, Any] = {"gated": True} if "gated" in what else {}
    if "norm" in what:
        given |= {"norm": torch.rand(K).to(DTYPES[dtype]) + 0.5, "eps": 0.25}
    if "bias" in what:
        given["bias"] = torch.randn(N).to(DTYPES[dtype])
    if "residual" in what:
        given["residual"] = torch.randn(N // 2 if "gated" in what else N, M).T.to(DTYPES[dtype])
    return given


def twin(x: Tensor, weight: Tensor, given: dict[str, Any]) -> Tensor:
    wide = {name: value.float() for name, value in given.items() if isinstance(value, Tensor)}
    rows = F.rms_norm(x.float(), x.shape[-1:], wide["norm"], given["eps"]) if "norm" in wide else x.float()
    y = F.linear(rows, weight.float(), wide.get("bias"))
    y = model.swiglu(y) if "gated" in given else y
    return (y + wide.get("residual", 0)).to(x.dtype)


def products() -> Iterator[tuple[str, Callable[[], float]]]:
    def int4(M: int, N: int, K: int, group_size: int, dtype: str, what: str = "") -> float:
        codes, scales, zeros = quantize_int4(torch.randn(N, K) * 0.05 + 0.01, group_size)
        layer = cuda.CudaInt4(codes, scales.to(DTYPES[dtype]), zeros, None)
        x, given = torch.randn(M, K).to(DTYPES[dtype]), around(M, N, K, dtype, what)
        assert torch.equal(cuda.unpack_int4(layer.weight, group_size), codes)
        weight = dequantize(codes, scales, zeros, group_size).to(x.dtype)
        assert torch.equal(F.linear(x, weight), layer.gemm(x, layer.weight, layer.parameters_of_groups))
        ours = cuda.int4_product(x, layer.weight, layer.parameters_of_groups, **given)
        return distance(ours, twin(x, weight, given))

    def int8(M: int, N: int, K: int, dtype: str, what: str = "") -> float:
        codes, scales = quantize_int8(torch.randn(N, K))
        x, given = torch.randn(M, K).to(DTYPES[dtype]), around(M, N, K, dtype, what)
        ours = cuda.int8_product(x, codes, scales.to(x.dtype), **given)
        return distance(ours, twin(x, dequantize(codes, scales), given))

    def plain(M: int, N: int, K: int) -> float:
        x, weight = torch.randn(M, K), torch.randn(N, K)
        return distance(cuda.int8_product(x, weight, torch.ones(N)), twin(x, weight, {}))

    yield "int8's kernel, of a plain weight, fp32", partial(plain, 5, 33, 300)
    for M, N, K, group_size, dtype in [
        (1, 7, 64, 32, "bf16"), (1, 5, 4128, 32, "bf16"), (1, 9, 96, 32, "fp32"), (1, 3, 1152, 128, "fp16"),
        (1, 3, 8192 + 256, 256, "bf16"), (1, 4, 192, 64, "fp32"), (1, 2051, 32, 32, "fp32"),
        (2, 33, 96, 32, "fp32"), (4, 7, 384, 128, "fp16"), (8, 33, 320, 64, "fp32"), (16, 5, 512, 256, "fp16"),
    ]:  # fmt: skip
        yield f"int4 M={M} N={N} K={K} g{group_size} {dtype}", partial(int4, M, N, K, group_size, dtype)
    for M, N, K, dtype in [(1, 33, 100, "fp16"), (3, 7, 300, "fp32"), (16, 32, 256, "fp16")]:
        yield f"int8 M={M} N={N} K={K} {dtype}", partial(int8, M, N, K, dtype)
    # Halves that do and do not fill the last program; and what else stands around a product.
    for M, N, K, dtype, what in [
        (1, 14, 96, "fp32", "gated"), (1, 2050, 32, "fp32", "gated"), (1, 8, 4128, "fp16", "norm gated"),
        (1, 7, 4128, "fp32", "norm"), (1, 14, 96, "fp32", "norm bias gated residual"),
        (1, 9, 64, "fp16", "bias residual"), (3, 34, 96, "fp32", "gated"), (16, 64, 64, "fp16", "bias gated residual"),
    ]:  # fmt: skip
        yield f"int4 {what} M={M} N={N} K={K} {dtype}", partial(int4, M, N, K, 32, dtype, what)
    for M, N, K, dtype, what in [(3, 14, 300, "fp32", "gated"), (16, 66, 256, "fp16", "bias gated residual")]:
        yield f"int8 {what} M={M} N={N} K={K} {dtype}", partial(int8, M, N, K, dtype, what)


def attention(
    B: int, S: int, H: int, K: int, D: int, T: int, ends: list[int], window: int | None = None, dtype: str = "fp32"
) -> float:
    """Compare at the S positions that end before `ends`, one a row, in a cache whose other slots hold NaN."""
    q = torch.randn(B, S, H, D).to(DTYPES[dtype])
    k, v = (torch.randn(B + 1, K, T + 3, D).to(q.dtype)[:B, :, :T] for _ in range(2))  # the first slots of a cache
    positions = torch.tensor(ends).unsqueeze(1) - S + torch.arange(S)
    mask = model.attention_mask(positions.unsqueeze(-1), torch.arange(T), window)
    twin = model.attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    unseen = ~mask.any(dim=1)[:, None, :, None].expand_as(k)
    k[unseen] = v[unseen] = torch.nan
    return distance(cuda.split_attention(q, k, v, mask), twin)


def one_split() -> float:
    programs, cuda.PROGRAMS = cuda.PROGRAMS, 1
    try:
        blocks = cuda.LOOK_AHEAD + 3
        return attention(1, 1, 2, 1, 16, blocks * cuda.SLOTS, [(blocks - 1) * cuda.SLOTS])
    finally:
        cuda.PROGRAMS = programs


def blind() -> float:
    """A query that sees nothing, beside one that does: 0, and its neighbour as it would be alone."""
    q, k, v = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    mask = torch.zeros(1, 2, 100, dtype=torch.bool)
    mask[:, 1, 40:90] = True
    ours = cuda.split_attention(q, k, v, mask)
    assert (ours[:, 0] == 0).all()
    return distance(ours[:, 1:], model.attention(q[:, 1:], k, v, mask[:, 1:]))


def nothing_seen() -> float:
    k = torch.full((1, 2, 70, 16), torch.nan)
    mask = torch.zeros(1, 1, 70, dtype=torch.bool)
    return cuda.split_attention(torch.randn(1, 1, 2, 16), k, k, mask).abs().amax().item()


def many_queries() -> float:
    """More queries than the kernel takes: torch's own, of which a GPU takes the memory-efficient kernel."""
    S, T = cuda.MAX_QUERIES + 1, 40
    q, k, v = torch.randn(2, S, 4, 16), torch.randn(2, 2, T, 16), torch.randn(2, 2, T, 16)
    mask = model.attention_mask((torch.arange(S) + 5).expand(2, S).unsqueeze(-1), torch.arange(T), 9)
    twin = model.attention(q, k, v, mask)
    k[:, :, 30:] = v[:, :, 30:] = torch.nan
    return distance(cuda.attention(q, k, v, mask), twin)


def cases() -> Iterator[tuple[str, Callable[[], float]]]:
    yield from products()
    yield "attention, one query", lambda: attention(1, 1, 4, 4, 32, 300, [131])
    yield "attention, first slot alone", lambda: attention(1, 1, 8, 2, 32, 64, [1])
    yield "attention, whole cache", lambda: attention(1, 1, 4, 1, 16, 129, [129])
    yield "attention, 8 heads a group, fp16", lambda: attention(1, 1, 8, 1, 16, 257, [200], dtype="fp16")
    yield "attention, width no power of 2", lambda: attention(1, 1, 4, 2, 24, 65, [65])
    yield "attention, verify of 6", lambda: attention(1, 6, 8, 2, 16, 200, [70])
    yield "attention, 16 queries", lambda: attention(1, 16, 4, 1, 16, 90, [16])
    yield "attention, batch of 3, fp16", lambda: attention(3, 2, 4, 2, 16, 190, [2, 190, 100], dtype="fp16")
    yield "attention, window", lambda: attention(2, 3, 4, 2, 16, 700, [650, 40], window=8)
    yield "attention, window over blocks", lambda: attention(1, 1, 4, 1, 16, 5000, [4000], window=1000)
    yield "attention, more blocks than are looked at together", one_split
    yield "attention, one query is blind", blind
    yield "attention, all are blind", nothing_seen
    yield "attention, many queries", many_queries


if __name__ == "__main__":
    torch.manual_seed(0)
    prepare_once()
    print(json.dumps({name: repr(run()) for name, run in cases()}))
