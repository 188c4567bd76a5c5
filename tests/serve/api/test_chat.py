"""/v1/chat/completions as a whole answer: what each parameter does, counted and compared with the engine itself."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from onecard.config.inference import LimitOptions, SamplingOptions
from onecard.data.messages import Turn
from onecard.inference.call import Chunk
from onecard.inference.engine import GenerationRequest, InferenceEngine
from tests.serve.api.serving import Running, chat_body, events_of, serving

QUESTION = "What is the capital of France?"


def last_chunks(engine: InferenceEngine, **request: Any) -> list[Chunk]:
    """What the engine says without any server."""
    request.setdefault("turns", (Turn("user", QUESTION),))
    chunks: list[Chunk] = []
    for chunks in engine.stream(GenerationRequest(**request)):  # noqa: B007
        pass
    return chunks


def content(server: Running, **changes: Any) -> str:
    answer = server.chat(QUESTION, **changes)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_the_body_is_openais(server: Running, engine: InferenceEngine) -> None:
    before = int(time.time())
    body = server.chat(QUESTION).json()
    assert before <= body["created"] <= time.time()
    (chunk,) = last_chunks(engine, sampling=SamplingOptions(max_new_tokens=8))
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": chunk.text, "refusal": None}, "logprobs": None,
         "finish_reason": "length"}
    ]  # fmt: skip
    n_prompt = engine.count_tokens([Turn("user", QUESTION)])
    n_cached = body["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= n_cached < n_prompt
    assert body["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": 8, "total_tokens": n_prompt + 8}
    assert server.chat(QUESTION).json()["id"] != body["id"]


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [
        ({"temperature": 0, "seed": 9}, {"temperature": 0.0}),
        ({"temperature": 0.9, "seed": 7}, {"temperature": 0.9, "seed": 7}),
        ({"temperature": None, "seed": 7}, {"temperature": 1.0, "seed": 7}),
        ({"temperature": 1.2, "seed": 7, "top_p": 0.8}, {"temperature": 1.2, "seed": 7, "top_p": 0.8}),
        ({"temperature": 1.2, "seed": 7, "top_k": 3}, {"temperature": 1.2, "seed": 7, "top_k": 3}),
        ({"temperature": 1, "seed": -3}, {"temperature": 1.0, "seed": 2**64 - 3}),
        ({"num_beams": 3}, {"num_beams": 3}),
        ({"num_beams": 2, "temperature": 1, "seed": 5}, {"num_beams": 2, "temperature": 1.0, "seed": 5}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"no_repeat_ngram_size": 1, "max_tokens": 40}, {"no_repeat_ngram_size": 1, "max_new_tokens": 40}),
        ({"max_tokens": None, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": None}, {"max_new_tokens": 16}),
        ({"max_tokens": -1}, {"max_new_tokens": 16}),
        ({"max_tokens": -1, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": None, "max_completion_tokens": -1}, {"max_new_tokens": 16}),
        ({"min_tokens": 8}, {"min_new_tokens": 8}),
    ],
)  # fmt: skip
def test_parameters_reach_the_engine(
    server: Running, engine: InferenceEngine, changes: dict[str, Any], sampling: dict[str, Any]
) -> None:
    (chunk,) = last_chunks(engine, sampling=SamplingOptions(**{"max_new_tokens": 8} | sampling))
    assert content(server, **changes) == chunk.text


def test_parameters_do_something(server: Running) -> None:
    """The comparison above would pass if neither side used them."""
    greedy = content(server, max_tokens=40)
    assert content(server, max_tokens=40, num_beams=3) != greedy
    assert content(server, max_tokens=40, repetition_penalty=1.7) != greedy
    assert content(server, max_tokens=40, no_repeat_ngram_size=1) != greedy
    assert content(server, max_tokens=40, temperature=1, seed=1) != greedy
    assert content(server, max_tokens=40, temperature=2, seed=1, top_k=1) == greedy
    assert content(server, max_tokens=40, temperature=2, seed=1, top_p=1e-6) == greedy


def test_without_a_seed_each_request_draws_anew(server: Running) -> None:
    answers = {content(server, temperature=1.5, max_tokens=12) for _ in range(5)}
    assert len(answers) == 5
    assert len({content(server, temperature=1.5, max_tokens=12, seed=3) for _ in range(3)}) == 1
    assert len({content(server, temperature=1.5, max_tokens=12, seed=-1) for _ in range(5)}) == 5


def test_n_answers_and_their_usage(server: Running, engine: InferenceEngine) -> None:
    body = server.chat(QUESTION, n=3, temperature=1, seed=5, max_tokens=6).json()
    chunks = last_chunks(engine, sampling=SamplingOptions(max_new_tokens=6, temperature=1.0, seed=5), n=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts == [chunk.text for chunk in chunks]
    assert len(set(texts)) == 3
    n_prompt = engine.count_tokens([Turn("user", QUESTION)])
    n_new = sum(chunk.usage.n_new_tokens for chunk in chunks)
    assert body["usage"].pop("prompt_tokens_details") == {"cached_tokens": n_prompt - 1}  # asked just now
    assert body["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def test_stop_texts_end_the_answer_and_are_not_shown(server: Running) -> None:
    whole = content(server, max_tokens=30)
    stop = whole[4:6]
    for form in (stop, [stop], ["never to be seen", stop]):
        answer = server.chat(QUESTION, max_tokens=30, stop=form).json()["choices"][0]
        assert answer["message"]["content"] == whole[: whole.index(stop)]
        assert answer["finish_reason"] == "stop"
    for none in (None, []):
        assert content(server, max_tokens=30, stop=none) == whole


def test_roles_and_parts(server: Running) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}
    plain = content(server, messages=[system, user])
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert content(server, messages=[system | {"role": "developer"}, user | {"content": parts}]) == plain
    assert content(server, messages=[user]) != plain
    # What clients send back of an earlier answer.
    echoed = {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None, "annotations": []}
    assert content(server, messages=[user, echoed, user]) == content(
        server, messages=[user, {"role": "assistant", "content": "Yes"}, user]
    )


@pytest.mark.parametrize(
    ("order", "same"),
    [("us", "user\n\nsystem"), ("usu", None), ("sus", None), ("au", None), ("sau", None), ("uu", None), ("uaau", None)],
)
def test_conversations_in_any_order(server: Running, order: str, same: str | None) -> None:
    """A system message last or between, an assistant's first, several of one role: answered, and no message is lost."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": f"{names[role]}"} for role in order]
    answer = content(server, messages=messages)
    for k in range(len(order) - 1):  # each of them counts
        other = [*messages[:k], messages[k] | {"content": "something else"}, *messages[k + 1 :]]
        assert content(server, messages=other) != answer
    if same:
        assert content(server, messages=[{"role": "user", "content": same}]) == answer


