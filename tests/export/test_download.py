"""Downloads against a Hub on 127.0.0.1: chosen, resumed within a file, verified; every failure is one line."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from onecard.console import run_main
from onecard.export.hub import download
from onecard.export.hub import files as hub_files
from onecard.export.hub.files import choose
from onecard.programs import download as tool
from tests.export.hub_server import COMMIT, Hub, serving, sha256

WEIGHTS = random.Random(0).randbytes(1_000_000)
FILES = {
    "config.json": b'{"model_type": "llama"}', "tokenizer.model": b"pieces", "empty.txt": b"", ".gitattributes": b"x",
    "model.safetensors": WEIGHTS, "pytorch_model.bin": b"pickle" * 50, "original/consolidated.00.pth": b"p" * 300,
    "sub/[a] b.json": b"{}",
}  # fmt: skip
WANTED = {name: FILES[name] for name in ("config.json", "tokenizer.model", "empty.txt", "model.safetensors",
                                        "sub/[a] b.json")}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # tests/conftest.py says that there is no network
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_files, "WAIT_S", 0.01)
    with serving(Hub(dict(FILES))) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


class Tool:
    """The tool in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        self.capsys, self.target = capsys, tmp_path / "model"

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        code = run_main(lambda: tool.main(["--repo_id", "owner/tiny", *words]), debug=False)
        out, err = self.capsys.readouterr()
        return code, out, err

    def here(self, *words: str) -> tuple[int, str, str]:
        return self("--output_path", str(self.target), *words)

    def refused(self, words: str, *argv: str, code: int = 1) -> None:
        found, _, err = self.here(*argv)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert found == code, err
        assert len(lines) == 1, err
        assert words in lines[0]
        assert "not foreseen" not in err
        assert not self.target.exists()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Tool:
    return Tool(capsys, tmp_path)


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


# --- the good end ----------------------------------------------------------------------------------------------------


def test_a_plain_directory_holds_the_files_and_nothing_else(hub: Hub, run: Tool) -> None:
    code, out, err = run.here()
    assert (code, err) == (0, "")
    assert contents(run.target) == WANTED
    assert [path.name for path in run.target.parent.iterdir()] == ["model"]
    assert "5 files, 976.59 KiB; to fetch: 976.59 KiB; free there: " in out
    assert "left out: 3 files" in out
    assert COMMIT[:12] in out
    assert hub.address in out


def test_the_cache_is_where_the_hubs_library_looks(hub: Hub, run: Tool, tmp_path: Path) -> None:
    code, out, _ = run()
    assert code == 0
    snapshot = tmp_path / "cache" / "models--owner--tiny" / "snapshots" / COMMIT
    assert str(snapshot) in out
    assert contents(snapshot) == WANTED
    assert [hub.fetched(name) for name in ("config.json", "model.safetensors")] == [[""], [""]]
    found = snapshot_download("owner/tiny", local_files_only=True, allow_patterns=["*.json", "*.safetensors"])
    assert Path(found) == snapshot
    n_before = len(hub.fetched("model.safetensors"))
    code, out, _ = run()
    assert (code, len(hub.fetched("model.safetensors"))) == (0, n_before)
    assert "to fetch: 0 B" in out
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_what_the_hubs_library_downloaded_is_not_fetched_again(hub: Hub, run: Tool) -> None:
    snapshot_download("owner/tiny", endpoint=hub.address, allow_patterns=["model.safetensors"])
    assert len(hub.fetched("model.safetensors")) == 1
    assert run()[0] == 0
    assert len(hub.fetched("model.safetensors")) == 1


def test_a_dataset_comes_whole(hub: Hub, run: Tool) -> None:
    hub.repo, hub.files = (
        "datasets/owner/tiny",
        {"data/train.parquet": b"p" * 999, "README.md": b"r", "picture.png": b"i"},
    )
    code, _, err = run.here("--repo_type", "dataset")
    assert (code, err) == (0, "")
    assert contents(run.target) == hub.files
    assert run("--repo_type", "dataset")[0] == 0
    assert Path(snapshot_download("owner/tiny", repo_type="dataset", local_files_only=True)).is_dir()


