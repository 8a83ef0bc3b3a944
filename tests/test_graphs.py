"""What a step must be for a GPU to replay it as a CUDA graph, seen in what torch.compile makes of it, without a GPU."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.output_code import CompiledFxGraph

from compressed import quantization_config
from eagle import Head
from eagle_checkpoint import random_head
from kernels.cpu import CpuBlocks
from kernels.optimize import optimize_
from linears import Form, frozen_parameter
from model import Transformer
from random_weights import random_model
from speculate import draft_and_verify, verify
from steps import Sampling, compile_options, compiled, decode, keep_needed_guards

RAW: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
GREEDY, DRAWN = Sampling(temperature=0), Sampling(0.8, top_k=20)
K = 3
V = RAW["vocab_size"]
DRAFT_MODEL, HEAD = "a draft model", "a head"
HEAD_RAW = RAW | {
    "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 60,
    "eagle_aux_hidden_state_layer_ids": [0, 1],
}  # fmt: skip
# Each step, how many columns its tokens have, and what it is given after the slots; a model for DRAFT_MODEL and HEAD.
STEPS = {
    "decode": (decode, None, [GREEDY, None]),
    "decode, drawn": (decode, None, [DRAWN, torch.ones(1, V)]),
    "round": (draft_and_verify, 2, [DRAFT_MODEL, K, GREEDY, None]),
    "round, drawn": (
        draft_and_verify,
        2,
        [DRAFT_MODEL, K, DRAWN, (torch.ones(1, K, V), (torch.ones(1, K), torch.ones(1, V)))],
    ),
    "round of a head": (draft_and_verify, K + 1, [HEAD, K, GREEDY, None]),
    "round of a head, drawn": (
        draft_and_verify,
        K + 1,
        [HEAD, K, DRAWN, (torch.ones(1, K, V), (torch.ones(1, K), torch.ones(1, V)))],
    ),
    "verify": (verify, 2, [torch.zeros(1, K, dtype=torch.long), GREEDY, None, None]),
    "verify, drawn": (
        verify,
        2,
        [torch.zeros(1, K, dtype=torch.long), DRAWN, (torch.ones(1, K), torch.ones(1, V)), torch.ones(1, K, V)],
    ),
}


def arguments(columns: int | None, position: int, device: str = "cpu"):
    """Return tokens and positions that end before `position`."""
    shape = (1,) if columns is None else (1, columns)
    at = position - shape[-1] + torch.arange(shape[-1], device=device)
    return torch.zeros(shape, dtype=torch.long, device=device), at.view(shape)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = random_model(RAW, "cpu", torch.float32)
    model.setup_caches(1, 8192)
    return model


@pytest.fixture
def made(monkeypatch):
    """The graphs that inductor has made, each with the inputs it was made for."""
    graphs = []
    post_compile = CompiledFxGraph.post_compile

    def spy(self, inputs, *args):
        graphs.append((self, inputs))
        return post_compile(self, inputs, *args)

    monkeypatch.setattr(CompiledFxGraph, "post_compile", spy)
    torch._dynamo.reset()
    return graphs


def with_caches(head: Head, target: Transformer) -> Head:
    """Give both caches, and the head the target's taps."""
    for model in (target, head):
        model.setup_caches(1, 8192)
    head.follow_(target)
    return head


