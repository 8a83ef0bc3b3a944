"""What is measured: a model of random weights in the shapes of a config.json, in each form of the weights."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressed import quantization_config
from config import DTYPES, parse_dtype
from files import read_json
from linears import GROUP_SIZES, MODES, Scheme


@dataclass(frozen=True)
class Subject:
    name: str
    raw: dict[str, Any]  # the content of config.json
    dtype: torch.dtype
    forms: dict[str, dict[str, Any]]  # that content by the form of the weights, of which "" is the plain one

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def read_scheme(text: str) -> Scheme:
    """Read a scheme of --quantize, such as int4-g32, as it is printed."""
    schemes = [
        Scheme(mode, size, symmetric) for mode in MODES for size in (None, *GROUP_SIZES) for symmetric in (False, True)
    ]
    if text not in (
        by_name := {str(scheme): scheme for scheme in schemes if scheme.mode != "int8" or not scheme.symmetric}
    ):
        message = f"{text!r} is not a scheme; expected such as int8, int8-g128, int4-g32, int4-g128-sym"
        raise argparse.ArgumentTypeError(message)
    return by_name[text]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a config.json; the weights are random")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the config's own")
    schemes = [read_scheme("int8"), read_scheme("int4-g32")]
    parser.add_argument("--quantize", type=read_scheme, nargs="*", default=schemes, metavar="SCHEME",
                        help="forms of the weights besides --dtype (int8 int4-g32)")  # fmt: skip


def read_subject(args: argparse.Namespace) -> Subject:
    """Read what the options name. Raises ValueError."""
    path = args.config
    if not path.is_file():
        raise ValueError(f"--config {path} is no file; expected a config.json")
    raw = read_json(path)
    forms = {str(scheme): raw | {"quantization_config": quantization_config(scheme)} for scheme in args.quantize}
    dtype = DTYPES[args.dtype] if args.dtype else parse_dtype(raw) or torch.bfloat16
    return Subject(path.stem if path.stem != "config" else path.parent.name, raw, dtype, {"": raw, **forms})
