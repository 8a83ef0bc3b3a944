"""The C++ kernels against their plain twins."""

import contextlib
import copy
import ctypes
import gc
import math
import mmap
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load_model, save_hub_checkpoint
from compressed import quantization_config
from eagle import FirstBlock
from kernels import cpu, inductor
from kernels.cpu import CpuBlocks, CpuDense, CpuInt4, CpuInt8, code_rows, empty_weight, packed_weight
from kernels.experts import KernelExperts
from kernels.inductor import MAX_REDUCTION_ROWS, is_reduction
from kernels.layers import MAX_ROWS, FusedLinear, KernelLinear, Reordered
from kernels.optimize import FusedBlock, cpu_layer, optimize_
from linears import (
    GROUP_SIZES,
    Form,
    StoredLinear,
    dequantize,
    frozen_parameter,
    is_router,
    pack_nibbles,
    quantize_linear,
)
from model import (
    MLP,
    Block,
    Experts,
    Linear,
    ModelConfig,
    RMSNorm,
    RopeScaling,
    Transformer,
    attention,
    by_expert,
    run_blocks,
    swiglu,
)  # fmt: skip
from random_weights import random_model
from tests.conftest import HANG, REPO
from tests.rounded import quantize_int4, quantize_int8
from tests.test_graphs import RAW

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the CPU has no AVX2, or there is no C++ compiler")