def test_a_dry_run_fetches_and_writes_nothing(hub: Hub, run: Tool, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for words in ([], ["--output_path", str(run.target)]):
        code, out, _ = run("--dry_run", *words)
        assert code == 0
        for name in WANTED:
            assert name in out
    assert sorted(tmp_path.rglob("*")) == before
    assert {path for _, path, _ in hub.requests} == {"/api/models/owner/tiny/revision/main"}


def test_patterns_choose(hub: Hub, run: Tool) -> None:
    assert run.here("--include", "*.json, original/", "--exclude", "sub/*")[0] == 0
    assert sorted(contents(run.target)) == ["config.json", "original/consolidated.00.pth"]
    hub.files = {f"f{i}.json": b"x" * i for i in range(100)}
    code, out, _ = run.here("--overwrite")
    assert code == 0
    assert "... 60 smaller ones" in out
    assert len(contents(run.target)) == 100


def test_pickles_come_only_when_there_is_nothing_better_and_are_named(hub: Hub, run: Tool) -> None:
    del hub.files["model.safetensors"]
    hub.files["training_args.bin"] = b"code"
    code, _, err = run.here()
    assert code == 0
    assert "pickled, and so able to carry code: pytorch_model.bin." in err
    assert "pytorch_model.bin" in contents(run.target)
    assert "training_args.bin" not in contents(run.target)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a.safetensors b.bin c.gguf", "a.safetensors"),
        ("a.json b.bin c.gguf optimizer.bin", "a.json b.bin"),
        ("a.json c.gguf", "a.json c.gguf"),
        ("a.json consolidated.00.pth c.gguf", "a.json consolidated.00.pth"),
        ("model.safetensors consolidated.safetensors tekken.json", "model.safetensors tekken.json"),
        ("model.safetensors checkpoint-5/model.safetensors onnx/x.json x.png .hidden a/.b", "model.safetensors"),
        ("README.md strange.xyz x.py", "README.md strange.xyz x.py"),
    ],
)
def test_what_loading_needs_is_chosen(names: str, expected: str) -> None:
    assert choose(names.split(), "model", [], []) == set(expected.split())


# --- cut and resumed -------------------------------------------------------------------------------------------------


def test_a_cut_connection_goes_on_where_it_was_cut(hub: Hub, run: Tool) -> None:
    hub.cut_after_bytes["model.safetensors"] = [200_000, 0, 300_000]
    code, _, err = run.here()
    assert (code, err) == (0, "")
    assert contents(run.target) == WANTED
    assert hub.fetched("model.safetensors") == ["", "bytes=200000-", "bytes=200000-", "bytes=500000-"]


@pytest.mark.parametrize("into_cache", [False, True])
def test_the_next_start_goes_on_within_the_file(hub: Hub, run: Tool, into_cache: bool, tmp_path: Path) -> None:
    start = run if into_cache else run.here
    hub.cut_after_bytes["model.safetensors"] = [400_000] + [0] * 5
    code, _, err = start("--max_workers", "1")
    assert code == 1
    assert "does not answer" in err
    assert "the same command goes on" in err
    assert not run.target.exists()
    hub.requests.clear()
    code, out, err = start()
    assert (code, err) == (0, "")
    assert "to fetch: 585.9" in out
    assert hub.fetched("model.safetensors") == ["bytes=400000-"]
    found = tmp_path / "cache" / "models--owner--tiny" / "snapshots" / COMMIT if into_cache else run.target
    assert contents(found) == WANTED
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".incomplete", ".download", ".partial"))]


