#!/usr/bin/env bash
# Fine-tune on all GPUs of one machine (data parallel): each holds the whole base in 4 bits and takes a share of every
# step. The result is that of one GPU; only the time changes.
#
# Card: two or more of 11 GB and up for a 7B base (planned, not measured). Time: somewhat above the time of one card
# divided by their number (estimated, not measured). Without a card two CPU processes do it, to show that it works.
#
#   N_GPUS=2 MODEL_PATH=Qwen/Qwen2.5-7B-Instruct DATA_PATH=my_data.json bash scripts/finetune_multi_gpu.sh
#
# Several machines: start the same on each, with torchrun's words in TORCHRUN_OPTIONS, such as
# '--nnodes 2 --node_rank 0 --master_addr HOST --master_port 29500', and OUTPUT_PATH on a disk that all share.
# Words after the script go to finetune.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

# torchrun kills its processes 30 s after Ctrl-C; a step and its checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

n_gpus="${N_GPUS:-$( (nvidia-smi -L 2>/dev/null || true) | grep -c "^GPU" || true)}"
[ "$n_gpus" -gt 0 ] || n_gpus=2
# shellcheck disable=SC2086  # TORCHRUN_OPTIONS is a list of words
exec "$PYTHON" -m torch.distributed.run --nproc_per_node "$n_gpus" ${TORCHRUN_OPTIONS:---standalone} "$ROOT/finetune.py" \
    --model_path "${MODEL_PATH:-$ROOT/sample/tiny-llama}" \
    ${DATA_PATH:+--data_path "$DATA_PATH"} \
    --output_path "${OUTPUT_PATH:-outputs/finetune-multi-gpu}" \
    --bits 4 \
    "$@"
