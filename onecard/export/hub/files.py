"""What lies in a Hub repository, which of it is wanted, and what each way to fail means for a person.

Knows the Hub's listing (names, sizes, hashes) and the habits of model repositories. Fetches no file; `download.py`
does.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from typing import Any, Literal
from urllib.parse import quote

from onecard.errors import ConfigError, ModelError
from onecard.export.hub.checksums import is_inside
from onecard.hub_errors import MIRROR, hub_problem

OFFICIAL = "https://huggingface.co"
HIDDEN = (".*", "*/.*")
# The same weights in other forms, states of the training, and pictures: what most model repositories hold besides.
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl", "*.pickle")
OTHER_FORMS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.ot", "*.tflite", "*.mlmodel", "consolidated*")
OTHER_FOLDERS = ("original/*", "onnx/*", "openvino/*", "coreml/*", "metal/*", "gguf/*", "runs/*", "checkpoint-*/*")
PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4", "*.pdf")
TRAINING = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler.pt")
TIMEOUT_S = 30.0  # without a byte
MAX_LISTING_BYTES = 64 * 2**20  # some 300,000 files
TRIES = 5  # in a row, without a single byte between them
WAIT_S = 1.0
LONGEST_WAIT_S = 60.0  # whatever Retry-After asks for
PASSING = (408, 416, 429, 500, 502, 503, 504)  # answers that another try may better
# What a listing may say: a commit and hashes become names of files, so they are hashes and nothing else.
COMMIT_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
BLOB_ID = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")
LONGEST_NAME = 255  # bytes of one part of a path, on every common file system
NO_NAME = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
NO_WINDOWS_NAME = re.compile(  # https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    r'[<>:"\\|?*]|[. ]$|^(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)', re.IGNORECASE
)
NOT_NEEDED = (*HIDDEN, *PICKLES, *OTHER_FORMS, *OTHER_FOLDERS, *PICTURES, *TRAINING)


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub or a mirror; `endpoint` is empty for the environment's HF_ENDPOINT or the Hub itself."""

    repo_id: str
    repo_type: Literal["model", "dataset"] = "model"
    revision: str = "main"
    endpoint: str = ""

    @property
    def address(self) -> str:
        """Where it is asked for, without a slash at the end."""
        return (self.endpoint or os.environ.get("HF_ENDPOINT") or OFFICIAL).rstrip("/")

    @property
    def token(self) -> str | bool | None:
        """What the Hub's library takes: None lets it find the stored login, which no mirror shall see."""
        return None if self.address == OFFICIAL else os.environ.get("HF_TOKEN") or False


@dataclass(frozen=True)
class HubFile:
    """One file; `sha256` is empty for small ones, which git names by `blob_id` (SHA-1 of a header and the content)."""

    name: str
    n_bytes: int
    blob_id: str
    sha256: str

    @property
    def etag(self) -> str:
        """The name of its content on the Hub and in the Hub's cache."""
        return self.sha256 or self.blob_id

    @property
    def is_pickle(self) -> bool:
        return _matches(self.name, PICKLES)


@dataclass(frozen=True)
class Listing:
    """The files that are wanted of one commit, and the names of those that are not."""

    repository: Repository
    commit: str
    files: list[HubFile]
    left_out: list[str]

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


