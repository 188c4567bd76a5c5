#!/usr/bin/env bash
# Start a new run from an adapter that somebody else trained (or an older one of yours): its weights are the start,
# optimizer, schedule and data begin anew. The base must be the one that the adapter was trained on.
#
# Card: 12 GB for a 7B base in 4 bits (planned, not measured). Time: as for finetune_4bit.sh.
#
#   MODEL_PATH=huggyllama/llama-7b INIT_ADAPTER=their/adapter-on-the-hub DATA_PATH=my_data.json \
#       OUTPUT_PATH=outputs/further bash scripts/finetune_others_continue.sh
#
# INIT_ADAPTER is a directory or a Hub id (by default the result of finetune_4bit.sh). Rank and layers are the
# adapter's own. Words after the script go to finetune.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

exec "$PYTHON" "$ROOT/finetune.py" \
    --model_path "${MODEL_PATH:-$ROOT/sample/tiny-llama}" \
    --init_adapter "${INIT_ADAPTER:-outputs/finetune-4bit}" \
    ${DATA_PATH:+--data_path "$DATA_PATH"} \
    --output_path "${OUTPUT_PATH:-outputs/finetune-others-continue}" \
    --bits 4 \
    "$@"
