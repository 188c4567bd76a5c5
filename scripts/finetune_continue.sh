#!/usr/bin/env bash
# Go on with a run of your own: after a kill or a power cut, or for more epochs. Weights, optimizer and the place in
# the data come back; nothing is trained twice.
#
# Card, memory: those of the run. Time: what was left of it.
#
#   OUTPUT_PATH=outputs/mine NUM_EPOCH=5 bash scripts/finetune_continue.sh
#
# OUTPUT_PATH is the directory of the run (by default that of finetune_4bit.sh); its onecard.yaml holds all other
# options. NUM_EPOCH is counted from the very start: 5 goes on to the end of the fifth epoch. The same command that
# started the run would go on with it too; this one needs no memory of how it was typed.
# Words after the script go to finetune.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

run="${OUTPUT_PATH:-outputs/finetune-4bit}"
[ -f "$run/onecard.yaml" ] || fail "$run holds no run (no onecard.yaml there); set OUTPUT_PATH to the directory of yours"
exec "$PYTHON" "$ROOT/finetune.py" \
    --config "$run/onecard.yaml" \
    --output_path "$run" \
    --resume_from_checkpoint auto \
    ${NUM_EPOCH:+--num_epoch "$NUM_EPOCH"} \
    "$@"
