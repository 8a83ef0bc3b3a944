#!/usr/bin/env bash
# torch 2.13.0, on a CPU: flex_attention, compiled together with what makes its query.
#
# Common belief: flex_attention takes any query of four dimensions, [B, H, S, D], and how it came to be does not matter;
# what runs without torch.compile, or compiled in bfloat16, compiles in float32 too.
# Behaviour: the template for CPUs unpacks the sizes of the buffer beneath the query and its views. Where rotary
# embeddings turn neighbouring channels, as in Llama's own layout, that buffer has five dimensions, [B, S, H, D / 2, 2],
# and compiling ends with «too many values to unpack (expected 4)». In bfloat16 the cast back from float32 makes another
# buffer, of four, and it compiles. So the same model compiles in bfloat16 and not in float32, the dtype in which one
# would compare it with a reference.
# Seen: «bfloat16 eager (1, 2, 4, 32)», «bfloat16 compiled (1, 2, 4, 32)», «float32 eager (1, 2, 4, 32)», «float32
# compiled InductorError: LoweringException: ValueError: too many values to unpack (expected 4)».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$folder/rotary.py" <<'PY'
import torch
from torch.nn.attention.flex_attention import flex_attention


def turned(x):
    """Turn neighbouring channels of x [B, S, H, D] by 45 degrees, and stretch them, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even - odd, even + odd), dim=-1).flatten(3).type_as(x)


def attend(x, k, v):
    return flex_attention(turned(x).transpose(1, 2), k, v)


def outcome(name, run, dtype):
    x, (k, v) = torch.randn(1, 4, 2, 32, dtype=dtype), torch.randn(2, 1, 2, 128, 32, dtype=dtype)
    torch._dynamo.reset()
    try:
        said = str(tuple(run(x, k, v).shape))
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    print(f"{str(dtype).removeprefix('torch.')} {name} {said}")
    return said


fine = "(1, 2, 4, 32)"
for dtype in (torch.bfloat16, torch.float32):
    assert outcome("eager", attend, dtype) == fine
    said = outcome("compiled", torch.compile(attend), dtype)
    assert said == fine if dtype == torch.bfloat16 else "too many values to unpack (expected 4)" in said, "this changed"
PY
"$folder/env/bin/python" -W ignore "$folder/rotary.py"
