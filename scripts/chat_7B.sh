#!/usr/bin/env bash
# Chat with a 7B model and your adapter, in the browser: http://127.0.0.1:7860
#
# Card: 8 GB for a 7B base in 4 bits with chats of 4,000 tokens (planned, not measured). Time: starts in about a minute.
#
#   LORA_PATH=outputs/mine bash scripts/chat_7B.sh                  the base is the one that the run was trained on
#   MODEL_PATH=Qwen/Qwen2.5-7B-Instruct bash scripts/chat_7B.sh     a base model alone
#   ADAPTERS_PATH=outputs bash scripts/chat_7B.sh                   switch among all adapters of a folder
#
# With no settings the quickstart's adapter answers, on any CPU. Words after the script go to chat.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

words=()
[ -z "${ADAPTERS_PATH:-}" ] || words+=(--adapters_path "$ADAPTERS_PATH")
if [ -n "${MODEL_PATH:-}" ]; then
    words+=(--model_path "$MODEL_PATH" --bits 4)
    [ -z "${LORA_PATH:-}" ] || words+=(--lora_path "$LORA_PATH")
elif [ -z "${ADAPTERS_PATH:-}" ] || [ -n "${LORA_PATH:-}" ]; then
    words+=(--lora_path "${LORA_PATH:-outputs/quickstart}")
fi
exec "$PYTHON" "$ROOT/chat.py" "${words[@]}" "$@"
