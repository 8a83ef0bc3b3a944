"""Measure what quantization costs: bytes, perplexity and KL divergence of every mode against the bf16 checkpoint.

    python -m bench.quality --name demo
    python -m bench.quality --checkpoint_path DIR --text_file stories.txt --name stories

GPTQ is calibrated on one part of the text and all modes are evaluated on another: the first half of --text_file and its
second; by default modules of the standard library that the demo was not trained on.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import quantize
from bench import results
from checkpoint import load_model
from cli.arguments import ArgumentParser, checkpoint_folder, number, read_text
from cli.errors import user_errors
from likelihood import kl_divergence, perplexity
from linears import Scheme, constant, quantize_linear
from model import Linear, Transformer
from scripts.train_demo import CALIBRATION_MODULES, HELD_OUT, library_text
from tokenizer import load_tokenizer

SCHEMES = [Scheme("int8"), *(Scheme(mode, size) for mode in ("int4", "int4-gptq") for size in (32, 64, 128))]


def read_texts(path: Path | None) -> tuple[str, str]:
    """Return the text to calibrate on and the text to evaluate on."""
    if path is None:
        rest = [name for name in HELD_OUT if name not in CALIBRATION_MODULES]
        return library_text(CALIBRATION_MODULES), library_text(rest)
    text = read_text("--text_file", path)
    return text[: len(text) // 2], text[len(text) // 2 :]


def replace_head(model: Transformer, plain: Transformer, scheme: Scheme | None) -> Transformer:
    """Give the quantized model another output head: the plain one, or one of this scheme."""
    head, weight = Linear(plain.config.hidden_size, plain.config.vocab_size), constant(plain.lm_head.weight)
    head.weight = weight
    model.lm_head = head if scheme is None else quantize_linear(head, scheme)  # type: ignore[assignment]
    if scheme is None and plain.tied:
        model.embed_tokens.weight = weight
    return model


def quantize_models(path: Path, plain: Transformer, calibration: str) -> Iterator[tuple[str, Transformer]]:
    """Quantize in every way and yield each model by name; then int4 with other output heads."""
    yield "bfloat16", plain
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "calibration.txt")
        file.write_text(calibration, encoding="utf-8")
        for scheme in SCHEMES:
            gptq = scheme.mode == "int4-gptq"
            for act_order in (False, True) if gptq else (False,):
                name = f"{scheme}{', act_order' * act_order}"
                output = Path(folder, name)
                args = ["--checkpoint_path", str(path), "--mode", scheme.mode, "--output_path", str(output)]
                args += ["--groupsize", str(scheme.group_size)] if scheme.group_size else []
                args += ["--calibration_file", str(file)] if gptq else []
                quantize.run(quantize.parse_args([*args, *["--act_order"] * act_order]))
                yield name, load_model(output, dtype=torch.bfloat16)
        for head in (None, Scheme("int4", 32)):
            model = load_model(Path(folder, "int4-gptq-g32"), dtype=torch.bfloat16)
            yield f"int4-gptq-g32, head {head or 'bfloat16'}", replace_head(model, plain, head)


def run(args: argparse.Namespace) -> None:
    path = results.new_path(args.output_dir, results.make_slug(results.name_hardware("cpu")), f"quality-{args.name}")
    calibration, text = read_texts(args.text_file)
    ids = load_tokenizer(args.checkpoint_path).encode(text)[: args.num_tokens]
    plain = load_model(args.checkpoint_path, dtype=torch.bfloat16)
    rows = []
    lines = ["| | MB | MB a step | perplexity | to bf16 | KL |", "|---|---|---|---|---|---|"]
    for name, model in tqdm(quantize_models(args.checkpoint_path, plain, calibration), total=13, disable=None):
        likelihood = perplexity(model, ids, batch_size=4)
        row = {"name": name, "weight_bytes": model.weight_bytes, "step_bytes": model.step_weight_bytes}
        row |= {"perplexity": likelihood.perplexity, "kl": kl_divergence(plain, model, ids, batch_size=4)}
        rows.append(row | {"tokens": likelihood.num_tokens})
        change = row["perplexity"] / rows[0]["perplexity"] - 1
        lines.append(
            f"| {name} | {row['weight_bytes'] / 1e6:.2f} | {row['step_bytes'] / 1e6:.2f} | {row['perplexity']:.3f} "
            f"| {change:+.2%} | {row['kl']:.4f} |"
        )
    header = results.make_header("quality", "cpu")
    results.write(path, {**header, "checkpoint": args.checkpoint_path.name, "rows": rows})
    print(*lines, sep="\n")
    print(f"wrote {path}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    demo = results.ROOT / "checkpoints/demo"
    parser.add_argument("--checkpoint_path", type=checkpoint_folder, default=demo, help="(checkpoints/demo)")
    parser.add_argument("--text_file", type=Path, help="default: held-out modules of the standard library")
    parser.add_argument("--num_tokens", type=number(int, 2), default=16384, help="to evaluate on, at most (16384)")
    parser.add_argument("--name", required=True, help="what the result file is called: quality-NAME")
    results.add_output_dir(parser)
    with user_errors():
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
