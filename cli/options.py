"""The command line of generate.py, checked into a `Job` before any weights load."""

import argparse
import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint import checkpoint_dtype, read_files
from cli.arguments import (
    ArgumentParser,
    add_checkpoint_options,
    check_device,
    check_stdout,
    check_writable,
    checkpoint_folder,
    number,
    read_text,
)
from cli.chat import Conversation, end_of_turn
from cli.ranks import local_device
from cli.sampling import DEFAULTS, LIMITS, choose_sampling, unsupported_options
from cli.template import ChatTemplate, load_template
from config import DTYPES, eos_token_ids, is_head, parse_config, quantization_form, read_config
from drafters import LOOKUP_K, MODEL_K
from eagle_checkpoint import parse_head_config
from engine import check_ids
from linears import Form
from model import ModelConfig, Ranks
from steps import Sampling
from tokenizer import Tokenizer, check_unicode, load_tokenizer
from tp import check_sizes

DEMO = Path(__file__).parents[1] / "checkpoints/demo"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        ranks=True,
        prog="generate.py",
        usage="python generate.py [options]: generate text with a Llama-family model",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=31),
        add_help=False,
    )
    add_prompt_options(parser)
    add_sampling_options(parser)
    add_draft_options(parser)
    add_run_options(parser)
    args = parser.parse_args(argv)
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    if args.max_new_tokens is None:
        args.max_new_tokens = 1000 if args.interactive else 200
    if (args.prompt or []).count("-") > 1:
        raise ValueError("--prompt - is given twice, and the input is one text; give it once")
    args.prompt = [read_stdin() if text == "-" else text for text in args.prompt or []]
    return args


def add_prompt_options(parser: ArgumentParser) -> None:
    what = parser.add_argument_group("what to generate")
    add_checkpoint_options(what, DEMO, "a folder, or a model's name on the Hub")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT",
                        help="may repeat: a batch of prompts; - is all of stdin ('def')")  # fmt: skip
    source.add_argument("--prompt_file", type=Path, metavar="FILE", help="a batch of prompts, one a line")
    source.add_argument("--prompt_length", type=number(int, 1), metavar="N", help="a prompt of N random tokens")
    source.add_argument("--interactive", action="store_true", help="talk with the model on the terminal")
    what.add_argument("--chat", action="store_true", help="ask each prompt through the model's chat template")
    what.add_argument("--system", metavar="TEXT", help="the system message of --interactive and --chat")
    what.add_argument("--chat_template_kwargs", type=template_kwargs, metavar="JSON",
                      help="the template's variables: '{\"enable_thinking\": false}'")  # fmt: skip
    what.add_argument("--max_seq_length", type=number(int, 2), metavar="N",
                      help="context of --interactive, in tokens (the model's, at most 8192)")  # fmt: skip
    what.add_argument("--max_new_tokens", type=number(int, 0), metavar="N", help="per row (200; --interactive: 1000)")
    what.add_argument("--num_samples", type=number(int, 1), default=1, metavar="N", help="one after the other (1)")
    what.add_argument("--batch_size", type=number(int, 1), metavar="N",
                      help="copies of a single prompt, or how many of several at a time (all)")  # fmt: skip
    what.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may repeat")
    what.add_argument("--ignore_eos", action="store_true", help="go on after the end-of-text token")


def add_sampling_options(parser: ArgumentParser) -> None:
    how = parser.add_argument_group("sampling (the checkpoint's own defaults, else those in brackets)")
    # None is an option that is not given: then the checkpoint has a say.
    how.add_argument("--temperature", type=LIMITS["temperature"], metavar="T",
                     help=f"0 is argmax ({DEFAULTS.temperature:g})")  # fmt: skip
    how.add_argument("--top_k", type=LIMITS["top_k"], metavar="K",
                     help=f"the K likeliest; 0 is all ({DEFAULTS.top_k})")  # fmt: skip
    how.add_argument("--top_p", type=LIMITS["top_p"], metavar="P",
                     help=f"those of total probability P ({DEFAULTS.top_p:g})")  # fmt: skip
    how.add_argument("--min_p", type=LIMITS["min_p"], metavar="P",
                     help=f"P times the likeliest at least ({DEFAULTS.min_p:g})")  # fmt: skip
    how.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="the same seed, the same text (random)"
    )


