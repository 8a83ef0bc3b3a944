"""On a GPU: every mode gives what the CPU gives, and every compiled step is one CUDA graph.

No GPU has run these yet.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

from checkpoint import load_model
from engine import generate
from kernels.optimize import cuda_kernels, optimize_
from linears import dequantize
from model import attention, attention_mask
from quantize import main as quantize
from random_weights import random_model
from speculate import Speculation
from steps import Sampling, compiled, decode, prefill
from tests.conftest import REPO
from tests.rounded import quantize_int4, quantize_int8
from tests.test_graphs import RAW

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]  # fmt: skip
DEMO, DRAFT = REPO / "checkpoints" / "demo", REPO / "checkpoints" / "demo-draft"
GREEDY = Sampling(temperature=0)
PROMPTS = [list(range(5, 45)), [7, 8, 9]]
MOE = RAW | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def relative(ours, twin):
    ours, twin = ours.double().cpu(), twin.double().cpu()
    assert ours.isfinite().all()
    return ((ours - twin).norm() / twin.norm()).item()


def text(model, prompts=PROMPTS, num_tokens=40, **options):
    model.setup_caches(len(prompts), 128)
    rows = zip(*generate(model, prompts, num_tokens, GREEDY, **options), strict=True)
    return [[token for ids in row for token in ids] for row in rows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The demo in every form of the weights."""
    made = {"plain": DEMO}
    for mode in ("int8", "int4"):
        made[mode] = tmp_path_factory.mktemp(mode) / "model"
        quantize(["--checkpoint_path", str(DEMO), "--mode", mode, "--output_path", str(made[mode]), "--device", "cpu"])
    return made


@pytest.fixture(scope="module")
def models(folders):
    """The same in fp32, on the CPU and on the GPU."""
    return {n: [load_model(path, device, torch.float32) for device in ("cpu", "cuda")] for n, path in folders.items()}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("form", ["plain", "int8", "int4"])
def test_logits_are_those_of_the_cpu(folders, form, dtype, limit):
    """In one forward of many tokens, of a few, and of one."""
    on_cpu, on_gpu = load_model(folders[form], "cpu", torch.float32), load_model(folders[form], "cuda", dtype)
    tokens = torch.arange(64).view(2, 32)
    for model in (on_cpu, on_gpu):
        model.setup_caches(2, 64)
    with torch.inference_mode():
        for begin, end in ((0, 24), (24, 31), (31, 32)):
            at = torch.arange(begin, end)
            ours, twin = (m(tokens[:, at].to(m.device), at.to(m.device)) for m in (on_gpu, on_cpu))
            assert relative(ours, twin) < limit, (begin, end)


@pytest.mark.parametrize("form", ["plain", "int8", "int4"])
def test_a_batch_is_the_text_of_the_cpu(models, form):
    on_cpu, on_gpu = models[form]
    assert text(on_gpu) == text(on_cpu)


def num_graphs():
    """Count the CUDA graphs that were captured; inductor says nothing where it has cut a step and left its parts so."""
    manager = get_manager(0, create_if_none_exists=False)
    return 0 if manager is None else sum(map(len, manager.roots.values()))


@pytest.mark.parametrize("form", ["plain", "int8", "int4"])
def test_compiled_text_is_the_eager_one_and_each_step_one_cuda_graph(models, form):
    expected = text(models[form][0])
    counters.clear()
    steps = {"prefill": compiled(prefill), "decode": compiled(decode, "reduce-overhead")}
    assert text(models[form][1], **steps) == expected
    assert counters["inductor"]["cudagraph_skips"] == 0 and num_graphs() > 0
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("lookup", [False, True])
def test_speculation_compiled_is_the_text_of_the_cpu(models, lookup):
    on_cpu, on_gpu = models["plain"]
    prompts = [PROMPTS[0] * 2]
    draft_model = None
    if not lookup:
        draft_model = load_model(DRAFT, "cuda", torch.float32)
        draft_model.setup_caches(1, 128)
    counters.clear()
    speculation = Speculation(draft_model, 3)
    speculation.compile_("reduce-overhead")
    assert text(on_gpu, prompts, speculation=speculation) == text(on_cpu, prompts)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_drawn_text_is_the_same_compiled_and_not(models):
    on_gpu = models["plain"][1]
    on_gpu.setup_caches(1, 128)
    texts = []
    for run in (decode, compiled(decode, "reduce-overhead")):
        generator = torch.Generator("cuda").manual_seed(3)
        steps = generate(on_gpu, PROMPTS[:1], 20, Sampling(0.8, top_k=20), generator=generator, decode=run)
        texts.append([row for [row] in steps])
    assert texts[0] == texts[1]


