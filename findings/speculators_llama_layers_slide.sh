#!/usr/bin/env bash
# speculators 0.9.0 (with transformers 5.19.0): layers of model_type llama in an EAGLE-3 head.
#
# Common belief: a llama's layers have full attention, whatever sliding_window and layer_types say, since transformers'
# LlamaModel reads neither. So a reader of heads may treat a head's llama layer as it treats a model's.
# Behaviour: the package's own head heeds them in a layer of any model_type, and its trainer writes
# "layer_types": ["sliding_attention"] with a window of 2,048 unless it is told otherwise. A reader that ignores the keys
# drafts from another attention than the head was trained with, in every text longer than the window.
# Seen: «transformers' LlamaModel: layer_types sliding_attention changes 0 of 24 positions», «a head of speculators:
# layer_types sliding_attention changes 16 of 24 positions, the first is 8».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q speculators==0.9.0 transformers==5.19.0 torch==2.13.0
"$folder/env/bin/pip" uninstall -q -y torchvision torchaudio # which need not fit this torch, and are not used
cat > "$folder/slide.py" <<'PY'
import warnings

import torch
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, LlamaModel

warnings.filterwarnings("ignore")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LENGTH, WINDOW = 24, 8
FULL = {"layer_types": ["full_attention"]}
SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": WINDOW, "use_sliding_window": True}
ids = torch.arange(LENGTH).remainder(60).unsqueeze(0)


def make_head(keys):
    layers = LlamaConfig(**SIZES, **keys)
    proposal = GreedyTokenProposalConfig(speculative_tokens=3)
    verifier = VerifierConfig(name_or_path="", architectures=["LlamaForCausalLM"])
    names = SpeculatorsConfig(algorithm="eagle3", proposal_methods=[proposal], default_proposal_method="greedy", verifier=verifier)
    torch.manual_seed(0)
    config = Eagle3SpeculatorConfig(transformer_layer_config=layers, draft_vocab_size=64, speculators_config=names,
                                    eagle_aux_hidden_state_layer_ids=[0, 1, 2])
    head = Eagle3DraftModel(config).float().eval()
    for parameter in head.parameters():
        parameter.data.normal_(0, 0.3)
    return head


@torch.no_grad()
def logits_of_head(keys):
    head, seen = make_head(keys), []
    head.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    torch.manual_seed(1)
    taps = torch.randn(1, LENGTH, 3 * SIZES["hidden_size"])
    head(hidden_states=taps, input_ids=ids, document_ids=torch.zeros(1, LENGTH, dtype=torch.long), ttt_steps=1)
    return seen[0]


@torch.no_grad()
def states_of_model(keys):
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SIZES, **keys)).eval()(ids).last_hidden_state[0]


for name, run, expected in (
    ("transformers' LlamaModel", states_of_model, []),
    ("a head of speculators", logits_of_head, list(range(WINDOW, LENGTH))),
):
    far = (run(SLIDING) - run(FULL)).abs().amax(dim=-1)
    changed = (far > 1e-5).nonzero().flatten().tolist()
    first = f", the first is {changed[0]}" if changed else ""
    print(f"{name}: layer_types sliding_attention changes {len(changed)} of {LENGTH} positions{first}")
    assert changed == expected, "this has changed"
PY
"$folder/env/bin/python" "$folder/slide.py"
