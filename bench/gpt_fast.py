"""gpt-fast beside us, for bench.run --compare: the model and the quantized linears of a checkout, random weights.

The checkout is of 2025, whose model takes a mask for FlexAttention. A step of decoding is compiled as its generate.py
does it, and prefill is not, as there by default. A step's token is the likeliest, as everyone's is.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from bench.runner import Peer, decode_mode
from linears import Form
from model import ModelConfig

FILES = ("tokenizer", "model", "quantize")  # of the checkout, which are called as ours are


@contextlib.contextmanager
def checkout(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Give its model.py and quantize.py, which meanwhile find each other where ours are."""
    ours = {name: sys.modules.pop(name) for name in FILES if name in sys.modules}
    # Its quantize.py goes on without this one, which would bring in its generate.py, and settings of inductor with it.
    sys.modules["GPTQ"] = None  # type: ignore[assignment]
    try:
        for name in FILES:  # under a name of its own too, by which torch.compile looks functions up
            spec: Any = importlib.util.spec_from_file_location(f"gpt_fast_{name}", folder / f"{name}.py")
            sys.modules[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        yield sys.modules["model"], sys.modules["quantize"]
    finally:
        for name in (*FILES, "GPTQ"):
            sys.modules.pop(name, None)
        sys.modules.update(ours)


def find_obstacle(config: ModelConfig, form: Form | None, device: str) -> str:
    """Return what gpt-fast lacks for a model, "" where it runs it."""
    unknown = ("attention_bias", "qkv_bias", "qk_norm", "mlp_bias", "sliding_window", "num_local_experts")
    if missing := [name for name in unknown if getattr(config, name)]:
        return f"it has no {missing[0]}"
    if config.model_type not in ("llama", "mistral"):
        return f"it has no {config.model_type}"
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        return f"it takes heads of {config.hidden_size // config.num_attention_heads} channels, not {config.head_dim}"
    if config.rope_scaling is not None and config.rope_scaling.rope_type != "llama3":
        return f"it has no rope type {config.rope_scaling.rope_type}"
    on_cpu = form is not None and form.group_size is not None and not device.startswith("cuda")
    return "its int4 is for GPUs alone" if on_cpu else ""


class GptFast(Peer):
    """form: int8 or int4, None for none; length: of the caches."""

    def __init__(
        self, folder: Path, config: ModelConfig, form: Form | None, device: str, dtype: torch.dtype, length: int
    ):
        super().__init__(device)
        with checkout(folder) as (theirs, linears), torch.device("meta"):
            self.model: Any = theirs.Transformer(theirs.ModelArgs(
                block_size=length, vocab_size=config.vocab_size, n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads, n_local_heads=config.num_key_value_heads, dim=config.hidden_size,
                intermediate_size=config.intermediate_size, rope_base=config.rope_theta, norm_eps=config.rms_norm_eps,
            ))  # fmt: skip
            if form is not None:
                int8, int4 = linears.WeightOnlyInt8QuantHandler, linears.WeightOnlyInt4QuantHandler
                handler = int4(self.model, form.group_size) if form.group_size else int8(self.model)
                handler.convert_for_runtime()
        self.model.to(dtype).to_empty(device=device).eval()
        for tensor in chain(self.model.parameters(), self.model.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(0, 0.02)
            else:
                tensor.random_(torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max)
        with torch.device(device):
            self.model.setup_caches(1, length)
            self.at = torch.zeros(1, dtype=torch.long)
        self.mask = self.causal_mask(self.model.max_seq_length)
        on_cuda = decode_mode(device) is not None
        options: dict[str, Any] = {"triton.cudagraphs": on_cuda, "coordinate_descent_tuning": on_cuda}
        self.compiled = torch.compile(self.decode_one, fullgraph=True, options=options)

    def causal_mask(self, num_queries: int) -> BlockMask:
        def is_seen(b: Any, head: Any, query: Tensor, slot: Tensor) -> Tensor:
            return query >= slot

        return create_block_mask(is_seen, 1, 1, num_queries, self.model.max_seq_length, device=self.device)

    def likeliest(self, ids: Tensor, at: Tensor, mask: BlockMask) -> Tensor:
        return self.model(mask, ids, at)[:, -1].argmax(dim=-1, keepdim=True)

    def decode_one(self, ids: Tensor, at: Tensor) -> Tensor:
        mask = self.mask[:, :, at // self.mask.BLOCK_SIZE[0]]
        mask.mask_mod, mask.seq_lengths = self.mask.mask_mod, (1, self.model.max_seq_length)
        return self.likeliest(ids, at, mask)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        self.num_filled = ids.shape[1]  # its masks for several tokens begin at position 0
        return self.likeliest(ids, torch.arange(self.num_filled, device=self.device), self.causal_mask(self.num_filled))

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        chosen: Tensor = self.compiled(ids, self.at.fill_(self.num_filled)).clone()
        self.num_filled += 1
        return chosen
