#!/usr/bin/env bash
# mlx 0.32.4 (CPU) with gguf 0.19.0: mx.load of a GGUF file whose tensors are BF16.
#
# Common belief: mlx has bfloat16, so the tensors come as bfloat16, bit by bit, as they do from safetensors.
# Behaviour: they are converted to float16. What lies above 65504 becomes infinite and what lies below 3e-8 becomes 0,
# and small values lose bits. Nothing warns. A tensor of F32 in the same file stays float32.
# Seen: «F32: float32 [99840.0, 1.0011717677116394e-08, 9.98377799987793e-07, 0.333984375]», «BF16: float16 [inf, 0.0,
# 1.0132789611816406e-06, 0.333984375]», «safetensors: bfloat16 [99840.0, 1.0011717677116394e-08, ...]».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile numpy==2.4.6 ml_dtypes==0.6.0 gguf==0.19.0 "mlx[cpu]==0.32.4"
cat > "$folder/load.py" <<'PY'
import sys

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np

values = np.array([1e5, 1e-8, 1e-6, 1 / 3] * 8, np.float32).astype(ml_dtypes.bfloat16).reshape(1, -1)
path = f"{sys.argv[1]}/model"
file = gguf.GGUFWriter(f"{path}.gguf", "llama")
file.add_tensor("BF16", values.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
file.add_tensor("F32", values.astype(np.float32))
file.write_header_to_file()
file.write_kv_data_to_file()
file.write_tensors_to_file()
file.close()
mx.save_safetensors(f"{path}.safetensors", {"safetensors": mx.array(values.astype(np.float32)).astype(mx.bfloat16)})
found = {}
for name, x in {**mx.load(f"{path}.gguf"), **mx.load(f"{path}.safetensors")}.items():
    found[name] = x.dtype, x.astype(mx.float32).flatten()[:4].tolist()
    print(f"{name}: {str(x.dtype).removeprefix('mlx.core.')} {found[name][1]}")
exact = values.astype(np.float32).flatten()[:4].tolist()
assert found["F32"] == (mx.float32, exact) and found["safetensors"] == (mx.bfloat16, exact)
half = np.float16(np.float32(exact[2])).item()
assert found["BF16"] == (mx.float16, [np.inf, 0, half, exact[3]]) and half != exact[2], "this has changed"
PY
"$folder/env/bin/python" "$folder/load.py" "$folder"
