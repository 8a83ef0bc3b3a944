"""A Llama-family Transformer with a static KV cache.

It says what is computed. What computes it fast is in `kernels/`: `load_model` swaps those modules in, and without them
this file is the plain twin that they have to equal. Weights come from `checkpoint.py`, text from `engine.py`, and
`tp.py` splits a model over several ranks.

    model.setup_caches(max_batch_size=1, max_seq_length=256)
    logits = model(tokens, positions)

Shapes: B batch, S new tokens, T cache slots read, H query heads, K kv heads, G = H / K, D head_dim,
E hidden, F intermediate, V vocab, X experts, A active experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How rotary embeddings are stretched: `linear`, `llama3`, `yarn` and `longrope` by the frequencies that rope.py
    computes; `dynamic` (NTK) by a theta that depends on the length of the text.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0  # multiplies rotated queries and keys
    # [rotary_dim / 2] each: for texts up to the original length, and for longer ones; () of dynamic.
    frequencies: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The arithmetic of a model, in the Hub's field names where it has them. The defaults are a Llama's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0  # the share of each head's channels that rotate, the first ones
    local_rope_theta: float | None = None  # of the layers with a window, unscaled; None: they are as the others
    no_rope_layers: tuple[int, ...] = ()  # layers whose heads do not rotate
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()  # layers to which sliding_window does not apply
    attention_bias: bool = False
    qkv_bias: bool = False  # on q, k and v only
    qk_norm: bool = False
    qk_norm_over_heads: bool = False  # all heads at once, not each by itself
    query_multiplier: float = 1.0
    query_scaling_beta: float = 0.0  # queries grow by this times a logarithm of their position
    mlp_bias: bool = False
    gelu: bool = False  # in its approximation by tanh, instead of silu
    num_local_experts: int = 0  # 0: a dense feed-forward
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True  # the shares of the chosen experts sum to 1
    norm_inputs: bool = True  # of attention and feed-forward
    norm_outputs: bool = False
    norm_offset: float | None = None  # see RMSNorm
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and feed-forward add
    logits_scaling: float = 1.0  # logits are divided by it
    tie_word_embeddings: bool = False
    model_type: str = "llama"  # the names of the tensors on disk follow from it

    def window(self, layer: int) -> int | None:
        """Return how many tokens a layer attends to, None where there is no limit."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def is_local(self, layer: int) -> bool:
        """Say whether a layer has the local frequencies: it does not rotate, or has a window and its own theta."""
        return layer in self.no_rope_layers or None not in (self.local_rope_theta, self.window(layer))


def identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model, each holding a slice of it; on one rank the collectives are the identity."""

    rank: int = 0
    count: int = 1
    all_reduce: Callable[[Tensor], Tensor] = identity  # the sum over all ranks
    all_gather: Callable[[Tensor], Tensor] = identity  # of all ranks, concatenated along the last dimension
    broadcast: Callable[[Tensor], Tensor] = identity  # rank 0's

    def share(self, num_pieces: int) -> range:
        """Return which of so many pieces this rank has; of fewer pieces than ranks, several ranks have the same one."""
        begin = self.rank * num_pieces // self.count
        return range(begin, max(begin + 1, (self.rank + 1) * num_pieces // self.count))


ONE_RANK = Ranks()


def default_frequencies(theta: float, rotary_dim: int) -> Tensor:
    """Return by how much each pair of channels rotates per position: [rotary_dim / 2], fp32 (arXiv:2104.09864)."""
    return 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, device="cpu").float() / rotary_dim))


def rope_frequencies(config: ModelConfig, length: int = 0, local: bool = False) -> Tensor:
    """Return a model's frequencies, as `default_frequencies` does.

    length: of the longest text, on which dynamic and longrope depend. local: of the layers that `is_local` names.
    """
    size = int(config.head_dim * config.partial_rotary_factor)
    theta, rope = (config.local_rope_theta, None) if local else (config.rope_theta, config.rope_scaling)
    if theta is None:
        return torch.zeros(size // 2, dtype=torch.float32, device="cpu")  # these layers do not rotate
    if rope and rope.rope_type == "dynamic":  # NTK: theta grows with what the text exceeds that length by
        theta *= (1 + rope.factor * max(0, length / rope.original_max_position_embeddings - 1)) ** (size / (size - 2))
    elif rope:
        is_long = length > rope.original_max_position_embeddings
        return torch.tensor(rope.frequencies[int(is_long)], dtype=torch.float32, device="cpu")
    return default_frequencies(theta, size)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle; x [B, S, heads, D], cos and sin [B, S, 1, 2, D/2].

    The first half's angles are negated, which gives it -sin. The halves are swapped by a flip, which torch.compile
    turns into indexing; two results concatenated would be written twice. cos and sin may be for the first channels
    alone: then the others stay as they are.
    """
    if (size := 2 * cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    halves = x.float().unflatten(-1, (2, -1))
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).type_as(x)


