#!/usr/bin/env bash
# lm-format-enforcer 0.11.3: strings of an enum that JSON has to escape.
#
# Common belief: what the parser lets through is JSON that is valid for the schema, and each choice can be written.
# Behaviour: the choice's own characters are compared, not those of JSON. A quotation mark ends the string, so of the
# choice 6" the only answer is "6", which is another value. A line break has to be written raw, which is no JSON. A
# backslash can be written as it should, or as the start of an escape that changes the text. const does the same.
# Seen, as Python writes strings: «'6"': '"6\\""' False, '"6"' True», «'a\nb': '"a\\nb"' False, '"a\nb"' True»,
# «'C:\\new': '"C:\\\\new"' True, '"C:\\nnew"' True», the last of which reads as two lines.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile numpy==2.4.6 lm-format-enforcer==0.11.3
cat > "$folder/choices.py" <<'PY'
import json

from lmformatenforcer import JsonSchemaParser


def accept(schema, text):
    parser = JsonSchemaParser(schema)
    for character in text:
        if character not in parser.get_allowed_characters():
            return False
        parser = parser.add_character(character)
    return parser.can_end()


cases = {
    '6"': {r'"6\""': False, '"6"': True},
    "a\nb": {r'"a\nb"': False, '"a\nb"': True},
    "C:\\new": {r'"C:\\new"': True, r'"C:\nnew"': True},
    "plain": {'"plain"': True, '"plai"': False},
}
for choice, expected in cases.items():
    assert json.loads(list(expected)[0]) == choice
    for schema in ({"enum": [choice]}, {"const": choice}):
        found = {text: accept(schema, text) for text in expected}
        assert found == expected, "this has changed"
    pairs = ", ".join(f"{text!r} {is_accepted}" for text, is_accepted in found.items())
    print(f"{choice!r}: {pairs}")
assert json.loads('"6"') != '6"' and json.loads(r'"C:\nnew"') != "C:\\new"
PY
"$folder/env/bin/python" "$folder/choices.py"
