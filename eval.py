"""Evaluate a model: perplexity and bits per byte of a text, and the tasks of lm-evaluation-harness.

    python eval.py --text_file checkpoints/demo/README.md
    python eval.py --checkpoint_path checkpoints/meta-llama/Llama-3.2-1B --tasks hellaswag gsm8k --batch_size 8

All of it rests on `log_probabilities`: windows of ids in, the log-probabilities of their last tokens out, in pieces of
bounded size. Perplexity, the KL divergence of two models and the harness's loglikelihoods are sums over it.
"""

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import contextlib
import difflib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import DTYPES, eos_token_ids, load_model, parse_config, parse_dtype, read_config
from cli import ArgumentParser, check_device, checkpoint_folder, number, read_text, user_errors, write_whole
from generate import generate
from model import ModelConfig, Transformer
from report import Row
from steps import TINY, Sampling
from tokenizer import TextStream, Tokenizer, check_ids, load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM

# The longest window of a text unless the user says otherwise: attention's memory grows with its square.
MAX_WINDOW = 2048
# Of fp32 log-probabilities at a time: 64 MB, where 2,048 tokens of a vocabulary of 128,000 would take 1 GB.
PIECE_ELEMENTS = 2**24

# ---------------------------------------------------------------------------------------------------------------------
# Windows and what the model says of them


@dataclass(frozen=True)
class Window:
    """Ids of which the last `num_targets` are predicted, each from all those before it: at least one."""

    ids: Sequence[int]
    num_targets: int


