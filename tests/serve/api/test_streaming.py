"""Answers in pieces: the raw bytes, the order of events, and that joined pieces equal the whole, in every mode."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest

from onecard.config.inference import LimitOptions
from onecard.errors import ModelError
from onecard.inference.engine import InferenceEngine, OutOfMemory
from tests.serve.api.serving import (
    LONG,
    Breaking,
    Running,
    chat_body,
    events_of,
    lines_of,
    long_body,
    read_all,
    request_bytes,
    serving,
)

MODES = {
    "greedy": {"temperature": 0},
    "sample": {"temperature": 1.2, "seed": 11},
    "beam": {"temperature": 0, "num_beams": 3},
    "beam-sample": {"temperature": 1.2, "num_beams": 2, "seed": 11},
}


def streamed(server: Running, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a request, [DONE] checked and left out."""
    answer = server.post(path, body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = events_of(answer.text)
    assert done == "[DONE]"
    return events


def choices_of(events: list[Any], index: int) -> list[dict[str, Any]]:
    return [choice for event in events for choice in event["choices"] if choice["index"] == index]


def rounded(token: Any) -> Any:
    """A token with its log-probability, and those of others, to five digits behind the point."""
    top = [{**other, "logprob": pytest.approx(other["logprob"], abs=1e-5)} for other in token["top_logprobs"]]
    return {**token, "logprob": pytest.approx(token["logprob"], abs=1e-5), "top_logprobs": top}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("mode", "logprobs"), [*((mode, False) for mode in MODES), ("greedy", True), ("sample", True)])
