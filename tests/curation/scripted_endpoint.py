"""A chat endpoint on this machine that answers as a script says: well, late, broken, half, or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What is sent: `body` is bytes as they are; `cut`: bytes that are promised and never come; `late_s` before all."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    cut: int = 0
    late_s: float = 0.0


def completion(text: str, finish_reason: str = "stop", **more: Any) -> Reply:
    """A chat completion of 10 prompt tokens and 5 of the answer."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **more}}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return Reply(json.dumps({"choices": [choice], "usage": usage}).encode())


class ScriptedEndpoint:
    """`requests` are the bodies that came, in order, each with its headers under "headers"."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.answer, self.requests = answer, []
        self.url = ""
        self.ended = threading.Event()


@contextmanager
def scripted(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[ScriptedEndpoint]:
    """Serve while the block runs; `answer(body, number of the request)` says what is sent."""
    state = ScriptedEndpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append({**body, "path": self.path, "headers": dict(self.headers)})
            reply = state.answer(body, len(state.requests) - 1)
            state.ended.wait(reply.late_s)
            try:
                self.send_response(reply.status)
                self.send_header("Content-Length", str(len(reply.body) + reply.cut))
                for name, value in reply.headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:
                pass  # the client has left
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
