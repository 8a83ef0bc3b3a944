#!/usr/bin/env bash
# auto-round 0.16.1 with transformers 5.23.0: a head in 4 bits by plain rounding (iters=0, disable_opt_rtn=True).
#
# Common belief: quant_lm_head=True packs the head as it packs the layers, by any of the methods.
# Behaviour: the head is rounded to the grid of 4 bits and written as bfloat16, without its scales, while config.json
# says 4 bits for it. transformers builds a packed head from that, finds none of its tensors in the file, and leaves it
# uninitialized: nothing is raised, a report lists the keys. The optimized rounding (iters=0 alone) packs the head.
# Seen: «disable_opt_rtn=True: config.json says 4 bits, file holds ['lm_head.weight'], at most 16 values a group,
# missing on loading ['lm_head.qweight', 'lm_head.qzeros', 'lm_head.scales']», «disable_opt_rtn=False: config.json says
# 4 bits, file holds ['lm_head.qweight', 'lm_head.qzeros', 'lm_head.scales'], missing on loading []».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q --no-compile transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0
"$folder/env/bin/pip" install -q --no-compile auto-round==0.16.1
cat > "$folder/head.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZE, GROUP = 128, 32
sizes = {"vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": SIZE, "max_position_embeddings": 64}
layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
PACKED = ["lm_head.qweight", "lm_head.qzeros", "lm_head.scales"]


def quantize(folder, disable_opt_rtn):
    model = LlamaForCausalLM(LlamaConfig(**sizes, **layers)).bfloat16()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZE)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w1")
    texts = {"dataset": [torch.randint(SIZE, (1, 32)) for _ in range(4)], "nsamples": 4, "seqlen": 32}
    method = {"iters": 0, "disable_opt_rtn": disable_opt_rtn, "quant_lm_head": True}
    AutoRound(model, fast, bits=4, group_size=GROUP, device_map="cpu", **method, **texts).quantize_and_save(folder)
    return next(Path(folder).rglob("config.json")).parent


def inspect(disable_opt_rtn):
    folder = quantize(f"{sys.argv[1]}/{disable_opt_rtn}", disable_opt_rtn)
    config = json.loads((folder / "config.json").read_text())
    bits = config["quantization_config"]["extra_config"]["lm_head"]["bits"]
    head = {name: x for name, x in load_file(folder / "model.safetensors").items() if name.startswith("lm_head.")}
    values = ""
    if "lm_head.weight" in head:
        groups = head["lm_head.weight"].float().view(-1, GROUP)
        count = max(len(group.unique()) for group in groups)
        assert count <= 2**bits < GROUP, "this has changed"
        values = f", at most {count} values a group"
    _, report = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", output_loading_info=True)
    missing = sorted(report["missing_keys"])
    name = f"disable_opt_rtn={disable_opt_rtn}"
    print(f"{name}: config.json says {bits} bits, file holds {sorted(head)}{values}, missing on loading {missing}")
    return bits, sorted(head), missing


assert inspect(True) == (4, ["lm_head.weight"], PACKED), "this has changed"
assert inspect(False) == (4, PACKED, [])
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/head.py" "$folder/model"
