#!/usr/bin/env bash
# Chat in the terminal: history, several lines, commands such as /regenerate, /undo, /save (/help lists them).
#
# Card: that of the training, less about a third of the memory (estimated, not measured). Time: starts in seconds.
#
#   LORA_PATH=outputs/mine bash scripts/chat_cli.sh
#   echo 'Name three rivers.' | LORA_PATH=outputs/mine bash scripts/chat_cli.sh      one question, nothing but the answer
#
# LORA_PATH is a run directory, one of its checkpoints, or a Hub id (by default the quickstart's result). The base model
# and the prompt template come from the run. Words after the script go to chat.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

exec "$PYTHON" "$ROOT/chat.py" --cli --lora_path "${LORA_PATH:-outputs/quickstart}" "$@"
