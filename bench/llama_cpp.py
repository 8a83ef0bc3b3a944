"""llama.cpp beside us, for bench.run --compare: our model as a GGUF file, and the C functions of llama-cpp-python."""

import ctypes
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.runner import Peer
from files import SAFETENSORS_DTYPES
from model import ModelConfig, Transformer
from names import hub_parts
from scripts.convert_gguf import gguf_name

PACKAGES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}  # what pip calls a module
FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # that its own quantizer makes, as llama.h numbers them
COUNTERPARTS = {"int8": "Q8_0", "int4-g32": "Q4_0"}  # of our schemes
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


def load_api() -> Any:
    import llama_cpp

    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
    return llama_cpp


def name_build() -> str:
    """Return its version and what it is built for: pip takes a wheel that it has built once, whatever CMAKE_ARGS says.

    "" where it is not installed.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return ""
    api = load_api()
    features = re.findall(r"(\w+) = 1\b", api.llama_print_system_info().decode())
    return " ".join([api.__version__, *features])


def find_obstacle(device: str, config: ModelConfig) -> str:
    """Return what llama.cpp lacks to be compared, "" where it is there."""
    if missing := [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        return f"pip install {' '.join(missing)}"
    if device.startswith("cuda") and not load_api().llama_supports_gpu_offload():
        built = "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir llama-cpp-python"
        return f"llama-cpp-python is built without CUDA; {built}"
    special = ("attention_bias", "mlp_bias", "rope_scaling", "sliding_window")  # which `write_gguf` does not write
    needed = [f"{name} {getattr(value, 'rope_type', value)}" for name in special if (value := getattr(config, name))]
    if config.model_type not in ("llama", "mistral"):
        needed.append(f"model_type {config.model_type}")
    return f"its file would need {needed[0]}" if needed else ""


class LlamaCpp(Peer):
    """llama.cpp on a GGUF file."""

    def __init__(self, path: Path, device: str, length: int):
        super().__init__("cpu")  # the logits are read on the host: nothing is left to wait for
        self.api = load_api()
        options = self.api.llama_model_default_params()
        options.n_gpu_layers = -1 if device.startswith("cuda") else 0
        self.model = self.api.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = self.api.llama_context_default_params()
        context.n_ctx = context.n_batch = length
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self.context = self.api.llama_init_from_model(self.model, context)
        self.vocab_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def run(self, batch: Any) -> None:
        if status := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {status}")

    def forward(self, ids: Tensor) -> Tensor:
        tokens = (ctypes.c_int32 * ids.shape[1])(*ids[0].tolist())
        self.run(self.api.llama_batch_get_one(tokens, len(tokens)))
        self.num_filled += len(tokens)
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return torch.tensor([[np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()]])

    def all_logits(self, ids: Tensor) -> Tensor:
        """Return the logits [B, S, V] of texts [B, S], each on its own."""
        return torch.stack([self.text_logits(row) for row in ids.tolist()])

    def text_logits(self, ids: list[int]) -> Tensor:
        self.keep(0)
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, id in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = id, i, 1, 0, 1
        self.run(batch)
        self.api.llama_batch_free(batch)
        logits = self.api.llama_get_logits(self.context)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (len(ids), self.vocab_size)).copy())

    def keep(self, length: int) -> None:
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, length, -1)
        super().keep(length)

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def interleave_heads(weight: Tensor, num_heads: int) -> Tensor:
    """Order the rows of q or k [heads * D, E] as llama.cpp's rope takes them: pairs beside each other.

    Ours turns channel i with i + D/2, the Hub's way.
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by llama.cpp's names."""
    config = model.config
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():  # a tied head is named once
        name = name.replace(".stored.", ".")  # as a layer of kernels/ calls the linear that it computes
        for hub_name, part in hub_parts(name, weight.detach().cpu(), config).items():
            layer = hub_name.split(".")[-2]
            part = interleave_heads(part, num_heads[layer]) if layer in num_heads else part
            yield gguf_name(hub_name, "llama")[0], part


def write_gguf(model: Transformer, path: Path) -> None:
    """Write a model that is not quantized, of a config in which `find_obstacle` sees none; it gets no vocabulary."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_theta,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "no_vocab",
    }.items():
        getattr(writer, f"add_{name}")(value)
    kind = gguf.GGMLQuantizationType[SAFETENSORS_DTYPES[model.embed_tokens.weight.dtype]]
    for name, tensor in gguf_tensors(model):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:  # as bytes: numpy has no bf16
            writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def step_bytes(path: Path) -> int:
    """Return the bytes of weights that a step reads of a file: all but an embedding that is not the head too."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def quantize_gguf(source: Path, kind: str) -> Path:
    """Have llama.cpp quantize a file by its own recipe, which keeps the output head of 4-bit ones at 6 bits."""
    api, path = load_api(), source.with_name(f"{kind}.gguf")
    options = api.llama_model_quantize_default_params()
    options.ftype, options.nthread = FILE_TYPES[kind], torch.get_num_threads()
    if api.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot quantize {source}")
    return path
