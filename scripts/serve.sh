#!/usr/bin/env bash
# Serve a model over the OpenAI API at http://127.0.0.1:8000/v1, and the chat page at http://127.0.0.1:8000/
#
# Card: that of the training, less about a third of the memory (estimated, not measured). Time: starts in about a minute.
#
#   LORA_PATH=outputs/mine bash scripts/serve.sh
#   ONECARD_API_KEY=... LORA_PATH=outputs/mine bash scripts/serve.sh --host 0.0.0.0      for other machines: needs a key
#
# LORA_PATH is a run directory, one of its checkpoints, or a Hub id (by default the quickstart's result). The base model
# and the prompt template come from the run. Words after the script go to tools/serve.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

exec "$PYTHON" "$ROOT/tools/serve.py" --web --lora_path "${LORA_PATH:-outputs/quickstart}" "$@"
