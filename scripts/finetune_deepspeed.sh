#!/usr/bin/env bash
# Fine-tune on several GPUs with DeepSpeed ZeRO-2: optimizer state and gradients are divided over the cards. It
# pays for high ranks (--lora_r 64 and up); for a small adapter finetune_multi_gpu.sh is simpler.
#
# Card: two or more of 24 GB for a 7B base in 16 bits (estimated, not measured). Time: that of
# finetune_multi_gpu.sh or somewhat more (estimated, not measured). Needs Linux and one more package:
# .venv/bin/python -m pip install --no-build-isolation -r requirements-deepspeed.txt
#
#   N_GPUS=2 MODEL_PATH=Qwen/Qwen2.5-7B-Instruct DATA_PATH=my_data.json bash scripts/finetune_deepspeed.sh
#
# DEEPSPEED_CONFIG is the ZeRO configuration (config-sample/deepspeed_zero2.json; deepspeed_zero3.json divides the base).
# Words after the script go to finetune.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

# torchrun kills its processes 30 s after Ctrl-C; a step and its checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

n_gpus="${N_GPUS:-$( (nvidia-smi -L 2>/dev/null || true) | grep -c "^GPU" || true)}"
[ "$n_gpus" -gt 0 ] || n_gpus=1
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$n_gpus" "$ROOT/finetune.py" \
    --model_path "${MODEL_PATH:-$ROOT/sample/tiny-llama}" \
    ${DATA_PATH:+--data_path "$DATA_PATH"} \
    --output_path "${OUTPUT_PATH:-outputs/finetune-deepspeed}" \
    --bits 16 --lora_r 64 --micro_tokens 2048 \
    --deepspeed "${DEEPSPEED_CONFIG:-$ROOT/config-sample/deepspeed_zero2.json}" \
    "$@"
