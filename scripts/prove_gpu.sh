#!/usr/bin/env bash
# Everything that only a card can say, in one command: what works, how right the memory plan is, the longest context, the
# speed, serving, a kill and a resume. No network, no downloads: models have random weights, of sizes that suit the card.
#
# Card: any NVIDIA card from Turing on; on 8 GB or more the 8B model is among what is measured. Time: 10 minutes, or
# --minutes N: what does not fit is left out and says so (on a card not measured).
#
#   bash scripts/prove_gpu.sh                      results in benchmarks/results/gpu/<card>-<date>/, one file per step
#   bash scripts/prove_gpu.sh --pretend_turing     fp16 and no FlashAttention, whatever the card
#   bash scripts/prove_gpu.sh --minutes 30 --output_path outputs/proof
#
# PYTHON: use this Python instead of .venv's.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case "${1:-}" in
    -h | --help) print_header "${BASH_SOURCE[0]}"; exit 0 ;;
esac
PYTHON="$(run_python)"
cd "$ROOT"
exec "$PYTHON" benchmarks/prove_gpu.py "$@"
