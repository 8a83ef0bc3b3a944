"""What a model says of a text: perplexity, bits per byte, the KL divergence of two models, and loglikelihoods.

All of it rests on `log_probabilities`: windows of ids in, the log-probabilities of their last tokens out, in pieces of
bounded size.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model import ModelConfig, Transformer

# The longest window of a text unless the user says otherwise: attention's memory grows with its square.
MAX_WINDOW = 2048
# Of fp32 log-probabilities at a time: 64 MB, where 2,048 tokens of a vocabulary of 128,000 would take 1 GB.
PIECE_ELEMENTS = 2**24

# ---------------------------------------------------------------------------------------------------------------------
# Windows and what the model says of them


@dataclass(frozen=True)
class Window:
    """Ids of which the last `num_targets` are predicted, each from all those before it: at least one."""

    ids: Sequence[int]
    num_targets: int


def sliding_windows(ids: Sequence[int], max_seq_length: int, stride: int) -> list[Window]:
    """Cut ids into windows that begin `stride` apart and together predict each id but the first exactly once.

    After the first window a token sees at least max_seq_length - stride tokens before it. Raises ValueError where
    fewer than 2 ids, or windows that do not overlap, leave a token with nothing before it.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, and nothing to predict; at least 2 are needed, BOS included")
    if not 1 <= stride < max_seq_length:
        raise ValueError(f"a stride of {stride} does not fit windows of {max_seq_length} tokens; give 1 to one less")
    windows, predicted = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + max_seq_length, len(ids))
        windows.append(Window(ids[begin:end], end - predicted))
        predicted = end
        if end == len(ids):
            break
    return windows


@contextlib.contextmanager
def without_caches(model: Transformer) -> Iterator[None]:
    """Have each call of the model stand alone; the KV caches it has come back afterwards."""
    layers = [block.self_attn for block in model.layers]
    caches = [layer.cache for layer in layers]
    try:
        for layer in layers:
            layer.cache = None
        yield
    finally:
        for layer, cache in zip(layers, caches, strict=True):
            layer.cache = cache


