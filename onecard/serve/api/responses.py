"""The two shapes of an answer, chat and completion, whole and in pieces. Joined pieces equal the whole.

Knows OpenAI's field names. It does not know threads, sockets or how pieces are sent (`stream.py`).
"""

from __future__ import annotations

import base64
import json
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from onecard.data.messages import ToolCall
from onecard.data.thoughts import read_thought
from onecard.data.tool_answers import read_calls
from onecard.serve.api.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from onecard.serve.api.requests import GenerationParams
from onecard.serve.api.schema import EmbeddingRequest
from onecard.serve.api.work import Echo, EmbeddingsResult, Progress


@dataclass
class SentSoFar:
    """What of one choice has been sent already."""

    text: str = ""
    n_tokens: int = 0
    offset: int = 0
    thought: str = ""
    n_calls: int = 0


class AnswerParts(NamedTuple):
    """What an answer says, thought before, and calls."""

    content: str
    thought: str
    calls: list[ToolCall]


class ChatResponseBuilder:
    """chat.completion and chat.completion.chunk."""

    kind, kind_of_pieces = "chat.completion", "chat.completion.chunk"

    def __init__(self, ask: GenerationParams, head: dict[str, Any], texts: TokenTexts) -> None:
        self.ask, self.head, self._texts = ask, head, texts

    def opening(self, index: int) -> dict[str, Any] | None:
        """The piece before all others: whose words follow."""
        return self._piece(index, {"role": "assistant", "content": ""})

    def text(self, progress: Progress, index: int) -> str:
        """All that is shown of a choice."""
        return self.parts(progress, index).content

    def piece(self, progress: Progress, index: int, sent: SentSoFar, new_text: str) -> dict[str, Any] | None:
        """What came after what was sent, or None; notes that it is sent."""
        tokens = progress.chunks[index].logprobs[sent.n_tokens :]
        sent.n_tokens += len(tokens)
        parts = self.parts(progress, index)
        calls, new_thought = parts.calls[sent.n_calls :], parts.thought[len(sent.thought) :]
        if not new_text and not tokens and not calls and not new_thought:
            return None
        delta: dict[str, Any] = {"content": new_text} if new_text or (tokens and not new_thought) else {}
        if new_thought:
            delta["reasoning_content"] = new_thought
        if calls:
            delta["tool_calls"] = [{"index": k} | call_body(call) for k, call in enumerate(calls, sent.n_calls)]
        sent.n_calls, sent.thought = sent.n_calls + len(calls), parts.thought
        wanted = self.ask.top_logprobs is not None
        return self._piece(index, delta, chat_logprobs(self._texts, tokens) if wanted else None)

    def end(self, progress: Progress, index: int) -> dict[str, Any]:
        """The piece that says why the choice ends."""
        return self._piece(index, {}) | {"finish_reason": self.reason(progress, index)}

    def empty(self, index: int) -> dict[str, Any]:
        """A piece that adds nothing."""
        return self._piece(index, {})

    def whole(self, progress: Progress) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._choice(progress, index) for index in range(len(progress.chunks))]
        body = {"object": self.kind, "choices": choices, "usage": progress.usage(self.ask.n)}
        return self.head | body | path_of(progress)

    def _choice(self, progress: Progress, index: int) -> dict[str, Any]:
        wanted = self.ask.top_logprobs is not None
        content, thought, calls = self.parts(progress, index)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message |= {"content": content or None, "tool_calls": [call_body(call) for call in calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._texts, progress.chunks[index].logprobs) if wanted else None,
            "finish_reason": self.reason(progress, index),
        }

    def parts(self, progress: Progress, index: int) -> AnswerParts:
        """The parts of an answer so far; what may still become another part is left out."""
        chunk, ask = progress.chunks[index], self.ask
        ended, thought, text = bool(chunk.finish_reason), "", chunk.text
        calls: list[ToolCall] = []
        if ask.thought_mark:
            thought, text = read_thought(text, ask.thought_mark, progress.opened, ended=ended)
        if ask.call_style:
            text, calls = read_calls(text, ask.call_style, ended=ended, most=ask.tools.most if ask.tools else None)
        return AnswerParts(text, thought, calls)

    def reason(self, progress: Progress, index: int) -> str:
        """Why a choice ended."""
        reason = progress.chunks[index].finish_reason or "stop"
        return "tool_calls" if reason == "stop" and self.parts(progress, index).calls else reason

    def _piece(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def path_of(progress: Progress) -> dict[str, Any]:
    """The field that says how an answer was computed, where a server has several ways, and out of which sources."""
    sources = list(progress.chunks[0].sources)
    more = ({"path": progress.path} if progress.path else {}) | ({"sources": sources} if sources else {})
    return {"onecard": more} if more else {}


def call_body(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's form, under the model's own id or a fresh one."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class CompletionResponseBuilder:
    """text_completion, whole and in pieces alike."""

    kind = kind_of_pieces = "text_completion"

    def __init__(self, ask: GenerationParams, head: dict[str, Any], texts: TokenTexts) -> None:
        self.ask, self.head, self._texts = ask, head, texts

    def opening(self, index: int) -> dict[str, Any] | None:
        """Completions begin without one."""
        return None

    def text(self, progress: Progress, index: int) -> str:
        """All that is shown of a choice, the echo included."""
        echo = self._echo(progress, index)
        return (echo.text if echo else "") + progress.chunks[index].text

    def piece(self, progress: Progress, index: int, sent: SentSoFar, new_text: str) -> dict[str, Any] | None:
        """What came after what was sent, or None; notes that it is sent."""
        logprobs = self._logprobs(progress, index, sent)
        if not new_text and not (logprobs and logprobs["tokens"]):
            return None
        return self._piece(index, new_text, logprobs)

    def end(self, progress: Progress, index: int) -> dict[str, Any]:
        """The piece that says why the choice ends."""
        return self._piece(index, "") | {"finish_reason": progress.chunks[index].finish_reason or "stop"}

    def empty(self, index: int) -> dict[str, Any]:
        """A piece that adds nothing."""
        return self._piece(index, "")

    def whole(self, progress: Progress) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            self._piece(index, self.text(progress, index), self._logprobs(progress, index, SentSoFar()))
            | {"finish_reason": chunk.finish_reason}
            for index, chunk in enumerate(progress.chunks)
        ]
        body = {"object": self.kind, "choices": choices, "usage": progress.usage(self.ask.n)}
        return self.head | body | path_of(progress)

    def _echo(self, progress: Progress, index: int) -> Echo | None:
        k = index // self.ask.n
        return progress.echoes[k] if k < len(progress.echoes) else None

    def _logprobs(self, progress: Progress, index: int, sent: SentSoFar) -> dict[str, Any] | None:
        """Entries of the tokens that were not sent yet: the prompt's if it is echoed, then the answer's.

        With an echo there are as many as prompt and answer have tokens, the end that is not shown included: programs
        that score texts with `echo` count on it.
        """
        if self.ask.top_logprobs is None:
            return None
        chunk, echo = progress.chunks[index], self._echo(progress, index)
        tokens = [*(echo.scores if echo else ()), *chunk.logprobs]
        ids: list[int | None] = [*(echo.ids if echo else ()), *(token.token_id for token in chunk.logprobs)]
        n_hidden = chunk.usage.n_new_tokens - len(chunk.logprobs) if echo and chunk.finish_reason else 0
        tokens, ids = [*tokens, *[None] * n_hidden], [*ids, *[None] * n_hidden]
        body, sent.offset = completion_logprobs(self._texts, tokens[sent.n_tokens :], ids[sent.n_tokens :], sent.offset)
        sent.n_tokens = len(tokens)
        return body

    def _piece(self, index: int, text: str, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


Form = ChatResponseBuilder | CompletionResponseBuilder


def vectors_body(body: EmbeddingRequest, found: EmbeddingsResult) -> Iterator[str]:
    """The JSON of an answer to `body`, piece by piece."""
    is_packed = body.encoding_format == "base64"  # little-endian float32, as OpenAI's clients ask for it
    usage = {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens}
    head = json.dumps({"object": "list", "model": body.model, "usage": usage}, ensure_ascii=False)
    yield head.removesuffix("}") + ', "data": ['
    for k, vector in enumerate(found.vectors):
        packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii") if is_packed else None
        entry = {"object": "embedding", "index": k, "embedding": packed or list(vector)}
        yield (", " if k else "") + json.dumps(entry)
    yield "]}"
