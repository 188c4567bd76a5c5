"""Lists of hashes: written as `sha256sum` writes them; every kind of damage shows, and hostile lists are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onecard import manifest
from onecard.console import run_main
from onecard.errors import ConfigError, DataError, ModelError
from onecard.export.hub import checksums
from onecard.export.hub.checksums import LIST, is_inside, read_list, verify, write
from onecard.programs import checksums as tool

NAMES = [
    *("config.json", "model-00001-of-00002.safetensors", "onnx/deep/er/model.onnx", "模型 权重.bin", "-dash", "*star?"),
    *(" blank ", "#hash", "a'b\"c"),
]
POSIX_NAMES = ["new\nline", "back\\slash", "car\rriage", "end\r", "\\n", "c:drive", "a\\..\\b"]
needs_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")


def fill(directory: Path, names: list[str]) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(name.encode() * 1000)
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fill(tmp_path / "model", NAMES)


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of the tool."""
    code = run_main(lambda: tool.main(argv), debug=False)
    out, err = capsys.readouterr()
    return code, out, err


# --- writing ---------------------------------------------------------------------------------------------------------


@needs_posix
@pytest.mark.skipif(not shutil.which("sha256sum"), reason="sha256sum is not here")
def test_sha256sum_reads_our_list_and_we_read_its(tmp_path: Path) -> None:
    names = NAMES + POSIX_NAMES
    model = fill(tmp_path / "model", names)
    assert write(model).n_files == len(names)
    done = subprocess.run(["sha256sum", "--strict", "-c", LIST], cwd=model, capture_output=True)
    assert done.returncode == 0, done
    assert done.stdout.count(b": OK\n") == len(names)
    ours = read_list(model / LIST)
    (model / LIST).unlink()
    theirs = subprocess.run(["sha256sum", "--", *names], cwd=model, capture_output=True, check=True).stdout
    (model / LIST).write_bytes(theirs)
    assert read_list(model / LIST) == ours
    assert ours == {name: hashlib.sha256(name.encode() * 1000).hexdigest() for name in names}
    assert verify(model).n_wrong(strict=True) == 0


def test_the_list_is_sorted_relative_and_without_itself(model: Path) -> None:
    done = write(model)
    lines = (model / LIST).read_text(encoding="utf-8").splitlines()
    assert [line[66:] for line in lines] == sorted(NAMES)
    assert (done.n_files, done.n_bytes) == (len(NAMES), sum(len(name.encode()) * 1000 for name in NAMES))
    assert done.left_out == []
    first = (model / LIST).read_bytes()
    write(model, overwrite=True)
    assert (model / LIST).read_bytes() == first
    assert sorted(p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()) == sorted([*NAMES, LIST])


def test_hidden_and_unfinished_files_are_left_out_and_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = [".gitattributes", ".cache/huggingface/x.json", "model.incomplete", "sub/x.partial"]
    fill(model, left_out)
    code, out, err = run(["write", "--model_path", str(model)], capsys)
    assert (code, err) == (0, "")
    assert sorted(read_list(model / LIST)) == sorted(NAMES)
    assert "left out, as hidden or unfinished: .cache/, .gitattributes, model.incomplete, sub/x.partial" in out
    assert verify(model).extra == []


def test_an_existing_list_is_replaced_only_when_asked(model: Path) -> None:
    (model / LIST).write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="exists already; add --overwrite"):
        write(model)
    assert (model / LIST).read_text(encoding="utf-8") == "mine"
    write(model, overwrite=True)
    assert len(read_list(model / LIST)) == len(NAMES)


def test_a_file_that_cannot_be_read_leaves_the_old_list(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(model)
    old = (model / LIST).read_bytes()

    def broken(path: Path, moved: Any) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checksums, "sha256_of", broken)
    with pytest.raises(ModelError, match="Input/output error"):
        write(model, overwrite=True)
    assert (model / LIST).read_bytes() == old
    assert sorted(verify(model).unreadable) == sorted(NAMES)


@needs_posix
def test_the_hubs_cache_of_links_is_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0f3a"
    fill(blobs, ["aaa", "bbb"])
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/aaa")
    (snapshot / "sub" / "weights").symlink_to("../../../blobs/bbb")
    (snapshot / "round").symlink_to(snapshot, target_is_directory=True)
    done = write(snapshot)
    assert sorted(read_list(snapshot / LIST)) == ["config.json", "sub/weights"]
    assert done.left_out == ["round"]
    assert verify(snapshot).n_wrong(strict=True) == 0
    (blobs / "bbb").write_bytes(b"other")
    assert verify(snapshot).changed == ["sub/weights"]
    (blobs / "aaa").unlink()
    assert verify(snapshot).missing == ["config.json"]
    with pytest.raises(ModelError, match=r"config\.json is a link that leads nowhere"):
        write(snapshot, overwrite=True)


@needs_posix
def test_a_pipe_is_never_waited_for(model: Path) -> None:
    write(model)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    assert verify(model).missing == ["config.json"]
    assert write(model, overwrite=True).left_out == ["config.json"]


# --- verifying -------------------------------------------------------------------------------------------------------


