#!/usr/bin/env bash
# Fine-tune on conversations of several turns, the base in 4 bits; every answer in a conversation is learned.
#
# Card: 12 GB for a 7B base at 1024 tokens a conversation (planned, not measured). Time: about a night for 20,000
# conversations on an RTX 3060 (estimated, not measured).
#
#   MODEL_PATH=Qwen/Qwen3-8B DATA_PATH=chats.jsonl OUTPUT_PATH=outputs/chat bash scripts/finetune_chat.sh
#
# Words after the script go to finetune.py and win. With no settings the embedded tiny base trains on any CPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

exec "$PYTHON" "$ROOT/finetune_chat.py" \
    --model_path "${MODEL_PATH:-$ROOT/sample/tiny-llama}" \
    ${DATA_PATH:+--data_path "$DATA_PATH"} \
    --output_path "${OUTPUT_PATH:-outputs/finetune-chat}" \
    --bits 4 \
    "$@"