@pytest.mark.parametrize("name", ["decode, drawn", "verify", "round", "round of a head"])
def test_one_cuda_graph_serves_every_position(made, name):
    """It is for no number of slots, and copies nothing but the step's own small inputs before a replay."""
    step, columns, rest = STEPS[name]
    model, draft_model = (random_model(RAW, "cpu", torch.float32, seed=seed) for seed in (0, 1))
    for each in (model, draft_model):
        each.setup_caches(1, 8192)
    if rest[0] is HEAD:
        draft_model = with_caches(random_head(HEAD_RAW, model), model)
    rest = [draft_model if isinstance(each, str) else each for each in rest]
    run = compiled(step, "reduce-overhead")
    counters.clear()
    with torch.inference_mode():
        for position in [10, 64, 65, 4096, 4097, 8192]:
            slots = torch.arange(-(-position // 64) * 64)
            run(model, *arguments(columns, position - K), slots, *rest)  # before the drafts
    assert counters["stats"]["unique_graphs"] == 1
    ((graph, inputs),) = made
    assert all(isinstance(each, torch.Tensor) for each in inputs)  # no size that changes
    static = set(graph.fx_kwargs["static_input_idxs"])
    copied = [each for i, each in enumerate(inputs) if i not in static]
    assert sum(each.numel() for each in copied) <= 2 * (K + 1) + V
    # What is written to may not be among them: the copy would be written, and not the cache.
    models = [model, *(each for each in rest if isinstance(each, Transformer))]
    held = [block.self_attn.cache for each in models for block in each.layers]
    kept = [inputs[i].shape for i in static]
    assert sum(shape == held[0].k.shape for shape in kept) == 2 * len(held)
    assert not set(graph.mutated_input_idxs) - static


def on_cuda() -> Transformer:
    """A model as it is on a GPU, with int4 and int8 weights, its memory left out."""
    quantized = {"quantization_config": quantization_config(Form(4, 32, has_zeros=True))}
    model = random_model(RAW | quantized, "cpu", torch.bfloat16, optimize=False)
    optimize_(model, "cuda")
    model.to("meta").setup_caches(1, 8192)
    return model


def head_on_cuda(target: Transformer) -> Head:
    head = random_head(HEAD_RAW, random_model(RAW, "cpu", torch.bfloat16), optimize=False)
    optimize_(head, "cuda")
    target.tap_layers = head.head_config.tap_layers
    return with_caches(head.to("meta"), target)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_needs_the_host_for_nothing(name):
    """Nothing in it is read, made or waited for on the host, and no shape follows the data."""
    pytest.importorskip("triton", reason="triton is not installed; it has no build for this system")
    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step, columns, rest = STEPS[name]
    rest = [torch.utils._pytree.tree_map_only(torch.Tensor, partial(torch.Tensor.to, device="meta"), r) for r in rest]
    target = on_cuda()
    rest = [on_cuda() if each is DRAFT_MODEL else head_on_cuda(target) if each is HEAD else each for each in rest]
    torch._dynamo.reset()
    run = torch.compile(step, backend=aot_autograd(fw_compiler=capture), fullgraph=True, dynamic=False)
    with torch.inference_mode():
        run(target, *arguments(columns, 100, "meta"), None, *rest)
    nodes = [
        node for graph in graphs for module in graph.modules() for node in getattr(module, "graph", graph.graph).nodes
    ]
    calls = {str(node.target) for node in nodes if node.op == "call_function"}
    assert {"kernels.cuda_int4_product.default", "kernels.cuda_attention.default"} <= calls
    hosts = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "by_expert")
    assert not [call for call in calls if any(host in call for host in hosts)]
    values = [node.meta.get("val") for node in nodes]
    tensors = [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert all(isinstance(size, int) for tensor in tensors for size in tensor.shape)


MIXED = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
INT8 = {"quantization_config": quantization_config(Form(8))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"num_hidden_layers": 3}),
        ({"num_hidden_layers": 3}, {}),
        ({}, {"attention_bias": True}),
        ({}, {"rms_norm_eps": 1e-6}),
        ({"tie_word_embeddings": True}, {}),
        ({**MIXED, "max_window_layers": 1}, {**MIXED, "max_window_layers": 2}),
        ({}, INT8),
    ],
)
def test_a_graph_is_never_used_for_a_model_that_it_is_not_of(first, second, dtype):
    """Though the guards of the first layer alone are kept; one call for all blocks has biases too."""
    torch._dynamo.reset()
    counter = CompileCounter()
    options = {"guard_filter_fn": keep_needed_guards}
    run = torch.compile(decode, backend=counter, fullgraph=True, dynamic=False, options=options)
    rest = torch.arange(16), torch.full((16,), 3), torch.arange(64), GREEDY, None
    for raw in (first, first, second):
        model = random_model({**RAW, **raw}, "cpu", dtype)
        model.setup_caches(16, 64)
        with torch.inference_mode():
            assert torch.equal(run(model, *rest)[0], decode(model, *rest)[0])
    shared = isinstance(model.run_blocks, CpuBlocks) and second == {"attention_bias": True}
    assert counter.frame_count == 2 - shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_condition_of_a_later_layer_is_checked_at_each_token(dtype):
    model = random_model(RAW, "cpu", dtype)
    model.setup_caches(1, 64)
    checked = []

    def keep(guards):
        kept = keep_needed_guards(guards)
        checked.extend(guard.name for guard, is_kept in zip(guards, kept, strict=True) if is_kept)
        return kept

    run = torch.compile(decode, backend="eager", fullgraph=True, dynamic=False, options={"guard_filter_fn": keep})
    with torch.inference_mode():
        run(model, torch.tensor([1]), torch.tensor([3]), torch.arange(64), GREEDY, None)
    assert any("cache" in name for name in checked)
    assert not [name for name in checked if ("['1']" in name or "[1]" in name) and "__mro__" not in name]


def test_a_compiled_step_refuses_a_model_whose_layers_differ(model):
    """A graph of the same first layer would read the weights of the second as if they had other sizes."""
    odd = random_model(RAW, "cpu", torch.float32)
    odd.setup_caches(1, 64)
    for name, (N, columns) in {"gate_up_proj": (320, 64), "down_proj": (64, 160)}.items():
        getattr(odd.layers[1].mlp, name).stored.weight = frozen_parameter(torch.ones(N, columns))
    message = "layer 1 has other tensors than layer 0"
    with torch.inference_mode():
        with pytest.raises(ValueError, match=message):
            compiled(decode)(odd, *arguments(None, 4), torch.arange(64), GREEDY, None)
        _, columns, rest = STEPS["round"]
        with pytest.raises(ValueError, match=message):
            compiled(draft_and_verify)(model, *arguments(columns, 4), torch.arange(64), odd, *rest[1:])


def test_the_compile_cache_tells_lengths_of_vectors_apart():
    """Torch 2.13's key does not, but has all settings: code for AVX2 from a cache wrote beyond tensors with AVX-512."""
    settings = {name: value for name, value in compile_options(None).items() if name.startswith("cpp.")}
    length = settings["cpp.simdlen"]
    if length is None:
        pytest.skip("inductor has its vectors' length from this CPU alone")
    with inductor.patch(settings | {"cpp.simdlen": None}):
        assert pick_vec_isa().bit_width() == length  # of its own choice too
    with inductor.patch(settings):
        assert inductor.save_config_portable()["cpp.simdlen"] == length
