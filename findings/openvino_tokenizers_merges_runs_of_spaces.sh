#!/usr/bin/env bash
# openvino-tokenizers 2026.4.1.0 with transformers 5.23.0: a tokenizer.json whose pre-tokenizer is Metaspace.
#
# Common belief: each space becomes one ▁, so runs of spaces, as in indented code, come through, and the converted
# tokenizer gives the ids of the one it was made from.
# Behaviour: with split=True, which is Metaspace's default, all but one space of a run are lost before the text is
# encoded, and decoding cannot give them back. With split=False all are kept. Nothing warns.
# Seen: text «x   y», «split True: tokenizers ['▁x', '▁', '▁', '▁y'], openvino ['▁x', '▁y']», «split False: tokenizers
# ['▁x', '▁', '▁', '▁y'], openvino ['▁x', '▁', '▁', '▁y']».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile numpy==2.4.6 transformers==5.23.0 tokenizers==0.23.3
"$folder/env/bin/pip" install -q --no-compile openvino==2026.4.1 openvino-tokenizers==2026.4.1.0
cat > "$folder/spaces.py" <<'PY'
import openvino
import openvino_tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "x   y"
names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}


def encode(split):
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "x", "y", "▁x", "▁y"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "x"), ("▁", "y")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    tokenizer.decoder = decoders.Metaspace(split=split)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    model = openvino.Core().compile_model(openvino_tokenizers.convert_tokenizer(fast), "CPU")
    ids = model([TEXT])["input_ids"][0].tolist()
    tokens = tokenizer.encode(TEXT).tokens, [tokenizer.id_to_token(i) for i in ids]
    print(f"split {split}: tokenizers {tokens[0]}, openvino {tokens[1]}")
    return tokens


whole = ["▁x", "▁", "▁", "▁y"]
assert encode(False) == (whole, whole)
assert encode(True) == (whole, ["▁x", "▁y"]), "this has changed"
PY
HF_HUB_OFFLINE=1 PYTHONUTF8=1 "$folder/env/bin/python" "$folder/spaces.py"
