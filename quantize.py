"""int8 and int4 weights: the arithmetic, the linears, GPTQ, and the command.

    python quantize.py --checkpoint_path checkpoints/demo --mode int4-gptq --groupsize 32

The linears of the blocks take the mode, the output head is always int8, the embedding and the norms stay as they are;
activations are never quantized. The stored form is the same for all devices: when a model is loaded, `repack_` turns it
into what the device's kernels read.
"""

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from cli import ArgumentParser, check_device, checkpoint_folder, number, user_errors
from kernels import LinearLayer, constant, expert_linear, linear
from model import Linear, Transformer, attention

if TYPE_CHECKING:
    from gptq import Calibration

MODES = ("int8", "int4", "int4-gptq")
GROUP_SIZES = (32, 64, 128, 256)
# The least scale, which a group of zeros gets, so that nothing is divided by 0.
MIN_SCALE = 2.0**-40
# Weight [N, K] and group size to codes [N, K], scales and zeros [N, groups].
Encode = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Scheme:
    """How the linears of a checkpoint are stored."""

    mode: str
    group_size: int | None = None  # input columns that share a scale and a zero point; None: a whole row, in int8

    def __str__(self) -> str:
        return self.mode if self.group_size is None else f"{self.mode}-g{self.group_size}"


# Rounding the output head to int8 does not show in the perplexity, to int4 it does: results/NOTES.md.
HEAD_SCHEME = Scheme("int8")


def parse_scheme(value: Any) -> Scheme | None:
    """Read `quantization` of config.json. Raises ValueError where it is not one that this file writes."""
    if value is None:
        return None
    try:
        scheme = Scheme(value["mode"], value.get("groupsize"))
        known = scheme.mode in MODES and scheme.group_size in ([None] if scheme.mode == "int8" else GROUP_SIZES)
    except (TypeError, KeyError, AttributeError):
        known = False
    if not known or type(scheme.group_size) not in (int, type(None)):
        raise ValueError(
            f"config.json: quantization {value!r} is not supported; expected mode {', '.join(MODES)} and for int4 a "
            f"groupsize of {', '.join(map(str, GROUP_SIZES))}"
        )
    return scheme


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic, on a weight [N, K] or a stack of them, [X, N, K]


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] to int8 codes [N, K] and bf16 scales [N], symmetrically per output channel."""
    weight = weight.float()
    scales = (weight.abs().amax(dim=-1) / 127).clamp(min=MIN_SCALE).bfloat16()
    return (weight / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scales


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the weight that codes and scales stand for: fp32 [N, K]."""
    return codes.float() * scales.float().unsqueeze(-1)


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round weight [N, K] to codes 0 to 15 [N, K], bf16 scales and zeros 0 to 15 [N, groups].

    A code c stands for (c - zero) * scale; a group's codes span its weights and 0. The last group is shorter where
    group_size does not divide K.
    """
    scales, zeros = group_parameters(weight, group_size)
    group_of = torch.arange(weight.shape[-1], device=weight.device) // group_size
    return encode_int4(weight, scales[..., group_of], zeros[..., group_of]), scales, zeros


def dequantize_int4(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """Return the weight that codes, scales and zeros stand for: fp32 [N, K]."""
    K = codes.shape[-1]
    groups = F.pad(codes, (0, -K % group_size)).unflatten(-1, (-1, group_size)).float()
    return ((groups - zeros.unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(-2)[..., :K]


def group_parameters(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the bf16 scales and uint8 zeros [N, groups] with which the codes span each group's weights and 0."""
    groups = weight.float().split(group_size, dim=-1)
    low = torch.stack([group.amin(dim=-1) for group in groups], dim=-1).clamp(max=0)
    high = torch.stack([group.amax(dim=-1) for group in groups], dim=-1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=MIN_SCALE).bfloat16()
    return scales, (-low / scales.float()).round().clamp(0, 15).to(torch.uint8)


