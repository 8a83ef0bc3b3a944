#!/usr/bin/env bash
# torch 2.13.0 with numpy 2.4.6: comparing small integer tensors with a number that they cannot hold.
#
# Common belief: a comparison is one of values: no uint8 equals 256, and every one is below it, as in numpy. At worst
# the number is refused.
# Behaviour: the number is wrapped to the tensor's dtype first. So in byte-level ids kept as uint8 «ids == 256», a
# search for an end-of-text token, finds the byte 0, «ids < 256» is false everywhere, and «ids != -1» is false for 255.
# A zero-dimensional tensor in place of the number does the same, one of one dimension does not. torch.compile agrees.
# Seen: ids [0, 65, 255], «== 256: torch [True, False, False], numpy [False, False, False]», «< 256: torch [False,
# False, False], numpy [True, True, True]», «!= -1: torch [True, True, False], numpy [True, True, True]».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$folder/compare.py" <<'PY'
from operator import eq, lt, ne

import torch

ids = torch.tensor([0, 65, 255], dtype=torch.uint8)
expected = {
    "== 256": (eq, 256, [True, False, False]),
    "< 256": (lt, 256, [False, False, False]),
    "!= -1": (ne, -1, [True, True, False]),
}
for name, (compare, number, wrapped) in expected.items():
    by_torch, by_numpy = compare(ids, number).tolist(), compare(ids.numpy(), number).tolist()
    print(f"{name}: torch {by_torch}, numpy {by_numpy}")
    assert by_torch == wrapped, "this has changed"
    assert compare(ids, torch.tensor(number)).tolist() == wrapped, "this has changed"
    assert by_numpy == compare(ids, torch.tensor([number])).tolist() == compare(ids.long(), number).tolist()
PY
"$folder/env/bin/python" "$folder/compare.py"
