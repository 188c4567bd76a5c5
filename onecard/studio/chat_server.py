"""The model that the studio chats with: `onecard serve` as a process of its own on a free port, behind a random key.

At most one per output folder. Its key lies beside its log, readable for this user only, so that a studio that starts
anew goes on with it. Knows processes and addresses. It does not know what is asked.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import ssl
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from onecard.config.inference import API_KEY_VARIABLE
from onecard.inference.run_files import adapters_in
from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.failures import reason_in
from onecard.studio.jobs import ALIVE, Jobs, new_id
from onecard.studio.processes import start_apart
from onecard.studio.sources import ModelSource
from onecard.studio.supervisor import LOG

KIND, KEY_FILE = "chat", "key"
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
IDLE_MINUTES = 15.0
PATIENCE_SECONDS = 10.0  # for a server that has been asked to end
MOST_FIRST_BYTES = 100_000  # of a log, in which the address is looked for
ANSWER_SECONDS = 600.0  # as long as --max_request_seconds lets the server take
PARALLEL = 4  # answers in one batch: two sides of a comparison, and those of a second page
BITS = (4, 8, 16, 32)


@dataclass(frozen=True)
class ChatState:
    """state: off, starting, ready or failed. source: what is asked. models: names that answer, the source's own first;
    base: the one among them without an adapter, or empty. error: why it failed."""

    state: str
    source: str = ""
    models: tuple[str, ...] = ()
    base: str = ""
    error: str = ""


@dataclass
class ChatServer:
    """Starts, finds and ends the server. `folder` holds its state; sources lie below `root`; `program` is `onecard`."""

    folder: Path
    root: Path
    program: tuple[str, ...]
    jobs: Jobs = field(init=False)
    _names: dict[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)  # of a job: models and base

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.folder, self.program, self._spawn)

    def start(self, source: ModelSource, *, bits: int | None = None, beside_training: bool = False) -> None:
        """End what runs and start a server for this source. beside_training: it stays when a run begins.

        Raises ApiError.
        """
        if bits is not None and bits not in BITS:
            raise bad_request(f"bits is one of {', '.join(map(str, BITS))}", "bits")
        self.stop()
        for job in self.jobs.all(KIND):
            if job["state"] not in ALIVE:  # of earlier ones nothing is needed
                shutil.rmtree(self.jobs.path(job["id"]), ignore_errors=True)
        path = self.root / source.path
        words = ["serve", "--host", "127.0.0.1", "--port", "0", "--max_parallel", str(PARALLEL)]
        if source.kind == "adapter":
            # Of the folder's adapters those of other bases are refused by the server when they are asked.
            words += ["--lora_path", str(path), "--adapters_path", str(path.parent)]
        else:
            words += ["--model_path", str(path)]
        job_id = new_id()
        key_file = self.jobs.path(job_id) / KEY_FILE
        key_file.parent.mkdir(parents=True)
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"sk-{secrets.token_urlsafe(32)}")
        bits_words = ["--bits", str(bits)] if bits else []
        self.jobs.start(KIND, [*words, *bits_words], title=source.path, job_id=job_id,
                        about={"source": source.path, "kind": source.kind, "stays": beside_training})  # fmt: skip

    def stop(self) -> None:
        """End every server of this folder, and wait until the card is free; what does not end by itself is killed."""
        end, asked = time.monotonic() + PATIENCE_SECONDS, set()
        while alive := [job for job in self.jobs.all(KIND) if job["state"] in ALIVE]:
            is_late = time.monotonic() > end
            for job in alive:
                # One that is just starting has nothing to be ended yet. Asked a second time, it is killed.
                if job["state"] == "running" and (job["id"] not in asked or is_late):
                    self.jobs.cancel(job["id"])
                    asked.add(job["id"])
            if time.monotonic() > end + PATIENCE_SECONDS:
                return
            time.sleep(0.05)

    @property
    def gives_way(self) -> bool:
        """Whether there is a server that is to be ended when a run begins."""
        job = self._newest()
        return job is not None and job["state"] in ALIVE and not job["about"].get("stays")

    def stop_if_idle(self) -> bool:
        """End a server that nobody has asked for `IDLE_MINUTES`."""
        job = self._newest()
        if job is None or job["state"] not in ALIVE:
            return False
        with suppress(OSError):
            idle_seconds = time.time() - (self.jobs.path(job["id"]) / KEY_FILE).stat().st_mtime
            if idle_seconds > 60 * IDLE_MINUTES:
                self.stop()
                return True
        return False

    def state(self) -> ChatState:
        """How it stands."""
        job = self._newest()
        if job is None or job["state"] in ("done", "cancelled"):
            return ChatState("off")
        source = str(job["about"].get("source", ""))
        if job["state"] not in ALIVE:
            why = reason_in(self.jobs.log(job["id"])["text"]) or "it ended without a word; start it again"
            return ChatState("failed", source, error=why)
        if self._address(job["id"]) is None:
            return ChatState("starting", source)
        models, base = self._models(job)
        return ChatState("ready", source, models, base) if models else ChatState("starting", source)

    def client(self) -> httpx.AsyncClient:
        """A client of the server with its key; counts as a use. Raises ApiError (409) where none is ready."""
        job = self._newest()
        address = self._address(job["id"]) if job is not None and job["state"] in ALIVE else None
        if job is None or address is None:
            raise ApiError(409, "no model is loaded; choose one and start it", code="no_chat_model")
        key_file = self.jobs.path(job["id"]) / KEY_FILE
        os.utime(key_file)
        headers = {"authorization": f"Bearer {key_file.read_text(encoding='utf-8')}"}
        return httpx.AsyncClient(base_url=address, headers=headers, timeout=ANSWER_SECONDS, **_of_this_machine())

    def _newest(self) -> dict[str, Any] | None:
        return next(iter(self.jobs.all(KIND)), None)

    def _address(self, job_id: str) -> str | None:
        """Where the server listens; None: it does not yet. It says so before anything else that is long."""
        try:
            with (self.jobs.path(job_id) / LOG).open("rb") as stream:
                found = ADDRESS.search(stream.read(MOST_FIRST_BYTES).decode("utf-8", "replace"))
        except OSError:
            return None
        return found[0] if found else None

    def _models(self, job: dict[str, Any]) -> tuple[tuple[str, ...], str]:
        """The names that this server's models have, and the base's; asked once."""
        if job["id"] not in self._names:
            address, key_file = self._address(job["id"]), self.jobs.path(job["id"]) / KEY_FILE
            headers = {"authorization": f"Bearer {key_file.read_text(encoding='utf-8')}"}
            try:
                with httpx.Client(timeout=5, headers=headers, **_of_this_machine()) as client:
                    listed = client.get(f"{address}/v1/models").json()["data"]
            except (httpx.HTTPError, ValueError, KeyError, TypeError):
                return (), ""
            names = tuple(str(model["id"]) for model in listed)
            self._names[job["id"]] = names, self._base_of(names, job)
        return self._names[job["id"]]

    def _base_of(self, names: Sequence[str], job: dict[str, Any]) -> str:
        """The last name, where it is none of the folder's adapters."""
        if job["about"].get("kind") != "adapter":
            return ""
        known = adapters_in(str((self.root / job["about"]["source"]).parent))
        return names[-1] if len(names) > 1 and names[-1] not in known else ""

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        key_file = Path(command[-1]) / KEY_FILE
        return start_apart(command, more={API_KEY_VARIABLE: key_file.read_text(encoding="utf-8")})


def _of_this_machine() -> dict[str, Any]:
    """Options of a client that asks this machine alone: no proxy of the environment, and no authority to be trusted.

    Reading the certificates of all authorities, which http has no use for, takes 20 ms of a core for each client.
    """
    return {"trust_env": False, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}
