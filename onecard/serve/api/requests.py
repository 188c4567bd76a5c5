"""From a client's JSON to what the engine is asked: every field is used, or refused by name; none is passed over.

Knows OpenAI's parameters and what they are here. It does not know answers, streams or sockets.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from onecard.config.inference import LimitOptions, SamplingOptions
from onecard.data.jinja_chat import is_own_variable
from onecard.data.messages import Role, Turn
from onecard.data.tool_answers import CallStyle
from onecard.data.tool_calls import calls_of
from onecard.data.values import UnusableRecord
from onecard.inference.engine import GenerationRequest
from onecard.inference.tool_grammar import HeldTools
from onecard.serve.api.answer_format import answer_grammar
from onecard.serve.api.parameters import CACHE_MARKS, check_message_names, check_names, is_number
from onecard.serve.api.schema import (
    LONGEST_STOP,
    MOST_BIAS,
    MOST_STOPS,
    TOOL_CHOICES,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Message,
    SamplingParameters,
)
from onecard.serve.http_error import ApiError, bad_request

Prompt = str | tuple[int, ...]
TOKEN_ID = re.compile("[0-9]{1,9}")
FIELD_NAME = re.compile(r"[a-z_][a-z0-9_]*")
SEED_MODULUS = 2**64  # seeds may be negative for OpenAI, but not for NumPy
FRESH_SEED_BITS = 48
# Arguments of `apply_chat_template`, which other servers refuse in chat_template_kwargs, too.
RENDERING = ("chat_template", "tokenize", "continue_final_message", "conversation", "return_dict", "return_tensors")

# Who alone may have such a field in a message.
OWNERS = {
    "tool_calls": "assistant",
    "reasoning_content": "assistant",
    "reasoning": "assistant",
    "tool_call_id": "tool",
}


@dataclass(frozen=True)
class ServerDefaults:
    """What holds where a request is silent: the server's own options."""

    sampling: SamplingOptions
    limits: LimitOptions
    system: str = ""


@dataclass(frozen=True)
class GenerationParams(GenerationRequest):
    """What the engine is asked, each conversation or prompt `n` times, with what the answer's form needs beside it.

    prompts: what is gone on with, one after another. max_new_tokens 0 asks for no answer at all, only for an echo; the
    client calls it `tokens_field`, and what it says `texts_field`. tools: those among the turns that the answer may
    call; `for_template` adds their calls to `grammar`. call_style and thought_mark: how calls and thoughts are told
    from the rest of an answer, as the template says.
    """

    prompts: tuple[Prompt, ...] = ()
    max_new_tokens: int = 1
    tokens_field: str = "max_tokens"
    texts_field: str = "messages"
    echo: bool = False
    tools: HeldTools | None = None
    call_style: CallStyle | None = None
    reasoning_effort: str | None = None
    splits_thoughts: bool = False
    thought_mark: str = ""
    stream: bool = False
    include_usage: bool = False

    @property
    def model(self) -> str:
        """As clients name the adapter."""
        return self.adapter

    @property
    def n_choices(self) -> int:
        return self.n * max(len(self.prompts), 1)


class JsonRequest(Request):
    """A request whose JSON is an object of real texts and numbers."""

    async def json(self) -> Any:
        """The body. Raises ApiError for everything that is no JSON object in UTF-8."""
        try:
            value = json.loads(await self.body(), parse_constant=no_constant)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as reason:
            text = "half a surrogate pair" if isinstance(reason, UnicodeEncodeError) else str(reason)
            raise bad_request(f"the body is not JSON: {text}", code="invalid_json") from None
        if not isinstance(value, dict):
            raise bad_request("the body is not a JSON object", code="invalid_json")
        return value


class JsonRoute(APIRoute):
    """A route that reads its body as `JsonRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_strict_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return with_strict_json


def no_constant(name: str) -> float:
    """Refuses NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(f"{name} is no number")


def chat_ask(body: ChatRequest, defaults: ServerDefaults) -> GenerationParams:
    """What a chat request asks for. Raises ApiError naming the field that cannot be served."""
    check_names(body.model_extra or {}, ChatRequest.model_fields)
    turns = tuple(turn_of(message, f"messages[{k}]") for k, message in enumerate(body.messages))
    if defaults.system and not any(turn.role == "system" for turn in turns):
        turns = (Turn("system", defaults.system), *turns)
    tools = tools_of(body)
    if tools:
        n_head = int(turns[0].role == "system")
        turns = (*turns[:n_head], Turn("tool_list", json.dumps(tools, ensure_ascii=False)), *turns[n_head:])
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs goes with logprobs: true", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_tokens is the old name of max_completion_tokens; they differ here", "max_tokens")
    tokens_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    ask = common_ask(body, defaults, getattr(body, tokens_field))
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    variables = template_variables(body.chat_template_kwargs or {})
    return replace(
        ask,
        turns=turns,
        template_variables=variables,
        tokens_field=tokens_field,
        top_logprobs=top_logprobs,
        continues_answer=continues_answer(body),
        tools=held_tools(body) if tools else None,
        reasoning_effort=body.reasoning_effort,
        splits_thoughts=body.reasoning_format != "none",
    )


