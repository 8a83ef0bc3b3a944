#!/usr/bin/env bash
# lm_eval 0.4.12 with transformers 5.23.0: what loglikelihood_rolling (wikitext's perplexities) counts.
#
# Common belief: it gives the log-likelihood of the text, as loglikelihood does for an empty context.
# Behaviour: it puts the start token before the ids of the text, and those begin with the start token already where the
# tokenizer adds one. So the sum holds one term more, the start token's after itself, which no model was trained for.
# loglikelihood leaves it out. A tokenizer that adds none gives one number in both.
# Seen: with a model that gives every token 1/16, four words: «tokenizer adds a start token, False: rolling 4 terms,
# empty context 4», «... True: rolling 5 terms, empty context 4».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 lm_eval==0.4.12
cat > "$folder/terms.py" <<'PY'
import math

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", *"abcdefghijklmn"]
sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 64}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, **sizes))
torch.nn.init.zeros_(model.lm_head.weight)


def count_terms(adds_start):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    lm = HFLM(pretrained=model, tokenizer=fast, batch_size=1, device="cpu")
    rolling = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a b c d",), 0)], disable_tqdm=True)[0]
    empty = lm.loglikelihood([Instance("loglikelihood", {}, ("", "a b c d"), 0)], disable_tqdm=True)[0][0]
    return [round(-total / math.log(len(WORDS))) for total in (rolling, empty)]


terms = {adds_start: count_terms(adds_start) for adds_start in (False, True)}
for adds_start, (rolling, empty) in terms.items():
    print(f"tokenizer adds a start token, {adds_start}: rolling {rolling} terms, empty context {empty}")
assert terms == {False: [4, 4], True: [5, 4]}, "this has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/terms.py"
