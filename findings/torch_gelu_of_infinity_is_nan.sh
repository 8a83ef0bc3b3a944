#!/usr/bin/env bash
# torch 2.13.0 (x86 CPUs with AVX-512): F.gelu of infinity.
#
# Common belief: gelu(inf) is inf, x times a probability that is 1, whatever the tensor's size. An activation that
# overflowed stays infinite until something subtracts it.
# Behaviour: in a tensor of one element it is inf. With two or more the call goes to oneDNN, which gives NaN, and inf
# for 3e38, which is finite. torch.backends.mkldnn.flags(enabled=False), float64, approximate="tanh" and torch.compile
# give inf. So does a CPU with AVX2 alone, on which this says only that.
# Seen: «1 element: inf», «2 elements: nan», «2 elements without oneDNN: inf», «2 elements, tanh: inf».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$folder/gelu.py" <<'PY'
import warnings

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", "TF32 acceleration")
if "AVX512" not in torch.backends.cpu.get_cpu_capability():
    raise SystemExit(f"skipped: this CPU has {torch.backends.cpu.get_cpu_capability()}, no AVX-512")
two = torch.full((2,), torch.inf)
found = {"1 element": F.gelu(two[:1]), "2 elements": F.gelu(two)}
with torch.backends.mkldnn.flags(enabled=False):
    found["2 elements without oneDNN"] = F.gelu(two)
found["2 elements, tanh"] = F.gelu(two, approximate="tanh")
found["2 elements, float64"] = F.gelu(two.double())
found["2 elements, compiled"] = torch.compile(F.gelu, fullgraph=True)(two)
for name, y in found.items():
    print(f"{name}: {y[0].item()}")
    if name == "2 elements":
        assert y.isnan().all(), "this has changed"
    else:
        assert y.isposinf().all()
PY
"$folder/env/bin/python" "$folder/gelu.py"