def test_a_killed_start_is_taken_up(hub: Hub, run: Tool, tmp_path: Path) -> None:
    hub.seconds_per_piece = 0.1
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    words = ["-m", "onecard", "download", "--repo_id", "owner/tiny", "--output_path", str(run.target)]
    for name in ("SIGKILL", "SIGINT"):
        with subprocess.Popen(
            [sys.executable, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as process:
            until_s = time.monotonic() + 30
            while not has_part(tmp_path, more_than=100_000 if name == "SIGKILL" else 300_000):
                assert time.monotonic() < until_s
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(getattr(signal, name))
            errors = process.communicate(timeout=20)[1].decode()
        assert process.returncode == (-9 if name == "SIGKILL" else 130)
        assert not run.target.exists()
    assert "the same command goes on from it" in errors
    assert "Traceback" not in errors
    hub.seconds_per_piece = 0
    assert run.here()[0] == 0
    spans = hub.fetched("model.safetensors")
    assert len(spans) == 3
    assert [int(span[6:-1] or 0) > least for span, least in zip(spans[1:], (100_000, 300_000), strict=True)] == [
        True
    ] * 2
    assert contents(run.target) == WANTED


def has_part(tmp_path: Path, more_than: int) -> bool:
    for path in tmp_path.glob(".model.download/.parts/*"):
        with contextlib.suppress(FileNotFoundError):  # a whole file leaves this folder at any time
            if path.stat().st_size > more_than:
                return True
    return False


def test_a_server_without_ranges_sends_all_again(hub: Hub, run: Tool) -> None:
    hub.knows_ranges = False
    hub.cut_after_bytes["model.safetensors"] = [400_000]
    assert run.here()[0] == 0
    assert contents(run.target) == WANTED


def test_a_passing_refusal_is_tried_again(hub: Hub, run: Tool) -> None:
    hub.status = {"model.safetensors": [503, 429], "config.json": [500]}
    assert run.here()[0] == 0
    assert contents(run.target) == WANTED
    hub.status = {"model.safetensors": [503] * 5}
    code, _, err = run.here("--overwrite")
    assert code == 1
    assert "503" in err
    assert contents(run.target) == WANTED


def test_another_repositorys_leftovers_do_not_come_along(hub: Hub, run: Tool) -> None:
    hub.cut_after_bytes["model.safetensors"] = [0] * 5
    hub.files["other.json"] = b"other"
    assert run.here("--max_workers", "1")[0] == 1
    kept = run.target.parent / ".model.download"
    (kept / "deep").mkdir(exist_ok=True)
    (kept / "deep" / "old.bin").write_bytes(b"old")
    (kept / "config.json").write_bytes(b'{"model_type": "other"}')
    del hub.files["other.json"]
    assert run.here()[0] == 0
    assert contents(run.target) == WANTED


def test_retry_after_is_waited_for_within_bounds(hub: Hub, run: Tool) -> None:
    hub.retry_after, hub.status = "1", {"config.json": [429], "tokenizer.model": [503]}
    began = time.monotonic()
    assert run.here()[0] == 0
    assert time.monotonic() - began >= 1
    assert contents(run.target) == WANTED


def test_a_listing_is_asked_for_again_when_retry_after_says(hub: Hub, run: Tool, monkeypatch: Any) -> None:
    slept: list[float] = []
    monkeypatch.setattr(hub_files, "time", SimpleNamespace(sleep=slept.append))
    hub.retry_after, hub.status = "7", {"": [429, 503]}
    assert run.here()[0] == 0
    assert slept == [7, 7]


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("7", 7, 7), ("0", 0.01, 0.01), ("999999999999", 60, 60), ("-5", 0.01, 0.01), ("nan", 0.01, 0.01),
     ("", 0.01, 0.01), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.01, 0.01), ("Fri, 31 Dec 9999 23:59:59 GMT", 60, 60),
     ("x" * 99, 0.01, 0.01)],
)  # fmt: skip
def test_what_retry_after_may_ask_for(monkeypatch: pytest.MonkeyPatch, asked: str, least: float, most: float) -> None:
    monkeypatch.setattr(hub_files, "WAIT_S", 0.01)
    refusal = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": asked}))
    assert least <= hub_files.wait_s(refusal) <= most


def test_a_listing_that_fails_is_asked_for_again(hub: Hub, run: Tool) -> None:
    hub.status = {"": [503, 429, 500]}
    assert run.here()[0] == 0
    assert contents(run.target) == WANTED
    hub.status = {"": [503] * 5}
    run.target = run.target.with_name("other")
    run.refused("503")
    assert hub.status == {"": []}


@pytest.mark.parametrize("start", [0, 300_000, 500_000])
def test_another_range_than_asked_for_is_not_appended(hub: Hub, run: Tool, start: int) -> None:
    hub.cut_after_bytes["model.safetensors"], hub.range_starts_at = [400_000], start
    assert run.here()[0] == 0
    assert contents(run.target) == WANTED
    assert hub.fetched("model.safetensors") == ["", "bytes=400000-", ""]


