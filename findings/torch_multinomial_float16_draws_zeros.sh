#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.multinomial of float16 probabilities.
#
# Common belief: an entry whose probability is exactly 0 is never drawn. Top-k and top-p rest on that.
# Behaviour: one draw, and draws without replacement, divide each probability by an exponential variable in its own
# dtype and take the largest quotient. In float16 that variable is sometimes 0, 0 / 0 is NaN, and NaN counts as the
# largest. A vocabulary of 128,256 meets one about once in 300 draws. float32, bfloat16, and draws with replacement
# are right.
# Seen: «torch.float16: 3 of 1000 draws have probability 0», «torch.float16 with replacement: 0 of 1000 ...»,
# «torch.bfloat16: 0 of 500 ...», «torch.float32: 0 of 500 ...».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/draw.py" <<'PY'
import torch

VOCABULARY, KEPT = 128256, 10


def count_zeros(dtype, draws, replacement=False):
    torch.manual_seed(0)
    p = torch.zeros(VOCABULARY, dtype=dtype)
    p[:KEPT] = 1 / KEPT
    if replacement:
        drawn = torch.multinomial(p, draws, replacement=True)
    else:
        drawn = torch.cat([torch.multinomial(p, 1) for _ in range(draws)])
    zeros = (drawn >= KEPT).sum().item()
    print(f"{dtype}{' with replacement' * replacement}: {zeros} of {draws} draws have probability 0")
    return zeros


assert count_zeros(torch.float16, 1000) > 0, "this has changed"
assert count_zeros(torch.float16, 1000, replacement=True) == 0, "this has changed"
assert count_zeros(torch.bfloat16, 500) == count_zeros(torch.float32, 500) == 0, "this has changed"
PY
"$folder/env/bin/python" "$folder/draw.py"
