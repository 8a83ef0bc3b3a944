"""Try what may go wrong with a checkpoint: bytes of its files changed, and a run killed while it writes.

    python scripts/faults.py mutations --count 10000
    python scripts/faults.py kills --count 50

A changed file is read or refused in one line, and nothing else: no other exception, no crash, no endless loop. A killed
converter or quantizer leaves a whole folder or none, and running it again succeeds and clears up.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import collections
import datetime
import json
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import quantize
from checkpoint import eos_token_ids, load_model, random_model, read_config, save_hub_checkpoint
from cli import ArgumentParser, number, user_errors, write_whole
from scripts import convert_hf_checkpoint
from scripts.convert_hf_checkpoint import convert
from tokenizer import load_tokenizer

SOURCE = ROOT / "checkpoints/demo-draft"
fork = multiprocessing.get_context("fork")  # a child need not import torch again

# ---------------------------------------------------------------------------------------------------------------------
# Mutations

# What a number or a word of JSON may be turned into.
WORDS = [b"-1", b"0", b"1e999", b"18446744073709551616", b"4294967296", b"true", b"null", b"{}", b"[]", b'"\\ud800"',
         b"NaN", b'"../../etc/passwd"', b"F64", b"I8"]  # fmt: skip


def write_forms(folder: Path) -> dict[str, Path]:
    """Write the demo's draft in every form that is read; return the folders."""
    forms = {name: folder / name for name in ("single", "sharded", "pickled", "fused", "tokenizer.json", "int4")}
    tensors = load_file(SOURCE / "model.safetensors")
    for path in forms.values():
        shutil.copytree(SOURCE, path)
    for name in ("sharded", "pickled"):
        (forms[name] / "model.safetensors").unlink()
    torch.save(tensors, forms["pickled"] / "pytorch_model.bin")
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, forms["sharded"] / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (forms["sharded"] / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer_json(forms["tokenizer.json"])
    for name in ("fused", "int4"):
        shutil.rmtree(forms[name])
    convert(SOURCE, forms["fused"])
    quantize.run(quantize.parse_args(
        ["--checkpoint_path", str(SOURCE), "--mode", "int4", "--output_path", str(forms["int4"])]
    ))  # fmt: skip
    return forms


def write_tokenizer_json(folder: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    (folder / "tokenizer.model").unlink()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.save(str(folder / "tokenizer.json"))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes changed in one to three places."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        # Most of a file of weights is numbers, any of which is as good as another: its beginning is what is parsed.
        end = min(len(data), 2**14) if chance.random() < 0.9 else len(data)
        at, size = chance.randrange(end + 1), int(2 ** chance.uniform(0, 8))
        words = list(re.finditer(rb'-?[0-9][0-9.e+-]*|true|false|null|"[^"]*"', data[:end]))
        kind = chance.randrange(10)
        if kind == 0:
            data = data[:at] + chance.randbytes(1) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + chance.randbytes(size) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + size :]
        elif kind == 3:
            data = data[:at]
        elif kind == 4 or not words:
            source = chance.randrange(end + 1)
            data = data[:at] + data[source : source + size] + data[at:]
        else:  # what stays JSON goes deeper; padded, it keeps the length that a safetensors header has declared
            old, new = chance.choice(words), chance.choice([*WORDS, *(word[0] for word in words)])
            data = data[: old.start()] + new.ljust(len(old[0])) + data[old.end() :]
    return data


def read_all(path: Path) -> None:
    """Read all that the commands read of a checkpoint; .bin weights as the converter does."""
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode("def main(): <s> é\n"))
    eos_token_ids(path)
    if (path / "pytorch_model.bin").is_file():
        convert(path, path / "converted")
    else:
        load_model(path)


def mutation(forms: dict[str, Path], seed: int) -> tuple[str, str, float]:
    """Change one file of one form and read the folder; return which file, what came of it, and seconds of the CPU."""
    chance, began = random.Random(seed), time.process_time()
    path = forms[chance.choice(sorted(forms))]
    file = chance.choice([file for file in sorted(path.iterdir()) if file.suffix != ".md"])
    before = file.read_bytes()
    try:
        file.write_bytes(mutated(before, chance))
        read_all(path)
        outcome = "read"
    except (ValueError, OSError):
        outcome = "refused"
    except BaseException as error:  # Rust's panics are no Exception
        outcome = f"{type(error).__name__}: {error}"
    finally:
        file.write_bytes(before)
        shutil.rmtree(path / "converted", ignore_errors=True)
    return file.name, outcome, time.process_time() - began


def in_child(function: Callable[[Any], None], output: str | Path = os.devnull) -> Any:
    """Run function, which gets the sending end of a pipe, in a forked child; return the child and the other end.

    output: where its stdout and stderr go.
    """
    receiver, sender = fork.Pipe(duplex=False)

    def redirected() -> None:
        file = os.open(output, os.O_RDWR | os.O_CREAT)
        for standard in range(3):
            os.dup2(file, standard)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)  # a test runner has its own
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this one
        function(sender)

    child = fork.Process(target=redirected, daemon=True)
    child.start()
    sender.close()
    return child, receiver