def encode_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the nearest codes, uint8 0 to 15; scales and zeros as large as weight."""
    return (weight.float() / scales.float() + zeros).round().clamp(0, 15).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes 0 to 15 [N, K] two to a byte, the even column in the low half: uint8 [N, K / 2 rounded up]."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, num_columns: int) -> Tensor:
    """Undo `pack_nibbles`: uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :num_columns]


# ---------------------------------------------------------------------------------------------------------------------
# The linears


class QuantizedLinear(LinearLayer):
    """A linear layer, or a stack of them, in its stored form: the plain path for shapes that no kernel takes."""

    def __init__(self, shape: torch.Size, bias: bool):
        super().__init__()
        self.bias = constant(torch.empty(shape[:-1])) if bias else None

    def dequantize(self, chosen: Any = ...) -> Tensor:
        """Return the weight in fp32, of a stack the layers at an index."""
        raise NotImplementedError

    def multiply(self, x: Tensor, experts: Tensor | None) -> Tensor:
        if experts is None:
            return linear(x, self.dequantize().to(x.dtype), self.bias)
        return expert_linear(x, experts, lambda chosen: self.dequantize(chosen).to(x.dtype))


class Int8Linear(QuantizedLinear):
    def __init__(self, shape: torch.Size, bias: bool = False):
        super().__init__(shape, bias)
        self.weight = constant(torch.empty(shape, dtype=torch.int8))
        self.scales = constant(torch.empty(shape[:-1], dtype=torch.bfloat16))

    def dequantize(self, chosen: Any = ...) -> Tensor:
        return dequantize_int8(self.weight[chosen], self.scales[chosen])


