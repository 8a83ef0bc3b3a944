#!/usr/bin/env bash
# openvino-genai 2026.4.1.0 with jinja2 3.1.6: expressions in a chat template.
#
# Common belief: its template engine is jinja's language in C++. What it lacks it refuses, and what it renders is what
# jinja renders, which is what the model was trained with.
# Behaviour: many expressions are rendered to something else, and nothing names them. Two integers divide to an integer,
# a remainder has the sign of the left side, the last character of a string, [-1], is empty, «a and b» gives True
# instead of b, None prints nothing, and an escaped character, \u2581, loses its backslash.
# Seen: «7 / 2: jinja <3.5>, openvino-genai <3>», «-7 % 3: jinja <2>, openvino-genai <-1>», «'abc'[-1]: jinja <c>,
# openvino-genai <>», «'a' and 'b': jinja <b>, openvino-genai <True>», «none: jinja <None>, openvino-genai <>»,
# «'\u2581x': jinja <▁x>, openvino-genai <u2581x>».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile numpy==2.4.6 transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
"$folder/env/bin/pip" install -q --no-compile openvino==2026.4.1 openvino-tokenizers==2026.4.1.0
"$folder/env/bin/pip" install -q --no-compile openvino-genai==2026.4.1.0
cat > "$folder/templates.py" <<'PY'
import sys

import openvino
import openvino_genai
import openvino_tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MESSAGES = [{"role": "user", "content": "Hi"}]
expected = {
    "7 / 2": ("3.5", "3"),
    "-7 % 3": ("2", "-1"),
    "'abc'[-1]": ("c", ""),
    "'a' and 'b'": ("b", "True"),
    "none": ("None", ""),
    r"'\u2581x'": ("▁x", "u2581x"),
    "7 // 2": ("3", "3"),
    "'' or 'b'": ("b", "b"),
    "'abc'[1:]": ("bc", "bc"),
}


def load_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    names = ("openvino_tokenizer", "openvino_detokenizer")
    for name, model in zip(names, openvino_tokenizers.convert_tokenizer(fast, with_detokenizer=True), strict=True):
        openvino.save_model(model, f"{folder}/{name}.xml")
    return openvino_genai.Tokenizer(folder)


tokenizer = load_tokenizer(sys.argv[1])
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
for expression, values in expected.items():
    template = "<{{ " + expression + " }}>"
    by_jinja = environment.from_string(template).render(messages=MESSAGES)
    found = tokenizer.apply_chat_template(MESSAGES, False, template)
    print(f"{expression}: jinja {by_jinja}, openvino-genai {found}")
    assert by_jinja == f"<{values[0]}>"
    assert found == f"<{values[1]}>", "this has changed"
PY
mkdir "$folder/model"
HF_HUB_OFFLINE=1 PYTHONUTF8=1 "$folder/env/bin/python" "$folder/templates.py" "$folder/model"
