"""The first signal is a wish, the second one an order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from onecard.train import signals as interrupts
from onecard.train.signals import Interrupts

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent with os.kill, which ends a Windows process")

LOOP = """
import sys, time
from onecard.train.signals import Interrupts
with Interrupts() as asked:
    print("ready", flush=True)
    while not asked.requested:
        time.sleep(0.01)
    print(asked.requested, asked.exit_code, flush=True)
    if sys.argv[1] == "stubborn":
        time.sleep(30)
sys.exit(asked.exit_code)
"""


def loop(manner: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, manner],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_first_signal_is_a_wish(name: str, code: int) -> None:
    process = loop("polite")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=10)
    assert out == f"{name} {code}\n" and process.returncode == code
    assert f"{name}: finishing this step" in err


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_second_signal_leaves_at_once(name: str, code: int) -> None:
    process = loop("stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "SIGINT 130\n"
    time.sleep(0.5)
    sent_s = time.monotonic()
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=10)
    assert process.returncode == code
    assert time.monotonic() - sent_s < 5


def test_an_echo_of_the_first_signal_is_not_a_second_one() -> None:
    with Interrupts(same_request_s=60) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does right after the terminal
        assert (asked.requested, asked.exit_code) == ("SIGINT", 130)


def test_old_handlers_come_back() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        old_int = signal.getsignal(signal.SIGINT)
        with pytest.raises(ZeroDivisionError), Interrupts() as asked:
            assert signal.getsignal(signal.SIGTERM) != mine
            assert (asked.requested, asked.exit_code) == (None, 0)
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGINT) is old_int
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_it_does_nothing() -> None:
    seen: list[object] = []

    def work() -> None:
        try:
            with Interrupts() as asked:
                seen.append(asked.requested)
        except Exception as reason:
            seen.append(reason)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None] and signal.getsignal(signal.SIGINT) is before


def test_a_system_without_sigterm_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    # SIGUSR1 stands in for Windows' SIGBREAK, and a name that no system has for what is absent.
    monkeypatch.setattr(interrupts, "_MEANING", {"SIGINT": "SIGINT", "SIGNOSUCH": "SIGTERM", "SIGUSR1": "SIGTERM"})
    with Interrupts() as asked:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (asked.requested, asked.exit_code) == ("SIGTERM", 143)
