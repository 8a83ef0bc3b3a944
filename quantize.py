"""int8 and int4 weights: a checkpoint rewritten block by block, and the command.

    python quantize.py --checkpoint_path checkpoints/demo --mode int4-gptq --groupsize 32

The linears of the blocks take the mode, the output head is int8 in all, the embedding and the norms stay as they are.
What is written is compressed-tensors (formats.py), which other programs read too.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibration import NUM_WINDOWS, ROWS, WINDOW, cut_windows, write_windows
from checkpoint import ModelReader, companions, copy_texts, load_model, meta_model, tensor_specs, write_config
from cli.arguments import ArgumentParser, add_checkpoint_options, check_device, number, read_text
from cli.errors import user_errors
from cli.template import load_template
from compressed import hub_specs, hub_tensors, quantization_config
from config import eos_token_ids
from files import Spec, new_folder, sibling, write_safetensors
from gptq import Calibration
from linears import GROUP_SIZES, MODES, Form, StoredLinear, frozen_parameter, quantizable_linears, quantize_linear
from model import ModelConfig, Transformer
from tokenizer import Tokenizer, load_tokenizer


@torch.inference_mode()
def quantized_parts(
    model: Transformer,
    read: Callable[[str], Tensor],
    form: Form,
    calibration: Calibration | None = None,
    tick: Callable[[], Any] = lambda: None,
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the quantized model's parameters by name: the embedding, block after block, then norm and head.

    model: the one to quantize, on the meta device; `read` returns its parameters by name, and one block at a time is in
    memory. calibration: for GPTQ; None rounds to nearest. `tick` is called after every linear.
    """
    head = "embed_tokens.weight" if model.tied else "lm_head.weight"
    yield {"embed_tokens.weight": read("embed_tokens.weight")}
    for i, block in enumerate(model.layers):
        prefix = f"layers.{i}."
        block.load_state_dict({name: read(prefix + name) for name, _ in block.named_parameters()}, assign=True)
        parameters = dict(block.named_parameters(prefix[:-1]))
        encoders = calibration.encoders(block) if calibration else {}
        for name, child in quantizable_linears(block).items():
            stored = quantize_linear(child, form, encoders.pop(name, None))  # whose Hessian is freed here
            parameters |= stored.named_parameters(prefix + name)
            if calibration:  # the next block is calibrated on what the quantized blocks before it return
                child.weight = frozen_parameter(stored.dequantize().to(child.weight.dtype))
            tick()
        if calibration:
            calibration.advance(block)
        yield parameters
        block.to("meta")
    model.lm_head.weight = frozen_parameter(read(head))
    model.norm.weight = frozen_parameter(read("norm.weight"))
    choose = None
    if calibration and form.bits == 8:  # beside int4 blocks rounding the head to nearest does not show
        [choose] = calibration.encoders(nn.Sequential(model.norm, model.lm_head)).values()
    stored = quantize_linear(model.lm_head, form.head, choose)
    yield {"norm.weight": model.norm.weight, **dict(stored.named_parameters("lm_head"))}


# ---------------------------------------------------------------------------------------------------------------------
# The calibration text


