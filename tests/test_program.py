"""`onecard VERB`: one program for all, as a person types it in a clone or where pip has installed it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest

from onecard import __main__ as program
from onecard import __version__, installation
from onecard.config import parsing as cli
from onecard.config.given_paths import shipped_file
from onecard.config.training import FinetuneConfig
from onecard.doctor.facts import pinned
from onecard.errors import ConfigError
from onecard.installation import SCRIPTS, SHIPPED
from onecard.translation import use_language

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy", "gradio"}
STARTS = """
import sys
from onecard.__main__ import run
for words in map(str.split, sys.argv[1:]):
    try:
        run(words)
    except SystemExit:
        pass
print("LOADED", *sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.fixture
def as_installed(monkeypatch: pytest.MonkeyPatch):
    """Say that this process was started so."""

    def start(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", list(words))

    yield start
    use_language("auto")


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        program.run(words)
    return capsys.readouterr().out


# --- verbs -----------------------------------------------------------------------------------------------------------


def test_every_program_is_a_verb_with_a_line_and_a_script_in_a_clone(capsys: pytest.CaptureFixture[str]) -> None:
    program.run(["--help"])
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if re.match(r"  \S", line))
    modules = {path.stem for path in (SHIPPED / "onecard" / "programs").glob("[!_]*.py")}
    assert {verb.replace("-", "_") for verb in lines} == modules
    assert list(lines)[: len(SCRIPTS)] == list(SCRIPTS), "in the order of use"
    for verb, script in SCRIPTS.items():
        assert 10 < len(lines[verb]) < 90, verb
        text = (SHIPPED / script).read_text(encoding="utf-8")
        module = f"from onecard.programs.{verb.replace('-', '_')} import main"
        assert ("start(__file__)" if script.startswith("tools/") else module) in text
        assert len(text.splitlines()) <= 16, "a script is thin"


def test_the_overview_is_in_both_languages(capsys: pytest.CaptureFixture[str], as_installed) -> None:
    as_installed("onecard")
    program.run(["--help", "--language", "zh"])
    lines = [line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines() if re.match(r"  \S", line)]
    assert len(lines) >= len(SCRIPTS)
    assert all(any("\u4e00" <= sign <= "\u9fff" for sign in line) for line in lines)


def loaded(*commands: str) -> set[str]:
    """The libraries in a process that has run these."""
    done = subprocess.run([sys.executable, "-c", STARTS, *commands], cwd=SHIPPED, capture_output=True, text=True)
    *said, last = done.stdout.splitlines()
    assert len(said) >= len(commands) and last.startswith("LOADED"), done.stderr
    return set(last.split())


def test_the_overview_loads_no_more_than_it_needs() -> None:
    found = loaded("--help", "--version")
    assert "onecard" in found and not found & {*HEAVY, "jsonargparse"}


def test_the_help_of_every_verb_loads_nothing_heavy() -> None:
    found = loaded(*(f"{verb} --help" for verb in installation.verbs()))
    assert "argparse" in found and not found & {*HEAVY, "jsonargparse"}


@pytest.mark.parametrize("verb", installation.verbs())
def test_the_usage_line_of_a_verb_is_what_was_typed(
    verb: str, capsys: pytest.CaptureFixture[str], as_installed
) -> None:
    as_installed("/usr/bin/onecard", verb)
    out = shown([verb, "--help"], capsys)
    options = {"quickstart": "[--OPTION VALUE ...]", "test": "[--all "}.get(verb, "[--config FILE.yaml]")
    assert out.startswith(f"usage: onecard {verb} {options}") or "Verbs, each with its own --help:" in out
    named = re.sub(r"(config|rewards)\.py", "", out)  # rewards.py is the user's own
    assert ".py" not in named, "an installed program has no scripts"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("finetun", "finetune"), ("quantise", "quantize"), ("plan_memory", "plan"), ("export-gguf", "gguf"),
     ("inspect_data.py", "inspect"), ("tools/merge_lora.py", "merge"), ("quantize-gpt", "quantize-gptq")],
)  # fmt: skip
def test_an_unknown_verb_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{typed}' is no verb of onecard \(did you mean {meant}\?\)"):
        program.run([typed, "--help"])


def test_options_without_a_verb_and_nonsense_are_refused() -> None:
    with pytest.raises(ConfigError, match="--bits stands before the verb"):
        program.run(["--bits", "4"])
    with pytest.raises(ConfigError, match="'zzz' is no verb of onecard; onecard --help"):
        program.run(["zzz"])