class Int4Linear(QuantizedLinear):
    """Its codes are packed two to a byte."""

    def __init__(self, shape: torch.Size, group_size: int, bias: bool = False):
        super().__init__(shape, bias)
        *outputs, self.in_features = shape
        self.group_size = group_size
        num_groups = -(-self.in_features // group_size)
        self.weight = constant(torch.empty(*outputs, -(-self.in_features // 2), dtype=torch.uint8))
        self.scales = constant(torch.empty(*outputs, num_groups, dtype=torch.bfloat16))
        self.zeros = constant(torch.empty(*outputs, num_groups, dtype=torch.uint8))

    def dequantize(self, chosen: Any = ...) -> Tensor:
        codes = unpack_nibbles(self.weight[chosen], self.in_features)
        return dequantize_int4(codes, self.scales[chosen], self.zeros[chosen], self.group_size)


def repack_(model: Transformer) -> None:
    """Give a loaded model the kernels of its device, and repack the linears whose shape one of them takes."""
    dtype = model.embed_tokens.weight.dtype

    def exact(child: nn.Module) -> bool:
        """Say whether the model's dtype holds the bf16 scales: float16 would lose small ones."""
        scales = getattr(child, "scales", None)
        return scales is None or torch.equal(scales.to(dtype).to(scales), scales)

    names = [name for name, child in model.named_modules() if isinstance(child, (Linear, Int8Linear, Int4Linear))]
    # Kept on the plain path, in all layers, since a compiled step needs layers that are alike (`steps.check_layers`).
    plain = {name.split(".")[-1] for name in names if not exact(model.get_submodule(name))}
    for name in (name for name in names if name.split(".")[-1] not in plain):
        stored, layer = model.get_submodule(name), None
        if isinstance(stored, Int4Linear) and stored.zeros.max() > 15:  # kernels pack them two to a byte
            raise ValueError(f"{name}.zeros has zero points above 15; the checkpoint is damaged")
        if isinstance(stored, Linear):
            layer = kernels.linear_layer(stored.weight, stored.bias)
        elif isinstance(stored, Int8Linear):
            layer = kernels.int8_layer(stored.weight, stored.scales.to(dtype), stored.bias)
        elif isinstance(stored, Int4Linear):
            codes = unpack_nibbles(stored.weight, stored.in_features)
            layer = kernels.int4_layer(codes, stored.scales.to(dtype), stored.zeros, stored.bias, stored.group_size)
        if layer is not None:
            model.set_submodule(name, layer)
    for block in model.layers:
        block.self_attn.attend = kernels.attention_of(dtype, model.device, attention)


def linears(module: nn.Module) -> dict[str, Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, Linear)}


def quantized_form(child: Linear, scheme: Scheme) -> Int8Linear | Int4Linear:
    """Make the quantized linear of the same sizes, on the meta device."""
    with torch.device("meta"):
        if scheme.group_size is None:
            return Int8Linear(child.weight.shape, child.bias is not None)
        return Int4Linear(child.weight.shape, scheme.group_size, child.bias is not None)


def quantize_linears_(model: Transformer, scheme: Scheme) -> None:
    """Replace the linears of a model on the meta device by quantized ones, still to be filled."""
    for name, child in linears(model).items():
        model.set_submodule(name, quantized_form(child, HEAD_SCHEME if name == "lm_head" else scheme))


def quantize_linear(child: Linear, scheme: Scheme, encode: Encode = quantize_int4) -> Int8Linear | Int4Linear:
    stored = quantized_form(child, scheme)
    if isinstance(stored, Int8Linear):
        stored.weight, stored.scales = map(constant, quantize_int8(child.weight))
    else:
        codes, scales, zeros = encode(child.weight, stored.group_size)
        stored.weight, stored.scales, stored.zeros = map(constant, (pack_nibbles(codes), scales, zeros))
    stored.bias = child.bias
    return stored


@torch.inference_mode()
def quantized_parts(
    model: Transformer,
    read: Callable[[str], Tensor],
    scheme: Scheme,
    calibration: "Calibration | None" = None,
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
        for name, child in linears(block).items():
            stored = quantize_linear(child, scheme, encoders.pop(name, quantize_int4))
            parameters |= stored.named_parameters(prefix + name)
            if calibration:  # the next block is calibrated on what the quantized blocks before it return
                child.weight = constant(stored.dequantize().to(child.weight.dtype))
            tick()
        if calibration:
            calibration.advance(block)
        yield parameters
        block.to("meta")
    model.lm_head.weight = constant(read(head))
    stored = quantize_linear(model.lm_head, HEAD_SCHEME)
    yield {"norm.weight": read("norm.weight"), **dict(stored.named_parameters("lm_head"))}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="quantize.py", description="Quantize the linears of a checkpoint.")
    parser.add_argument("--checkpoint_path", type=checkpoint_folder, default=Path(__file__).parent / "checkpoints/demo",
                        metavar="DIR", help="a folder that generate.py loads (checkpoints/demo)")  # fmt: skip
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--groupsize", type=int, choices=GROUP_SIZES, help="weights that share a scale, in int4 (32)")
    parser.add_argument("--output_path", type=Path, metavar="DIR", help="default: CHECKPOINT_PATH-MODE[-gGROUPSIZE]")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    gptq = parser.add_argument_group("int4-gptq")
    gptq.add_argument("--calibration_file", type=Path, metavar="FILE", help="text (parts of Python's standard library)")
    gptq.add_argument("--calibration_samples", type=number(int, 1), metavar="N", help="windows of that text (64)")
    gptq.add_argument("--calibration_length", type=number(int, 2), metavar="N", help="tokens of a window (512)")
    gptq.add_argument("--act_order", action="store_true", help="round the columns with the largest inputs first")
    args = parser.parse_args(argv)
    if args.mode == "int8" and args.groupsize:
        parser.error(f"--groupsize {args.groupsize} does not go with --mode int8, which has a scale per output channel")
    for option in ("calibration_file", "calibration_samples", "calibration_length", "act_order"):
        if args.mode != "int4-gptq" and getattr(args, option):
            parser.error(f"--{option} does not go with --mode {args.mode}; it is for --mode int4-gptq")
    if args.mode != "int8":
        args.groupsize = args.groupsize or 32
    return args


def run(args: argparse.Namespace) -> None:
    # Not above: checkpoint.py imports this file to load what it writes.
    import checkpoint as ckpt
    from gptq import Calibration, calibration_windows

    raw, scheme = ckpt.read_config(args.checkpoint_path), Scheme(args.mode, args.groupsize)
    if raw.get("quantization") is not None:
        raise ValueError(f"{args.checkpoint_path} is quantized already; name the checkpoint it was made from")
    check_device(args.device)
    dtype = ckpt.parse_dtype(raw)
    specs, read_here = ckpt.model_tensors(args.checkpoint_path, dtype)  # first: it says at once if layers are missing
    source = ckpt.meta_model(raw)
    raw |= {"layout": "fused", "quantization": {"mode": scheme.mode, "groupsize": scheme.group_size}}
    target = ckpt.meta_model(raw)
    new_specs = ckpt.tensor_specs(target, dtype)
    output_path = args.output_path or ckpt.sibling(args.checkpoint_path, f"-{scheme}")

    def read(name: str) -> Tensor:
        return read_here(name).to(args.device)

    windows = calibration_windows(args, source.config) if args.mode == "int4-gptq" else None
    num_steps = len(linears(source)) - 1 + (0 if windows is None else 2 * len(source.layers) * len(windows))
    with (
        ckpt.new_folder(output_path) as folder,
        tqdm(total=num_steps, desc=args.mode, dynamic_ncols=True, disable=None) as bar,
    ):
        calibration = None
        if windows is not None:
            calibration = Calibration(source, read("embed_tokens.weight"), windows, args.act_order, bar.update)
        parts = quantized_parts(source, read, scheme, calibration, bar.update)
        pending: dict[str, Tensor] = {}

        def take(name: str) -> Tensor:
            while name not in pending:
                pending.update(next(parts))
            return pending.pop(name)

        ckpt.write_safetensors(folder / "model.safetensors", new_specs, take)
        ckpt.write_fused_config(args.checkpoint_path, raw, dtype, folder)
    if windows is not None:
        print(f"calibrated on {len(windows)} windows of {windows.shape[1]} tokens")
        if calibration and (warning := calibration.warning()):
            print(warning, file=sys.stderr)
    print(*summary(specs, new_specs, target), f"wrote {output_path}", sep="\n")


def summary(before: dict[str, Any], after: dict[str, Any], target: Transformer) -> Iterator[str]:
    """Say what becomes of each kind of tensor, one per line. before, after: the specs; target: on the meta device."""

    def megabytes(specs: dict[str, Any], kind: str) -> float:
        sizes = (shape.numel() * dtype.itemsize for name, (dtype, shape) in specs.items() if kind_of(name) == kind)
        return sum(sizes) / 1e6

    def kind_of(name: str) -> str:
        return name.split(".")[-2]

    kinds = dict.fromkeys(map(kind_of, after))
    totals = [sum(megabytes(specs, kind) for kind in kinds) for specs in (before, after)]
    forms = {name.rpartition(".")[2]: child for name, child in target.named_modules()}
    yield f"{'':26}{'stored as':34}{'MB before':>10}{'MB after':>10}"
    for kind in kinds:
        form = describe(forms[kind])
        yield f"{kind:26}{form:34}{megabytes(before, kind):10.3f}{megabytes(after, kind):10.3f}"
    yield f"{'all':60}{totals[0]:10.3f}{totals[1]:10.3f}"


def describe(module: nn.Module) -> str:
    if isinstance(module, Int8Linear):
        return "int8, a scale per channel"
    if isinstance(module, Int4Linear):
        rest = module.in_features % module.group_size
        return f"int4, groups of {module.group_size}" + (f", last of {rest}" if rest else "")
    return "as it was"


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    # checkpoint.py imports this file by its name: run that module and not a second copy with classes of its own.
    from quantize import main as command

    command()
