#!/usr/bin/env bash
# outlines-core 0.2.14: the pattern of a JSON schema's string that has alternatives, «yes|no».
#
# Common belief: the regular expression of the schema matches "yes" and "no", in quotes.
# Behaviour: the pattern is put between the quotes without brackets, so the opening quote belongs to the first
# alternative and the closing one to the last. The two right objects are refused, and the only two that are generated
# do not parse. «^yes|no$» does the same; «(yes|no)» is right, and an enum is.
# Seen: «yes|no accepts ['{"answer":"yes}', '{"answer":no"}']», «^yes|no$ accepts ['{"answer":"yes}',
# '{"answer":no"}']», «(yes|no) accepts ['{"answer":"yes"}', '{"answer":"no"}']».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q outlines-core==0.2.14
cat > "$folder/pattern.py" <<'PY'
import json

from outlines_core import Index, Vocabulary
from outlines_core.json_schema import build_regex_from_schema

RIGHT = ['{"answer":"yes"}', '{"answer":"no"}']
WRONG = ['{"answer":"yes}', '{"answer":no"}']
vocabulary = Vocabulary(0, {chr(i): [i] for i in range(32, 127)})


def accept(index, text):
    state = index.get_initial_state()
    for character in text:
        state = index.get_next_state(state, ord(character))
        if state is None:
            return False
    return index.is_final_state(state)


for pattern, expected in {"yes|no": WRONG, "^yes|no$": WRONG, "(yes|no)": RIGHT}.items():
    answer = {"type": "string", "pattern": pattern}
    schema = {"type": "object", "properties": {"answer": answer}, "required": ["answer"]}
    index = Index(build_regex_from_schema(json.dumps(schema)), vocabulary)
    accepted = [text for text in RIGHT + WRONG if accept(index, text)]
    print(f"{pattern} accepts {accepted}")
    assert accepted == expected, "this has changed"
PY
"$folder/env/bin/python" "$folder/pattern.py"
