#!/usr/bin/env bash
# hqq 0.2.8.post1 with torch 2.13.0 (CPU): nbits=1, on normal weights.
#
# Common belief: one bit keeps at least the sign and a mean size, so it is coarse, and still nearer to the weights than
# zeros are. And the optimizer, which 2 to 8 bits share, finds the best of what a bit can say.
# Behaviour: the scale is the range of the group, and the optimizer moves the zero point alone. With one bit each weight
# becomes about the smallest or the largest of its group. From groups of 16 on the error is larger than that of a matrix
# of zeros, and it grows with the group. The sign times the group's mean size needs the same one bit and less beside it.
# Seen: relative errors, «groups of 16: 1 bit 1.01, sign 0.58», «groups of 64: 1 bit 1.47, sign 0.60», «groups of 128: 1
# bit 1.71, sign 0.60», «groups of 64: 2 bits 0.43».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q --no-compile termcolor==3.3.0
"$folder/env/bin/pip" install -q --no-compile --no-deps hqq==0.2.8.post1
cat > "$folder/bit.py" <<'PY'
import torch
from hqq.core.quantize import Quantizer

weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))


def relate(result):
    return ((result - weights).norm() / weights.norm()).item()


def round_hqq(bits, group):
    form = {"nbits": bits, "group_size": group, "axis": 1}
    return Quantizer.dequantize(*Quantizer.quantize(weights, device="cpu", compute_dtype=torch.float32, **form))


def round_sign(group):
    groups = weights.view(-1, group)
    return (groups.sign() * groups.abs().mean(dim=1, keepdim=True)).view_as(weights)


for group in (16, 64, 128):
    errors = relate(round_hqq(1, group)), relate(round_sign(group))
    print(f"groups of {group}: 1 bit {errors[0]:.2f}, sign {errors[1]:.2f}")
    assert errors[1] < 0.65 and relate(torch.zeros_like(weights)) == 1
    assert errors[0] > 1, "this has changed"
two = relate(round_hqq(2, 64))
print(f"groups of 64: 2 bits {two:.2f}")
assert two < 0.5
PY
"$folder/env/bin/python" "$folder/bit.py"
