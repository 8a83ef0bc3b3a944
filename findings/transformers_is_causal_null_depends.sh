#!/usr/bin/env bash
# transformers 5.23.0: the key is_causal in config.json of a model that decodes.
#
# Common belief: LlamaForCausalLM is causal whatever config.json says; is_causal is an attribute of its layers, and null
# there is the same as no key.
# Behaviour: the masks heed the key of the config. With false every token sees those behind it. With null it depends on
# the implementation of attention: sdpa stays causal, eager does not, so that the same folder is two models.
# Seen: another last token of 12 changes the logits of «1 position» without the key and with true, of «12 positions» with
# false, and with null of «1 position» by sdpa and of «12 positions» by eager.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 torch==2.13.0
cat > "$folder/causal.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.5}
ids = torch.arange(12).unsqueeze(0)
other = ids.clone()
other[0, -1] = 40


@torch.no_grad()
def count_changed(keys, attention):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **keys, attn_implementation=attention)).eval()
    return int(((model(ids).logits - model(other).logits)[0].abs().amax(dim=-1) > 1e-4).sum())


for keys, attention, expected in (
    ({}, "sdpa", 1), ({}, "eager", 1), ({"is_causal": True}, "sdpa", 1), ({"is_causal": True}, "eager", 1),
    ({"is_causal": False}, "sdpa", 12), ({"is_causal": False}, "eager", 12),
    ({"is_causal": None}, "sdpa", 1), ({"is_causal": None}, "eager", 12),
):
    changed = count_changed(keys, attention)
    print(f"{keys or 'no key'}, {attention}: the last token changes the logits of {changed} position{'s' * (changed > 1)}")
    assert changed == expected, "this has changed"
PY
"$folder/env/bin/python" "$folder/causal.py"
