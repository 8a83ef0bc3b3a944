"""Quantized checkpoints of other programs: small folders, packed here from random codes, and the programs' own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import generate
import quantize
from checkpoint import ModelReader, load_model, save_hub_checkpoint
from config import parse_config, quantization_form, read_config
from linears import StoredLinear
from model import Ranks
from random_weights import random_model
from scripts import convert_hf_checkpoint
from tests.conftest import SHARED, HubCheckpoint, assert_user_error, run_forked

GetCheckpoint = Callable[[str], HubCheckpoint]
# Of a linear of this name and shape: the tensors by their last names, and the weight that they stand for.
Pack = Callable[[str, int, int], tuple[dict[str, Tensor], Tensor]]

RAW: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def as_words(codes: Tensor, bits: int) -> Tensor:
    """Put codes [.., K], the first in the lowest bits, into int32 [.., K * bits / 32 rounded up]."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    words = sum(codes[..., i] << bits * i for i in range(per_word))
    assert isinstance(words, Tensor)
    return torch.where(words < 2**31, words, words - 2**32).int()


class Drawn:
    """Random codes, scales of both signs, zero points, an order; and the weight that they stand for."""

    def __init__(self, name: str, N: int, K: int, bits: int, group: int, zeros: bool, dtype: torch.dtype, order: bool):
        # Parts that are stacked have an order in common.
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        shared = torch.Generator().manual_seed(K)
        size, top = K if group == -1 else group, 2**bits
        G = -(-K // size)
        self.codes = torch.randint(top, (N, K), generator=generator)
        self.scales = (torch.randn(N, G, generator=generator) * 0.6 / top).to(dtype)
        self.zeros = torch.randint(top, (N, G), generator=generator) if zeros else torch.full((N, G), top // 2)
        self.groups = torch.arange(K) // size
        if order:
            self.groups = self.groups[torch.randperm(K, generator=shared)]
        weight = (self.codes - self.zeros[:, self.groups]).double() * self.scales.double()[:, self.groups]
        self.weight = weight.float()


def compressed(
    bits: int, group: int = -1, zeros: bool = False, dtype: torch.dtype = torch.bfloat16, order: bool = False,
    plain: bool = False,
) -> tuple[dict[str, Any], Pack]:  # fmt: skip
    def pack(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        drawn = Drawn(name, N, K, bits, group, zeros, dtype, order)
        if plain:
            codes = (drawn.codes - 2 ** (bits - 1)).to(torch.int8)
            zeros_one_by_one = (drawn.zeros - 2 ** (bits - 1)).to(torch.int8)
            more = {"weight_zero_point": zeros_one_by_one} if zeros else {}
            return {"weight": codes, "weight_scale": drawn.scales, **more}, drawn.weight
        tensors = {"weight_packed": as_words(drawn.codes, bits), "weight_scale": drawn.scales}
        tensors["weight_shape"] = torch.tensor([N, K])
        if zeros:
            tensors["weight_zero_point"] = as_words(drawn.zeros.t(), bits).t().contiguous()
        if order:
            tensors["weight_g_idx"] = drawn.groups.int()
        return tensors, drawn.weight

    size = {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": not zeros, "dynamic": False, **size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"],
            "format": "int-quantized" if plain else "pack-quantized"}, pack  # fmt: skip


def gptq(
    bits: int = 4, group: int = 32, zeros: bool = True, order: bool = False, v2: bool = False, g_idx: bool = True,
    **options: Any,
) -> tuple[dict[str, Any], Pack]:  # fmt: skip
    def pack(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        drawn = Drawn(name, N, K, bits, group, zeros, torch.float16, order)
        words = as_words(drawn.zeros.t(), bits)  # [G, N * bits / 32]
        if not v2:
            words = words - (0x11111111 if bits == 4 else 0x01010101)  # of the word, with borrow
        tensors = {"qweight": as_words(drawn.codes, bits).t().contiguous(), "qzeros": words}
        tensors |= {"scales": drawn.scales.t().contiguous(), **({"g_idx": drawn.groups.int()} if g_idx else {})}
        return tensors, drawn.weight

    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, **form, **options}, pack


def awq(group: int = 32, **options: Any) -> tuple[dict[str, Any], Pack]:
    def shuffled(codes: Tensor) -> Tensor:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
        return as_words(codes.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2), 4)

    def pack(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        drawn = Drawn(name, N, K, 4, group, True, torch.float16, False)
        tensors = {"qweight": shuffled(drawn.codes.t()), "qzeros": shuffled(drawn.zeros.t())}
        return {**tensors, "scales": drawn.scales.t().contiguous()}, drawn.weight

    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "GEMM", **options}, pack


def auto_round(packing: str, made: tuple[dict[str, Any], Pack]) -> tuple[dict[str, Any], Pack]:
    options = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": made[0]["group_size"]}
    return options, made[1]


def auto_round_float8(rows: int, **options: Any) -> tuple[dict[str, Any], Pack]:
    return {"quant_method": "auto-round", "data_type": "fp", "bits": 8, **options}, float8(rows, 0)[1]


def gptqmodel_float8(rows: int, columns: int) -> tuple[dict[str, Any], Pack]:
    """Of version 7: scales divide, in a tensor of the name of those that multiply."""

    def pack(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, weight = float8(rows, columns, inverse=True, dtype=torch.float32)[1](name, N, K)
        scale = tensors["weight_scale_inv"]
        return {**tensors, "weight_scale_inv": 1 / (scale if columns else scale.flatten())}, weight

    block = [rows, columns] if columns else None
    options = {"quant_method": "fp8", "bits": 8, "format": "float8_e4m3fn", "weight_block_size": block}
    return {**options, "weight_scale_semantics": "inverse", "desc_act": False, "rotation": None}, pack


def zeros_not_packed(bits: int) -> tuple[dict[str, Any], Pack]:
    """As compressed-tensors 0.8 and those before it wrote them."""

    def pack(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        zeros = Drawn(name, N, K, bits, 32, True, torch.bfloat16, False).zeros - 2 ** (bits - 1)
        tensors, weight = compressed(bits, 32, zeros=True)[1](name, N, K)
        return {**tensors, "weight_zero_point": zeros.to(torch.int8)}, weight

    return compressed(bits, 32, zeros=True)[0], pack


def of_tensor(bits: int, *shape: int) -> tuple[dict[str, Any], Pack]:
    """One scale and one zero point, which is not packed as those of groups are."""

    def pack(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        drawn = Drawn(name, N, K, bits, -1, True, torch.bfloat16, False)
        scale, middle, zero = drawn.scales[:1, 0], 2 ** (bits - 1), drawn.zeros[0, 0]
        tensors = {"weight_packed": as_words(drawn.codes, bits), "weight_scale": scale.view(shape)}
        return {**tensors, "weight_zero_point": (zero - middle).to(torch.int8).view(1)}, (
            (drawn.codes - zero) * scale.float()
        )

    options = compressed(bits, zeros=True)[0]
    options["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    return options, pack


def float8(
    rows: int, columns: int, inverse: bool = False, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[dict[str, Any], Pack]:  # fmt: skip
    """rows, columns: of what shares a scale; 0: all of them."""

    def pack(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        weight = (torch.randn(N, K, generator=generator) * 20).to(torch.float8_e4m3fn)
        size = rows or N, columns or K
        scale = torch.rand(-(-N // size[0]), -(-K // size[1]), generator=generator).mul(0.01).to(dtype)
        wide = scale.float().repeat_interleave(size[0], 0)[:N].repeat_interleave(size[1], 1)[:, :K]
        scale = scale if rows else scale.flatten()  # of a tensor
        return {"weight": weight, "weight_scale_inv" if inverse else "weight_scale": scale}, weight.float() * wide

    weights = {"num_bits": 8, "type": "float", "strategy": options.pop("strategy", "channel"), **options}
    ct = {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    return ({"quant_method": "fp8", "weight_block_size": [rows, columns]} if inverse else ct), pack


FORMATS: dict[str, tuple[dict[str, Any], Pack]] = {
    "ct 4 bit": compressed(4, 32),
    "ct 4 bit, zero points": compressed(4, 64, zeros=True),
    "ct 4 bit, by channel, fp16 scales": compressed(4, dtype=torch.float16),
    "ct 4 bit, fp32 scales": compressed(4, 32, zeros=True, dtype=torch.float32),
    "ct 4 bit, ordered": compressed(4, 32, order=True),
    "ct 8 bit": compressed(8, 32, dtype=torch.float16),
    "ct 8 bit, zero points": compressed(8, 64, zeros=True),
    "ct 8 bit, by channel": compressed(8),
    "ct int8": compressed(8, plain=True),
    "ct int8 in groups, fp32 scales": compressed(8, 64, plain=True, dtype=torch.float32),
    "ct 4 bit as int8": compressed(4, 32, plain=True),
    "ct 4 bit as int8, zero points": compressed(4, 32, plain=True, zeros=True),
    "ct 4 bit, zero points not packed": zeros_not_packed(4),
    "ct 8 bit, zero points not packed": zeros_not_packed(8),
    "ct 8 bit, of a whole tensor": of_tensor(8, 1),
    "ct 4 bit, of a whole tensor": of_tensor(4, 1),
    "ct 4 bit, of a whole tensor, without a dimension": of_tensor(4),
    "ct fp8 by channel": float8(1, 0),
    "ct fp8 by tensor": float8(0, 0, strategy="tensor"),
    "ct fp8 by block": float8(48, 40, strategy="block", block_structure=[48, 40]),
    "ct fp8 by group": float8(1, 32, strategy="group", group_size=32),
    "gptq": gptq(),
    "gptq v2": gptq(v2=True, group=64),
    "gptq, ordered": gptq(order=True),
    "gptq, a whole row": gptq(group=-1),
    "gptq 8 bit": gptq(bits=8),
    "gptq 8 bit, ordered": gptq(bits=8, order=True, zeros=False),
    "gptq in groups of 16": gptq(group=16),
    "awq": awq(),
    "awq of an odd group": awq(group=-1),
    "auto-round": auto_round("auto_round", gptq(v2=True, g_idx=False)),
    "auto-round as gptq": auto_round("auto_round:auto_gptq", gptq(g_idx=False)),
    "auto-round as awq": auto_round("auto_round:auto_awq", awq()),
    "auto-round that names no packing": auto_round("auto", gptq(g_idx=False)),
    "auto-round for a kernel": auto_round("auto_round:auto_gptq:exllamav2", gptq(g_idx=False)),
    "auto-round of gptqmodel": auto_round("auto_round:gptqmodel", gptq(v2=True, g_idx=False)),
    "auto-round fp8 by tensor": auto_round_float8(0, group_size=0),
    "auto-round fp8 by channel": auto_round_float8(1, group_size=-1, packing_format="auto_round:fp8_static"),
    "fp8": float8(128, 128, inverse=True, dtype=torch.float32),
    "fp8 of gptqmodel": gptqmodel_float8(48, 40),
    "fp8 of gptqmodel, by row": gptqmodel_float8(1, 0),
    "fp8 of gptqmodel, by tensor": gptqmodel_float8(0, 0),
    "fp8 in blocks that do not divide": float8(48, 40, inverse=True),
    "fp8 with scales of powers of 2": float8(48, 40, inverse=True, dtype=torch.float8_e8m0fnu),
}


def write_folder(path: Path, raw: dict[str, Any], tensors: dict[str, Tensor], **quantization: Any) -> Path:
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw | quantization))
    return path


def make_folders(
    path: Path, form: tuple[dict[str, Any], Pack], source: Path | None = None, leave: tuple[str, ...] = ("lm_head",)
) -> tuple[Path, Path]:
    """Write a model quantized in a form, and the plain one in fp32 whose weights it stands for.

    source: the folder whose other tensors they take; None: a random one. leave: parts of the names that stay plain.
    """
    options, pack = form
    if source is None:
        source = path / "source"
        source.mkdir(parents=True)
        save_hub_checkpoint(random_model(RAW, dtype=torch.float32, optimize=False), RAW, source, torch.float32)
    raw = {**read_config(source), "dtype": "float32"}
    plain = load_file(source / "model.safetensors")
    packed = dict(plain)
    for name, weight in plain.items():
        kept = weight.ndim != 2 or any(part in name for part in (*leave, "embed_tokens", "mlp.gate.", "moe.gate."))
        if not kept:
            base = name.removesuffix(".weight")
            del packed[name]
            tensors, plain[name] = pack(base, *weight.shape)
            packed |= {f"{base}.{kind}": tensor for kind, tensor in tensors.items()}
    return (
        write_folder(path / "packed", raw, packed, quantization_config=options),
        write_folder(path / "plain", raw, plain),
    )


@torch.inference_mode()
def logits(path: Path, dtype: torch.dtype = torch.float32, optimize: bool = True, tokens: Tensor = TOKENS) -> Tensor:
    model = load_model(path, dtype=dtype, optimize=optimize)
    return model(tokens, torch.arange(tokens.shape[1])).float()


def forms_of(path: Path) -> dict[str, str]:
    """Return the form of each quantized linear, in a word."""
    model = load_model(path, dtype=torch.float32, optimize=False)
    return {
        name: f"int{child.form.bits}{' ordered' * child.form.is_ordered}"
        for name, child in model.named_modules()
        if isinstance(child, StoredLinear)
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_computes_with_the_weights_that_it_stands_for(tmp_path: Path, capsys: Any, name: str) -> None:
    packed, plain = make_folders(tmp_path, FORMATS[name])
    expected = logits(plain)
    for optimize in (False, True):
        torch.testing.assert_close(logits(packed, optimize=optimize), expected, atol=1e-4, rtol=0)
    # Plain bf16 may be farther from fp32 than that, by how the CPU rounds: 0.07 was seen.
    error, of_plain = ((logits(packed, torch.bfloat16, fast) - expected).norm() for fast in (True, False))
    assert error <= max(0.05 * expected.norm(), of_plain)
    said = capsys.readouterr().err
    parts = [part for parts in ModelReader(packed, torch.float32).packed.values() for part in parts if part]
    names = [tensor for part in parts for tensor in part.names]
    assert len(names) == len(set(names))  # so that their bytes are counted once
    if "fp8" in name:
        assert "8 weights are dequantized" in said and "MB of float32" in said
    else:
        assert said == ""
        kinds = set(forms_of(packed).values())
        assert kinds == {("int8" if "8" in name else "int4") + " ordered" * ("ordered" in name)}


@pytest.mark.parametrize("name", ["gptq", "ct 4 bit, zero points", "fp8"])
@pytest.mark.parametrize("family", ["qwen2_tied", "biased", "qwen3", "mixtral", "phi3", "granite4", "qwen3_moe"])
def test_every_family_is_read_in_every_kind_of_format(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, name: str, family: str
) -> None:
    form = {"gptq": gptq(group=16), "ct 4 bit, zero points": compressed(4, 16, zeros=True), "fp8": FORMATS["fp8"]}[name]
    reference = hub_checkpoint(family)
    packed, plain = make_folders(tmp_path, form, reference.path)
    tokens = reference.tokens[:, :12]
    torch.testing.assert_close(logits(packed, tokens=tokens), logits(plain, tokens=tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gptq", "gptq 8 bit, ordered", "awq"])
def test_sizes_that_do_not_fill_a_word_are_read(tmp_path: Path, name: str) -> None:
    """As gptqmodel writes them, which rounds up."""
    raw = {**RAW, "intermediate_size": 110}
    (tmp_path / "odd").mkdir()
    save_hub_checkpoint(random_model(raw, dtype=torch.float32, optimize=False), raw, tmp_path / "odd", torch.float32)
    packed, plain = make_folders(tmp_path, FORMATS[name], tmp_path / "odd")
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-4, rtol=0)


def test_phi3_is_read_with_gate_and_up_apart_as_gptqmodel_writes_them(
    hub_checkpoint: GetCheckpoint, tmp_path: Path
) -> None:
    reference = hub_checkpoint("phi3")
    tensors = load_file(reference.path / "model.safetensors")
    for name in [name for name in tensors if "gate_up_proj" in name]:
        for part, weight in zip(("gate_proj", "up_proj"), tensors.pop(name).chunk(2), strict=True):
            tensors[name.replace("gate_up_proj", part)] = weight
    apart = write_folder(tmp_path / "apart", read_config(reference.path), tensors)
    torch.testing.assert_close(logits(apart, tokens=reference.tokens), reference.logits, atol=1e-4, rtol=0)
    packed, plain = make_folders(tmp_path, FORMATS["gptq in groups of 16"], apart)
    tokens = reference.tokens[:, :12]
    torch.testing.assert_close(logits(packed, tokens=tokens), logits(plain, tokens=tokens), atol=1e-4, rtol=0)


def fuse_experts(tensors: dict[str, Tensor], suffix: str, fused: str, block: str) -> dict[str, Tensor]:
    """Put the tensors that all experts of a layer have by one name into stacks; block: what the layer is called."""
    names = {name for name in tensors if ".experts." in name and name.endswith(f".{suffix}")}
    made = {name: tensor for name, tensor in tensors.items() if name not in names}
    for base in {name.split(".experts.")[0] for name in names}:
        parts = ("w1", "w3", "w2") if base.endswith("block_sparse_moe") else ("gate_proj", "up_proj", "down_proj")
        stacks: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i in range(sum(name.startswith(f"{base}.experts.") for name in names) // 3):
            gate, up, down = (tensors[f"{base}.experts.{i}.{part}.{suffix}"] for part in parts)
            stacks[0].append(torch.cat((gate, up)))
            stacks[1].append(down)
        experts = base.rpartition(".")[0] + f".{block}.experts."
        made |= {
            f"{experts}{name}{fused}": torch.stack(s)
            for name, s in zip(("gate_up_proj", "down_proj"), stacks, strict=True)
        }
    return made


@pytest.mark.parametrize(("family", "block"), [
    ("mixtral", "block_sparse_moe"), ("mixtral", "mlp"), ("qwen3_moe_shares", "mlp"),
])  # fmt: skip
def test_experts_are_read_as_transformers_has_them_in_memory(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, family: str, block: str
) -> None:
    """It saves FP8 with the scales of all experts in one tensor, and with save_original_format=False their weights."""
    reference = hub_checkpoint(family)
    form = float8(16, 16, inverse=True, dtype=torch.float32)
    packed, plain = make_folders(tmp_path, form, reference.path)
    tokens = reference.tokens[:, :12]
    expected = logits(plain, tokens=tokens)
    for folder, suffix, fused in ((packed, "weight_scale_inv", "_scale_inv"), (plain, "weight", "")):
        tensors = fuse_experts(load_file(folder / "model.safetensors"), suffix, fused, block)
        save_file(tensors, folder / "model.safetensors")
        torch.testing.assert_close(logits(folder, tokens=tokens), expected, atol=1e-4, rtol=0)
        for name in [name for name in tensors if name.endswith(f"down_proj{fused}")][:1]:
            save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, folder / "model.safetensors")
            with pytest.raises(ValueError, match=r"config\.json asks for"):
                load_model(folder)


def references() -> list[Path]:
    folders = sorted((SHARED / "formats").glob("*/reference.safetensors"))
    return [file.parent for file in folders if (file.parent / "model.safetensors").is_file()]


@pytest.mark.skipif(not references(), reason="the programs' own folders are not on this machine")
def test_the_programs_own_folders_are_read_or_refused_by_name() -> None:
    for folder in references():
        reference = load_file(folder / "reference.safetensors")
        name = folder.name.split("_")[0]
        if name in ("ao", "bnb", "mlx"):
            with pytest.raises(ValueError, match={"ao": "torchao", "bnb": "bitsandbytes", "mlx": "MLX"}[name]):
                load_model(folder)
            continue
        expected = reference.get("logits_rule", reference["logits"])
        error = (logits(folder, tokens=reference["input_ids"]) - expected).abs().max()
        assert error < 1e-4, folder


@pytest.mark.parametrize("name", ["fp8", "ct int8"])
def test_a_head_of_another_type_is_no_embedding(tmp_path: Path, name: str) -> None:
    packed, plain = make_folders(tmp_path, FORMATS[name], leave=())
    expected, raw = logits(plain), read_config(packed)
    (packed / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    torch.testing.assert_close(logits(packed), expected, atol=1e-4, rtol=0)


def test_a_quantized_head_is_read_as_it_is_even_where_the_embedding_is_said_to_be_it(tmp_path: Path) -> None:
    options, pack = gptq(dynamic={"lm_head": {"bits": 8, "group_size": 64}})

    def by_name(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        return (gptq(bits=8, group=64)[1] if name == "lm_head" else pack)(name, N, K)

    packed, plain = make_folders(tmp_path, (options, by_name), leave=())
    expected = logits(plain)
    raw = read_config(packed)
    for tied in (False, True):
        (packed / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": tied}))
        torch.testing.assert_close(logits(packed), expected, atol=1e-4, rtol=0)
        assert forms_of(packed)["lm_head"] == "int8"


@pytest.mark.parametrize("leave", ["v_proj", "layers.1", "o_proj"])
def test_modules_that_were_left_alone_stay_what_they_are(tmp_path: Path, capsys: Any, leave: str) -> None:
    packed, plain = make_folders(tmp_path, FORMATS["gptq"], leave=("lm_head", leave))
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-4, rtol=0)
    # Of a matrix that is stacked here and quantized in part, all is dequantized.
    assert ("2 weights are dequantized" in capsys.readouterr().err) == (leave == "v_proj")
    assert len(forms_of(packed)) == {"v_proj": 6, "layers.1": 4, "o_proj": 6}[leave]


def test_parts_of_different_orders_are_dequantized(tmp_path: Path, capsys: Any) -> None:
    options, pack = FORMATS["gptq, ordered"]

    def other_order(name: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
        return pack(name, N, K) if "k_proj" not in name else FORMATS["gptq"][1](name, N, K)

    packed, plain = make_folders(tmp_path, (options, other_order))
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-4, rtol=0)
    assert "2 weights are dequantized" in capsys.readouterr().err


def test_shards_and_older_files_are_read(tmp_path: Path) -> None:
    packed, plain = make_folders(tmp_path, FORMATS["gptq"])
    expected, raw = logits(plain), read_config(packed)
    tensors = load_file(packed / "model.safetensors")
    shards = {f"model-0000{i}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in (0, 1)}
    for file, held in shards.items():
        save_file(held, packed / file)
    (packed / "model.safetensors").unlink()
    where = {name: file for file, held in shards.items() for name in held}
    (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    torch.testing.assert_close(logits(packed), expected, atol=1e-4, rtol=0)
    options = raw.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(raw))
    (packed / "quantize_config.json").write_text(json.dumps(options | {"quant_method": "gptq"}))
    torch.testing.assert_close(logits(packed), expected, atol=1e-4, rtol=0)


ROTATED = {"R1": {"apply": [{"location": "weight_output"}, {"location": "weight_input", "inverse": True}]}}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gptq v2", {"checkpoint_format": None, "format": "GPTQ_V2"}),
        ("gptq", {"quant_method": None}),
        ("awq", {"quant_method": None, "zero_point": True}),
        ("gptq", {"checkpoint_format": None, "version": "2", "dynamic": {"x": {"bits": None, "group_size": None}}}),
        ("auto-round", {"quant_method": "intel/auto-round"}),
        ("ct 4 bit", {"quant_method": None, "transform_config": {"config_groups": ROTATED}}),
        ("ct fp8 by block", {"block_structure": "48x40"}),
        ("gptq", {"bits": 4.0}),
        ("ct 4 bit", {"actorder": "group"}),  # of a module that has no order
        ("ct 8 bit, of a whole tensor", {"num_bits": 8.0}),
    ],
)
def test_config_says_the_same_in_other_words(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    packed, plain = make_folders(tmp_path, FORMATS[name])
    raw = read_config(packed)
    key = "compression_config" if "ct" in name else "quantization_config"
    options = raw.pop("quantization_config")
    if change.keys() & {"block_structure", "num_bits", "actorder"}:
        [group] = options["config_groups"].values()
        group["weights"] |= change
    else:
        options |= change
    (packed / "config.json").write_text(json.dumps({**raw, key: options}))
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-4, rtol=0)
    convert_hf_checkpoint.convert(packed, tmp_path / "converted", "float32")
    torch.testing.assert_close(logits(tmp_path / "converted"), logits(plain), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "quant_method": None}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
        ("ct fp8 by tensor", "hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "FP8"}}),
    ],
)
def test_older_programs_said_it_in_a_file_beside(tmp_path: Path, name: str, file: str, options: Any) -> None:
    packed, plain = make_folders(tmp_path, FORMATS[name])
    raw = read_config(packed)
    del raw["quantization_config"]
    (packed / "config.json").write_text(json.dumps(raw))
    (packed / file).write_text(json.dumps(options))
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-4, rtol=0)


def test_biases_of_zeros_are_left_out_and_others_are_not(tmp_path: Path, capsys: Any) -> None:
    packed, plain = make_folders(tmp_path, FORMATS["gptq"])
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.bias"
    save_file({**tensors, name: torch.zeros(128)}, packed / "model.safetensors")
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-4, rtol=0)
    assert f"ignored {name}" in capsys.readouterr().err
    save_file({**tensors, name: torch.ones(128)}, packed / "model.safetensors")
    with pytest.raises(ValueError, match=f"has unexpected tensor {name}"):
        load_model(packed)


@pytest.mark.parametrize(("prefix", "block"), [("model.", "mlp"), ("model.", "block_sparse_moe"), ("", "mlp")])
def test_mixtral_is_read_by_the_names_that_it_has_in_memory_too(
    hub_checkpoint: GetCheckpoint, tmp_path: Path, prefix: str, block: str
) -> None:
    reference = hub_checkpoint("mixtral")
    packed, plain = make_folders(tmp_path, gptq(group=16), reference.path)
    new = {".block_sparse_moe.": f".{block}.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    new["model."] = prefix
    tensors = load_file(packed / "model.safetensors")
    for old, name in new.items():
        tensors = {key.replace(old, name): tensor for key, tensor in tensors.items()}
    save_file(tensors, packed / "model.safetensors")
    tokens = reference.tokens[:, :12]
    torch.testing.assert_close(logits(packed, tokens=tokens), logits(plain, tokens=tokens), atol=1e-4, rtol=0)


def test_the_tensors_tell_where_config_says_too_little_or_too_much(tmp_path: Path) -> None:
    """transformers saves dequantized weights under a config of fp8, and fp8 weights under none."""
    packed, plain = make_folders(tmp_path, FORMATS["fp8"])
    expected, raw = logits(plain), read_config(packed)
    options = raw.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(raw))
    torch.testing.assert_close(logits(packed), expected, atol=1e-4, rtol=0)
    (plain / "config.json").write_text(json.dumps(raw | {"quantization_config": options}))
    assert torch.equal(logits(plain), expected)


def test_scales_of_activations_and_caches_change_nothing(tmp_path: Path) -> None:
    packed, plain = make_folders(tmp_path, FORMATS["ct fp8 by tensor"])
    tensors = load_file(packed / "model.safetensors")
    tensors |= {
        f"model.layers.0.self_attn.{kind}": torch.ones(1)
        for kind in ("q_proj.input_scale", "q_proj.activation_scale", "k_scale")
    }
    save_file(tensors, packed / "model.safetensors")
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ct 4 bit, fp32 scales", "gptq, ordered", "gptq, a whole row", "ct 8 bit", "fp8"])
def test_the_ranks_shares_are_parts_of_the_weight(tmp_path: Path, name: str) -> None:
    packed, _ = make_folders(tmp_path, FORMATS[name])

    def weights(rank: int, count: int) -> dict[str, Any]:
        model = load_model(packed, dtype=torch.float32, ranks=Ranks(rank, count), optimize=False)
        names = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
        linears = {name: model.layers[0].get_submodule(name) for name in names}
        return {name: x.dequantize() if isinstance(x, StoredLinear) else x.weight for name, x in linears.items()}

    whole, shares = weights(0, 1), [weights(rank, 2) for rank in (0, 1)]
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        assert torch.equal(torch.cat([share[module] for share in shares], dim=1), whole[module])
    halves = [share["mlp.gate_up_proj"].chunk(2) for share in shares]
    assert torch.equal(torch.cat([half[i] for i in (0, 1) for half in halves]), whole["mlp.gate_up_proj"])


@pytest.mark.parametrize(
    ("name", "kind", "change", "words"),
    [
        ("gptq", "qzeros", lambda zeros: zeros + 1, "qzeros is not 8 everywhere, as sym says"),
        ("ct int8", "weight", lambda codes: codes.float().to(torch.float8_e4m3fn), "float8.* speaks of codes"),
        (
            "ct fp8 by tensor",
            "weight",
            lambda values: values.view(torch.int8),
            "int8, and config.json speaks of floats",
        ),
    ],
)
def test_tensors_that_config_disproves_are_damage(
    tmp_path: Path, name: str, kind: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    packed, _ = make_folders(tmp_path, gptq(zeros=False) if name == "gptq" else FORMATS[name])
    raw, tensors = read_config(packed), load_file(packed / "model.safetensors")
    if name == "gptq":
        raw["quantization_config"] |= {"sym": True}
        (packed / "config.json").write_text(json.dumps(raw))
        linear = load_model(packed, optimize=False).layers[0].mlp.down_proj
        assert str(linear.form) == str(quantization_form(raw)) == "int4-g32-sym"
    tensors = {key: change(value) if key.endswith(f"down_proj.{kind}") else value for key, value in tensors.items()}
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        load_model(packed)


def test_groups_that_ranks_cannot_share_are_refused(tmp_path: Path) -> None:
    packed, _ = make_folders(tmp_path, compressed(4, 64))
    load_model(packed, ranks=Ranks(0, 2))  # o_proj's 64 inputs are one group, of which each rank has a part
    with pytest.raises(ValueError, match=r"down_proj has 128 inputs in groups of 64, .* the 4 ranks"):
        load_model(packed, ranks=Ranks(0, 4))
    ordered, _ = make_folders(tmp_path / "ordered", gptq(group=64, order=True))
    load_model(ordered, ranks=Ranks(0, 4))  # dequantized, since a rank's inputs are columns all over the order


def test_convert_dequantizes_and_quantize_takes_what_is_no_code(tmp_path: Path, capsys: Any) -> None:
    packed, plain = make_folders(tmp_path / "gptq", FORMATS["gptq"])
    convert_hf_checkpoint.main(["--checkpoint_dir", str(packed), "--output_dir", str(tmp_path / "dense")])
    said = capsys.readouterr().err
    assert "8 weights are dequantized" in said and "no kernel" not in said
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(plain), atol=1e-4, rtol=0)
    arguments = ["--mode", "int8", "--output_path", str(tmp_path / "int8"), "--checkpoint_path"]
    assert_user_error(run_forked(quantize.main, *arguments, packed, cwd=tmp_path), "quantized already")
    float8_folder, _ = make_folders(tmp_path / "fp8", FORMATS["fp8"])
    quantize.main([*arguments, str(float8_folder)])
    error = (logits(tmp_path / "int8") - logits(float8_folder)).norm()
    assert 0 < error < 0.1 * logits(float8_folder).norm()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": {}}, "torchao"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "MLX"),
        ({"quant_method": "exl3", "bits": 4.0}, "exl3"),
        ({"quant_method": "exl2"}, "exl2"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}, "NVFP4"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"format": "mxfp4-pack-quantized"}}}, "MXFP4"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "format": "marlin"}, "MARLIN"),
        ({"quant_method": {"a": [1] * 1000}}, "{'a': [1"),
        ({"quant_method": None}, "an unknown method"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "data_type": "mx_fp"},
            "auto-round with packing_format auto_round:llm_compressor of mx_fp",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_method_that_is_not_read_is_refused_by_its_name_in_a_short_line(options: Any, name: str) -> None:
    for key in ("quantization_config", "quantization") if name == "MLX" else ("quantization_config",):
        with pytest.raises(ValueError, match=r"run quantize\.py on it") as error:
            parse_config({**RAW, key: {**options, "modules_to_not_convert": ["lm_head"] * 100}})
        assert f"quantization_config of {name}" in str(error.value) and len(str(error.value)) < 250


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]
DOWN, Q = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"


def option(key: str, value: Any) -> Change:
    return lambda options, tensors: options.update({key: value})


def of_group(**changes: Any) -> Change:
    return lambda options, tensors: options["config_groups"]["group_0"]["weights"].update(changes)


def tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Change:
    def damage(options: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value.contiguous()

    return damage


def with_nan(values: Tensor) -> Tensor:
    values.view(-1)[3] = torch.nan
    return values


def with_one(value: int) -> Callable[[Tensor], Tensor]:
    return lambda values: torch.cat((values.new_tensor([value]), values[1:]))


CT, CT_ZEROS, GPTQ, AWQ, FP8, ORDERED = "ct 4 bit", "ct 4 bit, zero points", "gptq", "awq", "fp8", "gptq, ordered"
INT8 = "ct int8"
HOSTILE: dict[str, tuple[str, Change, str]] = {
    "ct too short": (CT, tensor(f"{DOWN}.weight_packed", lambda t: t[:, :-1]), "weight_packed has shape [64, 15]"),
    "ct of other rows": (CT, tensor(f"{DOWN}.weight_packed", lambda t: t[:-8]), "weight_packed has shape [56, 16]"),
    "ct of bytes": (CT, tensor(f"{DOWN}.weight_packed", lambda t: t.byte()), "weight_packed is torch.uint8"),
    "ct scales of another group": (CT, tensor(f"{DOWN}.weight_scale", lambda t: t[:, :3]), "has shape [64, 3]"),
    "ct without scales": (CT, tensor(f"{DOWN}.weight_scale", lambda t: None), "lacks tensor"),
    "ct no groups": (CT, tensor(f"{DOWN}.weight_scale", lambda t: t[:, :0]), "weight_scale has shape [64, 0]"),
    "ct scales NaN": (CT, tensor(f"{DOWN}.weight_scale", with_nan), "not finite"),
    "ct scales of integers": (CT, tensor(f"{DOWN}.weight_scale", lambda t: t.int()), "expected floats"),
    "ct another weight_shape": (CT, tensor(f"{DOWN}.weight_shape", lambda t: t + 1), "weight_shape is not [64, 128]"),
    "ct zero points of other rows": (
        CT_ZEROS, tensor(f"{DOWN}.weight_zero_point", lambda t: t[:-1]), "weight_zero_point has shape [7, 2]"
    ),
    "ct an unknown strategy": (CT, of_group(strategy="spiral"), "strategy 'spiral' of compressed-tensors"),
    "ct of 3 bits": (CT, of_group(num_bits=3), "num_bits 3 of compressed-tensors"),
    "ct of 8 bits": (CT, of_group(num_bits=8), "weight_packed has shape"),
    "ct of a type": (CT, of_group(type="complex"), "type 'complex'"),
    "ct groups of 0": (CT, of_group(group_size=0), "group_size 0"),
    "ct groups of text": (CT, of_group(group_size="32"), "group_size '32'"),
    "ct groups of another size": (CT, of_group(group_size=64), "weight_scale has shape [64, 2]"),
    "ct without groups": (CT, option("config_groups", {}), "weight_packed has shape"),
    "ct groups that are a list": (CT, option("config_groups", []), "config_groups []"),
    "ct a group that is text": (CT, option("config_groups", {"a": "b"}), "config_groups"),
    "ct a transform": (CT, option("transform_config", {"config_groups": {"R1": {}}}), "transform_config"),
    "ct a rotation of inputs": (
        CT, option("transform_config", {"config_groups": {**ROTATED, "R2": {"apply": [{"location": "input"}]}}}),
        "transform_config",
    ),
    "ct a transform of text": (CT, option("transform_config", {"config_groups": {"R1": "R2"}}), "transform_config"),
    "ct without zero points": (CT, of_group(symmetric=False), "q_proj.weight_zero_point; download"),
    "ct without zero points, of two widths": (
        CT_ZEROS, lambda options, tensors: (
            tensors.pop(f"{DOWN}.weight_zero_point"),
            options["config_groups"].update(b={"targets": ["x"], "weights": {"num_bits": 8, "strategy": "channel"}}),
        ), "down_proj.weight_zero_point; download",
    ),
    "ct zero points of more bits": (
        "ct 4 bit, zero points not packed", tensor(f"{DOWN}.weight_zero_point", lambda t: t.clone().fill_(8)),
        "weight_zero_point goes beyond 4 bits",
    ),
    "int8 zero points of more bits": (
        INT8, lambda _, tensors: tensors.update({f"{DOWN}.weight_zero_point": torch.full((64, 1), -129)}),
        "weight_zero_point goes beyond 8 bits",
    ),
    "ct not rounded yet": (
        CT, lambda _, tensors: tensors.update({f"{DOWN}.weight": tensors.pop(f"{DOWN}.weight_packed").bfloat16()}),
        "not rounded yet; save it with save_compressed=True",
    ),
    "ct sparse": (CT, option("sparsity_config", {"format": "sparse-24"}), "sparsity_config"),
    "ct of another method": (CT, option("quant_method", "fp8"), "and config.json speaks of fp8"),
    "gptq g_idx out of range": (GPTQ, tensor(f"{DOWN}.g_idx", with_one(99)), "does not put 32 columns into each of 4"),
    "gptq g_idx below 0": (ORDERED, tensor(f"{DOWN}.g_idx", with_one(-7)), "g_idx does not put 32 columns"),
    "gptq g_idx of floats": (GPTQ, tensor(f"{DOWN}.g_idx", lambda t: t.float()), "g_idx is torch.float32"),
    "gptq g_idx too short": (GPTQ, tensor(f"{DOWN}.g_idx", lambda t: t[1:]), "g_idx has shape [127]"),
    "gptq too short": (GPTQ, tensor(f"{DOWN}.qweight", lambda t: t[1:]), "qweight has shape [15, 64]"),
    "gptq without zero points": (GPTQ, tensor(f"{DOWN}.qzeros", lambda t: None), "lacks tensor"),
    "gptq zero points too many": (GPTQ, tensor(f"{DOWN}.qzeros", lambda t: t.repeat(2, 1)), "qzeros has shape [8, 8]"),
    "gptq scales NaN": (GPTQ, tensor(f"{DOWN}.scales", with_nan), "not finite"),
    "gptq no groups": (GPTQ, tensor(f"{DOWN}.scales", lambda t: t[:0]), "scales has shape [0, 64]"),
    "gptq of 3 bits": (GPTQ, option("bits", 3), "bits 3 of gptq"),
    "gptq of bits that are text": (GPTQ, option("bits", [4]), "bits [4] of gptq"),
    "gptq groups of 0": (GPTQ, option("group_size", 0), "group_size 0 of gptq"),
    "gptq groups of true": (GPTQ, option("group_size", True), "group_size True of gptq"),
    "gptq as marlin": (GPTQ, option("is_marlin_format", True), "is_marlin_format True of gptq"),
    "gptq of a module of 2 bits": (GPTQ, option("dynamic", {"a": {"bits": 2}}), "bits 2 of gptq"),
    "gptq of a third version": (GPTQ, option("checkpoint_format", "gptq_v3"), "checkpoint_format 'gptq_v3' of gptq"),
    "gptq of a module of 0": (GPTQ, option("dynamic", {"a": {"group_size": 0}}), "group_size 0 of gptq"),
    "gptq without config": (GPTQ, option("quant_method", "fp8"), "is of gptq or awq, and config.json speaks of fp8"),
    "gptq as awq": (GPTQ, option("quant_method", "awq"), "qweight has shape"),
    "awq as gemv": (AWQ, option("version", "gemv"), "version 'gemv' of awq"),
    "awq too short": (AWQ, tensor(f"{DOWN}.qweight", lambda t: t[:, 1:]), "qweight has shape [128, 7]"),
    "awq scales NaN": (AWQ, tensor(f"{Q}.scales", with_nan), "not finite"),
    "auto-round of another packing": ("auto-round", option("packing_format", "auto_round:x"), "packing_format"),
    "auto-round of a packing that is a list": ("auto-round", option("packing_format", [1]), "packing_format [1]"),
    "fp8 without scales": (FP8, tensor(f"{DOWN}.weight_scale_inv", lambda t: None), "lacks tensor"),
    "fp8 scales of another block": (FP8, tensor(f"{DOWN}.weight_scale_inv", lambda t: t.repeat(3, 1)), "shape [3, 1]"),
    "fp8 NaN": (FP8, tensor(f"{DOWN}.weight_scale_inv", lambda t: t * torch.nan), "not finite"),
    "fp8 blocks of 0": (FP8, option("weight_block_size", [0, 128]), "blocks of [0, 128] weights"),
    "fp8 blocks of text": (FP8, option("weight_block_size", "128"), "blocks of 128 weights"),
    "fp8 a scale for all blocks": (
        "fp8 in blocks that do not divide", tensor(f"{DOWN}.weight_scale_inv", lambda t: t[:1, :1]), "has shape [1, 1]"
    ),
    "fp8 of another meaning": (FP8, option("weight_scale_semantics", "square"), "'square' of fp8"),
    "gptq rotated": (GPTQ, option("rotation", "hadamard"), "rotation 'hadamard' of gptq"),
    "awq rotated": (AWQ, option("rotation_config", {"a": 1}), "rotation_config {'a': 1} of awq"),
    "gptq ordered, without g_idx": (ORDERED, tensor(f"{DOWN}.g_idx", lambda t: None), "down_proj.g_idx; download"),
    "gptq ordered, an empty g_idx": (ORDERED, tensor(f"{DOWN}.g_idx", lambda t: t * 0 - 1), "does not put 32 columns"),
    "int8 a scale for all channels": (INT8, tensor(f"{DOWN}.weight_scale", lambda t: t[:1, 0]), "has shape [1]"),
    "ct fp8 a scale for all channels": (
        "ct fp8 by channel", tensor(f"{DOWN}.weight_scale", lambda t: t[:1, 0]), "has shape [1]"
    ),
    "auto-round of rows": ("auto-round", option("data_type", "mx_fp"), "of mx_fp"),
    "int8 without scales": (INT8, tensor(f"{DOWN}.weight_scale", lambda t: None), "is torch.int8, expected floats"),
    "int8 too small": (INT8, tensor(f"{DOWN}.weight", lambda t: t[:, 1:]), "weight has shape [64, 127]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("good")
    return {name: make_folders(path / name, FORMATS[name])[0] for name in {form for form, _, _ in HOSTILE.values()}}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malformed_twin_is_refused_in_one_line(
    tmp_path: Path, good_folders: dict[str, Path], capsys: Any, case: str
) -> None:
    name, change, said = HOSTILE[case]
    raw, tensors = read_config(good_folders[name]), load_file(good_folders[name] / "model.safetensors")
    change(raw["quantization_config"], tensors)
    folder = write_folder(tmp_path / "model", raw, tensors)
    for command, arguments in (
        (generate.main, ["--prompt_length", "2", "--max_new_tokens", "1"]),
        (quantize.main, ["--mode", "int8", "--output_path", str(tmp_path / "out")]),
    ):
        with pytest.raises(SystemExit) as end:
            command(["--checkpoint_path", str(folder), *arguments])
        assert end.value.code == 2
        printed = capsys.readouterr()
        [line] = [line for line in printed.err.splitlines() if "dequantized" not in line]
        assert line.startswith("error: ") and len(line) < 500
        assert said in line or "quantized already" in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_an_earlier_version_is_not_half_read(tmp_path: Path) -> None:
    packed, _ = make_folders(tmp_path, FORMATS["ct 4 bit"])
    raw = read_config(packed)
    (packed / "config.json").write_text(json.dumps({**raw, "layout": "fused"}))
    with pytest.raises(ValueError, match="quantization_config of compressed-tensors in a layout of ours"):
        load_model(packed)
    shutil.rmtree(packed)
