"""Stands in for the programs that Chat and Export start: `stub_use.py X VERB --OPTION VALUE ...`.

serve: two models, of which one says the question again and the other says it backwards. `slow` in a question makes an
answer without end, until the asker leaves; then a file `left` is written beside X.
All others write --output_path; its name says what happens (fails, waits).
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODELS = ("my-run", "base")
FIELDS = {"model", "messages", "temperature", "max_tokens", "stream"}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.tell(200, {"data": [{"id": name} for name in MODELS]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] not in MODELS:
            return self.tell(404, {"error": {"message": f"no model is called {body['model']!r}"}})
        if self.path == "/tokenize":
            ids = [ord(letter) for message in body["messages"] for letter in message["content"]]
            return self.tell(200, {"tokens": ids})
        if self.path == "/v1/completions":
            share = {"my-run": -0.5, "base": -2.5}[body["model"]]
            tokens = [chr(token_id) for token_id in body["prompt"]]
            logprobs = {"tokens": tokens, "token_logprobs": [None, *[share] * (len(tokens) - 1)]}
            return self.tell(200, {"choices": [{"logprobs": logprobs}]})
        assert set(body) <= FIELDS, body
        question = body["messages"][-1]["content"]
        text = question if body["model"] == "base" or question == "same" else question[::-1]
        if not body.get("stream"):
            return self.tell(200, {"choices": [{"message": {"content": text}}]})
        return self.stream(text, is_endless="slow" in question)

    def stream(self, text: str, *, is_endless: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            while True:
                for letter in text:
                    event = {"choices": [{"delta": {"content": letter}}]}
                    self.wfile.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
                    self.wfile.flush()
                if not is_endless:
                    break
                time.sleep(0.02)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            Path(sys.argv[1]).with_name("left").write_text("", encoding="utf-8")

    def tell(self, status: int, content: Any) -> None:
        if self.headers.get("authorization") != f"Bearer {os.environ['ONECARD_API_KEY']}":
            status, content = 401, {"error": {"message": "a key is needed"}}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def export(words: list[str]) -> int:
    target = Path(words[words.index("--output_path") + 1])
    print(f"step: 1 of 2, of {words[1]}", flush=True)
    if target.name == "fails":
        print("error: no room; make some\nlast words", flush=True)
        return 1
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir()
    while target.name == "waits":
        time.sleep(0.05)
    (partial / "model").write_bytes(b"12345")
    partial.rename(target)
    print("written", flush=True)
    return 0


def serve(words: list[str]) -> int:
    if "--bits" in words:
        print("loading\nerror: 4 bits do not fit; use a smaller model\nlast words")
        return 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(f"listening on http://127.0.0.1:{server.server_address[1]}  (Ctrl-C stops)", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit((serve if sys.argv[2] == "serve" else export)(sys.argv[1:]))
