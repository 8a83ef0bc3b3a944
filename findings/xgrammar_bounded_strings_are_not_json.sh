#!/usr/bin/env bash
# xgrammar 0.2.8: a JSON schema's string with minLength or maxLength.
#
# Common belief: the bound counts characters and changes nothing else, so a maxLength that no text reaches is harmless.
# Behaviour: with maxLength, or minLength of 1 or more, a string may hold no escape at all. A model cannot write a
# quotation mark, a backslash or a line break in it any more. And it may hold raw control characters, which JSON
# forbids, so what the grammar accepts does not parse. Without a bound both are right.
# Seen: «{'type': 'string'}: quotation mark True, line break True, raw tab False», «... 'minLength': 1}: quotation mark
# False, line break False, raw tab True», «... 'maxLength': 1000}: quotation mark False, line break False, raw tab
# True», «json.loads of the string with a raw tab: Invalid control character at».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 pydantic==2.14.4 apache-tvm-ffi==0.1.15.post2
"$folder/env/bin/pip" install -q --no-deps xgrammar==0.2.8
cat > "$folder/strings.py" <<'PY'
import json

import xgrammar

END = 256
tokenizer = xgrammar.TokenizerInfo([bytes([i]) for i in range(END)] + [b"</s>"], stop_token_ids=[END])
compiler = xgrammar.GrammarCompiler(tokenizer)
texts = {"quotation mark": json.dumps('say "yes"'), "line break": json.dumps("a\nb"), "raw tab": '"a\tb"'}


def accept(schema, text):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    return all(matcher.accept_token(i) for i in [*text.encode(), END])


def find_error(text):
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg
    return None


assert [find_error(text) for text in texts.values()] == [None, None, "Invalid control character at"]
for bound in ({}, {"minLength": 1}, {"maxLength": 1000}):
    schema = {"type": "string", **bound}
    accepted = {name: accept(schema, text) for name, text in texts.items()}
    print(f"{schema}:", ", ".join(f"{name} {is_accepted}" for name, is_accepted in accepted.items()))
    assert accept(schema, '"a"')
    assert list(accepted.values()) == ([False, False, True] if bound else [True, True, False]), "this has changed"
print(f"json.loads of the string with a raw tab: {find_error(texts['raw tab'])}")
PY
"$folder/env/bin/python" "$folder/strings.py"