def test_joined_pieces_of_a_chat_equal_the_whole(server: Running, mode: str, n: int, logprobs: bool) -> None:
    body = chat_body("把下面的句子翻译成英文", n=n, max_tokens=24, **MODES[mode])
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", body).json()
    events = streamed(server, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    *pieces, usage = events
    assert usage["choices"] == []
    assert usage["usage"].pop("prompt_tokens_details")["cached_tokens"] > 0  # the whole answer was asked before
    assert usage["usage"].items() <= whole["usage"].items()
    assert all(piece["usage"] is None for piece in pieces)
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    assert events[0]["object"] == "chat.completion.chunk"
    for index in range(n):
        first, *middle, last = choices_of(pieces, index)
        expected = whole["choices"][index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert [piece["finish_reason"] for piece in (first, *middle)] == [None] * (1 + len(middle))
        assert (last["delta"], last["finish_reason"]) == ({}, expected["finish_reason"])
        assert "".join(piece["delta"].get("content", "") for piece in middle) == expected["message"]["content"]
        assert expected["message"]["content"]
        tokens = [token for piece in middle for token in (piece["logprobs"] or {"content": []})["content"]]
        assert bool(tokens) == logprobs
        for token, of_whole in zip(tokens, (expected["logprobs"] or {"content": []})["content"], strict=True):
            # What of the prompt is read anew depends on what was asked before, and so does the last digit.
            assert token == rounded(of_whole)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_joined_pieces_of_completions_equal_the_whole(server: Running, mode: str, echo: bool) -> None:
    body = {"model": "tiny", "prompt": ["你好，世界", "1 + 2"], "n": 2, "max_tokens": 16, "echo": echo} | MODES[mode]
    if "beam" not in mode:
        body["logprobs"] = 1
    whole = server.post("/v1/completions", body).json()
    events = streamed(server, "/v1/completions", body)
    assert all("usage" not in event for event in events)
    for index in range(4):
        pieces = choices_of(events, index)
        expected = whole["choices"][index]
        assert "".join(piece["text"] for piece in pieces) == expected["text"]
        reasons = [piece["finish_reason"] for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + [expected["finish_reason"]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if "beam" not in mode else ():
            joined = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"][name]]
            assert joined == expected["logprobs"][name]
            assert joined


@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_an_answer_grows(server: Running, mode: str) -> None:
    events = streamed(server, "/v1/chat/completions", chat_body(max_tokens=300, min_tokens=300, **MODES[mode]))
    texts = [choice["delta"].get("content", "") for choice in choices_of(events, 0)]
    assert sum(bool(text) for text in texts) > 1  # how many pieces there are depends on how fast the machine is


def test_beams_are_shown_beside_the_answer_and_sent_once(server: Running) -> None:
    body = chat_body(max_tokens=250, min_tokens=250, **MODES["beam"])
    events = streamed(server, "/v1/chat/completions", body)
    with_text = [event for event in events if event["choices"][0]["delta"].get("content")]
    assert len(with_text) == 1
    pictures = [event["onecard"]["text"] for event in events if "onecard" in event]
    assert len(pictures) >= 2
    assert all(event["choices"][0]["delta"] == {} for event in events if "onecard" in event)
    assert events.index(with_text[0]) > max(k for k, event in enumerate(events) if "onecard" in event)


def unchunked(raw: bytes) -> bytes:
    """The content of a chunked body."""
    content = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        content += raw[: int(size, 16)]
        raw = raw[int(size, 16) + 2 :]
    return content


def test_the_raw_bytes(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(request_bytes(chat_body("你好", max_tokens=30, stream=True)))
        head, _, raw = read_all(connection).partition(b"\r\n\r\n")
    lines = head.decode("ascii").lower().split("\r\n")
    assert lines[0] == "http/1.1 200 ok"
    assert "content-type: text/event-stream; charset=utf-8" in lines
    assert "cache-control: no-cache" in lines
    assert not [line for line in lines if line.startswith("content-length")]
    text = unchunked(raw).decode("utf-8")
    assert text.endswith("\n\ndata: [DONE]\n\n")
    blocks = text.split("\n\n")[:-1]
    assert len(blocks) >= 4
    for block in blocks[:-1]:
        assert block.startswith("data: {")
        assert "\n" not in block
        json.loads(block.removeprefix("data: "))


def test_who_waits_hears_so_and_is_then_answered(server: Running) -> None:
    with server.connect() as first, server.connect() as second:
        first.sendall(request_bytes(long_body(stream=True)))
        assert any(line.startswith("data: {") for line in lines_of(first))
        second.sendall(request_bytes(chat_body(stream=True)))
        lines = lines_of(second)
        waiting = next(line for line in lines if line.startswith(":"))
        assert waiting == ": waiting, 1 in front"
        first.close()
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (OutOfMemory("lower --max_new_tokens"), 503, "out_of_memory"),
        (ModelError("broken /data/me/adapter"), 500, "model_error"),
        (ValueError("prompt: SECRET"), 500, "internal_error"),
    ],
)
def test_errors_before_and_after_the_first_piece(
    engine: InferenceEngine, reason: Exception, status: int, code: str, capfd: pytest.CaptureFixture[str]
) -> None:
    body = chat_body(max_tokens=300, min_tokens=300, stream=True)
    with serving(Breaking(engine, reason, 0), LimitOptions()) as server:  # type: ignore[arg-type]
        for changes in ({}, {"stream": False}):
            answer = server.post("/v1/chat/completions", body | changes)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == code
            assert answer.json()["error"]["type"] == "server_error"
    with serving(Breaking(engine, reason, 2), LimitOptions()) as server:  # type: ignore[arg-type]
        answer = server.post("/v1/chat/completions", body)
        assert answer.status_code == 200
        events = events_of(answer.text)
        assert events[-1]["error"]["code"] == code
        assert "choices" in events[0]
        assert "[DONE]" not in events
    assert "SECRET" not in answer.text
    assert "/data/me" not in answer.text
    printed = capfd.readouterr()
    assert "SECRET" not in printed.out + printed.err
    assert "Traceback" not in printed.err


def test_the_server_stops_while_it_answers(engine: InferenceEngine) -> None:
    with serving(engine, LimitOptions()) as server, server.connect() as streaming, server.connect() as waiting:
        streaming.sendall(request_bytes(long_body(stream=True)))
        lines = lines_of(streaming)
        assert any(line.startswith("data: {") for line in lines)
        waiting.sendall(request_bytes(chat_body(max_tokens=LONG)))
        server.server.should_exit = True
        rest = [line for line in lines if line.startswith("data: ")]
        raw = b""
        with suppress(ConnectionResetError):
            raw = read_all(waiting)
    assert json.loads(rest[-1][6:])["error"]["code"] == "server_stopping"
    # The second one may have come in a moment before or after the end began, or not have been read at all.
    assert raw == b"" or b"server_stopping" in raw
    assert not server.app.jobs
