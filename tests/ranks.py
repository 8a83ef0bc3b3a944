"""What test_tp.py has every rank do, under torchrun: load its share of checkpoints, run them, and write what came out.

python -m torch.distributed.run --nproc_per_node=2 tests/ranks.py FOLDER MODEL ...
"""

import json
import resource
import sys
from pathlib import Path

import torch

from checkpoint import load_model, random_model, read_config
from cli import user_errors
from generate import generate
from model import ONE_RANK
from speculate import Speculation, draft, verify
from steps import Sampling, compiled, decode, prefill
from tp import process_group, together

GREEDY, DRAWN = Sampling(temperature=0), Sampling(0.9, top_k=50)
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [9, 8]]
DRAFT = Path(__file__).parent.parent / "checkpoints" / "demo-draft"


def rows_of(steps):
    rows = [list(row) for row in zip(*steps, strict=True)]
    return [[token for ids in row for token in ids] for row in rows]


def logits_and_greedy(path, ranks):
    """Return the logits of a batch of 2 without caches, and the greedy texts of two prompts of different lengths."""
    model = load_model(path, dtype=torch.float32, ranks=ranks)
    tokens = torch.arange(2 * 24).view(2, 24) % 90
    with torch.inference_mode():
        logits = model(tokens, torch.arange(24))
    model.setup_caches(2, 128)
    return {"logits": logits, "greedy": rows_of(generate(model, PROMPTS, 10, GREEDY)), "bytes": model.weight_bytes}


def texts(path, ranks):
    """Return what every way of generating gives; each rank has another seed, as if a draw had gone astray."""
    model = load_model(path, dtype=torch.float32, ranks=ranks)
    model.setup_caches(2, 128)
    found = {}
    for name, draft_ranks in (("plain", None), ("lookup", None), ("replicated", ONE_RANK), ("sharded", ranks)):
        for sampling in (GREEDY, DRAWN):
            speculation = None
            if name != "plain":
                draft_model = draft_ranks and load_model(DRAFT, dtype=torch.float32, ranks=draft_ranks)
                if draft_model:
                    draft_model.setup_caches(2, 128)
                speculation = Speculation(draft_model)
            generator = torch.Generator().manual_seed(1 + ranks.rank)
            new_ids = generate(model, PROMPTS, 16, sampling, generator=generator, speculation=speculation)
            kind = "greedy" if sampling == GREEDY else "drawn"
            found[f"{name} {kind}"] = rows_of(new_ids)
    return found


def compiled_texts(path, ranks):
    """Return the greedy text, plain and with speculation, of compiled steps."""
    model, draft_model = (load_model(path, dtype=torch.float32, ranks=ranks) for _ in range(2))
    for each in (model, draft_model):
        each.setup_caches(1, 128)
    speculation = Speculation(draft_model, levels=(2,), draft=compiled(draft), verify=compiled(verify))
    steps = {"prefill": compiled(prefill), "decode": compiled(decode)}
    plain = rows_of(generate(model, PROMPTS[:1], 10, GREEDY, **steps))
    with_draft = rows_of(generate(model, PROMPTS[:1], 10, GREEDY, **steps, speculation=speculation))
    return {"plain": plain, "speculation": with_draft}


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_of_loading(path, ranks):
    """Return by how much the peak memory grew, every page of the weights read."""
    before = peak_memory()
    model = load_model(path, ranks=ranks)
    for parameter in model.parameters():
        parameter.sum()
    return {"grown": peak_memory() - before, "bytes": model.weight_bytes}


def run(folder, names, ranks):
    found = {}
    if (folder / "large").is_dir():
        found["memory"] = memory_of_loading(folder / "large", ranks)
    for name in names:
        found[name] = logits_and_greedy(folder / "models" / name, ranks)
    found["texts"] = texts(folder / "models" / "demo", ranks)
    if ranks.count <= 2:
        found["compiled"] = compiled_texts(folder / "models" / "biased", ranks)
    raw = read_config(folder / "models" / "gqa")
    found["random"] = random_model(raw, dtype=torch.float32, ranks=ranks)(torch.tensor([[1, 2]]), torch.arange(2)).shape
    return found


def main(folder, *names):
    with process_group() as ranks, user_errors():
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        if folder == "fail":  # a rank fails while the others wait for it
            if ranks.rank == 1:
                raise LookupError("this rank has lost its way")
            ranks.all_reduce(torch.ones(1))
        if folder == "mistake":  # only rank 1 finds it
            together(lambda: json.loads("not JSON" if ranks.rank else "0"), ranks)
        found = {"threads": num_threads, **run(Path(folder), names, ranks)}
        torch.save(found, Path(folder) / f"{ranks.count}-{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