def calibration_windows(args: argparse.Namespace, config: ModelConfig) -> Tensor:
    """Return windows of token ids [num, S]: of --calibration_file, or what the model writes, half of it as a chat."""
    tokenizer = load_tokenizer(args.checkpoint_path)
    length = args.calibration_length or min(WINDOW, config.max_position_embeddings)
    if length > config.max_position_embeddings:
        raise ValueError(f"--calibration_length {length} is above the context of {config.max_position_embeddings}")
    num = args.calibration_samples
    if args.calibration_file:
        text = read_text("--calibration_file", args.calibration_file)
        return cut_windows(text, tokenizer, num, length, config.vocab_size)
    opening = chat_opening(args.checkpoint_path, tokenizer)
    if not sys.stderr.isatty():  # where no bar is shown
        print(f"writing {num} windows of {length} tokens to calibrate on, for minutes", file=sys.stderr)
    model = load_model(args.checkpoint_path, args.device)
    with tqdm(total=-(-num // ROWS) * length, desc="calibration text", dynamic_ncols=True, disable=None) as bar:
        return write_windows(model, tokenizer, num, length, opening, bar.update)


def chat_opening(path: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids before a user's first message; [] where there is no chat template, or it takes no such message."""
    try:
        template, mark = load_template(path, tokenizer, eos_token_ids(path, tokenizer.named_eos_id)), "QUESTION"
    except ValueError as error:
        raise ValueError(f"{error}; with --calibration_file it is not needed") from error
    if template is None:
        return []
    with contextlib.suppress(ValueError):
        before, found, _ = template.render([{"role": "user", "content": mark}], False).partition(mark)
        return tokenizer.encode(before) if found else []
    return []


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="quantize.py", description="Quantize the linears of a checkpoint.")
    demo = Path(__file__).parent / "checkpoints/demo"
    add_checkpoint_options(parser, demo, "a folder that generate.py loads")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--groupsize", type=int, choices=(-1, *GROUP_SIZES),
                        help="weights that share a scale, -1: an output channel (int8: -1, int4: 32)")  # fmt: skip
    parser.add_argument("--symmetric", action="store_true", help="int4 without zero points, which every program reads")
    parser.add_argument("--output_path", type=Path, metavar="DIR", help="default: CHECKPOINT_PATH-int4-g32, say")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    gptq = parser.add_argument_group("int4-gptq and int8-gptq")
    gptq.add_argument("--calibration_file", type=Path, metavar="FILE", help="text (what the model itself writes)")
    gptq.add_argument("--calibration_samples", type=number(int, 1), metavar="N", help="windows of that text (64)")
    gptq.add_argument("--calibration_length", type=number(int, 2), metavar="N", help="tokens of a window (512)")
    gptq.add_argument("--act_order", action=argparse.BooleanOptionalAction,
                      help="round the columns with the largest inputs first (yes)")  # fmt: skip
    args = parser.parse_args(argv)
    args.bits = int(args.mode[3])
    if args.bits == 8 and args.symmetric:
        parser.error(f"--symmetric does not go with --mode {args.mode}, which always is; it is for int4")
    for option in ("calibration_file", "calibration_samples", "calibration_length", "act_order"):
        if not args.mode.endswith("-gptq") and getattr(args, option) is not None:
            name = option if getattr(args, option) else f"no-{option}"
            parser.error(f"--{name} does not go with --mode {args.mode}; it is for int4-gptq and int8-gptq")
    args.act_order, args.calibration_samples = args.act_order is not False, args.calibration_samples or NUM_WINDOWS
    args.groupsize = args.groupsize or (-1 if args.bits == 8 else 32)
    return args


def run(args: argparse.Namespace, windows: Tensor | None = None) -> None:
    """windows [num, S]: ids for GPTQ in place of those that the options name."""
    check_device(args.device)
    reader = ModelReader(args.checkpoint_path)  # it says at once if layers are missing
    has_zeros = args.bits == 4 and not args.symmetric
    form = Form(args.bits, args.groupsize if args.groupsize > 0 else None, has_zeros)
    if reader.forms:
        raise ValueError(f"{args.checkpoint_path} is quantized already: run it, or name the one that it was made from")
    companions(args.checkpoint_path)  # for what it refuses, before the work
    source = meta_model(reader.raw, forms={})
    raw = {key: value for key, value in reader.raw.items() if key != "layout"}
    raw |= {"quantization_config": quantization_config(form), "tie_word_embeddings": False}
    target = meta_model(raw)
    specs = tensor_specs(target, reader.dtype)
    output_path = args.output_path or sibling(args.checkpoint_path, f"-{form}".replace(f"int{args.bits}", args.mode))

    def read(name: str) -> Tensor:
        return reader.read(name).to(args.device)

    with new_folder(output_path) as folder:  # first, since the calibration takes long
        if args.mode.endswith("-gptq") and windows is None:
            windows = calibration_windows(args, source.config)
        num_steps = len(quantizable_linears(source)) - 1
        num_steps += 0 if windows is None else (2 * len(source.layers) + (args.bits == 8)) * len(windows)
        with tqdm(total=num_steps, desc=args.mode, dynamic_ncols=True, disable=None) as bar:
            calibration = None
            if windows is not None:
                table = read("embed_tokens.weight")
                calibration = Calibration(source, table, windows, form, args.act_order, bar.update)
            parts = quantized_parts(source, read, form, calibration, bar.update)
            pending: dict[str, Tensor] = {}

            def take(name: str) -> Tensor:
                while name not in pending:
                    pending.update(hub_tensors(target, next(parts)))
                return pending.pop(name)

            write_safetensors(folder / "model.safetensors", hub_specs(target, specs), take)
        write_config(raw, reader.dtype, folder)
        copy_texts(args.checkpoint_path, folder)
    if windows is not None:
        print(f"calibrated on {len(windows)} of {args.calibration_samples} windows of {windows.shape[1]} tokens")
        if calibration and (warning := calibration.warning()):
            print(warning, file=sys.stderr)
    print(*summary(reader.specs, specs, target), sep="\n", flush=True)
    print(f"wrote {output_path}", file=sys.stderr)  # stdout may lack characters of a path


def summary(before: dict[str, Spec], after: dict[str, Spec], target: Transformer) -> Iterator[str]:
    """Say, a line for each role, what becomes of its tensors. before, after: specs; target: on the meta device."""

    def count_bytes(specs: dict[str, Spec]) -> Counter[str]:
        sizes: Counter[str] = Counter()
        for name, (dtype, shape) in specs.items():
            sizes[name.split(".")[-2]] += shape.numel() * dtype.itemsize
        return sizes

    old, new = count_bytes(before), count_bytes(after)
    modules = {name.rpartition(".")[2]: child for name, child in target.named_modules()}
    yield f"{'':26}{'stored as':34}{'MB before':>10}{'MB after':>10}"
    for role in new:
        yield f"{role:26}{describe(modules[role]):34}{old[role] / 1e6:10.3f}{new[role] / 1e6:10.3f}"
    yield f"{'all':60}{sum(old[role] for role in new) / 1e6:10.3f}{new.total() / 1e6:10.3f}"


def describe(module: nn.Module) -> str:
    if not isinstance(module, StoredLinear):
        return "as it was"
    rest = module.in_features % module.group_size
    groups = f"groups of {module.form.group_size}" + (f", last of {rest}" if rest else "")
    return f"int{module.form.bits}, {groups if module.form.group_size else 'a scale per channel'}"


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