def test_a_verb_is_taken_with_underscores_and_ends_as_its_script_does(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("finetune_chat", "finetune-chat"):
        assert "dialogue: true" in shown([verb, "--print_config"], capsys)
    done = subprocess.run(
        [sys.executable, "-m", "onecard", "finetune", "--bits", "5"], cwd=SHIPPED, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --bits: '5' is not one of 4, 8, 16, 32\n"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    program.run(["--version"])
    assert capsys.readouterr().out == f"onecard {__version__}\n"


# --- names of commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("started", "merge"),
    [(["finetune.py"], "python tools/merge_lora.py"), (["pytest"], "python tools/merge_lora.py"),
     (["/venv/bin/onecard", "chat"], "onecard merge"), (["onecard.exe", "chat"], "onecard merge"),
     (["/lib/onecard/__main__.py", "chat"], "python -m onecard merge")],
)  # fmt: skip
def test_messages_name_the_command_that_can_be_typed(started: list[str], merge: str, as_installed) -> None:
    as_installed(*started)
    assert installation.command("merge") == merge
    assert installation.with_commands("first `onecard merge --x`; OneCard") == f"first `{merge} --x`; OneCard"


def test_without_a_clone_no_script_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "IS_CLONE", False)
    assert installation.command("merge") == "onecard merge"
    assert installation.command("quantize-bnb") == "onecard quantize-bnb"


def test_an_installed_program_reads_what_it_asks_for_from_its_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "torch==2.13.0",
        "old==1; python_version < '3.0'",
        "gptqmodel==7; extra == 'gptq'",
        "optimum==2; python_version >= '3.10' and extra == 'gptq'",
        "deepspeed==3; extra == 'deepspeed'",
    ]
    monkeypatch.setattr(installation, "IS_CLONE", False)
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    packages = [[one.name for one in pinned(installation.requirements(extra))] for extra in ("", "gptq", "deepspeed")]
    assert packages == [["torch"], ["gptqmodel", "optimum"], ["deepspeed"]]
    assert installation.install_command("gptq") == "pip install gptqmodel==7 optimum==2"
    assert installation.install_command("deepspeed") == "pip install --no-build-isolation deepspeed==3"
    assert "requirements" not in installation.install_command()
    names = [installation.requirements_name(extra) for extra in ("", "gptq")]
    assert names == ["onecard", "onecard[gptq]"]


def test_a_program_without_a_script_is_named_by_its_module() -> None:
    assert installation.command("new-tool") == "python -m onecard new-tool"


def test_no_message_names_a_script() -> None:
    """Messages and help texts take the name from `command`; a script's name stands in comments and docstrings only."""
    names = [re.escape(Path(script).name) for script in SCRIPTS.values()]
    script = re.compile(rf"(?<!\w)({'|'.join(names)})\b")
    files = {path.name: path.read_text(encoding="utf-8") for path in (SHIPPED / "onecard").rglob("*.py")}
    found = set()
    for name, text in files.items():
        tree = ast.parse(text if script.search(text) else "")
        nodes = list(ast.walk(tree))
        fields = {
            id(after)
            for node in nodes if isinstance(node, ast.ClassDef)
            for line, after in pairwise(node.body) if isinstance(line, ast.AnnAssign)
        }  # fmt: skip
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr) and id(node) not in fields}
        texts = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
        found |= {name for node in texts if script.search(str(node.value))}
    assert len(files) > 150
    # The table itself, and what torchrun starts in a clone.
    assert found == {"installation.py", "deepspeed_config.py"}


# --- what travels with the program -----------------------------------------------------------------------------------


