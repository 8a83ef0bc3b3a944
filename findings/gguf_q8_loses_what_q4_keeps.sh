#!/usr/bin/env bash
# gguf 0.19.0 with numpy 2.4.6: Q8_0 and Q4_0 of small weights.
#
# Common belief: Q8_0 is close to lossless and always nearer to the weights than Q4_0, whatever their size, since each
# block of 32 has a scale of its own.
# Behaviour: the scale is a float16. Q8_0's is the largest weight over 127, Q4_0's is that over 8, so Q8_0 runs out of
# float16's range sixteen times earlier, and its codes are rounded by the scale that was not. From weights of 1e-5 on
# Q8_0 is the worse of the two, and at 1e-6 it gives zeros where Q4_0 is as good as ever. Nothing warns.
# Seen: relative errors, «weights of 0.01: Q8_0 0.005, Q4_0 0.086», «weights of 1e-05: Q8_0 0.094, Q4_0 0.086»,
# «weights of 1e-06: Q8_0 0.999, Q4_0 0.106».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q numpy==2.4.6 gguf==0.19.0
cat > "$folder/small.py" <<'PY'
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

normal = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)


def error(weights, name):
    form = GGMLQuantizationType[name]
    return np.linalg.norm(dequantize(quantize(weights, form), form) - weights) / np.linalg.norm(weights)


errors = {}
for size in (1e-2, 1e-5, 1e-6):
    errors[size] = [error(normal * np.float32(size), name) for name in ("Q8_0", "Q4_0")]
    print(f"weights of {size:g}: Q8_0 {errors[size][0]:.3f}, Q4_0 {errors[size][1]:.3f}")
assert errors[1e-2][0] < errors[1e-2][1] / 10
assert errors[1e-5][0] > errors[1e-5][1] and errors[1e-6][0] > 0.99 and errors[1e-6][1] < 0.12, "this has changed"
PY
"$folder/env/bin/python" "$folder/small.py"
