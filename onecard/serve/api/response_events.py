"""The shapes of a response, whole and as named events. Joined deltas equal the whole.

Knows the field names of OpenAI's Responses API. It does not know threads, sockets or requests' checks.
https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from onecard.serve.api.logprobs import TokenTexts
from onecard.serve.api.requests import GenerationParams
from onecard.serve.api.responses import ChatResponseBuilder, path_of
from onecard.serve.api.schema import ResponseRequest
from onecard.serve.api.stream import comment, event, waiting_for
from onecard.serve.api.work import Progress
from onecard.serve.http_error import ApiError


class ResponseBuilder:
    """The object `response`: what was thought, where something was, and a message."""

    def __init__(self, ask: GenerationParams, body: ResponseRequest, texts: TokenTexts, tokenizer: Any) -> None:
        self.ask, self._tokenizer = ask, tokenizer
        self._chat = ChatResponseBuilder(ask, {}, texts)
        self._ids = {kind: f"{kind}_{secrets.token_hex(24)}" for kind in ("resp", "rs", "msg")}
        asked = body.model_dump(exclude_none=True)
        self._head = {
            "id": self._ids["resp"], "object": "response", "created_at": int(time.time()), "model": ask.model,
            "error": None, "instructions": body.instructions, "metadata": body.metadata or {},
            "max_output_tokens": body.max_output_tokens, "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p, "text": {"format": {"type": "text"}} | asked.get("text", {}),
            "reasoning": {"effort": None, "summary": None} | asked.get("reasoning", {}),
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "truncation": "disabled",
            "previous_response_id": None, "store": False, "background": False, "user": body.user,
        }  # fmt: skip

    def said(self, progress: Progress) -> tuple[str, str]:
        """What was thought so far, and what was said."""
        parts = self._chat.parts(progress, 0)
        return parts.thought, parts.content

    def begun(self) -> dict[str, Any]:
        """The response before its first token."""
        return self._head | {"status": "in_progress", "incomplete_details": None, "output": [], "usage": None}

    def whole(self, progress: Progress) -> dict[str, Any]:
        """The response at its end."""
        thought, text = self.said(progress)
        is_cut = self._chat.reason(progress, 0) == "length"
        items = [self.thought_item(thought, "completed")] if thought else []
        usage = progress.usage(1)
        n_thought = len(self._tokenizer(thought, add_special_tokens=False)["input_ids"]) if thought else 0
        return (
            self._head
            | {
                "status": "incomplete" if is_cut else "completed",
                "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
                "output": [*items, self.message_item(text, "incomplete" if is_cut else "completed")],
                "usage": {
                    "input_tokens": usage["prompt_tokens"],
                    "input_tokens_details": usage["prompt_tokens_details"],
                    "output_tokens": usage["completion_tokens"],
                    "output_tokens_details": {"reasoning_tokens": n_thought},
                    "total_tokens": usage["total_tokens"],
                },
            }
            | path_of(progress)
        )

    def thought_item(self, text: str | None, status: str) -> dict[str, Any]:
        """What was thought; None for the item that is begun."""
        content = [] if text is None else [reasoning_part(text)]
        return {"id": self._ids["rs"], "type": "reasoning", "summary": [], "content": content, "status": status}

    def message_item(self, text: str | None, status: str) -> dict[str, Any]:
        """What is said; None for the item that is begun."""
        content = [] if text is None else [text_part(text)]
        return {
            "id": self._ids["msg"], "type": "message", "role": "assistant", "status": status, "content": content
        }  # fmt: skip


class ResponseEvents:
    """The named events of one response, numbered. Beams rewrite themselves, so that their text comes at the end."""

    n = 1

    def __init__(self, form: ResponseBuilder) -> None:
        self._form = form
        self._rewrites = form.ask.sampling.num_beams > 1
        self._number = self._place = self._told_place = 0
        self._open = ""  # the item that is being written: reasoning, message
        self._sent = {"reasoning": "", "message": ""}

    def opening(self) -> list[bytes]:
        """The response is there, and is being worked on."""
        return [self._event(f"response.{name}", response=self._form.begun()) for name in ("created", "in_progress")]

    def pieces(self, progress: Progress) -> list[bytes]:
        """What is new in this snapshot."""
        found = []
        if progress.place and progress.place != self._told_place:
            found.append(comment(waiting_for(progress)))
        self._told_place = progress.place
        return found if self._rewrites else [*found, *self._new(progress)]

    def ending(self, progress: Progress) -> list[bytes]:
        """The rest, the ends of what was begun, and the whole response."""
        found = self._new(progress)
        whole = self._form.whole(progress)
        if self._open != "message":
            found += self._begin("message")
        found += self._end(whole["output"][-1])
        return [*found, self._event(f"response.{whole['status']}", response=whole)]

    def failing(self, error: ApiError) -> bytes:
        """The event of an error."""
        told = error.body["error"]
        return self._event("error", **{name: told[name] for name in ("code", "message", "param")})

    def _new(self, progress: Progress) -> list[bytes]:
        found: list[bytes] = []
        for kind, text in zip(("reasoning", "message"), self._form.said(progress), strict=True):
            sent = self._sent[kind]
            if len(text) == len(sent):
                continue
            if not text.startswith(sent):
                raise ApiError(500, "the answer changed after it was sent", code="internal_error")
            if self._open != kind:
                found += self._begin(kind)
            name = "response.reasoning_text.delta" if kind == "reasoning" else "response.output_text.delta"
            more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
            found.append(self._event(name, **self._where(kind), delta=text[len(sent) :], **more))
            self._sent[kind] = text
        return found

    def _begin(self, kind: str) -> list[bytes]:
        """The events before an item's text, behind the end of the item before it."""
        found = self._end(self._form.thought_item(self._sent["reasoning"], "completed")) if self._open else []
        self._open = kind
        item = self._item(kind)(None, "in_progress")
        part = reasoning_part("") if kind == "reasoning" else text_part("")
        return [
            *found,
            self._event("response.output_item.added", output_index=self._place, item=item),
            self._event("response.content_part.added", **self._where(kind), part=part),
        ]

    def _end(self, item: dict[str, Any]) -> list[bytes]:
        """The events behind the text of a whole item."""
        kind, part, where = item["type"], item["content"][0], self._where(item["type"])
        name = "response.reasoning_text.done" if kind == "reasoning" else "response.output_text.done"
        more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        found = [
            self._event(name, **where, text=part["text"], **more),
            self._event("response.content_part.done", **where, part=part),
            self._event("response.output_item.done", output_index=self._place, item=item),
        ]
        self._place += 1
        return found

    def _item(self, kind: str) -> Any:
        return self._form.thought_item if kind == "reasoning" else self._form.message_item

    def _where(self, kind: str) -> dict[str, Any]:
        item_id = self._item(kind)(None, "")["id"]
        return {"item_id": item_id, "output_index": self._place, "content_index": 0}

    def _event(self, name: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1, **fields}, name)


def text_part(text: str) -> dict[str, Any]:
    """What is said."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def reasoning_part(text: str) -> dict[str, Any]:
    """What is thought."""
    return {"type": "reasoning_text", "text": text}
