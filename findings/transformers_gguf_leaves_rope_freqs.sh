#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: rotary frequencies of a GGUF file of Llama 3.1 or 3.2.
#
# Common belief: what transformers loads from a GGUF file is the model of that file, so it is a reference for it.
# Behaviour: llama.cpp's converter writes llama3's scaling of the frequencies as a tensor, rope_freqs.weight, and as
# nothing else. transformers reads the tensor past, without a word, and rotates by the plain frequencies: the logits
# part from the model's own as the text grows.
# Seen: «frequencies over those of rope_freqs: [1.0, 2.0, 4.0, 8.0], rope_type default».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 gguf==0.19.0
cat > "$folder/rotate.py" <<'PY'
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

WIDTH, HEADS, HEAD_DIM, FEED_FORWARD, VOCABULARY, THETA = 16, 2, 8, 32, 32, 500000.0
folder = Path(sys.argv[1])
factors = np.array([1, 2, 4, 8], np.float32)
file = gguf.GGUFWriter(folder / "model.gguf", "llama")
file.add_block_count(1)
file.add_context_length(131072)
file.add_embedding_length(WIDTH)
file.add_feed_forward_length(FEED_FORWARD)
file.add_head_count(HEADS)
file.add_head_count_kv(HEADS)
file.add_layer_norm_rms_eps(1e-5)
file.add_rope_freq_base(THETA)
file.add_rope_dimension_count(HEAD_DIM)
file.add_vocab_size(VOCABULARY)
shapes = {f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
shapes |= {f"blk.0.ffn_{name}.weight": (FEED_FORWARD, WIDTH) for name in ("gate", "up")}
shapes |= {"blk.0.ffn_down.weight": (WIDTH, FEED_FORWARD)}
shapes |= {f"{name}.weight": (WIDTH,) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
shapes |= {f"{name}.weight": (VOCABULARY, WIDTH) for name in ("token_embd", "output")}
for name, shape in shapes.items():
    file.add_tensor(name, np.ones(shape, np.float32))
file.add_tensor("rope_freqs.weight", factors)
file.write_header_to_file()
file.write_kv_data_to_file()
file.write_tensors_to_file()
file.close()
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
right = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM) / torch.from_numpy(factors)
ratios = [round(ratio, 4) for ratio in (model.model.rotary_emb.inv_freq / right).tolist()]
kind = model.config.rope_parameters["rope_type"]
print(f"frequencies over those of rope_freqs: {ratios}, rope_type {kind}")
assert ratios == factors.tolist() and kind == "default", "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/rotate.py" "$folder/model"