def layer_for(weight: Tensor) -> torch.nn.Module | None:
    """Return the layer whose kernel takes a weight in a model of the weight's dtype."""
    stored = Linear(1, 1).requires_grad_(False)
    stored.weight = frozen_parameter(weight)
    return cpu_layer(stored, weight.dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextlib.contextmanager
def on_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_int4(codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> CpuInt4:
    return CpuInt4(pack_nibbles(codes), scales, zeros, bias)


def assert_product(layer: torch.nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check against the product in fp64: weights may be rounded to bf16, and results are, twice with their bias."""
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    y = layer(x)
    assert y.dtype == x.dtype and y.shape == expected.shape
    bound = 2**-7 * expected.abs() + 2**-9 * F.linear(x.double().abs(), weight.double().abs()) + 2**-6
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", cpu.dtypes(), ids=str)
@pytest.mark.parametrize("shape", [(4, 128), (64, 256), (300, 640), (352, 640), (32, 96)], ids=str)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 3))
def test_products_equal_their_twins_at_every_number_of_rows(
    rows: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    N, K = shape
    x, weight, bias = (normal(*size, seed=seed, dtype=dtype) for seed, size in enumerate([(rows, K), (N, K), (N,)]))
    assert_product(CpuDense(weight, bias), x, weight, bias)
    codes, scales = quantize_int8(weight)
    assert_product(CpuInt8(codes, scales, bias), x, dequantize(codes, scales), bias)
    for group_size in (size for size in GROUP_SIZES if K % size == 0):
        quantized = quantize_int4(weight, group_size)
        twin = dequantize(*quantized, group_size)
        assert_product(cpu_int4(*quantized, bias), x, twin, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, MAX_ROWS, MAX_ROWS + 1])
def test_groups_zero_points_and_scales_of_every_dtype_equal_their_twins(rows: int, dtype: torch.dtype) -> None:
    N, K = 64, 384
    x, generator = normal(rows, K), torch.Generator().manual_seed(1)
    for group_size in (32, 96, 128, 384):
        shape = N, K // group_size
        scales = (torch.randn(shape, generator=generator) / 100).to(dtype)  # of both signs
        codes = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
        for zeros in (None, torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)):
            twin = dequantize(codes, scales, 0 if zeros is None else zeros, group_size)
            assert_product(CpuInt8(codes, scales, None, zeros), x, twin, None)
        codes = torch.randint(16, (N, K), dtype=torch.uint8, generator=generator)
        zeros = torch.randint(16, shape, dtype=torch.uint8, generator=generator)
        assert_product(cpu_int4(codes, scales, zeros, None), x, dequantize(codes, scales, zeros, group_size), None)


def stacks_of(weight: Tensor) -> list[tuple[KernelLinear, Tensor]]:
    """Return a stack [X, N, K] in every form, with its twin."""
    X, N, K = weight.shape
    layers: list[tuple[KernelLinear, Tensor]] = [(CpuDense(weight, None), weight)]
    if N % code_rows() == 0:
        zeros = torch.arange(X * N * K // 32, dtype=torch.int8).view(X, N, K // 32)
        for group_size, points in ((None, None), (32, zeros)):
            codes, scales = quantize_int8(weight, group_size)
            twin = dequantize(codes, scales, 0 if points is None else points, group_size)
            layers.append((CpuInt8(codes, scales, None, points), twin))
        quantized = quantize_int4(weight, 32)
        layers.append((cpu_int4(*quantized, None), dequantize(*quantized, 32)))
    return layers


@pytest.mark.parametrize("dtype", cpu.dtypes(), ids=str)
@pytest.mark.parametrize("threads", [2, 5])
# X, A, N, K: an expert that all take, as many as there are, more rows of one than a pass takes, shares that end in one.
@pytest.mark.parametrize(
    "shape", [(1, 1, 16, 64), (3, 3, 20, 32), (5, 2, 48, 704), (128, 8, 32, 128), (4, 2, 304, 640)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 2, 5, MAX_ROWS, MAX_ROWS + 1, 70])
def test_experts_of_any_rows_equal_their_twins(
    tokens: int, shape: tuple[int, int, int, int], threads: int, dtype: torch.dtype
) -> None:
    X, A, N, K = shape
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.stack([torch.randperm(X, generator=generator)[:A] for _ in range(tokens)])
    shared, own = normal(tokens, 1, K, dtype=dtype).expand(-1, A, -1), normal(tokens, A, K, dtype=dtype)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return by_expert(x, experts, lambda i, rows: rows @ weight[i].T)

    for layer, twin in stacks_of(normal(X, N, K, seed=1, dtype=dtype)):
        for x in (shared, own, own.mT.contiguous().mT):
            wide, weight = x.double(), twin.double()
            expected, spread = product(wide, weight), product(wide.abs(), weight.abs())
            with on_threads(threads):
                y = KernelExperts(layer)(x, experts)
            assert y.dtype == dtype
            assert ((y.double() - expected).abs() <= 2**-7 * expected.abs() + 2**-9 * spread + 2**-6).all()


def test_experts_with_many_rows_and_with_few_stand_beside_each_other() -> None:
    counts = torch.tensor([20, 3, 2, 40, 5, 1])
    experts, weight = torch.arange(6).repeat_interleave(counts)[:, None], normal(6, 32, 64, seed=1)
    x = normal(len(experts), 1, 64)
    expected = torch.einsum("mak,mank->man", x.double(), weight.double()[experts])
    y = KernelExperts(CpuDense(weight, None))(x, experts)
    torch.testing.assert_close(y.double(), expected, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_read_beyond_a_tensor(threads: int) -> None:
    """With pages around each that may not be read; prefetches may go there."""
    command = [sys.executable, "-m", "tests.guarded"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=HANG)
    assert (result.returncode, result.stdout) == (0, f"{len(cpu.dtypes()) * 2 * (14 * (MAX_ROWS + 3) + 4 + 4)}\n"), (
        result.stderr
    )


@pytest.mark.parametrize("rows", [1, 6, 11])
@pytest.mark.parametrize("N", [1300, 4384])
def test_threads_that_share_a_product_out_leave_none_of_it(N: int, rows: int) -> None:
    """Cut into many pieces, which the threads take as they come; more threads than cores, so that some are late."""
    x, weight = normal(rows, 2048), normal(N, 2048, seed=1)
    layers: list[torch.nn.Module] = [CpuDense(weight, None)]
    if N % code_rows() == 0:
        layers.append(CpuInt8(*quantize_int8(weight), None))
        layers.append(cpu_int4(*quantize_int4(weight, 32), None))
    for layer in layers:
        with on_threads(1):
            expected = layer(x)
        for threads in (2, 3, 7):
            with on_threads(threads):
                # The sign alternates, since y's memory holds what the call before wrote.
                assert all(torch.equal(layer(s * x), s * expected) for _ in range(10) for s in (1, -1))
    assert_product(layers[0], x, weight, None)


# A busy program, which ends by itself if the test that started it is killed.
LOOP = "import time; end = time.time() + 60\nwhile time.time() < end: pass"


@contextlib.contextmanager
def own_threads(threads: int) -> Iterator[None]:
    model = torch.nn.Module()
    cpu.served.add(model)
    with on_threads(threads), cpu.own_threads(1, model):
        assert torch.get_num_threads() == 1
        yield


@pytest.mark.parametrize("rows", [1, 11, 70])
def test_own_threads_compute_what_those_of_openmp_do(rows: int) -> None:
    """More threads than cores, beside busy loops: many lose their core with a piece, and stay away."""
    x, weight = normal(rows, 2048), normal(4384, 2048, seed=1)
    q, k, v = normal(1, 3, 4, 64), normal(1, 2, 700, 64, seed=1), normal(1, 2, 700, 64, seed=2)
    mask = torch.ones(1, 3, 700, dtype=torch.bool).tril(600)
    layers = [CpuDense(weight, None), CpuInt8(*quantize_int8(weight), None), cpu_int4(*quantize_int4(weight, 32), None)]
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(2)]
    try:
        for threads in (2, 5):
            with on_threads(threads):
                expected = [layer(x) for layer in layers]
                seen = torch.ops.kernels.attention.default(q, k, v, mask)
            with own_threads(threads):
                for _ in range(20):
                    for layer, y in zip(layers, expected, strict=True):
                        assert all(torch.equal(layer(s * x), s * y) for s in (1, -1))
                    assert torch.equal(torch.ops.kernels.attention.default(q, k, v, mask), seen)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_own_threads_serve_several_callers_and_forks() -> None:
    x, weight = normal(1, 2048), normal(4384, 2048, seed=1)
    layer = CpuDense(weight, None)
    expected = layer(x)

    def call() -> bool:
        with own_threads(3):
            return all(torch.equal(layer(s * x), s * expected) for _ in range(20) for s in (1, -1))

    with ThreadPoolExecutor(3) as callers:
        assert all(future.result() for future in [callers.submit(call) for _ in range(6)])
    if (child := os.fork()) == 0:
        os._exit(0 if call() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("N", [64, 61])  # 61: rows of zeros fill the last block
def test_biases_of_codes_stay_parameters(N: int) -> None:
    """Which a model that is moved takes along."""
    linear = Linear(64, N, bias=True)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)  # type: ignore[arg-type]
    layer = cpu_layer(quantize_linear(linear.bfloat16(), Form(8)), torch.bfloat16)
    assert isinstance(layer, CpuInt8) and "bias" in dict(layer.named_parameters())
    x = normal(1, 64)
    torch.testing.assert_close(layer.half()(x.half()).float(), layer.bfloat16()(x).float(), rtol=2**-6, atol=2**-5)


def test_own_threads_are_for_models_that_are_all_kernels() -> None:
    raw = RAW | {"hidden_size": 128, "intermediate_size": 192, "quantization_config": quantization_config(Form(8))}
    model, wide = (random_model(form, dtype=torch.bfloat16) for form in (RAW, raw))
    exact, split = random_model(RAW, dtype=torch.float32), random_model(RAW, dtype=torch.bfloat16)
    split.run_blocks = run_blocks  # torch's operators stand between the products
    with on_threads(2):
        for given, rows, expected in (
            ([model], 1, 1), ([wide], MAX_ROWS, 1), ([model], MAX_ROWS + 1, 1), ([exact], 1, 2), ([split], 1, 1),
            ([split], MAX_ROWS + 1, 2), ([model, wide], 1, 1), ([model, exact], 1, 2), ([exact, model], 1, 2),
            ([model, split], MAX_ROWS + 1, 2),
        ):  # fmt: skip
            with contextlib.suppress(ZeroDivisionError), cpu.own_threads(rows, *given):
                assert torch.get_num_threads() == expected
                raise ZeroDivisionError
            assert torch.get_num_threads() == 2


def test_each_row_is_multiplied_alone() -> None:
    x = normal(MAX_ROWS, 256)
    layers = [CpuDense(normal(64, 256), None), CpuInt8(*quantize_int8(normal(64, 256)), None)]
    layers.append(cpu_int4(*quantize_int4(normal(64, 256), 32), None))
    for layer in layers:
        together = layer(x)
        for i in (0, 7, 8, MAX_ROWS - 1):
            changed = x.clone()
            changed[i] = torch.nan
            others = [n for n in range(MAX_ROWS) if n != i]
            assert torch.equal(layer(changed)[others], together[others])
            assert layer(changed)[i].isnan().all()


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_x_of_any_size_is_multiplied_as_its_twin(rows: int) -> None:
    """Values in 32 columns that differ by up to 2^40, rows of tiny, of huge and of no values, and with an infinity."""
    weight = normal(64, 256)
    sizes = torch.randint(-20, 20, (rows, 256), generator=torch.Generator().manual_seed(1))
    codes, scales = quantize_int8(weight)
    quantized = quantize_int4(weight, 32)
    for layer, twin in (
        (CpuInt8(codes, scales, None), dequantize(codes, scales)),
        (cpu_int4(*quantized, None), dequantize(*quantized, 32)),
    ):
        for x in (
            torch.ldexp(normal(rows, 256).float(), sizes).bfloat16(), normal(rows, 256) * 2.0**-100,
            normal(rows, 256) * 2.0**110, torch.zeros(rows, 256, dtype=torch.bfloat16),
        ):  # fmt: skip
            expected = F.linear(x.double(), twin.double())
            spread = F.linear(
                x.double().abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1), twin.double().abs()
            )
            bound = 2**-7 * expected.abs() + 2**-9 * spread
            assert ((layer(x).double() - expected).abs() <= bound).all()
        x = normal(rows, 256)
        x[-1, 77] = torch.inf
        assert not layer(x)[-1].isfinite().any()
        assert layer(x)[:-1].isfinite().all()


def test_weights_of_zero_give_zero_whatever_their_zero_point() -> None:
    x = normal(5, 256)
    zeros = torch.arange(16, dtype=torch.uint8).repeat(4)[:, None].expand(64, 4).contiguous()
    scales = normal(64, 4).abs()
    layer = cpu_int4(zeros.repeat_interleave(64, 1), scales, zeros, None)
    wide = (zeros.to(torch.int8) - 8) * 16
    for rows in (1, 5):
        if cpu.instruction_set() in ("avx2", "amx"):  # AVX-512 may take them off in fp32, which rounds
            assert (layer(x[:rows]) == 0).all()
        assert (CpuInt8(wide.repeat_interleave(64, 1), scales, None, wide)(x[:rows]).abs() < 1e-2).all()


def test_weights_are_unpacked_for_many_rows_as_they_are_dequantized() -> None:
    one_each = torch.eye(192).bfloat16()  # a product with it is the weight itself
    codes, scales = quantize_int8(normal(64, 192))
    assert torch.equal(CpuInt8(codes, scales, None)(one_each), dequantize(codes, scales).bfloat16().T)
    for group_size in (32, 64):
        codes, scales = quantize_int8(normal(64, 192), group_size)
        zeros = (torch.arange(scales.numel()) % 100).to(torch.int8).view_as(scales)
        twin = dequantize(codes, scales, zeros, group_size).bfloat16().T
        assert torch.equal(CpuInt8(codes, scales, None, zeros)(one_each), twin)
        quantized = quantize_int4(normal(64, 192), group_size)
        unpacked = cpu_int4(*quantized, None)(one_each)
        twin = dequantize(*quantized, group_size).bfloat16().T
        assert torch.equal(unpacked, twin)


def test_weights_of_several_pieces_are_multiplied_whole() -> None:
    x, weight = normal(40, 1024), normal(4192, 1024, seed=1)  # pieces are of half a MiB in bf16 or fp32
    assert_product(CpuDense(weight, None), x, weight, None)
    codes, scales = quantize_int8(weight)
    assert_product(CpuInt8(codes, scales, None), x, dequantize(codes, scales), None)
    quantized = quantize_int4(weight, 32)
    assert_product(cpu_int4(*quantized, None), x, dequantize(*quantized, 32), None)


@pytest.mark.parametrize("dtype", cpu.dtypes(), ids=str)
@pytest.mark.parametrize("rows", [17, 31, 33, 48, 64, 65, 130, 1041])
def test_many_rows_that_no_tile_divides_equal_their_twins(rows: int, dtype: torch.dtype) -> None:
    for N, K in ((4, 96), (16, 32), (16, 2080), (48, 608), (172, 64), (224, 96)):
        x, weight = normal(rows, K, dtype=dtype), normal(N, K, seed=1, dtype=dtype)
        assert_product(CpuDense(weight, None), x, weight, None)
        if N % 16:
            continue
        codes, scales = quantize_int8(weight)
        assert_product(CpuInt8(codes, scales, None), x, dequantize(codes, scales), None)
        quantized = quantize_int4(weight, 32)
        assert_product(cpu_int4(*quantized, None), x, dequantize(*quantized, 32), None)


def test_no_rows_are_no_outputs() -> None:
    quantized = quantize_int4(normal(64, 256), 32)
    for layer in (CpuDense(normal(64, 256), None), cpu_int4(*quantized, None)):
        assert layer(normal(3, 0, 256)).shape == (3, 0, 64)
    for rows in (2, 20):
        assert CpuDense(normal(0, 64), None)(normal(rows, 64)).shape == (rows, 0)


def test_inputs_that_are_not_contiguous_are_read_as_they_are() -> None:
    x, weight = normal(4, 512)[:, ::2], normal(64, 256, seed=1)
    assert_product(CpuDense(weight, None), x, weight, None)


@pytest.mark.parametrize("K", [32, 96, 160, 224, 2080])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 8, 16])
def test_bf16_products_of_rows_that_no_loop_divides_equal_their_twins(rows: int, K: int) -> None:
    x, weight = normal(rows, K), normal(20, K, seed=1)
    layer = layer_for(weight)
    assert isinstance(layer, CpuDense)
    assert_product(layer, x, weight, None)


def test_bf16_products_of_rows_too_large_for_the_first_cache_equal_their_twins() -> None:
    for rows, K in ((5, 4128), (8, 5632), (16, 2592)):
        x, weight = normal(rows, K), normal(12, K, seed=1)
        assert rows * K * x.itemsize > 40 << 10
        assert_product(CpuDense(weight, None), x, weight, None)


def test_what_the_kernels_cannot_take_is_left_to_others() -> None:
    weight = torch.empty(64, 128, dtype=torch.bfloat16)
    assert isinstance(layer_for(weight), CpuDense)
    strided = torch.empty(64, 256, dtype=torch.bfloat16)[:, ::2]
    for other in (weight.float(), weight[:63], weight[:, :100], weight.to("meta"), strided):
        assert layer_for(other) is None
    assert isinstance(layer_for(weight.half()), CpuDense) == (torch.float16 in cpu.dtypes())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 48, 96, 128, 192])
def test_groups_that_are_not_of_whole_vectors_are_left_to_the_plain_path(group_size: int, bits: int) -> None:
    """The last of 128 has 64: all are split in such."""
    x, weight, form = normal(3, 192), Linear(192, 64), Form(bits, group_size, has_zeros=bits == 4)
    weight.weight = frozen_parameter(normal(64, 192, seed=1))
    stored = quantize_linear(weight, form)
    assert isinstance(stored, StoredLinear)
    twin = stored.dequantize()
    layer = cpu_layer(stored, torch.bfloat16)
    assert (layer is None) == (math.gcd(group_size, 192) % 32 != 0)
    assert_product(layer or stored, x, twin, None)


def memory_facts(address: int, fact: str) -> list[str]:
    """Return what Linux says of the mapping at an address: of its VmFlags «hg» is that it is to have huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith(f"{fact}:"):
            return line.split()[1:]
    raise ValueError(f"nothing is at {address:x}")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_what_is_free_between_tensors_is_given_back() -> None:
    tensors = [torch.ones(1 << 14) for _ in range(2048)]  # 64 KiB each, 128 MiB
    kept = tensors[::16]
    tensors.clear()
    before = resident_bytes()
    cpu.release_freed_memory()
    assert resident_bytes() < before - (64 << 20)
    assert all(bool((tensor == 1).all()) for tensor in kept)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="another system than Linux")
def test_an_embedding_that_has_been_looked_through_is_not_in_memory(tmp_path: Path) -> None:
    """The pages of its file are let go, which change nothing; memory of another kind is left alone."""
    model = random_model(RAW | {"vocab_size": 1 << 14}, dtype=torch.bfloat16, optimize=False)
    raw = RAW | {"vocab_size": 1 << 14, "dtype": "bfloat16"}
    save_hub_checkpoint(model, raw, tmp_path, torch.bfloat16)
    embedding = load_model(tmp_path).embed_tokens.weight
    kilobytes = embedding.nbytes // 1024
    assert int(memory_facts(embedding.data_ptr(), "Rss")[0]) < kilobytes / 8
    assert torch.equal(embedding, model.embed_tokens.weight)
    assert int(memory_facts(embedding.data_ptr(), "Rss")[0]) >= kilobytes - 8
    changed = load_model(tmp_path, optimize=False)
    changed.embed_tokens.weight.mul_(2)
    optimize_(changed)
    assert torch.equal(changed.embed_tokens.weight, 2 * model.embed_tokens.weight)
    own = normal(1 << 20)
    cpu.release_file_pages(own)
    assert torch.equal(own, normal(1 << 20))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir() or not Path("/proc/self/smaps").is_file(),
    reason="this system has no huge pages to ask for",
)
def test_weights_on_a_cpu_are_in_memory_of_huge_pages_and_hold_what_they_are_given() -> None:
    values = normal(1024, 4096)
    weight = packed_weight(values)
    assert weight.equal(values) and weight.dtype == values.dtype
    middle = 2**22  # bytes behind the beginning, a page of which other memory may share
    assert "hg" in memory_facts(weight.data_ptr() + middle, "VmFlags")
    fresh = torch.frombuffer(mmap.mmap(-1, 2 * middle), dtype=torch.int8)  # what torch gives may have been a weight's
    assert "hg" not in memory_facts(fresh.data_ptr() + middle, "VmFlags")
    assert empty_weight((3,), torch.int8, "meta").device.type == "meta"


def keys_and_values(batch: int, num_heads: int, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the first slots of two caches, as `KVCache.update_` does."""
    k, v = (normal(batch + 1, num_heads, length + 3, head_dim, seed=seed) for seed in (1, 2))
    return k[:batch, :, :length], v[:batch, :, :length]


# B, S, H, K, T, D: a slot alone, odd numbers of slots, one head, as many heads as kv heads, tiles of
# several and of less than one query.
ATTENTION_SHAPES = [
    (1, 1, 2, 1, 1, 32), (1, 1, 32, 4, 2000, 64), (1, 5, 32, 4, 300, 64), (2, 3, 8, 8, 70, 32), (3, 16, 8, 2, 129, 128),
    (1, 2, 4, 1, 1000, 96), (1, 16, 24, 2, 64, 32), (1, 150, 8, 2, 200, 64), (2, 33, 4, 4, 47, 32),
    (1, 3, 96, 1, 90, 32),
    # head_dim: less than a vector, one and a part, two and a part
    (1, 6, 4, 2, 300, 8), (2, 3, 4, 2, 130, 24), (1, 2, 8, 1, 70, 40), (1, 20, 6, 3, 129, 80), (1, 1, 2, 2, 64, 6),
]  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, threads: int) -> Tensor:
    with on_threads(threads):
        return torch.ops.kernels.attention(q, k, v, mask)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_equals_its_twin_whatever_masked_slots_hold(shape: Any, window: int | None, threads: int) -> None:
    B, S, H, K, T, D = shape
    q, (k, v) = normal(B, S, H, D) * 3, keys_and_values(B, K, T, D)
    last = torch.arange(B).unsqueeze(-1) * 5 + torch.arange(S) + T - S - 5 * (B - 1)
    mask = torch.arange(T) <= last.unsqueeze(-1)
    if window:
        mask &= torch.arange(T) > last.unsqueeze(-1) - window
    expected, spread = (attention(q.double(), k.double(), values.double(), mask) for values in (v, v.abs()))
    for cached in (k, v):
        cached.masked_fill_(~mask.any(dim=1)[:, None, :, None], torch.nan)
    y = attend(q, k, v, mask, threads)
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    # The weights of the slots are rounded to bf16, and so is the result.
    assert ((y.double() - expected).abs() <= 2**-8 * (expected.abs() + spread) + 2**-12).all()


def test_attention_without_caches_equals_its_twin() -> None:
    q, k, v = (normal(2, 20, heads, 64, seed=seed) for seed, heads in enumerate((8, 2, 2)))
    mask = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 20, 20)
    arguments = (q, k.transpose(1, 2), v.transpose(1, 2), mask)
    torch.testing.assert_close(torch.ops.kernels.attention(*arguments), attention(*arguments), rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("T", [200, 389, 390, 391, 392])  # of one row, threads share the slots, cut anywhere
def test_attention_over_scattered_slots_equals_its_twin(T: int, batch_size: int, queries: int) -> None:
    B, H, K, D = batch_size, 4, 1, 64
    q, (k, v) = normal(B, queries, H, D).abs() * 30, keys_and_values(B, K, T, D)
    k.copy_(-k.abs())  # the largest of all scores is far below 0
    mask = torch.rand(B, queries, T, generator=torch.Generator().manual_seed(3)) < 0.3
    expected, spread = (attention(q.double(), k.double(), values.double(), mask) for values in (v, v.abs()))
    for cached in (k, v):
        cached.masked_fill_(~mask.any(dim=1)[:, None, :, None], torch.nan)
    y = attend(q, k, v, mask, threads=2)
    assert ((y.double() - expected).abs() <= 2**-8 * (expected.abs() + spread) + 2**-12).all()


@pytest.mark.parametrize("dtype", cpu.dtypes(), ids=str)
def test_attention_in_every_dtype_equals_its_twin(dtype: torch.dtype) -> None:
    q, k, v = (normal(1, *size, 64, seed=seed, dtype=dtype) for seed, size in enumerate([(5, 8), (2, 75), (2, 75)]))
    mask = torch.ones(1, 5, 75, dtype=torch.bool).tril(70)
    expected, spread = (attention(q.double(), k.double(), values.double(), mask) for values in (v, v.abs()))
    y = torch.ops.kernels.attention(q, k, v, mask)
    assert y.dtype == dtype and ((y.double() - expected).abs() <= 2**-8 * (expected.abs() + spread) + 2**-12).all()


def test_attention_of_a_query_that_sees_nothing_is_zero() -> None:
    q, (k, v) = normal(1, 2, 4, 64), keys_and_values(1, 2, 64, 64)
    mask = torch.ones(1, 2, 64, dtype=torch.bool)
    mask[0, 1] = False
    y = torch.ops.kernels.attention(q, k, v, mask)
    assert (y[0, 1] == 0).all() and (y[0, 0] != 0).any()


def test_attention_of_keys_that_are_no_numbers_is_none() -> None:
    q, (k, v) = normal(1, 1, 4, 64), keys_and_values(1, 2, 64, 64)
    k[0, 1, 37] = torch.nan  # of the last slots that any instruction set takes together
    y = attend(q, k, v, torch.ones(1, 1, 64, dtype=torch.bool), 1)
    assert y[0, 0, 2:].isnan().all() and y[0, 0, :2].isfinite().all()
    others, mask = keys_and_values(1, 2, 64, 40), torch.ones(1, 1, 64, dtype=torch.bool)  # of fewer channels
    assert attend(normal(1, 1, 4, 40), *others, mask, 1).isfinite().all()


@torch.inference_mode()
def test_a_model_with_kernels_is_pickled() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = random_model(RAW, dtype=dtype)
        for each in (model, copied := pickle.loads(pickle.dumps(model))):
            each.setup_caches(1, 32)
        tokens = torch.arange(5).unsqueeze(0)
        # The copy runs its blocks one by one, which rounds elsewhere.
        far = model(tokens, torch.arange(5)).float() - copied(tokens, torch.arange(5)).float()
        assert far.norm() < 0.02 * model(tokens, torch.arange(5)).float().norm()


def test_attention_that_the_kernel_cannot_take_is_the_plain_one() -> None:
    for dtype, expected in ((torch.bfloat16, cpu.attention), (torch.float32, inductor.attention)):
        model = random_model(RAW, dtype=dtype)
        assert {block.self_attn.attend for block in model.layers} == {expected}
    q, (k, v) = normal(1, 3, 4, 64).float(), keys_and_values(1, 2, 64, 64)
    mask = torch.ones(1, 3, 64, dtype=torch.bool)
    assert torch.equal(inductor.attention(q, k.float(), v.float(), mask), attention(q, k.float(), v.float(), mask))


CONFIG = ModelConfig(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, vocab_size=64, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=16, frequencies=((0.1,) * 16,) * 2)
MIXTURE = replace(CONFIG, intermediate_size=64, num_local_experts=8, num_experts_per_tok=3)
# Each with what the operators take besides a Llama's.
BLOCK_CONFIGS = [
    CONFIG,
    replace(CONFIG, attention_bias=True, mlp_bias=True, sliding_window=8, full_attention_layers=(1,)),
    replace(CONFIG, qkv_bias=True, partial_rotary_factor=0.75, query_multiplier=0.5, residual_multiplier=0.3),
    replace(CONFIG, qk_norm=True, norm_offset=1.0, norm_outputs=True, num_key_value_heads=4, gelu=True),
    replace(CONFIG, qk_norm=True, norm_inputs=False, norm_outputs=True, head_dim=24, num_key_value_heads=1),
    replace(CONFIG, qk_norm=True, qk_norm_over_heads=True, query_scaling_beta=0.5, rope_scaling=YARN),
    MIXTURE,
    replace(MIXTURE, norm_topk_prob=False, num_experts_per_tok=1, gelu=True),
]


def with_kernels(model: Transformer, form: Form | None = None) -> tuple[Transformer, Transformer]:
    """Draw a model's weights; return it with kernels for its products and attention, and once more with its blocks."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("norm.weight" in name))
    dtype = model.embed_tokens.weight.dtype
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, Linear | Experts)]:
        fits = all(size % 32 == 0 for size in linear.weight.shape[-2:]) and not is_router(name)
        stored = quantize_linear(linear, form) if form is not None and fits else linear
        model.set_submodule(name, cpu_layer(stored, dtype) or stored)
    model.setup_caches(3, 40)
    fast = copy.deepcopy(model)
    cpu.optimize_blocks_(fast)
    assert isinstance(fast.run_blocks, CpuBlocks)
    for block in model.layers:
        block.self_attn.attend = torch.ops.kernels.attention.default
    return model, fast


