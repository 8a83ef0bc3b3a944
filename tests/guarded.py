"""Run the C++ kernels on tensors that end where memory begins that may not be read, and on ones that begin behind such.

test_kernels.py starts it as a process of its own: a read too far ends it.
"""

import ctypes
import math
import mmap

import torch
from torch import Tensor

from kernels.cpu import CpuDense, CpuInt4, CpuInt8, CpuLinear, code_rows, dtypes, library
from kernels.layers import MAX_ROWS
from linears import pack_nibbles
from tests.rounded import quantize_int4, quantize_int8

PROT_NONE = 0
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """Copy a tensor into memory of its own, with a page that may not be read right behind it, or before it."""
    page = mmap.PAGESIZE
    size = math.ceil(tensor.nbytes / page) * page
    memory = mmap.mmap(-1, size + page)  # which the tensor keeps
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert mprotect(begin + size if at_end else begin, page, PROT_NONE) == 0
    offset = size - tensor.nbytes if at_end else page
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.get_default_dtype())


def products(at_end: bool) -> int:
    count = 0
    for N, K in [(4, 64), (64, 128), (32, 64), (36, 704), (96, 2112)]:
        weight = drawn(N, K)
        layers: list[CpuLinear] = [CpuDense(weight, None)]
        if N % code_rows() == 0:
            layers.append(CpuInt8(*quantize_int8(weight), None))
            layers.append(CpuInt8(*quantize_int8(weight, 32), None, torch.ones(N, K // 32, dtype=torch.int8)))
            codes, scales, zeros = quantize_int4(weight, 64)
            layers.append(CpuInt4(pack_nibbles(codes), scales, zeros, None))
        for layer in layers:
            tensors = [guarded(getattr(layer, name).detach(), at_end) for name in layer.names]
            for rows in (*range(1, MAX_ROWS + 1), 33, 70):
                x = drawn(rows, K)
                y = layer.product(guarded(x, at_end), *tensors)
                assert torch.equal(y, layer.product(x, *layer.tensors))
                count += 1
            stacks = [guarded(tensor[None], at_end) for tensor in layer.tensors]
            x, experts = drawn(3, 1, K), torch.zeros(3, 1, dtype=torch.long)
            y = layer.product(guarded(x, at_end), *stacks, experts=guarded(experts, at_end))
            assert torch.equal(y.squeeze(1), layer.product(x.squeeze(1), *layer.tensors))
            count += 1
    return count


def attentions(at_end: bool) -> int:
    count = 0
    for queries, heads, kv_heads, slots, head_dim in [
        (1, 4, 2, 64, 64), (5, 4, 1, 70, 32), (3, 2, 2, 200, 80), (17, 8, 2, 129, 128),
    ]:  # fmt: skip
        q, k, v = drawn(1, queries, heads, head_dim), *(drawn(1, kv_heads, slots, head_dim) for _ in range(2))
        mask = torch.arange(slots) <= torch.arange(slots - queries, slots)[:, None]
        tensors = [guarded(each, at_end) for each in (q, k, v, mask[None])]
        assert torch.equal(torch.ops.kernels.attention(*tensors), torch.ops.kernels.attention(q, k, v, mask[None]))
        count += 1
    return count


def blocks(at_end: bool) -> int:
    kernels, count = torch.ops.kernels, 0
    for rows, heads, kv_heads, head_dim in [(1, 4, 2, 32), (3, 2, 2, 80), (MAX_ROWS, 1, 1, 96), (33, 2, 1, 32)]:
        size = 32 * heads
        x, weight, both, back = drawn(1, rows, size), drawn(size), drawn(192, size), drawn(size, 96)
        qkv, o = drawn((heads + 2 * kv_heads) * head_dim, size), drawn(size, heads * head_dim)
        cos, sin = torch.randn(2, 1, rows, 1, 2, head_dim // 2, dtype=torch.float32)
        positions, mask = torch.arange(rows)[None], torch.ones(1, rows, rows, dtype=torch.bool)
        caches = [drawn(1, kv_heads, rows, head_dim) for _ in range(2)]

        def run(x: Tensor, weight: Tensor, both: Tensor, back: Tensor, qkv: Tensor, o: Tensor, *rest: Tensor) -> Tensor:
            around = weight, weight, 1e-5, None, 1
            cos, sin, positions, mask, *caches = rest
            sublayers = [
                kernels.describe_attention(
                    *around,
                    [qkv],
                    None,
                    None,
                    [o],
                    None,
                    None,
                    0,
                    weight[: 2 * cos.shape[-1]],
                    None,
                    1,
                    0,
                    1,
                    None,
                    False,
                ),
                kernels.describe_feed_forward(*around, [both], None, None, [back], None, None, False, None, 0, False),
            ]
            whole = torch.cat(sublayers)
            return kernels.run_sublayers(x, whole, o.shape[0], [], [cos], [sin], positions, [mask], caches)[0]

        tensors = [x, weight, both, back, qkv, o, cos, sin, positions, mask, *caches]
        assert torch.equal(run(*(guarded(tensor, at_end) for tensor in tensors)), run(*tensors))
        count += 1
    return count


if __name__ == "__main__":
    assert library() is not None
    torch.manual_seed(0)
    count = 0
    for dtype in dtypes():
        torch.set_default_dtype(dtype)
        with torch.inference_mode():
            count += sum(products(at_end) + attentions(at_end) + blocks(at_end) for at_end in (True, False))
    print(count)
