"""What stands beside us in a comparison: transformers, llama.cpp and gpt-fast, on the same shapes, threads and device.

benchmark.py --compare drives it. None of them is required. Each is called a forward a token, so that no sampler or text
is timed; the argmax over the logits is, everywhere. transformers runs eager with its default cache, and compiled with a
static one, llama.cpp its `llama_decode`, gpt-fast, of which a checkout has to be given, its compiled model.
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

from checkpoint import quantization_scheme
from model import ModelConfig, Transformer
from scripts.gpt_fast import GptFast, why_no_gpt_fast
from scripts.ladder import Bench
from scripts.measure import (
    NUM_STEPS,
    PROMPT,
    Forwards,
    Rung,
    Steps,
    decode_mode,
    decode_rate,
    prefill_rate,
    runs,
    seconds,
    step_at,
)

# Our scheme -> the file type that llama.cpp's own quantizer makes of it, as llama.h numbers them.
FILE_TYPES = {"int8": ("Q8_0", 7), "int4-g32": ("Q4_0", 2)}
POSITION, PREFILL = 1900, 512
GGUF_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def missing(packages: dict[str, str]) -> list[str]:
    """Return the pip names of those modules that are not installed."""
    return [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]


def why_no_llama_cpp(device: str, config: ModelConfig) -> str:
    """Return what llama.cpp lacks to be compared, "" where it is there."""
    if lacking := missing({"llama_cpp": "llama-cpp-python", "gguf": "gguf"}):
        return f"pip install {' '.join(lacking)}"
    import llama_cpp

    if device.startswith("cuda") and not llama_cpp.llama_supports_gpu_offload():
        return "llama-cpp-python is built without CUDA; CMAKE_ARGS=-DGGML_CUDA=on pip install llama-cpp-python"
    special = ("attention_bias", "mlp_bias", "rope_scaling", "sliding_window")  # which `write_gguf` does not write
    found = [name for name in special if getattr(config, name)]
    return f"its file would need {found[0]} {getattr(config, found[0])}" if found else ""


class Ours:
    """This project's compiled steps."""

    def __init__(self, model: Transformer, steps: Steps, length: int):
        self.model, self.steps = model, steps
        model.setup_caches(1, length)

    def decode(self, num_tokens: int) -> float:
        return decode_rate(self.model, self.steps, num_tokens)

    def at(self, position: int) -> float:
        step = step_at(self.model, self.steps.decode, position)
        step()  # warms up
        return NUM_STEPS / seconds(lambda: [step() for _ in range(NUM_STEPS)], str(self.model.device))

    def prefill(self, length: int) -> float:
        return prefill_rate(self.model, self.steps, length)


class Transformers(Forwards):
    """transformers' eager model with random weights of the shapes that config.json `raw` describes."""

    def __init__(self, raw: dict[str, Any], device: str, dtype: torch.dtype):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**raw)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.device, self.num_filled = device, 0
        self.cache: Any = None

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self.num_filled += ids.shape[1]
        return out.logits[:, -1].argmax(dim=-1, keepdim=True)

    def keep(self, length: int) -> None:
        if length == 0:
            self.cache = None
        elif too_many := self.num_filled - length:
            self.cache.crop(-too_many)
        self.num_filled = length


class CompiledTransformers(Forwards):
    """The same with a static cache, a step of one token compiled."""

    def __init__(self, eager: Transformers, length: int):
        from transformers import StaticCache

        self.model, self.device, self.num_filled = eager.model, eager.device, 0
        self.cache: Any = StaticCache(config=self.model.config, max_cache_len=length)
        self.compiled = torch.compile(self.likeliest, mode=decode_mode(self.device), dynamic=False)

    def likeliest(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(dim=-1, keepdim=True)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        self.num_filled += ids.shape[1]
        return self.likeliest(ids)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        self.num_filled += 1
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(ids).clone()

    def keep(self, length: int) -> None:
        self.num_filled = length
        for layer in self.cache.layers:  # what is behind it is masked, and written before it is seen
            layer.cumulative_length.fill_(length)


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
        for count in (1, NUM_STEPS):  # the first warms up
            self.keep(position)
            rate = self.steps(1, count)
        return rate

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
    """Write a model that is not quantized, of a config that `why_no_llama_cpp` takes; it gets no vocabulary."""
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
        eager = Transformers(raw, bench.device, bench.dtype)
        yield f"transformers, {dtype}", "", eager
        yield f"transformers compiled, {dtype}", "", CompiledTransformers(eager, length)
    if folder_of_theirs := bench.args.gpt_fast:
        config = bench.models[""].config
        for weights, form in bench.forms.items():
            scheme = quantization_scheme(form)
            if reason := why_no_gpt_fast(config, scheme, bench.device):
                print(f"gpt-fast, {weights or dtype} is not compared: {reason}", file=sys.stderr)
                continue
            runner = GptFast(folder_of_theirs, config, scheme, bench.device, bench.dtype, length)
            yield f"gpt-fast, {weights or dtype}", weights, runner
    if reason := why_no_llama_cpp(bench.device, bench.models[""].config):
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
    everyone = [
        (name, weights, runner)
        for name, weights, runner in contenders(bench, raw, folder)
        if isinstance(runner, Ours) or runs(name, partial(runner.decode, 2))
    ]
    # Those of one form of the weights follow each other, before the machine's speed has changed much: ours, to which
    # the ratios are, then llama.cpp, and then those that take longest.
    forms = list(dict.fromkeys(weights for _, weights, _ in everyone))
    everyone.sort(key=lambda one: (forms.index(one[1]), isinstance(one[2], Forwards)))
    for what, size in (("decode", bench.args.new_tokens), ("at", POSITION), ("prefill", PREFILL)):
        label = {"decode": "decode", "at": f"decode at {size}", "prefill": f"prefill of {size}"}[what]
        ours: dict[str, str] = {}
        for name, weights, runner in everyone:
            rung = Rung(f"{name}, {label}", "tok/s", partial(getattr(runner, what), size), weights)
            rung.against = ours.setdefault(weights, rung.name)
            if rung.against == rung.name:
                rung.against = ""
            yield rung
