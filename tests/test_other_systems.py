"""What Windows and macOS do otherwise, as far as Linux can show it: names, line ends, long paths, imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path, PureWindowsPath

import pytest

from onecard.config import parsing as cli
from onecard.config.training import FinetuneConfig
from onecard.data.built_in_templates import FOLDER
from onecard.data.chat_template import load_template
from onecard.data.sources import ReadReport, read
from onecard.errors import ConfigError
from onecard.export.io.output import new_directory
from onecard.installation import SHIPPED
from onecard.recipes import finetune
from tests import tiny

ONE_SYSTEM = {"fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog", "msvcrt", "winreg", "_winapi"}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."},
            {"role": "assistant", "content": "The Rhine."}]  # fmt: skip


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=SHIPPED, capture_output=True, encoding="utf-8")
    return done.stdout.split("\0")[:-1] or pytest.skip("not a git checkout")


def with_crlf(file: Path, target: Path) -> Path:
    target.write_bytes(file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    return target


def test_every_file_of_the_repository_can_lie_on_windows_and_macos() -> None:
    files = tracked()
    assert len(files) > 700
    folded = Counter(file.casefold() for file in files)
    assert not [name for name, n in folded.items() if n > 1], "one file where case does not count"
    for file in files:
        parts = PureWindowsPath(file).parts
        assert not set(file) & set('<>:"|?*\\') and not any(part.endswith((".", " ")) for part in parts), file
        assert not any(PureWindowsPath(part).is_reserved() for part in parts), file
        assert len(file) <= 120, f"{file}: with the folder of a clone in front it must stay below 260"


def test_no_module_of_one_system_is_imported_before_it_is_needed() -> None:
    """At the top of a file such an import ends the program on the others; nor is anything started by fork."""
    files = sorted((SHIPPED / "onecard").rglob("*.py"))
    assert len(files) > 200
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not names & ONE_SYSTEM, file
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"os.fork", "os.forkpty", "multiprocessing.Process", "multiprocessing.Pool"}, file


def test_files_are_renamed_and_programs_read_as_windows_needs_it() -> None:
    """There a virus scanner holds a new file for a moment, which `storage.move` waits for; and what a program prints is
    not in the code page of the system, in which `text=True` alone reads it."""
    n_moves = n_programs = 0
    for file in sorted((SHIPPED / "onecard").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, words = ast.unparse(node.func), {word.arg for word in node.keywords}
            n_moves += name == "move"
            is_rename = name.endswith(".replace") and len(node.args) == 1 and not words
            assert file.name == "storage.py" or not is_rename, f"{file}:{node.lineno}: use storage.move"
            assert name not in ("os.rename", "os.replace", "shutil.move"), f"{file}:{node.lineno}: use storage.move"
            if name in ("subprocess.run", "subprocess.Popen"):
                n_programs += 1
                assert not words & {"text", "universal_newlines"} or "encoding" in words, f"{file}:{node.lineno}"
    assert n_moves >= 10 and n_programs >= 8


def test_templates_render_the_same_from_a_checkout_with_crlf(tmp_path: Path, sp_tokenizer) -> None:
    files = sorted(FOLDER.glob("*.jinja"))
    assert len(files) >= 7
    for file in files:
        there = load_template(str(with_crlf(file, tmp_path / file.name)), sp_tokenizer)
        here = load_template(str(file), sp_tokenizer)
        assert (there.jinja, there.stop) == (here.jinja, here.stop), file.name


@pytest.mark.parametrize("name", ["field-recipes/medical/data.jsonl", "sample/chat_sample.json",
                                  "sample/shapes/prompt_response.csv", "sample/shapes/plain.txt"])  # fmt: skip
def test_data_are_read_the_same_with_crlf(name: str, tmp_path: Path) -> None:
    file = SHIPPED / name
    there = with_crlf(file, tmp_path / file.name)
    samples = [list(read(str(path), report=ReadReport())) for path in (file, there)]
    assert samples[0] and samples[0] == samples[1]


def test_settings_are_read_the_same_with_crlf(tmp_path: Path) -> None:
    file = SHIPPED / "config-sample" / "tiny-llama_qlora_cpu.yaml"
    configs = [cli.parse(FinetuneConfig, ["--config", str(path)])
               for path in (file, with_crlf(file, tmp_path / file.name))]  # fmt: skip
    assert configs[0] == configs[1]


def test_a_target_that_differs_from_its_source_in_case_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS both names are one folder, which the export would have replaced by itself."""
    source, target = tmp_path / "Merged", tmp_path / "merged"
    for folder in (source, target):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").touch()
    monkeypatch.setattr(Path, "samefile", lambda self, other: str(self).casefold() == str(other).casefold())
    for read_here in (source, source / "model.safetensors"):
        with (
            pytest.raises(ConfigError, match="is or holds what is read here"),
            new_directory(target, overwrite=True, inputs=[read_here]),
        ):
            pass
    with new_directory(tmp_path / "other", inputs=[source]):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows needs a setting for paths above 260")
def test_a_run_lies_in_a_long_path_with_blanks_and_chinese(tmp_path: Path, tiny_base: Path, instructions: Path) -> None:
    place = tmp_path.joinpath(*["我的 数据 и данные"] * 20)
    place.mkdir(parents=True)
    data = place / "问题 1.json"
    data.write_bytes(instructions.read_bytes())
    run = place / "结果 one"
    assert len(str(run)) > 260
    config = tiny.config_for(tiny_base, data, run, max_steps=2, save_steps=1, cache_path=str(place / "cache"))
    assert finetune(config) == run
    assert (run / "adapter_model.safetensors").is_file() and (run / "checkpoint-2").is_dir()
    finetune(config)  # which finds it done, lock and all
