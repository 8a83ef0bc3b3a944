"""GPTQ: codes chosen to keep a layer's products on a calibration text (arXiv:2210.17323).

`quantize.py --mode int4-gptq` is the command, or int8-gptq. It walks the model block by block: in memory are one block,
the Hessians of its linears (the sums of x x^T over their inputs x, of length 1), and the hidden states of the
calibration text.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linears import Encode, Encoded, Form, encode, group_parameters, quantizable_linears
from model import Block, Transformer

# Columns that are rounded before the rest of the matrix is updated (section 3.3, step 2).
BLOCK_SIZE = 128
# What is added to the Hessian's diagonal, as a share of its mean (section 3.3, step 3).
DAMPING = 0.01


def gptq(weight: Tensor, form: Form, hessian: Tensor, act_order: bool = True) -> Encoded:
    """Return codes, scales and zeros in the form of `quantize_weight`, chosen to keep the products with given inputs.

    hessian [K, K]: the sum of x x^T over the calibration inputs x, of length 1, so that its trace is how many they are.
    Fewer than K say little about other inputs: the fewer, the more damping; without any it is rounding to nearest.
    Columns are rounded one by one, and those not yet rounded compensate for the error (algorithm 1). act_order: columns
    with the largest inputs first; their groups stay those of their places in the weight.
    """
    K, count = weight.shape[1], float(hessian.trace())
    group_size = form.group_size or K
    damping = DAMPING if count >= K else K / max(1, count)
    scales, zeros = group_parameters(weight, form)
    order = torch.arange(K, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    columns = weight.float().t()[order]  # [K, N]: each column of the weight lies whole in memory
    codes = torch.empty_like(columns, dtype=zeros.dtype)
    places = order.tolist()
    for begin in range(0, K, BLOCK_SIZE):
        end = min(begin + BLOCK_SIZE, K)
        errors = torch.empty_like(columns[begin:end])
        for i in range(begin, end):
            group = places[i] // group_size
            if not act_order and i % group_size == 0:  # by now the group compensates for the errors before it
                span = group_parameters(columns[i : i + group_size].t(), form)
                scales[:, group], zeros[:, group] = (values[:, 0] for values in span)
            scale, zero = scales[:, group].float(), zeros[:, group].float()
            codes[i] = encode(columns[i], scales[:, group], zeros[:, group])
            error = (columns[i] - (codes[i].float() - zero) * scale) / factor[i, i]
            columns[i + 1 : end] -= factor[i, i + 1 : end, None] * error
            errors[i - begin] = error
        columns[end:] -= factor[begin:end, end:].t() @ errors
    return codes[order.argsort()].t(), scales, zeros


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U = H^-1, after `damping` times the mean of H's diagonal is added to it.

    Inputs that are few or linearly dependent leave H singular: more is added until it can be inverted.
    """
    mean = hessian.diagonal().mean().clamp(min=1e-6)
    if not mean.isfinite():
        raise ValueError(
            "the calibration text gives activations that are not finite: they overflow its dtype; convert "
            "the checkpoint by scripts/convert_hf_checkpoint.py --dtype bfloat16"
        )
    while True:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
        damping *= 10


def gptq_stack(stack: Tensor, form: Form, hessian: Tensor, act_order: bool = True) -> Encoded:
    """Choose codes, scales and zeros for the experts of a stack [X, N, K], each by its own hessian of [X, K, K]."""
    encoded = [gptq(weight, form, own, act_order) for weight, own in zip(stack, hessian, strict=True)]
    codes, scales, zeros = (torch.stack(values) for values in zip(*encoded, strict=True))
    return codes, scales, zeros


class Calibration:
    """The hidden states of a calibration text, on their way through a model block by block."""

    def __init__(
        self,
        model: Transformer,
        table: Tensor,
        windows: Tensor,
        form: Form,
        act_order: bool = True,
        tick: Callable[[], Any] = lambda: None,
    ):
        """model: on the meta device. table: its embedding [V, E]. windows [num, S]: token ids. form: of the codes.

        `tick` is called whenever a window has passed through a block, which each does twice.
        """
        self.form, self.act_order, self.tick = form, act_order, tick
        self.scarce: dict[tuple[int, int], int] = {}  # (layer, expert) -> its tokens, where they were few
        x = model.scale_embedding(F.embedding(windows.to(table.device), table))
        self.hidden = list(x.split(1))  # [1, S, E] each
        positions = torch.arange(windows.shape[1], device=table.device)
        self.contexts = [*model.block_contexts(positions.unsqueeze(0)), ()]  # the last is the output head's
        self.layer = 0

    def encoders(self, block: nn.Module) -> dict[str, Encode]:
        """Run the text through `block` as it is; return, by name of its linears, the functions that choose codes.

        block: after all blocks of the model, its norm and output head.
        """
        children = quantizable_linears(block)
        weights = [(name, child.weight) for name, child in children.items()]
        # Of x x^T of a layer's inputs: [K, K], for a stack [X, K, K].
        sums = {name: w.new_zeros(*w.shape[:-2], w.shape[-1], w.shape[-1], dtype=torch.float32) for name, w in weights}
        counts = {name: [0] * len(total) for name, total in sums.items() if total.ndim == 3}

        def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Each token counts alike: a few with huge activations, as the first of a text, would outweigh all others.
            x, *experts = inputs
            x = F.normalize(x.flatten(0, 1).float(), dim=-1)
            if not experts:
                sums[name].addmm_(x.t(), x)
                return
            for i, total in enumerate(sums[name]):
                rows = x[experts[0].flatten() == i]
                total.addmm_(rows.t(), rows)
                counts[name][i] += len(rows)

        hooks = [child.register_forward_pre_hook(partial(add, name)) for name, child in children.items()]
        for x in self.hidden:
            block(x, *self.contexts[self.layer])
            self.tick()
        for hook in hooks:
            hook.remove()
        for name, tokens in counts.items():
            few = {(self.layer, i): count for i, count in enumerate(tokens) if count < sums[name].shape[-1]}
            self.scarce.update(few)
        choose = partial(partial, form=self.form, act_order=self.act_order)
        return {name: choose(gptq_stack if name in counts else gptq, hessian=total) for name, total in sums.items()}

    def advance(self, block: Block) -> None:
        """Run the text through `block`, which is quantized by now: the next block gets its outputs."""
        for n, x in enumerate(self.hidden):
            self.hidden[n] = block(x, *self.contexts[self.layer])
            self.tick()
        self.layer += 1

    def warning(self) -> str | None:
        """Say which experts saw too few tokens of the text, if any."""
        if not self.scarce:
            return None
        (layer, expert), count = min(self.scarce.items(), key=lambda item: item[1])
        return (
            f"{len(self.scarce)} experts saw fewer calibration tokens than they have inputs, expert {expert} of layer "
            f"{layer} the fewest: {count}; the fewer, the nearer to rounding to nearest; a longer text does better"
        )
