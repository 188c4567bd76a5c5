"""`--simcard`: what it accepts, and that a machine without a compiler skips with the reason. Needs no card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simcard import build
from tests.simcard.card import Device, parse

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30


def test_devices_and_words_are_read() -> None:
    assert parse("sm75:11GiB").devices == (Device((7, 5), 11 * GIB),)
    spec = parse("sm86:24GiB,late,sm89:512MiB,garbage")
    assert [device.total_bytes for device in spec.devices] == [24 * GIB, GIB // 2]
    assert spec.late and spec.garbage and not spec.expandable


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither a device"),
        ("sm75", "'sm75' is neither a device such as sm75:11GiB nor one of late, garbage, expandable"),
        ("sm75:11GB", "neither a device"),
        ("late", "1 to 8 devices"),
        ("sm52:4GiB", "sm75, sm80, sm86 and sm89"),
    ],
)
def test_a_wrong_device_is_answered_with_the_right_form(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_each_system_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if sys.platform.startswith("linux"):
        with pytest.raises(build.Unavailable, match="no C\\+\\+ compiler"):
            build.compiler()
    else:
        with pytest.raises(build.Unavailable, match="on Linux only"):
            build.compiler()


@pytest.mark.slow
def test_the_tests_of_a_card_are_skipped_with_the_reason_where_it_cannot_be_built(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path), "ONECARD_SIMCARD_CACHE": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--simcard", "sm75:11GiB"]
    done = subprocess.run(
        [*command, "tests/gpu/test_card.py"], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 skipped" in done.stdout and "no simulated card: " in done.stdout
