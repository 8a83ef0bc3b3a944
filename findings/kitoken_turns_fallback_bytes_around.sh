#!/usr/bin/env bash
# kitoken 0.11.1 with sentencepiece 0.2.3: unigram models with byte_fallback, and characters outside the vocabulary.
#
# Common belief: such a character becomes the tokens of its UTF-8 bytes, first byte first, and decoding gives it back.
# Behaviour: the bytes come last first, so é is <0xA9> <0xC3>, and kitoken itself decodes that to no character. Nothing
# is raised, and text whose characters are all in the vocabulary is right. A BPE model has the bytes in order.
# Seen: «unigram: sentencepiece <0xC3> <0xA9>, kitoken <0xA9> <0xC3>, decoded aé is a��», «bpe: sentencepiece <0xC3>
# <0xA9>, kitoken <0xC3> <0xA9>, decoded aé is aé».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile sentencepiece==0.2.3 kitoken==0.11.1
cat > "$folder/bytes.py" <<'PY'
import io

import sentencepiece
from kitoken import Kitoken

TEXT = "aé"


def encode(model_type):
    model = io.BytesIO()
    options = {"vocab_size": 300, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    lines = ["a bad cab fed a deaf cafe", "a faded bead", "dad faced a decade"] * 10
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(lines), model_writer=model, model_type=model_type, **options)
    first = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    second = Kitoken.from_sentencepiece(model.getvalue())
    ids = first.encode(TEXT), second.encode(TEXT, True)
    pieces = [[first.id_to_piece(i) for i in row if first.is_byte(i)] for row in ids]
    decoded = second.decode(ids[1], True).decode(errors="replace")
    names = [" ".join(row) for row in pieces]
    print(f"{model_type}: sentencepiece {names[0]}, kitoken {names[1]}, decoded {TEXT} is {decoded}")
    assert pieces[0] == ["<0xC3>", "<0xA9>"] and second.encode("bad") == first.encode("bad")
    return pieces[1], decoded


assert encode("bpe") == (["<0xC3>", "<0xA9>"], TEXT)
assert encode("unigram") == (["<0xA9>", "<0xC3>"], "a\ufffd\ufffd"), "this has changed"
PY
PYTHONUTF8=1 "$folder/env/bin/python" "$folder/bytes.py"