def list_files(repository: Repository, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Listing:
    """Ask the Hub for names, sizes and hashes, and choose. One request; nothing is written.

    Args:
        include, exclude: patterns such as *.json; a `*` passes slashes, and `folder/` is all below it.

    Raises:
        ConfigError: no such repository or revision, a name that cannot be one, patterns that match nothing.
        ModelError: no network, no answer, no right to see it, offline mode, file names that lead elsewhere.
    """
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise ModelError("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is downloaded; unset it")
    if not re.match("https?://", repository.address):
        raise ConfigError("--endpoint", f"{repository.address} is no address; write it like {OFFICIAL}")
    if not is_inside(repository.revision):
        raise ConfigError("--revision", f"{repository.revision!r} is no branch, tag or commit")
    with explained(repository):
        try:
            found: Any = retried(lambda: _ask(repository))
            everything = [_hub_file(sibling) for sibling in found.siblings or []]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as reason:
            if type(reason).__module__.startswith("huggingface_hub"):
                raise
            raise ModelError(f"{repository.address} does not answer as a Hub does; check the address") from reason
    if not COMMIT_HASH.fullmatch(str(found.sha)):
        raise ModelError(f"{repository.address} tells {str(found.sha)[:80]!r} as commit, which is no hash; refused")
    _refuse_hostile(repository, everything)
    names = choose([file.name for file in everything], repository.repo_type, include, exclude)
    wanted = [file for file in everything if file.name in names]
    if not wanted:
        few = ", ".join(file.name for file in everything[:8]) or "nothing"
        raise ConfigError("--include", f"of {len(everything)} files none is wanted; {repository.repo_id} holds {few}")
    left_out = [file.name for file in everything if file.name not in names]
    _refuse_collisions(repository, [file.name for file in wanted])
    return Listing(repository, str(found.sha), wanted, left_out)


def _ask(repository: Repository) -> Any:
    """The Hub's answer as its library holds it; HfApi would read one of any length. Raises HTTPError and ModelError."""
    from huggingface_hub import DatasetInfo, ModelInfo, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

    validate_repo_id(repository.repo_id)
    url = f"{repository.address}/api/{repository.repo_type}s/{repository.repo_id}/revision/"
    url += f"{quote(repository.revision, safe='')}?blobs=true"
    headers = build_hf_headers(token=repository.token) | {"Accept-Encoding": "identity"}
    body = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        for piece in answer.iter_bytes():
            body += piece
            if len(body) > MAX_LISTING_BYTES:
                raise ModelError(
                    f"{repository.address} sends a listing of more than {MAX_LISTING_BYTES >> 20} MiB; refused. Name "
                    "another --endpoint"
                )
    kind = ModelInfo if repository.repo_type == "model" else DatasetInfo
    return kind(**json.loads(body))


def retried(ask: Callable[[], Any]) -> Any:
    """What `ask` returns; refusals that pass and broken connections are tried again. Raises HTTPError."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for left in reversed(range(TRIES)):
        try:
            return ask()
        except HTTPError as reason:
            if not left or (isinstance(reason, HfHubHTTPError) and reason.response.status_code not in PASSING):
                raise
            time.sleep(wait_s(reason))
    return None


def wait_s(reason: Any) -> float:
    """Seconds until another try: what Retry-After asks for, in seconds or as a date, within bounds (RFC 9110)."""
    asked = getattr(getattr(reason, "response", None), "headers", {}).get("retry-after", "").strip()
    if asked.isdecimal():
        return min(max(float(asked[:9]), WAIT_S), LONGEST_WAIT_S)
    try:
        until = parsedate_to_datetime(asked)
        seconds = (until.replace(tzinfo=until.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return WAIT_S
    return min(max(seconds, WAIT_S), LONGEST_WAIT_S)


def is_file_name(name: str, *, on_windows: bool = os.name == "nt") -> bool:
    """Whether a listed name can be a file's: no control characters, no part too long, nothing that Windows reserves."""
    parts = name.split("/")
    if NO_NAME.search(name) or any(len(part.encode()) > LONGEST_NAME for part in parts) or len(name) > 4 * LONGEST_NAME:
        return False
    return not on_windows or not any(NO_WINDOWS_NAME.search(part) for part in parts)


def _refuse_hostile(repository: Repository, files: Sequence[HubFile]) -> None:
    """Names, hashes and sizes of a listing come from a stranger. Raises ModelError for what cannot be true."""
    for file in files:
        if not is_inside(file.name):
            raise ModelError(f"{repository.repo_id} names a file {file.name!r}, outside of its directory; refused")
        if not is_file_name(file.name):
            raise ModelError(
                f"{repository.repo_id} names a file {file.name[:80]!r}, which this system cannot hold; refused"
            )
        kind, value = (SHA256, file.sha256) if file.sha256 else (BLOB_ID, file.blob_id)
        if not kind.fullmatch(value) or file.n_bytes < 0:
            raise ModelError(
                f"{repository.address} tells hash {value[:80]!r} and {file.n_bytes} bytes of {file.name}, which cannot "
                "be right; refused. Name another --endpoint"
            )


def _refuse_collisions(repository: Repository, names: Sequence[str]) -> None:
    """Two files with one path, or a file where a folder must be. Raises ModelError."""
    ignores_case = sys.platform in ("win32", "darwin")
    plain = [unicodedata.normalize("NFC", name).casefold() if ignores_case else name for name in names]
    taken = {"/".join(name.split("/")[:end]) for name in plain for end in range(1, name.count("/") + 1)}
    for name, key in zip(names, plain, strict=True):
        if key in taken:
            raise ModelError(f"{repository.repo_id} has two files at {name} (or a file and a folder); use --exclude")
        taken.add(key)


def choose(names: Sequence[str], repo_type: str, include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """The names that are wanted: what the patterns say; without --include what loading needs.

    Of a model's weights safetensors are taken where there are any, else pickles, else GGUF, else whatever there is.
    """
    kept = [name for name in names if not _matches(name, exclude)]
    if include:
        return {name for name in kept if _matches(name, include)}
    if repo_type != "model":
        return {name for name in kept if not _matches(name, HIDDEN)}
    needed = {name for name in kept if not _matches(name, NOT_NEEDED)}
    if any(name.endswith(".safetensors") for name in needed):
        return needed
    kept = [name for name in kept if not _matches(name, (*HIDDEN, *PICTURES, *TRAINING))]
    for patterns in (("*.bin",), PICKLES, ("*.gguf",)):
        weights = {name for name in kept if _matches(name, patterns) and not _matches(name, OTHER_FOLDERS)}
        if weights:
            return needed | weights
    return set(kept)


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Turn what the Hub's library raises into one line with a remedy. Raises ConfigError and ModelError."""
    from huggingface_hub import errors

    what = f"{repository.repo_type} {repository.repo_id}"
    try:
        yield
    except errors.RevisionNotFoundError as reason:
        raise ConfigError("--revision", f"{what} has no branch, tag or commit {repository.revision}") from reason
    except errors.HFValidationError as reason:
        raise ConfigError("--repo_id", f"{repository.repo_id!r} is no Hub id; write it like owner/name") from reason
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as reason:
        problem = hub_problem(
            reason, what, repository.repo_id, address=repository.address,
            remedy=f"name a mirror by --endpoint {MIRROR} or HF_ENDPOINT. What is there already is kept, and the same "
            "command goes on from it",
        )  # fmt: skip
        is_missing = isinstance(reason, errors.RepositoryNotFoundError) and not isinstance(
            reason, errors.GatedRepoError
        )
        raise (ConfigError("--repo_id", problem) if is_missing else ModelError(problem)) from reason


def _hub_file(sibling: Any) -> HubFile:
    sha256 = sibling.lfs.sha256 if sibling.lfs else ""
    return HubFile(str(sibling.rfilename), int(sibling.size), str(sibling.blob_id or ""), str(sha256))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)
