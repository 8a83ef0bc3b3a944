#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.1: dtype of a mixture of experts in int4 (pack-quantized, W4A16).
#
# Common belief: from_pretrained(dtype=torch.float32) gives a float32 model of the stored weights, code times scale, as
# a reference needs it.
# Behaviour: that holds for the dense linears. The experts become bfloat16, the dtype of the file's scales, and each
# product is rounded to it, although model.dtype says float32. With CompressedTensorsConfig(dequantize=True) the dense
# linears are rounded to bfloat16 too, and stored as float32.
# Seen: «by default: q_proj float32, 0% of its weights differ, experts bfloat16, 37% differ», «dequantize=True: q_proj
# float32, 30% of its weights differ, experts bfloat16, 37% differ».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 compressed-tensors==0.20.1
cat > "$folder/experts.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, MixtralConfig, MixtralForCausalLM

FORMAT, GROUP = "pack-quantized", 32
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 64}
layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
folder = Path(sys.argv[1])
torch.manual_seed(0)
MixtralForCausalLM(MixtralConfig(**sizes, **layers, **experts)).bfloat16().save_pretrained(folder)
arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=FORMAT)
compressor = BaseCompressor.get_value_from_registry(FORMAT)
file, right = {}, {}
for name, weight in load_file(folder / "model.safetensors").items():
    if "_proj." not in name and ".experts." not in name:
        file[name] = weight
        continue
    codes = torch.randint(-8, 8, weight.shape)
    scales = torch.rand(weight.shape[0], weight.shape[1] // GROUP).mul(0.01).bfloat16()
    right[name] = codes * scales.float().repeat_interleave(GROUP, 1)
    for part, tensor in compressor.compress({"weight": right[name], "weight_scale": scales}, scheme).items():
        file[name.removesuffix("weight") + part] = tensor
save_file(file, folder / "model.safetensors", {"format": "pt"})
method = QuantizationConfig(
    config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*gate$"], format=FORMAT, quantization_status="compressed"
)
config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = json.loads(method.model_dump_json()) | {"quant_method": "compressed-tensors"}
(folder / "config.json").write_text(json.dumps(config))
down = torch.stack([weight for name, weight in right.items() if name.endswith(".w2.weight")])
projection = right["model.layers.0.self_attn.q_proj.weight"]


def load(**options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model(torch.arange(8)[None])  # the first forward unpacks the dense linears
    assert model.dtype == torch.float32
    block = model.model.layers[0]
    return block.self_attn.q_proj.weight, block.mlp.experts.down_proj


def compare(name, dense, stacked):
    dtypes = [str(weight.dtype).removeprefix("torch.") for weight in (dense, stacked)]
    shares = [(dense != projection).float().mean().item(), (stacked != down).float().mean().item()]
    of_dense = f"q_proj {dtypes[0]}, {shares[0]:.0%} of its weights differ"
    print(f"{name}: {of_dense}, experts {dtypes[1]}, {shares[1]:.0%} differ")
    assert dense.dtype == torch.float32
    assert stacked.dtype == torch.bfloat16 and torch.equal(stacked, down.bfloat16()), "this has changed"


dense, stacked = load()
compare("by default", dense, stacked)
assert torch.equal(dense, projection)
dense, stacked = load(quantization_config=CompressedTensorsConfig(dequantize=True))
compare("dequantize=True", dense, stacked)
assert torch.equal(dense, projection.bfloat16().float()) and not torch.equal(dense, projection), "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/experts.py" "$folder/model"
