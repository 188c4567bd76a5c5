"""GET /metrics, and the file of requests: counts by path, status and key, and no text of a client's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from onecard.config.inference import LimitOptions, ServeOptions
from onecard.errors import ConfigError
from onecard.inference.engine import InferenceEngine
from onecard.serve.keys import add_key
from tests.serve.api.serving import Running, chat_body, serving, wait_until

CHAT = "/v1/chat/completions"


def values(server: Running, key: str) -> dict[tuple[str, ...], float]:
    with server.client(headers={"authorization": f"Bearer {key}"}) as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name.removeprefix("onecard_"), *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_requests_and_tokens_are_counted_by_key_and_written_to_the_file(
    engine: InferenceEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys, log = tmp_path / "keys", tmp_path / "requests.jsonl"
    alice, bob = add_key(keys, "alice"), add_key(keys, "bob")
    options = ServeOptions(api_keys=str(keys), request_log=str(log))
    n_before = engine.paths.counts()["serial"]  # other tests ask the same engine
    with serving(engine, LimitOptions(), options) as server:
        as_alice = {"headers": {"authorization": f"Bearer {alice}"}}
        whole = server.post(CHAT, chat_body("a secret of mine"), **as_alice)
        server.post(CHAT, chat_body(stream=True), **as_alice)
        server.post(CHAT, chat_body(temperature=-1), headers={"authorization": f"Bearer {bob}"})
        server.post("/v1/made-up-by-a-client", {}, **as_alice)
        server.post(CHAT, chat_body())
        found = values(server, bob)
    usage = whole.json()["usage"]
    assert found["requests_total", "alice", CHAT, "200"] == 2
    assert found["requests_total", "bob", CHAT, "400"] == 1
    assert found["requests_total", "", CHAT, "401"] == 1
    assert found["requests_total", "alice", "other", "404"] == 1
    assert found["generation_tokens_total", "alice"] == 2 * usage["completion_tokens"]
    assert found["prompt_tokens_total", "alice"] > usage["prompt_tokens"]
    assert found["answers_total", "serial"] == n_before + 2
    assert found["answers_total", "batched"] == 0
    assert found["request_duration_seconds_count", CHAT] == 4
    assert found["time_to_first_token_seconds_count",] == 1
    assert found["requests_running",] == found["requests_waiting",] == 0
    assert not any("made-up" in word for key in found for word in key)

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(row["key"], row["status"]) for row in rows[:4]] == [
        ("alice", 200), ("alice", 200), ("bob", 400), ("alice", 404),
    ]  # fmt: skip
    assert rows[0]["completion_tokens"] == usage["completion_tokens"]
    assert rows[2]["outcome"] == "invalid_value:temperature"
    assert rows[1]["first_token_seconds"] <= rows[1]["seconds"]
    assert "secret" not in log.read_text(encoding="utf-8") + capfd.readouterr().out
    assert "texts" not in rows[0]


def test_a_log_that_was_moved_is_begun_anew_and_one_that_cannot_be_written_stops_nobody(
    engine: InferenceEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = folder / "requests.jsonl"
    with serving(engine, LimitOptions(), ServeOptions(request_log=str(log), log_prompts=True)) as server:

        def wait_for_rows(n: int) -> None:
            """A request is counted, and its row written at once, behind its answer."""
            wait_until(lambda: values(server, "any")["requests_total", "", CHAT, "200"] == n, seconds=60)

        assert server.chat("shown").status_code == 200
        wait_for_rows(1)
        log.rename(folder / "old.jsonl")
        assert server.chat("shown again").status_code == 200
        wait_for_rows(2)
        shutil.rmtree(folder)
        assert [server.chat().status_code for _ in range(2)] == [200, 200]
        wait_for_rows(4)
        folder.mkdir()
        assert server.chat("back").status_code == 200
        wait_for_rows(5)
        (row,) = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert row["texts"][0] == ["user", "back"]
    assert capfd.readouterr().err.count("--request_log") == 1
    with (
        pytest.raises(ConfigError, match=r"--request_log: .* cannot be written"),
        serving(engine, LimitOptions(), ServeOptions(request_log=str(tmp_path / "absent" / "log"))),
    ):
        pass