@torch.inference_mode()
@pytest.mark.parametrize("dtype", cpu.dtypes(), ids=str)
@pytest.mark.parametrize("form", [None, Form(8), Form(4, 32, has_zeros=True)], ids=str)
@pytest.mark.parametrize("config", BLOCK_CONFIGS, ids=range(len(BLOCK_CONFIGS)))
def test_blocks_equal_their_twins(config: ModelConfig, form: Form | None, dtype: torch.dtype) -> None:
    """The twin has the same products and attention, and what is around them step by step."""
    plain, fast = with_kernels(Transformer(config).to(dtype), form)
    plain.tap_layers = fast.tap_layers = (1, 0, 1)
    for model in (plain, fast):
        model.setup_caches(3, 40)
    generator = torch.Generator().manual_seed(0)
    begin = 0
    for batch, size in ((3, 20), (1, 1), (3, 1), (2, 8), (1, 1)):
        tokens = torch.randint(64, (batch, size), generator=generator)
        positions = begin + torch.arange(size) + torch.arange(batch)[:, None]
        ours, twin = (model(tokens, positions).float() for model in (fast, plain))
        torch.testing.assert_close(ours, twin, rtol=2**-6, atol=2**-6 * twin.abs().max().item())
        begin += size
    for ours, twin in zip(fast.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours.float(), twin.float(), rtol=2**-5, atol=2**-5)


