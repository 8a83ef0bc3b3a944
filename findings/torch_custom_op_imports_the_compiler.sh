#!/usr/bin/env bash
# torch 2.13.0: what the first call of an operator made with torch.library.custom_op costs an eager program.
#
# Common belief: registering an operator makes it known to the compiler, and calling it eagerly runs the Python
# function.
# Behaviour: the first eager call imports torch._dynamo and torch._inductor, some eight hundred modules, although
# nothing is compiled. The same function by torch.library.define and impl imports none of them.
# Seen: «custom_op: 823 modules more, torch._dynamo True, torch._inductor True», «define and impl: 0 modules more,
# torch._dynamo False, torch._inductor False».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/first_call.py" <<'PY'
import sys

import torch


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


way = sys.argv[1]
if way == "custom_op":
    operator = torch.library.custom_op("first::double", double, mutates_args=())
else:
    torch.library.define("first::double", "(Tensor x) -> Tensor")
    torch.library.impl("first::double", "cpu")(double)
    operator = torch.ops.first.double
x = torch.ones(2)
before = len(sys.modules)
assert torch.equal(operator(x), x + x)
more = len(sys.modules) - before
loaded = [name in sys.modules for name in ("torch._dynamo", "torch._inductor")]
print(f"{way}: {more} modules more, torch._dynamo {loaded[0]}, torch._inductor {loaded[1]}")
assert loaded == [way == "custom_op"] * 2, "this has changed"
PY
"$folder/env/bin/python" "$folder/first_call.py" custom_op
"$folder/env/bin/python" "$folder/first_call.py" "define and impl"
