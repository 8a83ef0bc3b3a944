#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0 (CPU): Float8WeightOnlyConfig of a linear with a row of zeros.
#
# Common belief: a weight of 0 is exact in every format, so rows of zeros, as pruning and a padded vocabulary leave
# them, stay zeros. Int8WeightOnlyConfig keeps them.
# Behaviour: the row's scale is its largest value over 448, which is 0, and 0 / 0 makes each weight of the row NaN. So
# is that output of every forward, and argmax takes NaN for the largest logit. Nothing is raised.
# Seen: «Int8WeightOnlyConfig: NaN in 0 weights, 0 outputs, largest logit is output 15», «Float8WeightOnlyConfig: NaN
# in 16 weights, 1 outputs, largest logit is output 3».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q torchao==0.18.0
cat > "$folder/zeros.py" <<'PY'
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

SIZE, ZERO = 16, 3


def count_nan(config):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(SIZE, SIZE, bias=False)
    head.weight.data = torch.randn(SIZE, SIZE, generator=generator)
    head.weight.data[ZERO] = 0
    x = torch.randn(SIZE, generator=generator)
    best = head(x).argmax().item()
    quantize_(head, config)
    logits, weight = head(x), head.weight.dequantize()
    counts = [values.isnan().sum().item() for values in (weight, logits)]
    largest = logits.argmax().item()
    name = type(config).__name__
    print(f"{name}: NaN in {counts[0]} weights, {counts[1]} outputs, largest logit is output {largest}")
    return counts, largest == best


assert count_nan(Int8WeightOnlyConfig()) == ([0, 0], True)
assert count_nan(Float8WeightOnlyConfig()) == ([SIZE, 1], False), "this has changed"
PY
"$folder/env/bin/python" "$folder/zeros.py"