def continues_answer(body: ChatRequest) -> bool:
    """Whether the last message is the beginning of the answer. Raises ApiError where it cannot be."""
    if not body.continue_final_message:
        if body.add_generation_prompt is False:
            message = "without a generation prompt there is only continue_final_message: true"
            raise bad_request(message, "add_generation_prompt")
        return False
    if body.add_generation_prompt:
        message = "continue_final_message goes with add_generation_prompt: false"
        raise bad_request(message, "add_generation_prompt")
    last = body.messages[-1]
    if last.role != "assistant" or last.tool_calls or not last.content:
        raise bad_request("to go on with it, the last message must be an assistant's text", "continue_final_message")
    return True


def biases(value: Any) -> Mapping[int, float]:
    """What is added to the scores of tokens: {"50": -100} -> {50: -100}. Raises ApiError."""
    found = {} if value in (None, []) else value
    if not isinstance(found, dict) or not all(
        TOKEN_ID.fullmatch(name) and is_number(bias) and abs(bias) <= MOST_BIAS for name, bias in found.items()
    ):
        message = f"logit_bias is no object of token ids with numbers of {-MOST_BIAS} to {MOST_BIAS}"
        raise bad_request(message, "logit_bias")
    return {int(name): bias for name, bias in found.items()}


def tools_of(body: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the model may call. Raises ApiError for a choice that nothing can make it keep to."""
    names = [tool.function.name for tool in body.tools or ()]
    choice = body.tool_choice
    if isinstance(choice, dict):
        if chosen_name(choice) not in names:
            message = '\'tool_choice\' is no {"type": "function", "function": {"name": one of the tools}}'
            raise bad_request(message, "tool_choice")
    elif choice not in (None, *TOOL_CHOICES):
        message = '\'tool_choice\' can be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
        raise bad_request(message, "tool_choice", "unsupported_parameter")
    if choice == "required" and not names:
        raise bad_request("'tool_choice' \"required\" goes with tools", "tool_choice")
    wanted = body.tools if body.tools and body.tool_choice != "none" else []
    return [tool.model_dump(exclude_unset=True, exclude_none=True) for tool in wanted]


def chosen_name(choice: Mapping[str, Any]) -> str | None:
    """The tool that must be called, None for what is no choice of one."""
    function = choice.get("function") if choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def held_tools(body: ChatRequest) -> HeldTools:
    """The tools with what holds an answer to them."""
    must_call = body.tool_choice not in (None, "auto")
    name = chosen_name(body.tool_choice) if isinstance(body.tool_choice, dict) else None
    tools = {f"tools[{k}].function": tool.function for k, tool in enumerate(body.tools or ())}
    callable_ = {place: tool for place, tool in tools.items() if name in (None, tool.name)}
    return HeldTools(
        [tool.model_dump(exclude_none=True) for tool in callable_.values()],
        list(callable_),
        must_call,
        1 if body.parallel_tool_calls is False or name else None,
    )


def template_variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a client sets for the prompt template. Raises ApiError for what only the server may set."""
    for name in variables:
        if is_own_variable(name) or name in RENDERING:
            message = f"{name!r} is set by the server; chat_template_kwargs are for a template's own variables"
            raise bad_request(message, f"chat_template_kwargs.{name}")
    return variables


def completion_ask(body: CompletionRequest, defaults: ServerDefaults) -> GenerationParams:
    """What a completion request asks for. Raises ApiError naming the field that cannot be served."""
    check_names(body.model_extra or {}, CompletionRequest.model_fields)
    prompts = prompts_of(body.prompt, "prompt")
    ask = common_ask(body, defaults, body.max_tokens)
    if len(prompts) * ask.n > defaults.limits.max_choices:
        message = f"{len(prompts)} prompts with n = {ask.n} are more than {defaults.limits.max_choices} (--max_choices)"
        raise bad_request(message, "prompt")
    return replace(ask, prompts=prompts, echo=bool(body.echo), top_logprobs=body.logprobs)


def embedding_texts(body: EmbeddingRequest, limits: LimitOptions) -> tuple[Prompt, ...]:
    """The texts or token ids to embed. Raises ApiError naming the field that cannot be served."""
    check_names(body.model_extra or {}, EmbeddingRequest.model_fields)
    texts = prompts_of(body.input, "input")
    most = limits.max_embedding_inputs
    if len(texts) > most:
        raise bad_request(f"{len(texts)} texts are more than {most} (--max_embedding_inputs); send fewer", "input")
    return texts


def common_ask(body: SamplingParameters, defaults: ServerDefaults, max_new_tokens: int | None) -> GenerationParams:
    """The part that chat and completions share."""
    if max_new_tokens is None:
        max_new_tokens = min(defaults.sampling.max_new_tokens, defaults.limits.max_answer_tokens)
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "num_beams", "no_repeat_ngram_size")
    typed = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if body.top_k == -1:  # vLLM's word for all tokens, as seed -1 is its and llama.cpp's for a fresh one
        typed["top_k"] = 0
    own_least = min(defaults.sampling.min_new_tokens, max_new_tokens)
    sampling = replace(
        defaults.sampling,
        max_new_tokens=max(max_new_tokens, 1),
        min_new_tokens=own_least if body.min_tokens is None else body.min_tokens,
        stop=[*defaults.sampling.stop, *stop_texts(body.stop)],
        seed=secrets.randbits(FRESH_SEED_BITS) if body.seed in (None, -1) else body.seed % SEED_MODULUS,
        **typed,
    )
    options = body.stream_options
    return GenerationParams(
        adapter=body.model,
        sampling=sampling,
        n=body.n or 1,
        max_new_tokens=max_new_tokens,
        logit_bias=biases(body.logit_bias),
        grammar=answer_grammar(body),
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
    )


