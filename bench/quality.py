"""Measure what each form of the weights costs: bytes, perplexity, and how far its distributions move.

    python -m bench.quality --name demo
    python -m bench.quality --checkpoint_path checkpoints/smollm2 --text_files stories.txt code.py --name smollm2

The texts are the files, by default held-out modules of the demo, and, where there is a chat template, conversations
that the model writes from another seed than what GPTQ is calibrated on. All is computed in fp32, so that the weights
alone make the difference. «noise» is the checkpoint again with noise of the size of bf16's rounding after each layer:
a form that is no farther cannot be told from it. --compare adds llama.cpp's forms of the same weights.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import quantize
from bench import llama_cpp, results
from bench.subject import SCHEMES, quantize_options
from calibration import NUM_WINDOWS, WINDOW, cut_windows, write_windows
from checkpoint import load_model, meta_model
from cli.arguments import checkpoint_folder, number, read_text
from cli.errors import user_errors
from cli.report import step_weight_bytes
from config import read_config
from likelihood import target_log_probabilities
from model import Transformer
from scripts.convert_hf_checkpoint import convert
from scripts.train_demo import CALIBRATION_MODULES, HELD_OUT, library_text
from tokenizer import load_tokenizer

INT4 = [f"{mode}-g{size}{sym}" for sym in ("", "-sym") for size in (32, 128) for mode in ("int4", "int4-gptq")]
NAMES = ["int8", "int8-g128", "int8-gptq-g128", *INT4]
CHAT_SEED = 1  # the calibration has 0
ROWS = 2  # windows at a time
COLUMNS = ("text", "form", "MB a step", "perplexity", "change", "mean KL", "median", "90th percentile", "same top")
# Standard errors are those of RESAMPLES texts drawn from stretches of so many tokens: neighbours are alike.
STRETCH, RESAMPLES = 64, 200

Logits = Callable[[Tensor], Tensor]  # of ids [B, S]: fp32 [B, S, V]
Measured = tuple[str, int, Logits]  # a form's name, the bytes that a step reads, and its logits

# ---------------------------------------------------------------------------------------------------------------------
# The forms


def plain_logits(model: Transformer) -> Logits:
    return lambda ids: model(ids, torch.arange(ids.shape[1]))


def step_bytes(path: Path) -> int:
    """Return the bytes of weights that a step reads, in bf16 what is not quantized."""
    return step_weight_bytes(load_model(path, dtype=torch.bfloat16, optimize=False))


def add_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each value by up to half the distance of its bf16 neighbours, at random."""
    _, exponents = torch.frexp(x)
    return x + torch.ldexp(torch.rand(x.shape, generator=generator) - 0.5, exponents - 8) * (x != 0)


def make_forms(path: Path, windows: Tensor, folder: Path, args: argparse.Namespace) -> Iterator[Measured]:
    """path: the checkpoint in fp32; windows: what GPTQ is calibrated on; folder: for what is written."""
    plain, size = load_model(path, dtype=torch.float32, optimize=False), step_bytes(path)
    yield "bfloat16", size, plain_logits(plain)
    generator = torch.Generator().manual_seed(0)
    hooks = [block.register_forward_hook(lambda _, args, x: add_noise(x, generator)) for block in plain.layers]
    yield "noise", size, plain_logits(plain)
    for hook in hooks:
        hook.remove()
    if args.compare:
        llama_cpp.write_gguf(plain, folder / "plain.gguf")
        for name in llama_cpp.FILE_TYPES:
            file = llama_cpp.quantize_gguf(folder / "plain.gguf", name)
            peer = llama_cpp.LlamaCpp(file, "cpu", WINDOW)
            yield f"llama.cpp {name}", llama_cpp.step_bytes(file), peer.all_logits
            peer.close()
    for name in args.forms:
        mode, form = SCHEMES[name]
        options = [*quantize_options(form, path, folder / name, mode), "--device", "cpu"]
        with contextlib.redirect_stdout(io.StringIO()):
            quantize.run(quantize.parse_args(options), windows if mode.endswith("-gptq") else None)
        model = load_model(folder / name, dtype=torch.float32, optimize=False)
        yield name, step_bytes(folder / name), plain_logits(model)


# ---------------------------------------------------------------------------------------------------------------------
# What is said of a form


