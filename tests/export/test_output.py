"""Where an export is written: whatever happens on the way, its target is absent, whole, or what it was before."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.errors import ConfigError, ModelError
from onecard.export.io import output
from onecard.export.io.output import new_directory, new_file, parse_size

REPOSITORY = Path(__file__).resolve().parents[2]


def write(directory: Path, text: str = "new") -> None:
    (directory / "inner").mkdir()
    (directory / "weights").write_text(text, encoding="utf-8")
    (directory / "inner" / "more").write_text(text, encoding="utf-8")


def contents(directory: Path) -> dict[str, str]:
    """Every file below, hidden ones too, by its relative name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8") for path in files}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory that stands where the export shall go."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old", encoding="utf-8")
    return tmp_path / "model"


# --- the good end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "a/b/model", "模型 7B", "-x", "model.v1.safetensors", ".hidden", "*?[a]"])
def test_a_directory_appears_whole_and_alone(tmp_path: Path, name: str) -> None:
    with new_directory(tmp_path / name) as partial:
        write(partial)
        assert not (tmp_path / name).exists()
    assert contents(tmp_path) == {f"{name}/weights": "new", f"{name}/inner/more": "new"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_what_a_directory_lets_others_read_its_files_do_too(tmp_path: Path) -> None:
    with new_directory(tmp_path / "model") as partial:
        write(partial)
        (partial / "weights").chmod(0o600)  # as safetensors does
        expected = partial.stat().st_mode & 0o666
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == expected


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    with new_file(tmp_path / "sub" / "a.gguf") as partial:
        partial.write_text("new", encoding="utf-8")
        assert not (tmp_path / "sub" / "a.gguf").exists()
    assert contents(tmp_path) == {"sub/a.gguf": "new"}


def test_a_path_with_dots_is_what_it_means(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with new_directory(tmp_path / "a" / ".." / "b") as partial:
        write(partial)
    assert set(contents(tmp_path)) == {"b/weights", "b/inner/more"}
    with pytest.raises(ConfigError, match="exists already"), new_directory(tmp_path / "c" / ".."):
        pytest.fail("a directory with files in it was taken")
    assert not (tmp_path / "c").exists()


def test_an_empty_directory_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with new_directory(tmp_path / "model") as partial:
        write(partial)
    assert set(contents(tmp_path)) == {"model/weights", "model/inner/more"}


def test_overwrite_replaces_the_whole_directory(old: Path) -> None:
    (old / "leftover").write_text("old", encoding="utf-8")
    with new_directory(old, overwrite=True) as partial:
        write(partial)
        assert contents(old) == {"weights": "old", "leftover": "old"}
    assert contents(old.parent) == {"model/weights": "new", "model/inner/more": "new"}


def test_overwrite_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old", encoding="utf-8")
    with new_file(tmp_path / "a", overwrite=True) as partial:
        partial.write_text("new", encoding="utf-8")
    assert contents(tmp_path) == {"a": "new"}


def test_overwriting_a_link_leaves_alone_what_it_points_to(old: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old, target_is_directory=True)
    with new_directory(tmp_path / "link", overwrite=True) as partial:
        write(partial)
    assert not (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "link")["weights"] == "new"
    assert contents(old) == {"weights": "old"}


# --- refused before anything is written -----------------------------------------------------------------------------


def refused(place: Callable[[], contextlib.AbstractContextManager[Path]], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught, place():
        pytest.fail("the block must not run")
    assert caught.value.flag == "--output_path"


def test_what_exists_is_refused_without_overwrite(old: Path, tmp_path: Path) -> None:
    refused(lambda: new_directory(old), "exists already.*--overwrite")
    (tmp_path / "file").write_text("old", encoding="utf-8")
    refused(lambda: new_file(tmp_path / "file"), "exists already.*--overwrite")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    refused(lambda: new_directory(tmp_path / "nowhere"), "exists already")
    refused(lambda: new_file(tmp_path / "nowhere"), "exists already")
    assert contents(tmp_path) == {"model/weights": "old", "file": "old"}
    assert (tmp_path / "nowhere").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_place_for_a_directory_and_the_reverse(old: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("old", encoding="utf-8")
    refused(lambda: new_directory(tmp_path / "file", overwrite=overwrite), "is a file; give a directory")
    refused(lambda: new_file(old, overwrite=overwrite), "is a directory; give the name of a file")
    (old / "weights").unlink()
    refused(lambda: new_file(old, overwrite=overwrite), "is a directory; give the name of a file")
    assert contents(tmp_path) == {"file": "old"}


def test_a_dangling_link_can_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "absent")
    with new_directory(tmp_path / "model", overwrite=True) as partial:
        write(partial)
    assert set(contents(tmp_path)) == {"model/weights", "model/inner/more"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_input_is_never_the_target(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(old, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    targets = [old, tmp_path, old / ".." / "model", Path("model"), tmp_path / "link"]
    for target in targets:
        refused(lambda target=target: new_directory(target, overwrite=True, inputs=[old]), "is or holds what is read")
    refused(lambda: new_directory(old, overwrite=True, inputs=[tmp_path / "link" / "weights"]), "is or holds")
    refused(lambda: new_file(old / "weights", overwrite=True, inputs=[tmp_path / "link" / "weights"]), "is or holds")
    assert contents(old) == {"weights": "old"}
    assert len(targets) == 5


@pytest.mark.parametrize("target", ["", ".", "..", "/", "~"])
def test_the_working_directory_home_and_the_disk_are_never_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "user" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path / "user" / "work")
    refused(lambda: new_directory(Path(target), overwrite=True), "is or holds what is read|is a whole disk")
    assert contents(tmp_path) == {}


def test_too_little_room_is_reported_before_the_work(tmp_path: Path) -> None:
    refusal = pytest.raises(ModelError, match=r"needs about .* GiB free; make room")
    with refusal, new_directory(tmp_path / "model", needed_bytes=1 << 60):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be written"), new_directory(tmp_path / "file" / "model"):
        pytest.fail("the block must not run")


# --- ends half-way ---------------------------------------------------------------------------------------------------


class Mishap(Exception):
    """Any error that nobody foresaw."""


@pytest.mark.parametrize("mishap", [Mishap("x"), KeyboardInterrupt(), SystemExit(3), ConfigError("--x", "y")])
def test_an_error_in_the_block_leaves_what_was_there(old: Path, mishap: BaseException) -> None:
    with pytest.raises(type(mishap)), new_directory(old, overwrite=True) as partial:
        write(partial)
        raise mishap
    assert contents(old.parent) == {"model/weights": "old"}
    with pytest.raises(type(mishap)), new_file(old.parent / "absent") as partial:
        partial.write_text("half", encoding="utf-8")
        raise mishap
    assert contents(old.parent) == {"model/weights": "old"}


@pytest.mark.parametrize("mishap", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_error_between_the_two_renames_brings_the_old_one_back(
    old: Path, monkeypatch: pytest.MonkeyPatch, mishap: BaseException
) -> None:
    moved = []

    def stumble(source: Path, target: Path) -> None:
        moved.append(source.name)
        if len(moved) == 2:
            raise mishap
        source.replace(target)

    monkeypatch.setattr(output, "move", stumble)
    expected = KeyboardInterrupt if isinstance(mishap, KeyboardInterrupt) else ModelError
    with pytest.raises(expected), new_directory(old, overwrite=True) as partial:
        write(partial)
    assert moved[:2] == ["model", ".model.partial"]
    assert contents(old.parent) == {"model/weights": "old"}


def test_a_kill_between_the_two_renames_is_mended_by_the_next_start(old: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from onecard.export.io import output
target = Path(sys.argv[1])
moves = []
def move(source, to):
    moves.append(source)
    if len(moves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    source.replace(to)
output.move = move
with output.new_directory(target, overwrite=True) as partial:
    (partial / "weights").write_text("new")
"""
    done = subprocess.run([sys.executable, "-c", program, str(old)], cwd=REPOSITORY)
    assert done.returncode == -9
    assert set(contents(old.parent)) == {".model.old/weights", ".model.partial/weights", ".model.lock"}
    with pytest.raises(ConfigError, match="exists already"), new_directory(old):
        pytest.fail("the block must not run")
    assert contents(old.parent) == {"model/weights": "old"}
    with new_directory(old, overwrite=True) as partial:
        assert list(partial.iterdir()) == []
        (partial / "weights").write_text("third", encoding="utf-8")
    assert contents(old.parent) == {"model/weights": "third"}


def test_a_kill_after_both_renames_is_tidied_by_the_next_start(old: Path) -> None:
    (old.parent / ".model.old").mkdir()
    (old.parent / ".model.old" / "weights").write_text("older", encoding="utf-8")
    refused(lambda: new_directory(old), "exists already")
    assert contents(old.parent) == {"model/weights": "old"}


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_a_stale_partial_is_in_nobodys_way(old: Path, kind: str) -> None:
    target, partial = old.parent / "new", old.parent / ".new.partial"
    if kind == "directory":
        write_into = partial
        write_into.mkdir()
        write(write_into, "stale")
    elif kind == "file":
        partial.write_text("stale", encoding="utf-8")
    else:
        partial.symlink_to(old, target_is_directory=True)
    with new_directory(target) as fresh:
        assert list(fresh.iterdir()) == []
        (fresh / "weights").write_text("new", encoding="utf-8")
    assert contents(old.parent) == {"model/weights": "old", "new/weights": "new"}


def test_a_second_process_is_told_to_wait(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from types import SimpleNamespace
from onecard.export.io.output import new_directory
with new_directory(Path(sys.argv[1])) as partial:
    print("inside", flush=True)
    sys.stdin.readline()
    (partial / "weights").write_text("first")
"""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "model")], cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True
    ) as first:
        assert first.stdin
        assert first.stdout
        assert first.stdout.readline() == "inside\n"
        refused(lambda: new_directory(tmp_path / "model", overwrite=True), "written by another process; wait")
        assert (tmp_path / ".model.partial").is_dir()  # and the first one's work is untouched
        first.stdin.write("\n")
        first.stdin.close()
        assert first.wait() == 0
    assert contents(tmp_path) == {"model/weights": "first"}


def test_what_cannot_be_read_meanwhile_is_named(tmp_path: Path) -> None:
    refusal = pytest.raises(ModelError, match=r"model cannot be written: No such file .*absent\.json")
    with refusal, new_directory(tmp_path / "model"):
        (tmp_path / "absent.json").read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == []


def test_an_explained_error_stays_as_it_was_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^shapes differ$"), new_directory(tmp_path / "model"):
        raise ModelError("shapes differ")


# --- disks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(at: Path, options: str) -> Iterator[Path]:
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    done = subprocess.run(command, capture_output=True, text=True) if is_root else None
    if done is None or done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip() if done else 'needs root'}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with small_disk(tmp_path / "disk", "size=256k") as disk:
        (disk / "model").mkdir()
        (disk / "model" / "weights").write_text("old", encoding="utf-8")
        refusal = r"no room for .* make room and start again"
        with pytest.raises(ModelError, match=refusal), new_directory(disk / "model", overwrite=True) as partial:
            (partial / "weights").write_bytes(bytes(1 << 20))
        # The library that writes tensors says it in its own words, and not as an OSError.
        with pytest.raises(ModelError, match=refusal), new_directory(disk / "model", overwrite=True) as partial:
            save_file({"x": torch.zeros(1 << 18)}, partial / "model.safetensors")
        assert contents(disk) == {"model/weights": "old"}


def test_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=256k,ro") as disk:
        for target in (disk / "model", disk / "sub" / "model"):
            with pytest.raises(ModelError, match=r"no room for .*Read-only file system"), new_directory(target):
                pytest.fail("the block must not run")


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9), ("5gb", 5 * 10**9), (" 500 MB ", 5 * 10**8), ("2GiB", 2**31), ("1.1GB", 1_100_000_000),
        ("4.35TB", 4_350_000_000_000), ("10", 10), ("10B", 10), ("1K", 1000), ("1KiB", 1024), ("0.5KB", 500),
    ],
)  # fmt: skip
def test_sizes_are_exact(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "0GB", "0.4B", "5 GBB", "five GB", "1e9", "5,000", "nan", "5GB 1"]
)
def test_no_size_is_refused_by_its_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like 5GB") as caught:
        parse_size(text)
    assert caught.value.flag == "--max_shard_size"


@given(st.text(alphabet="0123456789.kKMGTiBb \t-+e９", max_size=12) | st.from_regex(r"\A\d{300,400}TB\Z"))
def test_any_text_is_a_size_or_a_refusal(text: str) -> None:
    try:
        assert parse_size(text) >= 1
    except ConfigError as reason:
        assert "--max_shard_size" in str(reason)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_takes_no_files_is_not_called_busy() -> None:
    with pytest.raises(ModelError, match="its folder takes no files"), new_directory(Path("/proc/target")):
        pass


def test_progress_in_a_log_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    library = io.StringIO()
    with output.progress("quantising layers", 8) as move_on, contextlib.redirect_stdout(library):
        for _ in range(8):
            move_on(1)
    with output.progress("merging", 3 * 2**30, in_bytes=True) as move_on:
        move_on(2**29)
        move_on(2**30)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["quantising layers: 2 of 8", "quantising layers: 4 of 8"] and not library.getvalue()
    assert said[-1] == "merging: 1.50 of 3.00 GiB" and len(said) == 5
