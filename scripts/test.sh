#!/usr/bin/env bash
# All checks: makes .venv with requirements-dev.txt (again only when the requirement files change), then ruff, mypy,
# import-linter and the tests. No card and no network needed, apart from the install.
#
#   bash scripts/test.sh                    everything but the tests marked slow
#   bash scripts/test.sh --all              the slow ones too
#   bash scripts/test.sh --gptq             only the tests of GPTQ, which run in .venv-gptq
#   bash scripts/test.sh --trl              only the comparison of losses with TRL's, which runs in .venv-trl
#   bash scripts/test.sh --real             only the tests on real small models (330 MB, installed into .venv)
#   bash scripts/test.sh tests/data -x      other words go to pytest
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

for word in "$@"; do
    case "$word" in
        -h | --help) print_header "${BASH_SOURCE[0]}"; exit 0 ;;
    esac
done
python="$(any_python)" || exit 1
cd "$ROOT"
exec "$python" -m onecard test "$@"
