#!/usr/bin/env bash
# transformers 5.23.0: which of several matches prompt lookup proposes (prompt_lookup_num_tokens).
#
# Common belief: the draft continues the latest place where the last tokens stood before, which is the likeliest to
# repeat, as in other programs' n-gram and suffix lookups.
# Behaviour: it continues the earliest one. In a chat that edits a file twice the draft comes from the version before
# the first edit, and is refused again where the text has changed.
# Seen: «... 1 2 | 10 11 12, then 1 2 | 20 21 22, then 1 2: drafts [10, 11, 12]».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/lookup.py" <<'PY'
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

text = [1, 2, 10, 11, 12, 1, 2, 20, 21, 22, 1, 2]
lookup = PromptLookupCandidateGenerator(num_output_tokens=3, max_matching_ngram_size=2, max_length=100)
ids, _ = lookup.get_candidates(torch.tensor([text]))
draft = ids[0, len(text) :].tolist()
print(f"... 1 2 | 10 11 12, then 1 2 | 20 21 22, then 1 2: drafts {draft}")
assert draft == [10, 11, 12], "this has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/lookup.py"
