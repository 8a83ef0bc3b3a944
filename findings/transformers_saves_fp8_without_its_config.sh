#!/usr/bin/env bash
# transformers 5.23.0: save_pretrained of a model in block FP8 (weight_scale_inv) that was loaded with dequantize=True,
# which is also what a machine without a GPU gets by default.
#
# Common belief: dequantize=True gives a plain bfloat16 model, and save_pretrained writes one.
# Behaviour: the weights are quantized to FP8 again, the embedding and the head too, which the first file held in
# bfloat16, while config.json loses its quantization_config. from_pretrained of the new folder takes the codes for
# weights and leaves the scales: nothing is raised, and a report lists the scales as unexpected keys.
# Seen: «config.json has a quantization_config: False», «lm_head.weight: bfloat16 before, float8_e4m3fn after, largest
# value 0.1 loaded first, 448.0 loaded again», «model.embed_tokens.weight: bfloat16 before, float8_e4m3fn after, ...»,
# «model.layers.0.self_attn.q_proj.weight: float8_e4m3fn before, float8_e4m3fn after, ...».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0
cat > "$folder/save.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

BLOCK = 128
sizes = {"vocab_size": BLOCK, "hidden_size": BLOCK, "intermediate_size": BLOCK, "max_position_embeddings": 64}
layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
first, second = Path(sys.argv[1]) / "first", Path(sys.argv[1]) / "second"


def read_model(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


LlamaForCausalLM(LlamaConfig(**sizes, **layers)).bfloat16().save_pretrained(first)
config, weights = read_model(first)
for name in [name for name in weights if "_proj" in name]:
    scale = weights[name].float().abs().max() / 448
    weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = scale.view(1, 1)
save_file(weights, first / "model.safetensors", {"format": "pt"})
method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
(first / "config.json").write_text(json.dumps(config | {"quantization_config": method}))

model = AutoModelForCausalLM.from_pretrained(first, quantization_config=FineGrainedFP8Config(dequantize=True))
assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
model.save_pretrained(second)
config, saved = read_model(second)
again = AutoModelForCausalLM.from_pretrained(second)
has_method = "quantization_config" in config
print(f"config.json has a quantization_config: {has_method}")
assert not has_method, "this has changed"
for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
    before, after = (str(file[name].dtype).removeprefix("torch.") for file in (weights, saved))
    largest = [m.get_parameter(name).abs().max().item() for m in (model, again)]
    values = f"largest value {largest[0]:.1f} loaded first, {largest[1]:.1f} loaded again"
    print(f"{name}: {before} before, {after} after, {values}")
    assert before == ("float8_e4m3fn" if "_proj" in name else "bfloat16") and largest[0] < 1
    assert after == "float8_e4m3fn" and largest[1] == 448, "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/save.py" "$folder/model"
