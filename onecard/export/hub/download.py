"""A Hub repository brought to this disk: cut downloads go on where they were cut, and every file's hash is compared.

The Hub's own library (2.4) drops what it has of a file when a start ends, and believes the names, hashes and lengths
that a mirror tells. So the bytes are fetched here, by ranges of HTTP, and lie in the cache where that library looks.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.errors import ConfigError, ModelError, Stopped
from onecard.export.hub.files import PASSING, TIMEOUT_S, TRIES, HubFile, Listing, explained, wait_s
from onecard.export.io.output import free_disk_bytes, new_directory, progress
from onecard.storage import digest_of, is_disk_full, move, sync_file


@dataclass(frozen=True)
class DownloadPaths:
    """Where files go: `final` tells the path of one, `part` where its bytes are gathered until it is whole."""

    root: Path
    final: Callable[[HubFile], Path]
    part: Callable[[HubFile], Path]

    def missing_bytes(self, listing: Listing) -> int:
        """What is still to be fetched. Files count as there when their size is right; hashes come later."""
        files = {self.final(file): file for file in listing.files}
        absent = [file for path, file in files.items() if _size(path) != file.n_bytes]
        return sum(max(0, file.n_bytes - _size(self.part(file))) for file in absent)

    def free_bytes(self) -> int:
        """Free room on the disk of this place, which need not exist yet."""
        return free_disk_bytes(self.root)


def cache_place(listing: Listing) -> DownloadPaths:
    """The Hub's cache on this machine. https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = Path(HF_HUB_CACHE) / _folder_name(listing) / "blobs"
    return DownloadPaths(blobs, lambda file: blobs / file.etag, lambda file: blobs / f"{file.etag}.incomplete")


def directory_place(target: Path) -> DownloadPaths:
    """The hidden directory beside `target` that keeps what has come until all has."""
    target = target.expanduser().absolute()
    kept = target.parent / f".{target.name}.download"

    def part(file: HubFile) -> Path:
        return kept / ".parts" / hashlib.sha256(f"{file.name} {file.etag}".encode()).hexdigest()

    return DownloadPaths(kept, lambda file: kept / file.name, part)


def fetch(listing: Listing, target: Path | None, *, overwrite: bool = False, max_workers: int = 4) -> Path:
    """Download what is listed into `target`, or into the Hub's cache; returns the directory that holds it all.

    Each file gets its name only once its size and hash are those that the Hub tells. What has come stays when the
    start ends early, and the next one goes on from it, within a file too. `target` appears when all is there.

    Raises:
        ConfigError: `target` exists and `overwrite` is false, or another process writes it.
        ModelError: no room, no network, no right, a file with another hash.
        Stopped: after Ctrl-C.
    """
    if target is None:
        return _into_cache(listing, max_workers)
    place = directory_place(target)
    with new_directory(target, overwrite=overwrite, needed_bytes=place.missing_bytes(listing)) as staged:
        _fetch_all(listing, place, max_workers)
        _keep_only(place.root, {place.final(file) for file in listing.files})
        staged.rmdir()
        move(place.root, staged)
    return target


