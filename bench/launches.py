"""Count the kernels that a step launches on a GPU, in the code that inductor writes for one, without a GPU.

    python scripts/launches.py --config configs/llama-2-7b.json

inductor is told that the CPU is an H100, and the model that it is on CUDA: nothing is run, and of a model two layers
are made. For every form of the weights, of a decode step and of the forward that verifies drafts: which kernels a layer
launches, and how many there are besides. Few of them read weights, and each takes its microseconds. The table goes to
results/<date>_<config>-<options>-launches.json.
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
import json
import os
import platform
import re
import shlex
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.utils import fresh_cache

import kernels
from checkpoint import DTYPES, meta_model, random_model
from cli import ArgumentParser, need_triton, user_errors, write_whole
from model import Transformer
from scripts.anatomy import OPTIONS
from scripts.benchmark import scheme
from scripts.measure import GREEDY, config_name, read_config_file, run_dtype, weight_forms
from speculate import verify
from steps import compiled, decode

H100 = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
)  # fmt: skip
NUM_LAYERS, NUM_SLOTS, NUM_DRAFTS = 2, 2048, 4
KINDS = {"poi": "pointwise", "red": "reduction", "per": "reduction"}  # others by inductor's word for them
# What our operators launch.
LAUNCHED = {
    "cuda_attention": ["attend_split", "combine_splits"],
    "cuda_int4_product": ["int4_product"],
    "cuda_int8_product": ["int8_product"],
}


class Driver:
    """Stands in for Triton's driver of a GPU, which would look for one."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def pretend() -> list[str]:
    """Let what follows in this process be compiled for a GPU; return the list that inductor's code is put in."""
    import triton

    import kernels_triton

    # That nothing can be run, here and in the processes that inductor starts.
    os.environ["PYTHONWARNINGS"] = "ignore:Could not find an active CPU backend"
    warnings.filterwarnings("ignore", "Could not find an active CPU backend")
    written: list[str] = []
    GraphLowering.save_output_code = staticmethod(written.append)
    DeviceProperties.create = classmethod(lambda cls, device: H100)  # type: ignore[assignment]
    triton.runtime.driver.set_active(Driver())
    config.cpu_backend = "triton"
    ir.is_cpu = lambda x: False  # which it asks before it computes something twice
    # On CUDA an input that begins at a multiple of 16 bytes is taken to do so always, and is loaded 16 bytes wide.
    torch._inductor.graph.should_assume_input_aligned = torch._inductor.utils.tensor_is_aligned  # type: ignore[assignment]
    kernels.for_cuda, kernels.library = lambda device: kernels_triton, lambda: None  # type: ignore[assignment]
    kernels.GPU = "cpu"
    # Of stacks, which are on the CPU here, they would make the layers of ATen's kernels.
    kernels.int8_layer, kernels.int4_layer = of_matrices(kernels.int8_layer), of_matrices(kernels.int4_layer)
    return written


