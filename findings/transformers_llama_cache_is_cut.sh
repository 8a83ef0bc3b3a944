#!/usr/bin/env bash
# transformers 5.23.0: the key sliding_window in the config of a model that has no window.
#
# Common belief: a llama ignores sliding_window, since its attention has no window and a forward over a whole text gives
# the same logits with the key and without it. So a config that was copied from Mistral's does no harm.
# Behaviour: the attention has none, but the cache that is made by default reads the key of any config, and throws away
# keys and values beyond it. A text that is decoded token by token then follows from other logits than the same text in
# one forward, from the first token behind the window on; 0 and false, which look like «off», cut it to a few tokens.
# Seen: «sliding_window None: 0 of 12 decoded tokens have other logits than in one forward», «4096: 0 of 12», «8: 12 of
# 12», «0: 12 of 12», «False: 12 of 12», and in each case «one forward is that without the key: True».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 torch==2.13.0
cat > "$folder/cut.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.5}
START, LENGTH = 12, 24
ids = torch.arange(LENGTH).unsqueeze(0)


@torch.no_grad()
def run(keys):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **keys)).eval()
    whole = model(ids, use_cache=False).logits[0]
    out, steps = model(ids[:, :START]), []
    for i in range(START, LENGTH):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
        steps.append(out.logits[0, -1])
    return whole, torch.stack(steps)


plain, _ = run({})
for window, expected in ((None, 0), (4096, 0), (8, 12), (0, 12), (False, 12)):
    whole, steps = run({} if window is None else {"sliding_window": window})
    others = int(((steps - whole[START:]).abs().amax(dim=-1) > 0.01).sum())
    print(f"sliding_window {window}: {others} of {LENGTH - START} decoded tokens have other logits than in one forward; "
          f"one forward is that without the key: {torch.equal(whole, plain)}")
    assert others == expected and torch.equal(whole, plain), "this has changed"
PY
"$folder/env/bin/python" "$folder/cut.py"