def add_draft_options(parser: ArgumentParser) -> None:
    drafts = parser.add_argument_group("speculation (the text stays the model's own)")
    drafts.add_argument("--draft_checkpoint_path", type=checkpoint_folder, metavar="DIR",
                        help="a smaller model of the same vocabulary drafts, or an EAGLE-3 head")  # fmt: skip
    drafts.add_argument("--prompt_lookup", action="store_true",
                        help="where the text repeats itself, it drafts; with or without a model")  # fmt: skip
    drafts.add_argument("--speculate_k", type=number(int, 1, 64), metavar="K",
                        help=f"draft at most K tokens a round ({MODEL_K}; what repeats: {LOOKUP_K})")  # fmt: skip


def add_run_options(parser: ArgumentParser) -> None:
    run = parser.add_argument_group("how to run")
    run.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    run.add_argument("--compile", action="store_true", help="compile decode")
    run.add_argument("--compile_prefill", action="store_true", help="compile prefill too")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME",
                     help="cpu, cuda, cuda:1, ... (cuda where there is one)")  # fmt: skip
    run.add_argument("--dtype", choices=DTYPES, metavar="NAME", help=f"{', '.join(DTYPES)} (the checkpoint's own)")
    run.add_argument("--random_weights", action="store_true",
                     help="for speed work: with --prompt_length the folder needs only config.json")  # fmt: skip
    run.add_argument("--profile", type=Path, metavar="FILE", help="write a chrome trace of the last sample")
    run.add_argument("--metrics_path", type=Path, metavar="FILE", help="write the run as JSON")


def template_kwargs(text: str) -> dict[str, Any]:
    """Read a JSON object: an argparse type."""
    try:
        kwargs = json.loads(text)
        check_unicode(json.dumps(kwargs, ensure_ascii=False))  # an escape may stand for half a character
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not valid JSON ({error}); give an object") from None
    if not isinstance(kwargs, dict):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is a JSON {type(kwargs).__name__}; give an object")
    for name in ("messages", "add_generation_prompt"):
        if name in kwargs:
            raise argparse.ArgumentTypeError(f"{name!r} is the conversation's own; leave it out")
    return kwargs


def read_stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -: the input is not UTF-8: {error}") from None
    if not text:
        raise ValueError("--prompt -: the input is empty; give a text, or --prompt '' to begin with none")
    return text.removesuffix("\n")


@dataclass(frozen=True)
class Job:
    """A command line that has been checked: everything but the weights."""

    config: ModelConfig
    device: str
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    batches: list[list[list[int]]] | None  # of prompts, of ids; None: what will be typed
    max_seq_length: int
    sampling: Sampling
    unsupported: str  # a line on what the checkpoint asks for and does not get, or ""
    quantization: Form | None
    draft_dtype: torch.dtype | None  # of a draft model
    template: ChatTemplate | None  # of --chat and --interactive

    @property
    def num_rows(self) -> int:
        """How many rows the caches need."""
        return max(map(len, self.batches)) if self.batches else 1


# A conversation's caches are made at the start, for a whole context: of a long one they would be larger than the model.
DEFAULT_CONVERSATION = 8192


