#!/usr/bin/env bash
# llguidance 1.9.1: a number with a bound in a JSON schema.
#
# Common belief: minimum and maximum restrict the value, and change nothing about how a number may be written.
# Behaviour: any bound, one that no answer comes near too, takes the exponent away. A model that writes 1e-5 for a
# probability between 0 and 1 has «1» when it learns that no e may follow. What is left is the end, or «1.» and zeros:
# the answer is 1, it is valid, and nothing shows it. With 0.1 and 0.3 as bounds 0.10 may be written and 0.30 may not.
# Seen: «no bound: 1e-5 True, 0.00001 True, after 1 comes e: True», «minimum 0: 1e-5 False, 0.00001 True, after 1 comes
# e: False», «minimum 0, maximum 1: after 1 come ['.', 'end']», «minimum 0.1, maximum 0.3: 0.10 True, 0.30 False».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile llguidance==1.9.1
cat > "$folder/bounds.py" <<'PY'
import json

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

END = 256


class Bytes:
    eos_token_id, bos_token_id, special_token_ids = END, None, [END]
    tokens = [bytes([i]) for i in range(END)] + [b"</s>"]

    def __call__(self, text):
        return list(text)


tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))


def begin(bounds, text):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "number", **bounds}))
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error()
    return matcher, matcher.try_consume_tokens(list(text.encode())) == len(text)


def accept(bounds, text):
    matcher, is_read = begin(bounds, text)
    return is_read and matcher.is_accepting()


def find_next(bounds, text):
    bits = begin(bounds, text)[0].compute_bitmask()
    return [chr(i) if i < END else "end" for i in range(END + 1) if bits[i // 8] >> i % 8 & 1]


for bounds in ({}, {"minimum": 0}, {"maximum": 1e6}, {"minimum": 0, "maximum": 1}):
    name = ", ".join(f"{key} {value:g}" for key, value in bounds.items()) or "no bound"
    exponent, digits, following = accept(bounds, "1e-5"), accept(bounds, "0.00001"), find_next(bounds, "1")
    print(f"{name}: 1e-5 {exponent}, 0.00001 {digits}, after 1 comes e: {'e' in following}")
    assert digits
    assert exponent == ("e" in following) == (not bounds), "this has changed"
print(f"{name}: after 1 come {following}")
narrow = {"minimum": 0.1, "maximum": 0.3}
zeros = accept(narrow, "0.10"), accept(narrow, "0.30")
print(f"minimum 0.1, maximum 0.3: 0.10 {zeros[0]}, 0.30 {zeros[1]}")
assert following == [".", "end"] and zeros == (True, False), "this has changed"
PY
"$folder/env/bin/python" "$folder/bounds.py"
