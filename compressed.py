"""Quantized linears as compressed-tensors, which other programs read too; `formats.py` reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from files import Spec
from formats import view_rows_as
from linears import Form, StoredLinear, pack_nibbles
from model import Transformer
from names import hub_parts


def quantization_config(form: Form) -> dict[str, Any]:
    """Return what config.json says of the linears of blocks and of the head, both in compressed-tensors."""
    return grouped_config([(form, [r"re:.*\.layers\..*(_proj|_linear|\.w[123])$"]), (form.head, ["re:.*lm_head$"])])


def grouped_config(groups: Sequence[tuple[Form, list[str]]]) -> dict[str, Any]:
    """Return what config.json says of modules, by the forms of groups of them: names, or patterns after `re:`."""

    def group(form: Form, targets: list[str]) -> dict[str, Any]:
        weights = {"num_bits": form.bits, "type": "int", "symmetric": not form.has_zeros,
                   "strategy": "group" if form.group_size else "channel", "group_size": form.group_size,
                   "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax"}  # fmt: skip
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
                "format": "pack-quantized"}  # fmt: skip

    by_name = {f"group_{i}": group(*formed) for i, formed in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": by_name,
            "quantization_status": "compressed", "ignore": [], "kv_cache_scheme": None,
            "global_compression_ratio": None}  # fmt: skip


def pack_tensors(stored: StoredLinear, base: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, by name, of a linear of a form, with these parameters: the inverse of `read_pack_quantized`.

    They may be on the meta device, which says their dtypes and shapes.
    """
    weight, zeros = parameters["weight"], parameters.get("zeros")
    as_bytes = weight if stored.form.bits == 4 else weight.view(torch.uint8) ^ 128
    words = view_rows_as(F.pad(as_bytes, (0, -as_bytes.shape[-1] % 4)), torch.int32)
    tensors = {f"{base}.weight_packed": words, f"{base}.weight_scale": parameters["scales"]}
    if zeros is not None:
        columns = F.pad(zeros.t(), (0, -zeros.shape[0] % 8))
        tensors[f"{base}.weight_zero_point"] = view_rows_as(pack_nibbles(columns), torch.int32).t().contiguous()
    return tensors | {f"{base}.weight_shape": torch.tensor([len(weight), stored.in_features], device=weight.device)}


def hub_tensors(model: Transformer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn parameters of a model into the Hub's tensors, those of quantized linears into compressed-tensors.

    All of a module's parameters are there, or none of them. They may be on the meta device.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in parameters.items():
        module, _, suffix = name.rpartition(".")
        stored = model.get_submodule(module)
        if not isinstance(stored, StoredLinear) or suffix == "bias":
            tensors |= hub_parts(name, value, model.config)
        elif suffix == "weight":
            suffixes = [suffix for suffix, _ in stored.named_parameters() if suffix != "bias"]
            parts = {key: hub_parts(name, parameters[f"{module}.{key}"], model.config) for key in suffixes}
            packed = [
                pack_tensors(stored, hub.removesuffix(".weight"), {key: parts[key][hub] for key in suffixes})
                for hub in parts["weight"]
            ]
            # Suffix by suffix, so that what is stacked when it is read lies together.
            tensors |= [item for items in zip(*(part.items() for part in packed), strict=True) for item in items]
    return tensors


def hub_specs(model: Transformer, specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return what `hub_tensors` makes of parameters with these specs, in the order in which it is written."""
    parameters = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in specs.items()}
    return {name: (tensor.dtype, tensor.shape) for name, tensor in hub_tensors(model, parameters).items()}
