#!/usr/bin/env bash
# triton 3.7.1 with TRITON_INTERPRET=1 (CPU, numpy 2.4.6): tl.sum over a bfloat16 tensor.
#
# Common belief: it adds the values. At worst the interpreter adds in another precision than a GPU.
# Behaviour: the interpreter holds bfloat16 as uint16 and adds those integers, and reads the result as a bfloat16 again.
# tl.max, tl.min and tl.cumsum of the same tensor are right, and so is the sum after .to(tl.float32), or of float16.
# Seen: «sum of 1, 2, 3, 4: bfloat16 0.0, float16 10.0, bfloat16 after .to(tl.float32) 10.0».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q triton==3.7.1
cat > "$folder/sums.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def add(values, results, N: tl.constexpr):
    x = tl.load(values + tl.arange(0, N))
    tl.store(results, tl.sum(x, 0))
    tl.store(results + 1, tl.sum(x.to(tl.float32), 0))
    tl.store(results + 2, tl.max(x, 0))
    tl.store(results + 3, tl.max(tl.cumsum(x, 0), 0))


def reduce(dtype):
    results = torch.empty(4)
    add[(1,)](torch.tensor([1, 2, 3, 4], dtype=dtype), results, 4)
    return results.tolist()


brain, half = reduce(torch.bfloat16), reduce(torch.float16)
print(f"sum of 1, 2, 3, 4: bfloat16 {brain[0]}, float16 {half[0]}, bfloat16 after .to(tl.float32) {brain[1]}")
assert half == [10, 10, 4, 10] and brain[1:] == half[1:]
assert brain[0] == 0, "this has changed"
PY
TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/sums.py"