def of_matrices(layer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda codes, *rest: layer(codes, *rest) if codes.ndim == 2 else None


def code_of(run: Callable[[], Any], written: list[str]) -> str:
    """Return the code that inductor writes for a compiled call."""
    written.clear()
    try:
        run()
    except RuntimeError:  # once the code is written, there is no GPU to load it
        if not written:
            raise
    [code] = written
    return code


def launches(code: str) -> tuple[list[list[str]], list[str]]:
    """Return what each layer launches, and what is launched besides, in the order of the code."""
    bodies = dict(re.findall(r"^(?:    )?def (\w*subgraph\w*|call)\(.*?\n(.*?)(?=^\S|^    def |\Z)", code, re.M | re.S))
    found: dict[str, list[str]] = {name: [] for name in bodies}
    for name, body in bodies.items():
        for line in body.splitlines():
            if match := re.match(r"\s*(?:triton_)?([a-z]+)_\w+\.run\(.*?((?:, \d+)*), stream", line):
                sizes = " x ".join(match[2].split(", ")[1:])
                found[name].append(f"{KINDS.get(match[1], match[1])} {sizes}".strip())
            elif match := re.match(r"\s*(?:\w+ = )?(?:torch\.ops\.\w+|aten|extern_kernels)\.(\w+)[\w.]*\(", line):
                found[name] += LAUNCHED.get(match[1], [match[1]])
    besides = found.pop("call")
    layers = [found[name] for name in re.findall(r"(\w*subgraph\w*)\(\w*args\w*\)", bodies["call"])]
    return layers, besides


@torch.inference_mode()
def steps_of(model: Transformer, written: list[str], settings: dict[str, Any]) -> dict[str, str]:
    """Return the code of each step; settings: of inductor, to be tried."""
    model.setup_caches(1, NUM_SLOTS)
    one, two = torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    drafted = torch.zeros(1, NUM_DRAFTS, dtype=torch.long)
    slots = torch.arange(NUM_SLOTS)
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "decode": (decode, (one, one, slots, GREEDY, None)),
        f"verify of {NUM_DRAFTS + 1}": (verify, (two, two, slots, drafted, GREEDY, None, None)),
    }
    codes = {}
    with fresh_cache():  # in which no code is found
        for name, (step, args) in calls.items():
            call = partial(compiled(step, "reduce-overhead", settings), model, *args)
            codes[name] = code_of(call, written)
    return codes


def run(args: argparse.Namespace) -> None:
    need_triton("launches.py")
    raw = read_config_file(args.config)
    dtype, forms = run_dtype(args, raw), weight_forms(args, raw)
    configs = [meta_model(form).config for form in forms.values()]  # which refuses what cannot be a model
    num_layers = configs[0].num_hidden_layers
    name = config_name(args.config)
    what = "-".join([name, *filter(None, [args.dtype]), *args.options, "launches"]).replace(" ", "-")
    path = args.output_dir / f"{datetime.date.today()}_{what}.json"
    if path.exists():
        raise ValueError(f"{path} exists already; remove it, or choose another --output_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = pretend()
    settings = {name: value for option in args.options for name, value in OPTIONS["cuda"][option].items()}
    entries = []
    for weights, form in forms.items():
        model = random_model(form | {"num_hidden_layers": NUM_LAYERS}, "cpu", dtype)
        for step, code in steps_of(model, written, settings).items():
            layers, besides = launches(code)
            if layers != layers[:1] * NUM_LAYERS:
                raise RuntimeError(f"the layers of a {step} step launch different kernels")
            total = num_layers * len(layers[0]) + len(besides)
            title = f"{weights or 'plain weights'}, {step}"
            print(f"{title}: {len(layers[0])} a layer, {len(besides)} besides, {total} a step")
            print("".join(f"    {kernel}\n" for kernel in layers[0]), end="", flush=True)
            entry = {"weights": weights or "plain", "step": step, "launches": total}
            entries.append(entry | {"a_layer": layers[0], "besides": besides})
    report = {
        "command": shlex.join(["python", "scripts/launches.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "ran_on_a_gpu": False,
        "config": name,
        "dtype": str(dtype).removeprefix("torch."),
        "num_layers": num_layers,
        "options": args.options,
        "steps": entries,
    }
    write_whole(path, json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a config.json; the weights are random")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the config's own")
    parser.add_argument("--quantize", type=scheme, nargs="*", default=[scheme("int8"), scheme("int4-g32")],
                        metavar="SCHEME", help="forms of the weights besides --dtype (int8 int4-g32)")  # fmt: skip
    parser.add_argument("--options", nargs="+", choices=OPTIONS["cuda"], default=[], metavar="OPTION",
                        help=f"settings of inductor: any of «{'», «'.join(OPTIONS['cuda'])}» (none)")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")
    args = parser.parse_args(argv)
    args.quantize = dict(args.quantize)
    return args


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
