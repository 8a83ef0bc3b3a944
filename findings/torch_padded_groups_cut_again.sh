#!/usr/bin/env bash
# torch 2.13.0 (CPU): what torch.compile makes of «pad to whole groups, scale each group, cut the pad off again».
#
# Common belief: torch.compile computes what eager computes, up to rounding.
# Behaviour: for a bfloat16 result the loop over groups counts whole groups only (size // group), so the columns of the
# last, shorter group are never written and hold what the memory held before. The same code with a float32 result is
# right, and so is a size that the group divides.
# Seen: «torch.bfloat16, 112 columns in groups of 32: the last 16 are right: False», «torch.float32 ...: True».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/groups.py" <<'PY'
import torch
import torch.nn.functional as F

K, GROUP = 112, 32


def dequantize(codes, scales, dtype):
    groups = F.pad(codes, (0, -K % GROUP)).unflatten(-1, (-1, GROUP)).float()
    return (groups * scales.unsqueeze(-1)).flatten(-2)[..., :K].to(dtype)


codes = torch.randint(1, 16, (64, K), dtype=torch.uint8)
scales = torch.ones(64, -(-K // GROUP))
written = {}
for dtype in (torch.bfloat16, torch.float32):
    torch._dynamo.reset()
    expected = dequantize(codes, scales, dtype)
    result = torch.compile(dequantize, fullgraph=True, dynamic=False)(codes, scales, dtype)
    whole = K // GROUP * GROUP
    assert torch.equal(result[:, :whole], expected[:, :whole])
    written[dtype] = torch.equal(result, expected)
    print(f"{dtype}, {K} columns in groups of {GROUP}: the last {K - whole} are right: {written[dtype]}")
assert written == {torch.bfloat16: False, torch.float32: True}, "this has changed"
PY
"$folder/env/bin/python" "$folder/groups.py"
