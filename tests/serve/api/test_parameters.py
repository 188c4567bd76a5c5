"""Every parameter that a client may send: used, accepted where it changes nothing, or refused by name."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from onecard.config.inference import LimitOptions
from onecard.data.chat_template import Template
from onecard.data.messages import Turn
from onecard.inference import embeddings as reading
from onecard.inference.engine import InferenceEngine
from onecard.serve.api.parameters import CACHE_MARKS, NEUTRAL, NEUTRAL_IN_MESSAGE, WITHOUT_EFFECT
from onecard.serve.api.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Message,
    ResponseRequest,
    ServiceParameters,
)
from tests.serve.api.serving import Running
from tests.serve.api.test_errors import BODIES, shaped

# Values by which a client says that it wants something.
WANTED: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "a"}, "best_of": 3, "dimensions": 10, "frequency_penalty": 0.5,
    "function_call": {"name": "f"}, "functions": [{"name": "f"}], "logit_bias": {"5": 1},
    "modalities": ["text", "audio"], "moderation": {"model": "m"}, "parallel_tool_calls": "yes",
    "prediction": {"type": "content"}, "presence_penalty": -1, "reasoning_effort": "high",
    "response_format": {"type": "json_object"}, "suffix": "end", "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}], "top_logprobs": 3, "verbosity": "low",
    "web_search_options": {},
    "access_programs": [{}], "background": True, "background_options": {"a": 1}, "context_management": [{"type": "a"}],
    "conversation": "c", "image": {}, "include": ["message.output_text.logprobs"],
    "max_tool_calls": 1, "previous_response_id": "resp_1", "truncation": "auto",
    "add_generation_prompt": False, "add_special_tokens": True, "allowed_token_ids": [5], "bad_words": ["x"],
    "chat_template": "{{ messages }}", "chat_template_kwargs": {"enable_thinking": False},
    "continue_final_message": True, "documents": [{"title": "a", "text": "b"}], "ec_transfer_params": {},
    "echo": True, "guided_choice": ["a"], "guided_grammar": "g", "guided_json": {}, "guided_regex": "a",
    "ignore_eos": True, "include_reasoning": False, "include_stop_str_in_output": True, "kv_transfer_params": {},
    "length_penalty": 2.0, "logits_processors": ["x"], "media_io_kwargs": {"a": {}}, "min_p": 0.05,
    "mm_processor_kwargs": {"a": 1}, "normalize": False, "priority": 1, "prompt_logprobs": 0,
    "repetition_detection": {}, "return_assistant_tokens_mask": True, "return_prompt_text": True,
    "return_token_ids": True, "return_token_offsets": True, "return_tokens_as_token_ids": True,
    "skip_special_tokens": False, "spaces_between_special_tokens": False, "stop_token_ids": [5],
    "structured_outputs": {}, "thinking_token_budget": 5, "truncate_prompt_tokens": -1, "truncation_side": "left",
    "use_beam_search": True, "vllm_xargs": {"a": 1},
    "adaptive_target": 0.5, "dry_multiplier": 0.8, "dynatemp_range": 0.5, "grammar": "root ::= x", "id_slot": 0,
    "json_schema": {}, "lora": [{"id": 0, "scale": 0.5}], "min_keep": 1, "mirostat": 2, "n_discard": 5,
    "n_indent": 2, "n_keep": 5, "n_predict": 5, "n_probs": 3, "penalize_nl": True, "post_sampling_probs": True,
    "reasoning_format": "deepseek", "repeat_last_n": 64, "repeat_penalty": 1.1, "return_progress": True,
    "return_tokens": True, "samplers": ["top_k"], "tfs_z": 0.9, "timings_per_token": True, "top_a": 0.1,
    "top_n_sigma": 1, "typical_p": 0.9, "xtc_probability": 0.5,
}  # fmt: skip
# Values that are taken and change nothing.
TAKEN: dict[str, Any] = {
    "user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "store": True, "service_tier": "priority",
    "prompt_cache_key": "k", "prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h",
    "cache_control": {"type": "ephemeral"}, "cache_prompt": True, "cache_salt": "x", "request_id": "r",
} | dict.fromkeys(WITHOUT_EFFECT, 1.75)  # fmt: skip
# Fields of this server's with values by which a client says that it does not need them.
OFF: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1), "top_p": (1,), "repetition_penalty": (1,), "num_beams": (1,), "no_repeat_ngram_size": (0,),
    "min_tokens": (0,), "logit_bias": ({}, []), "n": (1,), "stop": ("", []), "stream": (False,), "seed": (5,),
    "stream_options": ({}, {"include_usage": True}, {"include_usage": False, "include_obfuscation": False}),
    "response_format": ({"type": "text"},), "structured_outputs": ({}, {"regex": None, "json_object": False}),
    "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,), "guided_grammar": (None,),
    "json_schema": (None,), "grammar": ("",),
}  # fmt: skip
CHAT_OFF: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"x": None}),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "reasoning_effort": ("none",),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "reasoning_format": ("none", "auto"),
}
OF_RESPONSES = ("top_p", "top_k", "seed", "stop", "stream", "stream_options")
# What changes an answer, each with a test in test_chat.py, test_tools.py, test_formats.py, test_reasoning.py,
# test_completions.py or test_responses.py.
USED = {"max_tokens", "temperature", *OFF}
CALLS = [
    ("/v1/chat/completions", chat_create_params.CompletionCreateParamsBase, ChatRequest,
     USED | {"messages", "max_completion_tokens", *CHAT_OFF},
     OFF | CHAT_OFF),
    ("/v1/completions", completion_create_params.CompletionCreateParamsBase, CompletionRequest,
     USED | {"prompt", "logprobs", "echo"}, OFF | {"echo": (False,)}),
    ("/v1/responses", response_create_params.ResponseCreateParamsBase, ResponseRequest,
     {"input", "instructions", "prompt", "max_output_tokens", "temperature", "text", "reasoning",
      "chat_template_kwargs", *OF_RESPONSES}, {name: OFF[name] for name in OF_RESPONSES}),
    ("/v1/embeddings", embedding_create_params.EmbeddingCreateParams, EmbeddingRequest,
     {"input", "encoding_format"}, {"encoding_format": ("float",)}),
]  # fmt: skip
EVERY_CALL = pytest.mark.parametrize(
    ("path", "spec", "model", "used", "off"), CALLS, ids=[call[0].removeprefix("/v1/") for call in CALLS]
)


def result(server: Running, path: str, body: dict[str, Any]) -> Any:
    """What is answered, without ids and times."""
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if path == "/v1/responses":
        return [item["content"] for item in found["output"]], found["usage"]["output_tokens"]
    return found.get("choices") or found["data"]


def test_the_tables_are_whole() -> None:
    assert WANTED.keys() == NEUTRAL.keys()
    assert TAKEN.keys() == {*ServiceParameters.model_fields, *WITHOUT_EFFECT} - {"model"}


@EVERY_CALL
def test_every_parameter_is_used_or_refused_and_none_passed_over(
    server: Running, path: str, spec: Any, model: Any, used: set[str], off: dict[str, Any]
) -> None:
    names = set(spec.__annotations__)
    assert len(names) >= 5
    assert names - {"stream"} <= model.model_fields.keys() | NEUTRAL.keys(), "OpenAI has new ones: use or refuse them"
    assert model.model_fields.keys() == used | ServiceParameters.model_fields.keys()
    with server.client() as client:
        for name in sorted(NEUTRAL.keys() - used):
            error = shaped(client.post(path, json=BODIES[path] | {name: WANTED[name]}), 400)
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
            assert repr(name) in error["message"]


@EVERY_CALL
def test_what_asks_for_nothing_is_accepted_and_changes_nothing(
    server: Running, path: str, spec: Any, model: Any, used: set[str], off: dict[str, Any]
) -> None:
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = BODIES[path] if path == "/v1/embeddings" else BODIES[path] | {"temperature": 0, limit: 6}
    plain = result(server, path, body)
    table = off | {name: values for name, values in NEUTRAL.items() if name not in used}
    for k in range(max(map(len, table.values()))):
        # All at once: a value that the server did not take would be told by its name.
        neutral = {name: values[min(k, len(values) - 1)] for name, values in table.items()}
        assert result(server, path, body | neutral) == plain
    assert result(server, path, body | TAKEN) == plain
    assert result(server, path, body | dict.fromkeys({*TAKEN, *NEUTRAL, *off}, None)) == plain


def test_numbers_and_truth_values_are_told_apart(server: Running) -> None:
    body = BODIES["/v1/chat/completions"]
    for name, value in (("min_p", False), ("repeat_penalty", True), ("ignore_eos", 0), ("parallel_tool_calls", 1),
                        ("dry_base", True), ("xtc_threshold", "0.1")):  # fmt: skip
        assert shaped(server.post("/v1/chat/completions", body | {name: value}), 400)["param"] == name


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [("n_predict", 5, "max_tokens"), ("max_new_tokens", 5, "max_tokens"), ("repeat_penalty", 1.1, "repetition_penalty"),
     ("use_beam_search", True, "num_beams"), ("min_new_tokens", 1, "min_tokens"), ("max_length", 9, "max_tokens")],
)  # fmt: skip
def test_other_programs_names_are_told_with_ours(server: Running, name: str, value: Any, ours: str) -> None:
    error = shaped(server.post("/v1/chat/completions", BODIES["/v1/chat/completions"] | {name: value}), 400)
    assert error["message"].endswith(f"here it is called {ours}")


MESSAGES = {
    "system": ChatCompletionSystemMessageParam, "developer": ChatCompletionDeveloperMessageParam,
    "user": ChatCompletionUserMessageParam, "assistant": ChatCompletionAssistantMessageParam,
}  # fmt: skip


KNOWN_IN_MESSAGE = Message.model_fields.keys() | NEUTRAL_IN_MESSAGE.keys()


def test_every_field_of_a_message_is_used_or_refused(server: Running) -> None:
    assert ChatCompletionToolMessageParam.__annotations__.keys() <= KNOWN_IN_MESSAGE  # its own tests: test_tools.py
    path, user = "/v1/chat/completions", {"role": "user", "content": "Hi"}
    body = BODIES[path] | {"temperature": 0, "max_tokens": 6}
    for role, spec in MESSAGES.items():
        assert spec.__annotations__.keys() <= KNOWN_IN_MESSAGE
        messages = [{"role": role, "content": "Yes"}, user] if role != "user" else [user]
        if role == "assistant":
            messages = [user, *messages]
        plain = result(server, path, body | {"messages": messages})
        for k in range(2):
            neutral = {name: values[min(k, len(values) - 1)] for name, values in NEUTRAL_IN_MESSAGE.items()}
            marked = neutral | {"name": "Ann", "cache_control": {"type": "ephemeral"}}
            assert result(server, path, body | {"messages": [one | marked for one in messages]}) == plain
        for name in NEUTRAL_IN_MESSAGE:
            wrong = [messages[0] | {name: [{"x": 1}]}, *messages[1:]]
            assert shaped(server.post(path, body | {"messages": wrong}), 400)["param"] == f"messages[0].{name}"


def test_marks_for_caches_at_a_text_part_change_nothing(server: Running) -> None:
    path = "/v1/chat/completions"
    body = BODIES[path] | {"temperature": 0, "max_tokens": 6}
    assert ChatCompletionContentPartTextParam.__annotations__.keys() == {"type", "text", "prompt_cache_breakpoint"}
    for name in (*CACHE_MARKS, "annotations"):
        mark = {"type": "ephemeral"} if name in CACHE_MARKS else None
        content = [{"type": "text", "text": "Hi", name: mark}]
        marked = result(server, path, body | {"messages": [{"role": "user", "content": content}]})
        assert marked == result(server, path, body)


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": []}, {"content": ""}])
def test_an_assistants_message_may_be_without_content(server: Running, message: dict[str, Any]) -> None:
    user = {"role": "user", "content": "Hi"}
    path = "/v1/chat/completions"
    body = BODIES[path] | {"temperature": 0, "max_tokens": 6}
    empty = result(server, path, body | {"messages": [user, {"role": "assistant"} | message, user]})
    assert empty == result(server, path, body | {"messages": [user, {"role": "assistant", "content": ""}, user]})
    assert empty != result(server, path, body | {"messages": [user, {"role": "assistant", "content": "x"}, user]})


def test_a_name_reaches_the_templates_that_read_it() -> None:
    turns = (Turn("user", "Hi", name="Ann"), Turn("user", "Hi"))
    own = Template("own", "{% for m in messages %}{{ m.name or m.role }}: {{ m.content }};{% endfor %}")
    text = own.render(own.messages(turns), special_tokens={}, add_generation_prompt=True)
    assert text == "Ann: Hi;user: Hi;"


def embedded(server: Running, texts: Any, **changes: Any) -> list[Any]:
    return [one["embedding"] for one in result(server, "/v1/embeddings", {"model": "tiny", "input": texts} | changes)]


def test_embeddings_of_as_many_texts_as_clients_send(server: Running) -> None:
    texts = [f"{k % 97}" + "a" * (k % 5) for k in range(2048)]
    vectors = embedded(server, texts, encoding_format="base64")
    assert len(vectors) == 2048
    for k in (0, 96, 97, 2047):
        (alone,) = embedded(server, texts[k])
        assert list(struct.unpack(f"<{len(alone)}f", base64.b64decode(vectors[k]))) == pytest.approx(alone, abs=1e-5)


def test_as_many_long_texts_as_clients_send_go_into_one_request() -> None:
    texts = {"model": "tiny", "input": ["\u957f" * 1000] * 2048}
    assert len(json.dumps(texts, ensure_ascii=False).encode()) < LimitOptions().max_body_bytes


def test_embeddings_in_batches_are_those_of_each_text_alone(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[1, *range(5, 5 + n)] for n in (3, 40, 1, 300, 3, 7, 120, 255, 2)]
    sizes: list[tuple[int, int]] = []
    model = engine._adapters.model
    handle = model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        together = engine.embed(prompts)
        n_calls = len(sizes)
        monkeypatch.setattr(reading, "go_together", lambda model, lengths: False)  # as for the families that cannot
        alone = engine.embed(prompts)
    finally:
        handle.remove()
    assert all(rows * longest <= reading.PIECE_TOKENS for rows, longest in sizes)
    assert n_calls < len(prompts) < len(sizes) - n_calls
    for one, other in zip(together, alone, strict=True):
        assert list(one) == pytest.approx(list(other), abs=1e-5)
