"""Count the kernels that a step launches on a GPU, in the code that inductor writes for one, without a GPU.

    python -m bench.launches --config configs/llama-2-7b.json

inductor is told that the CPU is an H100, and the model that it is on CUDA: nothing is run, and of a model two layers
are made. For every form of the weights, of a decode step, of the forward that verifies drafts and, with --head, of a
whole round with an EAGLE-3 head in the shapes of a layer: which kernels a layer launches, and how many there are
besides. Few of them read weights, and each takes its microseconds. The table goes to
results/<date>_<config>-<options>-launches.json.
"""

import argparse
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.utils import fresh_cache

from bench import results
from bench.footprint import make_driver
from bench.ladder import OPTIONS
from bench.runner import GREEDY
from bench.subject import add_options, read_subject
from cli.arguments import need_triton
from cli.errors import user_errors
from eagle_checkpoint import random_head
from kernels.optimize import optimize_
from model import Transformer
from speculate import draft_and_verify, verify
from steps import compiled, decode

H100 = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
)  # fmt: skip
NUM_LAYERS, NUM_SLOTS, NUM_DRAFTS = 2, 2048, 4
HEAD = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "quantization_config": None,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 1]}  # fmt: skip
KINDS = {"poi": "pointwise", "red": "reduction", "per": "reduction"}  # others by inductor's word for them
# What our operators launch.
LAUNCHED = {
    "cuda_attention": ["attend_split", "combine_splits"],
    "cuda_int4_product": ["int4_product"],
    "cuda_int8_product": ["int8_product"],
}


def pretend() -> list[str]:
    """Let what follows in this process be compiled for a GPU; return the list that inductor's code is put in."""
    import triton

    import kernels.cuda  # noqa: F401  # which defines the operators

    # That nothing can be run, here and in the processes that inductor starts.
    os.environ["PYTHONWARNINGS"] = "ignore:Could not find an active CPU backend"
    warnings.filterwarnings("ignore", "Could not find an active CPU backend")
    codes: list[str] = []
    GraphLowering.save_output_code = staticmethod(codes.append)
    DeviceProperties.create = classmethod(lambda cls, device: H100)  # type: ignore[assignment]
    triton.runtime.driver.set_active(make_driver(90))
    config.cpu_backend = "triton"
    ir.is_cpu = lambda x: False  # which it asks before it computes something twice
    # On CUDA an input that begins at a multiple of 16 bytes is taken to do so always, and is loaded 16 bytes wide.
    torch._inductor.graph.should_assume_input_aligned = torch._inductor.utils.tensor_is_aligned  # type: ignore[assignment]
    return codes


def list_launches(code: str) -> tuple[list[list[str]], list[str]]:
    """Return what each layer launches, and what is launched besides, in the order of the code."""
    bodies = dict(re.findall(r"^(?:    )?def (\w*subgraph\w*|call)\(.*?\n(.*?)(?=^\S|^    def |\Z)", code, re.M | re.S))
    names: dict[str, list[str]] = {function: [] for function in bodies}
    for function, body in bodies.items():
        for line in body.splitlines():
            if match := re.match(r"\s*(?:triton_)?([a-z]+)_\w+\.run\(.*?((?:, \d+)*), stream", line):
                sizes = " x ".join(match[2].split(", ")[1:])
                names[function].append(f"{KINDS.get(match[1], match[1])} {sizes}".strip())
            elif match := re.match(r"\s*(?:\w+ = )?(?:torch\.ops\.\w+|aten|extern_kernels)\.(\w+)[\w.]*\(", line):
                names[function] += LAUNCHED.get(match[1], [match[1]])
    layers = [names[function] for function in re.findall(r"(\w*subgraph\w*)\(\w*args\w*\)", bodies["call"])]
    return layers, names["call"]


@torch.inference_mode()
def make_steps(model: Transformer, head_raw: dict[str, Any] | None) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """Yield each step's name, itself and its arguments; last the round of a head, for which a model stores taps."""
    model.setup_caches(1, NUM_SLOTS)
    one, two, latest = (torch.zeros(shape, dtype=torch.long) for shape in ((1,), (1, 2), (1, NUM_DRAFTS + 1)))
    slots, drafted = torch.arange(NUM_SLOTS), latest[:, 1:].clone()
    yield "decode", decode, (model, one, one, slots, GREEDY, None)
    yield f"verify of {NUM_DRAFTS + 1}", verify, (model, two, two, slots, drafted, GREEDY, None, None)
    if head_raw:
        head = random_head(head_raw, model, optimize=False)
        optimize_(head, "cuda")
        for each in (model, head):
            each.setup_caches(1, NUM_SLOTS)
        head.follow_(model)
        args = model, latest, latest, slots, head, NUM_DRAFTS, GREEDY, None
        yield f"round of a head, {NUM_DRAFTS} drafts", draft_and_verify, args


def write_code(codes: list[str], step: Callable[..., Any], args: Any) -> str:
    """Return the code that inductor writes for a compiled step."""
    codes.clear()
    try:
        with torch.inference_mode(), fresh_cache():  # in which there is no code yet
            step(*args)
    except RuntimeError:  # once the code is written, there is no GPU to load it
        if not codes:
            raise
    [code] = codes
    return code


def run(args: argparse.Namespace) -> None:
    need_triton("bench.launches")
    subject = read_subject(args)
    num_layers = subject.raw["num_hidden_layers"]
    what = "-".join([subject.name, *filter(None, [args.dtype]), *args.options, "launches"]).replace(" ", "-")
    shapes: dict[str, Any] = {"config": subject.name, "dtype": subject.dtype_name, "num_layers": num_layers}
    report = results.begin("launches", args.output_dir, what, **shapes, options=args.options, steps=[])
    codes = pretend()
    settings = {name: value for option in args.options for name, value in OPTIONS["cuda"][option].items()}
    for weights in subject.forms:
        model = subject.with_layers(NUM_LAYERS).model(weights, "cpu", optimize=False)
        optimize_(model, "cuda")
        for name, step, inputs in make_steps(model, subject.raw | HEAD if args.head else None):
            layers, besides = list_launches(write_code(codes, compiled(step, "reduce-overhead", settings), inputs))
            drafting, layers = layers[:-NUM_LAYERS], layers[-NUM_LAYERS:]  # a head's layers come first
            if layers != layers[:1] * NUM_LAYERS:
                raise RuntimeError(f"the layers of a {name} step launch different kernels")
            besides += [kernel for layer in drafting for kernel in layer]
            total = num_layers * len(layers[0]) + len(besides)
            entry = {"weights": weights or "plain", "step": name, "launches": total}
            report.content["steps"].append(entry | {"a_layer": layers[0], "besides": besides})
            print("{weights} weights, {step}: {launches} a step,".format(**entry), f"{len(besides)} besides layers of")
            print("".join(f"    {kernel}\n" for kernel in layers[0]), end="", flush=True)
    report.finish()


def main(argv: list[str] | None = None) -> None:
    parser = results.make_parser(__doc__)
    add_options(parser)
    parser.add_argument("--options", nargs="+", choices=OPTIONS["cuda"], default=[], metavar="OPTION",
                        help=f"settings of inductor: any of «{'», «'.join(OPTIONS['cuda'])}» (none)")  # fmt: skip
    parser.add_argument("--head", action="store_true", help="count a round with an EAGLE-3 head too")
    with user_errors():
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
