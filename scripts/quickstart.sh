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
python="${PYTHON:-}"
[ -n "$python" ] || python="$(any_python)" || exit 1
cd "$ROOT"
exec "$python" -m onecard quickstart "$@"
