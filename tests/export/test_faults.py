"""Every tool that writes: killed at many of its disk operations, out of room, pointed at something broken.

The rule is the same for all: the target is absent, or what it was before, or whole; started again, the tool succeeds;
bad input is one clear line and an exit code that is not 0. "Whole" means: the same bytes as an undisturbed start wrote.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import deserialize

from tests.export.cases import BAD_INPUTS, CASES, BadInput, Case, Inputs, make_inputs
from tests.faults.fork_server import ForkServer

GPTQ = {"quantize_gptq": [pytest.mark.gptq]}
EVERY_CASE = [pytest.param(case, id=case.name, marks=GPTQ.get(case.tool, [])) for case in CASES]
EVERY_BAD_INPUT = [pytest.param(bad, id=bad.name, marks=GPTQ.get(bad.tool, [])) for bad in BAD_INPUTS]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@dataclass
class Undisturbed:
    """What a start that nothing disturbed wrote, and in how many disk operations."""

    digest: str
    n_operations: int
    largest_file_bytes: int


_undisturbed: dict[str, Undisturbed] = {}


def digest_of(target: Path) -> str:
    """SHA-256 over names and bytes of all files in a directory."""
    digest = hashlib.sha256()
    files = sorted(path for path in target.rglob("*") if path.is_file())
    assert files, f"{target} holds nothing"
    for file in files:
        # Of tensors names and bits count, not the order in which they were written.
        content = tensors_of(file) if file.suffix == ".safetensors" else file.read_bytes()
        if file.suffix in (".md", ".sh", ".yaml", ".json"):  # commands name the directory that they stand in
            content = content.replace(str(target.absolute()).encode(), b"TARGET")
        digest.update(file.relative_to(target).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


def tensors_of(file: Path) -> bytes:
    return b"".join(name.encode() + tensor for name, tensor in sorted(dict(deserialize_file(file)).items()))


def deserialize_file(file: Path) -> list[tuple[str, bytes]]:
    return [(name, bytes(entry["data"])) for name, entry in deserialize(file.read_bytes())]


def left_in(room: Path, case: Case) -> list[str]:
    """What lies in `room`; quantize_gptq keeps the layers that it has done, on purpose, for the next start."""
    kept = {f".{case.target}.layers"} if case.tool == "quantize_gptq" else set()
    return sorted({path.name for path in room.iterdir()} - kept)


def start(fork_server: ForkServer, case: Case, inputs: Inputs, room: Path, **more: int) -> tuple[int, str]:
    """Run a case's tool with its target in `room`; the exit code and what was printed."""
    started = fork_server.start_tool(case.tool, case.words(inputs, room / case.target), watched=room, **more)
    code = started.wait()
    return code, started.output()


def undisturbed(fork_server: ForkServer, case: Case, inputs: Inputs, room: Path) -> Undisturbed:
    if case.name not in _undisturbed:
        room.mkdir()
        code, printed = start(fork_server, case, inputs, room)
        assert code == 0, printed
        target = room / case.target
        files = [path for path in target.rglob("*") if path.is_file()]
        n_operations = int(re.findall(r"(\d+) operations", printed)[-1])
        largest = max(path.stat().st_size for path in files)
        _undisturbed[case.name] = Undisturbed(digest_of(target), n_operations, largest)
    return _undisturbed[case.name]