@torch.inference_mode()
@pytest.mark.parametrize("form", [None, Form(8)], ids=str)
@pytest.mark.parametrize("number", [0, 1, 3, 5, 6])
def test_blocks_of_many_rows_equal_their_twins(number: int, form: Form | None) -> None:
    """Threads share the rows, and a feed-forward takes 512 of them at a time."""
    config = BLOCK_CONFIGS[number]
    models = with_kernels(Transformer(config).to(torch.bfloat16), form)
    tokens = torch.randint(64, (3, 180), generator=torch.Generator().manual_seed(0))
    for model in models:
        model.setup_caches(3, 180)
    plain, fast = (model(tokens, torch.arange(180).expand(3, 180)).float() for model in models)
    wrong = ~torch.isclose(fast, plain, rtol=2**-6, atol=2**-6 * plain.abs().max().item())
    # A row would be 1 / 540. Of scores that nearly equal each other rounding chooses, and then other experts compute.
    assert wrong.float().mean() < (0.02 if config.num_local_experts else 0.0005)


@torch.inference_mode()
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_the_first_block_of_a_head_equals_its_twin(norm_before_residual: bool) -> None:
    config = replace(CONFIG, hidden_size=64, vocab_size=8)
    model = Transformer(config)
    cast("torch.nn.ModuleList", model.layers)[0] = FirstBlock(config, norm_before_residual)
    plain, fast = with_kernels(model.to(torch.bfloat16))
    begin = 0
    for size in (20, 1, 5):
        x, positions = normal(2, size, 128, seed=size), begin + torch.arange(size).expand(2, size)
        contexts = plain.block_contexts(positions, torch.arange(40))
        ours, twin = (model.run_blocks(model.layers, contexts, x, ())[0].float() for model in (fast, plain))
        torch.testing.assert_close(ours, twin, rtol=2**-6, atol=2**-6 * twin.abs().max().item())
        begin += size


