# Sourced by the other scripts: which Python runs the project, and how .venv is made.
# Knows nothing of training. Works on Linux, macOS and in Git Bash on Windows.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

say() { printf '== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# print_header FILE: the comment at the top of a script, as its help.
print_header() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$1"; }

# The Python inside .venv, wherever this system puts it.
venv_python() {
    if [ -f "$VENV/Scripts/python.exe" ]; then echo "$VENV/Scripts/python.exe"; else echo "$VENV/bin/python"; fi
}

# A Python of this system that the project supports and that can make environments.
system_python() {
    local candidate check='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'
    local seen=""
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c "$check" >/dev/null 2>&1 || { seen="$seen $candidate"; continue; }
        if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
        seen="$seen $candidate(no venv)"
    done
    fail "needs Python 3.10 to 3.13 with the venv module (on Debian and Ubuntu: apt install python3-venv)." \
        "Found:${seen:- no Python at all}"
}

# A Python that can start what needs no packages: that of $VENV if there is one, else one of this system.
any_python() {
    if "$(venv_python)" -c pass >/dev/null 2>&1; then venv_python; else system_python; fi
}

# prepare_venv FILE...: $VENV with the last FILE installed, which includes the others (onecard/programs/_environment.py).
prepare_venv() {
    local python
    python="$(any_python)" || exit 1
    (cd "$ROOT" && "$python" -c 'import sys
from pathlib import Path
from onecard.__main__ import run_main
from onecard.programs._environment import prepare_venv
sys.exit(run_main(lambda: prepare_venv(*sys.argv[2:], venv=Path(sys.argv[1]))))' "$VENV" "$@")
}

# run_python: the Python that recipes use: $PYTHON if set, else .venv, else an activated environment.
run_python() {
    if [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
    elif [ -e "$(venv_python)" ]; then
        venv_python
    elif [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && command -v python >/dev/null 2>&1; then
        echo python
    else
        fail "there is no .venv yet. Run: bash scripts/quickstart.sh (or set PYTHON=/path/to/python)"
    fi
}
