#!/usr/bin/env bash
# torch 2.13.0 (CPU): % and // of floats under torch.compile.
#
# Common belief: they are exact operations, as Python's on floats, so eager and compiled code agree to the bit.
# Behaviour: the compiled remainder is x - floor(x / y) * y. Of infinity, a period or a limit that is switched off, that
# is 0 * inf, NaN, where eager and Python give x. And the compiled // is the floor of the rounded quotient: 1 // 0.1 is
# 10, where eager gives 9, since 0.1 in float32 is a little more than a tenth.
# Seen: «7 % inf: Python 7.0, eager 7.0, compiled nan», «1 // 0.1: numpy 9.0, eager 9.0, compiled 10.0», «7 // 0.1:
# numpy 69.0, eager 69.0, compiled 70.0».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$folder/remainder.py" <<'PY'
import numpy as np
import torch


def run(function, x):
    x = torch.full((64,), x)
    return function(x)[0].item(), torch.compile(function, fullgraph=True, dynamic=False)(x)[0].item()


eager, compiled = run(lambda x: x % torch.inf, 7.0)
print(f"7 % inf: Python {7.0 % float('inf')}, eager {eager}, compiled {compiled}")
assert eager == 7.0 % float("inf") == 7
assert np.isnan(compiled), "this has changed"
for x in (1.0, 7.0):
    eager, compiled = run(lambda x: x // 0.1, x)
    exact = float(np.float32(x) // np.float32(0.1))
    print(f"{x:g} // 0.1: numpy {exact}, eager {eager}, compiled {compiled}")
    assert eager == exact
    assert compiled == exact + 1, "this has changed"
PY
"$folder/env/bin/python" "$folder/remainder.py"