@torch.inference_mode()
@pytest.mark.parametrize("length", [3, 3 * MAX_ROWS])
def test_columns_in_an_order_of_their_own_are_taken(length: int) -> None:
    plain, fast = with_kernels(Transformer(CONFIG).bfloat16())
    for model in (plain, fast):
        attn, mlp = model.layers[1].self_attn, cast("MLP", model.layers[1].mlp)
        attn.set_submodule("qkv_proj", Reordered(attn.qkv_proj, torch.arange(127, -1, -1).int()))
        mlp.set_submodule("down_proj", Reordered(mlp.down_proj, torch.arange(192).roll(7)))
    cpu.optimize_blocks_(fast)
    assert isinstance(fast.run_blocks, CpuBlocks)
    for model in (fast, plain):
        model.setup_caches(2, length)
    tokens = torch.arange(2 * length).view(2, length) % 64
    ours, twin = (model(tokens, torch.arange(length)).float() for model in (fast, plain))
    torch.testing.assert_close(ours, twin, rtol=2**-6, atol=2**-6 * twin.abs().max().item())


@torch.inference_mode()
def test_what_is_outside_the_caches_is_an_error() -> None:
    """And neither read nor written: the plain model's indexing says so too, but of positions below 0."""
    model, tokens = random_model(RAW, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int64)
    model.setup_caches(1, 32)
    own = model.block_contexts
    for rows, positions, slots in [(1, 0, 34), (1, -1, 32), (2, 0, 32)]:
        # The model itself refuses such positions.
        contexts = own(torch.arange(2)[None], torch.arange(slots))
        contexts = [context._replace(positions=torch.arange(2).expand(rows, 2) + positions) for context in contexts]
        model.block_contexts = lambda *_, held=contexts: held  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="outside the caches of 1 rows and 33 slots"):
            model(tokens.expand(rows, 2), torch.arange(2) + positions, torch.arange(slots))


