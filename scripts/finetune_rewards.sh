#!/usr/bin/env bash
# Learn from rewards (GRPO): answers are sampled while training, and those that a Python file rewards become likelier.
#
# Card: 11 GB for a 7B base in 4 bits (estimated, not measured). Time: most of it is sampling (7B: not measured).
#
# With no settings the embedded tiny base learns to give the answer that it knows and to stop there: sample/rewards.py
# rewards that, on the prompts of sample/reward_prompts.json. Its mean reward rises from about 0.1 to over 0.8 in minutes
# on a CPU (three seeds; tests/objectives/test_preference_example.py). In fp32: 16 bits take many times as long on a CPU
# without instructions for them. A larger base on a card wants --bits 4.
#
#   MODEL_PATH=Qwen/Qwen2.5-7B-Instruct DATA_PATH=my_prompts.jsonl OUTPUT_PATH=outputs/mine \
#       bash scripts/finetune_rewards.sh --reward_file my_rewards.py --learning_rate 1e-5 --rollout_max_tokens 512
#
# Words after the script go to finetune.py and win.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"

exec "$PYTHON" "$ROOT/finetune.py" \
    --objective grpo \
    --model_path "${MODEL_PATH:-$ROOT/sample/tiny-llama}" \
    --data_path "${DATA_PATH:-$ROOT/sample/reward_prompts.json}" \
    --reward_file "$ROOT/sample/rewards.py" \
    --output_path "${OUTPUT_PATH:-outputs/rewards}" \
    --bits 32 --learning_rate 2e-3 --total_batch 8 --max_steps 30 --num_epoch 9 --cutoff_len 128 \
    --rollout_max_tokens 10 --log_rollouts \
    "$@"
