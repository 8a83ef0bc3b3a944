#!/usr/bin/env bash
# transformers 5.23.0 with tokenizers 0.23.3: what AutoTokenizer takes from tokenizer.json.
#
# Common belief: where there is a tokenizer.json it is the tokenizer, and tokenizer_class names a wrapper around it.
# Behaviour: some classes, GPT2Tokenizer for one, take its vocabulary and merges and put their own pre-tokenizer in the
# place of the file's. A folder that names that class, and whose file splits digits, loses the split.
# PreTrainedTokenizerFast leaves the file as it is.
# Seen: «tokenizer.json: ['a', '1', '2']», «GPT2Tokenizer: ['a', '12']», «PreTrainedTokenizerFast: ['a', '1', '2']».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/classes.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: i for i, token in enumerate([*alphabet, "12", "<|end|>"])}
tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
digits, spaces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, spaces])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<|end|>"])
tokenizer.save(str(folder / "tokenizer.json"))
tokens = {"tokenizer.json": tokenizer.encode("a12").tokens}
for name in ("GPT2Tokenizer", "PreTrainedTokenizerFast"):
    names = {"bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **names}))
    tokens[name] = AutoTokenizer.from_pretrained(folder).tokenize("a12")
for name, found in tokens.items():
    print(f"{name}: {found}")
assert list(tokens.values()) == [["a", "1", "2"], ["a", "12"], ["a", "1", "2"]], "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/classes.py" "$folder/model"
