#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo): all_reduce with ReduceOp.MAX where one rank holds NaN.
#
# Common belief: NaN comes through, as in torch.maximum and amax, or is passed over, as in fmax. Either way one rule
# holds, so a maximum over ranks tells whether any rank met NaN.
# Behaviour: a comparison keeps what it holds when the other value is NaN, and each rank begins with its own part of the
# tensor. So in one tensor some elements keep the NaN and others lose it, by their place and the rank that holds it. A
# tensor of one element, say a loss or a scale, keeps the NaN of rank 0 and loses that of rank 1. MIN does the same.
# Seen: 1,000 elements, two ranks, «NaN on rank 0: 500 of 1000 elements are NaN, alone True», «NaN on rank 1: 500 of
# 1000 elements are NaN, alone False», «torch.maximum: 1000 of 1000».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/ranks.py" <<'PY'
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COUNT = 1000


def reduce(rank, owner, count):
    x = torch.full((count,), torch.nan if rank == owner else 1.0)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.isnan().sum().item()


def check(rank, store):
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=2)
    for owner in (0, 1):
        many, alone = reduce(rank, owner, COUNT), reduce(rank, owner, 1) == 1
        if rank == 0:
            print(f"NaN on rank {owner}: {many} of {COUNT} elements are NaN, alone {alone}", flush=True)
        assert 0 < many < COUNT and alone == (owner == 0), "this has changed"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(check, (sys.argv[1],), 2)
    both = torch.maximum(torch.full((COUNT,), torch.nan), torch.ones(COUNT))
    print(f"torch.maximum: {both.isnan().sum()} of {COUNT}")
PY
"$folder/env/bin/python" "$folder/ranks.py" "$folder/store"
