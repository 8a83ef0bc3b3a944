#!/usr/bin/env bash
# transformers 5.23.0: two forwards of one Llama whose rope_type is «dynamic» (NTK scaling by the length of the text).
#
# Common belief: the logits of a forward without a cache depend on its ids alone.
# Behaviour: the frequencies of the longest text so far stay with the model until a text comes that is shorter than
# max_position_embeddings. One of just that length, which is not scaled at all, or of any length above it gives other
# logits after a longer text than before. So a perplexity depends on the order of the texts. linear and yarn do not.
# Seen: max_position_embeddings 32, largest logit about 14: «dynamic, 31 tokens: logits move by 0.0 after a text of
# 128», «dynamic, 32 tokens: ... 17.0 ...», «dynamic, 48 tokens: ... 18.6 ...», «yarn, 48 tokens: ... 0.0 ...».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/twice.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT, LONGEST = 32, 128
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


@torch.no_grad()
def measure_shift(rope_type, length):
    torch.manual_seed(0)
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(rope_parameters=rope, initializer_range=0.5, use_cache=False, **sizes, **layers)
    model = LlamaForCausalLM(config).eval()
    text = torch.randint(config.vocab_size, (1, LONGEST))
    before = model(text[:, :length]).logits
    model(text)
    shift = (model(text[:, :length]).logits - before).abs().max().item()
    print(f"{rope_type}, {length} tokens: logits move by {shift:.1f} after a text of {LONGEST}")
    return shift


assert measure_shift("dynamic", CONTEXT - 1) == 0
assert measure_shift("dynamic", CONTEXT) > 1, "this has changed"
assert measure_shift("dynamic", CONTEXT + 16) > 1, "this has changed"
assert measure_shift("linear", CONTEXT + 16) == measure_shift("yarn", CONTEXT + 16) == 0
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/twice.py"
