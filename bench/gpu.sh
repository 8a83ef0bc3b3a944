#!/usr/bin/env bash
# What a machine with a GPU is for: the tests that need one, then the speed of each model against the roof of the GPU.
#
#     bench/gpu.sh [FOLDER]
#
# The tests' report and the results go to FOLDER (results), each as soon as it is there. A step that fails or takes too
# long is named, and the next one begins; what the time no longer allows is named too. Exit status: how many were not done.
# No network is needed. Settings: PYTHON, DEVICE, CONFIGS, SAMPLES, LIMIT (seconds for everything), GPT_FAST (a checkout
# of gpt-fast, to be compared).
set -u
folder=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.." || exit 1
folder=${folder:-results}
trap 'exit 130' INT # the step that runs has had it too, since it is in the foreground
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SAMPLES=${SAMPLES:-3} LIMIT=${LIMIT:-530}
CONFIGS=${CONFIGS:-configs/llama-2-7b.json configs/llama-3.1-8b.json}
mkdir -p "$folder" || exit 1
not_done=()

# step SECONDS NAME COMMAND...: run a command for so long at most, and for no longer than there is time.
step() {
    local most=$1 name=$2 left=$((LIMIT - SECONDS)) status
    shift 2
    if ((left < 15)); then
        echo "skipped: $name; $LIMIT seconds are over" >&2
        not_done+=("$name")
        return
    fi
    ((left < most)) && most=$left
    echo "== $name, at $SECONDS of $LIMIT seconds, for $most at most" >&2
    timeout --foreground --signal=INT --kill-after=10 "$most" "$@"
    status=$?
    if ((status)); then
        echo "failed: $name, exit status $status$( ((status == 124 || status == 137)) && echo ", which means too slow")" >&2
        not_done+=("$name")
    fi
}

measure() {
    local most=$1 config=$2 name
    shift 2
    name=$(basename "$config" .json)
    step "$most" "$name: $*" "$PYTHON" -m bench.run --config "$config" --device "$DEVICE" --samples "$SAMPLES" \
        --output_dir "$folder" --name "$name-${1#--}" --only "$@"
}

needed="torch safetensors sentencepiece tokenizers huggingface_hub jinja2 tqdm numpy matplotlib pytest"
step 60 "packages" "$PYTHON" -c '
import importlib, sys
try:
    torch, *_ = map(importlib.import_module, sys.argv[1:])
except ImportError as error:
    sys.exit(f"error: {error}; pip install -r requirements-dev.txt")
print("torch", torch.__version__, "CUDA", torch.version.cuda)' $needed
if [[ $DEVICE == cuda* ]]; then
    "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
        echo "error: torch finds no GPU here; nothing was measured" >&2
        exit 2
    }
    step 60 "Triton" "$PYTHON" -c "import triton; print('triton', triton.__version__)"
fi
# First what there is no other way to know: a step at several positions against the roof, for every form of the weights.
# Inductor times some hundred variants of kernels for each graph.
first=${CONFIGS%% *}
measure 230 "$first" positions
step 130 "tests" "$PYTHON" -m pytest -m gpu tests/test_gpu.py -rs --tb=short --junitxml="$folder/gpu-tests.xml"
measure 60 "$first" kernels # where the time of such a step goes; its graphs are in inductor's cache now
for config in ${CONFIGS#"$first"}; do
    measure 150 "$config" positions
done
measure 100 "$first" products # which form a backend should repack to
measure 150 "$first" --compare ${GPT_FAST:+--gpt_fast "$GPT_FAST"}
for config in $CONFIGS; do
    measure 60 "$config" prefill
    measure 60 "$config" verify
    measure 90 "$config" decode --speculate_k 1 # more drafts are more graphs to compile
done

if ((${#not_done[@]})); then
    printf 'not done: %s\n' "${not_done[@]}" >&2
fi
exit ${#not_done[@]}