def mutations(count: int, folder: Path, patience_s: float = 300) -> Iterator[tuple[int, str, str, float]]:
    """Yield seed, file, outcome and seconds of each mutation, made by a child that another replaces if it crashes."""
    seed = 0
    while seed < count:
        shutil.rmtree(folder, ignore_errors=True)
        forms = write_forms(folder)

        def work(sender: Any, begin: int = seed, forms: dict[str, Path] = forms) -> None:
            for each in range(begin, count):
                sender.send(mutation(forms, each))

        child, receiver = in_child(work)
        try:
            while seed < count:
                answered = receiver.poll(patience_s)
                seen = receiver.recv() if answered else ("?", f"no answer within {patience_s} s", patience_s)
                yield seed, *seen
                seed += 1
                if not answered:
                    break
        except EOFError:
            child.join()
            yield seed, "?", f"the process ended with status {child.exitcode}", 0.0
            seed += 1
        finally:
            child.kill()
            child.join()


def report_mutations(count: int) -> dict[str, Any]:
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults, longest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for seed, file, outcome, seconds in tqdm(mutations(count, Path(folder, "forms")), total=count, disable=None):
            known = outcome in ("read", "refused")
            outcomes[file][outcome if known else "fault"] += 1
            longest = max(longest, seconds)
            if not known:
                faults.append({"seed": seed, "file": file, "outcome": outcome})
    total = sum(outcomes.values(), collections.Counter())
    files = {file: dict(counts) for file, counts in sorted(outcomes.items())}
    return {**total, "longest_cpu_s": round(longest, 3), "faults": faults, "files": files}


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def commands(source: Path, output: Path) -> dict[str, Callable[[], None]]:
    """Return the commands that write a folder, from `source` to `output`."""
    int4 = ["--checkpoint_path", str(source), "--output_path", str(output), "--mode", "int4"]
    return {
        "convert": lambda: convert_hf_checkpoint.main(["--checkpoint_dir", str(source), "--output_dir", str(output)]),
        "quantize": lambda: quantize.main(int4),
    }


def write_source(folder: Path, num_layers: int) -> None:
    """Write a checkpoint of random weights that takes a while to convert: about 1.6 MB a layer."""
    raw = {**read_config(SOURCE), "hidden_size": 256, "num_hidden_layers": num_layers}
    folder.mkdir()
    save_hub_checkpoint(random_model(raw), raw, folder, torch.bfloat16)
    for file in SOURCE.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def contents(folder: Path) -> dict[str, bytes] | None:
    """Return every file of a folder, None where it is not there."""
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else None


def started(command: Callable[[], None], output: str | Path = os.devnull) -> Any:
    return in_child(lambda sender: command(), output)[0]


def kill(name: str, folder: Path, whole: dict[str, bytes], after_s: float) -> str:
    """Kill a command so long after it began to write; return what it left: "nothing", "whole" or a fault."""
    output = folder / "output"
    command = commands(folder / "source", output)[name]
    child = started(command)
    while child.is_alive() and not output.exists() and not any(folder.glob(".output.*.tmp")):
        time.sleep(0.0005)
    time.sleep(after_s)
    child.kill()
    child.join()
    left = contents(output)
    if left not in (None, whole):
        return "a folder that is not whole"
    shutil.rmtree(output, ignore_errors=True)
    second = started(command)
    second.join()
    if second.exitcode or contents(output) != whole:
        return f"a second run that ends with status {second.exitcode}"
    if (names := {file.name for file in folder.iterdir()}) != {"source", "output"}:
        return f"{sorted(names)} after a second run"
    shutil.rmtree(output)
    return "nothing" if left is None else "whole"


def kills(count: int, folder: Path, num_layers: int, seed: int = 0) -> Iterator[tuple[str, float, str]]:
    """Yield the command, seconds after its first byte and what it left, of so many kills of each command in turn."""
    write_source(folder / "source", num_layers)
    chance = random.Random(seed)
    whole, lasts = {}, {}
    for name, command in commands(folder / "source", folder / "output").items():
        child, began = started(command), time.perf_counter()
        child.join()
        lasts[name], whole[name] = time.perf_counter() - began, contents(folder / "output")
        assert child.exitcode == 0, f"{name} fails even if nobody kills it"
        shutil.rmtree(folder / "output")
    for _ in range(count):
        for name in lasts:
            after_s = chance.uniform(0, lasts[name])
            yield name, after_s, kill(name, folder, whole[name] or {}, after_s)


def report_kills(count: int) -> dict[str, Any]:
    left: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    moments = []
    with tempfile.TemporaryDirectory() as folder:
        for name, after_s, what in tqdm(kills(count, Path(folder), num_layers=60), total=2 * count, disable=None):
            left[name][what] += 1
            moments.append({"command": name, "after_s": round(after_s, 4), "left": what})
    faults = [moment for moment in moments if moment["left"] not in ("nothing", "whole")]
    return {**{name: dict(counts) for name, counts in left.items()}, "faults": faults, "kills": moments}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(args: argparse.Namespace) -> None:
    from scripts.benchmark import hardware

    if not args.output_dir.is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is not a folder that exists")
    machine = hardware("cpu")
    torch.set_num_threads(1)  # a forked child has no others
    found = {"mutations": report_mutations, "kills": report_kills}[args.what](args.count)
    report = {
        "command": shlex.join(["python", "scripts/faults.py", *sys.argv[1:]]),
        "hardware": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "count": args.count,
        **found,
    }
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine.lower()).split())
    path = args.output_dir / f"{datetime.date.today()}_{slug}_{args.what}.json"
    write_whole(path, json.dumps(report, indent=1) + "\n")
    for fault in found["faults"]:
        print(fault, file=sys.stderr)
    print(f"{len(found['faults'])} faults; wrote {path}", file=sys.stderr)
    sys.exit(1 if found["faults"] else 0)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("mutations", "kills"))
    parser.add_argument(
        "--count", type=number(int, 1), required=True, metavar="N", help="files changed; kills a command"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results", help="(results)")
    with user_errors():
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
