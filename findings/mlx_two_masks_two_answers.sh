#!/usr/bin/env bash
# mlx 0.32.4 (CPU): mx.fast.scaled_dot_product_attention for a query that may see no key, as of a padded row.
#
# Common belief: a boolean mask is short for the additive one of 0 and -inf, so both give the same, be it NaN or zeros.
# Behaviour: by the additive mask the row is NaN. By the boolean one every key has the same finite score, so the row is
# the mean over all the values, those that the mask forbids: it looks like any other row, and it changes with the text
# of the padding. Rows that may see a key are the same in both.
# Seen: values 0 to 3, «row that sees no key: boolean 1.5, additive nan», «row that sees key 3: boolean 3.0, additive
# 3.0», «value 0 changed to 100, row that sees no key: boolean 26.5».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile "mlx[cpu]==0.32.4"
cat > "$folder/masks.py" <<'PY'
import math

import mlx.core as mx

KEYS, SIZE = 4, 64


def attend(values, mask):
    q, k = mx.ones((1, 1, 2, SIZE)), mx.ones((1, 1, KEYS, SIZE))
    v = mx.broadcast_to(mx.array(values).reshape(1, 1, KEYS, 1), (1, 1, KEYS, SIZE))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=SIZE**-0.5, mask=mask)[0, 0, :, 0].tolist()


boolean = mx.array([[False] * KEYS, [False, False, False, True]])
additive = mx.where(boolean, 0.0, -mx.inf)
by_boolean, by_additive = attend([0.0, 1.0, 2.0, 3.0], boolean), attend([0.0, 1.0, 2.0, 3.0], additive)
for row, name in enumerate(("no key", "key 3")):
    print(f"row that sees {name}: boolean {by_boolean[row]}, additive {by_additive[row]}")
changed = attend([100.0, 1.0, 2.0, 3.0], boolean)
print(f"value 0 changed to 100, row that sees no key: boolean {changed[0]}")
assert by_boolean[1] == by_additive[1] == changed[1] == 3
assert by_boolean[0] == 1.5 and changed[0] == 26.5 and math.isnan(by_additive[0]), "this has changed"
PY
"$folder/env/bin/python" "$folder/masks.py"
