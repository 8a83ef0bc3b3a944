#!/usr/bin/env bash
# tokenizers 0.23.3: decoding a special token that is marked «normalized: true».
#
# Common belief: skip_special_tokens=True leaves out every token that tokenizer.json calls special.
# Behaviour: id_to_token gives the token's text after the normalizer, and decode looks for that text among the special
# tokens. A normalizer that puts ▁ before a text, as Llama 2's does, makes it «▁<s>», which is none, so <s> stays in the
# text. So does <S> where the normalizer lowers letters. token_to_id and get_added_tokens_decoder still know the token.
# Seen: «prepend, normalized False: <s> is <s>, decoded without special tokens: a», «prepend, normalized True: <s> is
# ▁<s>, decoded without special tokens: <s> a», «lower, normalized True: <S> is <s>, decoded without special tokens:
# <s> a».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tokenizers==0.23.3
cat > "$folder/special.py" <<'PY'
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

NORMALIZERS = {"prepend": normalizers.Prepend("▁"), "lower": normalizers.Lowercase()}


def decode(normalizer, special, normalized):
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<unk>", special, "▁a"])}, []))
    tokenizer.normalizer = NORMALIZERS[normalizer]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(special, normalized=normalized)])
    assert tokenizer.token_to_id(special) == 1 and tokenizer.get_added_tokens_decoder()[1].special
    token, text = tokenizer.id_to_token(1), tokenizer.decode([1, 2], skip_special_tokens=True)
    print(f"{normalizer}, normalized {normalized}: {special} is {token}, decoded without special tokens: {text}")
    return token, text


assert decode("prepend", "<s>", False) == ("<s>", "a")
assert decode("prepend", "<s>", True) == ("▁<s>", "<s> a"), "this has changed"
assert decode("lower", "<S>", True) == ("<s>", "<s> a"), "this has changed"
PY
PYTHONUTF8=1 "$folder/env/bin/python" "$folder/special.py"
