#!/usr/bin/env bash
# onnx 1.23.2 with numpy 2.4.6 and ml_dtypes 0.6.0: onnx.helper.make_tensor with values that its type cannot hold.
#
# Common belief: one rule holds for all types. make_tensor refuses 200 for INT8, so it refuses 8 for INT4, or it
# clamps, as QuantizeLinear and the float8 types do.
# Behaviour: the 4-bit integers wrap. 8, the code of the largest weight where a quantizer forgot to clamp, becomes -8,
# the smallest, and 16 becomes 0 in UINT4. FLOAT8E4M3FN clamps, infinity too, to 448.
# Seen: «INT8 [127, 200]: OverflowError», «INT4 [7, 8, -9]: [7.0, -8.0, 7.0]», «UINT4 [15, 16, -1]: [15.0, 0.0, 15.0]»,
# «FLOAT8E4M3FN [448, 500, inf]: [448.0, 448.0, 448.0]».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2
cat > "$folder/codes.py" <<'PY'
import math

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def store(name, values):
    try:
        tensor = helper.make_tensor("x", getattr(TensorProto, name), [len(values)], values)
        found = numpy_helper.to_array(tensor).astype(np.float32).tolist()
    except OverflowError as error:
        found = type(error).__name__
    print(f"{name} {values}: {found}")
    return found


assert store("INT8", [127, 200]) == "OverflowError"
assert store("INT4", [7, -8]) == [7, -8]
assert store("INT4", [7, 8, -9]) == [7, -8, 7], "this has changed"
assert store("UINT4", [15, 16, -1]) == [15, 0, 15], "this has changed"
assert store("FLOAT8E4M3FN", [448, 500, math.inf]) == [448, 448, 448], "this has changed"
PY
"$folder/env/bin/python" "$folder/codes.py"
