"""A Hub on 127.0.0.1 for the tests: listing, files by ranges, LFS hashes; it can cut, corrupt, refuse and count."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "beef"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pth", ".parquet")


@dataclass
class Hub:
    """What the server holds and how it misbehaves; `requests` are (method, path, range) in order."""

    files: dict[str, bytes] = field(default_factory=dict)
    repo: str = "models/owner/tiny"
    gated: bool = False
    listing: bytes = b""  # sent instead of the true one
    cut_after_bytes: dict[str, list[int]] = field(default_factory=dict)  # one entry is used up by each GET
    sent_instead: dict[str, bytes] = field(default_factory=dict)
    seconds_per_piece: float = 0.0
    knows_ranges: bool = True
    status: dict[str, list[int]] = field(default_factory=dict)  # by file; "" is the listing
    retry_after: str = ""
    range_starts_at: int | None = None  # of every 206, whatever was asked for
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    address: str = ""

    def fetched(self, name: str) -> list[str]:
        """The range of every GET of a file; '' is all of it."""
        return [span for method, path, span in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def entry(self, name: str, *, as_tree: bool) -> dict[str, Any]:
        content = self.files[name]
        blob_id = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        lfs = {"lfs": {"sha256": sha256(content), "oid": sha256(content), "size": len(content), "pointerSize": 134}}
        entry: dict[str, Any] = {"size": len(content)} | (lfs if name.endswith(LFS_SUFFIXES) else {})
        return entry | (
            {"type": "file", "path": name, "oid": blob_id} if as_tree else {"rfilename": name, "blobId": blob_id}
        )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            hub.tokens.add(self.headers.get("Authorization", ""))
            if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
                self.answer_api(*found.groups())
            elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.answer_file(found[4])
            else:
                self.refuse(404, "RepoNotFound")

        def refuse(self, status: int, code: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if code:
                self.send_header("X-Error-Code", code)
            if hub.retry_after:
                self.send_header("Retry-After", hub.retry_after)
            self.end_headers()

        def answer_api(self, repo: str, kind: str | None, revision: str | None) -> None:
            if hub.status.get(""):
                self.refuse(hub.status[""].pop(0))
            elif repo != hub.repo:
                self.refuse(401, "RepoNotFound")
            elif revision not in (None, "main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            else:
                listed = [hub.entry(name, as_tree=kind == "tree") for name in hub.files]
                info = {"id": repo.partition("/")[2], "sha": COMMIT, "siblings": listed, "private": False, "tags": [],
                        "downloads": 0, "likes": 0}  # fmt: skip
                body = hub.listing or json.dumps(listed if kind == "tree" else info).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if self.command == "GET" else b"")

        def answer_file(self, name: str) -> None:
            if hub.gated:
                return self.refuse(403, "GatedRepo")
            if name not in hub.files:
                return self.refuse(404, "EntryNotFound")
            if self.command == "GET" and hub.status.get(name):
                return self.refuse(hub.status[name].pop(0))
            content = hub.sent_instead.get(name, hub.files[name])
            span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if hub.knows_ranges else None
            start = int(span[1]) if span else 0
            if start and start >= len(content):
                return self.refuse(416)
            start = start if hub.range_starts_at is None or not span else hub.range_starts_at
            self.send_response(206 if span else 200)
            entry = hub.entry(name, as_tree=True)
            etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
            for key in ("ETag", "X-Linked-Etag"):
                self.send_header(key, f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content) - start))
            if span:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.send_body(name, content[start:])
            return None

        def send_body(self, name: str, body: bytes) -> None:
            cuts = hub.cut_after_bytes.get(name, [])
            end = cuts.pop(0) if cuts else len(body)
            for at in range(0, min(end, len(body)), 1 << 16):
                self.wfile.write(body[at : min(end, at + (1 << 16))])
                time.sleep(hub.seconds_per_piece)
            if end < len(body):
                self.close_connection = True
                self.wfile.flush()
                self.connection.close()

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):  # the other side left, or we cut it ourselves
                self.close_connection = True

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