@contextlib.contextmanager
def name_option(option: str) -> Iterator[None]:
    """Say in an error which option it is about."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{option}: {error}") from None


def check(args: argparse.Namespace, ranks: Ranks) -> Job:
    """Refuse what cannot work, before the weights load. Raises ValueError or FileNotFoundError."""
    with name_option("--checkpoint_path"):
        raw = read_config(args.checkpoint_path)
        config, quantization = parse_config(raw), quantization_form(raw)
        sampling = choose_sampling(args.checkpoint_path, vars(args))
    # A folder's own groups are checked where it is read: some need not be cut.
    check_sizes(config, quantization if args.random_weights else None, ranks.count)
    device = local_device(args.device, ranks)
    check_device(device)
    if device == "cpu" and (args.compile or args.compile_prefill):
        check_compiler()
    if ranks.rank == 0:  # it alone writes: another node need not have the folder
        check_outputs(args)
    if "" in args.stop:
        raise ValueError("--stop is empty; give the text to end before")
    with name_option("--stop"):
        check_unicode("".join(args.stop))
    check_chat(args, config)
    try:
        tokenizer = load_tokenizer(args.checkpoint_path)
    except FileNotFoundError as error:
        if not args.prompt_length:
            raise ValueError(
                f"--checkpoint_path: {error}; or give --prompt_length for a prompt of random tokens"
            ) from None
        if args.stop:
            raise ValueError(f"--stop needs a tokenizer: {error}") from None
        tokenizer = None
    with name_option("--checkpoint_path"):
        own_eos_ids = eos_token_ids(args.checkpoint_path, tokenizer.named_eos_id if tokenizer else None)
    template = chat_template(args, tokenizer, own_eos_ids) if args.chat or args.interactive else None
    eos_ids = () if args.ignore_eos else own_eos_ids
    if template and tokenizer and not args.ignore_eos:
        eos_ids += end_of_turn(template, tokenizer, args.system)
    if args.interactive:
        batches, longest = None, args.max_seq_length or DEFAULT_CONVERSATION
    else:
        prompts = read_prompts(args, tokenizer, template, config)
        longest = max(map(len, prompts)) + args.max_new_tokens
        batch_size = args.batch_size or len(prompts)
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)] * args.num_samples
    return Job(
        config,
        device,
        DTYPES[args.dtype] if args.dtype else checkpoint_dtype(args.checkpoint_path, raw),
        tokenizer,
        eos_ids,
        batches,
        min(config.max_position_embeddings, longest),
        sampling,
        unsupported_options(args.checkpoint_path),
        quantization,
        check_draft(args, tokenizer, config),
        template,
    )


def check_outputs(args: argparse.Namespace) -> None:
    outputs = {"--metrics_path": args.metrics_path, "--profile": args.profile}
    inputs = [args.prompt_file] if args.prompt_file else []
    for folder in filter(None, (args.checkpoint_path, args.draft_checkpoint_path)):
        inputs += read_files(folder)
    for option, path in outputs.items():
        if path:
            check_writable(option, path, inputs)
    metrics, trace = outputs.values()
    if metrics and trace and are_same(metrics, trace) and not metrics.is_char_device():
        raise ValueError(f"--metrics_path {metrics} and --profile {trace} are one file; name two")
    check_stdout()


def are_same(path: Path, other: Path) -> bool:
    """Say whether two paths are one file, there already or not."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return os.path.realpath(path) == os.path.realpath(other)


def check_compiler() -> None:
    from torch._inductor import cpp_builder, exc  # here, since it loads the compiler

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        named = os.environ.get("CXX", "g++")
        raise ValueError(
            f"--compile on a CPU needs a C++ compiler, and {named!r} cannot be run as one; install g++ or name one in "
            "CXX, or leave --compile out"
        ) from None


def check_chat(args: argparse.Namespace, config: ModelConfig) -> None:
    """Raise ValueError where options do not go with --chat or --interactive, or need one of them."""
    context, slots = config.max_position_embeddings, args.max_seq_length
    with name_option("--system"):
        check_unicode(args.system or "")
    if args.system is not None and not (args.chat or args.interactive):
        raise ValueError("--system is for a chat; give --chat or --interactive too")
    if args.chat_template_kwargs is not None and not (args.chat or args.interactive):
        raise ValueError("--chat_template_kwargs is for a chat; give --chat or --interactive too")
    if args.chat and not (args.prompt or args.prompt_file or args.prompt_length):
        raise ValueError("--chat has no message; give --prompt or --prompt_file, or --interactive instead of it")
    if args.chat and args.prompt_length:
        raise ValueError("--chat and --prompt_length do not go together: random tokens are no message")
    if slots and not args.interactive:
        raise ValueError("--max_seq_length is for --interactive; a prompt's text has the length that it needs")
    if slots and slots > context:
        raise ValueError(f"--max_seq_length {slots} is more than the model's context of {context}; give fewer")
    for option in ("batch_size", "profile"):
        if args.interactive and getattr(args, option):
            raise ValueError(f"--{option} does not go with --interactive")
    if args.interactive and args.num_samples > 1:
        raise ValueError(f"--num_samples {args.num_samples} does not go with --interactive, which gives one answer")


def chat_template(
    args: argparse.Namespace, tokenizer: Tokenizer | None, eos_ids: tuple[int, ...]
) -> ChatTemplate | None:
    """Return the model's template; None where it has none and its text is merely continued."""
    with name_option("--checkpoint_path"):
        kwargs = args.chat_template_kwargs
        template = load_template(args.checkpoint_path, tokenizer, eos_ids, kwargs) if tokenizer else None
    needed_by = {"--chat": args.chat or None, "--system": args.system, "--chat_template_kwargs": kwargs}
    given = [option for option, value in needed_by.items() if value is not None]
    if given and not template:
        raise ValueError(
            f"{given[0]} needs a chat template and {args.checkpoint_path} has none; name a model made for chat"
        )
    return template


