"""What is measured: a model of random weights in the shapes of a config.json, in each form of the weights."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compressed import quantization_config
from config import DTYPES, parse_dtype
from files import read_json
from linears import GROUP_SIZES, MODES, Scheme

ASYMMETRIC = [Scheme(mode, size) for mode in MODES for size in (None, *GROUP_SIZES)]
SYMMETRIC = [replace(scheme, symmetric=True) for scheme in ASYMMETRIC if scheme.mode != "int8"]
SCHEMES = {str(scheme): scheme for scheme in ASYMMETRIC + SYMMETRIC}


@dataclass(frozen=True)
class Subject:
    name: str
    raw: dict[str, Any]  # the content of config.json
    dtype: torch.dtype
    forms: dict[str, dict[str, Any]]  # that content by the form of the weights, of which "" is the plain one

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def quantize_options(scheme: Scheme, source: Path, output: Path) -> list[str]:
    """Return the options with which quantize.py makes a folder of another."""
    paths = ["--checkpoint_path", str(source), "--output_path", str(output)]
    how = ["--mode", scheme.mode, "--groupsize", str(scheme.group_size or -1)]
    return [*paths, *how, *["--symmetric"] * scheme.symmetric]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a config.json; the weights are random")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the config's own")
    parser.add_argument("--quantize", choices=SCHEMES, nargs="*", default=["int8", "int4-g32"], metavar="SCHEME",
                        help="forms of the weights besides --dtype (int8 int4-g32)")  # fmt: skip


def read_subject(args: argparse.Namespace) -> Subject:
    """Read what the options name. Raises ValueError."""
    path = args.config
    if not path.is_file():
        raise ValueError(f"--config {path} is no file; expected a config.json")
    raw = read_json(path)
    forms = {name: raw | {"quantization_config": quantization_config(SCHEMES[name])} for name in args.quantize}
    dtype = DTYPES[args.dtype] if args.dtype else parse_dtype(raw) or torch.bfloat16
    return Subject(path.stem if path.stem != "config" else path.parent.name, raw, dtype, {"": raw, **forms})
