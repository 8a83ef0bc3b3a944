#!/usr/bin/env bash
# torch 2.13.0 (CPU): a cast down and up again under torch.compile.
#
# Common belief: x.to(torch.bfloat16).float() rounds to bfloat16, as it is written, so it can emulate storage in it, in
# eager and in compiled code.
# Behaviour: inside one compiled function the two casts to bfloat16 or float16 cancel. Nothing is rounded, 100000 does
# not overflow float16, and what rounding lost, x - x.to(torch.bfloat16).float(), is 0. The casts to float8 are kept.
# torch._inductor.config.emulate_precision_casts = True keeps them all.
# Seen: 1/3 and 100000, «bfloat16: eager [0.333984375, 99840.0], compiled [0.3333333432674408, 100000.0]», «float16:
# eager [0.333251953125, inf], compiled [0.3333333432674408, 100000.0]», «float8_e5m2: eager [0.3125, inf], compiled
# [0.3125, inf]».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$folder/casts.py" <<'PY'
import torch
import torch._inductor.config

x = torch.tensor([1 / 3, 1e5])


def round_to(x, dtype):
    return x.to(dtype).float()


def compile_and_run(dtype, emulate):
    torch._dynamo.reset()
    with torch._inductor.config.patch(emulate_precision_casts=emulate):
        return torch.compile(round_to, fullgraph=True, dynamic=False)(x, dtype)


for name in ("bfloat16", "float16", "float8_e5m2"):
    dtype = getattr(torch, name)
    eager, compiled = round_to(x, dtype), compile_and_run(dtype, emulate=False)
    print(f"{name}: eager {eager.tolist()}, compiled {compiled.tolist()}")
    assert not torch.equal(eager, x) and torch.equal(compile_and_run(dtype, emulate=True), eager)
    assert torch.equal(compiled, eager if name == "float8_e5m2" else x), "this has changed"
PY
"$folder/env/bin/python" "$folder/casts.py"
