"""What a Python client gets from a server: python python_calls.py CLIENT URL MODEL; CLIENT: openai, litellm, langchain.

Prints a JSON object: the client's version, and each call that was made with what came of it. Runs in the client's own
environment, so it imports nothing of the kit.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds 1.", "parameters": PARAMETERS}}]
SCHEMA = {"type": "object", "properties": {"ok": {"enum": ["yes", "no"]}}, "required": ["ok"],
          "additionalProperties": False}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
SHORT: dict[str, Any] = {"max_tokens": 16, "temperature": 0}
LONG: dict[str, Any] = {"max_tokens": 200, "temperature": 0}
Calls = dict[str, Callable[[], bool]]


def is_call(name: str, arguments: str | dict[str, Any]) -> bool:
    """Whether this is a call of `add` with an integer."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return name == "add" and isinstance(given["x"], int)


def is_answer(text: str | None) -> bool:
    """Whether this is JSON of the schema."""
    return json.loads(text or "")["ok"] in ("yes", "no")


def joined(chunks: Any) -> str:
    """The text of streamed chat chunks."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def chat_calls(create: Callable[..., Any]) -> Calls:
    """The calls of chat that OpenAI's client and litellm share."""

    def tools(**more: Any) -> Any:
        return create(messages=MESSAGES, tools=TOOLS, tool_choice="required", **LONG, **more)

    def called(answer: Any) -> bool:
        call = answer.choices[0].message.tool_calls[0].function
        return is_call(call.name, call.arguments)

    def streamed() -> bool:
        calls = [call.function for chunk in tools(stream=True) if chunk.choices
                 for call in chunk.choices[0].delta.tool_calls or ()]  # fmt: skip
        return is_call("".join(one.name or "" for one in calls), "".join(one.arguments or "" for one in calls))

    def answered() -> bool:
        message = tools().choices[0].message
        told = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}
        turns = [*MESSAGES, message.model_dump(exclude_none=True), told]
        return len(create(messages=turns, tools=TOOLS, **SHORT).choices) == 1

    return {
        "chat": lambda: create(messages=MESSAGES, **SHORT).usage.completion_tokens > 0,
        "chat streamed": lambda: (
            joined(create(messages=MESSAGES, stream=True, **SHORT))
            == create(messages=MESSAGES, **SHORT).choices[0].message.content
        ),
        "tools": lambda: called(tools()),
        "tools streamed": streamed,
        "tools, the answer of one": answered,
        "json_schema": lambda: is_answer(
            create(messages=MESSAGES, response_format=FORM, **LONG).choices[0].message.content
        ),
        "log-probabilities": lambda: (
            len(create(messages=MESSAGES, logprobs=True, top_logprobs=2, **SHORT).choices[0].logprobs.content) > 0
        ),
    }


def openai_calls(url: str, model: str) -> Calls:
    import openai

    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def responses() -> bool:
        asked: dict[str, Any] = {"model": model, "input": "Hi", "max_output_tokens": 8, "temperature": 0}
        events = client.responses.create(**asked, stream=True)
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        return bool(text) and text == client.responses.create(**asked).output_text

    def unknown() -> bool:
        try:
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        except openai.NotFoundError as error:
            return error.code == "model_not_found"
        return False

    text = {"model": model, "prompt": "Hi", "max_tokens": 4, "temperature": 0}
    return {
        "models": lambda: model in [one.id for one in client.models.list()],
        **chat_calls(lambda **asked: client.chat.completions.create(model=model, **asked)),
        "completions": lambda: (
            client.completions.create(**text).choices[0].text
            == "".join(one.choices[0].text for one in client.completions.create(**text, stream=True))
        ),
        "embeddings": lambda: len(client.embeddings.create(model=model, input=["a", "b"]).data) == 2,
        "responses": responses,
        "error of an unknown model": unknown,
    }


def litellm_calls(url: str, model: str) -> Calls:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would be fetched
    import litellm

    at: dict[str, Any] = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none"}

    def unknown() -> bool:
        try:
            litellm.completion(**at | {"model": "openai/gpt-4"}, messages=MESSAGES)
        except litellm.NotFoundError:
            return True
        return False

    def too_long() -> bool:
        try:
            litellm.completion(**at, messages=[{"role": "user", "content": "word " * 9000}])
        except litellm.ContextWindowExceededError:
            return True
        return False

    return {
        **chat_calls(lambda **asked: litellm.completion(**at, **asked)),
        "completions": lambda: bool(litellm.text_completion(**at, prompt="Hi", max_tokens=4).choices[0].text),
        "embeddings": lambda: len(litellm.embedding(**at, input=["a", "b"], encoding_format="float").data) == 2,
        "responses": lambda: bool(litellm.responses(**at, input="Hi", max_output_tokens=8).output),
        "error of an unknown model": unknown,
        "error of a prompt that is too long": too_long,
    }


def langchain_calls(url: str, model: str) -> Calls:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    common: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "max_retries": 0}
    chat = ChatOpenAI(**common | LONG)

    @tool
    def add(x: int) -> int:
        """Adds 1."""
        return x + 1

    def called(message: Any) -> bool:
        return is_call(message.tool_calls[0]["name"], message.tool_calls[0]["args"])

    bound = chat.bind_tools(
        [add], tool_choice="required", strict=True
    )  # a small model would go on with keys of its own

    def answered() -> bool:
        called = bound.invoke("你好")
        told = ToolMessage(str(add.invoke(called.tool_calls[0]["args"])), tool_call_id=called.tool_calls[0]["id"])
        again = chat.bind_tools([add], tool_choice="none", strict=True)
        return again.invoke([HumanMessage("你好"), called, told]).response_metadata["finish_reason"] is not None

    def streamed() -> bool:
        whole: Any = None
        for piece in bound.stream("你好"):
            whole = piece if whole is None else whole + piece
        return called(whole)

    answer: dict[str, Any] = SCHEMA | {"title": "answer", "description": "An answer."}
    parsed: Any = chat.with_structured_output(answer, method="json_schema")
    return {
        "chat": lambda: bool(chat.invoke("你好").content),
        "chat streamed": lambda: "".join(str(one.content) for one in chat.stream("你好"))
        == chat.invoke("你好").content,
        "tools": lambda: called(bound.invoke("你好")),
        "tools streamed": streamed,
        "tools, the answer of one": answered,
        "json_schema": lambda: parsed.invoke("你好")["ok"] in ("yes", "no"),
        "completions": lambda: bool(OpenAI(**common, max_tokens=4).invoke("Hi")),
        "embeddings": lambda: len(OpenAIEmbeddings(**common, check_embedding_ctx_length=False)
                                  .embed_documents(["a", "b"])) == 2,
        "responses": lambda: bool(ChatOpenAI(**common | {"use_responses_api": True}).invoke("Hi").content),
    }  # fmt: skip


CLIENTS = {"openai": ("openai", openai_calls), "litellm": ("litellm", litellm_calls),
           "langchain": ("langchain-openai", langchain_calls)}  # fmt: skip


def main(client: str, url: str, model: str) -> None:
    package, calls_of = CLIENTS[client]
    found = {}
    for name, call in calls_of(url, model).items():
        try:
            found[name] = "ok" if call() else "another answer than expected"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    sys.stdout.write(json.dumps({"version": version(package), "calls": found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
