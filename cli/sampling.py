"""Which sampling a run uses: what the user gives, else the checkpoint's generation_config.json, else `Sampling()`."""

import math
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli.arguments import number
from cli.errors import one_line
from files import own_file, read_json
from steps import Sampling

FILE = "generation_config.json"
DEFAULTS = Sampling()
# The range of each, in the file and on the command line.
LIMITS = {
    "temperature": number(float, 0),
    "top_k": number(int, 0),
    "top_p": number(float, 0, 1, above=True),
    "min_p": number(float, 0, 1),
}
EMPTY: tuple[Any, ...] = ([], {}, "")
# What the file may ask for and no step does, with the number that asks for nothing, None where there is none. Null,
# false and an empty list ask for nothing either.
UNSUPPORTED: dict[str, int | None] = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0, "num_return_sequences": 1,
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "typical_p": 1, "top_h": None, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "penalty_alpha": 0, "dola_layers": None, "guidance_scale": 1, "min_length": 0, "min_new_tokens": 0,
    "max_time": None, "stop_strings": None, "bad_words_ids": None, "force_words_ids": None, "constraints": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "sequence_bias": None, "exponential_decay_length_penalty": None, "watermarking_config": None,
    "token_healing": None, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip


def read_generation_config(checkpoint_path: Path) -> dict[str, Any]:
    """Return what the file says, {} where there is none."""
    path = own_file(checkpoint_path, FILE)
    raw = read_json(path) if path.is_file() else {}
    return {name: value for name, value in raw.items() if value is not None}  # null is as good as silence


def choose_sampling(checkpoint_path: Path, given: Mapping[str, Any]) -> Sampling:
    """Choose each option: the one given unless that is None, else the checkpoint's, else that of `Sampling()`.

    As in `transformers`, a file with any of them samples only if it says `do_sample: true`; else it means argmax,
    whatever temperature it has. Raises ValueError where the file has a value out of range and none is given.
    """
    raw, values = read_generation_config(checkpoint_path), asdict(DEFAULTS)
    if not read_do_sample(raw, default=not LIMITS.keys() & raw.keys()):
        raw["temperature"] = 0
    for name, limit in LIMITS.items():
        if given[name] is not None:
            values[name] = given[name]
        elif name in raw and values["temperature"]:  # which is the first; argmax needs no other
            values[name] = read_value(raw, name, limit)
    return Sampling(**values)


def read_do_sample(raw: dict[str, Any], default: bool) -> bool:
    do_sample = raw.get("do_sample", default)
    if not isinstance(do_sample, bool):
        raise ValueError(f"{FILE}: do_sample is {do_sample!r}, expected true or false")
    return do_sample


def read_value(raw: dict[str, Any], name: str, limit: Any) -> Any:
    value = raw[name]
    # JSON has larger numbers than a float; json.loads has NaN and Infinity too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < 2**100:
        raise ValueError(f"{FILE}: {name} is {value!r}, expected a number; or give --{name}")
    try:
        return limit(str(value))
    except ArgumentTypeError as error:
        raise ValueError(f"{FILE}: {name}: {error}; or give --{name}") from None


def unsupported_options(checkpoint_path: Path) -> str:
    """Say what the checkpoint's file asks for and no step does, with the values; "" where it asks for nothing such."""
    raw = read_generation_config(checkpoint_path)
    asked = {name: raw[name] for name, neutral in UNSUPPORTED.items() if name in raw and raw[name] != neutral}
    asked = {name: value for name, value in asked.items() if value is not False and value not in EMPTY}
    options = ", ".join(f"{name} {value!r}" for name, value in asked.items())
    return options and one_line(f"{FILE} asks for {options}: not supported, left out")
