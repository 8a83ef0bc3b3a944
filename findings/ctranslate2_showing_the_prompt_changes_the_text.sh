#!/usr/bin/env bash
# ctranslate2 4.8.5: include_prompt_in_result of Generator.generate_batch, which is True by default.
#
# Common belief: the option says whether the prompt's tokens stand before the new ones in what is returned. The new
# tokens and their scores are the same either way.
# Behaviour: the prompt counts as generated text when it is included. Then repetition_penalty and no_repeat_ngram_size
# see the prompt, and when it is not they see the new tokens alone, so the text differs. And the score, a mean over the
# tokens, is divided by the prompt's tokens too, so candidates of prompts of unlike lengths cannot be compared.
# Seen: greedy, prompt «a b c»: «included: f c c, score -0.777, without repeats f g <s>», «not included: f c c, score
# -1.554, without repeats f c a».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q numpy==2.4.6 ctranslate2==4.8.5
cat > "$folder/prompt.py" <<'PY'
import sys

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec

SIZE, NEW = 16, 3
PROMPT = ["a", "b", "c"]
generator = np.random.default_rng(0)


def draw(*shape):
    return generator.standard_normal(shape).astype(np.float32) * 0.3


def save_model(folder):
    options = {"pre_norm": True, "rms_norm": True, "ffn_glu": True, "rotary_dim": 0, "rotary_interleave": False}
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        1, 2, activation=common_spec.Activation.SWISH, num_heads_kv=2, **options
    )
    decoder, ones = spec.decoder, np.ones(SIZE, np.float32)
    decoder.embeddings.weight, decoder.scale_embeddings = draw(SIZE, SIZE), False
    decoder.layer_norm.gamma, decoder.projection.weight = ones, draw(SIZE, SIZE)
    layer = decoder.layer[0]
    layer.self_attention.layer_norm.gamma = layer.ffn.layer_norm.gamma = ones
    projections = layer.self_attention.linear
    projections[0].weight, projections[1].weight = draw(3 * SIZE, SIZE), draw(SIZE, SIZE)
    layer.ffn.linear_0.weight, layer.ffn.linear_0_noact.weight = draw(2 * SIZE, SIZE), draw(2 * SIZE, SIZE)
    layer.ffn.linear_1.weight = draw(SIZE, 2 * SIZE)
    spec.register_vocabulary(["<unk>", "<s>", "</s>", *"abcdefghijklm"])
    spec.config.layer_norm_epsilon = 1e-5
    spec.validate()
    spec.optimize()
    spec.save(folder)


def generate(model, included, **options):
    options |= {"max_length": NEW + included * len(PROMPT), "include_prompt_in_result": included}
    [result] = model.generate_batch([["<s>", *PROMPT]], beam_size=1, return_scores=True, **options)
    return result.sequences[0][-NEW:], result.scores[0]


save_model(sys.argv[1])
model = ctranslate2.Generator(sys.argv[1], intra_threads=1)
found = {}
for included in (True, False):
    (text, score), (other, _) = generate(model, included), generate(model, included, no_repeat_ngram_size=1)
    found[included] = text, score, other
    name = "included" if included else "not included"
    print(f"{name}: {' '.join(text)}, score {score:.3f}, without repeats {' '.join(other)}")
(text, score, other), (same, plain, others) = found[True], found[False]
assert text == same and text[0] not in PROMPT
assert abs(score * (len(PROMPT) + NEW) / NEW - plain) < 1e-4, "this has changed"
assert not set(other) & set(PROMPT) and set(others) & set(PROMPT), "this has changed"
PY
mkdir "$folder/model"
"$folder/env/bin/python" "$folder/prompt.py" "$folder/model"
