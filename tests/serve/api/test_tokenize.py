"""/tokenize and /detokenize against the prompts that the engine feeds its model."""

from __future__ import annotations

from typing import Any

import pytest

from onecard.inference.engine import InferenceEngine
from tests.serve.api.serving import Running
from tests.serve.api.test_errors import shaped

USER = {"role": "user", "content": "What is 你好?"}


def tokens(server: Running, **body: Any) -> dict[str, Any]:
    answer = server.post("/tokenize", {"model": "tiny"} | body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def text(server: Running, ids: list[int]) -> str:
    return str(server.post("/detokenize", {"model": "tiny", "tokens": ids}).json()["prompt"])


def test_a_prompt_and_the_way_back(server: Running, engine: InferenceEngine) -> None:
    tokenizer = engine.tokenizer()
    found = tokens(server, prompt="What is 你好?", return_token_strs=True)
    assert found["tokens"] == tokenizer("What is 你好?")["input_ids"]
    assert found["token_strs"] == tokenizer.convert_ids_to_tokens(found["tokens"])
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), engine.context_limit)
    bare = tokens(server, prompt="What is 你好?", add_special_tokens=False)
    assert bare["tokens"] == found["tokens"][1:]
    assert bare["token_strs"] is None
    assert text(server, bare["tokens"]) == "What is 你好?"
    assert text(server, found["tokens"]).startswith(tokenizer.bos_token)
    assert tokens(server, prompt="")["tokens"] == tokenizer("")["input_ids"]
    assert text(server, []) == ""


@pytest.mark.parametrize("n_words", [1, 9000])
def test_a_conversation_is_counted_as_an_answer_counts_it(server: Running, n_words: int) -> None:
    """Longer ones than the model reads, too: that is what a client asks for."""
    messages = [USER | {"content": "word " * n_words}]
    found = tokens(server, messages=messages)
    if n_words == 1:
        assert server.chat(messages=messages).json()["usage"]["prompt_tokens"] == found["count"]
    else:
        assert found["count"] > found["max_model_len"]
        error = shaped(server.post("/v1/chat/completions", {"model": "tiny", "messages": messages}), 400)
        assert f"resulted in {found['count']} tokens" in error["message"]


def test_an_answer_that_is_begun(server: Running) -> None:
    messages = [USER, {"role": "assistant", "content": "It is"}]
    begun = tokens(server, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert text(server, begun["tokens"]).endswith("It is")
    usage = server.chat(messages=messages, continue_final_message=True).json()["usage"]
    assert begun["count"] == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({}, "prompt"), ({"prompt": "a", "messages": [USER]}, "prompt"), ({"prompt": 5}, "prompt"),
        ({"messages": []}, "prompt"), ({"messages": [5]}, "messages[0]"),
        ({"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ({"messages": [USER], "add_special_tokens": True}, "add_special_tokens"), ({"prompt": "a", "x": 1}, "x"),
        ({"messages": [USER], "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [USER], "chat_template_kwargs": {"depth": 1}}, "chat_template_kwargs.depth"),
        ({"messages": [USER, {"role": "assistant", "content": "Yes"}]}, "messages"),
        ({"prompt": "a", "model": "none"}, "model"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(server: Running, changes: dict[str, Any], param: str) -> None:
    status = 404 if "model" in changes else 400
    assert shaped(server.post("/tokenize", {"model": "tiny"} | changes), status)["param"] == param


@pytest.mark.parametrize("ids", [[10**6], [-1], [2**31], ["a"], [True], 5, None])
def test_ids_that_are_none(server: Running, ids: Any) -> None:
    param = str(shaped(server.post("/detokenize", {"model": "tiny", "tokens": ids}), 400)["param"])
    assert param.startswith("tokens")
