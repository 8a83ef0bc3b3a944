#!/usr/bin/env bash
# gptqmodel 7.7.0: weight_scale_inv of an FP8 weight.
#
# Common belief: what is called weight_scale_inv is multiplied with the FP8 codes, as in DeepSeek's folders and in
# transformers' fine-grained FP8, whose quant_method is fp8 as well.
# Behaviour: gptqmodel stores 448 / max|w|, by which the codes have to be divided, under the same name and the same
# quant_method. Only the key "weight_scale_semantics": "inverse" of config.json tells the two apart. A reader that
# multiplies raises nothing, and its weights are off by a factor of that scale, squared.
# Seen: «row: codes / weight_scale_inv is within 0.03 of the largest weight, codes * weight_scale_inv is 9.89e+06 times
# the weight», and much the same by tensor and by block.
# Its function is taken out of its file, since the package needs a GPU's extras to be imported.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6 setuptools==80.9.0 wheel
"$folder/env/bin/pip" download -q --no-deps --no-build-isolation -d "$folder" gptqmodel==7.7.0
tar -xzf "$folder"/gptqmodel-7.7.0.tar.gz -C "$folder"
cat > "$folder/divide.py" <<'PY'
import ast
import sys
from pathlib import Path
from typing import Optional, Tuple

import torch

source = Path(sys.argv[1], "gptqmodel/nn_modules/qlinear/fp8.py").read_text()
wanted = ("_compute_scale_inv", "quantize_fp8_weight", "_fp8_dtype_from_name")
functions = [node for node in ast.parse(source).body if getattr(node, "name", "") in wanted]
# What it imports from its package: each returns the value that is normal already.
scope = {"torch": torch, "Optional": Optional, "Tuple": Tuple, "_normalize_fp8_fmt": lambda name: name,
         "_normalize_fp8_weight_block_size": lambda size: size,
         "_normalize_fp8_weight_scale_method": lambda method, weight_block_size=None: method}
exec(compile(ast.Module(functions, []), "fp8.py", "exec"), scope)

torch.manual_seed(0)
weight = torch.randn(64, 128) * 0.05
for method, block in (("row", None), ("tensor", None), ("block", (32, 32))):
    codes, scale = scope["quantize_fp8_weight"](weight, weight_scale_method=method, weight_block_size=block)
    if method == "row":
        scale = scale.unsqueeze(1)
    if method == "block":
        scale = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    divided, multiplied = codes.float() / scale, codes.float() * scale
    far = ((divided - weight).abs().max() / weight.abs().max()).item()
    times = (multiplied.abs().sum() / weight.abs().sum()).item()
    print(f"{method}: codes / weight_scale_inv is within {far:.2f} of the largest weight, codes * weight_scale_inv is "
          f"{times:.3g} times the weight")
    assert far < 0.07 and times > 1000, "this has changed"
PY
"$folder/env/bin/python" "$folder/divide.py" "$folder/gptqmodel-7.7.0"
