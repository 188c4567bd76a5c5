#!/usr/bin/env bash
# Builds the documentation site, English and Chinese, into site/; a warning or a broken link is an error.
#
#   bash scripts/docs.sh            build
#   bash scripts/docs.sh --serve    build, then show it at http://127.0.0.1:8080
#
# Card: none. Time: under a minute, and a minute more for the first install into .venv-docs.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case "${1:-}" in
    -h | --help)
        print_header "${BASH_SOURCE[0]}"
        exit 0
        ;;
    "" | --serve) ;;
    *) fail "$1 is unknown; there is --serve" ;;
esac

VENV="$ROOT/.venv-docs"
prepare_venv requirements-docs.txt
cd "$ROOT"
"$(venv_python)" scripts/write_architecture.py --check || fail "run python scripts/write_architecture.py first"
NO_MKDOCS_2_WARNING=1 "$(venv_python)" -m mkdocs build --clean
say "the pages are in site/index.html"
if [ "${1:-}" = --serve ]; then
    say "http://127.0.0.1:8080 (Ctrl-C ends it)"
    exec "$(venv_python)" -m http.server 8080 --bind 127.0.0.1 --directory site
fi