def test_sample_paths_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data_path", "sample/merge_sample.json", "sample/held_out.json", "--model_path", "sample/tiny-llama"]
    config = cli.parse(FinetuneConfig, [*words, "--config", "config-sample/tiny-llama_qlora_cpu.yaml"])
    assert config.data.data_path == [str(SHIPPED / "sample" / name) for name in ("merge_sample.json", "held_out.json")]
    assert config.model.model_path == str(SHIPPED / "sample" / "tiny-llama")
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "held_out.json").touch()
    assert shipped_file("sample/held_out.json") == "sample/held_out.json", "one's own comes first"
    assert shipped_file("samples/held_out.json") == "samples/held_out.json"
    with pytest.raises(ConfigError, match=r"there is no file or folder sample/none\.json"):
        cli.parse(FinetuneConfig, ["--data_path", "sample/none.json"])
    assert cli.parse(FinetuneConfig, ["--output_path", "sample/tiny-llama"]).train.output_path == "sample/tiny-llama"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=SHIPPED, capture_output=True, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_all_that_a_clone_lends_the_program(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "onecard", "sample", "config-sample"], cwd=SHIPPED, capture_output=True, text=True
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    wanted = {name if name.startswith("onecard/") else f"onecard/{name}" for name in tracked}
    wanted |= {"onecard/docs/en/data.md", "onecard/docs/zh/data.md", "onecard/tiny_corpus/tables/nouns.txt"}
    assert len(wanted) > 200 and wanted <= held, wanted - held
    assert {name.split("/")[0] for name in held} == {"onecard", f"onecard-{__version__}.dist-info"}
    assert not [name for name in held if name.endswith(".pyc")]


def test_the_wheel_asks_for_what_requirements_txt_says(wheel: zipfile.ZipFile) -> None:
    from packaging.metadata import parse_email
    from packaging.requirements import Requirement

    raw, _ = parse_email(wheel.read(f"onecard-{__version__}.dist-info/METADATA"))
    stated = [Requirement(text) for text in raw["requires_dist"]]
    for extra in ("", "gptq", "deepspeed"):
        wanted = {
            str(Requirement(text).specifier) + Requirement(text).name for text in installation.requirements(extra)
        }
        told = [one for one in stated if f"extra == {extra!r}" in str(one.marker).replace('"', "'") or not extra]
        told = [one for one in told if extra or "extra" not in str(one.marker)]
        names = {str(one.specifier) + one.name for one in told}
        assert wanted and {name.replace("-", "_") for name in names} == {name.replace("-", "_") for name in wanted}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # ten programs, each of which imports torch
def test_installed_by_pip_it_runs_in_an_empty_folder_without_the_repository(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    home, folder = tmp_path / "venv", tmp_path / "empty"
    folder.mkdir()
    venv.create(home, with_pip=False)
    places = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    # The packages of this environment, which has no onecard.
    (Path(places["purelib"]) / "shared.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    install = ["-m", "pip", "--python", str(home), "install", "--no-deps", "--no-index", "--quiet", str(wheel.filename)]
    subprocess.run([sys.executable, *install], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = Path(places["scripts"]) / "onecard"

    def start(*words: str, typed: str = "") -> str:
        done = subprocess.run(
            [program, *words], cwd=folder, env=environment, input=typed, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    assert start("--version") == f"onecard {__version__}\n"
    packages = {finding["name"]: finding for finding in json.loads(start("doctor", "--json"))["findings"]}
    assert packages["onecard"]["state"] == "ok" and "packages as pinned" in packages["onecard"]["value"]
    assert "Llama-3.1-8B" in start("plan", "--model_path", "Llama-3.1-8B", "--vram", "11")
    assert "usable" in start("inspect", "--n_shown", "1")
    settings = ["--config", "config-sample/tiny-llama_qlora_cpu.yaml", "--max_steps", "4", "--output_path", "run"]
    assert "adapter of step 4" in start("finetune", *settings, "--data_path", "sample/merge_sample.json")
    adapter = ["--lora_path", "run", "--device", "cpu"]
    assert start("generate", *adapter, "--instruction", "Name a river.").strip()
    assert start("chat", "--cli", *adapter, typed="Hello\n/quit\n").strip()
    assert "exact match" in start("score", *adapter, "--limit", "4", "--examples", "0")
    start("merge", "--lora_path", "run", "--output_path", "merged")
    assert (folder / "merged" / "model.safetensors").is_file()
    start("gguf", "--model_path", "merged", "--output_path", "gguf", "--gguf_type", "q8_0")
    quantised = start("quantize", "--model_path", "merged", "--output_path", "four", "--eval_samples", "4")
    assert "the corpus of sample/tiny-llama" in quantised
    done = subprocess.run(
        [program, "quantize-gptq", "--model_path", "merged", "--output_path", "g"], cwd=folder, env=environment,
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if importlib.util.find_spec("gptqmodel") is None:
        assert (done.returncode, done.stdout) == (1, "")
        assert "pip install gptqmodel==" in done.stderr and "requirements" not in done.stderr
    assert not list(folder.rglob("*.py")), "nothing of the repository came along"
