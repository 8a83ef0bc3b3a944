"""Kernels for CUDA: products with int8 and int4 weights of up to 16 rows, and attention of up to 16 queries a row.

`optimize.py` chooses them for models on such a device, where Triton is installed. The plain twin of each product is
`F.linear` with the dequantized weight, that of attention `model.attention`.

No GPU has run them yet. Triton's interpreter has, against their twins, and Triton compiles them for sm_80 and sm_90
(`python -m bench.footprint`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.inductor import is_reduction, streamed_linear
from kernels.layers import MAX_ROWS, AtenInt8, FusedLinear, KernelLinear
from linears import frozen_parameter
from model import RMSNorm

# The most queries per row of a batch that the attention kernel takes: a decode step, and what speculation verifies.
MAX_QUERIES = 16
# Cache slots in a block of the attention kernel, and blocks whose mask it reads together.
SLOTS, LOOK_AHEAD = 64, 32
# Programs of the attention kernel: about two per multiprocessor of the largest GPUs. It does not depend on the GPU, so
# that every GPU writes the same text.
PROGRAMS = 256
# Int4 weights with at least this many rows have eight of them share an x: with fewer, the GPU would not be filled.
MANY_ROWS = 2048
# The most queries, over all heads that share a kv head, of a program of the attention kernel: more would spill
# registers.
MAX_TILE = 32


# ---------------------------------------------------------------------------------------------------------------------
# What the products share
#
# A launch costs time even where there is little to do, so a product also does what surrounds it, as described in
# `FusedLinear.forward`. If GATED, half of a program's rows are gate's and half are up's: the loop is the same.


@triton.jit
def rows_of_program(N, ROWS: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which ROWS rows of a weight [N, K] this program takes."""
    if GATED:
        row = tl.arange(0, ROWS)
        n = tl.program_id(0) * (ROWS // 2) + row % (ROWS // 2) + row // (ROWS // 2) * (N // 2)
    else:
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return n


@triton.jit
def store_sums(y, sums, n, bias, residual, M, N, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Finish the sums [m, rows], m below M, of this program's rows n of the weight, and store them to its part of y."""
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (sums.shape[0], 2, sums.shape[1] // 2)), (0, 2, 1)))
        values, columns = gate * tl.sigmoid(gate) * up, N // 2
    else:
        values, columns = sums, N
    m = tl.arange(0, values.shape[0])[:, None]
    column = (tl.program_id(0) * values.shape[1] + tl.arange(0, values.shape[1]))[None, :]
    at, there = m * columns + column, (m < M) & (column < columns)
    if residual is not None:
        values += tl.load(residual + at, mask=there, other=0).to(tl.float32)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=there)


def empty_product(x: Tensor, N: int, gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], N // 2 if gated else N)


class CudaLinear(FusedLinear, KernelLinear):
    """A KernelLinear whose kernel, for up to MAX_ROWS rows, also does what surrounds the product."""

    max_rows_normalized = 0  # up to this many rows of x are normalized by the kernel too

    def multiply(self, x: Tensor) -> Tensor:
        return KernelLinear.forward(self, x)

    def fused(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor | None:
        rows = x.flatten(0, -2)
        if rows.shape[0] > MAX_ROWS:
            return None
        if norm is not None and rows.shape[0] > self.max_rows_normalized:
            rows, norm = norm(rows), None
        before = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        after = {"bias": self.bias, "gated": gated, "residual": None if residual is None else residual.flatten(0, -2)}
        y = self.product(rows, *self.tensors, **before, **after)
        return y.unflatten(0, x.shape[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# int4
#
# A word of 32 bits holds eight codes of a group, and a group's words are adjacent: code p of word t is column
# p * group_size / 8 + t of the group. So the 16 bytes that a thread loads share a scale, and its columns of x are
# contiguous runs. A group's scale and zero point are one word too: bf16 each, the scale in the low half.
#
# On a large GPU four instructions per weight take as long as reading it. So codes are not converted: a mask cuts them
# out in place, as bits of the fraction of an fp32 number, 1 + code / 256 or 1 + code / 16. Code 0 begins at bit 15 of
# its word, code 1 at bit 19, and so on around; rotating the word by 8 bits brings the next two there. What the ones add
# to a sum is subtracted again, which leaves it accurate to 2^-17 of the largest sum possible.


@triton.jit
def scale_and_zero(pair):  # type: ignore[no-untyped-def]
    """Split a word into two fp32 numbers: a bf16 is the upper half of its fp32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def two_codes(packed, turn: tl.constexpr, low_bits, high_bits):  # type: ignore[no-untyped-def]
    """Return 1 + code / 256 of code 2 * turn and 1 + code / 16 of the next one, of each of the words, uint32."""
    if turn == 1:
        packed >>= 8
    elif turn == 2:
        packed = packed >> 16 | packed << 16
    elif turn == 3:
        packed <<= 8
    low, high = packed & low_bits | 0x3F800000, packed & high_bits | 0x3F800000
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


# The masks of `two_codes`. They are arguments, since an instruction takes only one constant: with two of them
# `packed & low_bits | 0x3F800000` would be two instructions.
CODE_BITS = (0x00078000, 0x00780000)


@triton.jit
def load_x(x, norm, at, mask):  # type: ignore[no-untyped-def]
    """Return x at these columns, times the norm's weight if there is one, and the squares of x."""
    values = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    squares = values * values
    if norm is not None:
        values *= tl.load(norm + at, mask=mask, other=0).to(tl.float32)
    return values, squares


@triton.jit
def int4_row(  # type: ignore[no-untyped-def]
    x, norm, weight, parameters, bias, residual, y, N, num_groups, eps, low_bits, high_bits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Multiply one x [K] with ROWS rows of a weight [N, K], BLOCK groups at a time.

    The norm divides the product by x's root mean square, which each program computes in the same loop.
    """
    WORDS: tl.constexpr = GROUP // 8
    n = rows_of_program(N, ROWS, GATED)
    words = tl.arange(0, WORDS)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK, WORDS), tl.float32)
    for first in range(0, num_groups, BLOCK):
        groups = first + tl.arange(0, BLOCK)
        there = groups < num_groups
        both = (n < N)[:, None] & there[None, :]
        at = n[:, None].to(tl.int64) * num_groups + groups[None, :]
        # Two groups are declared contiguous, which they are not, so that threads are laid out along a row before they
        # go to the next: Triton 3.6 would lay them out across rows first.
        offsets = tl.max_contiguous(at[:, :, None] * WORDS + words[None, None, :], (1, 2, WORDS))
        packed = tl.load(weight + offsets, mask=both[:, :, None], other=0).to(tl.uint32, bitcast=True)
        # Declared unaligned, so that they are loaded one at a time: with groups of 32 a thread loads its own group's,
        # and nothing goes through shared memory.
        pairs = tl.load(parameters + tl.multiple_of(at, (1, 1)), mask=both, other=0)
        scale, zero = scale_and_zero(pairs)
        columns = groups[:, None] * GROUP + words[None, :]
        low_sum, high_sum = tl.zeros((BLOCK, WORDS), tl.float32), tl.zeros((BLOCK, WORDS), tl.float32)
        # x is read here and below, but the compiler loads it once.
        for turn in tl.static_range(4):
            low_x, low_square = load_x(x, norm, columns + 2 * turn * WORDS, there[:, None])
            high_x, high_square = load_x(x, norm, columns + (2 * turn + 1) * WORDS, there[:, None])
            low_sum += low_x
            high_sum += high_x
            if norm is not None:
                squares += low_square + high_square
        # The sum of code * x / 16, from which the ones are subtracted first.
        products = tl.broadcast_to((-16 * low_sum - high_sum)[None, :, :], (ROWS, BLOCK, WORDS))
        for turn in tl.static_range(4):
            low, high = two_codes(packed, turn, low_bits, high_bits)
            low_x, _ = load_x(x, norm, columns + 2 * turn * WORDS, there[:, None])
            high_x, _ = load_x(x, norm, columns + (2 * turn + 1) * WORDS, there[:, None])
            products += low * (16 * low_x)[None, :, :]
            products += high * high_x[None, :, :]
        acc += tl.sum(products, axis=2) * (16 * scale)
        acc -= zero * scale * tl.sum(low_sum + high_sum, axis=1)[None, :]
    total = tl.sum(acc, axis=1)[None, :]
    if norm is not None:
        total *= tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / (num_groups * GROUP) + eps)
    store_sums(y, total, n, bias, residual, 1, N, GATED)


@triton.jit(do_not_specialize=["M"])
def int4_rows(  # type: ignore[no-untyped-def]
    x, weight, parameters, bias, residual, y, M, N, num_groups, low_bits, high_bits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Multiply up to 16 rows x [M, K] with ROWS rows of a weight [N, K], BLOCK words at a time, on tensor cores."""
    WORDS: tl.constexpr = GROUP // 8
    m = tl.arange(0, 16)
    n = rows_of_program(N, ROWS, GATED)
    n_there = (n < N)[:, None]
    num_words = num_groups * WORDS
    acc = tl.zeros((16, ROWS), tl.float32)
    for first in range(0, num_words, BLOCK):
        words = first + tl.arange(0, BLOCK)
        there = words < num_words
        groups = words // WORDS
        row = n[:, None].to(tl.int64)
        packed = tl.load(weight + row * num_words + words[None, :], mask=n_there & there[None, :], other=0)
        packed = packed.to(tl.uint32, bitcast=True)
        pairs = tl.load(parameters + row * num_groups + groups[None, :], mask=n_there & there[None, :], other=0)
        scale, zero = scale_and_zero(pairs)
        columns = x + m[:, None] * (num_groups * GROUP) + (groups * GROUP + words % WORDS)[None, :]
        for turn in tl.static_range(4):
            low, high = two_codes(packed, turn, low_bits, high_bits)
            # Exact: fp32 holds all bits of each product.
            low, high = low * (256 * scale) - (256 + zero) * scale, high * (16 * scale) - (16 + zero) * scale
            low_x = tl.load(columns + 2 * turn * WORDS, mask=(m < M)[:, None] & there[None, :], other=0)
            high_x = tl.load(columns + (2 * turn + 1) * WORDS, mask=(m < M)[:, None] & there[None, :], other=0)
            acc = tl.dot(low_x, tl.trans(low.to(low_x.dtype)), acc, input_precision="ieee")
            acc = tl.dot(high_x, tl.trans(high.to(high_x.dtype)), acc, input_precision="ieee")
    store_sums(y, acc, n, bias, residual, M, N, GATED)


def int4_tile(N: int, K: int, group_size: int) -> dict[str, int]:
    """Return the tile of `int4_row`: 16 bytes of each row per thread, and threads for all of K, up to 64."""
    words = min(256, triton.next_power_of_2(K // 8))
    rows = 8 if N >= MANY_ROWS else 4
    return {"ROWS": rows, "BLOCK": max(1, words * 8 // group_size), "num_warps": max(1, words // 128)}


INT4_ROWS_TILE = {"ROWS": 32, "BLOCK": 32, "num_warps": 4}


def int4_product(
    x: Tensor, weight: Tensor, parameters: Tensor, *, bias: Tensor | None = None, norm: Tensor | None = None,
    eps: float = 0.0, gated: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Multiply x [M, K], M at most 16, with a weight as `CudaInt4` packs it; returns [M, N], gated [M, N / 2].

    bias [N]. norm [K], of one row alone: the weight of an RMSNorm. residual: as what is returned.
    """
    (M, K), (N, num_groups) = x.shape, parameters.shape
    assert norm is None or M == 1
    tile = int4_tile(N, K, K // num_groups) if M == 1 else INT4_ROWS_TILE
    sizes = {"GROUP": K // num_groups, "GATED": gated} | tile
    residual = None if residual is None else residual.contiguous()
    x, y, grid = x.contiguous(), empty_product(x, N, gated), (triton.cdiv(N, tile["ROWS"]),)
    if M == 1:
        int4_row[grid](
            x, norm, weight, parameters, bias, residual, y, N, num_groups, eps, *CODE_BITS, **sizes
        )  # fmt: skip
    else:
        int4_rows[grid](x, weight, parameters, bias, residual, y, M, N, num_groups, *CODE_BITS, **sizes)
    return y


def pack_int4(codes: Tensor, group_size: int) -> Tensor:
    """Pack codes uint8 0 to 15 [N, K] as described above: int32 [N, K / 8]."""
    eighths = codes.unflatten(-1, (-1, 8, group_size // 8)).transpose(-2, -1).contiguous()
    words = (eighths[..., ::2] | eighths[..., 1::2] << 4).contiguous().view(torch.int32).flatten(-3)
    return words << 15 | words >> 17 & 0x7FFF


def unpack_int4(weight: Tensor, group_size: int) -> Tensor:
    """Undo `pack_int4`: uint8 [N, K]."""
    words = (weight << 17 | weight >> 15 & 0x1FFFF).unflatten(-1, (-1, group_size // 8, 1))
    as_bytes = words.view(torch.uint8)
    return torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).flatten(-2).transpose(-2, -1).flatten(-3)


class CudaInt4(CudaLinear):
    """codes uint8 0 to 15 [N, K]; zeros uint8 0 to 15 and scales, exact in bf16, [N, K / group]."""

    names = ("weight", "parameters_of_groups")
    max_rows_normalized = 1

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None):
        super().__init__(bias)
        self.weight = frozen_parameter(pack_int4(codes, codes.shape[-1] // scales.shape[-1]))
        pairs = torch.stack((scales.bfloat16(), zeros.bfloat16()), dim=-1)
        self.parameters_of_groups = frozen_parameter(pairs.view(torch.int32).squeeze(-1))

    @staticmethod
    def product(rows: Tensor, weight: Tensor, parameters: Tensor, **around: Any) -> Tensor:
        return torch.ops.kernels.cuda_int4_product(rows, weight, parameters, **around)

    @staticmethod
    def gemm(rows: Tensor, weight: Tensor, parameters: Tensor) -> Tensor:
        group_size = rows.shape[1] // parameters.shape[1]
        # In bf16 a code less its zero point is exact, and its product with a scale is rounded once, as from fp32.
        wide = torch.promote_types(rows.dtype, torch.bfloat16)
        scales, zeros = parameters.unsqueeze(-1).view(torch.bfloat16).to(wide).unsqueeze(-2).unbind(-1)
        codes = unpack_int4(weight, group_size).unflatten(-1, (-1, group_size))
        return F.linear(rows, ((codes - zeros) * scales).flatten(-2).to(rows.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# int8


@triton.jit(do_not_specialize=["M"])
def int8_rows(  # type: ignore[no-untyped-def]
    x, weight, scales, bias, residual, y, M, N, K,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Multiply up to 16 rows x [M, K] with ROWS rows of a weight [N, K], BLOCK columns at a time."""
    m = tl.arange(0, 16)
    n = rows_of_program(N, ROWS, GATED)
    acc = tl.zeros((16, ROWS), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        there = (k < K)[None, :]
        codes = tl.load(weight + n[:, None].to(tl.int64) * K + k[None, :], mask=(n < N)[:, None] & there, other=0)
        values = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & there, other=0)
        acc = tl.dot(values, tl.trans(codes.to(values.dtype)), acc, input_precision="ieee")
    acc *= tl.load(scales + n, mask=n < N, other=0).to(tl.float32)[None, :]
    store_sums(y, acc, n, bias, residual, M, N, GATED)


INT8_TILE = {"ROWS": 32, "BLOCK": 256, "num_warps": 4}


def int8_product(
    x: Tensor, weight: Tensor, scales: Tensor, *, bias: Tensor | None = None, gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Multiply x [M, K], M at most 16, with codes [N, K] and scales [N]; returns [M, N], gated [M, N / 2].

    bias [N]. residual: as what is returned.
    """
    (M, K), N = x.shape, weight.shape[0]
    residual = None if residual is None else residual.contiguous()
    x, y, grid = x.contiguous(), empty_product(x, N, gated), (triton.cdiv(N, INT8_TILE["ROWS"]),)
    int8_rows[grid](x, weight, scales, bias, residual, y, M, N, K, GATED=gated, **INT8_TILE)
    return y


class CudaInt8(CudaLinear, AtenInt8):
    """With the tensors of the CPU's layer; only the product of up to 16 rows differs."""

    def fused(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor | None:
        # For one or two rows inductor's loop reads the codes once; for more it would write the weight to memory first.
        if is_reduction(x):
            return streamed_linear(x, self.weight, self.bias, self.scales, norm, gated, residual)
        return super().fused(x, norm, gated, residual)

    @staticmethod
    def product(rows: Tensor, weight: Tensor, scales: Tensor, **around: Any) -> Tensor:
        return torch.ops.kernels.cuda_int8_product(rows, weight, scales, **around)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@triton.jit
def attend_split(  # type: ignore[no-untyped-def]
    q, k, v, mask, partial, largest, total, T, kv_heads, k_batch, k_head, v_batch, v_head, splits, scale,
    S: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Attend from the G * S queries of a kv head to every `splits`-th block of its slots.

    Blocks are dealt to the splits in turn, so that the work is even wherever the text ends. Blocks before the first
    that the mask shows and after the last are not loaded: the cost follows the text and not the cache.
    """
    head, split = tl.program_id(0), tl.program_id(1)  # head: of all rows of the batch
    b = head // kv_heads
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)  # s * G + g
    s, is_row = rows // G, rows < G * S
    d = tl.arange(0, WIDTH)
    columns = tl.arange(0, BLOCK)
    mask += b.to(tl.int64) * S * T

    # This split's blocks are j * splits + split; find the range from `begin` to `end` that any query sees.
    num_blocks = tl.cdiv(T, BLOCK)
    count = (num_blocks - split + splits - 1) // splits
    begin, end = count, 0
    for first in range(0, count, LOOK):
        j = first + tl.arange(0, LOOK)
        t = (j * splits + split)[:, None] * BLOCK + columns[None, :]
        visible_slots = tl.zeros((LOOK, BLOCK), tl.int32)
        for i in range(S):
            visible_slots |= tl.load(mask + i * T + t, mask=t < T, other=0).to(tl.int32)
        any_seen = tl.max(visible_slots, axis=1) > 0
        begin = tl.minimum(begin, tl.min(tl.where(any_seen, j, count)))
        end = tl.maximum(end, tl.max(tl.where(any_seen, j + 1, 0)))

    # q [B, S, kv_heads, G, D]
    q_row = (b * S + s) * kv_heads * G + (head % kv_heads) * G + rows % G
    queries = tl.load(q + q_row[:, None] * D + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0)
    k += b.to(tl.int64) * k_batch + (head % kv_heads).to(tl.int64) * k_head
    v += b.to(tl.int64) * v_batch + (head % kv_heads).to(tl.int64) * v_head
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for j in range(begin, end):
        t = (j * splits + split) * BLOCK + columns
        there = (t < T)[:, None] & (d < D)[None, :]
        keys = tl.load(k + t[:, None] * D + d[None, :], mask=there, other=0)
        values = tl.load(v + t[:, None] * D + d[None, :], mask=there, other=0)
        visible = tl.load(mask + s[:, None] * T + t[None, :], mask=is_row[:, None] & (t < T)[None, :], other=0) != 0
        # A slot that no query sees may hold NaN, which a weight of 0 does not clear.
        values = tl.where((tl.max(visible.to(tl.int32), axis=0) > 0)[:, None], values, 0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(visible, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing seen yet
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        weights = weights * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    row = (head * splits + split) * (G * S) + rows
    tl.store(largest + row, top, mask=is_row)
    tl.store(total + row, weights, mask=is_row)
    tl.store(partial + row[:, None] * D + d[None, :], acc, mask=is_row[:, None] & (d < D)[None, :])


@triton.jit
def combine_splits(  # type: ignore[no-untyped-def]
    partial, largest, total, y, kv_heads, splits,
    S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Add up the splits' results for one query, each relative to the largest score of its split."""
    head, row = tl.program_id(0), tl.program_id(1)  # row: s * G + g
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    there = split < splits
    at = (head * splits + split) * (G * S) + row
    top = tl.load(largest + at, mask=there, other=-float("inf"))
    best = tl.max(top, axis=0)
    share = tl.exp2(top - tl.where(best == -float("inf"), 0.0, best))
    weight = tl.sum(share * tl.load(total + at, mask=there, other=0), axis=0)
    values = tl.load(partial + at[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
    result = tl.sum(values * share[:, None], axis=0) / tl.where(weight == 0, 1.0, weight)  # 0 for a blind query
    to = (((head // kv_heads) * S + row // G) * kv_heads + head % kv_heads) * G + row % G
    tl.store(y + to * D + d, result.to(y.dtype.element_ty), mask=d < D)


def num_splits(num_heads: int, T: int) -> int:
    """Return the number of splits of each kv head's slots: a power of 2, for as few programs as fill a GPU."""
    return min(triton.next_power_of_2(triton.cdiv(T, SLOTS)), triton.next_power_of_2(triton.cdiv(PROGRAMS, num_heads)))


def attention_tile(S: int, G: int, D: int) -> dict[str, Any]:
    rows = min(MAX_TILE, max(16, triton.next_power_of_2(S * G)))
    return {"S": S, "G": G, "D": D, "ROWS": rows, "WIDTH": max(16, triton.next_power_of_2(D)), "BLOCK": SLOTS,
            "LOOK": LOOK_AHEAD, "num_warps": rows // 4, "num_stages": 2}  # fmt: skip


def split_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As `model.attention`, for S up to MAX_QUERIES; a query that sees nothing gets 0."""
    (B, S, H, D), (_, K, T, _) = q.shape, k.shape
    if k.stride()[2:] != (D, 1) or v.stride()[2:] != (D, 1):  # not the slots of a cache
        k, v = k.contiguous(), v.contiguous()
    q, mask, y = q.contiguous(), mask.contiguous(), q.new_empty(q.shape)
    splits = num_splits(B * K, T)
    partial = q.new_empty(B * K, splits, S * (H // K), D, dtype=torch.float32)
    largest, total = q.new_empty(2, *partial.shape[:-1], dtype=torch.float32)
    tile = attention_tile(S, H // K, D)
    scale = D**-0.5 * 1.4426950408889634  # log2(e): the kernel takes powers of 2
    attend_split[(B * K, splits, triton.cdiv(S * (H // K), tile["ROWS"]))](
        q, k, v, mask.view(torch.int8), partial, largest, total, T, K, *k.stride()[:2], *v.stride()[:2], splits, scale,
        **tile,
    )  # fmt: skip
    combine_splits[(B * K, S * (H // K))](
        partial, largest, total, y, K, splits, S=S, G=H // K, D=D, WIDTH=tile["WIDTH"], SPLITS=splits
    )
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As `model.attention`: for few queries the kernel above, else a fused one of torch's."""
    G = q.shape[2] // k.shape[1]
    if q.shape[1] <= MAX_QUERIES:
        return torch.ops.kernels.cuda_attention(q, k, v, mask)
    visible_slots = mask.any(dim=1)[:, None, :, None]
    # The only fused kernel of torch's that takes a mask on every GPU is the memory-efficient one, which does not take
    # grouped heads: K and V are repeated, a copy that is small beside the products of a prompt.
    k, v = (torch.where(visible_slots, t, 0).repeat_interleave(G, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask.unsqueeze(1)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The operators
#
# Opaque to torch.compile, like those of cpu.py: there is nothing for inductor to fuse with, and in a CUDA graph a
# call costs no time on the host. As a `triton_op` a kernel would be compiled anew with every graph.


def define(name: str, schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    torch.library.define(f"kernels::{name}", schema)
    torch.library.impl(f"kernels::{name}", "CUDA")(run)
    torch.library.register_fake(f"kernels::{name}")(fake)


define(
    "cuda_int4_product",
    "(Tensor x, Tensor weight, Tensor parameters, *, Tensor? bias=None, Tensor? norm=None, float eps=0.0, "
    "bool gated=False, Tensor? residual=None) -> Tensor",
    int4_product, lambda x, weight, parameters, *, gated=False, **_: empty_product(x, parameters.shape[0], gated),
)  # fmt: skip
define(
    "cuda_int8_product",
    "(Tensor x, Tensor weight, Tensor scales, *, Tensor? bias=None, bool gated=False, Tensor? residual=None) -> Tensor",
    int8_product, lambda x, weight, scales, *, gated=False, **_: empty_product(x, weight.shape[0], gated),
)  # fmt: skip
define(
    "cuda_attention", "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor",
    split_attention, lambda q, k, v, mask: q.new_empty(q.shape),
)  # fmt: skip
assert MAX_ROWS <= 16  # the rows of a tensor core's tile
