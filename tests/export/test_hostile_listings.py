"""A listing comes from a stranger: whatever it says, nothing outside of the target is touched."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from onecard.errors import ModelError, OneCardError
from onecard.export.hub import download
from onecard.export.hub import files as hub_files
from onecard.export.hub.files import Repository, list_files
from tests.export.hub_server import COMMIT, Hub, serving, sha256

HASHES = {n: hashlib.sha1(f"blob {n}\0".encode() + b"x" * n).hexdigest() for n in (0, 3)}
CHANGING = {"os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.symlink": (1,),
            "os.link": (1,), "os.truncate": (0,), "os.chmod": (0,),
            "shutil.rmtree": (0,), "shutil.move": (0, 1)}  # fmt: skip
watched: list[list[str]] = []  # an audit hook cannot be removed: it writes into the last list, where there is one


def hook(event: str, values: tuple[Any, ...]) -> None:
    if not watched:
        return
    if event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
        watched[-1].append(values[0])
    for place in CHANGING.get(event, ()):
        watched[-1].append(values[place])


@contextmanager
def watching() -> Iterator[list[str]]:
    """The paths that this process changes inside the block."""
    if not getattr(hook, "is_added", False):
        sys.addaudithook(hook)
        hook.is_added = True  # type: ignore[attr-defined]
    watched.append([])
    try:
        yield watched[-1]
    finally:
        watched.pop()


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`arena/out` for downloads, `arena/cache` for the Hub's cache, and files of the user beside them."""
    for name in (
        "x",
        "victim",
        "home/notes.txt",
        "arena/victim",
        "arena/cache/victim",
        "arena/cache/models--a--b/victim",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the user", encoding="utf-8")
    (tmp_path / "arena" / "out").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "arena" / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "sync_file", lambda _: None)
    monkeypatch.setattr(download, "_append", append)
    monkeypatch.setattr(download, "TRIES", 1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "arena"


def append(_listing: Any, file: Any, part: Path, _moved: Any, _stop: Any) -> None:
    """The network: so many bytes as were listed, but never many."""
    part.write_bytes(b"x" * min(file.n_bytes, 9))


def hostile_paths(arena: Path) -> list[str]:
    up = ["../" * n + "victim" for n in range(1, 5)] + ["../" * n + "x" for n in range(1, 5)]
    return [
        *up, str(arena.parent / "x"), f"/{arena.parent}/x", f"a/{arena.parent}/x", "a/../../victim", ".", "..", "", "/",
        "../../../../srv/notes.txt", "a\0b", "a/\0", "C:\\x", "C:x", "\\\\server\\share\\x", "//server/x", "con",
        "a/nul.txt",        "a" * 256, "b/" * 700 + "b", "\ud800", "\x1b[2J", "a\nb", "link/victim", "link/new",
        ".parts/x", "A/b", "a/B",
        "...", "a..", "x ", "~/x", "$HOME/x", "%2e%2e/x", "..%2fx", "..\\..\\x", "sub//x", "./x", "a/./b",
    ]  # fmt: skip


def generated(choose: random.Random, arena: Path) -> SimpleNamespace:
    """A listing in which names, hashes, sizes and the commit may each be hostile, and often only one of them is."""
    paths = hostile_paths(arena)

    def one(right: Any, share: float, others: list[Any]) -> Any:
        return choose.choice(others) if choose.random() < share else right

    def sibling(number: int) -> SimpleNamespace:
        size = choose.choice((0, 3))
        digest = one(sha256(b"x" * size), 0.15, [*paths, "0" * 64, sha256(b"") + "\n", "A" * 64, "a" * 40])
        return SimpleNamespace(
            rfilename=one(f"f{number}.json", 0.15, [*paths, "f0.json", "f0.json/x", "F1.JSON"]),
            size=one(size, 0.1, [-1, 2**70, "9", None, 4.5, float("inf"), float("nan"), "../x"]),
            blob_id=one(HASHES[size], 0.15, [*paths, None, 7, "0" * 40]),
            lfs=one(None, 0.3, [SimpleNamespace(sha256=digest), SimpleNamespace(sha256=choose.choice(paths))]),
        )

    return SimpleNamespace(
        sha=one(COMMIT, 0.1, [*paths, None, 5]), siblings=[sibling(number) for number in range(choose.randint(1, 3))]
    )


def snapshot_of(tree: Path) -> dict[str, str]:
    return {str(path): path.read_text(encoding="utf-8") for path in tree.rglob("*")
            if path.name in ("x", "victim", "notes.txt") and path.is_file()
            and not path.is_symlink() and "out" not in path.parts}  # fmt: skip


@pytest.mark.parametrize("n_listings", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_listings_touch_nothing_outside_of_the_target(
    arena: Path, monkeypatch: pytest.MonkeyPatch, n_listings: int
) -> None:
    choose, before, n_whole, n_refused = random.Random(0), snapshot_of(arena.parent), 0, 0
    cache = arena / "cache" / "models--a--b"
    allowed = [arena / "out", cache / "blobs", cache / "snapshots", cache / "refs", arena / "cache" / ".locks"]
    made = [cache, cache.parent]  # mkdir with exist_ok asks for them again
    for folder in allowed:
        folder.mkdir(parents=True, exist_ok=True)
    file_download.are_symlinks_supported(str(cache))  # tries it once, in a folder of its own
    for number in range(n_listings):
        listing = generated(choose, arena)
        monkeypatch.setattr(hub_files, "_ask", lambda _, found=listing: found)
        target = None if number % 2 else arena / "out" / f"m{number}"
        if target:
            leftover = arena / "out" / f".m{number}.download"
            leftover.mkdir()
            (leftover / "link").symlink_to(arena.parent, target_is_directory=True)
        with watching() as paths:
            try:
                download.fetch(list_files(Repository("a/b"), ["*"]), target)
                n_whole += 1
            except OneCardError:
                n_refused += 1
        for path in map(Path, filter(lambda path: isinstance(path, (str, os.PathLike)), paths)):
            real = Path(os.path.realpath(path.parent)) / path.name
            assert any(real.is_relative_to(root) for root in allowed) or real in made, (number, str(path), listing)
        assert snapshot_of(arena.parent) == before, (number, listing)
    assert n_whole > n_listings / 10
    assert n_refused > n_listings / 10


@pytest.mark.parametrize("platform", ["win32", "darwin", "linux"])
def test_names_that_differ_in_case_only(arena: Path, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    names = ["README.md", "readme.md"]
    files = [SimpleNamespace(rfilename=name, size=3, blob_id=HASHES[3], lfs=None) for name in names]
    monkeypatch.setattr(hub_files, "_ask", lambda _: SimpleNamespace(sha=COMMIT, siblings=files))
    monkeypatch.setattr(hub_files, "sys", SimpleNamespace(platform=platform))
    if platform == "linux":
        assert [file.name for file in list_files(Repository("a/b")).files] == names
    else:
        with pytest.raises(ModelError, match="two files at readme"):
            list_files(Repository("a/b"))


def test_names_that_windows_reserves() -> None:
    reserved = ["con", "NUL.txt", "a/aux", "com1.json", "LPT9", "a:b", "a\\b", "a.", "a ", "C:x", "a?", "COM¹"]
    plain = ["config.json", "console.txt", "a/b.c", "com.json", "模型.json", "auxiliary", ".hidden", "[a] b.json"]
    assert [name for name in reserved if hub_files.is_file_name(name, on_windows=True)] == []
    assert [name for name in plain if not hub_files.is_file_name(name, on_windows=True)] == []
    assert [
        name for name in ("a\0b", "a\x1bb", "a" * 256, "模" * 86, "\ud800", "a\nb") if hub_files.is_file_name(name)
    ] == []
    assert hub_files.is_file_name("a:b", on_windows=False)


def test_a_listing_is_not_read_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub = Hub(files={f"{number}.json": b"x" for number in range(3000)})
    with serving(hub) as listed:
        repository = Repository("owner/tiny", endpoint=listed.address)
        assert len(list_files(repository).files) == 3000
        monkeypatch.setattr(hub_files, "MAX_LISTING_BYTES", 100_000)
        with pytest.raises(ModelError, match="a listing of more than"):
            list_files(repository)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"[]", b"{}", b"null", b"\xff", b'{"id": 7, "siblings": [{}]}'])
def test_a_listing_that_is_none(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(Hub(listing=body)) as listed, pytest.raises(ModelError, match=r"does not answer as a Hub|no hash"):
        list_files(Repository("owner/tiny", endpoint=listed.address))
