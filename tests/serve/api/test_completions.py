"""/v1/completions and /v1/embeddings: prompts in four forms, echo, scores as evaluation tools read them."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.inference.engine import InferenceEngine
from tests.serve.api.serving import Running

PROMPTS = ["The quick brown", "中国的首都是", "1 + 2 =", "emoji 😀 "]


def complete(server: Running, prompt: Any, **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 6} | changes
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids_of(engine: InferenceEngine, text: str) -> list[int]:
    return list(engine.tokenizer()(text)["input_ids"])


def reference_scores(base: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of transformers itself. (n, vocab)"""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        scores: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return scores


def test_the_four_forms_of_a_prompt(server: Running, engine: InferenceEngine) -> None:
    alone = [complete(server, text) for text in PROMPTS]
    texts = [body["choices"][0]["text"] for body in alone]
    assert len(set(texts)) == len(PROMPTS)
    ids = [ids_of(engine, text) for text in PROMPTS]
    assert complete(server, ids[0])["choices"][0]["text"] == texts[0]
    for form in (PROMPTS, ids):
        body = complete(server, form)
        assert [choice["text"] for choice in body["choices"]] == texts
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert body["usage"]["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in alone)
    assert alone[0]["object"] == "text_completion"
    assert alone[0]["id"].startswith("cmpl-")


def test_prompts_times_n(server: Running) -> None:
    body = complete(server, PROMPTS[:2], n=2, temperature=1, seed=4)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in body["choices"]}) == 4
    same = complete(server, [PROMPTS[0]] * 3, temperature=1, seed=4)["choices"]
    assert len({choice["text"] for choice in same}) == 3  # each has random numbers of its own
    first = complete(server, PROMPTS[0], n=2, temperature=1, seed=4)
    assert [choice["text"] for choice in first["choices"]] == [choice["text"] for choice in body["choices"][:2]]


def test_echo_puts_the_prompt_in_front(server: Running, engine: InferenceEngine) -> None:
    plain = complete(server, PROMPTS)
    for form in (PROMPTS, [ids_of(engine, text) for text in PROMPTS]):
        echoed = complete(server, form, echo=True)
        for text, one, other in zip(PROMPTS, plain["choices"], echoed["choices"], strict=True):
            assert other["text"] == text + one["text"]
        nothing = complete(server, form, echo=True, max_tokens=0)
        assert [choice["text"] for choice in nothing["choices"]] == PROMPTS
        assert nothing["usage"]["completion_tokens"] == 0
    assert [choice["text"] for choice in complete(server, PROMPTS, max_tokens=0)["choices"]] == [""] * 4


def test_scores_of_the_prompt_are_the_models(server: Running, engine: InferenceEngine, api_base: Path) -> None:
    ids = ids_of(engine, "The quick brown fox jumps over the lazy dog.")
    scores = reference_scores(api_base, ids)
    found = complete(server, ids, echo=True, max_tokens=0, logprobs=2)["choices"][0]["logprobs"]
    expected = [float(scores[k, token_id]) for k, token_id in enumerate(ids[1:])]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    best = [float(value) for value in scores.max(-1).values[:-1]]
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(best, abs=1e-4)
    assert len(found["tokens"]) == len(found["text_offset"]) == len(ids)


@pytest.mark.parametrize("ends_at_once", [False, True])
def test_as_lm_evaluation_harness_scores(
    server: Running, engine: InferenceEngine, api_base: Path, ends_at_once: bool
) -> None:
    """Its `local-completions` sends ids with one token to generate, and drops the last entry, whatever it is.

    https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/models/openai_completions.py: parse_logprobs
    """
    contexts, endings = ["The quick", "中国的"], [" brown fox", "首都是北京。"]
    rows = [(ids_of(engine, one), ids_of(engine, one + other)) for one, other in zip(contexts, endings, strict=True)]
    changes: dict[str, Any] = {}
    if ends_at_once:  # then the generated token is not shown, and must be counted all the same
        nexts = [complete(server, whole, max_tokens=1)["choices"][0]["text"] for _, whole in rows]
        changes["stop"] = [text for text in nexts if text]
        assert changes["stop"]
    body = complete(server, [whole for _, whole in rows], max_tokens=1, logprobs=1, echo=True, seed=1234, **changes)
    assert len(body["choices"]) == 2
    for choice, (context, whole) in zip(body["choices"], rows, strict=True):
        values = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        scores = reference_scores(api_base, whole)
        expected = [float(scores[k - 1, whole[k]]) for k in range(len(context), len(whole))]
        assert values == pytest.approx(expected, abs=1e-4)
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        assert is_greedy == all(int(scores[k - 1].argmax()) == whole[k] for k in range(len(context), len(whole)))


def test_a_greedy_ending_is_seen_as_one(server: Running, engine: InferenceEngine, api_base: Path) -> None:
    context = ids_of(engine, "The quick")
    whole = list(context)
    for _ in range(4):
        whole.append(int(reference_scores(api_base, whole)[-1].argmax()))
    scored = complete(server, whole, max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
    values, tops = scored["token_logprobs"][len(context) : -1], scored["top_logprobs"][len(context) : -1]
    assert len(values) == 4
    assert all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def test_tokens_and_offsets_follow_the_text(server: Running) -> None:
    text = "The quick brown fox is 中国的首都"
    choice = complete(server, text, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    logprobs = choice["logprobs"]
    n_checked = 0
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token.strip() and not token.startswith(("bytes:", "<s>")):
            assert choice["text"][offset:].startswith(token.lstrip() if offset == 0 else token)
            n_checked += 1
    assert n_checked > 10
    assert [top for top in logprobs["top_logprobs"] if top] == []


def vectors_of(server: Running, texts: Any, **changes: Any) -> list[list[float]]:
    answer = server.post("/v1/embeddings", {"model": "tiny", "input": texts} | changes)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return [item["embedding"] for item in data]


def test_embeddings(server: Running, engine: InferenceEngine) -> None:
    alone = [vectors_of(server, text)[0] for text in PROMPTS]
    assert len({tuple(vector) for vector in alone}) == len(PROMPTS)
    together = vectors_of(server, PROMPTS)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
        assert sum(value * value for value in one) == pytest.approx(1)
    ids = [ids_of(engine, text) for text in PROMPTS]
    assert vectors_of(server, ids)[3] == pytest.approx(alone[3], abs=1e-5)
    assert vectors_of(server, ids[1])[0] == pytest.approx(alone[1], abs=1e-5)
    body = server.post("/v1/embeddings", {"model": "tiny", "input": PROMPTS}).json()
    n_tokens = sum(map(len, ids))
    assert body["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}


def test_embeddings_in_base64(server: Running) -> None:
    (plain,) = vectors_of(server, "Hi", encoding_format="float")
    (coded,) = vectors_of(server, "Hi", encoding_format="base64")
    raw = base64.b64decode(str(coded))
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(plain, abs=1e-6)
