#!/usr/bin/env bash
# transformers 5.23.0: which added tokens decode(skip_special_tokens=True) leaves out.
#
# Common belief: what tokenizer_config.json lists in additional_special_tokens is special, as what it names eos_token is.
# Behaviour: a token that tokenizer.json has already, without the flag «special», stays in the text although a list
# names it. A key of its own (sep_token, or a name in an object of extra_special_tokens) makes it special, and so does
# added_tokens_decoder, against the flag of tokenizer.json. A list has an effect on tokens alone that are not there yet.
# Seen: «no key: 'a <tool> b'», «additional_special_tokens, a list: 'a <tool> b'», «extra_special_tokens, a list: 'a
# <tool> b'», and 'a b' with extra_special_tokens as an object, with sep_token and with added_tokens_decoder.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/lists.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = Path(sys.argv[1])
tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
tokenizer.save(str(folder / "tokenizer.json"))
configs = {
    "no key": {},
    "additional_special_tokens, a list": {"additional_special_tokens": ["<tool>"]},
    "extra_special_tokens, a list": {"extra_special_tokens": ["<tool>"]},
    "extra_special_tokens, an object": {"extra_special_tokens": {"tool_token": "<tool>"}},
    "sep_token": {"sep_token": "<tool>"},
    "added_tokens_decoder": {"added_tokens_decoder": {"3": {"content": "<tool>", "special": True}}},
}
texts = []
for name, config in configs.items():
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    texts.append(loaded.decode([0, 3, 1], skip_special_tokens=True))
    print(f"{name}: {texts[-1]!r}")
assert texts == ["a <tool> b"] * 3 + ["a b"] * 3, "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/lists.py" "$folder/model" 2> /dev/null
