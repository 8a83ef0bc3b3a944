#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6: safetensors.numpy.save_file of a transposed array.
#
# Common belief: an array is saved by its elements, as np.save does, or it is refused, as safetensors.torch refuses a
# tensor that is not contiguous.
# Behaviour: the memory is written as it lies, under the shape of the transposed array. So a kernel of another framework
# that is transposed on its way into the file comes back with its elements in other places, and nothing is raised.
# So does what np.asfortranarray gives. A copy, x.T.copy(), is right.
# Seen: «[[0, 3], [1, 4], [2, 5]] saved by numpy, [[0, 1], [2, 3], [4, 5]] loaded», «copied first: [[0, 3], [1, 4],
# [2, 5]] loaded», «torch: refused».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q safetensors==0.8.0
cat > "$folder/transposed.py" <<'PY'
import sys

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

path = sys.argv[1]
kernel = np.arange(6, dtype=np.float32).reshape(2, 3)


def save_and_load(array):
    safetensors.numpy.save_file({"x": array}, path)
    return safetensors.numpy.load_file(path)["x"]


def show(array):
    return array.astype(int).tolist()


loaded, of_copy = save_and_load(kernel.T), save_and_load(kernel.T.copy())
print(f"{show(kernel.T)} saved by numpy, {show(loaded)} loaded")
print(f"copied first: {show(of_copy)} loaded")
try:
    safetensors.torch.save_file({"x": torch.from_numpy(kernel).T}, path)
    is_refused = False
except ValueError as error:
    is_refused = "non contiguous" in str(error)
print(f"torch: {'refused' if is_refused else 'saved'}")
assert np.array_equal(of_copy, kernel.T) and is_refused
assert not np.array_equal(save_and_load(np.asfortranarray(kernel)), kernel), "this has changed"
assert np.array_equal(loaded, kernel.reshape(3, 2)), "this has changed"
PY
"$folder/env/bin/python" "$folder/transposed.py" "$folder/x.safetensors"
