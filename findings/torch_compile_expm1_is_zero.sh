#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.expm1 of small values under torch.compile.
#
# Common belief: expm1 is there to keep what exp(x) - 1 loses near 0, and the compiled function is expm1 too, up to
# rounding.
# Behaviour: where a loop is vectorized, inductor writes expm1(x) as exp(x) - 1. So 1e-10 becomes 0, and 1e-6 is off by
# 5 %. Estimates of a divergence, expm1(r) - r of differences r of log-probabilities, come out negative. log1p, and
# float64, stay as they are.
# Seen: «expm1(1e-10): eager 1e-10, compiled 0», «expm1(1e-06): eager 1e-06, compiled 9.53674e-07», «log1p(1e-10):
# eager 1e-10, compiled 1e-10», «smallest expm1(r) - r: eager 5.0e-12, compiled -5.7e-08».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$folder/small.py" <<'PY'
import torch

SIZE = 64


def run(function, x):
    return function(x), torch.compile(function, fullgraph=True, dynamic=False)(x)


found = {}
for name, value in (("expm1", 1e-10), ("expm1", 1e-6), ("log1p", 1e-10)):
    results = [y[0].item() for y in run(getattr(torch, name), torch.full((SIZE,), value))]
    found[name, value] = [result / value for result in results]
    print(f"{name}({value:g}): eager {results[0]:g}, compiled {results[1]:g}")
ratios = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) * 1e-4
smallest = [y.min().item() for y in run(lambda r: torch.expm1(r) - r, ratios)]
print(f"smallest expm1(r) - r: eager {smallest[0]:.1e}, compiled {smallest[1]:.1e}")
double = [y[0].item() for y in run(torch.expm1, torch.full((SIZE,), 1e-10, dtype=torch.float64))]
print(f"float64: eager {double[0]:g}, compiled {double[1]:g}")
for eager, compiled in (found["log1p", 1e-10], [x / 1e-10 for x in double]):
    assert abs(eager - 1) < 1e-4 and abs(compiled - 1) < 1e-4
assert abs(found["expm1", 1e-10][0] - 1) < 1e-4 and smallest[0] >= 0
assert found["expm1", 1e-10][1] == 0 and abs(found["expm1", 1e-6][1] - 1) > 0.01, "this has changed"
assert smallest[1] < 0, "this has changed"
PY
"$folder/env/bin/python" "$folder/small.py"
