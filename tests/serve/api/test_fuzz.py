"""The OpenAPI document against the server: whatever it allows or forbids, no 500, no status or shape it leaves out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from onecard.config.inference import LimitOptions, ServeOptions
from onecard.serve.api.answer_format import READERS
from tests.serve.api.serving import Running, open_tiny, serving

KEY = "sesame"
LIMITS = LimitOptions(max_answer_tokens=8, max_beams=2, max_choices=3)
HEADERS = {"authorization": f"Bearer {KEY}"}
FEW, MANY = 6, 40  # requests of each kind, and twice as many valid chats: most are refused for one of their values
PATHS = {
    ("get", "/health"),
    ("get", "/query/{text}"),
    ("post", "/"),
    ("get", "/metrics"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model_id}"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/responses"),
    ("post", "/v1/embeddings"),
    ("post", "/tokenize"),
    ("post", "/v1/load_lora_adapter"),
    ("post", "/v1/unload_lora_adapter"),
    ("post", "/detokenize"),
}


@pytest.fixture(scope="module")
def small(api_base: Path) -> Iterator[Running]:
    """A server whose answers are short, so that many fit into a test."""
    with serving(open_tiny(api_base, LIMITS), LIMITS, ServeOptions(api_key=KEY, simple=True)) as running:
        yield running


@pytest.fixture(scope="module")
def document(small: Running) -> Any:
    schemathesis = pytest.importorskip("schemathesis", reason="needs Python 3.11")
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json", headers=HEADERS)


def cases() -> list[tuple[str, str, str]]:
    """Every path with valid requests, and with wrong ones where there is something to get wrong."""
    valid = [(method, path, "positive") for method, path in sorted(PATHS)]
    return valid + [(m, p, "negative") for m, p, _ in valid if m == "post" or "{" in p]


@pytest.mark.parametrize("n_cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "path", "mode"), cases())
def test_no_surprises(document: Any, method: str, path: str, mode: str, n_cases: int) -> None:
    modes = importlib.import_module("schemathesis").GenerationMode
    checks = importlib.import_module("schemathesis.specs.openapi.checks")
    # What is valid may still be refused: a prompt that is too long, too many choices. The check of the key sends ours
    # along and wonders; test_errors.py asks every path without it.
    excluded = [checks.positive_data_acceptance, checks.ignored_auth]
    statuses: list[int] = []
    n_cases *= 2 if (path, mode) == ("/v1/chat/completions", "positive") else 1

    @settings(max_examples=n_cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=document[path][method].as_strategy(generation_mode=modes(mode)))
    def ask(case: Any) -> None:
        name_the_model(case.body)
        if mode == "positive" and len(statuses) % 2:
            take_tools_away(case.body)
        answer = case.call_and_validate(headers=HEADERS, excluded_checks=excluded)
        statuses.append(answer.status_code)

    ask()
    assert len(statuses) >= n_cases // 2 or ("{" not in path and method == "get")
    if "lora_adapter" in path:  # this server has no folder of adapters (test_load_adapters.py)
        assert set(statuses) <= {400, 401, 404}
    elif method == "post":
        assert 400 in statuses
        assert mode == "negative" or 200 in statuses


def name_the_model(body: Any) -> None:
    """Most bodies name a model that exists; otherwise hardly any would get past its name."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) != 1:
        body["model"] = "tiny"


def take_tools_away(body: Any) -> None:
    """This model's template knows no tools, so that all bodies with some are refused; and most random schemas are."""
    for name in ("tools", "tool_choice", "text", *READERS) if isinstance(body, dict) else ():
        body.pop(name, None)
    if isinstance(body, dict) and isinstance(body.get("messages"), list):
        for message in body["messages"]:
            message.pop("tool_calls", None)
            message.pop("tool_call_id", None)
            if message["role"] == "tool":
                message["role"] = "user"


def test_the_document(small: Running) -> None:
    document = small.app.openapi()
    assert {(method, path) for path, found in document["paths"].items() for method in found} == PATHS
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert "422" not in statuses
            assert {"200", "401", "403"} <= statuses, path
            for status, response in operation["responses"].items():
                if status != "200":
                    shape = response["content"]["application/json"]["schema"]
                    assert shape == {"$ref": "#/components/schemas/ErrorBody"}
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    body = document["components"]["schemas"]["ChatRequest"]
    assert body["additionalProperties"] is False
    assert body["properties"]["functions"]["enum"] == [None, []]
    assert body["properties"]["tool_choice"]["anyOf"][0]["enum"] == [None, "none", "auto", "required"]
