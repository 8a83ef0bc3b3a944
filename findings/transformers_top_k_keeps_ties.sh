#!/usr/bin/env bash
# transformers 5.23.0: top_k where logits are equal.
#
# Common belief: top_k=k leaves k tokens to draw from.
# Behaviour: it leaves every token whose logit is not below the k-th largest, so all that equal it stay. bfloat16 logits
# are often equal: of 151,936 normal ones top_k=50 leaves 53. top_p does cut among equals, so the two differ in what a
# tie is.
# Seen: «top_k=2 of [3, 2, 2, 2, 1] leaves 4 tokens», «top_k=50 of 151936 bfloat16 logits leaves 53»,
# «top_p=0.5 of [3, 2, 2, 2, 1] leaves 2».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/ties.py" <<'PY'
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper


def count_left(warper, logits):
    return warper(None, logits.clone()).isfinite().sum().item()


few = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
generator = torch.Generator().manual_seed(0)
many = torch.randn(1, 151936, generator=generator).bfloat16()
left = [count_left(TopKLogitsWarper(2), few), count_left(TopKLogitsWarper(50), many)]
nucleus = count_left(TopPLogitsWarper(0.5), few)
print(f"top_k=2 of [3, 2, 2, 2, 1] leaves {left[0]} tokens")
print(f"top_k=50 of 151936 bfloat16 logits leaves {left[1]}")
print(f"top_p=0.5 of [3, 2, 2, 2, 1] leaves {nucleus}")
assert left[0] == 4 and left[1] > 50 and nucleus == 2, "this has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/ties.py"
