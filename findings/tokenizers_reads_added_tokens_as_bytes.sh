#!/usr/bin/env bash
# tokenizers 0.23.3: decoding an added token in a byte-level tokenizer.
#
# Common belief: an added token is stored as its own text, so it decodes to that text.
# Behaviour: the decoder cannot tell it from a token of the vocabulary. Where each of its characters also stands for a
# byte (all of printable Latin-1 does), they are read as bytes: «é» becomes the byte 0xE9, which is no UTF-8 here, and
# «Ġ» a space. One character outside that alphabet, a space or a Chinese one, makes the whole token safe.
# Seen: «<größe>: id 256, decoded <gr��e>», «Ġx: id 256, decoded  x», «<größe >: id 256, decoded <größe >», «日é: id
# 256, decoded 日é».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tokenizers==0.23.3
cat > "$folder/added.py" <<'PY'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
expected = {"<größe>": "<gr\ufffd\ufffde>", "Ġx": " x", "<größe >": "<größe >", "日é": "日é"}
for token, text in expected.items():
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([token])
    assert tokenizer.decode(tokenizer.encode("größe").ids) == "größe"
    ids = tokenizer.encode(token).ids
    decoded = tokenizer.decode(ids)
    print(f"{token}: id {ids[0]}, decoded {decoded}")
    assert ids == [256] and decoded == text, "this has changed"
PY
PYTHONUTF8=1 "$folder/env/bin/python" "$folder/added.py"
