"""A Llama-family Transformer with a static KV cache.

It knows nothing of files, sampling or process groups: `checkpoint.py` loads its weights, `generate.py` runs it, and
`tp.py` splits it over several ranks.

    model.setup_caches(max_batch_size=1, max_seq_length=256)
    logits = model(tokens, positions)

Shapes: B batch, S new tokens, T cache slots read, H query heads, K kv heads, G = H / K, D head_dim,
E hidden, F intermediate, V vocab, X experts, A active experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import (
    MAX_REDUCTION_ROWS,
    LinearLayer,
    Norm,
    expert_linear,
    in_one_loop,
    linear,
    num_copies,
    streamed_linear,
)


@dataclass(frozen=True)
class RopeScaling:
    """`linear` (position interpolation, arXiv:2306.15595) or `llama3` (Llama 3.1's frequency bands)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The arithmetic of a model, in the Hub's field names."""

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
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()  # layers to which sliding_window does not apply
    attention_bias: bool = False
    qkv_bias: bool = False  # on q, k and v only
    qk_norm: bool = False
    mlp_bias: bool = False
    num_local_experts: int = 0  # 0: a dense feed-forward
    num_experts_per_tok: int = 0
    tie_word_embeddings: bool = False

    def window(self, layer: int) -> int | None:
        """Return how many tokens a layer attends to, None where there is no limit."""
        return None if layer in self.full_attention_layers else self.sliding_window


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

    def add(self, residual: Tensor, layer: LinearLayer, x: Tensor) -> Tensor:
        """Return residual + layer(x), where each rank's layer gives one summand of layer(x)."""
        if self.count == 1:
            return layer(x, residual=residual)
        return residual + self.all_reduce(layer(x))


ONE_RANK = Ranks()


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Compute the angle by which each pair of channels rotates per position: [D / 2], fp32 (arXiv:2104.09864)."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    scaled = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return scaled
    # llama3: long wavelengths are stretched, short ones kept, those in between interpolated.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * scaled


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle; x [B, S, heads, D], cos and sin [B, S, 1, 2, D/2].

    The first half's angles are negated, which gives it -sin. The halves are swapped by a flip, which torch.compile
    turns into indexing; two results concatenated would be written twice.
    """
    halves = x.float().unflatten(-1, (2, -1))
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).type_as(x)


def visible(positions: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """Return which slots [T] a token at each of the positions [B, S, 1] attends to: [B, S, T]."""
    mask = slots <= positions
    return mask if window is None else mask & (slots > positions - window)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend from q [B, S, H, D] to k, v [B, K, T, D] where mask [B, S, T] is true; returns [B, S, H, D].

    A slot that no query attends to may hold anything, even NaN, which a weight of 0 would not cancel: it is zeroed.
    """
    B, S, H, D = q.shape
    seen = mask.any(dim=1)[:, None, :, None]
    mask = mask.unsqueeze(1)  # [B, 1, S, T]
    v = torch.where(seen, v, 0)
    if not torch.compiler.is_compiling() or S > MAX_REDUCTION_ROWS:
        k = torch.where(seen, k, 0)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2)
    # The G query heads that share a kv head become rows of one product, [B, K, G * S, D]: K and V are read once.
    q = q.view(B, S, k.shape[1], -1, D).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (q.float().unsqueeze(-2) * k.float().unsqueeze(-3)).sum(dim=-1) * D**-0.5
    scores = torch.where(mask.repeat(1, 1, H // k.shape[1], 1), scores, -torch.inf)  # [B, K, G * S, T]
    y = (scores.softmax(dim=-1).unsqueeze(-1) * v.float().unsqueeze(-3)).sum(dim=-2).type_as(v)
    return y.view(B, H, S, D).transpose(1, 2)


class Linear(LinearLayer):
    """A linear layer; with `num_experts` a stack of that many, of which each row of x takes one."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False, num_experts: int | None = None):
        super().__init__()
        stack = () if num_experts is None else (num_experts,)
        self.weight = nn.Parameter(torch.empty(*stack, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def multiply(self, x: Tensor, experts: Tensor | None) -> Tensor:
        if experts is None:
            return linear(x, self.weight, self.bias)
        return expert_linear(x, experts, lambda i: self.weight[i])

    def fused(self, x: Tensor, norm: Norm | None, gated: bool, residual: Tensor | None) -> Tensor | None:
        return streamed_linear(x, self.weight, self.bias, None, norm, gated, residual) if in_one_loop(x) else None


class Embedding(nn.Module):
    def __init__(self, num_embeddings: int, embedding_dim: int, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        self.weight = nn.Parameter(torch.empty(num_embeddings // ranks.count, embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.ranks.count == 1:
            return F.embedding(tokens, self.weight)
        num_local = self.weight.shape[0]
        local = tokens - self.ranks.rank * num_local
        mine = (local >= 0) & (local < num_local)
        x = F.embedding(torch.where(mine, local, 0), self.weight)
        return self.ranks.all_reduce(torch.where(mine.unsqueeze(-1), x, 0))


class RMSNorm(nn.Module):
    weight: Tensor

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


class KVCache(nn.Module):
    """The keys and values of one layer, in slots numbered by position: [B, K, length, D] each.

    One more slot is allocated, which is never used. Without it the slice of all slots would be contiguous and shorter
    ones not, and torch.compile would compile the two cases separately.
    """

    k: Tensor
    v: Tensor

    def __init__(self, batch_size: int, num_heads: int, length: int, head_dim: int, like: Tensor):
        super().__init__()
        shape = (batch_size, num_heads, length + 1, head_dim)
        self.register_buffer("k", torch.zeros(shape, dtype=like.dtype, device=like.device), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=like.dtype, device=like.device), persistent=False)

    def update_(self, at: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, S, K, D] in slots `at`; return the first `length` slots: [B, K, T, D] each.

        at [B, S, copies]: each token's slot, repeated as often as `num_copies` says.
        """
        B = k.shape[0]
        rows = torch.arange(B, device=k.device).view(-1, 1, 1)
        # Written to the cache itself: for a write through a view of it, torch 2.11 copies all slots.
        self.k[rows, :, at] = k.unsqueeze(2)
        self.v[rows, :, at] = v.unsqueeze(2)
        return self.k[:B, :, :length], self.v[:B, :, :length]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        self.num_local_heads = config.num_attention_heads // ranks.count
        self.num_local_kv_heads = max(1, config.num_key_value_heads // ranks.count)
        self.head_dim = config.head_dim
        q_size, kv_size = self.num_local_heads * self.head_dim, self.num_local_kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, q_size + 2 * kv_size, config.attention_bias or config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = attention  # or the device's kernel
        self.cache: KVCache | None = None

    def forward(self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        """Return x + attention(norm(x)): [B, S, E]."""
        B, S, _ = x.shape
        heads = self.qkv_proj(x, norm=norm).view(B, S, -1, self.head_dim)
        q, k, v = heads.split([self.num_local_heads, self.num_local_kv_heads, self.num_local_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.cache is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            k, v = self.cache.update_(at, k, v, mask.shape[-1])
        return self.ranks.add(x, self.o_proj, self.attend(q, k, v, mask).reshape(B, S, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        local_size = config.intermediate_size // ranks.count
        self.gate_up_proj = Linear(config.hidden_size, 2 * local_size, config.mlp_bias)
        self.down_proj = Linear(local_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Return x + mlp(norm(x)): [B, S, E]."""
        return self.ranks.add(x, self.down_proj, self.gate_up_proj(x, norm=norm, gated=True))


class Router(nn.Module):
    """Chooses A of the X experts for each token, and the weight of each."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_active = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, experts = linear(x, self.weight).topk(self.num_active)
        return scores.softmax(dim=-1, dtype=torch.float32), experts


class MoE(nn.Module):
    """A mixture of X feed-forwards, of which each token takes A (arXiv:2401.04088).

    Every rank holds a slice of each expert. All route alike, since all_reduce gives them the same x, to the bit.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        local_size = config.intermediate_size // ranks.count
        self.gate = Router(config)
        self.gate_up_proj = Linear(config.hidden_size, 2 * local_size, num_experts=config.num_local_experts)
        self.down_proj = Linear(local_size, config.hidden_size, num_experts=config.num_local_experts)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """As `MLP.forward`."""
        rows = norm(x).flatten(0, 1)
        shares, experts = self.gate(rows)  # [B * S, A]
        rows = self.gate_up_proj(rows.unsqueeze(1).expand(-1, experts.shape[1], -1), experts, gated=True)
        y = self.down_proj(rows, experts)  # [B * S, A, E]
        return x + self.ranks.all_reduce((y * shares.unsqueeze(-1)).sum(dim=1).type_as(x).view(x.shape))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, ranks)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, ranks) if config.num_local_experts else MLP(config, ranks)

    # Compiled once for all layers: compile time does not grow with the depth.
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Take and return the residual stream [B, S, E]; context: what `block_contexts` returns for the layer."""
        x = self.self_attn(x, self.input_layernorm, *context)
        return self.mlp(x, self.post_attention_layernorm)


class Transformer(nn.Module):
    """Token ids in, logits out. Without caches each call stands alone; with them it continues the text they hold.

    Each of several ranks makes its own, with the slices of the parameters that `tp.py` cuts for it.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig, ranks: Ranks = ONE_RANK):
        super().__init__()
        self.config, self.ranks = config, ranks
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ranks)
        blocks = nn.ModuleList(Block(config, ranks) for _ in range(config.num_hidden_layers))
        self.layers: Sequence[Block] = blocks  # type: ignore[assignment]  # a ModuleList's items are typed as Module
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size // ranks.count)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)
        self.max_seq_length = config.max_position_embeddings

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate empty KV caches, in the embedding's dtype and on its device."""
        self.max_seq_length = max_seq_length
        like = self.embed_tokens.weight
        for attn in (block.self_attn for block in self.layers):
            attn.cache = KVCache(max_batch_size, attn.num_local_kv_heads, max_seq_length, attn.head_dim, like)

    def arrange_rows_(self, order: list[int]) -> None:
        """Permute the rows of the KV caches: row i gets what row order[i] held."""
        rows = [i for i, row in enumerate(order) if i != row]
        for cache in (block.self_attn.cache for block in self.layers if rows):
            assert cache is not None
            for held in (cache.k, cache.v):
                held[rows] = held[[order[i] for i in rows]]

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding table; a quantized head never is."""
        return self.lm_head.weight is self.embed_tokens.weight

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights of this rank; a tied head counts once."""
        return sum(p.nbytes for p in self.parameters())

    @property
    def step_weight_bytes(self) -> int:
        """The bytes of weights that decoding a token reads.

        That is all of them but the experts that are not chosen and, unless it is the head too, the embedding table.
        """
        X, A = self.config.num_local_experts, self.config.num_experts_per_tok
        mlps = [block.mlp for block in self.layers if isinstance(block.mlp, MoE)]
        stacks = [p for mlp in mlps for stack in (mlp.gate_up_proj, mlp.down_proj) for p in stack.parameters()]
        idle = sum(p.nbytes // X * (X - A) for p in stacks)
        return self.weight_bytes - idle - (0 if self.tied else self.embed_tokens.weight.nbytes)

    def block_contexts(self, positions: Tensor, slots: Tensor | None = None) -> list[tuple[Tensor, ...]]:
        """Return for each block what it needs at positions [B, S]: cos, sin, the slots to write to, and the mask."""
        attn = self.layers[0].self_attn
        cached = attn.cache is not None
        # This reads the positions on the host, so only where no GPU would wait for it.
        if cached and positions.device.type == "cpu" and not torch.compiler.is_compiling():
            last = int(positions.max())
            if last >= self.max_seq_length:
                raise ValueError(
                    f"position {last} is outside the caches of {self.max_seq_length} slots; set up longer ones"
                )
        if slots is None:
            slots = torch.arange(self.max_seq_length if cached else positions.shape[1], device=positions.device)
        angles = positions[:, :, None, None, None] * torch.stack((-self.inv_freq, self.inv_freq))  # [B, S, 1, 2, D/2]
        cos, sin = angles.cos(), angles.sin()
        num_sharing = attn.num_local_heads // attn.num_local_kv_heads
        # Norms of heads stand between q, k and the rotation: there copies would cost a launch (results/NOTES.md).
        at = positions.unsqueeze(-1).expand(-1, -1, num_copies(positions, 1 if attn.q_norm else num_sharing))
        windows = [self.config.window(layer) for layer in range(len(self.layers))]
        masks = {window: visible(positions.unsqueeze(-1), slots, window) for window in dict.fromkeys(windows)}
        return [(cos, sin, at, masks[window]) for window in windows]

    def hidden_states(self, tokens: Tensor, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """Run all layers but the last norm and the head; arguments as in `forward`. Returns [B, S, E], for `logits`."""
        contexts = self.block_contexts(positions.expand(tokens.shape), slots)
        x = self.embed_tokens(tokens)
        for block, context in zip(self.layers, contexts, strict=True):
            x = block(x, *context)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        # The norm is not fused with the head: hidden may be a slice, which `made_once` cannot take.
        return self.ranks.all_gather(self.lm_head(self.norm(hidden)))

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """Compute the logits of every new token.

        tokens [B, S]: ids. positions [S] or [B, S]: of the tokens, below max_seq_length; 0 to S - 1 without caches.
        slots: arange(T), the cache slots to attend to, with T above every position; by default the whole cache. A
        step's cost grows with T. Returns [B, S, V] in the model's dtype.
        """
        return self.logits(self.hidden_states(tokens, positions, slots))