def test_experts_give_the_logits_of_the_cpu():
    on_cpu = random_model(MOE, "cpu", torch.float32, optimize=False)
    on_gpu = copy.deepcopy(on_cpu).to("cuda")
    for model in (on_cpu, on_gpu):
        optimize_(model)
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        at = torch.arange(20)
        assert relative(on_gpu(tokens.cuda(), at.cuda()), on_cpu(tokens, at)) < 1e-4
    assert text(on_gpu, decode=compiled(decode, "reduce-overhead")) == text(on_cpu)


@pytest.mark.parametrize("M", [1, 2, 6, 16])
@pytest.mark.parametrize(("N", "K", "group_size"), [(4096, 4096, 32), (4096, 11008, 32), (1001, 2048, 128)])
def test_products_are_their_twins(M, N, K, group_size):
    cuda = cuda_kernels()
    x, weight = torch.randn(M, K), torch.randn(N, K) / K**0.5
    codes, scales, zeros = quantize_int4(weight, group_size)
    layer = cuda.CudaInt4(codes, scales, zeros, None).cuda()
    ours = cuda.int4_product(x.bfloat16().cuda(), layer.weight, layer.parameters_of_groups)
    assert relative(ours, x.bfloat16().double() @ dequantize(codes, scales, zeros, group_size).double().T) < 1e-2
    codes, scales = quantize_int8(weight)
    ours = cuda.int8_product(x.bfloat16().cuda(), codes.cuda(), scales.cuda())
    assert relative(ours, x.bfloat16().double() @ dequantize(codes, scales).double().T) < 1e-2


@pytest.mark.parametrize("M", [1, 6])
@pytest.mark.parametrize("what", ["norm", "gated", "bias residual", "norm bias gated residual"])
def test_products_do_what_stands_around_them(M, what):
    from tests.interpreted import around, twin

    cuda = cuda_kernels()
    given = around(M, 2050, 4096, "bf16", what)
    after = {name: value for name, value in given.items() if name not in ("norm", "eps")}
    x, weight = torch.randn(M, 4096).bfloat16(), torch.randn(2050, 4096) / 64
    codes, scales = quantize_int8(weight)
    ours = cuda.int8_product(x.cuda(), codes.cuda(), scales.cuda(), **on_gpu(after))
    assert relative(ours, twin(x, dequantize(codes, scales), after)) < 1e-2
    codes, scales, zeros = quantize_int4(weight, 32)
    layer = cuda.CudaInt4(codes, scales, zeros, None).cuda()
    given = given if M == 1 else after  # of one row it takes the norm too
    ours = cuda.int4_product(x.cuda(), layer.weight, layer.parameters_of_groups, **on_gpu(given))
    assert relative(ours, twin(x, dequantize(codes, scales, zeros, 32), given)) < 1e-2


def on_gpu(given):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


@pytest.mark.parametrize(("S", "H", "K", "D"), [(1, 32, 32, 128), (1, 32, 8, 128), (6, 64, 8, 128), (16, 32, 8, 64)])
@pytest.mark.parametrize(("end", "window"), [(17, None), (2000, None), (8192, None), (5000, 1024)])
def test_attention_is_its_twin(S, H, K, D, end, window):
    cuda, slots = cuda_kernels(), 8192
    q = torch.randn(2, S, H, D, dtype=torch.bfloat16)
    k, v = (torch.randn(2, K, slots + 1, D, dtype=torch.bfloat16)[:, :, :slots] for _ in range(2))
    positions = torch.arange(end - S, end).view(1, S, 1).expand(2, -1, -1)
    mask = attention_mask(positions, torch.arange(slots), window)
    twin = attention(q.float(), k.float(), v.float(), mask)
    unseen = ~mask.any(dim=1)[:, None, :, None].expand_as(k)
    k[unseen] = v[unseen] = torch.nan
    assert relative(cuda.split_attention(q.cuda(), k.cuda(), v.cuda(), mask.cuda()), twin) < 1e-2


def test_prefill_reaches_a_fused_attention():
    """Under no other kernel would torch do it: the plain one writes all the scores out."""
    cuda = cuda_kernels()
    q, k = torch.randn(1, 64, 8, 128), torch.randn(1, 2, 128, 128)
    q, k = q.bfloat16().cuda(), k.bfloat16().cuda()
    mask = attention_mask(torch.arange(64).view(1, 64, 1), torch.arange(128), None).cuda()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        ours = cuda.attention(q, k, k, mask)
    assert relative(ours, attention(q.float().cpu(), k.float().cpu(), k.float().cpu(), mask.cpu())) < 1e-2
