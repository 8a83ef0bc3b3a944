"""What is measured: a model of random weights in the shapes of a config.json, in each form of the weights."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoint import meta_model, save_hub_checkpoint
from compressed import quantization_config
from config import DTYPES, parse_dtype, quantization_form
from files import read_json
from linears import GROUP_SIZES, MODES, Form
from model import ONE_RANK, Ranks, Transformer
from random_weights import random_model

SIZES = (None, *GROUP_SIZES)
FORMS = {
    "int8": [Form(8, size) for size in SIZES],
    "int4": [Form(4, size, has_zeros) for has_zeros in (True, False) for size in SIZES],
}
# What quantize.py calls a folder -> the mode and the form.
SCHEMES = {str(form).replace(mode[:4], mode): (mode, form) for mode in MODES for form in FORMS[mode[:4]]}


@dataclass(frozen=True)
class Subject:
    name: str
    raw: dict[str, Any]  # the content of config.json
    dtype: torch.dtype
    forms: dict[str, Form | None]  # of the weights, by the scheme's name; "" is the config's own

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def config(self, weights: str) -> dict[str, Any]:
        """Return the content of config.json with the weights in one of the forms."""
        form = self.forms[weights]
        return self.raw | {"quantization_config": quantization_config(form)} if weights and form else self.raw

    def with_layers(self, count: int) -> "Subject":
        return replace(self, raw=self.raw | {"num_hidden_layers": count})

    def model(self, weights: str, device: str, **options: Any) -> Transformer:
        return random_model(self.config(weights), device, self.dtype, **options)


def quantize_options(form: Form, source: Path, output: Path, mode: str | None = None) -> list[str]:
    """Return the options with which quantize.py makes a folder of another."""
    paths = ["--checkpoint_path", str(source), "--output_path", str(output)]
    how = ["--mode", mode or f"int{form.bits}", "--groupsize", str(form.group_size or -1)]
    return [*paths, *how, *["--symmetric"] * (form.bits == 4 and not form.has_zeros)]


def write_random_folder(raw: dict[str, Any], path: Path, dtype: torch.dtype) -> None:
    """Make a folder of random weights in the Hub's layout."""
    path.mkdir()
    save_hub_checkpoint(random_model(raw, dtype=dtype, optimize=False), raw, path, dtype)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a config.json; the weights are random")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the config's own")
    parser.add_argument("--quantize", choices=SCHEMES, nargs="*", default=["int8", "int4-g32"], metavar="SCHEME",
                        help="forms of the weights besides --dtype (int8 int4-g32)")  # fmt: skip


def read_subject(args: argparse.Namespace, ranks: Ranks = ONE_RANK) -> Subject:
    """Read what the options name. Raises ValueError where these ranks cannot run it."""
    path = args.config
    if not path.is_file():
        raise ValueError(f"--config {path} is no file; expected a config.json")
    raw = read_json(path)
    forms = {"": quantization_form(raw), **{name: SCHEMES[name][1] for name in args.quantize}}
    dtype = DTYPES[args.dtype] if args.dtype else parse_dtype(raw) or torch.bfloat16
    subject = Subject(path.stem if path.stem != "config" else path.parent.name, raw, dtype, forms)
    for weights in forms:
        meta_model(subject.config(weights), ranks)
    return subject