def sliding_windows(ids: Sequence[int], max_seq_length: int, stride: int) -> list[Window]:
    """Cut ids into windows that begin `stride` apart and together predict each id but the first exactly once.

    After the first window a token sees at least max_seq_length - stride tokens before it. Raises ValueError where
    fewer than 2 ids, or windows that do not overlap, leave a token with nothing before it.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, and nothing to predict; at least 2 are needed, BOS included")
    if not 1 <= stride < max_seq_length:
        raise ValueError(f"a stride of {stride} does not fit windows of {max_seq_length} tokens; give 1 to one less")
    windows, predicted = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + max_seq_length, len(ids))
        windows.append(Window(ids[begin:end], end - predicted))
        predicted = end
        if end == len(ids):
            break
    return windows


@contextlib.contextmanager
def without_caches(model: Transformer) -> Iterator[None]:
    """Have each call of the model stand alone; the KV caches it has come back afterwards."""
    layers = [block.self_attn for block in model.layers]
    caches = [layer.cache for layer in layers]
    try:
        for layer in layers:
            layer.cache = None
        yield
    finally:
        for layer, cache in zip(layers, caches, strict=True):
            layer.cache = cache


@torch.inference_mode()
def log_probabilities(model: Transformer, batch: Sequence[Window]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities [N, V] in fp32 and targets [N], over the targets of all windows in order.

    One forward for the batch; N is what PIECE_ELEMENTS allows, and the same for every model of one vocabulary. Raises
    ValueError where the model's arithmetic overflows.
    """
    inputs = [list(window.ids[:-1]) for window in batch]
    spans = [(len(window.ids) - window.num_targets, len(window.ids)) for window in batch]
    length = max(map(len, inputs))
    # Rows are filled up at their right, behind all that is scored, where causal attention does not look.
    tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids in inputs], device=model.device)
    with without_caches(model):
        hidden = model.hidden_states(tokens, torch.arange(length, device=model.device))
    states = torch.cat([row[first - 1 : last - 1] for row, (first, last) in zip(hidden, spans, strict=True)])
    targets = [id for window, (first, last) in zip(batch, spans, strict=True) for id in window.ids[first:last]]
    size = max(1, PIECE_ELEMENTS // model.config.vocab_size)
    pieces = states.split(size), torch.tensor(targets, device=model.device).split(size)
    for piece, ids in zip(*pieces, strict=True):
        log_p = model.logits(piece).float().log_softmax(dim=-1)
        if log_p[:, 0].isnan().any():  # softmax spreads a NaN over its row
            raise ValueError(
                f"the model's logits are not finite in {piece.dtype}; its weights are damaged, or --dtype is too narrow"
            )
        yield log_p, ids


def in_batches(items: Sequence[Any], batch_size: int, what: str) -> Iterator[Sequence[Any]]:
    """Yield so many items at a time, under a progress bar."""
    with tqdm(total=len(items), desc=what, delay=2, leave=False, dynamic_ncols=True, disable=None) as bar:
        for i in range(0, len(items), batch_size):
            yield items[i : i + batch_size]
            bar.update(len(items[i : i + batch_size]))


def of_targets(log_p: Tensor, targets: Tensor) -> Tensor:
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity and KL divergence


@dataclass(frozen=True)
class TextLikelihood:
    nll: float  # of all predicted tokens together, in nats
    num_tokens: int  # predicted

    @property
    def perplexity(self) -> float:
        mean = self.nll / self.num_tokens
        return math.exp(mean) if mean < 709 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Return what one of the text's UTF-8 bytes costs: unlike perplexity, the same scale for every tokenizer."""
        return self.nll / math.log(2) / num_bytes


def text_windows(
    model: Transformer, ids: Sequence[int], max_seq_length: int | None, stride: int | None
) -> list[Window]:
    max_seq_length = max_seq_length or default_window(model.config)
    check_window(max_seq_length, model.config)
    return sliding_windows(ids, max_seq_length, stride or max_seq_length // 2)


def default_window(config: ModelConfig) -> int:
    return min(config.max_position_embeddings, MAX_WINDOW)


def check_window(max_seq_length: int, config: ModelConfig) -> None:
    context = config.max_position_embeddings
    if not 2 <= max_seq_length <= context:
        raise ValueError(
            f"--max_seq_length {max_seq_length} is out of range; expected 2 to the model's context of {context} tokens"
        )


def perplexity(
    model: Transformer,
    ids: Sequence[int],
    max_seq_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> TextLikelihood:
    """Compute how well the model predicts a text, each id but the first once.

    ids: of the whole text, with BOS at its beginning where the tokenizer has one: then every token of the text is
    predicted. Later windows begin in the middle of the text and get no BOS, as in the strided perplexity that
    transformers documents and in the harness's rolling loglikelihood; the figures compare with theirs.
    max_seq_length: ids in a window, the last of which is only a target; the model's context or MAX_WINDOW unless given.
    stride: half of it unless given, so that after the first window a token sees at least half a window.
    """
    windows = text_windows(model, ids, max_seq_length, stride)
    nll = 0.0
    for batch in in_batches(windows, batch_size, "perplexity"):
        for log_p, targets in log_probabilities(model, batch):
            nll -= float(of_targets(log_p, targets).double().sum())
    return TextLikelihood(nll, sum(window.num_targets for window in windows))


def kl_divergence(
    p: Transformer,
    q: Transformer,
    ids: Sequence[int],
    max_seq_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> float:
    """Compute KL(p‖q) in nats a token: what q, a quantized p for one, loses of p's distributions over a text.

    Over the same windows as `perplexity`. Raises ValueError where the vocabularies differ.
    """
    if p.config.vocab_size != q.config.vocab_size:
        raise ValueError(f"the models have {p.config.vocab_size} and {q.config.vocab_size} ids; they must be the same")
    windows = text_windows(p, ids, max_seq_length, stride)
    total = 0.0
    for batch in in_batches(windows, batch_size, "KL divergence"):
        for (log_p, _), (log_q, _) in zip(log_probabilities(p, batch), log_probabilities(q, batch), strict=True):
            total += float((log_p.exp() * (log_p - log_q.to(log_p.device))).sum(dim=-1).double().sum())
    return total / sum(window.num_targets for window in windows)


# ---------------------------------------------------------------------------------------------------------------------
# The harness's three kinds of request


def loglikelihoods(model: Transformer, windows: Sequence[Window], batch_size: int) -> list[tuple[float, bool]]:
    """Return each window's log-probability of its targets, and whether all of them are the likeliest."""
    results = [(0.0, True)] * len(windows)
    longest_first = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))  # little is filled up
    for indices in in_batches(longest_first, batch_size, "loglikelihood"):
        batch = [windows[i] for i in indices]
        pieces = [(of_targets(x, ids), x.argmax(dim=-1) == ids) for x, ids in log_probabilities(model, batch)]
        log_p, greedy = (torch.cat(parts).cpu() for parts in zip(*pieces, strict=True))
        sizes = [window.num_targets for window in batch]
        for i, row, hits in zip(indices, log_p.double().split(sizes), greedy.split(sizes), strict=True):
            results[i] = (float(row.sum()), bool(hits.all()))
    return results


@dataclass(frozen=True)
class Generation:
    """A task's generation_kwargs, read."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


def parse_generation(kwargs: Any, max_seq_length: int) -> Generation:
    """Read a task's generation_kwargs. Raises ValueError for one that is not supported, or leaves a prompt no room."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if not isinstance(kwargs, dict):
        raise ValueError(f"generation_kwargs is {kwargs!r}, expected names and values")
    given = {name: value for name, value in kwargs.items() if value is not None}  # null is as good as silence
    try:
        values = dict(normalize_gen_kwargs(given))  # its aliases and defaults are the same for every model
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"generation_kwargs: {given} has a value of another kind: {error}") from None
    until, do_sample = values.pop("until"), values.pop("do_sample")
    if not isinstance(do_sample, bool) or not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"generation_kwargs: do_sample {do_sample!r} and until {until!r}, expected a flag and texts")

    def number(name: str, default: float, low: float, high: float = math.inf) -> float:
        value = values.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"generation_kwargs: {name} is {value!r}, expected a number from {low:g} to {high:g}")
        return value

    max_new_tokens, top_k = int(number("max_gen_toks", 0, 1)), int(number("top_k", 0, 0, 2**31))
    temperature, top_p = number("temperature", 0, 0, 1e30), number("top_p", 1, TINY, 1)
    min_p = number("min_p", 0, 0, 1)
    if values.pop("num_beams", 1) != 1:
        raise ValueError(f"generation_kwargs: num_beams {kwargs['num_beams']} is not supported; 1 is")
    if values:
        raise ValueError(f"generation_kwargs: {values} is not supported; change the task's yaml, in --include_path")
    if do_sample and temperature == 0:
        raise ValueError("generation_kwargs: do_sample is true and temperature 0; give the one you mean")
    if max_new_tokens >= max_seq_length:
        raise ValueError(
            f"generation_kwargs: max_gen_toks {max_new_tokens} leaves the prompt no room in a context of "
            f"{max_seq_length} tokens; give a smaller one, or a larger --max_seq_length if the model has it"
        )
    sampling = Sampling(temperature, top_k, top_p, min_p) if do_sample else Sampling(0)
    return Generation(tuple(stop for stop in until if stop), max_new_tokens, sampling)


