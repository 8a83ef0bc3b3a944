"""Measure what quantization costs: bytes, perplexity and KL divergence of every mode against the bf16 checkpoint.

    python scripts/quality.py --name demo
    python scripts/quality.py --checkpoint_path DIR --text_file stories.txt --name stories

GPTQ is calibrated on one part of the text and all modes are evaluated on another: the first half of --text_file and its
second; by default modules of the standard library that the demo was not trained on.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import datetime
import itertools
import json
import math
import platform
import shlex
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from benchmark import hardware
from tqdm import tqdm
from train_demo import HELD_OUT

import quantize
from checkpoint import load_model
from cli import ArgumentParser, checkpoint_folder, number, read_text, user_errors, write_whole
from eval import log_probabilities, of_targets, text_windows
from gptq import CALIBRATION_MODULES, library_text
from model import Linear, Transformer
from quantize import Scheme, constant, quantize_linear
from tokenizer import load_tokenizer

SCHEMES = [
    Scheme("int8"),
    *(Scheme(mode, size) for mode in ("int4", "int4-gptq") for size in (32, 64, 128)),
]


def texts(path: Path | None) -> tuple[str, str]:
    """Return the text to calibrate on and the text to evaluate on."""
    if path is None:
        rest = [name for name in HELD_OUT if name not in CALIBRATION_MODULES]
        return library_text(CALIBRATION_MODULES), library_text(rest)
    text = read_text("--text_file", path)
    return text[: len(text) // 2], text[len(text) // 2 :]


def measure(plain: Transformer, model: Transformer, ids: list[int]) -> dict[str, Any]:
    """Return the model's bytes, its perplexity, and the KL divergence from `plain` to it, in nats a token."""
    windows = text_windows(plain, ids, None, None)
    nll = divergence = 0.0
    for batch in (windows[i : i + 4] for i in range(0, len(windows), 4)):
        pairs = zip(log_probabilities(plain, batch), log_probabilities(model, batch), strict=True)
        for (log_p, targets), (log_q, _) in pairs:
            nll -= float(of_targets(log_q, targets).double().sum())
            divergence += float((log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum())
    num_tokens = sum(window.num_targets for window in windows)
    return {
        "weight_bytes": model.weight_bytes,
        "step_bytes": model.step_weight_bytes,
        "perplexity": math.exp(nll / num_tokens),
        "kl": divergence / num_tokens,
        "tokens": num_tokens,
    }


def with_head(model: Transformer, plain: Transformer, scheme: Scheme | None) -> Transformer:
    """Give the quantized model another output head: the plain one, or one of this scheme."""
    head, weight = Linear(plain.config.hidden_size, plain.config.vocab_size), constant(plain.lm_head.weight)
    head.weight = weight
    model.lm_head = head if scheme is None else quantize_linear(head, scheme)  # type: ignore[assignment]
    if scheme is None and plain.tied:
        model.embed_tokens.weight = weight
    return model


def models(path: Path, calibration: str) -> Iterator[tuple[str, Transformer]]:
    """Quantize in every way and yield each model by name; then int4 with other output heads."""
    plain = load_model(path, dtype=torch.bfloat16)
    yield "bfloat16", plain
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "calibration.txt")
        file.write_text(calibration, encoding="utf-8")
        for scheme, act_order in itertools.product(SCHEMES, (False, True)):
            if act_order and scheme.mode != "int4-gptq":
                continue
            args = ["--checkpoint_path", str(path), "--mode", scheme.mode]
            args += ["--groupsize", str(scheme.group_size)] if scheme.group_size else []
            args += ["--calibration_file", str(file)] if scheme.mode == "int4-gptq" else []
            args += ["--act_order"] if act_order else []
            name = f"{scheme}{', act_order' * act_order}"
            output = Path(folder, name)
            quantize.run(quantize.parse_args([*args, "--output_path", str(output)]))
            yield name, load_model(output, dtype=torch.bfloat16)
        for head in (None, Scheme("int4", 32)):
            model = load_model(Path(folder, "int4-gptq-g32"), dtype=torch.bfloat16)
            yield f"int4-gptq-g32, head {head or 'bfloat16'}", with_head(model, plain, head)


def run(args: argparse.Namespace) -> None:
    if not args.output_dir.is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is not a folder that exists")
    calibration, text = texts(args.text_file)
    ids = load_tokenizer(args.checkpoint_path).encode(text)[: args.num_tokens]
    machine = hardware("cpu")
    report: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/quality.py", *sys.argv[1:]]),
        "checkpoint": args.checkpoint_path.name,
        "hardware": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [],
    }
    plain = load_model(args.checkpoint_path, dtype=torch.bfloat16)
    lines = ["| | MB | MB a step | perplexity | to bf16 | KL |", "|---|---|---|---|---|---|"]
    for name, model in tqdm(models(args.checkpoint_path, calibration), total=13, disable=None):
        row = {"name": name, **measure(plain, model, ids)}
        report["rows"].append(row)
        change = row["perplexity"] / report["rows"][0]["perplexity"] - 1
        lines.append(
            f"| {name} | {row['weight_bytes'] / 1e6:.2f} | {row['step_bytes'] / 1e6:.2f} | {row['perplexity']:.3f} "
            f"| {change:+.2%} | {row['kl']:.4f} |"
        )
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine.lower()).split())
    path = args.output_dir / f"{datetime.date.today()}_{slug}_quality-{args.name}.json"
    write_whole(path, json.dumps(report, indent=1) + "\n")
    print(*lines, sep="\n")
    print(f"wrote {path}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint_path", type=checkpoint_folder, default=ROOT / "checkpoints/demo", help="(checkpoints/demo)"
    )
    parser.add_argument("--text_file", type=Path, help="default: held-out modules of the standard library")
    parser.add_argument("--num_tokens", type=number(int, 2), default=16384, help="to evaluate on, at most (16384)")
    parser.add_argument("--name", required=True, help="what the result file is called: quality-NAME")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")
    with user_errors():
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
