"""What stands beside us in a comparison: transformers and llama.cpp, on the same shapes, threads and device.

benchmark.py --compare drives it. Neither package is required. Each runs in its fastest plain form: transformers eager,
a forward a token with its default cache, llama.cpp its `llama_decode`, so that no sampler or text is timed; the argmax
over the logits is, everywhere.
"""

import ctypes
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import ModelConfig, Transformer
from scripts.ladder import Bench
from scripts.measure import PROMPT, Rung, Steps, decode_rate, median_ms, prefill_rate, seconds, step_at

# Our scheme -> the file type that llama.cpp's own quantizer makes of it, as llama.h numbers them.
FILE_TYPES = {"int8": ("Q8_0", 7), "int4-g32": ("Q4_0", 2)}
POSITION, PREFILL = 1900, 512
GGUF_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
NUM_STEPS = 10  # of a sample at a position


def missing(packages: dict[str, str]) -> list[str]:
    """Return the pip names of those modules that are not installed."""
    return [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]


def why_no_llama_cpp(device: str) -> str:
    """Return what llama.cpp lacks to be compared, "" where it is there."""
    if lacking := missing({"llama_cpp": "llama-cpp-python", "gguf": "gguf"}):
        return f"pip install {' '.join(lacking)}"
    import llama_cpp

    if device.startswith("cuda") and not llama_cpp.llama_supports_gpu_offload():
        return "llama-cpp-python is built without CUDA; CMAKE_ARGS=-DGGML_CUDA=on pip install llama-cpp-python"
    return ""


def check(config: ModelConfig) -> None:
    """Raise ValueError where llama.cpp would have to be told more than `write_gguf` does."""
    special = ("attention_bias", "mlp_bias", "rope_scaling", "sliding_window")
    if found := [name for name in special if getattr(config, name)]:
        raise ValueError(f"--compare does not support {found[0]} {getattr(config, found[0])}; give another --config")


class Ours:
    """This project's compiled steps."""

    def __init__(self, model: Transformer, steps: Steps, length: int):
        self.model, self.steps = model, steps
        model.setup_caches(1, length)

    def decode(self, num_tokens: int) -> float:
        return decode_rate(self.model, self.steps, num_tokens)

    def at(self, position: int) -> float:
        return 1e3 / median_ms(step_at(self.model, self.steps.decode, position), str(self.model.device), NUM_STEPS)

    def prefill(self, length: int) -> float:
        return prefill_rate(self.model, self.steps, length)


class Transformers:
    """transformers' eager model with random weights of the shapes that config.json `raw` describes."""

    def __init__(self, raw: dict[str, Any], device: str, dtype: torch.dtype):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**raw)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.device = device
        self.prefix: Any = None

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values

    def steps(self, ids: Tensor, cache: Any, count: int) -> float:
        """Decode `count` tokens after ids [1, 1]; return how many a second."""

        def run() -> None:
            nonlocal ids, cache
            for _ in range(count):
                ids, cache = self.forward(ids, cache)

        return count / seconds(run, self.device)

    def decode(self, num_tokens: int) -> float:
        ids, cache = self.forward(torch.tensor([PROMPT], device=self.device), None)
        return self.steps(ids, cache, num_tokens - 1)

    def at(self, position: int) -> float:
        if self.prefix is None:
            prompt = torch.ones(1, position, dtype=torch.long, device=self.device)
            _, self.prefix = self.forward(prompt, None)
        if too_many := self.prefix.get_seq_length() - position:
            self.prefix.crop(-too_many)
        return self.steps(torch.tensor([[1]], device=self.device), self.prefix, NUM_STEPS)

    def prefill(self, length: int) -> float:
        prompt = torch.ones(1, length, dtype=torch.long, device=self.device)
        return length / seconds(lambda: self.forward(prompt, None), self.device)


class LlamaCpp:
    """llama.cpp on a GGUF file, through the C functions of llama-cpp-python."""

    def __init__(self, path: Path, device: str, length: int):
        import llama_cpp

        self.api: Any = llama_cpp
        llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = -1 if device.startswith("cuda") else 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = length
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.num_filled = 0

    def forward(self, ids: list[int]) -> int:
        """Run ids after those that the cache holds; return the likeliest next one."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        self.num_filled += len(ids)
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def keep(self, length: int) -> None:
        """Forget what the cache holds from position `length` on."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, length, -1)
        self.num_filled = min(self.num_filled, length)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        self.keep(0)
        ids = [self.forward(prompt)]
        while len(ids) < num_tokens:
            ids.append(self.forward(ids[-1:]))
        return ids

    def steps(self, token: int, count: int) -> float:
        def run() -> None:
            nonlocal token
            for _ in range(count):
                token = self.forward([token])

        return count / seconds(run, "cpu")  # the logits are read on the host: nothing is left to wait for

    def decode(self, num_tokens: int) -> float:
        self.keep(0)
        return self.steps(self.forward(PROMPT), num_tokens - 1)

    def at(self, position: int) -> float:
        if self.num_filled < position:
            self.keep(0)
            self.forward([1] * position)
        self.keep(position)
        return self.steps(1, NUM_STEPS)

    def prefill(self, length: int) -> float:
        self.keep(0)
        return length / seconds(lambda: self.forward([1] * length), "cpu")

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


