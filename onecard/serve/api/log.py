"""One printed line per request: when, who, what, status, reason, duration, tokens. Texts only where they are wanted.

2026-11-29T09:00:01+01:00 127.0.0.1 POST /v1/chat/completions 200 stop 1234 ms 12+80 tokens
2026-11-29T09:00:02+01:00 127.0.0.1 POST /v1/chat/completions 400 unsupported_parameter:min_p 1 ms

Also the last net: what nobody foresaw is answered with 500, and printed by its place: its text may hold a prompt.
Knows ASGI. It does not know what requests mean.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from onecard.console import say, warn
from onecard.data.messages import Turn
from onecard.errors import ConfigError
from onecard.serve.api.errors import as_api_error
from onecard.serve.api.metrics import ServerMetrics
from onecard.serve.api.requests import Prompt
from onecard.serve.api.work import Progress
from onecard.serve.http_error import NOTE_KEY, ApiError, send_error
from onecard.serve.security import QUERY

# Paths that are counted by name: others are a client's own words, and there may be any number of them.
COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/health", "/metrics",
           "/tokenize", "/detokenize", "/", QUERY)  # fmt: skip
LOGGED_PATHS = ("/v1/", "/health", "/tokenize", "/detokenize", QUERY)
FIRST_REFUSAL = 400
LONGEST_PATH = 100  # characters of a path in a line
PARAM = re.compile(r"[a-z_]{1,30}(\[\d{1,6}\])?(\.[a-z_]{1,30}(\[\d{1,6}\])?)*")  # no texts of a client's own


@dataclass
class RequestRecord:
    """What the handler of a request tells the log. Texts stay out unless `with_texts`.

    key: the name of the client's key, "" where it has none. outcome: how an answer ended, or why there is none.
    first_token_seconds: from the headers to the first token of a streamed answer.
    """

    with_texts: bool = False
    key: str = ""
    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    outcome: str = ""
    texts: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    first_token_seconds: float | None = None

    def saw(self, progress: Progress) -> None:
        """Take over when the first token of an answer came."""
        if self.first_token_seconds is None and any(chunk.usage.n_new_tokens for chunk in progress.chunks):
            self.first_token_seconds = time.monotonic() - self.began

    def of_answer(self, progress: Progress, n: int) -> None:
        """Take over the tokens of an answer, and its texts."""
        usage = progress.usage(n)
        self.n_prompt_tokens, self.n_new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        ends = dict.fromkeys(chunk.finish_reason for chunk in progress.chunks if chunk.finish_reason)
        self.outcome = self.outcome or ",".join(ends)
        self.add([chunk.text for chunk in progress.chunks])

    def of_error(self, error: ApiError) -> None:
        """Take over why a request failed: the code, and the field where its name is one of an API's."""
        param = error.param or ""
        self.outcome = error.code or "invalid_value"
        if len(param) <= LONGEST_PATH and PARAM.fullmatch(param):
            self.outcome += f":{param}"

    def add(self, texts: Sequence[Turn | Prompt]) -> None:
        """Prompts and answers to print, where they are printed."""
        if self.with_texts:
            logged = [(text.role, text.content) if isinstance(text, Turn) else text for text in texts]
            self.texts += [json.dumps(text, ensure_ascii=False) for text in logged]


class RequestLog:
    """Outermost layer: prints a line for every request to the API, and for every refusal; counts all of them.

    file: where a JSON line is added for each printed one.
    """

    def __init__(
        self, app: Any, metrics: ServerMetrics, with_texts: bool = False, file: RequestFile | None = None
    ) -> None:
        self._app, self._metrics, self._with_texts, self._file = app, metrics, with_texts, file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        note, status = RequestRecord(self._with_texts), 0

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app({**scope, NOTE_KEY: note}, receive, send_and_see)
        except Exception as reason:
            error = as_api_error(reason)
            note.of_error(error)
            if not status:
                await send_error(scope, send_and_see, error)
        finally:
            seconds = time.monotonic() - note.began
            self._count(scope, status, seconds, note)
            self._print(scope, status, seconds, note)
        return None

    def _count(self, scope: Scope, status: int, seconds: float, note: RequestRecord) -> None:
        known = QUERY if scope["path"].startswith(QUERY) else scope["path"]
        path = known if known in COUNTED else "other"
        self._metrics.saw(path, status, note.key, seconds, note.first_token_seconds)
        self._metrics.saw_tokens(note.key, note.n_prompt_tokens, note.n_new_tokens)

    def _print(self, scope: Scope, status: int, seconds: float, note: RequestRecord) -> None:
        # As it was sent, in plain ASCII: a decoded path could hold line breaks and write lines of its own.
        path = bytes(scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0][:LONGEST_PATH]
        if scope["path"].startswith(QUERY):
            path = QUERY.encode()  # the rest of it is a prompt
        is_question = scope["method"] == "POST" and path == b"/"
        if status < FIRST_REFUSAL and not is_question and not path.decode("latin-1").startswith(LOGGED_PATHS):
            return
        safe_path = path.decode("ascii", "backslashreplace")
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        client = (scope.get("client") or ("-",))[0]
        method, shown_path = scope["method"][:10], ascii(safe_path)[1:-1]
        words = [now, client, note.key, method, shown_path, str(status or "left"), note.outcome]
        words.append(f"{seconds * 1000:.0f} ms")
        if note.n_prompt_tokens or note.n_new_tokens:
            words.append(f"{note.n_prompt_tokens}+{note.n_new_tokens} tokens")
        say(" ".join(filter(None, words)))
        for text in note.texts:
            say(f"  {text}")
        if self._file is not None:
            self._file.add(
                {"time": now, "client": client, "key": note.key, "method": method, "path": shown_path, "status": status,
                 "outcome": note.outcome, "seconds": round(seconds, 3), "prompt_tokens": note.n_prompt_tokens,
                 "completion_tokens": note.n_new_tokens, "first_token_seconds": note.first_token_seconds}
                | ({"texts": [json.loads(text) for text in note.texts]} if self._with_texts else {})
            )  # fmt: skip


class RequestFile:
    """JSON lines that are added to a file. Where it cannot be written later the server goes on, and says so once.

    Raises ConfigError where it cannot be written at the start.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._has_warned = Path(path), False
        try:
            with self._path.open("a", encoding="utf-8"):
                pass
        except OSError as reason:
            raise ConfigError("--request_log", f"{path} cannot be written: {reason}") from reason

    def add(self, row: Mapping[str, Any]) -> None:
        # Opened for each line: a file that was moved away (logrotate) is begun anew.
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as reason:
            if not self._has_warned:
                warn(f"--request_log: {self._path} cannot be written, requests are only printed: {reason}")
            self._has_warned = True
        else:
            self._has_warned = False


def note_of(scope: Scope) -> RequestRecord:
    """The note of this request."""
    found = scope.get(NOTE_KEY)
    return found if isinstance(found, RequestRecord) else RequestRecord()