def _into_cache(listing: Listing, max_workers: int) -> Path:
    from filelock import FileLock, Timeout
    from huggingface_hub.constants import HF_HUB_CACHE

    repository, place = listing.repository, cache_place(listing)
    missing, free = place.missing_bytes(listing), place.free_bytes()
    if missing > free:
        raise ModelError(
            f"{repository.repo_id} needs {missing / 2**30:.2f} GiB more in {HF_HUB_CACHE}, whose disk has "
            f"{free / 2**30:.2f} GiB free; make room, or give --output_path on another disk"
        )
    lock = FileLock(Path(HF_HUB_CACHE) / ".locks" / f"{_folder_name(listing)}.onecard.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as reason:
        raise ConfigError("--repo_id", f"{repository.repo_id} is being downloaded by another process") from reason
    except OSError as reason:
        raise ModelError(
            f"{HF_HUB_CACHE} cannot be written: {reason.strerror}; set HF_HOME, or --output_path"
        ) from reason
    try:
        _fetch_all(listing, place, max_workers)
        with _disk_explained(place):
            return _link_snapshot(listing, place)
    finally:
        lock.release()


def _link_snapshot(listing: Listing, place: DownloadPaths) -> Path:
    """The directory of links to the blobs, as the Hub's library makes it; that one would ask the mirror again."""
    from huggingface_hub.file_download import _cache_commit_hash_for_specific_revision, _create_symlink

    folder = place.root.parent
    snapshot = folder / "snapshots" / listing.commit
    for file in listing.files:
        link, blob = snapshot / file.name, place.final(file)
        _make_folders(folder, link)
        if not (link.is_file() and link.samefile(blob)):
            _create_symlink(str(blob), str(link))
    _cache_commit_hash_for_specific_revision(str(folder), listing.repository.revision, listing.commit)
    return snapshot


def _fetch_all(listing: Listing, place: DownloadPaths, max_workers: int) -> None:
    """Bring every file to its final place, several at a time."""
    files = {place.final(file): file for file in listing.files}
    stop = threading.Event()
    total = sum(file.n_bytes for file in files.values())
    with (
        _disk_explained(place),
        progress(listing.repository.repo_id, total, in_bytes=True) as moved,
        ThreadPoolExecutor(max_workers) as pool,
    ):
        jobs = [pool.submit(_bring, listing, file, place, moved, stop) for file in files.values()]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException as reason:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(reason, KeyboardInterrupt):
                raise Stopped("stopped; what has come is kept, and the same command goes on from it", 130) from reason
            raise


def _bring(
    listing: Listing, file: HubFile, place: DownloadPaths, moved: Callable[[int], Any], stop: threading.Event
) -> None:
    final, part = place.final(file), place.part(file)
    for path in (part, final):
        _make_folders(place.root, path)
        if path.is_symlink():
            path.unlink()
    if final.is_file():
        if _is_right(final, file):
            moved(file.n_bytes)
            return
        final.unlink()
    if not _gather(listing, file, part, moved, stop):
        return
    if not _is_right(part, file):
        part.unlink()
        raise ModelError(
            f"{file.name} came with another content than {listing.repository.address} tells (size or hash differ), so "
            "it was removed; start again, or name another --endpoint"
        )
    sync_file(part)
    move(part, final)


def _gather(listing: Listing, file: HubFile, part: Path, moved: Callable[[int], Any], stop: threading.Event) -> bool:
    """Append to `part` until it has all bytes, over cuts of the connection; False when `stop` was set."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    moved(_size(part))
    tries = TRIES
    with explained(listing.repository):
        while not part.is_file() or _size(part) < file.n_bytes:
            before, reason = _size(part), None
            try:
                _append(listing, file, part, moved, stop)
            except HfHubHTTPError as refusal:
                reason = _passing(refusal)
            except HTTPError as cut:
                reason = cut
            if stop.is_set():
                return False
            tries = TRIES if _size(part) > before else tries - 1
            if not tries:
                raise reason or ModelError(f"{listing.repository.address} sends too few bytes of {file.name}")
            if _size(part) < file.n_bytes:
                stop.wait(wait_s(reason))
    return True


def _passing(refusal: Any) -> Any:
    """The refusal itself, where another try may better it; else it is raised."""
    if refusal.response.status_code not in PASSING:
        raise refusal
    return refusal


def _append(listing: Listing, file: HubFile, part: Path, moved: Callable[[int], Any], stop: threading.Event) -> None:
    """One request for what `part` lacks. Raises HTTPError of the Hub's library."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    repository, before = listing.repository, _size(part)
    url = hf_hub_url(
        repository.repo_id, file.name, repo_type=repository.repo_type, revision=listing.commit,
        endpoint=repository.address,
    )  # fmt: skip
    headers = build_hf_headers(token=repository.token) | {"Accept-Encoding": "identity"}
    if before:
        headers["Range"] = f"bytes={before}-"
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        span = re.match(r"bytes (\d{1,18})-", answer.headers.get("content-range", ""))
        is_range = answer.status_code == 206
        if not is_range or not span or int(span[1]) != before:
            moved(-before)  # the server knows no ranges and sends all of it again, or sends another part than asked
            part.unlink(missing_ok=True)
            before = 0
            if is_range:
                return
        with part.open("ab") as stream:
            pieces = iter(answer.iter_bytes())
            while before <= file.n_bytes and not stop.is_set() and (piece := next(pieces, b"")):
                piece = piece[: file.n_bytes + 1 - before]  # one byte too many tells that it is another file
                stream.write(piece)
                moved(len(piece))
                before += len(piece)


def _is_right(path: Path, file: HubFile) -> bool:
    """Whether size and hash are those that the Hub tells; git's own hash covers a header with the size, too."""
    if _size(path) != file.n_bytes:
        return False
    if file.sha256:
        return digest_of(path, hashlib.sha256()) == file.sha256
    header = f"blob {file.n_bytes}\0".encode()
    return not file.blob_id or digest_of(path, hashlib.sha1(header, usedforsecurity=False)) == file.blob_id


def _make_folders(root: Path, path: Path) -> None:
    """The folders on the way from `root` to `path`; a link there is removed, for it may lead anywhere."""
    for folder in [*reversed(path.relative_to(root).parents)][1:]:
        if (root / folder).is_symlink():
            (root / folder).unlink()
    path.parent.mkdir(parents=True, exist_ok=True)


def _keep_only(root: Path, wanted: set[Path]) -> None:
    """Remove what an earlier start for other files left among them."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif path not in wanted:
            path.unlink()


@contextlib.contextmanager
def _disk_explained(place: DownloadPaths) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as reason:
        raise ModelError(
            f"{reason.filename2 or reason.filename} is in the way ({reason.strerror}): remove what earlier downloads "
            "left there and start again"
        ) from reason
    except OSError as reason:
        if not is_disk_full(reason):
            raise
        raise ModelError(
            f"no room in {place.root}: the disk is full or takes no files; make room, and the same command goes on"
        ) from reason


def _folder_name(listing: Listing) -> str:
    repository = listing.repository
    return f"{repository.repo_type}s--{repository.repo_id.replace('/', '--')}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
