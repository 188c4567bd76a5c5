#!/usr/bin/env bash
# Ask a trained model: one instruction, a file of them, or one after another at the keyboard.
#
# Card: that of the training, less about a third of the memory (estimated, not measured). Time: seconds an answer.
#
#   LORA_PATH=outputs/mine bash scripts/generate.sh                                         one after another
#   LORA_PATH=outputs/mine bash scripts/generate.sh --instruction 'Name three rivers.'      one question
#   LORA_PATH=outputs/mine bash scripts/generate.sh --data_path questions.jsonl --output_path answers.jsonl
#
# LORA_PATH is a run directory, one of its checkpoints, or a Hub id (by default the quickstart's result). The base model
# and the prompt template come from the run. Words after the script go to generate.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

exec "$PYTHON" "$ROOT/generate.py" \
    --lora_path "${LORA_PATH:-outputs/quickstart}" \
    "$@"
