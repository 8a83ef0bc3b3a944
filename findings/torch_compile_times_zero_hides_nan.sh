#!/usr/bin/env bash
# torch 2.13.0 (CPU): x * 0 under torch.compile, where x holds NaN or infinity.
#
# Common belief: NaN times 0 is NaN in eager and compiled code, so (x * 0).sum() tells whether all of x is finite, and
# x * 0 turns a layer off without hiding that it overflowed. A compiler that keeps to IEEE leaves a product with 0.
# Behaviour: a product with the integer 0 is replaced by zeros, so the check passes for any x. With 0.0, with a tensor
# of zeros, or as x - x, the NaN stays.
# Seen: x = [1, inf, nan], «x * 0: eager [0.0, nan, nan], compiled [0.0, 0.0, 0.0]», «x * 0.0: eager [0.0, nan, nan],
# compiled [0.0, nan, nan]», «x - x: eager [0.0, nan, nan], compiled [0.0, nan, nan]».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$folder/zero.py" <<'PY'
import torch

x = torch.tensor([1.0, torch.inf, torch.nan])
functions = {"x * 0": lambda x: x * 0, "x * 0.0": lambda x: x * 0.0, "x - x": lambda x: x - x}
for name, function in functions.items():
    eager, compiled = function(x), torch.compile(function, fullgraph=True, dynamic=False)(x)
    print(f"{name}: eager {eager.tolist()}, compiled {compiled.tolist()}")
    assert eager.isnan().tolist() == [False, True, True]
    assert compiled.isnan().tolist() == [False, name != "x * 0", name != "x * 0"], "this has changed"
PY
"$folder/env/bin/python" "$folder/zero.py"
