"""The files of the control channel without a run: requests that are refused, and what is read of runs that are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from onecard.config.inference import SamplingOptions
from onecard.errors import CheckpointError, ConfigError, OneCardError
from onecard.programs import ask as ask_program
from onecard.programs import control as control_program
from onecard.train.asking import question_of
from onecard.train.control import FOLDER, MOST_BYTES, STATUS_NAME, NotRunning, Reply, reply, send, status
from onecard.train.control_folder import MOST_WAITING, ControlFolder, Request, open_control

ID = "01234567890123456789-0123abcd"


@pytest.fixture
def folder(tmp_path: Path) -> ControlFolder:
    found = ControlFolder(tmp_path)
    found.open()
    return found


def put(run: Path, content: bytes, request_id: str = ID) -> None:
    (run / FOLDER / f"{request_id}.request.json").write_bytes(content)


def test_the_channel_is_read_without_torch() -> None:
    code = "import sys, onecard.train.control; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_request_waits_and_is_replied_to_once(tmp_path: Path, folder: ControlFolder) -> None:
    first, second = send(tmp_path, "ask", question="one"), send(tmp_path, "stop")
    assert reply(tmp_path, first).state == "waiting"
    folder.poll()
    folder.poll()
    assert [(each.id, each.kind, each.given) for each in folder.waiting] == [
        (first, "ask", {"question": "one"}), (second, "stop", {}),
    ]  # fmt: skip
    assert folder.must_stop
    assert reply(tmp_path, first).state == "waiting"
    folder.close(None)
    assert reply(tmp_path, first).error == "the run has ended before this was carried out"
    assert reply(tmp_path, "../../etc/passwd") is None and reply(tmp_path, ID) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "no JSON in UTF-8"), (b"\xff", "no JSON in UTF-8"), (b"[]", "no JSON object"),
     (b'{"kind": "ask", "given": 3}', "no JSON object"), (b'{"kind": "erase"}', "of the kind 'erase'"),
     (b'{"kind": {}}', "of the kind {}"), (b'{"kind": "stop"}', "of an earlier start of this run"),
     (b"[" * 100_000, ""), (b" " * (MOST_BYTES + 1), "larger than 1,048,576 bytes")],
)  # fmt: skip
def test_what_is_no_request_is_refused(tmp_path: Path, folder: ControlFolder, content: bytes, said: str) -> None:
    put(tmp_path, content)
    folder.poll()
    found = reply(tmp_path, ID)
    assert found.state == "failed" and f"the request is {said}" in found.error
    assert not folder.waiting and not list((tmp_path / FOLDER).glob("*.request.json"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no FIFOs")
def test_what_is_no_file_is_not_read(tmp_path: Path, folder: ControlFolder) -> None:
    os.mkfifo(tmp_path / FOLDER / f"{ID}.request.json")  # reading it would wait for ever
    (tmp_path / "secret").write_text("{}", encoding="utf-8")
    other = ID.replace("abcd", "abce")
    (tmp_path / FOLDER / f"{other}.request.json").symlink_to(tmp_path / "secret")
    (tmp_path / FOLDER / "stop.request.json").write_text("{}", encoding="utf-8")
    folder.poll()
    assert [reply(tmp_path, each).error for each in (ID, other)] == ["the request is no ordinary file"] * 2
    assert not folder.waiting


def test_requests_and_replies_of_an_earlier_start_are_refused_by_name(tmp_path: Path, folder: ControlFolder) -> None:
    """Its process was killed: the status still says that it lives, and a request waits."""
    asked = send(tmp_path, "stop")
    later = ControlFolder(tmp_path)
    later.open()
    assert not later.waiting
    assert "of an earlier start of this run, and is not carried out" in reply(tmp_path, asked).error


def test_too_many_requests_are_refused(tmp_path: Path, folder: ControlFolder) -> None:
    ids = [send(tmp_path, "pause") for _ in range(MOST_WAITING + 1)]
    folder.poll()
    assert len(folder.waiting) == MOST_WAITING
    assert [reply(tmp_path, each).state for each in ids] == ["waiting"] * MOST_WAITING + ["failed"]


def test_what_no_run_would_carry_out_is_an_error_at_once(tmp_path: Path, folder: ControlFolder) -> None:
    with pytest.raises(ConfigError, match=r"'pauze' is none of .*did you mean pause"):
        send(tmp_path, "pauze")
    with pytest.raises(ConfigError, match="over 1,048,576 bytes"):
        send(tmp_path, "ask", question="x" * MOST_BYTES)
    with pytest.raises(NotRunning, match=r"has no control/status\.json"):
        send(tmp_path / "elsewhere", "stop")
    waits = send(tmp_path, "stop")
    now = status(tmp_path)
    assert (now.state, now.pid, now.is_alive) == ("starting", os.getpid(), True)
    for changes, said in (
        ({"pid": 2**22 + 1}, "takes no requests: lost, before its first step: process 4194305 is gone"),
        ({"process_began": now.process_began - 60}, "takes no requests: lost"),  # another process with its number
        ({"host": "elsewhere.example"}, "is trained on another machine, elsewhere.example"),
        ({"takes_requests": False}, "takes no requests: its last step is done"),
        ({"state": "failed", "message": "out of memory"}, "takes no requests: failed, .*: out of memory"),
    ):
        text = json.dumps(asdict(replace(now, **changes)))
        (tmp_path / FOLDER / STATUS_NAME).write_text(text, encoding="utf-8")
        with pytest.raises(NotRunning, match=said):
            send(tmp_path, "stop")
        assert (reply(tmp_path, waits).state == "failed") == ("state" in changes or "pid" in changes or
                                                              "process_began" in changes)  # fmt: skip


def test_the_end_of_a_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError), open_control(tmp_path):
        raise CheckpointError("no room\nat all")
    assert (status(tmp_path).state, status(tmp_path).message) == ("failed", "no room")
    with open_control(tmp_path) as control:
        control.say("training", 3, 9)
        before = status(tmp_path)
        control.at_step(4, 9)
        assert status(tmp_path).since == before.since
    assert (status(tmp_path).state, status(tmp_path).step) == ("ended", 4)


def test_a_disk_that_is_full_ends_nothing(
    tmp_path: Path, folder: ControlFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    asked = send(tmp_path, "ask", question="Capital?")
    folder.poll()
    monkeypatch.setattr("onecard.train.control_folder.write_whole", full)
    folder.say("training")
    folder.say("paused")
    assert capsys.readouterr().err.count("training goes on, and cannot be asked") == 1
    # Who asked does not wait for ever for a reply that cannot be written, and no question can be sent.
    folder.answer(folder.waiting[0], Reply("running", "Par"))
    assert reply(tmp_path, asked).state == "waiting"
    folder.answer(folder.waiting[0], Reply("done", "Paris"))
    assert reply(tmp_path, asked) is None
    monkeypatch.setattr(control_program, "send", lambda *_, **__: asked)
    with pytest.raises(OneCardError, match="has no reply to give: it was started anew, or its disk is full"):
        control_program.main(["save", "--run", str(tmp_path)])
    monkeypatch.setattr("onecard.train.control.write_whole", full)
    with pytest.raises(
        OneCardError, match=r"cannot be asked: nothing can be written there \(No space left on device\)"
    ):
        send(tmp_path, "ask", question="Capital?")


def test_what_a_killed_sender_left_is_removed_by_the_next_start(tmp_path: Path, folder: ControlFolder) -> None:
    half = tmp_path / FOLDER / f".{ID}.request.json.77.partial"
    half.write_text('{"kind": "as', encoding="utf-8")
    folder.poll()
    assert not folder.waiting and half.exists(), "it may still be being written"
    ControlFolder(tmp_path).open()
    assert not half.exists()


@pytest.fixture
def answering(tmp_path: Path, folder: ControlFolder) -> Iterator[list[Request]]:
    """A run that replies to everything, to questions in two pieces; what it was asked."""
    asked, is_over = list[Request](), threading.Event()

    def serve() -> None:
        while not is_over.wait(0.01):
            folder.poll()
            while folder.waiting:
                request = folder.waiting.pop(0)
                asked.append(request)
                if request.kind == "ask":
                    folder.answer(request, Reply("running", "Par"))
                    is_over.wait(0.3)
                if request.kind == "save":
                    folder.answer(request, Reply("failed", error="the disk is full"))
                else:
                    folder.answer(request, Reply("done", "Paris\x1b[2J." if request.kind == "ask" else "it waits"))

    thread = threading.Thread(target=serve)
    thread.start()
    yield asked
    is_over.set()
    thread.join()


def test_the_program_asks_and_says_what_came_of_it(
    tmp_path: Path, answering: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run", str(tmp_path)]
    control_program.main(["status", *run])
    control_program.main(["ask", *run, "--question", "Capital?", "--max_new_tokens", "5", "--temperature", "0.5"])
    control_program.main(["give-back", *run])
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{tmp_path}: starting, before its first step", "Paris\\u001b[2J.", f"{tmp_path}: it waits"]
    assert [each.kind for each in answering] == ["ask", "give_back"]
    given = answering[0].given
    assert (given["question"], given["max_new_tokens"], given["temperature"]) == ("Capital?", 5, 0.5)
    assert question_of(given)[1] == SamplingOptions(max_new_tokens=5, temperature=0.5)
    with pytest.raises(OneCardError, match="the disk is full"):
        control_program.main(["save", *run])
    with pytest.raises(ConfigError, match="--question: is missing"):
        control_program.main(["ask", *run])
    with pytest.raises(ConfigError, match="'paus' is none of"):
        control_program.main(["paus", *run])


def test_a_question_is_what_its_fields_say() -> None:
    turns, sampling = question_of({"question": "Hi", "system": "Be short.", "top_p": 1, "stop": ["x"]})
    assert [(turn.role, turn.content) for turn in turns] == [("system", "Be short."), ("user", "Hi")]
    assert sampling == SamplingOptions(top_p=1, stop=["x"])
    assert isinstance(sampling.top_p, float)  # transformers takes no whole number


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "one of question and messages"),
        ({"question": "a", "messages": []}, "one of question and messages"),
        ({"question": ""}, "cannot be asked"),
        ({"question": None}, "cannot be asked"),
        ({"messages": "x"}, "cannot be asked"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "cannot be asked"),
        ({"messages": [None]}, "cannot be asked"),
        ({"question": "a", "system": [5]}, "cannot be asked"),
        ({"question": "a", "path": "/etc/passwd"}, "has no path"),
        ({"question": "a", "seed": True}, "seed: True is no int"),
        ({"question": "a", "stop": [1]}, "stop: "),
        ({"question": "a", "temperature": -1.0}, "--temperature"),
        ({"question": "a", "max_new_tokens": 10**9}, "at most 4096 tokens"),
        ({"question": "a", "num_beams": 99}, "16 beams"),
    ],
)
def test_a_question_that_cannot_be_asked_says_why(given: dict, said: str) -> None:
    with pytest.raises(OneCardError, match=said):
        question_of(given)


@pytest.mark.parametrize(
    "words",
    [["RUN", "two words?", "--max_new_tokens", "5"], ["RUN", "--question", "two words?", "--max_new_tokens", "5"],
     ["--run=RUN", "--question=two words?", "--max_new_tokens=5"]],
)  # fmt: skip
def test_ask_takes_the_run_and_the_question_without_their_names(
    tmp_path: Path, folder: ControlFolder, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(control_program, "send", lambda run, kind, **given: sent.append((run, kind, given)) or ID)
    monkeypatch.setattr(control_program, "reply", lambda run, request_id: Reply("done", "yes"))
    ask_program.main([word.replace("RUN", str(tmp_path)) for word in words])
    [(run, kind, given)] = sent
    assert (run, kind, given["question"], given["max_new_tokens"]) == (tmp_path, "ask", "two words?", 5)
