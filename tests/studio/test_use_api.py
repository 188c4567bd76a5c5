"""The model's server behind the studio: started, asked, compared, ended; a stub in its place, and once a real one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from onecard.config.studio import StudioOptions
from onecard.studio.app import studio_app
from onecard.studio.blind_chat import add_pair, open_votes, view_of
from onecard.studio.chat_server import KEY_FILE, ChatServer
from onecard.studio.context import StudioContext
from onecard.studio.use_api import turns_of
from tests.inference.conftest import lively_base, run_dir
from tests.studio.conftest import Client, eventually

__all__ = ["lively_base", "run_dir"]

STUB = Path(__file__).with_name("stub_use.py")
HI = [{"role": "user", "content": "Hi there"}]


@pytest.fixture
def run(context: StudioContext, ask: Client) -> Iterator[Path]:
    """What looks like a run. The server that a test has started is ended with it."""
    folder = context.output_root / "my-run"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}', encoding="utf-8")
    yield folder
    ask("POST", "/api/chat/stop", {})


@pytest.fixture
def context(options: StudioOptions, context: StudioContext, tmp_path: Path) -> StudioContext:
    context.jobs.program = (sys.executable, str(STUB), str(tmp_path / "stub"))
    return context


def load(ask: Client, **body: Any) -> dict[str, Any]:
    """Start, and wait until it is ready."""
    status, told = ask("POST", "/api/chat/start", {"source": "my-run", **body})
    assert status == 200, told
    return eventually(lambda: (state := ask("GET", "/api/chat")[1])["state"] != "starting" and state, "the model loads")


def server_of(context: StudioContext) -> ChatServer:
    """As a studio that starts later has it."""
    return ChatServer(context.output_root / ".studio" / "chat", context.output_root, context.jobs.program)


def test_the_server_is_started_asked_and_ended_and_its_key_stays_here(
    ask: Client, context: StudioContext, run: Path
) -> None:
    told = ask("GET", "/api/chat")[1]
    assert told["state"] == "off" and [source["path"] for source in told["sources"]] == ["my-run"]
    assert ask("POST", "/api/chat/completions", {"model": "base", "messages": HI})[0] == 409, "nothing is loaded"
    state = load(ask)
    assert (state["state"], state["models"], state["base"]) == ("ready", ["my-run", "base"], "base")
    answer = ask.raw("POST", "/api/chat/completions", json={"model": "my-run", "messages": HI, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "ereht iH"
    status, told = ask("POST", "/api/chat/completions", {"model": "other", "messages": HI})
    assert (status, told["error"]["message"]) == (404, "no model is called 'other'")

    job = server_of(context).jobs.all()[0]
    key_file = server_of(context).jobs.path(job["id"]) / KEY_FILE
    key = key_file.read_text(encoding="utf-8")
    assert os.name == "nt" or key_file.stat().st_mode & 0o077 == 0, "others can read the key"
    assert key not in json.dumps([ask("GET", "/api/chat")[1], job]), "the key is told"
    assert job["command"][3:] == [
        "serve", "--host", "127.0.0.1", "--port", "0", "--max_parallel", "4",
        "--lora_path", str(run), "--adapters_path", str(run.parent),
    ]  # fmt: skip

    log = server_of(context).jobs.path(job["id"]) / "log.txt"
    with log.open("a", encoding="utf-8") as stream:  # what it says of requests, for a long time
        stream.write("200 1 ms\n" * 50_000)
    assert server_of(context).state().models == ("my-run", "base"), "a studio that starts anew finds it"
    assert ask("POST", "/api/chat/stop", {})[1]["state"] == "off"
    assert server_of(context).jobs.all()[0]["state"] == "cancelled"


def test_it_ends_when_idle_and_a_second_start_ends_the_first(ask: Client, context: StudioContext, run: Path) -> None:
    load(ask)
    load(ask)
    server = server_of(context)
    assert [job["state"] for job in server.jobs.all()] == ["running"], "the first has ended, and its key is gone"
    assert not server.stop_if_idle()
    key_file = server.jobs.path(server.jobs.all()[0]["id"]) / KEY_FILE
    os.utime(key_file, (time.time() - 3600,) * 2)
    assert server.stop_if_idle() and server.state().state == "off"


def test_a_server_that_is_just_starting_is_ended_too_and_one_ends_with_the_studio(
    ask: Client, context: StudioContext, run: Path
) -> None:
    assert ask("POST", "/api/chat/start", {"source": "my-run"})[0] == 200
    assert ask("POST", "/api/chat/stop", {})[1]["state"] == "off"
    load(ask)
    context.events.close()
    assert server_of(context).state().state == "off"


def test_why_it_failed_is_told(ask: Client, run: Path) -> None:
    state = load(ask, bits=4)
    assert (state["state"], state["error"]) == ("failed", "4 bits do not fit; use a smaller model")


def test_a_training_keeps_the_card_unless_the_user_says_so(ask: Client, context: StudioContext, run: Path) -> None:
    from onecard.train.run_lock import RunLock

    with RunLock(context.output_root / "training"):
        (context.output_root / "training" / "onecard.yaml").write_text("{}", encoding="utf-8")
        assert ask("GET", "/api/chat")[1]["training"] == ["training"]
        status, told = ask("POST", "/api/chat/start", {"source": "my-run"})
        assert (status, told["error"]["code"]) == (409, "card_in_use")
        assert load(ask, anyway=True)["state"] == "ready"
        assert server_of(context).state().state == "ready" and not server_of(context).gives_way


def test_it_gives_way_to_a_run_that_begins(ask: Client, context: StudioContext, run: Path) -> None:
    from onecard.train.run_lock import RunLock

    load(ask)
    news = [watcher for watcher in context.events.watchers if "ChatApi" in getattr(watcher, "__qualname__", "")]
    assert [name for name, _ in news[0]()] == ["chat"] and list(news[0]()) == []
    with RunLock(context.output_root / "training"):
        (context.output_root / "training" / "onecard.yaml").write_text("{}", encoding="utf-8")
        told = dict(news[0]())["chat"]
    assert (told["state"], told["ended_for"]) == ("off", ["training"])


def test_a_server_that_is_ready_again_within_a_second_is_news(ask: Client, context: StudioContext, run: Path) -> None:
    """A page may still wait for the answer to its start, or another one have asked for the stop."""
    news = next(watcher for watcher in context.events.watchers if "ChatApi" in getattr(watcher, "__qualname__", ""))
    load(ask)
    assert [(name, content["state"]) for name, content in news()] == [("chat", "ready")] and list(news()) == []
    ask("POST", "/api/chat/stop", {})
    load(ask)
    assert [(name, content["state"]) for name, content in news()] == [("chat", "ready")]


def test_the_answer_ends_when_the_page_leaves(context: StudioContext, ask: Client, run: Path, tmp_path: Path) -> None:
    """The page's connection is closed in the middle, as Starlette tells it: `http.disconnect`."""
    load(ask)
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "slow"}], "stream": True}).encode()
    sent: list[bytes] = []

    async def leave() -> None:
        left = asyncio.Event()
        waiting = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if len(sent) > 3:
                left.set()

        headers = [(b"host", b"127.0.0.1:7861"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/api/chat/completions", "headers": headers,
                 "query_string": b"", "http_version": "1.1", "raw_path": b"", "root_path": "", "scheme": "http",
                 "asgi": {"version": "3.0", "spec_version": "2.3"}}  # fmt: skip
        await asyncio.wait_for(ask.app(scope, receive, send), 60)
        # Waited for in here: the end of the loop would close every connection.
        await asyncio.to_thread(eventually, (tmp_path / "left").exists, "the server hears that nobody listens any more")

    asyncio.run(leave())
    assert any(b"data: " in piece for piece in sent)


def test_differences_are_told_by_piece(ask: Client, run: Path) -> None:
    load(ask)
    status, told = ask("POST", "/api/chat/differences",
                       {"messages": HI, "answer": "yes", "tuned": "my-run", "base": "base"})  # fmt: skip
    assert status == 200
    assert [(piece["text"], piece["difference"]) for piece in told["pieces"]] == [("y", 2.0), ("e", 2.0), ("s", 2.0)]


def test_blind_votes_are_kept_and_names_come_last(ask: Client, context: StudioContext, run: Path) -> None:
    load(ask)
    names = {"a": "base", "b": "my-run"}

    def blind(path: str, **body: Any) -> dict[str, Any]:
        status, told = ask("POST", f"/api/chat/blind/{path}", {**names, **body})
        assert status == 200, told
        return told

    for number in range(4):
        view = blind("ask", messages=[{"role": "user", "content": f"question {number}"}], max_tokens=9)
        pair = view["pair"]
        assert {pair["first"], pair["second"]} == {f"question {number}", f"question {number}"[::-1]}
        assert not any(name in json.dumps(view) for name in names.values()), "the page knows whose it is"
        again = blind("ask", messages=HI)
        assert again["pair"] == pair, "it is voted on before the next one is asked"
        place = 1 if pair["first"] == f"question {number}" else 2
        view = blind("vote", key=pair["key"], place=place)
    assert blind("ask", messages=[{"role": "user", "content": "same"}])["is_same"]
    assert blind("undo")["n_votes"] == 3
    assert blind("vote", key=pair["key"], place=0)["n_votes"] == 4
    status, told = ask("GET", "/api/chat/blind?a=my-run&b=base&result=1")
    assert status == 200 and told["result"]["a"] == "base", "the same folder, whichever is named first"
    assert (told["result"]["wins_a"], told["result"]["wins_b"], told["result"]["ties"]) == (3, 0, 2)
    rows = [json.loads(line) for line in Path(told["file"]).read_text(encoding="utf-8").splitlines()]
    assert [row["chosen"] for row in rows] == ["question 0", "question 1", "question 2"]


def test_a_kill_between_the_pairs_and_the_votes_loses_nothing(tmp_path: Path) -> None:
    turns, names = turns_of(HI), ("a", "b")
    votes = add_pair(tmp_path, turns, {"a": "1", "b": "2"})
    votes.vote("1", 1)
    before = (votes.folder / "votes.json").read_bytes()
    add_pair(tmp_path, turns, {"a": "3", "b": "4"})
    (votes.folder / "votes.json").write_bytes(before)
    found = open_votes(tmp_path, names)
    assert len(found.votes) == 1 and view_of(found)["pair"]["key"] == "2"
    assert len(open_votes(tmp_path, names).pairs) == 2


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("start", {"source": "../.."}, "lies outside"),
        ("start", {"source": "data"}, "no adapter"),
        ("start", {"source": "my-run", "bits": 3}, "bits is one of"),
        ("start", {"source": "my-run", "bits": True}, "bits is one of"),
        ("start", {}, "source is missing"),
        ("completions", {"model": "x"}, "messages is missing"),
        ("differences", {"messages": [], "answer": "a", "tuned": "a", "base": "b"}, "messages is a list"),
        ("differences", {"messages": HI, "answer": "", "tuned": "a", "base": "b"}, "answer is a text"),
        ("blind/ask", {"a": "x", "b": "x", "messages": HI}, "two models"),
        ("blind/ask", {"a": "x", "b": ["y"], "messages": HI}, "b is a text"),
        ("blind/ask", {"a": "x", "b": "y", "messages": [{"role": "tool", "content": "x"}]}, "a message is"),
        ("blind/ask", {"a": "x", "b": "y", "messages": [{"role": "assistant", "content": "x"}]}, "the user's"),
        ("blind/vote", {"a": "x", "b": "y", "key": "1", "place": 3}, "place is"),
        ("blind/vote", {"a": "x", "b": "y", "key": 1, "place": 1}, "key is a text"),
        ("blind/undo", {"a": "x"}, "b is a text"),
    ],
)
def test_what_cannot_be_is_refused(ask: Client, run: Path, path: str, body: dict[str, Any], words: str) -> None:
    status, told = ask("POST", f"/api/chat/{path}", body)
    assert status in (400, 403, 404) and words in told["error"]["message"], told