@torch.inference_mode()
def test_x_of_another_width_and_missing_caches_are_an_error() -> None:
    model = random_model(RAW, dtype=torch.bfloat16)
    model.setup_caches(1, 32)
    contexts = model.block_contexts(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="x has 96 columns and the blocks 64"):
        model.run_blocks(model.layers, contexts, normal(1, 1, 96), ())
    with pytest.raises(RuntimeError, match="x has 96 columns and the weight 64"):
        model.lm_head(normal(1, 1, 96))
    cos, sin, positions, mask = contexts[0]
    assert isinstance(model.run_blocks, CpuBlocks)
    run = torch.ops.kernels.run_sublayers
    with pytest.raises(RuntimeError, match="4 halves of blocks, and a tap is at another"):
        model.run_blocks(model.layers, contexts, normal(1, 1, 64), (2,))
    with pytest.raises(RuntimeError, match="2 attentions have 0 caches"):
        run(normal(1, 1, 64), model.run_blocks.sublayers, 64, [], [cos], [sin], positions, [mask], [])


@torch.inference_mode()
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(8, 1), (8, 3), (8, 8), (128, 2), (128, 8)])
def test_of_equal_scores_the_same_experts_are_chosen(num_experts: int, num_chosen: int) -> None:
    config = replace(MIXTURE, num_local_experts=num_experts, num_experts_per_tok=num_chosen)
    plain, fast = with_kernels(Transformer(config).bfloat16())
    tokens, generator = torch.arange(16)[None], torch.Generator().manual_seed(0)
    for model in (plain, fast):
        for layer in (0, 1):
            router = model.get_parameter(f"layers.{layer}.mlp.gate.weight")
            router.copy_(torch.randint(2, (num_experts, 1), generator=generator.manual_seed(0)).expand_as(router))
    ours, twin = (model(tokens, torch.arange(16)).float() for model in (fast, plain))
    torch.testing.assert_close(ours, twin, rtol=2**-6, atol=2**-6 * twin.abs().max().item())
    router[-1] = torch.nan  # of the fast one: it counts as the largest
    assert fast(tokens, torch.arange(16)).isnan().all()


@torch.inference_mode()
def test_a_copy_of_a_model_has_weights_of_its_own() -> None:
    """It has other modules than the original's call knows, so it runs its blocks one by one."""
    model = random_model(RAW, dtype=torch.bfloat16)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    del model
    copied.setup_caches(1, 32)
    assert copied(torch.zeros(1, 1, dtype=torch.int64), torch.arange(1)).isfinite().all()


def move_data(model: Transformer) -> None:
    for parameter in model.parameters():
        parameter.data = -parameter.data


def drop_the_first_layer(model: Transformer) -> None:
    model.layers = model.layers[1:]


