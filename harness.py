"""The adapter for lm-evaluation-harness: a model as its three kinds of request want it, and its tasks."""

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import check_ids, generate
from likelihood import Window, in_batches, loglikelihoods
from model import Transformer
from rows import Row
from steps import TINY, Sampling
from tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM


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
    set_values = {name: value for name, value in kwargs.items() if value is not None}  # null is as good as silence
    try:
        values = dict(normalize_gen_kwargs(set_values))  # its aliases and defaults are the same for every model
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"generation_kwargs: {set_values} has a value of another kind: {error}") from None
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


def first_of(*ids: int | None) -> int:
    """Return the first that is an id."""
    return next(i for i in ids if i is not None)


class HarnessRequests:
    """The harness's kinds of request, answered as its own `hf` model does, so that the figures compare.

    A text that is too long loses its beginning, BOS too, and a rolling loglikelihood scores the BOS of its text like a
    token. Before an empty context, and before a rolled text, stands the bos_token that the tokenizer names, even where
    it puts none before texts.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, eos_ids: tuple[int, ...], max_seq_length: int, batch_size: int
    ):
        super().__init__()
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, eos_ids
        self.window, self.num_rows = max_seq_length, batch_size

    @property
    def eot_token_id(self) -> int:
        return first_of(self.tokenizer.named_eos_id, *self.eos_ids, self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.tokenizer
        return first_of(tokenizer.named_bos_id, tokenizer.named_eos_id, tokenizer.bos_id, *self.eos_ids)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encode(string, self.prefix_token_id if add_special_tokens is None else None, add_special_tokens)

    def encode(self, text: str, prefix_id: int | None, add_bos: bool | None = None) -> list[int]:
        """Encode a text; BOS is left out where the text begins with the string of prefix_id, and there only."""
        if add_bos is None:
            add_bos = not any(i == prefix_id and text.startswith(name) for name, i in self.tokenizer.added_ids.items())
        ids = self.tokenizer.encode(text, bos=False)
        if add_bos and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        check_ids(ids, self.model.config.vocab_size, "a text")
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # The bar is that of the tokenizing; scoring has a bar of its own.
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        for (_, text), _, continuation in requests:
            if not 1 <= len(continuation) <= self.window:
                raise ValueError(
                    f"the continuation {text[:40]!r} has {len(continuation)} tokens of its own, expected 1 to "
                    f"{self.window}, the longest window"
                )
        empty = [self.prefix_token_id]  # of a context of spaces, which are counted to the continuation
        windows = [Window(((context or empty) + ids)[-self.window - 1 :], len(ids)) for _, context, ids in requests]
        return loglikelihoods(self.model, windows, self.num_rows)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.window, context_len=1):
                context, targets = make_disjoint_window(pair)
                windows.append(Window(context + targets, len(targets)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, loglikelihoods(self.model, windows, self.num_rows), strict=True):
            totals[owner] += log_p
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[Generation, list[tuple[int, list[int]]]] = {}
        for i, request in enumerate(requests):
            how = parse_generation(request.args[1], self.window)
            ids = self.encode(request.args[0], self.tokenizer.named_bos_id) or [self.prefix_token_id]
            groups.setdefault(how, []).append((i, ids[how.max_new_tokens - self.window :]))
        for how, group in groups.items():
            group.sort(key=lambda member: -len(member[1]))
            for batch in in_batches(group, self.num_rows, "generate"):
                prompts = [ids for _, ids in batch]
                ends = (*self.eos_ids, self.eot_token_id)
                continuations = generate_texts(self.model, self.tokenizer, ends, prompts, how)
                for (i, _), text in zip(batch, continuations, strict=True):
                    texts[i] = text
        return texts


def harness_model(
    model: Transformer, tokenizer: Tokenizer, eos_ids: tuple[int, ...], max_seq_length: int, batch_size: int = 1
) -> "LM":
    """Make the model one that lm_eval.simple_evaluate takes.

    max_seq_length: the most tokens the model is given at once. Raises ValueError where there is neither BOS nor EOS.
    """
    from lm_eval.api.model import TemplateLM

    if not eos_ids and {tokenizer.bos_id, tokenizer.named_bos_id, tokenizer.named_eos_id} == {None}:
        raise ValueError("the model has neither a BOS nor an EOS token, which tasks need before a text's first token")

    class HarnessModel(HarnessRequests, TemplateLM):
        pass

    harness = HarnessModel(model, tokenizer, eos_ids, max_seq_length, batch_size)
    check_ids([harness.prefix_token_id], model.config.vocab_size, "what stands before a text")
    return harness


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
