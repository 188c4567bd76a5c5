"""Checkpoints: whole or not at all, whatever happens to the process, the disk or the bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onecard import manifest
from onecard.errors import CheckpointError, ModelError
from onecard.train.checkpoint import CheckpointStore, verify

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "deep/er.bin")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
needs_linux_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux"
)


def writer(mark: str) -> Callable[[Path], None]:
    """A `write` whose files all carry `mark`, so that a mixture of two saves would show."""

    def write(directory: Path) -> None:
        for name in FILES:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(f"{name} {mark} ".encode() * 200)

    return write


def blob(size_bytes: int) -> Callable[[Path], None]:
    """A `write` of one file of so many bytes."""

    def write(directory: Path) -> None:
        (directory / "a").write_bytes(bytes(size_bytes))

    return write


def mark_of(directory: Path) -> str:
    """The one mark that all files of a checkpoint carry."""
    marks = {(directory / name).read_bytes().split()[1].decode() for name in FILES}
    assert len(marks) == 1, f"{directory} is a mixture of {marks}"
    return marks.pop()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def saved(run_dir: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(run_dir)
    for step in steps:
        store.save(step, writer(f"s{step}"), keep_last=99)
    return store


# --- saving and finding ----------------------------------------------------------------------------------------------


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    path = store.save(12, writer("a"))
    assert path == tmp_path / "run" / "checkpoint-12"
    found = store.newest_whole()
    assert found is not None and (found.path, found.step, found.skipped) == (path, 12, [])
    assert mark_of(path) == "a"
    listed = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert sorted(listed) == sorted(FILES)
    assert listed["optimizer.pt"]["bytes"] == (path / "optimizer.pt").stat().st_size
    assert names(tmp_path / "run") == ["checkpoint-12"]


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "never").newest_whole() is None
    (tmp_path / "log.jsonl").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    assert CheckpointStore(tmp_path).newest_whole() is None


def test_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    found = saved(tmp_path, 9, 10, 100, 99).newest_whole()
    assert found is not None and found.step == 100


def test_extra_files_do_no_harm(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (tmp_path / "checkpoint-1" / ".DS_Store").write_bytes(b"x")
    found = store.newest_whole()
    assert found is not None and found.skipped == []


def test_importing_the_store_imports_no_torch() -> None:
    modules = "onecard.train.checkpoint, onecard.train.signals, onecard.train.run_lock"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero_tail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path: Path) -> None:
    path.unlink()


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (truncate, empty, zero_tail, flip_bit, remove, make_directory)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_checkpoint_is_never_taken(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    store = saved(tmp_path, 1, 2)
    damage(tmp_path / "checkpoint-2" / name)
    found = store.newest_whole()
    assert found is not None and found.step == 1
    assert [aside for aside, _ in found.skipped] == ["checkpoint-2.broken"]
    assert name in found.skipped[0][1], found.skipped
    is_gone = damage is remove or (damage is make_directory and name != "manifest.json")
    assert ("is missing" in found.skipped[0][1]) == is_gone
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2.broken"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"files": []}', '{"format": 1, "files": {}}', "\x00" * 50, "[" * 100000]
)
def test_a_garbage_manifest_is_never_taken(tmp_path: Path, content: str) -> None:
    store = saved(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2" / "manifest.json").write_text(content, encoding="utf-8")
    found = store.newest_whole()
    assert found is not None and found.step == 1 and "manifest.json" in found.skipped[0][1]


def test_an_honest_manifest_of_nothing_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    manifest.write_manifest(tmp_path / "checkpoint-2" / "manifest.json", {})
    assert verify(tmp_path / "checkpoint-2") == ["manifest.json lists no files"]


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        for rank in range(4):  # names one bit apart: a flip must not let one pass for the other
            (directory / f"r{rank}").write_bytes(b"same")

    CheckpointStore(tmp_path).save(1, write)
    path = tmp_path / "checkpoint-1" / "manifest.json"
    whole, expected = path.read_bytes(), manifest.read_manifest(path.parent)
    n_flips = n_seen = 0
    for place in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            path.write_bytes(bytes(content))
            n_flips += 1
            try:
                assert manifest.read_manifest(path.parent) == expected  # white space only
            except manifest.ManifestError:
                n_seen += 1
    assert n_flips == 8 * len(whole) > 3000
    assert n_seen > 0.7 * n_flips


def test_empty_directory_and_file_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-3").write_text("not a directory")
    found = store.newest_whole()
    assert found is not None and found.step == 1
    assert [name for name, _ in found.skipped] == ["checkpoint-3.broken", "checkpoint-2.broken"]


def test_broken_ones_get_names_of_their_own(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    for expected in ("checkpoint-2.broken", "checkpoint-2.broken-2", "checkpoint-2.broken-3"):
        (tmp_path / "checkpoint-2").mkdir()
        found = store.newest_whole()
        assert found is not None and [name for name, _ in found.skipped] == [expected]


def test_all_broken_is_an_error_every_time(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    truncate(tmp_path / "checkpoint-1" / "optimizer.pt")
    remove(tmp_path / "checkpoint-2" / "manifest.json")
    for _ in range(2):  # the second start must not begin from zero either
        with pytest.raises(CheckpointError) as caught:
            store.newest_whole()
        text = str(caught.value)
        assert "checkpoint-1: optimizer.pt has" in text and "checkpoint-2: manifest.json is missing" in text
        assert "another --output_path" in text
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_only_broken_ones_of_earlier_starts_is_an_error(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    truncate(tmp_path / "checkpoint-2" / "optimizer.pt")
    store.newest_whole()
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"checkpoint-2\.broken"):
        store.newest_whole()


def test_verify_of_older_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    assert verify(old, require_manifest=False) == ["does not exist"]
    old.mkdir()
    assert verify(old, require_manifest=False) == ["holds no files"]
    (old / "pytorch_model.bin").write_bytes(b"x")
    assert verify(old) == ["manifest.json is missing, so it was never finished"]
    assert verify(old, require_manifest=False) == []
    assert "older layout" in capsys.readouterr().err
    (old / "optimizer.pt").write_bytes(b"")
    assert verify(old, require_manifest=False) == ["optimizer.pt is empty"]
    path = CheckpointStore(tmp_path).save(1, writer("a"))
    flip_bit(path / "optimizer.pt")  # where there is a manifest, it counts
    assert verify(path, require_manifest=False) == ["optimizer.pt has changed since it was written (SHA-256 differs)"]


# --- rotation --------------------------------------------------------------------------------------------------------


def test_the_last_two_and_the_best_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 8):
        store.save(step, writer(f"s{step}"), best_steps=[3 if step >= 3 else None], keep_last=0)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    store.save(8, writer("s8"), best_steps=[8], keep_last=3)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-7", "checkpoint-8"]


def test_a_broken_one_is_no_reserve(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3)
    truncate(tmp_path / "checkpoint-3" / "optimizer.pt")
    store.save(4, writer("s4"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_the_one_just_saved_stays_below_newer_ones(tmp_path: Path) -> None:
    store = saved(tmp_path, 10, 11, 12)
    store.save(5, writer("s5"))
    assert names(tmp_path) == ["checkpoint-11", "checkpoint-12", "checkpoint-5"]


def test_newer_ones_are_set_aside_for_a_run_that_starts_below(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3)
    assert store.set_aside_newer(1) == ["checkpoint-2.abandoned", "checkpoint-3.abandoned"]
    found = store.newest_whole()
    assert found is not None and (found.step, found.skipped) == (1, [])
    assert verify(tmp_path / "checkpoint-3.abandoned") == []


def test_nothing_is_removed_before_the_new_one_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(tmp_path, 1, 2, 3)
    honest = manifest.seal

    def seal_then_rot(directory: Path) -> None:
        honest(directory)
        flip_bit(directory / "optimizer.pt")

    monkeypatch.setattr(manifest, "seal", seal_then_rot)
    with pytest.raises(CheckpointError, match=r"reads back differently: optimizer\.pt"):
        store.save(4, writer("s4"))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4.broken"]
    with pytest.raises(CheckpointError, match="reads back differently"):
        store.save(3, writer("again"))
    assert mark_of(tmp_path / "checkpoint-3") == "s3" and verify(tmp_path / "checkpoint-3") == []


# --- errors while saving ---------------------------------------------------------------------------------------------


def test_an_error_of_the_writer_passes_and_leaves_nothing(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)

    def write(directory: Path) -> None:
        writer("x")(directory)
        raise ModelError("the adapter is not finite")

    for save in (lambda: store.save(2, write), lambda: store.save(1, write), lambda: store.publish(write)):
        with pytest.raises(ModelError):
            save()
        assert names(tmp_path) == ["checkpoint-1"] and mark_of(tmp_path / "checkpoint-1") == "s1"


DISK_FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EFBIG, "File too large"),
    OSError(errno.ENOSPC, "磁盘已满"),  # the words follow the language, the number does not
    OSError(errno.EROFS, "Read-only file system"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
)


@pytest.mark.parametrize("reason", DISK_FULL, ids=str)
def test_disk_full_in_every_wording(tmp_path: Path, reason: Exception) -> None:
    store = saved(tmp_path, 1)

    def write(directory: Path) -> None:
        (directory / "a").write_bytes(b"x")
        raise reason

    with pytest.raises(CheckpointError, match="checkpoint-2 could not be saved") as caught:
        store.save(2, write)
    assert caught.value.disk_full
    assert names(tmp_path) == ["checkpoint-1"]


def test_another_disk_error_is_not_called_full(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        CheckpointStore(tmp_path).save(1, write)
    assert not caught.value.disk_full and names(tmp_path) == []


@contextlib.contextmanager
def small_disk(at: Path, options: str) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@needs_linux_root
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=200k"):
        store = saved(disk, 1)
        n_refused = 0
        for size_bytes in (190_000, 199_000, 1_000_000):
            with pytest.raises(CheckpointError) as caught:
                store.save(2, blob(size_bytes))
            n_refused += caught.value.disk_full
            assert names(disk) == ["checkpoint-1"]
        assert n_refused == 3
        with pytest.raises(CheckpointError):
            store.publish(blob(1_000_000))
        store.save(2, writer("s2"))  # and it goes on once there is room
        found = store.newest_whole()
        assert found is not None and found.step == 2


@needs_linux_root
def test_a_read_only_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=1m"):
        store = saved(disk, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match="Read-only") as caught:
            store.save(2, writer("s2"))
        assert caught.value.disk_full and names(disk) == ["checkpoint-1"]


@needs_fork
def test_a_file_size_limit(tmp_path: Path) -> None:
    import resource

    def child() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            CheckpointStore(tmp_path).save(2, blob(60_000))
        except CheckpointError as reason:
            return 7 if reason.disk_full else 8
        return 9

    saved(tmp_path, 1)
    assert in_child(child) == 7
    assert names(tmp_path) == ["checkpoint-1"]


# --- kills -----------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], int]) -> int:
    """Exit code of `work` run in a forked child."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


