#!/usr/bin/env bash
# pytorch-tokenizers 1.5.0 (ExecuTorch's) with tokenizers 0.23.3: a tokenizer.json whose normalizer is NFC, as all of
# Qwen's are.
#
# Common belief: NFC leaves a text that is composed already, as nearly all text is, as it is, and two libraries give the
# same ids for one file.
# Behaviour: what has an accent is taken apart, and the accent is lost. Latin letters become plain ones, й becomes и,
# が becomes か, another sound, and Korean syllables keep their first consonant alone. The same letters as base and
# accent come out composed. One line in the log says that the normalizer may not handle all edge cases.
# Seen: «café -> cafe», «Привет, йод -> Привет, иод», «がく -> かく», «한국어 -> ᄒᄀᄋ», «日本語 -> 日本語»; tokenizers gives
# each back as it was.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tokenizers==0.23.3 sentencepiece==0.2.3 tiktoken==0.14.0 pytorch-tokenizers==1.5.0
cat > "$folder/accents.py" <<'PY'
import sys
import unicodedata

from pytorch_tokenizers import CppHFTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

path = sys.argv[1]
bytes_of = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(bytes_of, []))
tokenizer.normalizer = normalizers.NFC()
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<s>", "</s>"])
tokenizer.save(path)
other = CppHFTokenizer()
other.load(path)
expected = {"café": "cafe", "Привет, йод": "Привет, иод", "がく": "かく", "한국어": "ᄒᄀᄋ", "日本語": "日本語"}
for text, result in expected.items():
    assert unicodedata.is_normalized("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    decoded = tokenizer.decode(other.encode(text, 0, 0))
    print(f"{text} -> {decoded}")
    assert decoded == result, "this has changed"
assert tokenizer.decode(other.encode("e\u0301", 0, 0)) == "é"
PY
PYTHONUTF8=1 "$folder/env/bin/python" "$folder/accents.py" "$folder/tokenizer.json"
