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

# A number that changes when any requirement file does.
requirements_stamp() { (cd "$ROOT" && cat "$@" | cksum | tr ' \t' '--'); }

# prepare_venv FILE...: $VENV with the last FILE installed, which includes the others; a change in any installs anew.
# The stamps are written after the install, so one that was interrupted is done again.
prepare_venv() {
    local wanted stamp="$VENV/.installed-${!#}"
    wanted="$(requirements_stamp "$@")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$(venv_python)" -c pass >/dev/null 2>&1; then
        return
    fi
    if ! "$(venv_python)" -m pip --version >/dev/null 2>&1; then
        local python
        python="$(system_python)" || exit 1
        say "making ${VENV##*/} with $("$python" --version 2>&1)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    say "installing ${!#} into ${VENV##*/} (with torch some gigabytes on a machine with a GPU; later starts reuse them)"
    local options=(--disable-pip-version-check --no-input)
    [ "${CI:-}" = "true" ] && options+=(--quiet --progress-bar off)
    "$(venv_python)" -m pip install "${options[@]}" -r "$ROOT/${!#}" || fail "the install failed; see above"
    printf '%s\n' "$wanted" >"$stamp"
    [ $# -eq 1 ] || requirements_stamp "$1" >"$VENV/.installed-$1"
}

# prepare_gptq_venv: .venv-gptq, which is .venv and requirements-gptq.txt on top. It is apart because peft imports
# gptqmodel wherever it finds it: every start of every program would take some seconds longer and print its banner.
prepare_gptq_venv() {
    local layer="$VENV-gptq" wanted
    wanted="$(requirements_stamp requirements.txt requirements-data.txt requirements-documents.txt requirements-dev.txt requirements-gptq.txt)"
    if [ ! -f "$layer/.installed" ] || [ "$(cat "$layer/.installed")" != "$wanted" ]; then
        rm -rf "$layer"
        "$(venv_python)" -m venv --without-pip "$layer"
        say "installing requirements-gptq.txt into .venv-gptq"
        local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
        local python
        python="$(VENV="$layer" venv_python)"
        "$(venv_python)" -c "$packages" >"$("$python" -c "$packages")/onecard.pth"
        "$(venv_python)" -m pip --python "$python" install --disable-pip-version-check --no-input \
            --quiet --progress-bar off -r "$ROOT/requirements-gptq.txt" || fail "the install failed; see above"
        printf '%s\n' "$wanted" >"$layer/.installed"
    fi
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