TOUCHES_DISK = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def die_at(nth: int) -> None:
    """End this process in front of its `nth` disk operation from now (0 is the first)."""
    left = [nth]

    def hook(event: str, _: object) -> None:
        if event in TOUCHES_DISK:
            left[0] -= 1
            if left[0] < 0:
                os._exit(55)

    sys.addaudithook(hook)


def kill_everywhere(prepare: Callable[[], None], work: Callable[[], object], check: Callable[[], None]) -> int:
    """Run `work` again and again, dying in front of each of its disk operations in turn; returns how many there are."""
    for nth in range(1000):
        prepare()

        def child(nth: int = nth) -> int:
            die_at(nth)
            work()
            return 0

        code = in_child(child)
        assert code in (0, 55)
        check()
        if code == 0:
            return nth
    raise AssertionError("it never came to an end")


@needs_fork
def test_killed_at_any_disk_operation_of_a_save(tmp_path: Path) -> None:
    store, seen = CheckpointStore(tmp_path), set()

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        saved(tmp_path, 1, 2)

    def check() -> None:
        found = store.newest_whole()
        assert found is not None and found.skipped == []
        assert mark_of(found.path) == f"s{found.step}"
        assert [verify(path) for path in tmp_path.glob("checkpoint-*") if verify(path)] == []  # none half-removed
        seen.add(found.step)
        assert [name for name in names(tmp_path) if name.startswith(".")] == []
        assert names(tmp_path) in (
            ["checkpoint-1", "checkpoint-2"],
            ["checkpoint-1", "checkpoint-2", "checkpoint-3"],
            ["checkpoint-2", "checkpoint-3"],
        )

    n_points = kill_everywhere(prepare, lambda: store.save(3, writer("s3")), check)
    assert n_points > 30 and seen == {2, 3}


