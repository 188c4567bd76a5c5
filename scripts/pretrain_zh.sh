#!/usr/bin/env bash
# Teach a base Chinese in the way of Chinese-LLaMA (arXiv:2304.08177): a larger vocabulary, pretraining of the new rows
# alone, then of an adapter with them, then instructions; merged and written as GGUF. Cut off, the same command goes on.
#
# Card: 12 GB for a 7B base in 4 bits (estimated, not measured); none for the default, the embedded base. Time: that of
# the corpus; the default takes minutes on two CPU cores (estimated, not measured).
#
#   MODEL_PATH=huggyllama/llama-7b DATA_PATH=chinese.txt HELD_OUT_PATH=other.txt INSTRUCTIONS_PATH=my_data.json \
#       VOCAB_SIZE=20000 OUTPUT_PATH=outputs/llama-zh bash scripts/pretrain_zh.sh
#
# DATA_PATH is text with empty lines between documents (by default the Chinese pages of this project, one of which is
# held out), HELD_OUT_PATH such a text to measure on. Words after the script go to finetune.py and win over the stages.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="$(run_python)"
BASE="${MODEL_PATH:-$ROOT/sample/tiny-llama}"
OUT="${OUTPUT_PATH:-outputs/pretrain-zh}"
KIND="${KIND:-sentencepiece}" # bytelevel for LLaMA 3 and Qwen
mkdir -p "$OUT"

prose() { sed -e '/^ *```/,/^ *```/d' -e '/^|/d' -e '/^</d' "$@"; }
DATA="${DATA_PATH:-$OUT/corpus.txt}"
HELD_OUT="${HELD_OUT_PATH:-$OUT/held_out.txt}"
if [ -z "${DATA_PATH:-}" ] && [ ! -f "$DATA" ]; then
    find "$ROOT/docs/zh" -maxdepth 1 -name '*.md' ! -name faq.md | LC_ALL=C sort | while read -r page; do
        prose "$page"
    done >"$DATA.partial"
    mv "$DATA.partial" "$DATA"
fi
[ -n "${HELD_OUT_PATH:-}" ] || prose "$ROOT/docs/zh/faq.md" >"$HELD_OUT"

expand() { "$PYTHON" "$ROOT/tools/expand_vocab.py" "$@"; }
[ -d "$OUT/pieces" ] || expand train --data_path "$DATA" --vocab_size "${VOCAB_SIZE:-1500}" --kind "$KIND" \
    $([ "$KIND" = sentencepiece ] || printf -- '--tokenizer_path %s' "$BASE") --output_path "$OUT/pieces"
[ -d "$OUT/tokenizer" ] || expand merge --tokenizer_path "$BASE" --new_path "$OUT/pieces" --eval_path "$HELD_OUT" \
    --output_path "$OUT/tokenizer"
[ -d "$OUT/base" ] || expand apply --model_path "$BASE" --tokenizer_path "$OUT/tokenizer" --output_path "$OUT/base"

cat >"$OUT/stages.yaml" <<END
train_new_tokens: true
lora_r: 64
lora_alpha: 128
data_path: "$DATA"
num_epoch: 3
stages:
  - name: rows
    train_new_tokens: only
    learning_rate: 1.0e-3
  - name: pretraining
    learning_rate: 2.0e-4
  - name: instructions
    data_path: "${INSTRUCTIONS_PATH:-$ROOT/sample/merge_sample.json}"
    learning_rate: 1.0e-4
END
"$PYTHON" "$ROOT/finetune.py" --stages "$OUT/stages.yaml" --model_path "$OUT/base" --bits 4 \
    --output_path "$OUT/stages" "$@"

say "perplexity per character before, with untrained new rows, and after each stage of pretraining"
measure() { # NAME OPTION DIRECTORY
    "$PYTHON" "$ROOT/tools/evaluate.py" --suite "perplexity:$HELD_OUT" --bits 16 "$2" "$3" --output_path "$OUT/measured/$1"
}
measure before --model_path "$BASE"
measure untrained --model_path "$OUT/base"
measure rows --lora_path "$OUT/stages/1-rows"
measure pretraining --lora_path "$OUT/stages/2-pretraining"

[ -d "$OUT/export/gguf" ] || LORA_PATH="$OUT/stages" OUTPUT_PATH="$OUT/export" bash "$ROOT/scripts/export.sh"
