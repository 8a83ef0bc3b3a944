"""Measure decoding on random weights against the memory roof of the same machine, and draw the result.

    python scripts/benchmark.py --config configs/tinyllama-1.1b.json --device cpu
    python scripts/benchmark.py --config configs/tinyllama-1.1b.json --device cpu --speculate

The roof comes first (a streaming read, a matrix product), then each rung after a warm-up, in turns: A B A B. What is
finished is written at once to results/<date>_<hardware>_<name>.json, so that an interrupted run keeps it.
"""

import argparse
import datetime
import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import DTYPES, load_model, parse_dtype, random_model, read_config, read_json
from cli import ArgumentParser, number, user_errors, write_whole
from generate import generate
from model import Transformer
from speculate import Speculation, accept, count_leading, draft, expected_tokens, levels_below, verify
from steps import Sampling, compiled, decode, prefill, visible_slots
from tokenizer import load_tokenizer

GREEDY = Sampling(temperature=0)


def seconds(run: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_roof(device: str) -> dict[str, float]:
    """Return the best of several streaming reads of 1 GiB, in GB/s, and of bf16 products of 2048 x 2048, in TFLOP/s."""
    data = torch.ones(2**28, device=device)
    a = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    read = [seconds(data.sum, device) for _ in range(3)]
    product = [seconds(lambda: a @ a, device) for _ in range(3)]
    return {"read_gb_per_s": data.nbytes / min(read) / 1e9, "gemm_tflop_per_s": 2 * 2048**3 / min(product) / 1e12}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]} {torch.get_num_threads()} threads"


def decode_rate(model: Transformer, run_decode: Callable[..., Any], num_tokens: int) -> float:
    """Return tokens a second of plain greedy decoding after a prompt of 6 tokens."""
    arrivals = [
        time.perf_counter() for _ in generate(model, [[1, 2, 3, 4, 5, 6]], num_tokens, GREEDY, decode=run_decode)
    ]
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


def prefill_rate(model: Transformer, run_prefill: Callable[..., Any], length: int) -> float:
    """Return prompt tokens a second until the first new token is known."""
    prompt = [i % model.config.vocab_size for i in range(length)]
    return length / seconds(lambda: list(generate(model, [prompt], 1, GREEDY, prefill=run_prefill)), "cpu")


@torch.inference_mode()
def step_ms(model: Transformer, run_decode: Callable[..., Any], position: int, count: int = 10) -> float:
    """Return the median milliseconds of a decode step at `position`."""
    device = model.device
    tokens = torch.tensor([1], device=device)
    positions = torch.tensor([position], device=device)
    slots = visible_slots(torch.arange(model.max_seq_length, device=device), position + 1)
    times = [
        seconds(lambda: run_decode(model, tokens, positions, slots, GREEDY, None), device.type)
        for _ in range(count + 1)
    ]
    return statistics.median(times[1:]) * 1e3


@dataclass
class Rung:
    """One thing to measure: with caches of `cache_length`, in turns with the others of its group."""

    group: str
    name: str
    unit: str
    cache_length: int
    measure: Callable[[Transformer], float]
    weights: str = ""  # the scheme they are quantized by
    samples: list[float] = field(default_factory=list)

    def take(self, models: dict[str, Transformer]) -> float:
        model = models[self.weights]
        model.setup_caches(1, self.cache_length)
        return self.measure(model)


def make_models(args: argparse.Namespace, raw: dict[str, Any], dtype: torch.dtype) -> dict[str, Transformer]:
    """Make the model that the config describes, and one for each scheme of --quantize, with random weights."""
    models = {"": random_model(raw, args.device, dtype)}
    for scheme in args.quantize:
        mode, _, group_size = scheme.partition("-g")
        quantization = {"mode": mode, "groupsize": int(group_size) if group_size else None}
        models[scheme] = random_model(raw | {"layout": "fused", "quantization": quantization}, args.device, dtype)
    return models


