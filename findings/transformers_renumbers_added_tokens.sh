#!/usr/bin/env bash
# transformers 5.23.0 with tokenizers 0.23.3: the id of a token in added_tokens.json.
#
# Common belief: a folder of vocab.json and merges.txt gives each token of added_tokens.json the id that stands there.
# Behaviour: the token gets the next free id instead, without a word, where its own id leaves a gap after the
# vocabulary. The model was trained with the other row of its embedding.
# Seen: «added_tokens.json says 25, AutoTokenizer gives 20, 21 tokens in all», exit 0.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/ids.py" <<'PY'
import json
import string
import sys
from pathlib import Path

from transformers import AutoTokenizer

folder = Path(sys.argv[1])
(folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(string.ascii_lowercase[:20])}))
(folder / "merges.txt").write_text("#version: 0.2\n")
names = {"bos_token": "a", "eos_token": "b", "unk_token": "c"}
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **names}))
(folder / "added_tokens.json").write_text(json.dumps({"<tool>": 25}))
tokenizer = AutoTokenizer.from_pretrained(folder)
i = tokenizer.convert_tokens_to_ids("<tool>")
print(f"added_tokens.json says 25, AutoTokenizer gives {i}, {len(tokenizer)} tokens in all")
assert (i, len(tokenizer)) == (20, 21), "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/ids.py" "$folder/model"