@torch.inference_mode()
def log_probabilities(model: Transformer, batch: Sequence[Window]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities [N, V] in fp32 and targets [N], over the targets of all windows in order.

    One forward for the batch; N is what PIECE_ELEMENTS allows, and the same for every model of one vocabulary. Raises
    ValueError where the model's arithmetic overflows.
    """
    inputs = [list(window.ids[:-1]) for window in batch]
    spans = [(len(window.ids) - window.num_targets, len(window.ids)) for window in batch]
    length = max(map(len, inputs))
    # Rows are filled up at their right, behind all that is scored, where causal attention does not look.
    tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids in inputs], device=model.device)
    with without_caches(model):
        hidden = model.hidden_states(tokens, torch.arange(length, device=model.device))
    states = torch.cat([row[first - 1 : last - 1] for row, (first, last) in zip(hidden, spans, strict=True)])
    targets = [id for window, (first, last) in zip(batch, spans, strict=True) for id in window.ids[first:last]]
    size = max(1, PIECE_ELEMENTS // model.config.vocab_size)
    pieces = states.split(size), torch.tensor(targets, device=model.device).split(size)
    for piece, ids in zip(*pieces, strict=True):
        log_p = model.logits(piece).float().log_softmax(dim=-1)
        if log_p[:, 0].isnan().any():  # softmax spreads a NaN over its row
            raise ValueError(
                f"the model's logits are not finite in {piece.dtype}; its weights are damaged, or --dtype is too narrow"
            )
        yield log_p, ids


def in_batches(items: Sequence[Any], batch_size: int, what: str) -> Iterator[Sequence[Any]]:
    """Yield so many items at a time, under a progress bar."""
    with tqdm(total=len(items), desc=what, delay=2, leave=False, dynamic_ncols=True, disable=None) as bar:
        for i in range(0, len(items), batch_size):
            yield items[i : i + batch_size]
            bar.update(len(items[i : i + batch_size]))


def target_log_probabilities(log_p: Tensor, targets: Tensor) -> Tensor:
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity and KL divergence


@dataclass(frozen=True)
class TextLikelihood:
    nll: float  # of all predicted tokens together, in nats
    num_tokens: int  # predicted

    @property
    def perplexity(self) -> float:
        mean = self.nll / self.num_tokens
        return math.exp(mean) if mean < 709 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Return what one of the text's UTF-8 bytes costs: unlike perplexity, the same scale for every tokenizer."""
        return self.nll / math.log(2) / num_bytes


def text_windows(
    model: Transformer, ids: Sequence[int], max_seq_length: int | None, stride: int | None
) -> list[Window]:
    max_seq_length = max_seq_length or default_window(model.config)
    check_window(max_seq_length, model.config)
    return sliding_windows(ids, max_seq_length, stride or max_seq_length // 2)


def default_window(config: ModelConfig) -> int:
    return min(config.max_position_embeddings, MAX_WINDOW)


def check_window(max_seq_length: int, config: ModelConfig) -> None:
    context = config.max_position_embeddings
    if not 2 <= max_seq_length <= context:
        raise ValueError(
            f"--max_seq_length {max_seq_length} is out of range; expected 2 to the model's context of {context} tokens"
        )


def perplexity(
    model: Transformer,
    ids: Sequence[int],
    max_seq_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> TextLikelihood:
    """Compute how well the model predicts a text, each id but the first once.

    ids: of the whole text, with BOS at its beginning where the tokenizer has one: then every token of the text is
    predicted. Later windows begin in the middle of the text and get no BOS, as in the strided perplexity that
    transformers documents and in the harness's rolling loglikelihood; the figures compare with theirs.
    max_seq_length: ids in a window, the last of which is only a target; the model's context or MAX_WINDOW unless given.
    stride: half of it unless given, so that after the first window a token sees at least half a window.
    """
    windows = text_windows(model, ids, max_seq_length, stride)
    nll = 0.0
    for batch in in_batches(windows, batch_size, "perplexity"):
        for log_p, targets in log_probabilities(model, batch):
            nll -= float(target_log_probabilities(log_p, targets).double().sum())
    return TextLikelihood(nll, sum(window.num_targets for window in windows))


def kl_divergence(
    p: Transformer,
    q: Transformer,
    ids: Sequence[int],
    max_seq_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> float:
    """Compute KL(p‖q) in nats a token: what q, a quantized p for one, loses of p's distributions over a text.

    Over the same windows as `perplexity`. Raises ValueError where the vocabularies differ.
    """
    if p.config.vocab_size != q.config.vocab_size:
        raise ValueError(f"the models have {p.config.vocab_size} and {q.config.vocab_size} ids; they must be the same")
    windows = text_windows(p, ids, max_seq_length, stride)
    total = 0.0
    for batch in in_batches(windows, batch_size, "KL divergence"):
        for (log_p, _), (log_q, _) in zip(log_probabilities(p, batch), log_probabilities(q, batch), strict=True):
            total += float((log_p.exp() * (log_p - log_q.to(log_p.device))).sum(dim=-1).double().sum())
    return total / sum(window.num_targets for window in windows)


def loglikelihoods(model: Transformer, windows: Sequence[Window], batch_size: int) -> list[tuple[float, bool]]:
    """Return each window's log-probability of its targets, and whether all of them are the likeliest."""
    results = [(0.0, True)] * len(windows)
    longest_first = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))  # little is filled up
    for indices in in_batches(longest_first, batch_size, "loglikelihood"):
        batch = [windows[i] for i in indices]
        pieces = [
            (target_log_probabilities(x, ids), x.argmax(dim=-1) == ids) for x, ids in log_probabilities(model, batch)
        ]
        log_p, greedy = (torch.cat(parts).cpu() for parts in zip(*pieces, strict=True))
        sizes = [window.num_targets for window in batch]
        for i, row, hits in zip(indices, log_p.double().split(sizes), greedy.split(sizes), strict=True):
            results[i] = (float(row.sum()), bool(hits.all()))
    return results
