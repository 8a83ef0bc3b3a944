#!/usr/bin/env bash
# onnxruntime-extensions 0.15.2 (the tokenizer of onnxruntime-genai) with tokenizers 0.23.3: a text whose last
# characters begin like an added token.
#
# Common belief: added tokens are looked for first, and a text that holds none of them is encoded as if there were none.
# Behaviour: where the text ends before it is clear that an added token does not follow, what was compared is lost, all
# but its first character. Every chat model has tokens that begin with «<|», so code that ends in «i<n» loses the n, and
# an added token of words loses more. A text that goes on for long enough is right, and so is one that ends in «<».
# Seen: «if i<n -> if i<», «<| -> <», «if i<nm -> if i<nm», «I am hoping to -> I am hopi» with <|im_start|>, <|im_end|>
# and «ing the» added.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q numpy==2.4.6 tokenizers==0.23.3 onnxruntime-extensions==0.15.2
cat > "$folder/end.py" <<'PY'
import json
import sys
from pathlib import Path

from onnxruntime_extensions.pp_api import Tokenizer as OrtTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

folder = Path(sys.argv[1])
tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
tokenizer.add_tokens(["ing the"])
tokenizer.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
(folder / "tokenizer_config.json").write_text(json.dumps(config))
other = OrtTokenizer(str(folder))
expected = {"if i<n": "if i<", "<|": "<", "if i<nm": "if i<nm", "i <": "i <", "I am hoping to": "I am hopi"}
for text, kept in expected.items():
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    decoded = tokenizer.decode([int(i) for i in other.tokenize(text)])
    print(f"{text} -> {decoded}")
    assert decoded == kept, "this has changed"
PY
mkdir "$folder/model"
"$folder/env/bin/python" "$folder/end.py" "$folder/model"
