"""What is measured: a model of random weights in the shapes of a config.json, in each form of the weights."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import DTYPES, parse_dtype, parse_scheme
from files import read_json


@dataclass(frozen=True)
class Subject:
    name: str
    raw: dict[str, Any]  # the content of config.json
    dtype: torch.dtype
    forms: dict[str, dict[str, Any]]  # that content by the form of the weights, of which "" is the plain one

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def read_scheme(text: str) -> tuple[str, dict[str, Any]]:
    """Read a scheme of --quantize, such as int4-g32, into config.json's `quantization`."""
    mode, _, size = text.rpartition("-g") if re.search(r"-g\d+$", text) else (text, "", "")
    quantization = {"mode": mode, "groupsize": int(size) if size else None}
    try:
        return str(parse_scheme(quantization)), quantization
    except ValueError:
        message = f"{text!r} is not a scheme; expected such as int8, int4-g32, int4-g128"
        raise argparse.ArgumentTypeError(message) from None


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
    quantized = {name: raw | {"layout": "fused", "quantization": scheme} for name, scheme in args.quantize}
    dtype = DTYPES[args.dtype] if args.dtype else parse_dtype(raw) or torch.bfloat16
    return Subject(path.stem if path.stem != "config" else path.parent.name, raw, dtype, {"": raw, **quantized})
