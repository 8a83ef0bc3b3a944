#!/usr/bin/env bash
# transformers 5.23.0: the older key «type» of rope_scaling, in models with a rotary embedding for each type of layer.
#
# Common belief: rope_scaling {"type": "linear", "factor": 8.0} is the older spelling of {"rope_type": "linear", ...},
# and every config class takes both.
# Behaviour: Llama's class does. Those of Gemma 3, Gemma 3n and OLMo 3 begin with rope_type «default» for each type of
# layer and add what rope_scaling has. So «type» stands beside a rope_type that says «default», and nothing is scaled:
# the model computes as if its context were never extended. What is said is that the key «factor» was not recognized.
# Seen: «llama: rope_type linear, type linear», «gemma3_text: rope_type linear, type default», the same for gemma3n_text
# and olmo3.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/rope.py" <<'PY'
from transformers import AutoConfig

found = {}
for family in ("llama", "gemma3_text", "gemma3n_text", "olmo3"):
    for key in ("rope_type", "type"):
        rope = AutoConfig.for_model(family, rope_scaling={key: "linear", "factor": 8.0}).rope_parameters
        found[family, key] = rope.get("full_attention", rope)["rope_type"]
    print(f"{family}: rope_type {found[family, 'rope_type']}, type {found[family, 'type']}")
assert all(kind == "linear" for (_, key), kind in found.items() if key == "rope_type"), "this has changed"
types = [kind for (_, key), kind in found.items() if key == "type"]
assert types == ["linear", "default", "default", "default"], "this has changed"
PY
"$folder/env/bin/python" "$folder/rope.py" 2> /dev/null
