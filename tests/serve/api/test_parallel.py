"""Many clients at once: each answer is its own, tells how it was computed, and leaves nothing behind."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, ParallelOptions
from onecard.inference.engine import open_engine
from tests.inference.batched.conftest import batch_of, held_blocks
from tests.serve.api.serving import Running, events_of, long_body, request_bytes, serving


@pytest.fixture(scope="module")
def parallel_server(api_base: Path) -> Iterator[Running]:
    model = ModelOptions(model_path=str(api_base), bits=32, device="cpu", gradient_checkpointing=False)
    limits, parallel = LimitOptions(max_choices=8), ParallelOptions(max_parallel=4)
    engine = open_engine(model, InferenceOptions(prompt_type="alpaca"), limits, model_name="tiny", parallel=parallel)
    with serving(engine, limits) as running:
        yield running
    engine.close()


def test_each_client_gets_its_own_answer(parallel_server: Running, server: Running) -> None:
    texts = [f"Number {k}" for k in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = [reply.json() for reply in pool.map(parallel_server.chat, texts)]
    expected = [server.chat(text).json() for text in texts]
    assert [one["choices"] for one in found] == [one["choices"] for one in expected]
    assert {one["onecard"]["path"] for one in found} == {"batched"}
    assert all("onecard" not in one for one in expected)
    assert parallel_server.chat(num_beams=2).json()["onecard"] == {"path": "serial"}


def test_the_last_piece_tells_the_path(parallel_server: Running) -> None:
    events = events_of(parallel_server.chat(stream=True).text)
    assert [event.get("onecard") for event in events[:-1]] == [None] * (len(events) - 2) + [{"path": "batched"}]


def test_clients_that_leave_take_their_blocks_along(parallel_server: Running) -> None:
    engine = parallel_server.engine
    connections = [parallel_server.connect() for _ in range(4)]
    for connection in connections:
        connection.sendall(request_bytes(long_body(stream=True)))
    for connection in connections:
        assert connection.recv(100)
    for connection in connections:
        connection.close()
    began = time.monotonic()
    while batch_of(engine).n_running or held_blocks(engine):
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    assert parallel_server.chat().status_code == 200


def test_answers_in_a_batch_are_held_to_grammars_of_their_own(parallel_server: Running, server: Running) -> None:
    forms = [{"guided_regex": "[a-c]{3}"}, {"guided_choice": ["one", "two"]}, {}, {"guided_json": {"type": "boolean"}}]
    bodies = [form | {"temperature": 1.5, "seed": k, "max_tokens": 40} for k, form in enumerate(forms * 2)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda body: parallel_server.chat(**body).json(), bodies))
    assert {one["onecard"]["path"] for one in found} == {"batched"}
    texts = [one["choices"][0]["message"]["content"] for one in found]
    assert texts == [server.chat(**body).json()["choices"][0]["message"]["content"] for body in bodies]
    for three, choice, _, truth in (texts[:4], texts[4:]):
        assert re.fullmatch("[a-c]{3}", three)
        assert choice in ("one", "two")
        assert truth in ("true", "false")