@needs_fork
def test_killed_at_any_disk_operation_of_saving_a_step_again(tmp_path: Path) -> None:
    store, seen = CheckpointStore(tmp_path), set()

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        saved(tmp_path, 1, 2)

    def check() -> None:
        found = store.newest_whole()
        assert found is not None and (found.step, found.skipped) == (2, [])  # old or new, but step 2
        seen.add(mark_of(found.path))
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]

    n_points = kill_everywhere(prepare, lambda: store.save(2, writer("new")), check)
    assert n_points > 30 and seen == {"s2", "new"}


@needs_fork
def test_killed_at_any_disk_operation_of_the_recovery(tmp_path: Path) -> None:
    """A run killed while it cleans up after a kill loses nothing either."""
    store, n_rounds = CheckpointStore(tmp_path), 0

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        saved(tmp_path, 1, 2)
        (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.replaced-4711")
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
        flip_bit(tmp_path / "checkpoint-2" / "optimizer.pt")
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-3.partial-4711")
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-0.deleted-4711")

    def check() -> None:
        nonlocal n_rounds
        n_rounds += 1
        found = store.newest_whole()
        assert found is not None and found.step == 2 and mark_of(found.path) == "s2"
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-2.broken"]

    assert kill_everywhere(prepare, store.newest_whole, check) > 15
    assert n_rounds > 15


@needs_fork
def test_killed_at_any_disk_operation_of_publishing(tmp_path: Path) -> None:
    """The final files are old, new, or a mixture that `verify` tells; publishing again mends it."""
    store, states = CheckpointStore(tmp_path), set()

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        (tmp_path / "log.jsonl").write_text("{}")
        store.publish(writer("old"))

    def check() -> None:
        if verify(tmp_path):
            states.add("mixture")
            with pytest.raises(AssertionError, match="mixture"):
                mark_of(tmp_path)
                raise AssertionError("mixture of files and manifest")
        else:
            states.add(mark_of(tmp_path))
        store.tidy()
        store.publish(writer("new"))
        assert verify(tmp_path) == [] and mark_of(tmp_path) == "new"
        assert names(tmp_path) == sorted([*(name.split("/")[0] for name in FILES), "log.jsonl", "manifest.json"])

    assert kill_everywhere(prepare, lambda: store.publish(writer("new")), check) > 20
    assert states == {"old", "mixture", "new"}


def test_a_file_that_a_killed_process_had_not_put_in_place_is_removed(tmp_path: Path) -> None:
    """Not that of a process that is at work, such as the studio beside the run."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for number in (gone.pid, os.getpid(), os.getppid()):
        (tmp_path / f".log.jsonl.{number}.partial").write_text("{")
    CheckpointStore(tmp_path).tidy()
    assert names(tmp_path) == [f".log.jsonl.{os.getppid()}.partial"]


DRIVER = """
import sys
from pathlib import Path
from onecard.train.checkpoint import CheckpointStore
from onecard.train.run_lock import RunLock

run = Path(sys.argv[1])
with RunLock(run):
    store = CheckpointStore(run)
    found = store.newest_whole()
    step = found.step if found else 0
    print("from", step, flush=True)
    while True:
        step += 1
        def write(directory):
            for name in ("a.bin", "b.bin", "c.bin"):
                (directory / name).write_bytes(f"{step:08d}".encode() * 25_000)
        store.save(step, write, best_steps=[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    seed = int(os.environ.get("ONECARD_KILL_SEED", "20261120"))
    n_kills, moments, newest = 30, random.Random(seed), 0
    for n_kill in range(n_kills):
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == f"from {newest}\n", f"seed {seed}, after kill {n_kill}"
        delay_s = moments.uniform(0, 0.12)
        time.sleep(delay_s)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        print(f"seed {seed} kill {n_kill} after {delay_s * 1000:.1f} ms at step {newest}: {names(tmp_path)}")
        found = CheckpointStore(tmp_path).newest_whole()
        step = found.step if found else 0
        assert step >= newest
        if found:
            assert found.skipped == [] and verify(found.path) == []
            assert (found.path / "c.bin").read_bytes()[:8] == f"{step:08d}".encode()
            assert step == 1 or (tmp_path / "checkpoint-1").is_dir()
        newest = step
    assert newest > n_kills / 2, "it was killed before it did anything"
    assert [name for name in names(tmp_path) if "broken" in name] == []