def test_the_servers_own_system_prompt(server: Running, engine: InferenceEngine) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}
    with serving(engine, LimitOptions(), system="Be brief.") as other:
        assert content(other) == content(server, messages=[system, user])
        own = [{"role": "system", "content": "Be long."}, user]
        assert content(other, messages=own) == content(server, messages=own)


def test_logprobs(server: Running, engine: InferenceEngine) -> None:
    (choice,) = server.chat(QUESTION, logprobs=True, top_logprobs=3).json()["choices"]
    (chunk,) = last_chunks(engine, sampling=SamplingOptions(max_new_tokens=8), top_logprobs=3)
    tokens = choice["logprobs"]["content"]
    assert [token["logprob"] for token in tokens] == pytest.approx([one.logprob for one in chunk.logprobs])
    assert len(tokens) == 8
    for token in tokens:
        top = token["top_logprobs"]
        assert len(top) == 3
        assert top[0]["logprob"] == max(other["logprob"] for other in top)
        assert top[0]["token"] == token["token"]  # greedy takes the likeliest
        assert math.exp(sum(other["logprob"] for other in top)) <= 1
    assert (
        bytes(value for token in tokens for value in token["bytes"]).decode("utf-8", "replace")
        == (choice["message"]["content"])
    )
    plain = server.chat(QUESTION, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in plain] == [[]] * 8
    assert server.chat(QUESTION, logprobs=False, top_logprobs=0).json()["choices"][0]["logprobs"] is None


def test_models(server: Running) -> None:
    with server.client() as client:
        (card,) = client.get("/v1/models").json()["data"]
        assert card["id"] == "tiny"
        assert client.get("/v1/models/tiny").json() == card
        assert client.get("/health").json() == {"status": "ok"}


def test_a_slash_in_the_name(engine: InferenceEngine, server: Running) -> None:
    with server.client() as client:
        error = client.get("/v1/models/org/other").json()["error"]
    assert error["code"] == "model_not_found"
    assert "org/other" in error["message"]
    assert server.post("/v1/chat/completions", chat_body(model="")).status_code == 404


def test_logit_bias(server: Running, engine: InferenceEngine) -> None:
    (chunk,) = last_chunks(engine, sampling=SamplingOptions(max_new_tokens=8), top_logprobs=0)
    first, liked = chunk.logprobs[0].token_id, chunk.logprobs[0].token_id - 1
    assert content(server, logit_bias={str(first): 0}) == chunk.text
    assert content(server, logit_bias={str(first): -100}) != chunk.text
    tokens = engine.tokenizer()
    for changes in ({"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": 0, "num_beams": 2}):
        (choice,) = server.chat(QUESTION, logit_bias={str(liked): 100}, **changes).json()["choices"]
        assert choice["message"]["content"].strip() == tokens.decode([liked] * 8).strip()
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 4, "logit_bias": {str(liked): 100}, "logprobs": 0}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    assert choice["logprobs"]["tokens"] == [choice["logprobs"]["tokens"][0]] * 4


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
def test_an_answer_that_is_begun_is_gone_on_with(
    server: Running, engine: InferenceEngine, more: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is the city of"}]
    prompt = engine.tokenizer().apply_chat_template(
        messages, chat_template=engine.template().jinja, continue_final_message=True, tokenize=False
    )
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = server.chat(messages=messages, continue_final_message=True, **more).json()
    plain = server.post("/v1/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    streamed = server.chat(messages=messages, continue_final_message=True, stream=True, **more).text
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events_of(streamed)[:-1]]
    assert "".join(pieces) == plain["choices"][0]["text"]
