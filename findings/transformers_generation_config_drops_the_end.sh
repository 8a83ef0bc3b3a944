#!/usr/bin/env bash
# transformers 5.23.0: where generate takes the end-of-sequence token from.
#
# Common belief: generation_config.json overrides single keys, and eos_token_id of config.json stands where it names
# none.
# Behaviour: as soon as the file exists it stands alone. One that holds a top_k only leaves generate without an end, and
# it runs to max_new_tokens, without a warning that says so. Without the file the end of config.json is taken.
# Seen: a model that always gives token 5, config.json says eos_token_id 5, max_new_tokens 8: «without
# generation_config.json: eos_token_id 5, 1 new tokens», «generation_config.json of a top_k: eos_token_id None, 8 new
# tokens».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/end.py" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 64}
layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
model = LlamaForCausalLM(LlamaConfig(bos_token_id=1, eos_token_id=5, **sizes, **layers))
with torch.no_grad():
    for name, weight in model.named_parameters():
        weight.fill_(0 if "_proj" in name else 1)
    model.lm_head.weight.zero_()
    model.lm_head.weight[5] = 1
model.save_pretrained(folder)
generation = folder / "generation_config.json"
found = []
for name in ("without generation_config.json", "generation_config.json of a top_k"):
    generation.unlink(missing_ok=True)
    if name.endswith("top_k"):
        generation.write_text('{"do_sample": true, "top_k": 3}')
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = loaded.generate(torch.tensor([[1]]), attention_mask=torch.ones(1, 1), max_new_tokens=8, do_sample=False)
    found.append((loaded.generation_config.eos_token_id, ids.shape[1] - 1))
    print(f"{name}: eos_token_id {found[-1][0]}, {found[-1][1]} new tokens")
assert loaded.config.eos_token_id == 5
assert found == [(5, 1), (None, 8)], "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/end.py" "$folder/model"
