#!/usr/bin/env bash
# From nothing to a fine-tuned model that answers: makes .venv, fine-tunes the embedded base in 4-bit on the sample
# instructions and shows what it learned. Run again, it reuses the environment and the finished run.
#
# Card: none needed. Time: about 2 minutes on two CPU cores, the install included (measured once, packages near by).
# Memory: under 2 GB of RAM (estimated, not measured).
#
#   bash scripts/quickstart.sh              other words go to finetune.py, such as --max_steps 20
#
# OUTPUT_PATH: directory of the run (outputs/quickstart). PYTHON: use this Python instead of making .venv.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case "${1:-}" in
    -h | --help) print_header "${BASH_SOURCE[0]}"; exit 0 ;;
esac
if [ -z "${PYTHON:-}" ]; then
    prepare_venv requirements.txt
    PYTHON="$(venv_python)"
fi
cd "$ROOT"
output="${OUTPUT_PATH:-outputs/quickstart}"

say "fine-tuning sample/tiny-llama in 4-bit on sample/merge_sample.json"
"$PYTHON" finetune.py --config config-sample/tiny-llama_qlora_cpu.yaml --output_path "$output" "$@"

say "before and after, on questions that were not in the training data"
"$PYTHON" tools/score.py --data_path sample/held_out.json --lora_path "$output" --examples 3

shown="${PYTHON#"$ROOT"/}"
cat <<END

Ask it one thing:
  $shown generate.py --lora_path $output --instruction "What is the capital of Poland?"
Chat with it in the browser (or here, with --cli):
  $shown chat.py --lora_path $output
Train on your own data, on your own card (see README.md):
  $shown finetune.py --model_path Qwen/Qwen2.5-7B-Instruct --data_path my_data.json --output_path outputs/mine
END
