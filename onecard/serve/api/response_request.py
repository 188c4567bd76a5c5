"""A request to /v1/responses as the conversation that it is: its input, instructions and form of text.

Knows the fields of OpenAI's Responses API. It does not know answers or streams (`response_events.py`).
https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from onecard.inference.grammar import AnswerGrammar, json_grammar
from onecard.serve.api.answer_format import response_format
from onecard.serve.api.parameters import check_names
from onecard.serve.api.requests import GenerationParams, ServerDefaults, chat_ask, texts_of
from onecard.serve.api.schema import ChatRequest, Message, ResponseRequest
from onecard.serve.http_error import bad_request

ROLES = ("user", "system", "developer", "assistant")
TEXT_PARTS = ("input_text", "output_text", "text")
REASONING_PARTS = ("summary_text", "reasoning_text")
SAME_FIELDS = (
    "model", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "chat_template_kwargs"
)  # fmt: skip


def response_ask(body: ResponseRequest, defaults: ServerDefaults) -> GenerationParams:
    """What a request asks for. Raises ApiError naming the field that cannot be served."""
    check_names(body.model_extra or {}, ResponseRequest.model_fields)
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    chat = ChatRequest(
        messages=[*messages, *messages_of(body.input)],
        max_completion_tokens=body.max_output_tokens,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        **{name: getattr(body, name) for name in SAME_FIELDS},
    )
    ask = replace(chat_ask(chat, defaults), tokens_field="max_output_tokens", texts_field="input")
    form = body.text.format if body.text else None
    return ask if form is None else replace(ask, grammar=text_format(form))


def text_format(form: Any) -> AnswerGrammar | None:
    """What the text is held to; a schema stands beside the type here, and not one level deeper as in chat."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return json_grammar(form.get("schema"), "text.format.schema")
    return response_format(form, "text.format")


def messages_of(items: Any) -> list[Message]:
    """The messages of an input: a text, or items of which those of earlier thoughts belong to the answer behind them.

    Raises ApiError naming the item.
    """
    if isinstance(items, str):
        return [Message(role="user", content=items)]
    if not isinstance(items, list) or not items:
        raise bad_request("input is neither a text nor a list of messages", "input")
    messages, thought = [], ""
    for k, item in enumerate(items):
        place = f"input[{k}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            thought += texts_of(parts, f"{place}.content", REASONING_PARTS)
            continue
        if kind != "message":
            message = f"{place} is {str(kind)[:40]!r}; only messages and thoughts are supported; nothing is kept here"
            raise bad_request(message, f"{place}.type", "unsupported_parameter")
        if item.get("role") not in ROLES:
            raise bad_request(f"{place}.role is none of {', '.join(ROLES)}", f"{place}.role")
        text = texts_of(item.get("content"), f"{place}.content", TEXT_PARTS)
        own_thought = thought if item["role"] == "assistant" and thought else None
        messages.append(Message(role=item["role"], content=text, reasoning_content=own_thought))
        thought = "" if own_thought else thought
    if not messages:
        raise bad_request("input holds no message", "input")
    return messages
