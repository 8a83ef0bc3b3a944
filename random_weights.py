"""Models with random weights: for speed work, and for tests."""

from typing import Any

import torch
from torch import Tensor

from checkpoint import load_parameters_, meta_model, tensor_specs
from files import Spec
from kernels.cpu import empty_weight
from kernels.optimize import optimize_
from model import ONE_RANK, Ranks, Transformer


def random_model(
    raw_config: dict[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    ranks: Ranks = ONE_RANK,
    optimize: bool = True,
) -> Transformer:
    """Make the model that config.json describes, quantized or not, with random weights: for speed work.

    Each of several ranks draws its own share: together these are another model than one rank alone would draw.
    """
    model = meta_model(raw_config, ranks)
    generator = torch.Generator(device).manual_seed(seed + ranks.rank)
    specs = tensor_specs(model, dtype)
    parameters = {name: random_parameter(name, spec, generator, device) for name, spec in specs.items()}
    load_parameters_(model, parameters, device)
    del parameters  # so that a weight is freed as soon as it is repacked
    if optimize:
        optimize_(model)
    return model


def random_parameter(name: str, spec: Spec, generator: torch.Generator, device: str | torch.device) -> Tensor:
    dtype, shape = spec
    value = empty_weight(shape, dtype, device)
    if dtype in (torch.int8, torch.uint8):
        info = torch.iinfo(dtype)
        return value.random_(info.min, 16 if name.endswith(".zeros") else info.max + 1, generator=generator)
    if name.endswith("norm.weight"):
        return value.fill_(1)
    if name.endswith(".scales"):
        return value.fill_(0.001)
    return value.normal_(0, 0.02, generator=generator)