def score(log_p: Tensor, log_q: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compare a form's log-probabilities [N, V] with the checkpoint's: values [N], one for each predicted token."""
    nll_p, nll_q = (-target_log_probabilities(log, targets) for log in (log_p, log_q))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    same = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).float()
    return {"nll": nll_q, "change": nll_q - nll_p, "kl": kl, "same_top": same}


def statistics(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum up values [..., N] of tokens: perplexity, its change, and KL divergence in nats."""
    kl = values["kl"]
    return {
        "perplexity": values["nll"].mean(dim=-1).exp(),
        "change": values["change"].mean(dim=-1).expm1(),
        "kl_mean": kl.mean(dim=-1),
        "kl_median": kl.median(dim=-1).values,
        "kl_90th_percentile": kl.quantile(0.9, dim=-1),
        "same_top": values["same_top"].mean(dim=-1),
    }


def summarize(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return each statistic of values [N] with its standard error."""
    stretches = {name: value[: len(value) // STRETCH * STRETCH].view(-1, STRETCH) for name, value in values.items()}
    num = len(stretches["kl"])
    drawn = torch.randint(num, (RESAMPLES, num), generator=torch.Generator().manual_seed(0))
    errors = statistics({name: value[drawn].flatten(1) for name, value in stretches.items()})
    return {name: [value.item(), errors[name].std().item()] for name, value in statistics(values).items()}


def describe(name: str, kind: str, row: dict[str, Any]) -> str:
    kl = [f"{row[f'kl_{part}'][0]:.5f} ± {row[f'kl_{part}'][1]:.5f}" for part in ("mean", "median", "90th_percentile")]
    change, same = (f"{row[key][0]:+.2%} ± {row[key][1]:.2%}" for key in ("change", "same_top"))
    cost = f"{row['step_bytes'] / 1e6:.2f}", f"{row['perplexity'][0]:.3f}"
    return results.format_row([kind, name, *cost, change, *kl, same.lstrip("+")])


# ---------------------------------------------------------------------------------------------------------------------
# The run


def read_texts(args: argparse.Namespace, path: Path, num: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what GPTQ is calibrated on and the texts by kind, as windows [num, length] of ids."""
    tokenizer, model = load_tokenizer(path), load_model(path, dtype=torch.float32)
    held_out = [name for name in HELD_OUT if name not in CALIBRATION_MODULES]
    files = {file.stem: read_text("--text_files", file) for file in args.text_files} or {"code": library_text(held_out)}
    vocab_size = model.config.vocab_size
    texts = {kind: cut_windows(text, tokenizer, num, length, vocab_size) for kind, text in files.items()}
    opening = quantize.chat_opening(path, tokenizer)
    total = args.calibration_samples + (2 * num if opening else 0)
    with tqdm(total=-(-total // 8) * length, desc="texts", dynamic_ncols=True, disable=None) as bar:
        write = partial(write_windows, model, tokenizer, length=length, chat_opening=opening, tick=bar.update)
        if opening:  # of two windows one is a chat
            texts["chat"] = write(2 * num, seed=CHAT_SEED)[::2]
        return write(args.calibration_samples), texts


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    report = results.begin("quality", args.output_dir, f"quality-{args.name}", device="cpu", rows=[])
    print(f"each row is written at once to {report.path}", file=sys.stderr)
    report.content["checkpoint"] = args.checkpoint_path.name
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "fp32"
        convert(args.checkpoint_path, source, "float32")
        config = meta_model(read_config(source)).config
        if args.compare and (obstacle := llama_cpp.find_obstacle("cpu", config)):
            raise ValueError(f"--compare: {obstacle}")
        length = min(WINDOW, config.max_position_embeddings)
        calibration, texts = read_texts(args, source, -(-args.num_tokens // length), length)
        shapes = {kind: list(ids.shape) for kind, ids in texts.items()}
        report.content |= {"calibration": list(calibration.shape), "texts": shapes}
        print(results.format_row(COLUMNS), "|---" * len(COLUMNS) + "|", sep="\n", flush=True)
        reference: dict[str, list[Tensor]] = {kind: [] for kind in texts}
        for name, size, logits in make_forms(source, calibration, folder, args):
            for kind, windows in texts.items():
                parts = []
                for i, ids in enumerate(tqdm(windows.split(ROWS), desc=f"{name}, {kind}", leave=False, disable=None)):
                    log_q = logits(ids)[:, :-1].float().log_softmax(dim=-1).flatten(0, 1)
                    if name == "bfloat16":
                        reference[kind].append(log_q)
                    parts.append(score(reference[kind][i], log_q, ids[:, 1:].flatten()))
                values = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                row = {"name": name, "text": kind, "tokens": len(values["kl"]), "step_bytes": size, **summarize(values)}
                report.content["rows"].append(row)
                report.write()
                print(describe(name, kind, row), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = results.make_parser(__doc__)
    demo = results.ROOT / "checkpoints/demo"
    parser.add_argument("--checkpoint_path", type=checkpoint_folder, default=demo, help="(checkpoints/demo)")
    parser.add_argument("--text_files", type=Path, nargs="+", default=[], metavar="FILE",
                        help="to evaluate on, each a kind named after it (held-out modules of the demo)")  # fmt: skip
    parser.add_argument("--forms", nargs="+", choices=SCHEMES, default=NAMES, metavar="F", help="quantize.py's names")
    parser.add_argument("--num_tokens", type=number(int, 2), default=4096, help="of each kind of text (4096)")
    parser.add_argument("--calibration_samples", type=number(int, 1), default=NUM_WINDOWS, help="windows for GPTQ (64)")
    parser.add_argument("--compare", action="store_true", help="add llama.cpp's Q8_0, Q4_0 and Q4_K_M")
    parser.add_argument("--name", required=True, help="what the result file is called: quality-NAME")
    with user_errors():
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
