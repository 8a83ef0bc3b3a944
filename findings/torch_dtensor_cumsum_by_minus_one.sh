#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo): cumsum(-1) of a DTensor that is sharded along its last dimension.
#
# Common belief: -1 and the number of the last dimension are the same, and a DTensor computes what the plain tensor
# computes, or refuses.
# Behaviour: cumsum by the dimension's number gathers what it needs and is right. By -1 the dimension is not seen to be
# sharded: each rank adds up its own shard from 0, and the results are taken for shards of the whole. So the positions
# that are counted from the attention mask of a sequence over several ranks start anew at each. cumprod and logcumsumexp
# do the same. sum(-1), amax(-1) and softmax(-1) are right.
# Seen: two ranks, mask of 8 ones, «cumsum(1) - 1: [0, 1, 2, 3, 4, 5, 6, 7]», «cumsum(-1) - 1: [0, 1, 2, 3, 0, 1, 2,
# 3]», «sum(-1): [8]».
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
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

LENGTH = 8


def check(rank, store):
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=2)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    shards = distribute_tensor(mask, init_device_mesh("cpu", (2,)), [Shard(1)])
    names = {"cumsum(1) - 1": shards.cumsum(1) - 1, "cumsum(-1) - 1": shards.cumsum(-1) - 1, "sum(-1)": shards.sum(-1)}
    found = {name: x.full_tensor().flatten().tolist() for name, x in names.items()}
    if rank == 0:
        for name, values in found.items():
            print(f"{name}: {values}", flush=True)
    assert found["cumsum(1) - 1"] == list(range(LENGTH)) and found["sum(-1)"] == [LENGTH]
    assert found["cumsum(-1) - 1"] == [0, 1, 2, 3] * 2, "this has changed"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(check, (sys.argv[1],), 2)
PY
"$folder/env/bin/python" "$folder/ranks.py" "$folder/store"
