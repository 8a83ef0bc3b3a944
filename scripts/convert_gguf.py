"""Convert a GGUF file, as llama.cpp has them, to a folder like the Hub's: weights, config and tokenizer.

    python scripts/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --output_dir checkpoints/smollm2
    python scripts/convert_gguf.py Llama-3.2-1B-Instruct-Q4_0.gguf --keep_codes

Quantized weights are dequantized, a part of a tensor in memory at a time. With --keep_codes those of Q8_0 and Q4_0 stay
codes, in compressed-tensors as quantize.py writes it, and all others are dequantized. The output takes its name only
when it is whole. It needs package gguf.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import importlib.util
import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import is_finite, meta_model, tensor_specs
from cli.arguments import ArgumentParser
from cli.errors import user_errors
from compressed import grouped_config, hub_specs, pack_tensors
from config import DTYPES, parse_config
from files import Spec, new_folder, write_safetensors
from linears import Form, StoredLinear, pack_nibbles
from model import ModelConfig, rope_frequencies
from scripts.gguf_reader import GgufFile
from scripts.gguf_tokenizer import GgufVocabulary, has_tokenizer, write_json, write_tokenizer

# general.architecture -> what transformers calls such a model. Mistral's models come as llama, and Mixtral's too.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM", "smollm3": "SmolLM3ForCausalLM", "granite": "GraniteForCausalLM",
    "phi3": "Phi3ForCausalLM", "seed_oss": "SeedOssForCausalLM", "olmo2": "Olmo2ForCausalLM",
}  # fmt: skip
# Of these llama.cpp turns neighbouring channels with each other: rows of q and k are stored in that order.
INTERLEAVED = {"llama", "smollm3", "granite"}
# Keys of an architecture that change no arithmetic, or none with these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.sliding_window": (0,), "rope.scaling.original_context_length": (),
    "rope.scaling.finetuned": (), "tensor_data_layout": (),
}  # fmt: skip
# The Hub's names -> GGUF's.
OUTER_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps", "block_sparse_moe.experts.w2": "ffn_down_exps",
}  # fmt: skip
# Architectures whose second norm goes by another name.
NORM_AFTER_ATTENTION = {"seed_oss", "olmo2"}
ROPE_FACTORS = "rope_freqs.weight"
LONGROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
# Types whose codes can be kept, as the forms that they are.
BLOCK = 32
CODES = {name: Form(bits, BLOCK, scale_dtype=torch.float16) for name, bits in (("Q8_0", 8), ("Q4_0", 4))}


# ---------------------------------------------------------------------------------------------------------------------
# config.json


class Metadata:
    """The keys of a file's architecture, each of which has to be asked for."""

    def __init__(self, file: GgufFile):
        self.file = file
        self.architecture = str(file.values.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{file.path}: general.architecture {self.architecture} is not supported; supported: "
                f"{', '.join(ARCHITECTURES)}"
            )
        prefix = f"{self.architecture}."
        self.unread = {k.removeprefix(prefix): v for k, v in file.values.items() if k.startswith(prefix)}

    def get(self, key: str, expected: type, default: Any = None) -> Any:
        """Return a key's value. Raises ValueError where it is missing and has no default, or is of another type."""
        value = self.unread.pop(key, default)
        if type(value) is not expected:
            raise ValueError(f"{self.file.path}: {self.architecture}.{key} is {value!r}, expected {expected.__name__}")
        return float(f"{value:.7g}") if expected is float else value  # they are fp32: 1e-5 is 9.99999974738e-06

    def check_unread(self) -> None:
        """Raise ValueError where a key that nobody asked for may change the arithmetic."""
        for key, value in self.unread.items():
            if key not in NEUTRAL or (NEUTRAL[key] and value not in NEUTRAL[key]):
                shown = f" {value!r}" if isinstance(value, int | float | str) else ""
                raise ValueError(f"{self.file.path}: {self.architecture}.{key}{shown} is not supported")