CHANGES: list[Callable[[Transformer], object]] = [
    move_data, Transformer.share_memory, Transformer.bfloat16, drop_the_first_layer,
    lambda model: model.load_state_dict({name: -value for name, value in model.state_dict().items()}),
]  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_what_is_changed_of_a_model_counts(change: Callable[[Transformer], object]) -> None:
    """Its memory may be another one, and what was there before freed and used for something else."""
    model = random_model(RAW, dtype=torch.bfloat16)
    plain = copy.deepcopy(model)
    for either in (model, plain):
        either.setup_caches(1, 32)
        change(either)
    rest = [torch.full((1 << 12,), torch.nan, dtype=torch.bfloat16) for _ in range(200)]
    outputs = [either(torch.ones(1, 1, dtype=torch.int64), torch.tensor([5])) for either in (model, plain)]
    torch.testing.assert_close(*outputs, rtol=2**-6, atol=2**-6)
    assert len(rest) == 200


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_x_of_a_dtype_without_kernels_is_an_error(dtype: torch.dtype) -> None:
    kernels, weight = torch.ops.kernels, normal(32, 64)
    x, mask = normal(2, 64).to(dtype), torch.ones(1, 2, 2, dtype=torch.bool)
    heads, codes = x.view(1, 2, 1, 64), CpuInt8(*quantize_int8(weight.float()), None)
    for call in (
        lambda: codes(x),
        lambda: cpu.CpuDense(weight.bfloat16(), None)(x),
        lambda: kernels.rms_norm(x, weight[0].bfloat16(), 1e-5, None),
        lambda: kernels.attention(heads, *[heads.transpose(1, 2)] * 2, mask),
    ):
        with pytest.raises(RuntimeError, match="neither in bfloat16 nor in float16"):
            call()
    rows = normal(1, 2, 1, 64).bfloat16()
    with pytest.raises(RuntimeError, match="another dtype than x"):
        kernels.attention(rows, *[rows.transpose(1, 2).half()] * 2, mask)
    with pytest.raises(RuntimeError, match="the mask is not of bool"):
        kernels.attention(rows, *[rows.transpose(1, 2)] * 2, mask.long())
    with pytest.raises(RuntimeError, match="x has 1 dimensions"):
        kernels.product(normal(64).bfloat16(), [weight.bfloat16()])


@torch.inference_mode()
def test_caches_of_another_form_are_an_error() -> None:
    model, tokens = random_model(RAW, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
    for heads, dtype, message in [(1, torch.bfloat16, "have 1 heads"), (2, torch.float32, "another dtype than x")]:
        model.setup_caches(1, 32)
        cache = model.layers[1].self_attn.cache
        assert cache is not None
        cache.k, cache.v = (torch.nn.Buffer(torch.zeros(1, heads, 33, 16, dtype=dtype)) for _ in range(2))
        with pytest.raises(RuntimeError, match=message):
            model(tokens, torch.arange(1))
    model.layers[1].self_attn.cache = None
    with pytest.raises(RuntimeError, match="a mask of 32 slots, and keys of 1"):
        model(tokens, torch.arange(1))


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(
    "norm", ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
)
def test_a_norm_of_another_dtype_is_an_error(norm: str, rows: int) -> None:
    """Whichever threads compute: none of them may raise it."""
    model = random_model(RAW | {"model_type": "qwen3", "head_dim": 32}, dtype=torch.bfloat16)
    model.setup_caches(1, 64)
    model.layers[0].get_submodule(norm).float()
    for context in (contextlib.nullcontext(), cpu.own_threads(rows, model)):
        with on_threads(2), context, pytest.raises(RuntimeError, match="another dtype than x"):
            model(torch.arange(rows)[None], torch.arange(rows))


def test_weights_are_freed_with_their_model() -> None:
    model = random_model(RAW, dtype=torch.bfloat16)
    weights = [parameter.untyped_storage() for parameter in model.parameters()]
    del model
    gc.collect()
    assert {torch._C._storage_Use_Count(storage._cdata) for storage in weights} == {1}


INT8 = quantization_config(Form(8))


def test_blocks_that_an_operator_does_not_take_are_left() -> None:
    others: list[dict[str, Any]] = [
        {"hidden_size": 66, "head_dim": 16}, {"intermediate_size": 98}, {"intermediate_size": 97},
        {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 12, "quantization_config": INT8},
    ]  # fmt: skip
    for changes, taken in [({}, True), ({"attention_bias": True}, True), *((other, False) for other in others)]:
        model = random_model(RAW | changes, dtype=torch.bfloat16)
        assert isinstance(model.run_blocks, CpuBlocks) == taken, changes
    assert not isinstance(random_model(RAW, dtype=torch.float32).run_blocks, CpuBlocks)
    others_forward = random_model(RAW, dtype=torch.bfloat16)
    others_forward.layers[1].__class__ = type("Other", (Block,), {})
    assert not cpu.takes_blocks(others_forward.layers)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", cpu.dtypes(), ids=str)
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 3, 5, 32), (1, MAX_ROWS + 1, 100), (3, 70, 576)], ids=str)
def test_norms_of_any_size_equal_their_twins(shape: tuple[int, ...], offset: float | None, dtype: torch.dtype) -> None:
    norm = RMSNorm(shape[-1], 1e-5, offset).to(dtype)
    norm.weight = frozen_parameter(normal(shape[-1], 2, seed=1, dtype=dtype)[:, 0])  # scattered too
    fast = cpu.CpuRMSNorm(norm)
    for x in (normal(*shape, dtype=dtype) * 3, normal(*shape, 2, dtype=dtype)[..., 0]):  # of which one is scattered
        torch.testing.assert_close(fast(x), norm(x), rtol=2**-7, atol=1e-6)
    assert torch.equal(fast(x.float()), norm(x.float()))  # another dtype is the plain one's
    assert not fast(torch.full(shape, torch.nan, dtype=dtype)).isfinite().any()


def test_a_norm_of_another_width_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="x has 32 columns and the norm 16"):
        cpu.CpuRMSNorm(RMSNorm(16, 1e-5).bfloat16())(torch.zeros(1, 32, dtype=torch.bfloat16))
    for x, weight in ((torch.tensor(1.0), torch.ones(1)), (torch.ones(2, 8), torch.ones(8, 1))):
        with pytest.raises(RuntimeError, match="x has no columns, or the norm several dimensions"):
            torch.ops.kernels.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5, None)


def test_a_norm_that_is_another_or_wants_gradients_is_left() -> None:
    model = random_model(RAW, dtype=torch.bfloat16, optimize=False)
    model.norm = type("Other", (RMSNorm,), {})(RAW["hidden_size"], 1e-5).bfloat16()
    other = model.norm
    optimize_(model)
    norm = model.layers[0].input_layernorm
    assert model.norm is other and isinstance(norm, cpu.CpuRMSNorm) and not norm.training
    x = normal(2, RAW["hidden_size"]).requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None


