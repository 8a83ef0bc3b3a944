#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.1: a checkpoint of int4 weights with zero points (W4A16_ASYM).
#
# Common belief: what compressed-tensors writes, transformers loads through it.
# Behaviour: the symmetric one loads. The asymmetric one is refused: the file's zero points are packed, eight rows to a
# word, and the model that is to take them expects one row a row. CompressedTensorsConfig(dequantize=True) loads it.
# Seen: «symmetric: loads», «asymmetric: refused, weight_zero_point of (8, 2) in the file for 64 rows», «asymmetric,
# dequantize=True: loads».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 compressed-tensors==0.20.1
cat > "$folder/load.py" <<'PY'
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 64}
layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


def write_model(folder, symmetric):
    model = LlamaForCausalLM(LlamaConfig(**sizes, **layers))
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.fill_(0.01)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.fill_(1)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def try_to_load(folder, **options):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert model(torch.arange(8)[None]).logits.isfinite().all()
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error), error
        return "refused"
    return "loads"


folder = Path(sys.argv[1])
for name, symmetric in (("sym", True), ("asym", False)):
    write_model(folder / name, symmetric)
outcomes = [try_to_load(folder / "sym"), try_to_load(folder / "asym")]
outcomes.append(try_to_load(folder / "asym", quantization_config=CompressedTensorsConfig(dequantize=True)))
shape = load_file(folder / "asym/model.safetensors")["model.layers.0.mlp.down_proj.weight_zero_point"].shape
print(f"symmetric: {outcomes[0]}")
print(f"asymmetric: {outcomes[1]}, weight_zero_point of {tuple(shape)} in the file for 64 rows")
print(f"asymmetric, dequantize=True: {outcomes[2]}")
assert outcomes == ["loads", "refused", "loads"] and tuple(shape) == (8, 2), "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/load.py" "$folder/model"