def attention_mask(positions: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """Return which slots [T] or [B, 1, T] a token at each of the positions [B, S, 1] attends to: [B, S, T]."""
    mask = slots <= positions
    return mask if window is None else mask & (slots > positions - window)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend from q [B, S, H, D] to k, v [B, K, T, D] where mask [B, S, T] is true; returns [B, S, H, D].

    A slot that no query attends to may hold anything, even NaN, which a weight of 0 would not cancel: it is zeroed.
    """
    visible_slots = mask.any(dim=1)[:, None, :, None]
    k, v = torch.where(visible_slots, k, 0), torch.where(visible_slots, v, 0)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask.unsqueeze(1), enable_gqa=True)
    return y.transpose(1, 2)


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Experts(nn.Module):
    """A stack of X linear layers without bias, of which each row of x takes one."""

    def __init__(self, num_experts: int, in_features: int, out_features: int):
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        return by_expert(x, experts, lambda i, rows: F.linear(rows, self.weight[i]))


def by_expert(x: Tensor, experts: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Run each row of x [M, A, K] through its expert [M, A], all rows of an expert at once; returns [M, A, N].

    product(i, rows): applies expert i to rows [R, K]; called for experts that have any.
    """
    order = experts.flatten().argsort()
    rows_of_experts = x.flatten(0, 1)[order].split(experts.flatten().bincount().tolist())
    products = torch.cat([product(i, rows) for i, rows in enumerate(rows_of_experts) if len(rows)])
    return products[order.argsort()].unflatten(0, experts.shape)


def scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def swiglu(gate_up: Tensor, gelu: bool = False) -> Tensor:
    """Return silu(gate) * up for gate and up side by side: [..., 2 F] -> [..., F] (arXiv:2002.05202).

    gelu: in its approximation by tanh, instead of silu.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


class Embedding(nn.Module):
    def __init__(self, num_local_ids: int, embedding_dim: int, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        self.weight = nn.Parameter(torch.empty(num_local_ids, embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.ranks.count == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.ranks.rank * len(self.weight)
        is_local = (local >= 0) & (local < len(self.weight))
        x = F.embedding(torch.where(is_local, local, 0), self.weight)
        return self.ranks.all_reduce(torch.where(is_local.unsqueeze(-1), x, 0))


class RMSNorm(nn.Module):
    """Divide x by its root mean square and multiply by a weight.

    offset: is added to the weight, which then multiplies in fp32; None: x is rounded to its dtype before it is
    multiplied. ranks: those that hold the other parts of x, where it is cut.
    """

    def __init__(self, size: int, eps: float, offset: float | None = None, ranks: Ranks = ONE_RANK):
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(size))
        self.eps, self.offset, self.ranks = eps, offset, ranks

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = scaled(self.ranks.all_reduce(wide.square().mean(dim=-1, keepdim=True)), 1 / self.ranks.count)
        wide = wide * torch.rsqrt(mean_square + self.eps)
        if self.offset is None:
            return wide.type_as(x) * self.weight
        return (wide * (self.offset + self.weight.float())).type_as(x)


class KVCache(nn.Module):
    """The keys and values of one layer, in slots numbered by position: [B, K, length, D] each.

    One more slot is allocated, which is never used. Without it the slice of all slots would be contiguous and shorter
    ones not, and torch.compile would compile the two cases separately.
    """

    def __init__(self, batch_size: int, num_heads: int, length: int, head_dim: int, like: Tensor):
        super().__init__()
        shape = batch_size, num_heads, length + 1, head_dim
        self.k, self.v = (nn.Buffer(like.new_zeros(shape), persistent=False) for _ in range(2))

    def update_(self, positions: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, S, K, D] at positions [B, S]; return the first `length` slots: [B, K, T, D] of each."""
        rows = torch.arange(len(k), device=k.device).unsqueeze(-1)
        # Written to the cache itself: for a write through a view of it, torch 2.11 copies all slots.
        self.k[rows, :, positions] = k
        self.v[rows, :, positions] = v
        return self.k[: len(k), :, :length], self.v[: len(k), :, :length]


class BlockContext(NamedTuple):
    """What a block needs to know of its tokens' positions; blocks of one window and rotary embedding share one."""

    cos: Tensor  # [B, S, 1, 2, rotary_dim / 2], of the angles negated and of the angles
    sin: Tensor  # as cos
    positions: Tensor  # [B, S], also the cache slots that the tokens take
    mask: Tensor  # [B, S, T]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        self.config, self.ranks = config, ranks
        # With fewer kv heads than ranks several ranks hold the same one, and its queries are shared out.
        num_pieces = max(ranks.count, config.num_key_value_heads)
        self.num_local_heads = config.num_attention_heads // num_pieces * len(ranks.share(num_pieces))
        self.num_local_kv_heads = len(ranks.share(config.num_key_value_heads))
        q_size, kv_size = self.num_local_heads * config.head_dim, self.num_local_kv_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, q_size + 2 * kv_size, config.attention_bias or config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, config.attention_bias)

        # Of each head by itself, or of all at once, of which each of several ranks has a part.
        sizes, parts = ((q_size, kv_size), ranks) if config.qk_norm_over_heads else ((config.head_dim,) * 2, ONE_RANK)
        norms = [RMSNorm(size, config.rms_norm_eps, config.norm_offset, parts) for size in sizes]
        self.q_norm, self.k_norm = (norm if config.qk_norm else None for norm in norms)
        self.attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = attention  # or the device's kernel
        self.cache: KVCache | None = None

    def split_heads(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv_proj's output into q [B, S, H, D], k and v [B, S, K, D]; norm, rotate and scale q and k."""
        heads = qkv.unflatten(-1, (-1, self.config.head_dim))
        q, k, v = heads.split([self.num_local_heads, self.num_local_kv_heads, self.num_local_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(*q.shape[:2], -1, self.q_norm.weight.shape[0])).view_as(q)
            k = self.k_norm(k.reshape(*k.shape[:2], -1, self.k_norm.weight.shape[0])).view_as(k)
        q, k = scaled(rotate(q, cos, sin), self.config.query_multiplier), rotate(k, cos, sin)
        if self.config.query_scaling_beta and self.config.rope_scaling:
            growth = torch.log1p(positions // self.config.rope_scaling.original_max_position_embeddings)
            q = q * (1 + self.config.query_scaling_beta * growth)[:, :, None, None].type_as(q)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split_heads(self.qkv_proj(x), cos, sin, positions)
        cache, length = self.cache, mask.shape[-1]
        k, v = (k.transpose(1, 2), v.transpose(1, 2)) if cache is None else cache.update_(positions, k, v, length)
        return self.ranks.all_reduce(self.o_proj(self.attend(q, k, v, mask).flatten(2)))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        self.config, self.ranks = config, ranks
        local_size = config.intermediate_size // ranks.count
        self.gate_up_proj = Linear(config.hidden_size, 2 * local_size, config.mlp_bias)
        self.down_proj = Linear(local_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.all_reduce(self.down_proj(swiglu(self.gate_up_proj(x), self.config.gelu)))


class MoE(nn.Module):
    """A mixture of X feed-forwards, of which each token takes A (arXiv:2401.04088).

    Every rank holds a slice of each expert. All route alike, since all_reduce gives them the same x, to the bit.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        self.config, self.ranks = config, ranks
        local_size = config.intermediate_size // ranks.count
        self.gate = Linear(config.hidden_size, config.num_local_experts)
        self.gate_up_proj = Experts(config.num_local_experts, config.hidden_size, 2 * local_size)
        self.down_proj = Experts(config.num_local_experts, local_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores = self.gate(rows)
        chosen, experts = scores.topk(self.config.num_experts_per_tok)  # [B * S, A]
        if self.config.norm_topk_prob:
            shares = chosen.softmax(dim=-1, dtype=torch.float32)
        else:
            shares = scores.softmax(dim=-1, dtype=torch.float32).gather(-1, experts)
        rows = rows.unsqueeze(1).expand(-1, experts.shape[1], -1)
        rows = swiglu(self.gate_up_proj(rows, experts), self.config.gelu)
        y = self.down_proj(rows, experts)  # [B * S, A, E]
        return self.ranks.all_reduce((y * shares.unsqueeze(-1)).sum(dim=1).type_as(x).view(x.shape))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()

        def norm(is_there: bool) -> nn.Module:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset) if is_there else nn.Identity()

        self.input_layernorm = norm(config.norm_inputs)
        self.self_attn = Attention(config, ranks)
        self.attn_output_norm = norm(config.norm_outputs)
        self.post_attention_layernorm = norm(config.norm_inputs)
        self.mlp = MoE(config, ranks) if config.num_local_experts else MLP(config, ranks)
        self.mlp_output_norm = norm(config.norm_outputs)
        self.multiplier = config.residual_multiplier

    # Compiled once for all layers: compile time does not grow with the depth.
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), cos, sin, positions, mask)
        x = x + scaled(self.attn_output_norm(y), self.multiplier)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + scaled(self.mlp_output_norm(y), self.multiplier)


def run_blocks(blocks: Sequence[Block], contexts: list[BlockContext], x: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Run x [B, S, E] through the blocks, each in its context; return it, and what enters each layer of taps."""
    inputs = {}
    for layer, (block, context) in enumerate(zip(blocks, contexts, strict=True)):
        if layer in taps:
            inputs[layer] = x
        x = block(x, *context)
    return [x, *(inputs[layer] for layer in taps)]


class Transformer(nn.Module):
    """Token ids in, logits out. Without caches each call stands alone; with them it continues the text they hold.

    A new one's parameters are memory that is not set yet: `load_model` or load_state_dict gives it weights.
    Each of several ranks makes its own, with the slices of the parameters that `tp.py` cuts for it.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks = ONE_RANK):
        super().__init__()
        self.config, self.ranks = config, ranks
        self.tap_layers: tuple[int, ...] = ()  # those that an EAGLE-3 head reads; set before setup_caches
        num_local_ids = -(-config.vocab_size // ranks.count)  # the last rank's share may be padded
        self.embed_tokens = Embedding(num_local_ids, config.hidden_size, ranks)
        # Of blocks; a ModuleList's items are typed as Module.
        self.layers: Any = nn.ModuleList(Block(config, ranks) for _ in range(config.num_hidden_layers))
        self.run_blocks: Callable[..., list[Tensor]] = run_blocks  # or the device's, which has them in one call
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
        self.lm_head = Linear(config.hidden_size, num_local_ids)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.set_rope_()
        self.max_seq_length = config.max_position_embeddings

    def rope(self, device: str | torch.device, length: int) -> Tensor:
        """Return the frequencies of all layers and of local ones, for texts of at most `length` tokens."""
        # [2, 2, rotary_dim / 2], of either negated and not, as `rotate` needs their angles.
        frequencies = torch.stack([rope_frequencies(self.config, length, local) for local in (False, True)]).to(device)
        return torch.stack((-frequencies, frequencies), dim=1)

    def set_rope_(self, device: str | torch.device = "cpu", length: int = 0) -> None:
        self.inv_freq: Tensor = nn.Buffer(self.rope(device, length), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Move or cast the model, as `to` does, but for the frequencies, which stay in fp32."""
        return super()._apply(lambda t: fn(t) if t is not self.inv_freq or t.is_meta else t.to(fn(t).device), recurse)

    def setup_caches(self, max_batch_size: int, max_seq_length: int, num_spare: int = 0) -> None:
        """Allocate empty KV caches, and taps, like the embedding; num_spare slots are for drafts, beyond any text."""
        self.max_seq_length = max_seq_length
        self.set_rope_(self.inv_freq.device, max_seq_length - num_spare)
        like = self.embed_tokens.weight
        taps_size = len(self.tap_layers) * self.config.hidden_size
        # What enters the tap_layers, by position as in the KV caches.
        self.taps = nn.Buffer(like.new_zeros(max_batch_size, max_seq_length + 1, taps_size), persistent=False)
        for attn in (block.self_attn for block in self.layers):
            attn.cache = KVCache(max_batch_size, attn.num_local_kv_heads, max_seq_length, self.config.head_dim, like)

    def arrange_rows_(self, order: list[int]) -> None:
        """Permute the rows of the KV caches and taps: row i gets what row order[i] held."""
        moved = [i for i, row in enumerate(order) if i != row]
        for values in (self.taps, *(values for name, values in self.named_buffers() if ".cache." in name)):
            values[moved] = values[[order[i] for i in moved]]

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding table; a quantized head never is."""
        return self.lm_head.weight is self.embed_tokens.weight

    def block_context(
        self, positions: Tensor, slots: Tensor, rope: Tensor, local: bool, window: int | None
    ) -> BlockContext:
        """Return what the layers of a kind need to know of positions [B, S]; rope: as `self.rope` returns it."""
        angles = positions.view(*positions.shape, 1, 1, 1) * rope[int(local)]  # [B, S, 1, 2, rotary_dim / 2]
        factor = scaling.attention_factor if (scaling := self.config.rope_scaling) and not local else 1.0
        mask = attention_mask(positions.unsqueeze(-1), slots, window)
        return BlockContext(scaled(angles.cos(), factor), scaled(angles.sin(), factor), positions, mask)

    def block_contexts(self, positions: Tensor, slots: Tensor | None = None) -> list[BlockContext]:
        """Return what each block needs to know of positions [B, S]; slots: as in `forward`."""
        # Positions are read on the host only where no GPU would wait for it.
        cache, on_host = self.layers[0].self_attn.cache, positions.is_cpu and not torch.compiler.is_compiling()
        if slots is None:  # without caches: of the new tokens
            slots = torch.arange(self.max_seq_length, device=positions.device) if cache else positions.unsqueeze(1)
        if cache and on_host and not 0 <= min(at := positions.flatten().tolist()) <= max(at) < len(slots):
            raise ValueError(f"positions {min(at)} to {max(at)} are not in the caches' {len(slots)} slots; set up more")
        rope = self.inv_freq if cache else self.rope(positions.device, positions.shape[1])
        kinds = [(self.config.is_local(layer), self.config.window(layer)) for layer in range(len(self.layers))]
        contexts = {kind: self.block_context(positions, slots, rope, *kind) for kind in dict.fromkeys(kinds)}
        return [contexts[kind] for kind in kinds]

    def scale_embedding(self, x: Tensor) -> Tensor:
        """Multiply by the embedding's multiplier, which is rounded to the dtype of x first."""
        multiplier = self.config.embedding_multiplier
        return x if multiplier == 1 else x * torch.full((), multiplier, dtype=x.dtype, device=x.device)

    def hidden_states(self, tokens: Tensor, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """Run all layers but the last norm and the head; arguments as in `forward`. Returns [B, S, E], for `logits`."""
        positions = positions.expand(tokens.shape)
        x = self.scale_embedding(self.embed_tokens(tokens))
        x, *taps = self.run_blocks(self.layers, self.block_contexts(positions, slots), x, self.tap_layers)
        if taps:
            self.taps[torch.arange(len(x), device=x.device).unsqueeze(-1), positions] = torch.cat(taps, dim=-1)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.ranks.all_gather(self.lm_head(self.norm(hidden)))[..., : self.config.vocab_size]
        return scaled(logits, 1 / self.config.logits_scaling)

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """Compute the logits of every new token.

        tokens [B, S]: ids. positions [S] or [B, S]: of the tokens, from 0 on, with caches below max_seq_length.
        slots: arange(T), the cache slots to attend to, with T above every position; by default the whole cache. A
        step's cost grows with T. Returns [B, S, V] in the model's dtype.
        """
        return self.logits(self.hidden_states(tokens, positions, slots))