def test_names_of_models_never_become_paths(tmp_path: Path) -> None:
    for names in (("../../x", "y"), ("..", "."), ("/etc", "a\\b")):
        folder = open_votes(tmp_path, names).folder
        assert folder.parent == tmp_path and folder.resolve().parent == tmp_path.resolve(), names


@pytest.mark.slow
def test_a_real_model_answers_as_itself_and_as_its_base(
    options: StudioOptions, context: StudioContext, run_dir: Path
) -> None:
    context.jobs.program = (sys.executable, "-m", "onecard")
    ask = Client(studio_app(options, context))
    shutil.copytree(run_dir, context.output_root / "my-run")
    state = load(ask, bits=32)
    try:
        assert state["state"] == "ready" and len(state["models"]) == 2 and state["base"] == state["models"][1], state
        asked = {"messages": HI, "temperature": 0, "max_tokens": 8}
        texts = {}
        for model in state["models"]:
            status, told = ask("POST", "/api/chat/completions", {**asked, "model": model})
            assert status == 200, told
            texts[model] = told["choices"][0]["message"]["content"]
        tuned, base = state["models"]
        assert texts[tuned] != texts[base], "the adapter changes nothing"
        status, told = ask("POST", "/api/chat/differences",
                           {"messages": HI, "answer": texts[tuned], "tuned": tuned, "base": base})  # fmt: skip
        assert status == 200 and "".join(piece["text"] for piece in told["pieces"]).strip() == texts[tuned].strip()
        assert sum(piece["difference"] for piece in told["pieces"]) > 0, "its own greedy answer is likelier to itself"
    finally:
        ask("POST", "/api/chat/stop", {})


def test_httpx_is_not_sent_through_a_proxy(
    ask: Client, context: StudioContext, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    load(ask)
    assert ask("POST", "/api/chat/completions", {"model": "base", "messages": HI})[0] == 200
    assert httpx.Client(trust_env=True)._mounts, "a proxy is set"
