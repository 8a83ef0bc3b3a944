"""Weights rounded to nearest, by form."""

from torch import Tensor

from linears import Encoded, Form, quantize_weight


def quantize_int8(weight: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return codes [N, K] and scales [N, groups]; None: a group is a row."""
    return quantize_weight(weight, Form(8, group_size))[:2]


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool = False) -> Encoded:
    return quantize_weight(weight, Form(4, group_size, has_zeros=not symmetric))