def test_every_kind_of_difference_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(model)
    (model / "config.json").unlink()
    path = model / "onnx/deep/er/model.onnx"
    changed = bytearray(path.read_bytes())
    changed[500] ^= 1
    path.write_bytes(changed)
    fill(model, ["more/extra.txt"])
    code, out, err = run(["verify", "--model_path", str(model)], capsys)
    assert code == 1
    assert out.splitlines() == ["missing     config.json", "changed     onnx/deep/er/model.onnx"]
    assert "not in SHA256SUMS: more/extra.txt" in err
    assert "2 of its files are wrong" in err
    code, out, err = run(["verify", "--json", "--strict", "--model_path", str(model)], capsys)
    assert code == 1
    found = json.loads(out)
    assert (found["ok"], found["missing"], found["changed"]) == (False, ["config.json"], ["onnx/deep/er/model.onnx"])
    assert (found["extra"], found["source"], found["n_files"]) == (["more/extra.txt"], LIST, len(NAMES))
    assert "3 of its files are wrong" in err


def test_extra_files_are_an_error_only_when_strict(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(model)
    argv = ["verify", "--model_path", str(model)]
    assert run(argv, capsys)[0] == 0
    fill(model, ["extra"])
    code, out, _ = run(argv, capsys)
    assert code == 0
    assert f"all {len(NAMES)} files" in out
    assert run([*argv, "--strict"], capsys)[0] == 1
    code, out, err = run([*argv, "--json"], capsys)
    assert (code, json.loads(out)["ok"], err) == (0, True, "")


def test_the_manifest_of_a_checkpoint_is_read(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest.seal(model)
    report = verify(model)
    assert (report.source, report.n_files, report.n_wrong(strict=True)) == ("manifest.json", len(NAMES), 0)
    path = model / "config.json"
    whole = path.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(damaged)
        assert verify(model).changed == ["config.json"]
    text = (model / "manifest.json").read_text(encoding="utf-8")
    for broken in (text[:-1], text.replace('"bytes": 1', '"bytes": 2', 1), "{}"):
        (model / "manifest.json").write_text(broken, encoding="utf-8")
        code, _, err = run(["verify", "--model_path", str(model)], capsys)
        assert code == 1
        assert "manifest.json is damaged" in err


def test_without_a_list_it_says_what_to_do(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["verify", "--model_path", str(model)], capsys)
    assert code == 1
    assert "has neither SHA256SUMS nor manifest.json" in err
    assert "checksums.py write" in err


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../x", "..", ".", "./../x", "a\0b"])
def test_a_list_that_leads_outside_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write(model)
    monkeypatch.setattr(checksums, "sha256_of", lambda *_: pytest.fail("something was read"))
    with (model / LIST).open("a", encoding="utf-8") as file:
        file.write(f"{'0' * 64}  {name}\n")
    code, out, err = run(["verify", "--model_path", str(model)], capsys)
    assert (code, out) == (1, "")
    assert "outside of its directory" in err
    (model / LIST).unlink()
    manifest.write_manifest(model / "manifest.json", {name: {"bytes": 1, "sha256": "0" * 64}})
    assert run(["verify", "--model_path", str(model)], capsys)[0] == 1


def test_names_that_stay_inside() -> None:
    inside = ["a", "a/b", "..a", "a..", "a/..b/c", "...", "./a"]
    assert [name for name in inside if is_inside(name)] == inside
    assert not any(is_inside(name) for name in ("", ".", "..", "../a", "a/..", "/a", "//a/b"))


@pytest.mark.parametrize("line", ["hello", f"{'g' * 64}  a", f"{'0' * 63}  a", f"{'0' * 64}  ", f"{'0' * 64} a", "\0"])
def test_a_line_that_is_no_hash_is_named_by_its_number(model: Path, line: str) -> None:
    write(model)
    with (model / LIST).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="is no line of a SHA-256 list") as caught:
        verify(model)
    assert caught.value.line == len(NAMES) + 1


def test_lists_of_other_programs_are_read(tmp_path: Path) -> None:
    a, b, c = (digit * 64 for digit in "abc")
    text = f"# made by hand\r\n{a.upper()} *./one.bin\r\n\nSHA256 (two (2).bin) = {b}\n{c}  three.bin"
    (tmp_path / LIST).write_bytes(text.encode())
    assert read_list(tmp_path / LIST) == {"one.bin": a, "two (2).bin": b, "three.bin": c}
    (tmp_path / LIST).write_text(f"{a}  x\n{a}  x\n", encoding="utf-8")
    assert read_list(tmp_path / LIST) == {"x": a}
    (tmp_path / LIST).write_text(f"{a}  x\n{b}  x\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"SHA256SUMS:2: x is listed twice"):
        read_list(tmp_path / LIST)
    (tmp_path / LIST).write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="lists no files"):
        read_list(tmp_path / LIST)


@pytest.mark.parametrize("verb", ["write", "verify"])
def test_a_wrong_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for argv, words in (
        ([], "--model_path: is missing"),
        (["--model_path", str(tmp_path / "absent")], "there is no directory"),
        (["--model_path", str(tmp_path / "file")], "is a file"),
    ):
        code, out, err = run([verb, *argv], capsys)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    code, _, err = run([verb, "--model_path", str(tmp_path / "empty")], capsys)
    assert code == 1
    assert "holds no files" in err or "has neither" in err


def test_the_real_program_ends_with_1_when_a_file_differs(model: Path) -> None:
    program = [sys.executable, "-m", "onecard", "checksums"]
    subprocess.run([*program, "write", "--model_path", model], check=True, capture_output=True)
    (model / "config.json").write_bytes(b"")
    done = subprocess.run([*program, "verify", "--model_path", model], capture_output=True, text=True)
    assert done.returncode == 1
    assert "changed     config.json" in done.stdout
