#!/usr/bin/env bash
# triton 3.7.1 with TRITON_INTERPRET=1 (CPU, numpy 2.4.6): a cast from float32 to bfloat16.
#
# Common belief: the interpreter rounds as a GPU and torch do, to the nearest, so a kernel that is checked in it against
# torch differs by the order of its sums alone.
# Behaviour: it drops the low 16 bits. Every value that is not a bfloat16 already moves towards 0, by up to a whole step
# instead of half a step, so errors of a chain of casts add up instead of cancelling.
# Seen: «of 4096 normal values 2047 differ from torch's cast, 0 of them lie farther from 0», «mean |cast| / |value|:
# triton 0.9972, torch 1.0000».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q triton==3.7.1
cat > "$folder/cast.py" <<'PY'
import torch
import triton
import triton.language as tl

N = 4096


@triton.jit
def cast(values, results, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(results + i, tl.load(values + i).to(tl.bfloat16))


values = torch.randn(N, generator=torch.Generator().manual_seed(0))
results = torch.empty(N, dtype=torch.bfloat16)
cast[(1,)](values, results, N)
nearest = values.bfloat16()
differ = results != nearest
farther = results.float().abs() > values.abs()
print(f"of {N} normal values {differ.sum()} differ from torch's cast, {farther.sum()} of them lie farther from 0")
ratios = [(x.float() / values).mean().item() for x in (results, nearest)]
print(f"mean |cast| / |value|: triton {ratios[0]:.4f}, torch {ratios[1]:.4f}")
assert differ.sum() > N // 3 and farther.sum() == 0, "this has changed"
PY
TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/cast.py"
