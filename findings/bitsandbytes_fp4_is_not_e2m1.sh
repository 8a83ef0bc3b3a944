#!/usr/bin/env bash
# bitsandbytes 0.50.2 (CPU): the values of quant_type="fp4".
#
# Common belief: fp4 is the 4-bit float of MXFP4 and NVFP4, E2M1, whose codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
# So a weight that E2M1 holds is kept, and a table of E2M1 unpacks a checkpoint.
# Behaviour: the codes have another order, and 0.03125 stands in place of 0.5. The weights around 0.5 of 6, which are
# many, become a sixteenth of themselves or 1. Over normal weights in blocks of 64 the error is a sixth larger than of
# E2M1 with the same scales.
# Seen: «codes 0 to 7, the largest as 6: [0.0, 0.03125, 4.0, 6.0, 2.0, 3.0, 1.0, 1.5]», «0.5 of 6 becomes 0.03125»,
# «relative error of normal weights: fp4 0.122, E2M1 0.106».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q bitsandbytes==0.50.2
cat > "$folder/values.py" <<'PY'
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

BLOCK = 64
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def round_fp4(x):
    return dequantize_4bit(*quantize_4bit(x, blocksize=BLOCK, quant_type="fp4")).view(x.shape)


def round_e2m1(x):
    scales = x.abs().amax(dim=-1, keepdim=True) / 6
    values = torch.cat([E2M1, -E2M1])
    return values[(x.div(scales).unsqueeze(-1) - values).abs().argmin(dim=-1)] * scales


values = (get_4bit_type("fp4", device="cpu")[:8] * 6).tolist()
values = [round(value, 5) for value in values]
print(f"codes 0 to 7, the largest as 6: {values}")
exact = torch.cat([E2M1, torch.zeros(BLOCK - len(E2M1))])
kept = round_fp4(exact)
print(f"0.5 of 6 becomes {kept[1]:.5f}")
x = torch.randn(1000, BLOCK, generator=torch.Generator().manual_seed(0))
errors = [((function(x) - x).norm() / x.norm()).item() for function in (round_fp4, round_e2m1)]
print(f"relative error of normal weights: fp4 {errors[0]:.3f}, E2M1 {errors[1]:.3f}")
assert torch.equal(round_e2m1(exact), exact) and values != E2M1.tolist()
assert values == [0, 0.03125, 4, 6, 2, 3, 1, 1.5] and abs(kept[1] - 0.03125) < 1e-6, "this has changed"
assert errors[0] > 1.1 * errors[1], "this has changed"
PY
"$folder/env/bin/python" "$folder/values.py"
