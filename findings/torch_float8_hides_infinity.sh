#!/usr/bin/env bash
# torch 2.13.0 (CPU): a cast of an infinite value to float8.
#
# Common belief: an overflow stays visible. float8_e4m3fn has no infinity, so infinity becomes NaN, as in
# ml_dtypes, and a check for finite values finds it.
# Behaviour: the cast to float8_e4m3fn gives the largest value, 448, for infinity too. Nothing downstream can see that a
# layer overflowed. float8_e5m2, which has an infinity, keeps it, and gives infinity for finite values beyond its range.
# Seen: «float8_e4m3fn: inf -> 448.0, 100000 -> 448.0, nan -> nan», «float8_e5m2: inf -> inf, 100000 -> inf, nan ->
# nan».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q ml_dtypes==0.6.0
cat > "$folder/cast.py" <<'PY'
import ml_dtypes
import numpy as np
import torch

values = [float("inf"), 1e5, float("nan")]
casts = {}
for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
    casts[dtype] = torch.tensor(values).to(dtype).float().tolist()
    pairs = ", ".join(f"{value:g} -> {cast}" for value, cast in zip(values, casts[dtype], strict=True))
    print(f"{str(dtype).removeprefix('torch.')}: {pairs}")
assert np.isnan(np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)).all()
assert str(casts[torch.float8_e4m3fn]) == "[448.0, 448.0, nan]", "this has changed"
assert str(casts[torch.float8_e5m2]) == "[inf, inf, nan]", "this has changed"
PY
"$folder/env/bin/python" "$folder/cast.py"
