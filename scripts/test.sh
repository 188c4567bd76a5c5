#!/usr/bin/env bash
# All checks: makes .venv with requirements-dev.txt (again only when the requirement files change), then ruff, mypy
# and the tests. No card and no network needed, apart from the install.
#
#   bash scripts/test.sh                    everything but the tests marked slow
#   bash scripts/test.sh --all              the slow ones too
#   bash scripts/test.sh tests/text -x      other words go to pytest
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

marks=(-m "not slow")
words=()
for word in "$@"; do
    case "$word" in
        -h | --help) print_header "${BASH_SOURCE[0]}"; exit 0 ;;
        --all) marks=() ;;
        *) words+=("$word") ;;
    esac
done

prepare_venv requirements.txt requirements-dev.txt
python="$(venv_python)"
cd "$ROOT"
# Two processes share the cores better than torch's own threads do on models this small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false PYTHONUTF8=1

say "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
say "mypy"
"$python" -m mypy
say "pytest"
"$python" -m pytest -q --durations=10 ${marks[@]+"${marks[@]}"} ${words[@]+"${words[@]}"}
say "all checks passed"