def kill_points(n_operations: int, *, few: bool) -> list[int]:
    """Where to kill: the first operations, some in the middle, and all of the last, where names are given."""
    middle = {1 + i * n_operations // 5 for i in range(5)}
    last = set(range(max(1, n_operations - 8), n_operations + 1))
    return [n_operations // 2, n_operations - 4] if few else sorted(middle | last)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_killed_half_way(case: Case, fork_server: ForkServer, inputs: Inputs, tmp_path: Path) -> None:
    expected = undisturbed(fork_server, case, inputs, tmp_path / "undisturbed")
    room = tmp_path / "room"
    room.mkdir()
    n_absent = n_killed = 0
    for kill_at in kill_points(expected.n_operations, few=case.takes_long):
        shutil.rmtree(room / f".{case.target}.layers", ignore_errors=True)  # else less and less is left to do
        code, printed = start(fork_server, case, inputs, room, kill_at=kill_at)
        assert code == -9, f"not killed at operation {kill_at}:\n{printed}"
        n_killed += 1
        target = room / case.target
        if target.exists():
            assert digest_of(target) == expected.digest, f"killed at {kill_at}: neither absent nor whole"
            shutil.rmtree(target)
        else:
            n_absent += 1
    assert n_killed >= (2 if case.takes_long else 8)
    assert n_absent >= (2 if case.takes_long else 4)
    code, printed = start(fork_server, case, inputs, room)
    assert code == 0, printed
    assert digest_of(room / case.target) == expected.digest
    assert [path.name for path in room.iterdir()] == [case.target], "something was left behind"


@pytest.mark.parametrize("case", EVERY_CASE)
def test_what_stands_there_is_kept_or_replaced_whole(
    case: Case, fork_server: ForkServer, inputs: Inputs, tmp_path: Path
) -> None:  # fmt: skip
    expected = undisturbed(fork_server, case, inputs, tmp_path / "undisturbed")
    room = tmp_path / "room"
    target = room / case.target
    target.mkdir(parents=True)
    (target / "old.txt").write_text("old", encoding="utf-8")
    before = digest_of(target)

    code, printed = start(fork_server, case, inputs, room)
    assert code == 2
    assert "--overwrite" in printed and "exists already" in printed
    assert digest_of(target) == before

    replacing = Case(**{**vars(case), "words": lambda inputs, target: [*case.words(inputs, target), "--overwrite"]})
    n_killed = n_whole = 0
    points = range(max(1, expected.n_operations - 3), expected.n_operations + 3)
    for kill_at in points[2:3] if case.takes_long else points:
        code, printed = start(fork_server, replacing, inputs, room, kill_at=kill_at)
        n_killed += code == -9
        # Between the two renames neither has the name; the next start puts the old one back.
        if target.exists():
            n_whole += digest_of(target) in (before, expected.digest)
            assert digest_of(target) in (before, expected.digest)
    assert n_killed >= (1 if case.takes_long else 3)
    assert n_whole >= (0 if case.takes_long else 2)
    code, printed = start(fork_server, replacing, inputs, room)
    assert code == 0, printed
    assert digest_of(target) == expected.digest
    assert [path.name for path in room.iterdir()] == [case.target]


@pytest.mark.parametrize("case", EVERY_CASE)
def test_control_c_leaves_nothing(case: Case, fork_server: ForkServer, inputs: Inputs, tmp_path: Path) -> None:
    expected = undisturbed(fork_server, case, inputs, tmp_path / "undisturbed")
    room = tmp_path / "room"
    room.mkdir()
    kill_at = expected.n_operations // (4 if case.takes_long else 2)
    code, printed = start(fork_server, case, inputs, room, kill_at=kill_at, kill_with=signal.SIGINT)
    assert code == 130, printed
    kept = [line for line in printed.splitlines() if line.startswith("warning: stopped; the layers done are in")]
    assert kept or "error: interrupted: nothing unfinished was kept" in printed.splitlines()
    assert "Traceback" not in printed
    assert left_in(room, case) == [], "something was left behind"


@pytest.mark.parametrize("case", EVERY_CASE)
def test_no_room(case: Case, fork_server: ForkServer, inputs: Inputs, tmp_path: Path) -> None:
    """A file that may not grow to its full size stands for a disk that fills up on the way."""
    expected = undisturbed(fork_server, case, inputs, tmp_path / "undisturbed")
    room = tmp_path / "room"
    room.mkdir()
    code, printed = start(fork_server, case, inputs, room, file_limit_bytes=expected.largest_file_bytes // 2)
    assert code == 1, printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no room for" in errors[0], printed
    assert "Traceback" not in printed
    assert left_in(room, case) == [], "something was left behind"


@pytest.mark.parametrize("bad", EVERY_BAD_INPUT)
def test_bad_input_is_one_clear_line(
    bad: BadInput, fork_server: ForkServer, inputs: Inputs, tmp_path: Path
) -> None:  # fmt: skip
    room, scratch = tmp_path / "room", tmp_path / "scratch"
    room.mkdir()
    scratch.mkdir()
    started = fork_server.start_tool(bad.tool, bad.words(inputs, scratch, room / "target"), watched=room)
    code, printed = started.wait(), started.output()
    assert code in (1, 2), printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert re.search(bad.says, errors[0]), errors[0]
    assert "Traceback" not in printed and "not foreseen" not in printed
    assert list(room.iterdir()) == [], "something was left behind"
    assert not (scratch / "code-ran").exists(), "code inside a file was run"


def test_a_killed_list_of_checksums_is_absent_or_whole(
    fork_server: ForkServer, inputs: Inputs, tmp_path: Path
) -> None:  # fmt: skip
    model = Path(shutil.copytree(inputs.merged, tmp_path / "model"))
    words = ["write", "--model_path", str(model), "--overwrite"]

    def write(**more: int) -> tuple[int, str]:
        started = fork_server.start_tool("checksums", words, watched=model, **more)
        return started.wait(), started.output()

    code, printed = write()
    assert code == 0, printed
    listed = (model / "SHA256SUMS").read_bytes()
    n_killed = n_absent = 0
    for kill_at in range(1, int(re.findall(r"(\d+) operations", printed)[-1]) + 1):
        (model / "SHA256SUMS").unlink(missing_ok=True)
        code, printed = write(kill_at=kill_at)
        n_killed += code == -9
        n_absent += not (model / "SHA256SUMS").exists()
        assert not (model / "SHA256SUMS").exists() or (model / "SHA256SUMS").read_bytes() == listed
    assert n_killed >= 5
    assert n_absent >= 5
    assert write()[0] == 0
    assert (model / "SHA256SUMS").read_bytes() == listed
    assert {path.name for path in model.iterdir()} == {path.name for path in inputs.merged.iterdir()} | {"SHA256SUMS"}


def test_every_tool_that_writes_is_tested() -> None:
    """A new tool that goes through `onecard.export` must appear in `cases.py`."""
    tools = Path(__file__).resolve().parents[2] / "onecard" / "programs"
    writing = {
        path.stem
        for path in tools.glob("*.py")
        if "onecard.export" in path.read_text(encoding="utf-8")
    }  # fmt: skip
    assert len(writing) >= 8
    # These write into a directory that is there already; above, and in test_download.py, such writing is killed too.
    apart = {"checksums", "download", "_data_catalogue"}
    assert writing - apart <= {case.tool for case in CASES}
    assert writing - apart <= {bad.tool for bad in BAD_INPUTS}