# ---------------------------------------------------------------------------------------------------------------------
# The model as a GGUF file


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Order the rows of q or k [heads * D, E] as llama.cpp's rope takes them: pairs beside each other.

    Ours turns channel i with i + D/2, the Hub's way.
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors by llama.cpp's names."""
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    sizes = [n * model.config.head_dim for n in (heads, kv_heads, kv_heads)]
    tensors: dict[str, Tensor] = {"token_embd": model.embed_tokens.weight, "output_norm": model.norm.weight}
    if not model.tied:
        tensors["output"] = model.lm_head.weight
    for i, block in enumerate(model.layers):
        q, k, v = block.self_attn.qkv_proj.weight.split(sizes)
        gate, up = block.mlp.gate_up_proj.weight.chunk(2)
        parts: dict[str, Tensor] = {
            "attn_norm": block.input_layernorm.weight,
            "attn_q": interleaved(q, heads),
            "attn_k": interleaved(k, kv_heads),
            "attn_v": v,
            "attn_output": block.self_attn.o_proj.weight,
            "ffn_norm": block.post_attention_layernorm.weight,
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": block.mlp.down_proj.weight,
        }
        tensors |= {f"blk.{i}.{name}": part for name, part in parts.items()}
    return tensors


def write_gguf(model: Transformer, path: Path) -> None:
    """Write a model that is not quantized, of a config that `check` takes; it gets no vocabulary."""
    import gguf

    config = model.config
    need, free = model.weight_bytes * 2, shutil.disk_usage(path.parent).free  # it and its two quantized forms
    if free < need:
        raise ValueError(
            f"llama.cpp's files need {need / 1e9:.1f} GB in {path.parent} and {free / 1e9:.1f} are free; set TMPDIR"
        )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[GGUF_NAMES[model.embed_tokens.weight.dtype]]
    for name, tensor in gguf_tensors(model).items():
        if tensor.ndim == 1:
            writer.add_tensor(f"{name}.weight", tensor.detach().float().cpu().numpy())
        else:  # as bytes: numpy has no bf16
            raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, path: Path, file_type: int) -> None:
    """Have llama.cpp quantize a file by its own recipe, which keeps the output head of 4-bit ones at 6 bits."""
    import llama_cpp

    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot quantize {source}")


# ---------------------------------------------------------------------------------------------------------------------
# The rungs


def contenders(bench: Bench, raw: dict[str, Any], folder: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield everyone's name, the form of the weights and the runner; ours of each form comes first."""
    length = 64 * (2 + max(bench.args.new_tokens, POSITION, PREFILL) // 64)
    dtype = str(bench.dtype).removeprefix("torch.")
    theirs = {"": dtype} | {name: kind for name, (kind, _) in FILE_TYPES.items()}
    steps = bench.steps["compile"]
    for weights in (w for w in bench.models if w in theirs):
        yield f"ours, {weights or dtype}", weights, Ours(bench.models[weights], steps, length)
    if lacking := missing({"transformers": "transformers"}):
        print(f"transformers is not compared: pip install {' '.join(lacking)}", file=sys.stderr)
    else:
        yield f"transformers, {dtype}", "", Transformers(raw, bench.device, bench.dtype)
    if reason := why_no_llama_cpp(bench.device):
        print(f"llama.cpp is not compared: {reason}", file=sys.stderr)
        return
    plain = folder / "plain.gguf"
    write_gguf(bench.models[""], plain)
    yield f"llama.cpp, {dtype}", "", LlamaCpp(plain, bench.device, length)
    for weights, (kind, file_type) in FILE_TYPES.items():
        if weights in bench.models:
            quantize_gguf(plain, folder / f"{kind}.gguf", file_type)
            yield f"llama.cpp, {kind}", weights, LlamaCpp(folder / f"{kind}.gguf", bench.device, length)


def rungs(bench: Bench, raw: dict[str, Any], folder: Path) -> Iterator[Rung]:
    everyone = list(contenders(bench, raw, folder))
    for what, size in (("decode", bench.args.new_tokens), ("at", POSITION), ("prefill", PREFILL)):
        label = {"decode": "decode", "at": f"decode at {size}", "prefill": f"prefill of {size}"}[what]
        ours: dict[str, str] = {}
        for name, weights, runner in everyone:
            rung = Rung(f"{name}, {label}", "tok/s", partial(getattr(runner, what), size), weights)
            rung.against = ours.setdefault(weights, rung.name)
            if rung.against == rung.name:
                rung.against = ""
            yield rung
