"""Try what may go wrong with a checkpoint: bytes of its files changed, and a run killed while it writes.

    python -m bench.faults mutations --count 10000
    python -m bench.faults kills --count 50

A changed file is read or refused in one line, and nothing else: no other exception, no crash, no endless loop. A killed
converter or quantizer leaves a whole folder or none, and running it again succeeds and clears up.
"""

import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

import quantize
from bench import results
from bench.subject import quantize_options, write_random_folder
from checkpoint import load_model
from cli.arguments import number
from cli.errors import user_errors
from config import eos_token_ids, read_config
from linears import Form
from scripts import convert_hf_checkpoint
from tokenizer import load_tokenizer

SOURCE = results.ROOT / "checkpoints/demo-draft"
PATIENCE_S = 300  # with a changed file
fork = multiprocessing.get_context("fork")  # a child need not import torch again
Folder = dict[str, bytes] | None  # every file by its name; None where there is no folder


def make_commands(source: Path, output: Path) -> dict[str, Callable[[], None]]:
    """Return the commands that write a folder, from `source` to `output`."""
    int4 = quantize_options(Form(4, 32, has_zeros=True), source, output)
    return {
        "convert": lambda: convert_hf_checkpoint.main(["--checkpoint_dir", str(source), "--output_dir", str(output)]),
        "quantize": lambda: quantize.main(int4),
    }


def silence(output: str | Path = os.devnull) -> None:
    """Let a forked child write to a file, and leave Ctrl-C to its parent, which ends this one."""
    file = os.open(output, os.O_RDWR | os.O_CREAT)
    for standard in range(3):
        os.dup2(file, standard)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)  # a test runner has its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_child(command: Callable[[], None], output: str | Path = os.devnull) -> Any:
    """Run a command in a forked child, whose stdout and stderr go to a file; return the child."""

    def run() -> None:
        silence(output)
        command()

    child = fork.Process(target=run, daemon=True)
    child.start()
    return child


# What a number or a word of JSON may be turned into.
WORDS = [b"-1", b"0", b"1e999", b"18446744073709551616", b"4294967296", b"true", b"null", b"{}", b"[]", b'"\\ud800"',
         b"NaN", b'"../../etc/passwd"', b"F64", b"I8"]  # fmt: skip


def write_forms(folder: Path) -> list[Path]:
    """Write the demo's draft in every form that is read; return the folders."""
    tensors = load_file(SOURCE / "model.safetensors")
    single, sharded, pickled, json_tokenizer = (shutil.copytree(SOURCE, folder / f"form{i}") for i in range(4))
    for path in (sharded, pickled):
        (path / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    save_torch_state_dict(tensors, sharded, max_shard_size="700KB")
    (json_tokenizer / "tokenizer.model").unlink()
    backend = ByteLevelBPETokenizer()
    backend.train(__file__, vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.save(str(json_tokenizer / "tokenizer.json"))
    outputs = [folder / name for name in ("convert", "quantize")]
    for path in outputs:
        make_commands(SOURCE, path)[path.name]()
    return [single, sharded, pickled, json_tokenizer, *outputs]


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
    signal.alarm(PATIENCE_S)
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


def try_mutations(count: int, folder: Path) -> Iterator[tuple[int, str, str, float]]:
    """Yield seed, file, outcome and seconds of each mutation, made by a child that another replaces if it crashes."""
    seed = 0
    while seed < count:
        shutil.rmtree(folder, ignore_errors=True)
        forms = write_forms(folder)
        with ProcessPoolExecutor(1, fork, silence) as child:
            try:
                while seed < count:
                    yield seed, *child.submit(try_mutation, forms, seed).result()
                    seed += 1
            except BrokenProcessPool:
                yield seed, "?", f"the process crashed, or did not answer for {PATIENCE_S} s", 0.0
                seed += 1


def report_mutations(count: int, folder: Path) -> dict[str, Any]:
    files: dict[str, Counter[str]] = defaultdict(Counter)
    faults, longest = [], 0.0
    for seed, file, outcome, seconds in tqdm(try_mutations(count, folder / "forms"), total=count, disable=None):
        is_fault = outcome not in ("read", "refused")
        files[file]["fault" if is_fault else outcome] += 1
        faults += [{"seed": seed, "file": file, "outcome": outcome}] * is_fault
        longest = max(longest, seconds)
    total = sum(files.values(), Counter())
    return {**total, "longest_cpu_s": round(longest, 3), "faults": faults, "files": dict(sorted(files.items()))}


def write_source(folder: Path, num_layers: int) -> None:
    """Write a checkpoint of random weights that takes a while to convert: about 1.6 MB a layer."""
    raw = {**read_config(SOURCE), "hidden_size": 256, "num_hidden_layers": num_layers}
    write_random_folder(raw, folder, torch.bfloat16)
    for file in SOURCE.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def take_folder(path: Path) -> Folder:
    """Read a folder and remove it."""
    files = {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else None
    shutil.rmtree(path, ignore_errors=True)
    return files


def run_whole(command: Callable[[], None], output: Path) -> tuple[float, Folder]:
    """Run a command to its end; return the seconds that it takes and what it leaves, None where it fails."""
    began, child = time.perf_counter(), start_child(command)
    child.join()
    return time.perf_counter() - began, take_folder(output) if child.exitcode == 0 else None


def kill(command: Callable[[], None], output: Path, whole: Folder, after_s: float) -> str:
    """Kill a command so long after it began to write; return what it left: "nothing", "whole" or a fault."""
    child = start_child(command)
    while child.is_alive() and not output.exists() and not any(output.parent.glob(".output.*.tmp")):
        time.sleep(0.0005)
    time.sleep(after_s)
    child.kill()
    child.join()
    left = take_folder(output)
    if left not in (None, whole):
        return "a folder that is not whole"
    if run_whole(command, output)[1] != whole:
        return "a second run that fails"
    names = [file.name for file in output.parent.iterdir()]
    return f"{sorted(names)} after a second run" if names != ["source"] else "nothing" if left is None else "whole"


def report_kills(count: int, folder: Path, num_layers: int = 60) -> dict[str, Any]:
    write_source(folder / "source", num_layers)
    output, chance = folder / "output", random.Random(0)
    commands = make_commands(folder / "source", output)
    runs = {name: run_whole(command, output) for name, command in commands.items()}
    assert all(whole for _, whole in runs.values()), "one fails even if nobody kills it"
    kills = []
    for name in tqdm([*commands] * count, disable=None):
        seconds, whole = runs[name]
        after_s = chance.uniform(0, seconds)
        left = kill(commands[name], output, whole, after_s)
        kills.append({"command": name, "after_s": round(after_s, 4), "left": left})
    outcomes = {name: Counter(each["left"] for each in kills if each["command"] == name) for name in commands}
    faults = [each for each in kills if each["left"] not in ("nothing", "whole")]
    return {**outcomes, "faults": faults, "kills": kills}


def main(argv: list[str] | None = None) -> None:
    parser = results.make_parser(__doc__)
    parser.add_argument("what", choices=("mutations", "kills"))
    parser.add_argument("--count", type=number(int, 1), required=True, help="files changed; kills a command")
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        args = parser.parse_args(argv)
        report = results.begin("faults", args.output_dir, args.what, device="cpu", count=args.count)
        torch.set_num_threads(1)  # a forked child has no others
        find = {"mutations": report_mutations, "kills": report_kills}[args.what]
        report.content |= find(args.count, Path(folder))
        report.finish()


if __name__ == "__main__":
    main()
