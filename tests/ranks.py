"""What test_tp.py has every rank do: jobs, which the processes that `as_rank` begins do together."""

import ctypes
import json
import os
import resource
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import generate
from checkpoint import load_model
from cli import ranks as processes
from cli.errors import user_errors
from cli.ranks import from_rank_0, patient_group, process_group, together
from cli.report import weight_bytes
from config import read_config
from eagle_checkpoint import load_head
from model import ONE_RANK
from random_weights import random_model
from speculate import Speculation
from steps import Sampling, compiled, decode

GREEDY, DRAWN = Sampling(temperature=0), Sampling(0.9, top_k=50)
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [9, 8]]
DEMO = Path(__file__).parent.parent / "checkpoints" / "demo"


def rows_of(steps):
    rows = [list(row) for row in zip(*steps, strict=True)]
    return [[token for ids in row for token in ids] for row in rows]


def logits(model):
    """Return those of a batch of 2 without caches."""
    tokens = torch.arange(2 * 24).view(2, 24) % 90
    with torch.inference_mode():
        return model(tokens, torch.arange(24))


def logits_and_greedy(path, ranks):
    """Return the logits, and the greedy texts of two prompts of different lengths."""
    model = load_model(path, dtype=torch.float32, ranks=ranks)
    found = {"logits": logits(model), "bytes": weight_bytes(model)}
    model.setup_caches(2, 128)
    return {**found, "greedy": rows_of(generate.generate(model, PROMPTS, 10, GREEDY))}


def load_draft(path, model, ranks):
    """Load a draft model, or a head of which each rank has the whole."""
    if path.name == "head":
        draft_model = load_head(path, model)
        model.setup_caches(2, 128)  # with taps
    else:
        draft_model = load_model(path, dtype=torch.float32, ranks=ranks)
    draft_model.setup_caches(2, 128)
    return draft_model


def texts(folder, ranks):
    """Return what every way of generating gives; each rank has another seed, as if a draw had gone astray."""
    model = load_model(folder / "demo", dtype=torch.float32, ranks=ranks)
    model.setup_caches(2, 128)
    found = {}
    ways = {
        "plain": (None, None),
        "sharded": ("draft", ranks),
        "lookup": (None, None),
        "replicated": ("draft", ONE_RANK),
        "quantized": ("draft-int8", ranks),
        "head": ("head", ranks),
    }
    for name in list(ways)[: 2 if ranks.count > 2 else None]:  # what more ranks change
        draft_name, draft_ranks = ways[name]
        for sampling in (GREEDY, DRAWN):
            speculation = None
            if name != "plain":
                draft_model = draft_name and load_draft(folder / draft_name, model, draft_ranks)
                speculation = Speculation(draft_model)
            generator = torch.Generator().manual_seed(1 + ranks.rank)
            new_ids = generate.generate(model, PROMPTS, 12, sampling, generator=generator, speculation=speculation)
            kind = "greedy" if sampling == GREEDY else "drawn"
            found[f"{name} {kind}"] = rows_of(new_ids)
            if name == "head":
                found[f"accepted {kind}"] = speculation.accept_counts
    stop = found["plain greedy"][0][2]  # ends the first row, and the second goes on in a smaller batch
    found["ended greedy"] = rows_of(generate.generate(model, PROMPTS, 12, GREEDY, eos_ids=[stop]))
    return found


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_of_loading(path, ranks):
    """Return by how much the peak memory grew, every page of the weights read."""
    before = peak_memory()
    model = load_model(path, ranks=ranks)
    for parameter in model.parameters():
        parameter.sum()
    return {"grown": peak_memory() - before, "bytes": weight_bytes(model)}


# ---------------------------------------------------------------------------------------------------------------------
# The jobs


