"""An EAGLE-3 head: a layer or a few that draft from what the target has computed (arXiv:2503.01840).

At each token it reads the token's embedding and features of the one before: those of the target, which are its taps
through `fc`, or, where the token is a draft and the target has not run, the head's own last hidden states.

Its keys and values, and its rotary embeddings, are numbered by the token before, which is where the features are from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import ONE_RANK, Block, Linear, ModelConfig, RMSNorm, Transformer


@dataclass(frozen=True)
class HeadConfig:
    """The arithmetic of a head."""

    layers: ModelConfig  # those of the head; vocab_size is the target's
    draft_vocab_size: int  # how many ids of the target it knows
    target_hidden_size: int
    tap_layers: tuple[int, ...]  # of the target, counted from 0: what enters them
    norm_before_residual: bool  # the residual is the features behind their norm
    norm_before_fc: bool = False  # all taps together
    fc_norm: bool = False  # each tap by itself
    norm_output: bool = False  # the features of the next draft are behind the last norm


class FirstBlock(Block):
    """A block that reads embedding and features side by side, x [B, S, 2 E], and returns [B, S, E]."""

    def __init__(self, config: ModelConfig, norm_before_residual: bool):
        super().__init__(config, ONE_RANK)
        qkv_size, size = self.self_attn.qkv_proj.weight.shape
        self.self_attn.qkv_proj = Linear(2 * size, qkv_size, config.attention_bias)
        self.hidden_norm = RMSNorm(size, config.rms_norm_eps)
        self.norm_before_residual = norm_before_residual

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        embedding, features = x.chunk(2, dim=-1)
        normed = self.hidden_norm(features)
        y = torch.cat((self.input_layernorm(embedding), normed), dim=-1)
        x = normed if self.norm_before_residual else features
        x = x + self.self_attn(y, cos, sin, positions, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(Transformer):
    """Drafts for a target, of which it reads `target_taps`; each of several ranks has the whole of it."""

    def __init__(self, config: HeadConfig):
        super().__init__(config.layers)
        self.head_config = config
        size, num_taps = config.layers.hidden_size, len(config.tap_layers)
        norm_options = config.target_hidden_size, config.layers.rms_norm_eps
        norm_before_fc = RMSNorm(num_taps * config.target_hidden_size, config.layers.rms_norm_eps)
        self.input_norm = norm_before_fc if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(RMSNorm(*norm_options) for _ in range(num_taps * config.fc_norm))
        self.fc = Linear(num_taps * config.target_hidden_size, size)
        self.layers[0] = FirstBlock(config.layers, config.norm_before_residual)
        self.lm_head = Linear(size, config.draft_vocab_size)
        # [draft_vocab_size], the target's ids that the head's logits are of.
        self.ids: Tensor = nn.Buffer(torch.arange(config.draft_vocab_size), persistent=False)
        self.target_taps: Tensor = nn.Buffer(torch.empty(0), persistent=False)

    def follow_(self, target: Transformer) -> None:
        """Read the taps that the target has caches for. Raises ValueError where they are not the head's."""
        if target.tap_layers != self.head_config.tap_layers or not hasattr(target, "taps"):
            raise ValueError(
                f"the target has taps at layers {target.tap_layers} and the head reads {self.head_config.tap_layers}; "
                "set its tap_layers, then its caches"
            )
        self.target_taps = target.taps

    def features(self, taps: Tensor) -> Tensor:
        """Turn the target's taps [B, S, len(tap_layers) * E] into features [B, S, E]."""
        if self.input_norm is not None:
            taps = self.input_norm(taps)
        if self.fc_norm:
            parts = taps.chunk(len(self.fc_norm), dim=-1)
            taps = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(taps)

    def hidden_states(
        self, tokens: Tensor, positions: Tensor, slots: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Run tokens [B, S] at positions [B, S], of which none is 0; slots: as in `Transformer.forward`.

        features [B, S, E]: of the tokens before, None for the target's. Returns [B, S, E], for `logits`, and as the
        features of the tokens after these.
        """
        before = positions.expand(tokens.shape) - 1
        if features is None:
            rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(-1)
            features = self.features(self.target_taps[rows, before])
        x = torch.cat((self.embed_tokens(tokens), features), dim=-1)
        [x] = self.run_blocks(self.layers, self.block_contexts(before, slots), x, ())
        return self.norm(x) if self.head_config.norm_output else x

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits of the `ids` that the head knows."""
        return self.lm_head(hidden if self.head_config.norm_output else self.norm(hidden))
