#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: tokenizer.ggml.pre of a GGUF file.
#
# Common belief: the field, which names how text is split before merges, is read or refused.
# Behaviour: «llama-bpe» is read. «smollm», the name that SmolLM2's files bear and that splits each digit off, is taken
# for GPT-2's rule without a word, which keeps a number whole and merges it.
# Seen: «llama-bpe: ['12', '3', '4']», «gpt-2: ['1234']», «smollm: ['1234']».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0
cat > "$folder/split.py" <<'PY'
import sys
from pathlib import Path

import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "34", "1234", "<|end|>"]


def write_tokenizer(pre):
    file = gguf.GGUFWriter(folder / f"{pre}.gguf", "llama")
    file.add_block_count(1)
    file.add_context_length(64)
    file.add_embedding_length(8)
    file.add_feed_forward_length(8)
    file.add_head_count(1)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(vocabulary)
    file.add_token_types([gguf.TokenType.NORMAL] * (len(vocabulary) - 1) + [gguf.TokenType.CONTROL])
    file.add_token_merges(["1 2", "3 4", "12 34"])
    file.add_bos_token_id(len(vocabulary) - 1)
    file.add_eos_token_id(len(vocabulary) - 1)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


tokens = {}
for pre in ("llama-bpe", "gpt-2", "smollm"):
    write_tokenizer(pre)
    tokens[pre] = AutoTokenizer.from_pretrained(folder, gguf_file=f"{pre}.gguf").tokenize("1234")
    print(f"{pre}: {tokens[pre]}")
assert list(tokens.values()) == [["12", "3", "4"], ["1234"], ["1234"]], "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/split.py" "$folder/model"
