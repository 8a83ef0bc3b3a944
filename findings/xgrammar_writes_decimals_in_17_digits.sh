#!/usr/bin/env bash
# xgrammar 0.2.8: decimal numbers in the enum of a JSON schema.
#
# Common belief: the grammar accepts the numbers as the schema writes them.
# Behaviour: each is written in 17 digits, so 0.3 is accepted as 0.29999999999999999 alone and 0.35 as
# 0.34999999999999998. A model that wants 0.3 of the two writes «0.3», and from there only 0.34999999999999998 is left:
# the answer is the other choice, it is valid, and nothing shows it. 0.25, which is exact in binary, is as it should be.
# Seen: «[0.3, 0.35] accepts 0.3 False, 0.35 False, 0.29999999999999999 True, 0.34999999999999998 True», «after 0.3 the
# only next characters are ['4']», «[0.25, 0.5] accepts 0.25 True, 0.5 True».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 pydantic==2.14.4 apache-tvm-ffi==0.1.15.post2
"$folder/env/bin/pip" install -q --no-deps xgrammar==0.2.8
cat > "$folder/decimals.py" <<'PY'
import json

import xgrammar

END = 256
tokenizer = xgrammar.TokenizerInfo([bytes([i]) for i in range(END)] + [b"</s>"], stop_token_ids=[END])
compiler = xgrammar.GrammarCompiler(tokenizer)


def begin(choices):
    return xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps({"enum": choices})))


def accept(choices, text):
    matcher = begin(choices)
    return all(matcher.accept_token(i) for i in [*text.encode(), END])


def find_next(choices, text):
    matcher = begin(choices)
    assert all(matcher.accept_token(i) for i in text.encode())
    bitmask = xgrammar.allocate_token_bitmask(1, END + 1)
    matcher.fill_next_token_bitmask(bitmask)
    words = bitmask[0].tolist()
    return [chr(i) if i < END else "end" for i in range(END + 1) if words[i // 32] >> i % 32 & 1]


def show(choices, texts):
    accepted = [accept(choices, text) for text in texts]
    pairs = ", ".join(f"{text} {is_accepted}" for text, is_accepted in zip(texts, accepted, strict=True))
    print(f"{choices} accepts {pairs}")
    return accepted


accepted = show([0.3, 0.35], ["0.3", "0.35", "0.29999999999999999", "0.34999999999999998"])
following = find_next([0.3, 0.35], "0.3")
print(f"after 0.3 the only next characters are {following}")
assert show([0.25, 0.5], ["0.25", "0.5"]) == [True, True]
assert accepted == [False, False, True, True] and following == ["4"], "this has changed"
PY
"$folder/env/bin/python" "$folder/decimals.py"
