#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: add_weighted_adapter(..., combination_type="linear").
#
# Common belief: the new adapter's change of a weight is the weighted sum of the adapters' changes, which needs only
# that they are of one rank.
# Behaviour: the factors A and B are summed, each by the root of its weight, and then multiplied, so every A meets every
# B. Half an adapter and half the same adapter is twice the adapter. Of two adapters the result is as far from the sum
# as the sum is long. "cat" gives the sum. Nothing is raised, and no shape shows it.
# Seen: «0.5 a + 0.5 a: linear 2.00 times a, cat 1.00 times a», «0.5 a + 0.5 b: linear is off by 0.98 of the sum, cat by
# 0.00».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 peft==0.21.2
cat > "$folder/mix.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)), config, adapter_name="first")
model.add_adapter("second", config)
layer = model.base_model.model[0]


def mix(names, way):
    model.add_weighted_adapter(names, [0.5, 0.5], "mix", combination_type=way)
    change = layer.get_delta_weight("mix").detach()
    model.delete_adapter("mix")
    return change


a, b = (layer.get_delta_weight(name).detach() for name in ("first", "second"))
ratios = [(mix(["first", "first"], way).norm() / a.norm()).item() for way in ("linear", "cat")]
print(f"0.5 a + 0.5 a: linear {ratios[0]:.2f} times a, cat {ratios[1]:.2f} times a")
right = (a + b) / 2
errors = [((mix(["first", "second"], way) - right).norm() / right.norm()).item() for way in ("linear", "cat")]
print(f"0.5 a + 0.5 b: linear is off by {errors[0]:.2f} of the sum, cat by {errors[1]:.2f}")
assert abs(ratios[1] - 1) < 1e-4 and errors[1] < 1e-4
assert abs(ratios[0] - 2) < 1e-4 and errors[0] > 0.5, "this has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/mix.py"
