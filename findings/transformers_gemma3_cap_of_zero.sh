#!/usr/bin/env bash
# transformers 5.23.0: "final_logit_softcapping": 0.0 in the config of a Gemma 3.
#
# Common belief: a cap of 0 means no cap, as null does; Gemma 3 has none, and other programs write «off» as 0.
# Behaviour: only null is none. With 0.0 the logits are divided by it: some are NaN, the others 0, and argmax answers
# with the same id for every text, without a warning.
# Seen: «None: 12 ids of 12 texts, all logits finite: True», «0.0: 1 id of 12 texts, all logits finite: False».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 torch==2.13.0
cat > "$folder/cap.py" <<'PY'
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.5}
for cap, expected in ((None, (12, True)), (0.0, (1, False))):
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, final_logit_softcapping=cap)).eval()
    with torch.no_grad():
        logits = model(torch.arange(1, 13).unsqueeze(1)).logits[:, -1]
    count, finite = len(logits.argmax(dim=-1).unique()), bool(logits.isfinite().all())
    print(f"{cap}: {count} id{'s' * (count > 1)} of {len(logits)} texts, all logits finite: {finite}")
    assert (count, finite) == expected, "this has changed"
PY
"$folder/env/bin/python" "$folder/cap.py"
