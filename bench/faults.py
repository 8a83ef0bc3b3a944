"""Try what may go wrong with a checkpoint: bytes of its files changed, and a run killed while it writes.

    python -m bench.faults mutations --count 10000
    python -m bench.faults kills --count 50

A changed file is read or refused in one line, and nothing else: no other exception, no crash, no endless loop. A killed
converter or quantizer leaves a whole folder or none, and running it again succeeds and clears up.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import collections
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import quantize
from bench import results
from checkpoint import load_model, random_model, save_hub_checkpoint
from cli.arguments import ArgumentParser, number
from cli.errors import user_errors
from config import eos_token_ids, read_config
from scripts import convert_hf_checkpoint
from tokenizer import load_tokenizer

SOURCE = results.ROOT / "checkpoints/demo-draft"
fork = multiprocessing.get_context("fork")  # a child need not import torch again


def make_commands(source: Path, output: Path) -> dict[str, Callable[[], None]]:
    """Return the commands that write a folder, from `source` to `output`."""
    int4 = ["--checkpoint_path", str(source), "--output_path", str(output), "--mode", "int4"]
    return {
        "convert": lambda: convert_hf_checkpoint.main(["--checkpoint_dir", str(source), "--output_dir", str(output)]),
        "quantize": lambda: quantize.main(int4),
    }


def start_child(function: Callable[[], None], output: str | Path = os.devnull) -> Any:
    """Run a function in a forked child, whose stdout and stderr go to a file; return the child."""

    def run() -> None:
        file = os.open(output, os.O_RDWR | os.O_CREAT)
        for standard in range(3):
            os.dup2(file, standard)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)  # a test runner has its own
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this one
        function()

    child = fork.Process(target=run, daemon=True)
    child.start()
    return child


# ---------------------------------------------------------------------------------------------------------------------
# Mutations

# What a number or a word of JSON may be turned into.
WORDS = [b"-1", b"0", b"1e999", b"18446744073709551616", b"4294967296", b"true", b"null", b"{}", b"[]", b'"\\ud800"',
         b"NaN", b'"../../etc/passwd"', b"F64", b"I8"]  # fmt: skip


def write_forms(folder: Path) -> list[Path]:
    """Write the demo's draft in every form that is read; return the folders."""
    tensors = load_file(SOURCE / "model.safetensors")
    single, sharded, pickled, json_tokenizer = (folder / f"form{i}" for i in range(4))
    for path in (single, sharded, pickled, json_tokenizer):
        shutil.copytree(SOURCE, path)
    for path in (sharded, pickled):
        (path / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, sharded / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (json_tokenizer / "tokenizer.model").unlink()
    write_tokenizer_json(json_tokenizer / "tokenizer.json")
    outputs = [folder / name for name in ("convert", "quantize")]
    for path in outputs:
        make_commands(SOURCE, path)[path.name]()
    return [single, sharded, pickled, json_tokenizer, *outputs]


def write_tokenizer_json(path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.save(str(path))


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes changed in one to three places."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        # Most of a file of weights is numbers, any of which is as good as another: its beginning is what is parsed.
        limit = min(len(data), 2**14) if chance.random() < 0.9 else len(data)
        words = list(re.finditer(rb'-?[0-9][0-9.e+-]*|true|false|null|"[^"]*"', data[:limit]))
        if words and chance.random() < 0.5:  # what stays JSON goes deeper
            word = chance.choice(words)
            begin, end, new = *word.span(), chance.choice([*WORDS, *(other[0] for other in words)])
            new = new.ljust(len(word[0]))  # so that it keeps the length that a safetensors header declares
        else:
            begin, source = (chance.randrange(limit + 1) for _ in range(2))
            size = int(2 ** chance.uniform(0, 8))
            end, new = chance.choice([
                (begin + 1, chance.randbytes(1)), (begin, chance.randbytes(size)), (begin + size, b""),
                (len(data), b""), (begin, data[source : source + size]),
            ])  # fmt: skip
        data = data[:begin] + new + data[end:]
    return data


def read_all(path: Path) -> None:
    """Read all that the commands read of a checkpoint; .bin weights as the converter does."""
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode("def main(): <s> é\n"))
    eos_token_ids(path)
    if (path / "pytorch_model.bin").is_file():
        convert_hf_checkpoint.convert(path, path / "converted")
    else:
        load_model(path)


def try_mutation(forms: list[Path], seed: int) -> tuple[str, str, float]:
    """Change one file of one form and read the folder; return which file, what came of it, and seconds of the CPU."""
    chance, began = random.Random(seed), time.process_time()
    path = chance.choice(forms)
    file = chance.choice([file for file in sorted(path.iterdir()) if file.suffix != ".md"])
    before = file.read_bytes()
    try:
        file.write_bytes(mutate(before, chance))
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


def try_mutations(count: int, folder: Path, patience_s: int = 300) -> Iterator[tuple[int, str, str, float]]:
    """Yield seed, file, outcome and seconds of each mutation, made by a child that another replaces if it crashes.

    SIGALRM lets it crash where it does not answer.
    """
    seed = 0
    while seed < count:
        shutil.rmtree(folder, ignore_errors=True)
        forms = write_forms(folder)
        receiver, sender = fork.Pipe(duplex=False)

        def work(first: int = seed, forms: list[Path] = forms, sender: Any = sender) -> None:
            for i in range(first, count):
                signal.alarm(patience_s)
                sender.send(try_mutation(forms, i))

        child = start_child(work)
        sender.close()
        try:
            while seed < count:
                yield seed, *receiver.recv()
                seed += 1
        except EOFError:
            child.join()
            yield seed, "?", f"the process ended with status {child.exitcode}", 0.0
            seed += 1
        finally:
            child.kill()
            child.join()


def report_mutations(count: int, folder: Path) -> dict[str, Any]:
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults, longest = [], 0.0
    for seed, file, outcome, seconds in tqdm(try_mutations(count, folder / "forms"), total=count, disable=None):
        is_fault = outcome not in ("read", "refused")
        files[file]["fault" if is_fault else outcome] += 1
        faults += [{"seed": seed, "file": file, "outcome": outcome}] * is_fault
        longest = max(longest, seconds)
    total = sum(files.values(), collections.Counter())
    return {**total, "longest_cpu_s": round(longest, 3), "faults": faults, "files": dict(sorted(files.items()))}


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def write_source(folder: Path, num_layers: int) -> None:
    """Write a checkpoint of random weights that takes a while to convert: about 1.6 MB a layer."""
    raw = {**read_config(SOURCE), "hidden_size": 256, "num_hidden_layers": num_layers}
    folder.mkdir()
    save_hub_checkpoint(random_model(raw, optimize=False), raw, folder, torch.bfloat16)
    for file in SOURCE.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def read_folder(folder: Path) -> dict[str, bytes] | None:
    """Return every file of a folder, None where it is not there."""
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else None


def kill(name: str, folder: Path, whole: dict[str, bytes] | None, after_s: float) -> str:
    """Kill a command so long after it began to write; return what it left: "nothing", "whole" or a fault."""
    output = folder / "output"
    command = make_commands(folder / "source", output)[name]
    child = start_child(command)
    while child.is_alive() and not output.exists() and not any(folder.glob(".output.*.tmp")):
        time.sleep(0.0005)
    time.sleep(after_s)
    child.kill()
    child.join()
    left = read_folder(output)
    if left not in (None, whole):
        return "a folder that is not whole"
    shutil.rmtree(output, ignore_errors=True)
    second = start_child(command)
    second.join()
    if second.exitcode or read_folder(output) != whole:
        return f"a second run that ends with status {second.exitcode}"
    if (names := {file.name for file in folder.iterdir()}) != {"source", "output"}:
        return f"{sorted(names)} after a second run"
    shutil.rmtree(output)
    return "nothing" if left is None else "whole"


def try_kills(count: int, folder: Path, num_layers: int, seed: int = 0) -> Iterator[tuple[str, float, str]]:
    """Yield the command, seconds after its first byte and what it left, of so many kills of each command in turn."""
    write_source(folder / "source", num_layers)
    chance = random.Random(seed)
    whole, lengths_s = {}, {}
    for name, command in make_commands(folder / "source", folder / "output").items():
        child, began = start_child(command), time.perf_counter()
        child.join()
        lengths_s[name], whole[name] = time.perf_counter() - began, read_folder(folder / "output")
        assert child.exitcode == 0, f"{name} fails even if nobody kills it"
        shutil.rmtree(folder / "output")
    for _ in range(count):
        for name, length_s in lengths_s.items():
            after_s = chance.uniform(0, length_s)
            yield name, after_s, kill(name, folder, whole[name], after_s)


def report_kills(count: int, folder: Path) -> dict[str, Any]:
    tries = tqdm(try_kills(count, folder, num_layers=60), total=2 * count, disable=None)
    moments = [{"command": name, "after_s": round(after_s, 4), "left": left} for name, after_s, left in tries]
    commands = {moment["command"]: collections.Counter[str]() for moment in moments}
    for moment in moments:
        commands[moment["command"]][moment["left"]] += 1
    faults = [moment for moment in moments if moment["left"] not in ("nothing", "whole")]
    return {**commands, "faults": faults, "kills": moments}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(args: argparse.Namespace) -> None:
    header = results.make_header("faults", "cpu")
    path = results.new_path(args.output_dir, results.make_slug(header["hardware"]), args.what)
    torch.set_num_threads(1)  # a forked child has no others
    report = {"mutations": report_mutations, "kills": report_kills}[args.what]
    with tempfile.TemporaryDirectory() as folder:
        results.finish(path, {**header, "count": args.count, **report(args.count, Path(folder))})


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("mutations", "kills"))
    parser.add_argument(
        "--count", type=number(int, 1), required=True, metavar="N", help="files changed; kills a command"
    )
    results.add_output_dir(parser)
    with user_errors():
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