# --- wrong bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("into_cache", [False, True])
def test_a_corrupted_file_is_noticed_and_never_gets_its_name(
    hub: Hub, run: Tool, tmp_path: Path, name: str, into_cache: bool
) -> None:
    start = run if into_cache else run.here
    wrong = bytearray(hub.files[name])
    wrong[len(wrong) // 2] ^= 1
    hub.sent_instead[name] = bytes(wrong)
    code, _, err = start()
    assert code == 1
    assert f"{name} came with another content" in err
    assert bytes(wrong) not in contents(tmp_path).values()
    assert not run.target.exists()
    hub.sent_instead.clear()
    assert start()[0] == 0


def test_a_file_ends_where_the_listing_says(hub: Hub, run: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    is_right = download._is_right
    monkeypatch.setattr(
        download, "_is_right", lambda path, file: sizes.append(path.stat().st_size) or is_right(path, file)
    )
    hub.sent_instead["config.json"] = b"x" * 5_000_000
    run.refused("config.json came with another content", "--max_workers", "1")
    assert len(FILES["config.json"]) + 1 in sizes
    assert max(sizes) <= len(WEIGHTS)


def test_control_characters_of_a_mirror_do_not_reach_the_terminal(hub: Hub, run: Tool) -> None:
    hub.files["\x1b]0;owned\x07.json"] = b"{}"
    code, out, err = run.here()
    assert code == 1
    assert "\x1b" not in out + err
    assert "\\x1b]0;owned" in err
    assert "\\\\x1b" not in err  # escaped once
    del hub.files["\x1b]0;owned\x07.json"]
    hub.files["a\u202egnp.json"] = b"{}"
    code, out, err = run.here("--dry_run")
    assert code == 0
    assert "\u202e" not in out + err
    assert "a\\u202egnp.json" in out


def test_a_damaged_file_of_the_cache_is_mended(hub: Hub, run: Tool, tmp_path: Path) -> None:
    assert run()[0] == 0
    blob = tmp_path / "cache" / "models--owner--tiny" / "blobs" / sha256(WEIGHTS)
    blob.write_bytes(WEIGHTS[:-1] + b"x")
    assert run()[0] == 0
    assert blob.read_bytes() == WEIGHTS


def test_a_name_that_leads_outside_is_refused(hub: Hub, run: Tool, tmp_path: Path) -> None:
    for name in ("../evil.json", "/etc/evil.json", "a/../../evil.json"):
        hub.files[name] = b"evil"
        run.refused("outside of its directory")
        del hub.files[name]
    assert not list(tmp_path.rglob("*evil*"))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_each_mistake_is_one_line(hub: Hub, run: Tool) -> None:
    run.refused("has no model owner/absent (or it is private: set HF_TOKEN", "--repo_id", "owner/absent", code=2)
    run.refused("has no model a/b", "--repo_id", "a/b", code=2)
    run.refused("no branch, tag or commit nosuch", "--revision", "nosuch", code=2)
    run.refused("is no Hub id", "--repo_id", "a/b/c/d", code=2)
    run.refused("is no address", "--endpoint", "hf-mirror", code=2)
    run.refused("none is wanted; owner/tiny holds", "--include", "*.nothing", code=2)
    run.refused("--max_workers: 0 is not between", "--max_workers", "0", code=2)


def test_an_existing_directory_stays(hub: Hub, run: Tool) -> None:
    run.target.mkdir()
    (run.target / "mine").write_bytes(b"mine")
    code, _, err = run.here()
    assert code == 2
    assert "exists already" in err
    assert contents(run.target) == {"mine": b"mine"}
    assert run.here("--overwrite")[0] == 0
    assert contents(run.target) == WANTED


def test_a_gated_repository_names_the_remedy(hub: Hub, run: Tool) -> None:
    hub.gated = True
    run.refused(f"accept its terms at {hub.address}/owner/tiny, then set HF_TOKEN or run `hf auth login`")


def test_offline_mode_is_named(hub: Hub, run: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run.refused("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set")
    assert hub.requests == []


def test_a_mirror_that_is_not_there(hub: Hub, run: Tool) -> None:
    run.refused("http://127.0.0.1:9 does not answer", "--endpoint", "http://127.0.0.1:9")


def test_a_mirror_that_is_no_hub(hub: Hub, run: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "entry", lambda *_, **__: {"rfilename": "a"})
    run.refused("does not answer as a Hub does")


def test_a_stored_token_is_not_shown_to_a_mirror(hub: Hub, run: Tool, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "no-token").write_text("hf_stored", encoding="utf-8")
    assert run.here()[0] == 0
    assert hub.tokens == {""}
    monkeypatch.setenv("HF_TOKEN", "hf_typed")
    assert run.here("--overwrite")[0] == 0
    assert hub.tokens == {"", "Bearer hf_typed"}


def test_no_room_is_reported_before_anything_is_fetched(hub: Hub, run: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    run.refused("GiB free; make room")
    code, _, err = run()
    assert code == 1
    assert "GiB free; make room, or give --output_path" in err
    assert hub.fetched("model.safetensors") == []


def test_a_disk_that_fills_up_keeps_what_has_come(hub: Hub, run: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(_n_bytes: int) -> None:
        written.append(_n_bytes)
        if sum(written) > 300_000:
            raise OSError(28, "No space left on device")

    class Bar:
        def __enter__(self) -> Any:
            return full

        def __exit__(self, *_: object) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(download, "progress", lambda *_, **__: Bar())
        run.refused("make room, and the same command goes on", "--max_workers", "1")
    assert run.here()[0] == 0
    assert contents(run.target) == WANTED
    assert hub.fetched("model.safetensors")[-1].startswith("bytes=")


def test_two_at_once_are_reported(hub: Hub, run: Tool) -> None:
    hub.seconds_per_piece = 0.05
    first: list[Any] = []
    thread = threading.Thread(target=lambda: first.append(tool.main(["--repo_id", "owner/tiny"])))
    thread.start()
    while not hub.fetched("model.safetensors"):
        time.sleep(0.01)
    code, _, err = run()
    thread.join()
    assert first == [None]
    assert code == 2
    assert "is being downloaded by another process" in err
