#!/usr/bin/env bash
# Make a finished run ready for other programs: 16-bit weights for transformers and vLLM, GGUF and a Modelfile for Ollama.
#
# Card: none needed; RAM for about one weight file (estimated, not measured). Time: that of reading and writing the base.
#
#   LORA_PATH=outputs/mine OUTPUT_PATH=outputs/mine-export bash scripts/export.sh
#   LORA_PATH=outputs/mine OUTPUT_PATH=outputs/mine-export bash scripts/export.sh --gguf_type q4_0 --system 'Be brief.'
#
# LORA_PATH is a run directory or one of its checkpoints (by default the quickstart's result). Words after the script go
# to tools/export_gguf.py and win. What exists already is kept: remove it, or give another OUTPUT_PATH.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"
OUTPUT_PATH="${OUTPUT_PATH:-outputs/export}"

[ -d "$OUTPUT_PATH/merged" ] ||
    "$PYTHON" "$ROOT/tools/merge_lora.py" --lora_path "${LORA_PATH:-outputs/quickstart}" --output_path "$OUTPUT_PATH/merged"
exec "$PYTHON" "$ROOT/tools/export_gguf.py" --model_path "$OUTPUT_PATH/merged" --gguf_type q8_0 \
    --output_path "$OUTPUT_PATH/gguf" "$@"
