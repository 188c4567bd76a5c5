#!/usr/bin/env bash
# Fine-tune on instructions with the base in 4 bits (QLoRA): a 7B base on a card of 11 or 12 GB.
#
# Card: 11 GB (RTX 2080 Ti), 12 GB (RTX 3060) for a 7B base (planned, not measured). Time: about a
# night for 50,000 short records on an RTX 2080 Ti (estimated, not measured).
#
#   MODEL_PATH=Qwen/Qwen2.5-7B-Instruct DATA_PATH=my_data.json OUTPUT_PATH=outputs/mine bash scripts/finetune_4bit.sh
#
# Words after the script go to finetune.py and win. With no settings the embedded tiny base trains on any CPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

exec "$PYTHON" "$ROOT/finetune.py" \
    --model_path "${MODEL_PATH:-$ROOT/sample/tiny-llama}" \
    ${DATA_PATH:+--data_path "$DATA_PATH"} \
    --output_path "${OUTPUT_PATH:-outputs/finetune-4bit}" \
    --bits 4 \
    "$@"