def turn_of(message: Message, place: str) -> Turn:
    """A message as a turn; a developer's message is a system's. `place` is such as messages[0]."""
    check_message_names(message.model_extra or {}, place)
    role: Role = "system" if message.role == "developer" else message.role
    for name, owner in OWNERS.items():
        if getattr(message, name) not in (None, [], "") and role != owner:
            raise bad_request(f"only a message of the role {owner} has {name}", f"{place}.{name}")
    is_empty = role == "assistant" and message.content in (None, [])
    content = "" if is_empty else content_text(message.content, f"{place}.content")
    try:
        calls = calls_of([call.model_dump() for call in message.tool_calls or ()], "tool_calls")
    except UnusableRecord as reason:
        raise bad_request(str(reason), f"{place}.tool_calls") from None
    return Turn(
        role,
        content,
        name=message.name or "",
        thought=message.reasoning_content or message.reasoning or "",
        tool_calls=calls,
        call_id=message.tool_call_id or "",
    )


def content_text(content: Any, place: str) -> str:
    """The text of a message's content: a text, or text parts, perhaps with a mark for some cache."""
    text = texts_of(content, place, ("text",))
    if content == []:
        raise bad_request(f"{place} is neither a text nor a list of text parts", place)
    names = [(k, *pair) for k, part in enumerate(content if isinstance(content, list) else ()) for pair in part.items()]
    for k, name, value in names:
        if name not in ("type", "text") and value is not None and not (name in CACHE_MARKS and isinstance(value, dict)):
            message = f"{name!r} of a text part is not supported"
            raise bad_request(message, f"{place}[{k}].{name}", "unsupported_parameter")
    return text


def texts_of(content: Any, place: str, kinds: Sequence[str]) -> str:
    """The text of a content: a text, or parts of these kinds one after another: {"type": "text", "text": "Hi"}."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{place} is neither a text nor a list of text parts", place)
    for k, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            message = f"only text parts are supported, this one is {str(kind)[:40]!r}"
            raise bad_request(message, f"{place}[{k}].type", "unsupported_parameter")
        if not isinstance(part.get("text"), str):
            raise bad_request("a text part needs a text", f"{place}[{k}].text")
    return "".join(part["text"] for part in content)


def prompts_of(value: Any, param: str) -> tuple[Prompt, ...]:
    """The prompts in any of OpenAI's four forms: "a", ["a", "b"], [1, 2], [[1, 2], [3]]."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(text, str) for text in value):
            return tuple(value)
        if is_token_ids(value):
            return (tuple(value),)
        if all(isinstance(ids, list) and ids and is_token_ids(ids) for ids in value):
            return tuple(tuple(ids) for ids in value)
    raise bad_request(f"{param} is neither a text, texts, token ids nor lists of token ids", param)


def is_token_ids(values: Sequence[Any]) -> bool:
    """True for whole numbers that could be ids of some vocabulary."""
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


def stop_texts(value: Any) -> list[str]:
    """The stop texts of a request: none, one, or a list."""
    texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise bad_request("stop is neither a text nor a list of texts", "stop")
    if len(texts) > MOST_STOPS or any(not 1 <= len(text) <= LONGEST_STOP for text in texts):
        raise bad_request(f"stop takes up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters", "stop")
    return texts


def validation_error(reason: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, as OpenAI tells it."""
    first: Mapping[str, Any] = next(iter(reason.errors()), {})
    place = [part for part in first.get("loc", ()) if part != "body"]
    param = ""
    for part in place:
        if isinstance(part, int):
            param += f"[{part}]"
        elif FIELD_NAME.fullmatch(part):
            param += f".{part}" if param else part
    if not place:
        return bad_request("a JSON object is needed, with `Content-Type: application/json`", code="invalid_json")
    return bad_request(f"{param}: {first.get('msg', 'is not valid')}", param)
