#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo): all_reduce and broadcast of a transposed tensor.
#
# Common belief: a collective works on the elements of a tensor, or refuses a tensor that is not contiguous.
# Behaviour: a dense tensor with other strides is taken, and its memory is exchanged as it lies. Where one rank holds a
# matrix and another the same matrix as a transposed view, equal in shape and by torch.equal, all_reduce adds elements
# of different places, and broadcast writes them to different places. Nothing is raised.
# Seen: «all_reduce gives twice the matrix: False [[0.0, 4.0, 3.0], [7.0, 6.0, 10.0]]» on rank 0, «broadcast gives the
# matrix: False [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]» on rank 1.
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


def check(rank, store):
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=2)
    matrix = torch.arange(6.0).view(2, 3)
    mine = matrix.clone() if rank == 0 else matrix.T.contiguous().T
    assert torch.equal(mine, matrix)
    dist.all_reduce(mine)
    if rank == 0:
        right = torch.equal(mine, 2 * matrix)
        print(f"all_reduce gives twice the matrix: {right} {mine.tolist()}", flush=True)
        assert not right, "this has changed"
    received = matrix.clone() if rank == 0 else torch.zeros(3, 2).T
    dist.broadcast(received, src=0)
    if rank == 1:
        right = torch.equal(received, matrix)
        print(f"broadcast gives the matrix: {right} {received.tolist()}", flush=True)
        assert not right, "this has changed"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(check, (sys.argv[1],), 2)
PY
"$folder/env/bin/python" "$folder/ranks.py" "$folder/store"