def models(folder, names):
    """Load and run the models of the folder, and write there what this rank found."""
    with process_group() as ranks, user_errors(signals_raise=False):
        torch.set_num_threads(1)
        found = {"memory": memory_of_loading(folder / "large", ranks)}
        for name in names:
            found[name] = logits_and_greedy(folder / "models" / name, ranks)
        found["doubles"] = logits(load_model(folder / "models" / "demo", dtype=torch.float64, ranks=ranks))
        found["texts"] = texts(folder / "models", ranks)
        raw = read_config(folder / "models" / "gqa")
        random = random_model(raw, dtype=torch.float32, ranks=ranks)
        found["random"] = random(torch.tensor([[1, 2]]), torch.arange(2)).shape
        torch.save(found, folder / f"{ranks.count}-{ranks.rank}.pt")


def threads():
    with process_group():
        print(torch.get_num_threads())


def command(*options):
    generate.main(list(map(str, options)))


def command_on_own_node(folder, *options):
    """Run the command where the rank has a folder of its own, as on a node of its own."""
    os.chdir(folder / os.environ["RANK"])
    command(*options)


def compiled_texts(path, draft_path):
    """Print the greedy texts of compiled steps, plain with a shared draft too, and how much was accepted.

    Rank 0 compiles first, beside ranks that do not: they find in inductor's cache the kernels that it has made.
    """
    with process_group() as ranks, user_errors(signals_raise=False):
        torch.set_num_threads(1)
        model, draft_model = (load_model(each, dtype=torch.float32, ranks=ranks) for each in (path, draft_path))
        for each in (model, draft_model):
            each.setup_caches(1, 128)
        speculation, step = Speculation(draft_model, levels=(1,)), decode
        for turn in range(2):
            if turn == min(ranks.rank, 1):
                speculation.compile_()
                step = compiled(decode)
            texts = [
                rows_of(generate.generate(model, PROMPTS[:1], 10, GREEDY, decode=step, speculation=how))
                for how in (None, speculation)
            ]
        print(json.dumps([*texts, sum(speculation.accept_counts[0][1:])]))


def failure():
    """Let rank 1 fail between two tokens, while the others wait for it."""
    with process_group() as ranks, user_errors(signals_raise=False):
        model = load_model(DEMO, ranks=ranks)
        model.setup_caches(2, 128)

        def failing(*arguments):
            if ranks.rank == 1:
                raise RuntimeError("this rank has lost its way")
            return decode(*arguments)

        for _ in generate.generate(model, PROMPTS, 10, GREEDY, decode=failing):
            pass


def silence():
    """Lose the others, and have a store that does not answer."""
    processes.LONG, processes.another_has_ended = 1, lambda store: threading.Event().wait(1000)
    with process_group():
        raise RuntimeError("gloo: connection closed")


def mistake():
    """Let rank 1 alone find a mistake."""
    with process_group() as ranks, user_errors(signals_raise=False):
        together(lambda: json.loads("not JSON" if ranks.rank else "0"), ranks)


def patience():
    """Let rank 0 take longer over something than ranks wait for each other in the midst of a step, or for a sign."""
    processes.MOMENT, processes.SILENT = 0.5, 4
    with process_group() as ranks, user_errors(signals_raise=False):
        patient_group()  # now, since meeting for it may take a busy machine longer than what follows
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        print(from_rank_0(lambda: time.sleep(7) or "hello", ranks))
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=30), dist.group.WORLD)


def hang():
    """Let rank 1 neither end nor do anything: what holds the interpreter's lock stops all its threads."""
    processes.MOMENT, processes.SILENT = 0.5, 3
    with process_group() as ranks:
        if ranks.rank == 1:
            ctypes.PyDLL(None).sleep(8)
        dist.barrier()


def as_rank(rank, count, num_nodes, port, folder, job, arguments):
    """Do a job as one of `count` ranks, with the environment that torchrun gives it and its output in files."""
    local_count = count // num_nodes
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    values = (rank, count, rank % local_count, local_count, port)
    os.environ |= dict(zip(names, map(str, values), strict=True))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    job(*arguments)
