#!/usr/bin/env bash
# tokenizers 0.23.3: the Metaspace decoder and the first token of a text.
#
# Common belief: the decoder gives each ▁ back as a space, and takes off the one at the start that the encoder put
# there.
# Behaviour: of the first token it drops every ▁, wherever it stands. A token of several words, or of an indent, which
# split=False lets a trainer make, loses its spaces if it comes first, and keeps them anywhere else. Programs that
# decode token by token see every token first.
# Seen: «'in the end' -> ['▁in▁the', '▁end'] -> 'inthe end'», «'    x' -> ['▁▁▁▁', 'x'] -> 'x'», «'end in the' ->
# ['▁end', '▁in▁the'] -> 'end in the'».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tokenizers==0.23.3
cat > "$folder/first.py" <<'PY'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

vocabulary = [("<unk>", 0.0), ("▁in▁the", -1.0), ("▁end", -1.0), ("▁▁▁▁", -1.0), ("x", -1.0)]
tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
tokenizer.decoder = decoders.Metaspace(split=False)
found = {}
for text in ("in the end", "    x", "end in the"):
    encoding = tokenizer.encode(text)
    found[text] = tokenizer.decode(encoding.ids)
    print(f"{text!r} -> {encoding.tokens} -> {found[text]!r}")
assert found == {"in the end": "inthe end", "    x": "x", "end in the": "end in the"}, "this has changed"
PY
PYTHONUTF8=1 "$folder/env/bin/python" "$folder/first.py"