@torch.inference_mode()
@pytest.mark.parametrize("dtype", cpu.dtypes(), ids=str)
def test_a_model_without_caches_equals_its_twin(dtype: torch.dtype) -> None:
    """It has never had any, which a call with caches must not be the first to find."""
    fast, plain = (random_model(RAW, dtype=dtype, optimize=optimize) for optimize in (True, False))
    assert isinstance(fast.run_blocks, CpuBlocks)
    for length in (3, MAX_ROWS + 4):
        tokens, positions = torch.arange(length)[None], torch.arange(length)
        ours, twin = (model(tokens, positions).float() for model in (fast, plain))
        torch.testing.assert_close(ours, twin, rtol=2**-5, atol=2**-5 * twin.abs().max().item())


@pytest.mark.parametrize("dtype", cpu.dtypes(), ids=str)
def test_nothing_is_left_of_large_values_with_small_scores(dtype: torch.dtype) -> None:
    """Also of a block of slots before the one with the largest score, whose sums shrink."""
    q, k, v = torch.ones(1, 1, 1, 32), torch.full((1, 1, 128, 32), -100.0), torch.full((1, 1, 128, 32), 0.01)
    k[:, :, 64:], v[:, :, :64] = 100, torch.finfo(dtype).max / 256
    mask = torch.ones(1, 1, 128, dtype=torch.bool)
    y = torch.ops.kernels.attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
    torch.testing.assert_close(y.float(), torch.full((1, 1, 1, 32), 0.01), rtol=2**-7, atol=0)


@pytest.mark.parametrize("gelu", [False, True])
def test_gates_of_any_size_equal_their_twins(gelu: bool) -> None:
    one_each, x = torch.eye(64).bfloat16(), torch.zeros(1, 1, 64).bfloat16()
    x[0, 0] = torch.tensor([-3e38, -200, -100, -88, -20, -3, -1, -1e-3, 0, 1e-30, 1e-3, 1, 3, 20, 88, 1e4]).repeat(4)
    both, kernels = one_each.repeat(2, 1), torch.ops.kernels
    weights = [both], None, None, [one_each], None, None
    sublayer = kernels.describe_feed_forward(None, None, 0, None, 1, *weights, gelu, None, 0, False)
    y, _ = kernels.run_sublayers(x, sublayer, 64, [], [], [], torch.zeros(1, 1, dtype=torch.int64), [], [])
    torch.testing.assert_close(y, x + swiglu(x.repeat(1, 1, 2), gelu), rtol=2**-6, atol=1e-28)


def test_a_norm_is_left_to_a_product_on_a_gpu_alone():
    """And there of a row or two: elsewhere fp32 stays what it is, to the bit."""
    for device_type, is_fused in (("cpu", False), ("cuda", True)):
        model = random_model(RAW, dtype=torch.float32, optimize=False)
        optimize_(model, device_type)
        assert all(isinstance(block, FusedBlock) == is_fused for block in model.layers)
        assert isinstance(model.layers[0].self_attn.qkv_proj, FusedLinear) == is_fused

    def is_streamed(x):
        return x + 1 if is_reduction(x) else x

    sums = []
    for rows in (1, MAX_REDUCTION_ROWS, MAX_REDUCTION_ROWS + 1):
        torch._dynamo.reset()
        sums.append(torch.compile(is_streamed, fullgraph=True, backend="eager")(torch.zeros(rows, 4))[0, 0].item())
    assert sums == [1, 1, 0]
    assert is_streamed(torch.zeros(1, 4))[0, 0] == 0  # not compiled


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-compiler", "there is no compiler 'no-compiler'"), ("false", "slower")]
)
def test_without_a_compiler_that_works_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], compiler: str, said: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert cpu.make_library.__wrapped__() is None
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


def test_the_kernels_compile_while_the_weights_load(tmp_path: Path) -> None:
    """The first weight is read when the compiler has begun."""
    begun, compiler = tmp_path / "begun", tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {begun}\nexit 1\n")
    compiler.chmod(0o755)
    program = f"""
import time
from pathlib import Path
import checkpoint
read = checkpoint.ModelReader.read
def read_late(*arguments):
    for _ in range(6000):
        if Path({str(begun)!r}).exists():
            return read(*arguments)
        time.sleep(0.01)
    raise TimeoutError("the compiler has not begun")
checkpoint.ModelReader.read = read_late
checkpoint.load_model("checkpoints/demo")
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr  # that the compiler did not work


COMPILER = os.environ.get("CXX") or "g++"
FLAGS = ["-fopenmp", "-std=c++17", cpu.STABLE_ABI, f"-I{Path(torch.__file__).parent / 'include'}", str(cpu.SOURCES[0])]


@pytest.mark.parametrize(
    ("name", "march"), [("avx2", "x86-64-v3"), ("avx512", "cooperlake"), ("amx", "sapphirerapids")]
)
def test_every_instruction_set_runs_where_it_can_and_else_compiles(name: str, march: str, tmp_path: Path) -> None:
    """This process runs the largest that the CPU has; for a lesser one, what compares with twins runs again.

    With AVX-512 it also runs with tiles, which tests/tiles.h computes, and compiles with the compiler's own: those may
    be macros, which take less.
    """
    here = cpu.instruction_set()
    if name == here:
        return  # it is what this process runs
    compile_only = [*shlex.split(COMPILER), "-fsyntax-only", f"-march={march}", *FLAGS]
    result = subprocess.run(compile_only, cwd=REPO, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k"]
    environment = dict(os.environ)
    if name == "avx2" or here == "amx":
        command.append("twin or beyond")
        environment["LLAMA_KERNELS_MARCH"] = march
        if name == "avx512":  # as AMD's processors have it, which have no AMX
            environment["CXX"] = f"{COMPILER} -DMADE_BY_AMD"
    elif name == "amx" and here == "avx512":
        command.append(
            "(products or groups or many or attention) and (equal or twin)"
            " or beyond or alone or share or pieces or unpacked"
        )
        environment["CXX"] = shlex.join([COMPILER, "-include", str(REPO / "tests/tiles.h")])
        environment["XDG_CACHE_HOME"] = str(tmp_path)
    else:
        return
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("march", ["cooperlake", "sapphirerapids"])
def test_without_all_instructions_of_avx512_those_of_avx2_run(march: str) -> None:
    """As where a virtual machine hides some; tiles are not used without them."""
    command = [COMPILER, f"-march={march}", "-mno-avx512vnni", *FLAGS]
    result = subprocess.run([*command, "-E"], capture_output=True, text=True, timeout=HANG)
    assert 'INSTRUCTION_SET[] = "avx2"' in result.stdout and "class Tiles" not in result.stdout, result.stderr