def check_draft(args: argparse.Namespace, tokenizer: Tokenizer | None, target: ModelConfig) -> torch.dtype | None:
    """Return the dtype of a draft model; None where there is none, and for a head, which has the model's.

    Raises ValueError where its vocabulary is another, or the head is for another model.
    """
    path = args.draft_checkpoint_path
    if args.speculate_k and not path and not args.prompt_lookup:
        raise ValueError("--speculate_k needs a draft; give --draft_checkpoint_path or --prompt_lookup")
    if not path:
        return None
    with name_option("--draft_checkpoint_path"):
        raw = read_config(path)
    with name_option(f"--draft_checkpoint_path {path}"):
        if is_head(raw):
            parse_head_config(raw, target)
            return None
        config = parse_config(raw)
    try:
        theirs = load_tokenizer(path).token_bytes
        ours = (tokenizer or load_tokenizer(args.checkpoint_path)).token_bytes
    except FileNotFoundError as error:
        if not args.random_weights:
            raise ValueError(f"{error}; the draft's vocabulary and the model's have to be compared") from None
        if config.vocab_size != target.vocab_size:
            raise ValueError(
                f"the draft {path} has {config.vocab_size} ids and the model {target.vocab_size}; they must have the "
                "same"
            ) from None
    else:
        differ = sorted(i for i in {*theirs, *ours} if theirs.get(i) != ours.get(i))
        if differ:
            raise ValueError(
                f"the draft {path} has another vocabulary than the model, and must have the same; ids that differ: "
                f"{len(differ)}, the first is {differ[0]}, {theirs.get(differ[0])!r} and {ours.get(differ[0])!r}"
            )
    return DTYPES[args.dtype] if args.dtype else checkpoint_dtype(path, raw)


def read_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer | None, template: ChatTemplate | None, config: ModelConfig
) -> list[list[int]]:
    """Return the ids of every prompt. Raises ValueError where one does not fit the model."""
    option = "--prompt_length" if args.prompt_length else "--prompt_file" if args.prompt_file else "--prompt"
    context = config.max_position_embeddings
    if args.prompt_length:
        check_fits(option, args.prompt_length, context)
        generator = torch.Generator().manual_seed(args.seed)
        prompts = [torch.randint(config.vocab_size, (args.prompt_length,), generator=generator).tolist()]
    else:
        assert tokenizer is not None
        texts = args.prompt or ["def"]
        if args.prompt_file:  # splitlines would cut at form feeds too
            texts = read_text("--prompt_file", args.prompt_file).replace("\r\n", "\n").removesuffix("\n").split("\n")
        with name_option(option):
            for text in texts:
                check_length(text, tokenizer, context)
            prompts = [encode_prompt(text, args.system, tokenizer, template) for text in texts]
    for i, ids in enumerate(prompts, start=1):
        which = f"{option} {i} of {len(prompts)}" if len(prompts) > 1 else option
        if not ids:
            raise ValueError(f"{which} is empty and the tokenizer has no BOS token; give a text")
        check_fits(which, len(ids), context)
        check_ids(ids, config.vocab_size, which)
    return prompts * (args.batch_size or 1) if len(prompts) == 1 else prompts


def check_fits(which: str, num_tokens: int, context: int) -> None:
    """Raise ValueError where a prompt leaves no room for a new token."""
    if num_tokens >= context:
        raise ValueError(f"{which} has {num_tokens} tokens and the model's context {context}; shorten it")


def check_length(text: str, tokenizer: Tokenizer, context: int) -> None:
    """Raise ValueError where a long text's beginning alone is far too long for the model: the whole takes seconds."""
    beginning = text[: 16 * context]
    # Twice the context, since where a text is cut its last tokens may be others.
    if len(beginning) < len(text) and (count := len(tokenizer.encode(beginning))) > 2 * context:
        raise ValueError(
            f"{len(text)} characters, the first {len(beginning)} of them {count} tokens, and the model's context "
            f"{context}; shorten it"
        )


def encode_prompt(text: str, system: str | None, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    if template is None:
        return tokenizer.encode(text)
    return Conversation(tokenizer, template, system, capacity=2**31).ask(text).ids