def make_rungs(args: argparse.Namespace) -> list[Rung]:
    modes: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "eager": (prefill, decode),
        "compile": (compiled(prefill), compiled(decode, "reduce-overhead" if args.device.startswith("cuda") else None)),
    }
    length = 64 * (2 + max(args.new_tokens, *args.prefill) // 64)
    rungs = []
    for mode, (run_prefill, run_decode) in modes.items():
        rate = partial(decode_rate, run_decode=run_decode, num_tokens=args.new_tokens)
        rungs.append(Rung("decode", mode, "tok/s", length, rate))
        for size in args.prefill:
            rate = partial(prefill_rate, run_prefill=run_prefill, length=size)
            rungs.append(Rung(f"prefill {size}", f"{mode}, prefill of {size}", "tok/s", length, rate))
        for scheme in args.quantize:
            rate = partial(decode_rate, run_decode=run_decode, num_tokens=args.new_tokens)
            rungs.append(Rung("decode", f"{mode}, {scheme}", "tok/s", length, rate, scheme))
        for size in (256, 8192):
            step = partial(step_ms, run_decode=run_decode, position=100)
            rungs.append(Rung(f"{mode}, cache size", f"{mode}, step at 100, cache of {size}", "ms", size, step))
    return sorted(rungs, key=lambda rung: rung.group)


# ---------------------------------------------------------------------------------------------------------------------
# Speculation


ACCEPTANCE = 0.7


def accept_by_chance(
    logits: Tensor, drafted: Tensor, q: Tensor | None, sampling: Sampling, noise: Any
) -> tuple[Tensor, Tensor]:
    """Accept each draft with probability ACCEPTANCE, whatever it is: random weights have no drafts worth accepting.

    The text is not the target's. This times the machinery, and stands here so that no command can reach it.
    """
    accepted = torch.rand(drafted.shape, device=drafted.device) < ACCEPTANCE
    num_accepted = count_leading(accepted)
    return num_accepted, logits.argmax(dim=-1).gather(1, num_accepted.unsqueeze(1)).squeeze(1)


class Timed:
    """A step that remembers how long each of its calls took."""

    def __init__(self, step: Callable[..., Any], device: str):
        self.step, self.device = step, device
        self.times: list[float] = []

    def __call__(self, *args: Any) -> Any:
        result = None

        def call() -> None:
            nonlocal result
            result = self.step(*args)

        self.times.append(seconds(call, self.device))
        return result


@dataclass
class Duel:
    """Decode of one target, plain and with speculation, in turns."""

    name: str
    target: Transformer
    draft_model: Transformer
    prompt: list[int]
    num_tokens: int
    accept: Callable[..., tuple[Tensor, Tensor]] = accept
    levels: list[tuple[int, ...]] = field(default_factory=list)  # a speculation each: one number is a fixed k
    eager: bool = False

    def run(self, num_samples: int, mode: str | None) -> list[dict[str, Any]]:
        device = str(self.target.device)
        make = (lambda step, mode=None: step) if self.eager else compiled
        run_decode, run_draft = Timed(make(decode, mode), device), Timed(make(draft, mode), device)
        run_verify = Timed(make(partial(verify, accept=self.accept), mode), device)
        run_prefill = make(prefill)
        max_k = max(max(levels) for levels in self.levels)
        length = 64 * (2 + (len(self.prompt) + self.num_tokens + max_k) // 64)
        for model in (self.target, self.draft_model):
            model.setup_caches(1, length)

        def take(levels: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
            speculation = Speculation(self.draft_model, max_k, levels, run_draft, run_verify, run_prefill)
            timed = (run_decode, run_draft, run_verify)
            for step in timed:
                step.times.clear()
            steps = generate(
                self.target, [self.prompt], num_tokens, GREEDY, prefill=run_prefill, decode=run_decode,
                speculation=speculation if levels else None,
            )  # fmt: skip
            arrivals = [(time.perf_counter(), len(row)) for [row] in steps]
            [counts] = speculation.accept_counts if levels else [[len(arrivals) - 1]]
            # What the last round gave beyond the text's end counts too: it took its time.
            tokens = sum((n + 1) * count for n, count in enumerate(counts))
            medians = [statistics.median(step.times) * 1e3 if step.times else None for step in timed]
            return {
                "tok_per_s": tokens / (arrivals[-1][0] - arrivals[0][0]),
                "accept_counts": counts,
                "num_drafted": speculation.num_drafted,
                **dict(zip(("decode_ms", "draft_ms", "verify_ms"), medians, strict=True)),
            }

        rungs: list[tuple[int, ...]] = [(), *self.levels]
        for levels in {(k,) for rung in rungs for k in rung if k}:
            take(levels, 3)
        samples: dict[tuple[int, ...], list[dict[str, Any]]] = {rung: [] for rung in rungs}
        for turn in range(num_samples + 1):
            for rung, taken in samples.items():
                sample = take(rung, self.num_tokens)
                if turn > 0:  # the first warms up
                    taken.append(sample)
        return [self.summary(rung, taken, samples[()]) for rung, taken in samples.items()]

    def summary(self, levels: tuple[int, ...], samples: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Any:
        def median(key: str, of: list[dict[str, Any]] = samples) -> float:
            return statistics.median(sample[key] for sample in of)

        entry: dict[str, Any] = {"target": self.name, "levels": levels, "samples": samples}
        # By turns, since the machine's own speed moves between them.
        ratios = [sample["tok_per_s"] / other["tok_per_s"] for sample, other in zip(samples, plain, strict=True)]
        entry |= {"tok_per_s": median("tok_per_s"), "speedup": statistics.median(ratios)}
        if len(levels) != 1:
            return entry
        [k] = levels
        counts = [sum(column) for column in zip(*(sample["accept_counts"] for sample in samples), strict=True)]
        accepted = sum(n * count for n, count in enumerate(counts))
        a = accepted / (accepted + sum(counts[:k]))
        step_ms = median("decode_ms", plain)
        c = median("draft_ms") / k / step_ms
        promised = expected_tokens(a, k) / (c * k + 1)
        entry |= {"k": k, "a": a, "c": c, "verify_steps": median("verify_ms") / step_ms}
        return entry | {"formula": promised, "share_of_formula": entry["speedup"] / promised}


def make_duels(args: argparse.Namespace, raw: dict[str, Any]) -> Iterator[Duel]:
    demo, demo_draft = ROOT / "checkpoints" / "demo", ROOT / "checkpoints" / "demo-draft"
    prompt = load_tokenizer(demo).encode("class Stack:\n    def __init__(self, items=None):\n")
    fixed = [(k,) for k in args.speculate_k]
    adaptive = levels_below(max(args.speculate_k))
    target = load_model(demo, args.device)
    draft_model = load_model(demo_draft, args.device)
    random_draft = random_model(read_config(demo_draft), args.device)
    for eager in (True, False):
        how, long = "eager" if eager else "compiled", max(200, args.new_tokens)
        levels = [*fixed, adaptive]
        yield Duel(f"demo, its draft, {how}", target, draft_model, prompt, long, levels=levels, eager=eager)
        yield Duel(f"demo, a random draft, {how}", target, random_draft, prompt, long, levels=[adaptive], eager=eager)
    dtype = DTYPES[args.dtype] if args.dtype else parse_dtype(raw)
    target = random_model(raw, args.device, dtype)
    draft_model = random_model(raw | {"num_hidden_layers": 2}, args.device, dtype, seed=1)
    name, prompt = args.config.stem, [1, 2, 3, 4, 5, 6]
    yield Duel(
        f"{name}, 2 layers of it, each draft accepted with probability {ACCEPTANCE}",
        target, draft_model, prompt, args.new_tokens, accept_by_chance, [*fixed, adaptive],
    )  # fmt: skip
    yield Duel(f"{name}, 2 random layers", target, draft_model, prompt, max(200, args.new_tokens), levels=[adaptive])


def run_speculation(args: argparse.Namespace) -> None:
    """Measure speculation against the paper's formula, with a and c of the same run."""
    report, path = new_report(args), result_path(args)
    report["speculation"] = []
    for duel in make_duels(args, read_json(args.config)):
        entries = duel.run(args.samples, "reduce-overhead" if args.device.startswith("cuda") else None)
        report["speculation"] += entries
        print(duel.name)
        for entry in entries:
            what = f"k {entry['levels']}" if entry["levels"] else "plain"
            line = f"  {what:20} {entry['tok_per_s']:8.2f} tok/s  {entry['speedup']:5.2f}x"
            if "formula" in entry:
                line += "  a {a:.2f}  c {c:.2f}  verify {verify_steps:.2f} steps  formula {formula:.2f}x".format(
                    **entry
                )
                line += f"  {entry['share_of_formula']:.0%} of it"
            print(line, flush=True)
        write_whole(path, json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def result_path(args: argparse.Namespace) -> Path:
    name = "-".join("".join(c if c.isalnum() else " " for c in hardware(args.device).lower()).split())
    what = args.name or ("speculation" if args.speculate else "decode")
    path = args.output_dir / f"{datetime.date.today()}_{name}_{what}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def new_report(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "config": args.config.stem if args.config.stem != "config" else args.config.parent.name,
        "hardware": hardware(args.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()},
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the decode rungs as bars under the roof."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fixed"  # the same figures give the same file
    from matplotlib import pyplot

    bars = [rung for rung in report["rungs"] if rung["group"] == "decode"]
    size = {bar["name"]: report["bytes_per_token"][bar["weights"] or "plain"] for bar in bars}
    roofs = [report["roof"]["read_gb_per_s"] * 1e9 / size[bar["name"]] for bar in bars]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.55 * len(bars)))
    drawn = axes.barh([b["name"] for b in bars], [b["median"] for b in bars], color="#4878a8", height=0.6)
    axes.bar_label(drawn, [f" {b['median']:.1f}" for b in bars])
    for i, roof in enumerate(roofs):
        axes.plot([roof, roof], [i - 0.4, i + 0.4], color="#b04030", linestyle="--")
    axes.annotate("memory roof", (roofs[0], 1.02), xycoords=("data", "axes fraction"), color="#b04030", ha="center")
    axes.set_xlim(0, max(roofs) * 1.12)
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens a second, {report['config']}, {report['dtype']}, batch 1, {report['hardware']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def summary(rung: Rung, report: dict[str, Any]) -> dict[str, Any]:
    median = statistics.median(rung.samples)
    entry: dict[str, Any] = {"group": rung.group, "name": rung.name, "unit": rung.unit, "weights": rung.weights}
    entry |= {"median": median, "samples": rung.samples}
    if rung.group == "decode":
        entry["gb_per_s"] = median * report["bytes_per_token"][rung.weights or "plain"] / 1e9
        entry["share_of_roof"] = entry["gb_per_s"] / report["roof"]["read_gb_per_s"]
    return entry


def run(args: argparse.Namespace) -> None:
    raw = read_json(args.config)
    dtype = DTYPES[args.dtype] if args.dtype else parse_dtype(raw)
    path = result_path(args)
    models = make_models(args, raw, dtype)
    report: dict[str, Any] = {
        **new_report(args),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_per_token": {name or "plain": model.step_weight_bytes for name, model in models.items()},
        "roof": measure_roof(args.device),
        "rungs": [],
    }
    rungs = make_rungs(args)
    bar = tqdm(total=len(rungs) * (args.samples + 1), unit="sample", dynamic_ncols=True)
    for _, members in itertools.groupby(rungs, key=lambda rung: rung.group):
        group = list(members)
        for turn in range(args.samples + 1):
            # In turns with the rungs, since other work on the machine comes and goes; the best is the roof.
            roof = measure_roof(args.device)
            report["roof"] = {key: max(value, roof[key]) for key, value in report["roof"].items()}
            for rung in group:
                value = rung.take(models)
                if turn > 0:  # the first warms up and compiles
                    rung.samples.append(value)
                bar.update()
        for rung in group:
            entry = summary(rung, report)
            report["rungs"].append(entry)
            share = f", {entry['share_of_roof']:.0%} of the roof" if "share_of_roof" in entry else ""
            bar.write(f"{rung.name:36} {entry['median']:9.2f} {rung.unit}{share}", file=sys.stdout)
        write_whole(path, json.dumps(report, indent=1) + "\n")
    bar.close()
    draw(report, path.with_suffix(".svg"))
    print(f"wrote {path} and {path.with_suffix('.svg').name}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a config.json; the weights are random")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the config's own")
    parser.add_argument("--samples", type=number(int, 1), default=5, help="of each rung (5)")
    parser.add_argument("--new_tokens", type=number(int, 2), default=64, help="in a decode sample (64)")
    parser.add_argument(
        "--prefill", type=number(int, 1), nargs="*", default=[128, 512], help="prompt lengths (128 512)"
    )
    parser.add_argument("--quantize", nargs="*", default=["int8", "int4-g32"], help="schemes (int8 int4-g32)")
    parser.add_argument("--speculate", action="store_true", help="measure speculation, and nothing else")
    parser.add_argument("--speculate_k", type=number(int, 1), nargs="+", default=[1, 3, 5], help="drafts (1 3 5)")
    parser.add_argument("--name", help="what the result file is called (decode, or speculation)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")
    args = parser.parse_args(argv)
    with user_errors():
        (run_speculation if args.speculate else run)(args)


if __name__ == "__main__":
    main()
