"""The model's arithmetic, against `transformers` and against itself."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoint import load_model
from cli.report import step_weight_bytes
from config import parse_config, read_config
from kernels.inductor import CompiledLinear
from model import Linear, MoE, Transformer
from tests.conftest import FAMILIES, LENGTH, HubCheckpoint, shared_data

GetCheckpoint = Callable[[str], HubCheckpoint]


@pytest.fixture(params=FAMILIES)
def reference(request: pytest.FixtureRequest, hub_checkpoint: GetCheckpoint) -> HubCheckpoint:
    return hub_checkpoint(request.param)


def fresh_model(reference: HubCheckpoint, num_slots: int = LENGTH, batch_size: int | None = None) -> Transformer:
    """Load with caches whose every slot holds NaN until it is written."""
    model = load_model(reference.path, dtype=torch.float32)
    model.setup_caches(batch_size or reference.tokens.shape[0], num_slots)
    poison_(model)
    return model


def poison_(model: Transformer) -> None:
    caches = [value for name, value in model.named_buffers() if ".cache." in name]
    assert len(caches) == 2 * model.config.num_hidden_layers
    for cache in caches:
        cache.fill_(torch.nan)


def choices(model: Transformer, tokens: Tensor) -> tuple[Tensor, list[set[int]]]:
    """Run tokens [B, S]; return their logits, and the experts that any of them went to in each layer."""
    chosen: list[set[int]] = []
    hooks = [
        block.mlp.gate_up_proj.register_forward_pre_hook(
            lambda _, inputs: chosen.append(set(inputs[1].flatten().tolist()))
        )
        for block in model.layers
    ]
    logits = model(tokens, torch.arange(tokens.shape[1]))
    for hook in hooks:
        hook.remove()
    return logits, chosen


def keep_only_(model: Transformer, chosen: list[set[int]]) -> None:
    """Fill all other experts with NaN, or their scales, in whatever form they are."""
    for block, kept in zip(model.layers, chosen, strict=True):
        others = [i for i in range(model.config.num_local_experts) if i not in kept]
        assert others and isinstance(block.mlp, MoE)
        for stack in (block.mlp.gate_up_proj, block.mlp.down_proj):
            for p in stack.parameters():
                if p.is_floating_point():
                    p.data[others] = torch.nan


def decode(step: Callable[..., Tensor], tokens: Tensor, sizes: list[int]) -> Tensor:
    """Run tokens [B, S] through `step` in pieces of these sizes; returns the logits of all: [B, S, V]."""
    logits, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        logits.append(step(tokens[:, piece], torch.arange(start, start + size)))
        start += size
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers


def test_forward_without_caches_matches_transformers(reference: HubCheckpoint) -> None:
    model = load_model(reference.path, dtype=torch.float32)
    assert_close(model(reference.tokens, torch.arange(LENGTH)), reference.logits)


def test_one_forward_into_the_caches_matches_transformers(reference: HubCheckpoint) -> None:
    model = fresh_model(reference)
    assert_close(model(reference.tokens, torch.arange(LENGTH)), reference.logits)


@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [7, 1, 16, 2, 22], [LENGTH - 1, 1]], ids=["ones", "chunks", "one_more"]
)
def test_decode_matches_transformers(reference: HubCheckpoint, sizes: list[int]) -> None:
    assert_close(decode(fresh_model(reference), reference.tokens, sizes), reference.logits)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama3", {"rope_theta": 1e4}),
        ("codellama", {"rope_theta": 1e4}),
        ("rope_linear", {"rope_scaling": None}),
        ("rope_llama3", {"rope_scaling": None}),
        ("mistral_window", {"sliding_window": None}),
        ("mistral_window", {"sliding_window": 9}),
        ("gqa", {"rms_norm_eps": 1e-2}),
        ("qwen2_window", {"full_attention_layers": ()}),
        ("qwen2_window", {"sliding_window": None}),
        ("qwen2_window", {"full_attention_layers": (1,)}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("mixtral", {"num_experts_per_tok": 3}),
        ("mixtral_tied", {"sliding_window": None}),
        ("rope_yarn", {"rope_scaling": None}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe_shares", {"norm_topk_prob": True}),
        ("qwen3_moe_shares", {"sliding_window": None}),
        ("smollm3", {"no_rope_layers": ()}),
        ("smollm3", {"no_rope_layers": (0, 1)}),
        ("smollm3", {"rope_scaling": None}),
        ("smollm3_window", {"sliding_window": None}),
        ("granite", {"query_multiplier": 1.0}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("granite4", {"no_rope_layers": (0, 1)}),
        ("granite4_nope", {"no_rope_layers": ()}),
        ("phi3", {"sliding_window": None}),
        ("phi4_mini", {"partial_rotary_factor": 1.0, "rope_scaling": None}),
        ("phi4_mini", {"rope_scaling": None}),
        ("olmo3", {"local_rope_theta": None}),
        ("olmo3", {"rope_scaling": None}),
        ("olmo3", {"full_attention_layers": ()}),
        ("ministral3", {"query_scaling_beta": 0.0}),
        ("ministral3", {"rope_scaling": None, "query_scaling_beta": 0.0}),
        ("gemma3", {"local_rope_theta": None}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"query_multiplier": 1.0}),
        ("gemma3", {"embedding_multiplier": 1.0}),
        ("gemma3", {"gelu": False}),
        ("gemma3", {"norm_offset": 0.0}),
        ("gemma3", {"sliding_window": None, "local_rope_theta": None}),
    ],
)
def test_reference_would_show_a_feature_left_out(
    hub_checkpoint: GetCheckpoint, family: str, changes: dict[str, Any]
) -> None:
    reference = hub_checkpoint(family)
    model = load_model(reference.path, dtype=torch.float32, optimize=False)
    other = Transformer(dataclasses.replace(model.config, **changes))
    other.load_state_dict(model.state_dict())
    assert (other(reference.tokens, torch.arange(LENGTH)) - reference.logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "length"),
    [("rope_dynamic", 256), ("rope_dynamic", 300), ("phi4_mini", 96), ("phi4_mini", 97), ("phi4_mini", 200)],
)
def test_texts_below_and_above_the_original_length_match_transformers(
    hub_checkpoint: GetCheckpoint, family: str, length: int
) -> None:
    from transformers import AutoModelForCausalLM

    path = hub_checkpoint(family).path
    tokens = torch.randint(96, (2, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
    model = load_model(path, dtype=torch.float32)
    assert_close(model(tokens, torch.arange(length)), expected)
    model.setup_caches(2, length)
    assert_close(decode(model, tokens, [20, 1, length - 21]), expected)


def test_llama3_frequencies_match_transformers_at_the_real_sizes() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes: dict[str, Any] = {"hidden_size": 2048, "num_attention_heads": 32, "max_position_embeddings": 131072}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(rope))).inv_freq
    raw = {"model_type": "llama", "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    with torch.device("meta"):
        ours = Transformer(parse_config({**raw, **sizes, "rope_parameters": rope})).inv_freq[0, 1]
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Against itself


def test_each_row_at_its_own_position_equals_that_row_alone(reference: HubCheckpoint) -> None:
    model = fresh_model(reference)
    model(reference.tokens, torch.arange(LENGTH))  # later slots now hold what the shorter rows must not see
    starts, size = [5, 23, LENGTH - 4], 4
    positions = torch.tensor(starts).unsqueeze(-1) + torch.arange(size)
    generator = torch.Generator().manual_seed(1)
    new = torch.randint(model.config.vocab_size, (len(starts), size), generator=generator)
    together = model(new, positions)
    for row, start in enumerate(starts):
        alone = load_model(reference.path, dtype=torch.float32)
        text = torch.cat((reference.tokens[row, :start], new[row])).unsqueeze(0)
        assert_close(together[row : row + 1], alone(text, torch.arange(start + size))[:, start:], 1e-5)


def test_caches_larger_than_text_and_batch_change_nothing(reference: HubCheckpoint) -> None:
    model = fresh_model(reference, num_slots=LENGTH + 40, batch_size=5)
    assert_close(decode(model, reference.tokens, [20, 1, 27]), reference.logits)


def test_attending_to_fewer_slots_equals_the_whole_cache(reference: HubCheckpoint) -> None:
    whole, few = fresh_model(reference), fresh_model(reference)
    for start, size in ((0, 9), (9, 1), (10, 5)):
        piece, positions = reference.tokens[:, start : start + size], torch.arange(start, start + size)
        slots = torch.arange(start + size + 2)
        expected = whole(piece, positions)  # Gemma's reach 33
        assert_close(few(piece, positions, slots), expected, max(1e-5, 1e-6 * expected.abs().max().item()))


def test_nan_in_slots_not_yet_reached_changes_nothing(reference: HubCheckpoint) -> None:
    # A slot the window has left behind is poisoned too, where there is a window.
    model = fresh_model(reference)
    half = LENGTH // 2
    model(reference.tokens[:, :half], torch.arange(half))
    for layer, block in enumerate(model.layers):
        window = model.config.window(layer) or LENGTH
        assert block.self_attn.cache is not None
        for cache in block.self_attn.cache.buffers():
            cache[:, :, half:] = torch.nan
            cache[:, :, : max(0, half + 1 - window)] = torch.nan
    logits = model(reference.tokens[:, half : half + 1], torch.tensor([half]))
    assert_close(logits, reference.logits[:, half : half + 1])


def test_setting_up_caches_again_forgets_the_text_before(hub_checkpoint: GetCheckpoint) -> None:
    reference = hub_checkpoint("gqa")
    model = fresh_model(reference)
    model(reference.tokens.flip(-1), torch.arange(LENGTH))
    model.setup_caches(reference.tokens.shape[0], LENGTH)
    assert_close(decode(model, reference.tokens, [LENGTH]), reference.logits)


@pytest.mark.parametrize("family", ["mixtral", "mixtral_tied"])
def test_a_step_is_said_to_read_the_chosen_experts_and_no_others(hub_checkpoint: GetCheckpoint, family: str) -> None:
    model = load_model(hub_checkpoint(family).path, dtype=torch.float32)
    config = model.config
    of_one_expert = 4 * 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    idle = of_one_expert * (config.num_local_experts - config.num_experts_per_tok)
    table = 0 if model.tied else model.embed_tokens.weight.nbytes
    assert step_weight_bytes(model) == sum(p.nbytes for p in model.parameters()) - table - idle


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@dataclasses.dataclass(frozen=True)
class Compiled:
    reference: HubCheckpoint
    model: Transformer
    step: Callable[..., Tensor]
    size: int  # S


# Batch and new tokens: products of one and two rows are compiled otherwise than those of more, and so is attention.
@pytest.fixture(
    scope="module",
    params=[("biased", 1, 1), ("biased", 1, 5), ("qwen2_window", 2, 1), ("mixtral_tied", 2, 1)],
    ids=lambda param: f"{param[0]}-B{param[1]}-S{param[2]}",
)
def compiled(request: pytest.FixtureRequest, hub_checkpoint: GetCheckpoint) -> Iterator[Compiled]:
    family, batch, size = request.param
    whole = hub_checkpoint(family)
    reference = dataclasses.replace(whole, tokens=whole.tokens[:batch], logits=whole.logits[:batch])
    model = fresh_model(reference)
    torch._dynamo.reset()
    yield Compiled(reference, model, torch.compile(model, fullgraph=True, dynamic=False), size)
    torch._dynamo.reset()


@pytest.mark.parametrize("fill", [0.0, torch.nan], ids=["zeros", "nan"])
def test_compiled_decode_matches_transformers_whatever_unused_slots_hold(compiled: Compiled, fill: float) -> None:
    reference, model, size = compiled.reference, compiled.model, compiled.size
    for name, cache in model.named_buffers():
        if ".cache." in name:
            cache.fill_(fill)
    half = LENGTH // 2
    model(reference.tokens[:, :half], torch.arange(half))
    tokens = reference.tokens[:, half : half + 2 * size]
    positions = [torch.arange(half + i, half + i + size).repeat(len(tokens), 1) for i in (0, size)]
    logits = [compiled.step(*piece) for piece in zip(tokens.split(size, dim=1), positions, strict=True)]
    assert_close(torch.cat(logits, dim=1), reference.logits[:, half : half + 2 * size])


def test_compiled_rows_at_their_own_positions_equal_eager(compiled: Compiled) -> None:
    reference, model, size = compiled.reference, compiled.model, compiled.size
    tokens = reference.tokens[:, :size]
    positions = torch.tensor([3, 17, LENGTH - 5])[: len(tokens), None] + torch.arange(size)
    outputs = []
    for call in (model, compiled.step):
        poison_(model)
        model(reference.tokens, torch.arange(LENGTH))
        outputs.append(call(tokens, positions))
    assert_close(outputs[1], outputs[0], 1e-5)


def test_experts_that_are_not_chosen_are_not_read_compiled_or_not(hub_checkpoint: GetCheckpoint) -> None:
    reference = hub_checkpoint("mixtral")
    model = fresh_model(reference, batch_size=1)
    expected, chosen = choices(model, torch.tensor([[5]]))
    keep_only_(model, chosen)
    torch._dynamo.reset()
    for step in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        assert_close(step(torch.tensor([[5]]), torch.zeros(1, 1, dtype=torch.long)), expected, 1e-5)


@pytest.mark.parametrize("size", [64, 172, 4096, 4099, 5632, 11008, 28672])
@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_product_equals_eager_at_every_size(size: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, rows, size, generator=generator), torch.randn(24, size, generator=generator)
    bias = torch.randn(24, generator=generator)
    torch._dynamo.reset()
    plain = Linear(size, 24, bias=True).requires_grad_(False)
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    y = torch.compile(CompiledLinear(plain), fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(y, plain(x), atol=1e-3, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# A trained model


def test_stories260k_gives_the_published_text() -> None:
    path = shared_data("stories260k")
    expected = json.loads((path / "expected.json").read_text())
    model = load_model(path, dtype=torch.float32)
    ids = list(expected["prompt_ids"])
    model.setup_caches(1, len(expected["greedy_ids"]))
    logits = model(torch.tensor([ids]), torch.arange(len(ids)))
    while len(ids) < len(expected["greedy_ids"]):
        ids.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([ids[-1:]]), torch.tensor([len(ids) - 1]))
    assert ids == expected["greedy_ids"]


def test_stories260k_logits_match_transformers() -> None:
    path = shared_data("stories260k")
    expected = json.loads((path / "expected.json").read_text())
    assert read_config(path)["vocab_size"] == 512
    model = load_model(path, dtype=torch.float32)
    logits = model(torch.tensor([expected["greedy_ids"][:32]]), torch.arange(32))
    assert_close(logits[0, 31, :16], torch.tensor(expected["logits_at_31_first_16"]))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_after_its_caches_were_set_up_keeps_its_frequencies(
    hub_checkpoint: GetCheckpoint, dtype: torch.dtype
) -> None:
    path, positions = hub_checkpoint("gemma3").path, torch.arange(200, 220)
    cast, loaded = load_model(path, dtype=torch.float32, optimize=False), load_model(path, dtype=dtype, optimize=False)
    for model in (cast, loaded):
        model.setup_caches(1, 256)
    cast.to(dtype)
    assert cast.inv_freq.dtype == torch.float32 and torch.equal(cast.inv_freq, loaded.inv_freq)
    tokens = torch.arange(20).unsqueeze(0)
    assert torch.equal(cast(tokens, positions), loaded(tokens, positions))
    assert cast.to("meta").inv_freq.device.type == "meta"


@torch.inference_mode()
def test_without_caches_any_positions_are_causal(hub_checkpoint: GetCheckpoint) -> None:
    """Rotary embeddings are relative: a text elsewhere has the logits that it has at the start."""
    model, tokens = load_model(hub_checkpoint("mistral_window").path, dtype=torch.float32), torch.arange(20)[None]
    expected = model(tokens, torch.arange(20))
    torch.testing.assert_close(model(tokens, torch.arange(50, 70)), expected, atol=1e-4, rtol=0)
    rows = torch.stack((torch.arange(20), torch.arange(31, 51)))
    torch.testing.assert_close(model(tokens.expand(2, -1), rows), expected.expand(2, -1, -1), atol=1e-4, rtol=0)


def test_positions_outside_of_the_slots_are_refused(hub_checkpoint: GetCheckpoint) -> None:
    model, tokens = load_model(hub_checkpoint("gqa").path, dtype=torch.float32), torch.arange(5)[None]
    model.setup_caches(1, 32)
    for positions, slots in ((torch.arange(-2, 3), None), (torch.arange(28, 33), None), (torch.arange(5), 4)):
        with pytest.raises(ValueError, match=r"positions -?\d+ to \d+ are not in the caches' \d+ slots; set up more"):
            model(tokens, positions, None if slots is None else torch.arange(slots))
