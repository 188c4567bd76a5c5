#!/usr/bin/env bash
# Learn from preferences (DPO): pairs of answers say in which style to answer. Fine-tunes on both styles first, then
# prefers one of them, and scores both runs on questions that were in neither.
#
# Card: none needed. Time: two to four minutes on two CPU cores that do other work, too (measured).
#
# The embedded tiny base first learns to answer in one word as well as in a sentence; then pairs, made of the same
# questions, prefer the one word. On held-out pairs the share in which the one word is the likelier answer rises from
# about a third to over 0.9, and exact match rises with it (tests/objectives/test_preference_example.py).
#
#   OUTPUT_PATH=outputs/mine bash scripts/finetune_preferences.sh --seed 3
#
# Words after the script go to both runs of finetune.py and win. Your own pairs need the second of them only:
# docs/en/training.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"
output="${OUTPUT_PATH:-outputs/preferences}"
mkdir -p "$output"

"$PYTHON" - "$ROOT/sample" "$output" <<'END'
import json, re, sys
from pathlib import Path

sample, output = map(Path, sys.argv[1:])


def write(name, rows):
    (output / name).write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def in_a_sentence(answer):
    return f"答案是{answer}。" if re.search("[\u4e00-\u9fff]", answer) else f"The answer is {answer}."


def pairs(rows):
    return [
        {"instruction": row["instruction"], "input": row["input"],
         "chosen": row["output"], "rejected": in_a_sentence(row["output"])} for row in rows
    ]


rows = json.loads((sample / "merge_sample.json").read_text(encoding="utf-8"))[::2]
sentences = [{**row, "output": in_a_sentence(row["output"])} for row in rows[::2]]
write("both_styles.json", rows + sentences)
write("pairs.json", pairs(rows))
write("held_out_pairs.json", pairs(json.loads((sample / "held_out.json").read_text(encoding="utf-8"))))
END

common=(--model_path "$ROOT/sample/tiny-llama" --bits 32 --prompt_type alpaca --cutoff_len 128 --total_batch 16)
say "fine-tuning on answers in both styles"
"$PYTHON" "$ROOT/finetune.py" "${common[@]}" --data_path "$output/both_styles.json" --output_path "$output/sft" \
    --num_epoch 3 --lora_r 32 --lora_alpha 64 --learning_rate 2e-3 "$@"
say "learning from the pairs which of them is wanted"
"$PYTHON" "$ROOT/finetune.py" "${common[@]}" --data_path "$output/pairs.json" --output_path "$output/dpo" \
    --objective dpo --init_adapter "$output/sft" --num_epoch 2 --learning_rate 1e-3 "$@"
for run in sft dpo; do
    say "exact match of $run with the wanted answers, on held-out questions"
    "$PYTHON" "$ROOT/tools/score.py" --data_path "$output/held_out_pairs.json" --lora_path "$output/$run" --examples 2
done
