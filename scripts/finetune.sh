#!/usr/bin/env bash
# Fine-tune on instructions, the base in 16 bits: the best quality where the card has room for it.
#
# Card: 24 GB for a 7B base (estimated, not measured). Time: about 3 hours for 50,000 short records on an RTX 3090
# (estimated, not measured). Without a card the default takes a few minutes.
#
#   MODEL_PATH=Qwen/Qwen2.5-7B-Instruct DATA_PATH=my_data.json OUTPUT_PATH=outputs/mine bash scripts/finetune.sh
#
# Words after the script go to finetune.py and win. With no settings the embedded tiny base trains on any CPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

exec "$PYTHON" "$ROOT/finetune.py" \
    --model_path "${MODEL_PATH:-$ROOT/sample/tiny-llama}" \
    ${DATA_PATH:+--data_path "$DATA_PATH"} \
    --output_path "${OUTPUT_PATH:-outputs/finetune}" \
    --bits 16 \
    "$@"
