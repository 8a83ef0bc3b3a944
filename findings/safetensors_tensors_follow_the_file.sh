#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0 (Linux): tensors of load_file after the file is written to.
#
# Common belief: load_file reads the file, and the tensors are a program's own memory from then on.
# Behaviour: they are pages of the mapped file. Pages that nothing has touched are read when they are used, so a value
# that is written to the file in place later stands in the tensor, without a new load. safetensors.numpy copies.
# Seen: «torch: 0.0 in the file when loaded, 7.0 in the tensor after 7.0 is written to the file», «numpy: ... 0.0 ...».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q safetensors==0.8.0
cat > "$folder/follow.py" <<'PY'
import struct
import sys
from pathlib import Path

import safetensors.numpy
import safetensors.torch
import torch


def read_after_write(load, path):
    safetensors.torch.save_file({"x": torch.zeros(1_000_000)}, path)
    x = load(path)["x"]
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<f", 7.0))
    return float(x[-1])


found = {}
for name, module in (("torch", safetensors.torch), ("numpy", safetensors.numpy)):
    found[name] = read_after_write(module.load_file, Path(sys.argv[1]) / f"{name}.safetensors")
    print(f"{name}: 0.0 in the file when loaded, {found[name]} in the tensor after 7.0 is written to the file")
assert found == {"torch": 7.0, "numpy": 0.0}, "this has changed"
PY
"$folder/env/bin/python" "$folder/follow.py" "$folder"