def build_config(file: GgufFile) -> dict[str, Any]:
    """Make the config.json of a file, without what its tokenizer says. Raises ValueError where it is not supported."""
    data = Metadata(file)
    if file.values.get("split.count", 1) != 1:
        raise ValueError(
            f"{file.path} is one of {file.values['split.count']} files; join them with llama.cpp's "
            "llama-gguf-split --merge and convert the whole"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no tensor token_embd.weight; is it a language model?")
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    if data.get("vocab_size", int, vocab_size) != vocab_size:
        raise ValueError(f"{file.path}: {data.architecture}.vocab_size is not token_embd's {vocab_size} rows")
    hidden_size, heads = data.get("embedding_length", int), data.get("attention.head_count", int)
    head_dim = data.get("attention.key_length", int, hidden_size // max(1, heads))
    for key in ("attention.value_length", *["rope.dimension_count"] * (data.architecture != "phi3")):
        if (other := data.get(key, int, head_dim)) != head_dim:
            raise ValueError(f"{file.path}: {data.architecture}.{key} {other} is not supported; expected {head_dim}")
    num_experts, num_active = data.get("expert_count", int, 0), data.get("expert_used_count", int, 0)
    family, class_name = data.architecture, ARCHITECTURES[data.architecture]
    if family == "llama" and num_experts:
        family, class_name = "mixtral", "MixtralForCausalLM"
    num_layers = data.get("block_count", int)
    stored = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if stored < num_layers:  # before that many are made
        raise ValueError(f"{file.path}: {data.architecture}.block_count is {num_layers} and {stored} have tensors")
    raw = {
        "architectures": [class_name],
        "model_type": {"qwen3moe": "qwen3_moe"}.get(family, family),
        "hidden_size": hidden_size,
        "intermediate_size": data.get("feed_forward_length", int),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": data.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": data.get("context_length", int),
        "rms_norm_eps": data.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": data.get("rope.freq_base", float, 10000.0),
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if "blk.0.ffn_gate_up_exps.weight" in file.tensors:
        raise ValueError(f"{file.path}: experts' gate and up in one tensor are not supported; convert them apart")
    if num_experts:
        raw |= {"num_local_experts": num_experts, "num_experts_per_tok": num_active}
    raw |= family_keys(family, data, head_dim)
    scaling, factor = data.get("rope.scaling.type", str, "none"), data.get("rope.scaling.factor", float, 1.0)
    if scaling not in ("none", "linear", *["longrope"] * (raw["rope_scaling"] is not None)):
        raise ValueError(f"{file.path}: {data.architecture}.rope.scaling.type {scaling!r} is not supported")
    if scaling == "linear" and factor != 1:
        raw["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    data.check_unread()
    if ROPE_FACTORS in file.tensors:
        raw["rope_scaling"] = llama3_scaling(file, raw)
    return raw


def family_keys(family: str, data: Metadata, head_dim: int) -> dict[str, Any]:
    """Return the keys of config.json that a family has besides those of all."""
    tensors = data.file.tensors
    biases = {
        key: f"blk.0.{name}.bias" in tensors for key, name in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up"))
    }
    match family:
        case "llama" | "smollm3":
            return biases
        case "granite":
            keys = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
                    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}  # fmt: skip
            return biases | {key: data.get(name, float) for key, name in keys.items()}
        case "qwen3moe":
            return {"moe_intermediate_size": data.get("expert_feed_forward_length", int), "norm_topk_prob": True}
        case "seed_oss":
            return biases | {"attention_out_bias": "blk.0.attn_output.bias" in tensors}
        case "phi3":
            raw = {
                "sliding_window": data.get("attention.sliding_window", int, 0) or None,
                "original_max_position_embeddings": data.get("rope.scaling.original_context_length", int, 4096),
                "partial_rotary_factor": data.get("rope.dimension_count", int, head_dim) / head_dim,
            }
            factor = data.get("rope.scaling.attn_factor", float, 1.0)
            if LONGROPE["long_factor"] in tensors:
                factors = {key: data.file.read(name, torch.float32) for key, name in LONGROPE.items()}
                rope = {key: [float(f"{x:.7g}") for x in value.flatten().tolist()] for key, value in factors.items()}
                raw["rope_scaling"] = {"rope_type": "longrope", "attention_factor": factor, **rope}
            return raw
    return {}


def llama3_scaling(file: GgufFile, raw: dict[str, Any]) -> dict[str, Any] | None:
    """Return the rope_scaling that divides each frequency by its number in rope_freqs.weight; None where all are 1.

    Llama 3.1's four parameters are one too many for what they do, so its factors 1 and 4 are taken as given. Raises
    ValueError where the numbers are of another formula.
    """
    plain = rope_frequencies(parse_config({**raw, "rope_scaling": None})).double()
    factors = file.read(ROPE_FACTORS, torch.float64).flatten()
    problem = f"{file.path}: {ROPE_FACTORS} is not the scaling of Llama 3.1, which alone is supported"
    if factors.shape != plain.shape or raw["rope_scaling"] is not None or not (factors >= 0.999).all():
        raise ValueError(problem)
    largest, wavelengths = factors.max().item(), 2 * math.pi / plain
    if largest < 1.001:
        return None
    # Wavelengths below length / 4 are kept, those above length are scaled by all of it, and in between by a part of it.
    between = (factors > 1.001) & (factors < largest * 0.999)
    parts = (1 / factors - 1 / largest) / (1 - 1 / largest)
    lengths = ((3 * parts + 1) * wavelengths)[between]
    kept, scaled = wavelengths[factors <= 1.001], wavelengths[factors >= largest * 0.999]
    if not len(lengths):
        lengths = torch.stack([4 * kept.max() if len(kept) else scaled.min() / 2, scaled.min()])
    scaling = {
        "rope_type": "llama3", "factor": float(f"{largest:.6g}"), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": max(1, round(lengths.mean().item())),
    }  # fmt: skip
    found = rope_frequencies(parse_config({**raw, "rope_scaling": scaling})).double()
    if not torch.allclose(found, plain / factors, rtol=1e-5, atol=0):
        raise ValueError(problem)
    return scaling


# ---------------------------------------------------------------------------------------------------------------------
# Weights


class Source(NamedTuple):
    """Where a tensor of the Hub's is in the file."""

    name: str
    rows: slice  # its own among those of the other experts; all without experts
    heads: int  # whose rows are interleaved; 0 for other tensors


def gguf_name(hub_name: str, architecture: str) -> tuple[str, int]:
    """Return GGUF's name of a tensor of the Hub's, and which of its experts that is; 0 without experts."""
    name, _, suffix = hub_name.rpartition(".")
    if name in OUTER_NAMES:
        return f"{OUTER_NAMES[name]}.{suffix}", 0
    expert = re.search(r"\.experts\.(\d+)", name)
    layer, part = re.sub(r"\.experts\.\d+", ".experts", name).removeprefix("model.layers.").split(".", 1)
    names = LAYER_NAMES
    if architecture in NORM_AFTER_ATTENTION:
        names = names | {"post_attention_layernorm": "post_attention_norm"}
    return f"blk.{layer}.{names[part]}.{suffix}", int(expert[1]) if expert else 0


def find_sources(file: GgufFile, specs: dict[str, Spec], config: ModelConfig) -> dict[str, Source]:
    """Find each tensor of the Hub's in the file. Raises ValueError where one is missing, mis-shaped or left over."""
    interleaved = file.values["general.architecture"] in INTERLEAVED
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if interleaved else {}
    sources: dict[str, Source] = {}
    for hub_name, (_, shape) in specs.items():
        name, expert = gguf_name(hub_name, file.values["general.architecture"])
        if name == "output.weight" and name not in file.tensors:  # a head that is tied in the file
            name = "token_embd.weight"
        if name not in file.tensors:
            raise ValueError(f"{file.path} lacks tensor {name}; download it again")
        stack = (config.num_local_experts,) if ".experts." in hub_name else ()
        if file.tensors[name].shape != (*stack, *shape):
            raise ValueError(
                f"{file.path}: tensor {name} has shape {list(file.tensors[name].shape)}, its metadata asks for "
                f"{[*stack, *shape]}"
            )
        count = shape[0] if len(shape) == 2 else 1  # a vector is one row
        rows = slice(expert * count, (expert + 1) * count)
        sources[hub_name] = Source(name, rows, heads.get(hub_name.split(".")[-2], 0))
    if unexpected := sorted(
        file.tensors.keys() - {source.name for source in sources.values()} - {ROPE_FACTORS, *LONGROPE.values()}
    ):
        raise ValueError(f"{file.path} has tensor {unexpected[0]}, which is not supported")
    return sources


def split_halves(weight: Tensor, heads: int) -> Tensor:
    """Order rows of q or k, neighbours a pair, as the Hub has them: row j of a head is turned with row j + D/2."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_tensor(file: GgufFile, source: Source, spec: Spec) -> Tensor:
    dtype, shape = spec
    value = file.read(source.name, dtype, source.rows).view(shape)
    if not is_finite(value):
        large = " or too large for it; give --dtype bfloat16" if dtype == torch.float16 else ""
        raise ValueError(
            f"{file.path}: {source.name} has values that are not finite in {dtype}; the file is damaged{large}"
        )
    return split_halves(value, source.heads) if source.heads else value


# ---------------------------------------------------------------------------------------------------------------------
# Codes that are kept


def is_linear(hub_name: str) -> bool:
    """Say whether a tensor of the Hub's is the weight of a linear, but not of a router, which is never rounded."""
    module, _, suffix = hub_name.rpartition(".")
    return suffix == "weight" and "norm" not in module and not module.endswith((".embed_tokens", ".gate"))


def kept_forms(file: GgufFile, sources: dict[str, Source]) -> dict[str, Form]:
    """Return the forms of the Hub's modules whose codes are kept. Raises ValueError where there are none."""
    types = {name: file.tensors[source.name].kind.name for name, source in sources.items() if is_linear(name)}
    kept = {name.removesuffix(".weight"): CODES[type_] for name, type_ in types.items() if type_ in CODES}
    if not kept:
        others = ", ".join(sorted({*types.values()}))
        raise ValueError(
            f"{file.path} has no linears in {' or '.join(CODES)} whose codes --keep_codes could keep, only {others}; "
            "leave it out, and run quantize.py on the folder"
        )
    return kept


def stored_linear(form: Form, shape: torch.Size) -> StoredLinear:
    """Make a linear on the meta device for the codes of a tensor."""
    with torch.device("meta"):
        return StoredLinear(shape, form)


def packed_specs(specs: dict[str, Spec], kept: dict[str, Form]) -> dict[str, Spec]:
    """Put the tensors of compressed-tensors in the places of the weights whose codes are kept."""
    packed: dict[str, Spec] = {}
    for name, (dtype, shape) in specs.items():
        module = name.removesuffix(".weight")
        if module not in kept:
            packed[name] = (dtype, shape)
            continue
        stored = stored_linear(kept[module], shape)
        tensors = pack_tensors(stored, module, dict(stored.named_parameters()))
        packed |= {part: (tensor.dtype, tensor.shape) for part, tensor in tensors.items()}
    return packed


def read_codes(file: GgufFile, source: Source, stored: StoredLinear) -> dict[str, Tensor]:
    """Return the parameters of a linear as a tensor has them: blocks of an fp16 scale and BLOCK codes.

    Byte i of a block of 4 bits holds codes i and i + 16.
    """
    rows = torch.from_numpy(file.blocks(source.name)[source.rows].copy())
    scales, codes = rows.unflatten(-1, (stored.in_features // BLOCK, -1)).tensor_split((2,), dim=-1)
    scales = scales.contiguous().view(torch.float16).squeeze(-1)
    if not is_finite(scales):
        raise ValueError(f"{file.path}: {source.name} has scales that are not finite; the file is damaged")
    if stored.form.bits == 8:
        codes = codes.flatten(-2).view(torch.int8)
    else:
        codes = pack_nibbles(torch.cat((codes & 15, codes >> 4), dim=-1).flatten(-2))
    parameters = {"weight": codes, "scales": scales}
    return {name: split_halves(x, source.heads) if source.heads else x for name, x in parameters.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def convert(path: Path, output_dir: Path, dtype_name: str, keep_codes: bool = False) -> None:
    """Write the folder of a GGUF file. Raises ValueError or FileNotFoundError, and then leaves nothing behind."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("package gguf is not installed, which reads the weights: pip install gguf")
    file = GgufFile(path)
    raw, dtype = build_config(file), DTYPES[dtype_name]
    if keep_codes and file.tensors["token_embd.weight"].kind.name in CODES:
        raw["tie_word_embeddings"] = False  # codes for the head, rows to look up for the embedding
    model = meta_model(raw)
    specs = hub_specs(model, tensor_specs(model, dtype))
    sources = find_sources(file, specs, model.config)
    raw["torch_dtype"] = dtype_name
    kept = kept_forms(file, sources) if keep_codes else {}
    if kept:
        groups: dict[tuple[bool, Form], list[str]] = {}
        for module, form in kept.items():
            groups.setdefault((module == "lm_head", form), []).append(module)
        raw["quantization_config"] = grouped_config([(form, names) for (_, form), names in groups.items()])
    generation: dict[str, Any] = {}
    if has_tokenizer(file.values):
        vocabulary = GgufVocabulary(file.values)
        generation = {"bos_token_id": vocabulary.special_id("bos"), "eos_token_id": vocabulary.end_ids() or None}
        generation = {key: value for key, value in generation.items() if value is not None}
    with new_folder(output_dir) as folder:
        if has_tokenizer(file.values):
            write_tokenizer(file.values, folder)
        write_weights(file, folder / "model.safetensors", specs, sources, kept)
        write_json(folder / "config.json", {**raw, **generation})
        write_json(folder / "generation_config.json", generation)
    print(f"wrote {output_dir}", file=sys.stderr)
    if kept:
        count = sum(map(is_linear, specs))
        print(f"kept the codes of {len(kept)} of {count} linears; all else is in {dtype_name}", file=sys.stderr)
    if not has_tokenizer(file.values):
        print(f"but no tokenizer, since {path} has none", file=sys.stderr)


def write_weights(
    file: GgufFile, path: Path, specs: dict[str, Spec], sources: dict[str, Source], kept: dict[str, Form]
) -> None:
    pending: dict[str, Tensor] = {}
    with tqdm(total=len(specs), desc="convert", unit="tensor", dynamic_ncols=True) as bar:

        def read(name: str) -> Tensor:
            if name not in pending:
                bar.update()
                module, weight = name.rpartition(".")[0], name.rpartition(".")[0] + ".weight"
                if module not in kept or name.endswith(".bias"):
                    return read_tensor(file, sources[name], specs[name])
                stored = stored_linear(kept[module], specs[weight][1])
                pending.update(pack_tensors(stored, module, read_codes(file, sources[weight], stored)))
            return pending.pop(name)

        write_safetensors(path, packed_specs(specs, kept), read)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.gguf", help="a model as llama.cpp has it")
    parser.add_argument("--output_dir", type=Path, help="default: FILE without .gguf")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the weights that are written (bfloat16)"
    )
    parser.add_argument("--keep_codes", action="store_true", help="do not dequantize linears of Q8_0 and Q4_0")
    args = parser.parse_args(argv)
    with user_errors():
        convert(args.file, args.output_dir or args.file.with_suffix(""), args.dtype, args.keep_codes)


if __name__ == "__main__":
    main()
