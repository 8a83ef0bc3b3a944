#!/usr/bin/env bash
# onnxruntime 1.32.0 with ml_dtypes 0.6.0 (CPU): Cast from float32 to float8 with saturate=0, just above the largest
# value.
#
# Common belief: what is too large becomes infinity in float8_e5m2 and NaN in float8_e4m3fn, which has no infinity, as
# in onnx's own reference and in ml_dtypes. So a larger value never has a smaller result.
# Behaviour: in float8_e5m2 the values from 61440 up to 65536 become NaN, and those from 65536 on infinity. In
# float8_e4m3fn 480 becomes 448, between 470 and 500, which become NaN. saturate=1, the default, is right.
# Seen: «FLOAT8E5M2: 60000 -> 57344, 62000 -> nan, 70000 -> inf; ml_dtypes [57344.0, inf, inf]», «FLOAT8E4M3FN: 460 ->
# 448, 470 -> nan, 480 -> 448, 500 -> nan; ml_dtypes [448.0, nan, nan, nan]».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.32.0
cat > "$folder/edge.py" <<'PY'
import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def cast(values, name, saturate):
    down = helper.make_node("Cast", ["x"], ["y"], to=getattr(TensorProto, name), saturate=saturate)
    up = helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT)
    x, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(values)]) for name in "xz")
    graph = helper.make_graph([down, up], "cast", [x], [z])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": values})[0]


nan, inf = np.nan, np.inf
cases = {
    "FLOAT8E5M2": (ml_dtypes.float8_e5m2, {60000: 57344, 62000: nan, 70000: inf}, [57344, inf, inf]),
    "FLOAT8E4M3FN": (ml_dtypes.float8_e4m3fn, {460: 448, 470: nan, 480: 448, 500: nan}, [448, nan, nan, nan]),
}
for name, (dtype, expected, right) in cases.items():
    values = np.array(list(expected), np.float32)
    found = cast(values, name, saturate=0)
    pairs = ", ".join(f"{value:g} -> {result:g}" for value, result in zip(values, found, strict=True))
    peer = values.astype(dtype).astype(np.float32)
    print(f"{name}: {pairs}; ml_dtypes {peer.tolist()}")
    assert np.array_equal(peer, right, equal_nan=True)
    assert (cast(values, name, saturate=1) == right[0]).all()
    assert np.array_equal(found, list(expected.values()), equal_nan=True), "this has changed"
PY
"$folder/env/bin/python" "$folder/edge.py"
