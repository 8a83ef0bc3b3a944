"""Evaluate a model: perplexity and bits per byte of a text, and the tasks of lm-evaluation-harness.

    python eval.py --text_file checkpoints/demo/README.md
    python eval.py --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B --tasks hellaswag gsm8k --batch_size 8

The arithmetic is in likelihood.py, the adapter for the harness in harness.py.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint import checkpoint_dtype, load_model, read_files
from cli.arguments import (
    ArgumentParser,
    add_checkpoint_options,
    check_device,
    check_stdout,
    check_writable,
    number,
    read_text,
)
from cli.errors import outlive_readers, user_errors
from cli.sampling import unsupported_options
from config import DTYPES, eos_token_ids, parse_config, read_config
from engine import check_ids
from files import write_whole
from harness import harness_model, load_tasks
from likelihood import MAX_WINDOW, check_window, default_window, perplexity, sliding_windows
from model import Transformer
from tokenizer import Tokenizer, load_tokenizer


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="eval.py", description="Evaluate a Llama-family model on a text and on tasks.")
    demo = Path(__file__).parent / "checkpoints/demo"
    add_checkpoint_options(parser, demo, "a folder from the Hub, or a converted one")
    what = parser.add_argument_group("what to evaluate")
    what.add_argument("--text_file", type=Path, metavar="FILE", help="UTF-8 text: its perplexity and bits per byte")
    what.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks or groups of lm-evaluation-harness")
    what.add_argument("--include_path", type=Path, metavar="DIR", help="a folder with the yaml of tasks of your own")
    what.add_argument("--num_fewshot", type=number(int, 0), metavar="N", help="examples in a prompt (the task's own)")
    what.add_argument("--limit", type=number(int, 1), metavar="N", help="only the first N examples of each task")
    run = parser.add_argument_group("how to run")
    run.add_argument("--max_seq_length", type=number(int, 2), metavar="N",
                     help=f"tokens in a window (the model's context; for a text at most {MAX_WINDOW})")  # fmt: skip
    run.add_argument("--batch_size", type=number(int, 1), default=1, metavar="N", help="windows, requests at once (1)")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    run.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    run.add_argument("--metrics_path", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(argv)
    args.tasks = [name for names in args.tasks for name in names.split(",") if name]  # the harness's own way too
    return args


@dataclass(frozen=True)
class Job:
    """A command line that has been checked: everything but the weights."""

    dtype: torch.dtype
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    ids: list[int]  # of the text, none where no text is asked for
    num_bytes: int  # of what is predicted of it
    text_window: int
    tasks: list[Any]
    task_window: int


def check(args: argparse.Namespace) -> Job:
    """Refuse what cannot work, before the weights load. Raises ValueError or FileNotFoundError."""
    if not args.text_file and not args.tasks:
        raise ValueError("there is nothing to evaluate; give --text_file, --tasks or both")
    for option in ("include_path", "num_fewshot", "limit"):
        if getattr(args, option) is not None and not args.tasks:
            raise ValueError(f"--{option} is for tasks; give --tasks too")
    if args.tasks:  # the harness's table has characters of its own
        check_stdout()
    raw = read_config(args.checkpoint_path)
    config = parse_config(raw)
    if args.max_seq_length:
        check_window(args.max_seq_length, config)
    check_device(args.device)
    if args.metrics_path:
        tasks = args.include_path.rglob("*") if args.include_path else ()  # a task may read any file beside it
        inputs = [*read_files(args.checkpoint_path), *filter(None, [args.text_file]), *tasks]
        check_writable("--metrics_path", args.metrics_path, inputs)
    if args.include_path and not args.include_path.is_dir():
        raise FileNotFoundError(f"--include_path {args.include_path} is not a folder; expected one with tasks' yaml")
    tokenizer = load_tokenizer(args.checkpoint_path)
    text = read_text("--text_file", args.text_file) if args.text_file else ""
    # A text is data: <s> in it is three characters, which have a cost, and no token, which would have no bytes.
    ids = tokenizer.encode(text, parse_special=False) if text else []
    if text:
        check_ids(ids, config.vocab_size, "--text_file")
        sliding_windows(ids[:2], 2, 1)  # refuses a text that is too short
    # Without a BOS the first token is not predicted, and its bytes do not count either: perhaps a part of a character.
    unpredicted = b"" if not ids or ids[0] == tokenizer.bos_id else tokenizer.token_bytes.get(ids[0], b"")
    unpredicted = unpredicted.removeprefix(b" ") if tokenizer.strips_leading_space else unpredicted
    task_window = args.max_seq_length or config.max_position_embeddings
    return Job(
        DTYPES[args.dtype] if args.dtype else checkpoint_dtype(args.checkpoint_path, raw),
        tokenizer,
        eos_token_ids(args.checkpoint_path, tokenizer.named_eos_id),
        ids,
        len(text.encode()) - len(unpredicted),
        args.max_seq_length or default_window(config),
        load_tasks(args.tasks, args.include_path, task_window) if args.tasks else [],
        task_window,
    )


def evaluate_text(model: Transformer, job: Job, batch_size: int) -> dict[str, float]:
    likelihood = perplexity(model, job.ids, job.text_window, batch_size=batch_size)
    return {
        "perplexity": likelihood.perplexity,
        "bits_per_byte": likelihood.bits_per_byte(job.num_bytes),
        "tokens": likelihood.num_tokens,
    }


def evaluate_tasks(model: Transformer, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Run the tasks; return the harness's results. Raises ValueError where it refuses them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        harness_model(model, job.tokenizer, job.eos_ids, job.task_window, args.batch_size),
        tasks=job.tasks,
        task_manager=TaskManager(include_defaults=False),  # they are loaded: it need not look for them again
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        log_samples=False,
    )


def print_tasks(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    for part in ("results", "groups"):
        if results.get(part):
            print(make_table(results, part).rstrip())


def run(args: argparse.Namespace) -> None:
    job = check(args)
    if args.tasks and (unsupported := unsupported_options(args.checkpoint_path)):
        print(unsupported, file=sys.stderr)
    if args.metrics_path:
        outlive_readers()
    model = load_model(args.checkpoint_path, args.device, job.dtype)
    metrics: dict[str, Any] = {}
    if job.ids:
        metrics |= evaluate_text(model, job, args.batch_size)
        print(f"perplexity {metrics['perplexity']:.4f}")
        print(f"bits per byte {metrics['bits_per_byte']:.4f}")
        print(f"tokens {metrics['tokens']}, in windows of {job.text_window} that overlap by half", flush=True)
    if job.tasks:
        results = evaluate_tasks(model, job, args)
        metrics["tasks"] = results["results"]
        print_tasks(results)
    if args.metrics_path:
        write_whole(args.metrics_path, json.dumps(metrics, indent=1, default=float) + "\n")  # some are numpy's


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