def generate_texts(
    model: Transformer, tokenizer: Tokenizer, eos_ids: tuple[int, ...], prompts: list[list[int]], how: Generation
) -> list[str]:
    """Continue each prompt, up to EOS or the first of its stop texts, which is left out.

    It is decoded as a text of its own, as the harness does: SentencePiece drops a space at its beginning.
    """
    rows = [Row(ids, TextStream(tokenizer), list(how.until)) for ids in prompts]
    model.setup_caches(len(prompts), max(map(len, prompts)) + how.max_new_tokens)
    ended: set[int] = set()
    for step in generate(model, prompts, how.max_new_tokens, how.sampling, eos_ids=eos_ids, ended=ended):
        for row, ids in zip(rows, step, strict=True):
            row.push(ids, eos_ids)
        ended |= {i for i, row in enumerate(rows) if row.finish_reason}
    for row in rows:
        row.finish("length")
    return [row.text for row in rows]


def harness_model(
    model: Transformer, tokenizer: Tokenizer, eos_ids: tuple[int, ...], max_seq_length: int, batch_size: int = 1
) -> "LM":
    """Make the model one that lm_eval.simple_evaluate takes.

    It tokenizes, cuts and windows as the harness's own `hf` model does, so that the figures compare: a text that is
    too long loses its beginning, BOS too, and a rolling loglikelihood scores the BOS of its text like a token.
    max_seq_length: the most tokens the model is given at once. Raises ValueError where there is neither BOS nor EOS.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    if tokenizer.bos_id is None and not eos_ids:
        raise ValueError("the model has neither a BOS nor an EOS token, which tasks need before a text's first token")

    class HarnessModel(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return eos_ids[0] if eos_ids else self.prefix_token_id

        @property
        def prefix_token_id(self) -> int:
            return eos_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = tokenizer.encode(string, bos=add_special_tokens is not False)
            check_ids(ids, model.config.vocab_size, "a text")
            return ids

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)  # the tokenizing; scoring has a bar of its own

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            for (_, text), _, continuation in requests:
                if not 1 <= len(continuation) <= max_seq_length:
                    raise ValueError(
                        f"the continuation {text[:40]!r} has {len(continuation)} tokens of its own, expected 1 to "
                        f"{max_seq_length}, the longest window"
                    )
            windows = [Window((context + ids)[-max_seq_length - 1 :], len(ids)) for _, context, ids in requests]
            return loglikelihoods(model, windows, batch_size)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for owner, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for pair in get_rolling_token_windows(ids, self.prefix_token_id, max_seq_length, context_len=1):
                    context, targets = make_disjoint_window(pair)
                    windows.append(Window(context + targets, len(targets)))
                    owners.append(owner)
            totals = [0.0] * len(requests)
            for owner, (log_p, _) in zip(owners, loglikelihoods(model, windows, batch_size), strict=True):
                totals[owner] += log_p
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            groups: dict[Generation, list[tuple[int, list[int]]]] = {}
            for i, request in enumerate(requests):
                how = parse_generation(request.args[1], max_seq_length)
                ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
                groups.setdefault(how, []).append((i, ids[how.max_new_tokens - max_seq_length :]))
            for how, group in groups.items():
                group.sort(key=lambda member: -len(member[1]))
                for batch in in_batches(group, batch_size, "generate"):
                    made = generate_texts(model, tokenizer, eos_ids, [ids for _, ids in batch], how)
                    for (i, _), text in zip(batch, made, strict=True):
                        texts[i] = text
            return texts

    return HarnessModel()


def load_tasks(names: Sequence[str], include_path: Path | None, max_seq_length: int) -> list[Any]:
    """Read the harness's tasks and groups, their data too, and check that we can run them.

    Raises ValueError for a name that is neither the harness's nor under include_path, and for a task that is broken.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("--tasks needs a package: pip install lm_eval") from None
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(
                f"--tasks: {name!r} is none of the harness's {len(manager.all_tasks)} tasks"
                + (f" and those in {include_path}" if include_path else "")
                + (f"; is it {' or '.join(close)}?" if close else "; its own are listed by: lm_eval ls tasks")
            )
    tasks: list[Any] = []
    for name in dict.fromkeys(names):
        try:
            loaded = manager.load(name)
        except Exception as error:  # a task may run code of its own, and data sets raise every kind
            raise ValueError(f"--tasks: {name} cannot be loaded: {type(error).__name__}: {error}") from None
        for task_name, task in loaded["tasks"].items():
            if task.get_config("output_type") == "generate_until":
                try:
                    parse_generation(task.get_config("generation_kwargs"), max_seq_length)
                except ValueError as error:
                    raise ValueError(f"--tasks: {task_name}: {error}") from None
        groups = loaded["groups"]
        tasks += [groups[name]] if name in groups else loaded["tasks"].values()
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="eval.py", description="Evaluate a Llama-family model on a text and on tasks.")
    parser.add_argument("--checkpoint_path", type=checkpoint_folder, default=Path(__file__).parent / "checkpoints/demo",
                        metavar="DIR", help="a folder from the Hub, or a converted one (checkpoints/demo)")  # fmt: skip
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
    raw = read_config(args.checkpoint_path)
    config = parse_config(raw)
    if args.max_seq_length:
        check_window(args.max_seq_length, config)
    check_device(args.device)
    if (path := args.metrics_path) and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--metrics_path {path} cannot be written: expected a file in a folder that exists")
    if args.include_path and not args.include_path.is_dir():
        raise FileNotFoundError(f"--include_path {args.include_path} is not a folder; expected one with tasks' yaml")
    tokenizer = load_tokenizer(args.checkpoint_path)
    text = read_text("--text_file", args.text_file) if args.text_file else ""
    # A text is data: <s> in it is three characters, which have a cost, and no token, which would have no bytes.
    ids = tokenizer.encode(text, parse_special=False) if text else []
    if text:
        check_ids(ids, config.vocab_size, "--text_file")
        sliding_windows(ids[:2], 2, 1)  # refuses a text that is too short
    # Without a BOS the first token is not predicted, and its bytes do not count either.
    unpredicted = "" if ids[:1] == [tokenizer.bos_id] else tokenizer.decode(ids[:1])
    task_window = args.max_seq_length or config.max_position_embeddings
    return Job(
        DTYPES[args.dtype] if args.dtype else parse_dtype(raw),
        tokenizer,
        eos_token_ids(args.checkpoint_path),
        ids,
        len(text.encode()) - len(unpredicted.encode()),
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
