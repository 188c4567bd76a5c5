"""`onecard quickstart` and `onecard test`: environments made once, what is run in them, and with which exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from onecard import translation
from onecard.console import run_main
from onecard.errors import OneCardError
from onecard.installation import SHIPPED
from onecard.programs import _environment, quickstart, test


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every program that would be run, as one line each; what a line ends with decides its exit code (`codes`)."""
    lines: list[str] = []

    def call(words: list, **environment: str) -> int:
        lines.append(" ".join(Path(word).name if "python" in str(word) else str(word) for word in map(str, words)))
        return 0

    for module in (_environment, quickstart, test):
        monkeypatch.setattr(module, "call", call)
    return lines


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of requirement files in place of the repository; its .venv has a Python that does nothing."""
    monkeypatch.setattr(_environment, "SHIPPED", tmp_path)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8", newline="\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    return tmp_path


def test_an_environment_is_installed_once_and_again_after_a_change(clone: Path, called: list[str]) -> None:
    def prepared() -> list[str]:
        called.clear()
        _environment.prepare_venv("requirements.txt", "requirements-dev.txt", venv=clone / ".venv")
        return [line for line in called if "pip install" in line]

    assert len(prepared()) == 1 and called[-1].endswith("requirements-dev.txt")
    assert prepared() == []
    (clone / "requirements.txt").write_text("# requirements.txt\r\n", encoding="utf-8", newline="")
    assert prepared() == [], "line ends of a checkout on Windows are no change"
    (clone / "requirements.txt").write_text("new==1\n", encoding="utf-8")
    assert len(prepared()) == 1
    called.clear()
    _environment.prepare_venv("requirements.txt", venv=clone / ".venv")
    assert not [line for line in called if "pip" in line], "the larger one holds the smaller one"


def test_a_failed_install_leaves_no_stamp(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_environment, "call", lambda words, **_: int("install" in words))
    with pytest.raises(OneCardError, match="the install failed"):
        _environment.prepare_venv("requirements.txt", venv=clone / ".venv")
    assert not list((clone / ".venv").glob(".installed*"))


def test_a_python_that_is_too_old_or_new_is_named(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_environment, "AFTER_LAST_PYTHON", (3, 9))
    with pytest.raises(OneCardError, match=r"Python [\d.]+ is not supported; start this with Python 3.10 to 3.13"):
        _environment.prepare_venv("requirements.txt", venv=clone / "none")


@pytest.mark.parametrize(
    ("words", "marks"),
    [([], ["not slow and not gptq and not trl and not real", "not slow and (gpu or simcard)",
            "not slow and gptq", "not slow and trl"]),
     (["--all"], ["(slow or not slow) and not gptq and not trl and not real", "(slow or not slow) and (gpu or simcard)",
                  "(slow or not slow) and gptq", "(slow or not slow) and trl"]),
     (["--gptq"], ["not slow and gptq"]), (["--trl"], ["not slow and trl"]), (["--real"], ["real"]),
     (["tests/data", "-x"], ["not slow and not gptq and not trl and not real"]),
     (["tests/gpu"], ["not slow and not gptq and not trl and not real", "not slow and (gpu or simcard)"])],
)  # fmt: skip
def test_the_checks_that_are_run(
    words: list[str], marks: list[str], called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test, "prepare_venv", lambda *files: Path("python"))
    monkeypatch.setattr(test, "prepare_layer", lambda name: Path("python"))
    test.main(words)
    ran = [line for line in called if " pytest " in line]
    assert [line.split(" -m ")[-1].split(" -n ")[0].split(" tests")[0] for line in ran] == marks
    assert all(line.endswith("tests/data -x") for line in ran) or words != ["tests/data", "-x"]
    assert ("ruff check" in " ".join(called)) is (words not in (["--gptq"], ["--trl"], ["--real"]))
    if not words:
        assert "--simcard sm75:11GiB,sm75:11GiB,late,garbage tests/gpu tests/simcard" in ran[1]
        assert "tests/export/test_gptq.py" in ran[2] and ran[3].endswith("tests/objectives/test_trl.py")


@pytest.mark.parametrize(("code", "words", "ends"), [(5, ["tests/x"], 0), (5, [], 5), (1, ["tests/x"], 1)])
def test_pytests_exit_code_is_handed_on(
    code: int, words: list[str], ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test, "call", lambda words, **_: code)
    try:
        test._tests(Path("python"), "not slow", words)
        assert ends == 0
    except SystemExit as ended:
        assert ended.code == ends


def test_without_a_clone_there_are_no_tests(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(test, "IS_CLONE", False)
    assert run_main(lambda: test.main([])) == 2
    assert "run this in a clone of the repository" in capsys.readouterr().err


def test_the_quickstart_ends_with_the_code_of_what_failed(
    monkeypatch: pytest.MonkeyPatch, called: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OUTPUT_PATH", "a b")
    quickstart.main(["--max_steps", "20"])
    assert [line.split(" -m ")[1].split()[:2] for line in called] == [["onecard", "finetune"], ["onecard", "score"]]
    assert called[0].endswith("--output_path a b --max_steps 20")
    assert "--lora_path a b" in capsys.readouterr().out
    failing: Callable[..., int] = lambda words, **_: 7  # noqa: E731
    monkeypatch.setattr(quickstart, "call", failing)
    with pytest.raises(SystemExit, match="7"):
        quickstart.main([])


def test_no_package_is_needed_to_make_the_environment() -> None:
    """As on a fresh machine: -S leaves out what pip has installed, -I what lies around."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from onecard.__main__ import run; run(sys.argv[1:])"
    for verb in ("quickstart", "test"):
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, str(SHIPPED), verb, "--help", "--language", "zh"],
            capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and f"{verb} [" in done.stdout, done.stderr
    assert translation.in_catalogue("== all checks passed", "zh")


@pytest.mark.slow
def test_an_environment_is_made_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_environment, "SHIPPED", tmp_path)
    (tmp_path / "requirements.txt").write_text("# nothing\n", encoding="utf-8")
    venv = tmp_path / "项 目" / ".venv"
    venv.parent.mkdir()
    python = _environment.prepare_venv("requirements.txt", venv=venv)
    asked = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, encoding="utf-8")
    assert Path(asked.stdout.strip()) == venv
    assert (venv / ".installed-requirements.txt").is_file()
