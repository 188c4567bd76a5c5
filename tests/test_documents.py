"""What the documents say works: each command in them is taken out and started, each path and flag in them exists.

Programs are started with ``--print_config``, which reads all options as a real start does and ends before anything is
loaded. `scripts/quickstart.sh` runs for real in the slow test at the end.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from onecard.config import parsing as cli
from onecard.config.inference import ChatConfig, GenerateConfig, ServeConfig
from onecard.config.training import FinetuneConfig

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "docs/README_zh.md", "CONTRIBUTING.md"]
SCRIPTS = sorted(path.name for path in (REPOSITORY / "scripts").glob("*.sh") if path.name != "environment.sh")
TALKING = ("generate.sh", "chat_7B.sh", "chat_cli.sh", "serve.sh")
RECIPES = [name for name in SCRIPTS if name not in ("quickstart.sh", "test.sh")]
TOOLS = sorted(path.name for path in (REPOSITORY / "tools").glob("*.py"))
SETTINGS = sorted(path.name for path in (REPOSITORY / "config-sample").glob("*.yaml"))

needs_bash = pytest.mark.skipif(os.name == "nt", reason="the scripts are for bash")


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def fenced(document: str, language: str) -> Iterator[str]:
    """The bodies of ```language blocks, those inside lists too."""
    for block in re.finditer(rf"^( *)```{language}\n(.*?)^ *```", text_of(document), re.MULTILINE | re.DOTALL):
        yield "\n".join(line.removeprefix(block[1]) for line in block[2].splitlines())


def commands(text: str) -> list[str]:
    """One command per line; a backslash at the end joins lines, comments are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


COMMANDS = [
    (document, line) for document in DOCUMENTS for block in fenced(document, "bash") for line in commands(block)
]


# --- starting commands -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository after some runs, so that nothing is written into the real one."""
    root = tmp_path_factory.mktemp("stage")
    for path in REPOSITORY.iterdir():
        if path.name not in ("outputs", ".venv", ".git"):
            (root / path.name).symlink_to(path, target_is_directory=path.is_dir())
    for run in ("mine", "quickstart", "finetune-4bit"):
        (root / "outputs" / run).mkdir(parents=True)
        (root / "outputs" / run / "onecard.yaml").write_text(cli.to_yaml(FinetuneConfig()), encoding="utf-8")
        (root / "outputs" / run / "adapter_config.json").write_text("{}", encoding="utf-8")
    # In place of Python: starts it, and makes every program end once its options are read.
    dry = root / "dry-python"
    dry.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@" --print_config\n', encoding="utf-8")
    dry.chmod(0o755)
    return root


def start(stage: Path, command: str) -> subprocess.CompletedProcess:
    """Run one shell command in the stage with the dry Python in place of every Python."""
    python = str(stage / "dry-python")
    command = re.sub(r"^((?:\w+=\S+ )*)(?:python3?|\.venv/bin/python)(?= )", rf"\1{python}", command)
    command = re.sub(r"^\.venv/bin/onecard(?= )", f"{python} -m onecard", command)
    command = re.sub(r"^((?:\w+=\S+ )*)torchrun(?= )", rf"\1{python} -m torch.distributed.run", command)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTHON": python, "PYTHONPATH": str(stage), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=stage,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )


def shown_options(done: subprocess.CompletedProcess) -> dict:
    """The options that a dry start printed."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return yaml.safe_load("\n".join(line for line in done.stdout.splitlines() if re.match(r"^[a-z_]+: |^- ", line)))


def is_installation(command: str) -> bool:
    return bool(re.search(r"-m (venv|pip) ", command))


@needs_bash
@pytest.mark.parametrize("command", sorted({line for _, line in COMMANDS if not is_installation(line)}))
def test_command_starts(stage: Path, command: str) -> None:
    if "scripts/test.sh" in command:
        done = start(stage, f"{command} --help")  # it cannot run itself
        assert done.returncode == 0, done.stderr
        assert "ruff" in done.stdout
        return
    done = start(stage, command)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^\w+_path: |^repo_id: |^debug: ", done.stdout, re.MULTILINE)


def test_commands_were_found() -> None:
    found = {document: [line for name, line in COMMANDS if name == document] for document in DOCUMENTS}
    assert len(found["README.md"]) >= 15
    assert len(found["CONTRIBUTING.md"]) >= 3
    programs = {word for _, line in COMMANDS for word in shlex.split(line) if word.endswith((".py", ".sh"))}
    assert {"finetune.py", "finetune_chat.py", "generate.py", "chat.py", "tools/serve.py"} <= programs
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= programs


def test_installations_name_real_files() -> None:
    files = [
        word for _, line in COMMANDS if is_installation(line) for word in shlex.split(line) if word.endswith(".txt")
    ]
    assert len(files) >= 2
    for file in files:
        assert (REPOSITORY / file).is_file()


def test_both_languages_give_the_same_commands_and_sections() -> None:
    english, chinese = ([re.sub(r'"[^"]*"', '""', line) for name, line in COMMANDS if name == d] for d in DOCUMENTS[:2])
    assert english == chinese
    for pattern in (r"^## ", r"^ *\|", r"^- ", r"^\d\. "):
        counts = [len(re.findall(pattern, text_of(document), re.MULTILINE)) for document in DOCUMENTS[:2]]
        assert counts[0] == counts[1], pattern


# --- scripts, tools, settings ----------------------------------------------------------------------------------------


@needs_bash
@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name not in (*TALKING, "finetune_continue.sh", "export.sh")]
)
def test_training_recipe_starts(stage: Path, name: str) -> None:
    # From another folder: the sample's files are found, results land where one stands. Words are handed on.
    start_elsewhere = f"mkdir -p elsewhere && cd elsewhere && N_GPUS=1 bash ../scripts/{name} --lora_alpha 7"
    shown = shown_options(start(stage, start_elsewhere))
    assert Path(shown["model_path"], "config.json").is_file()
    assert Path(shown["data_path"]).is_file()
    assert not Path(shown["output_path"]).is_absolute()
    assert shown["lora_alpha"] == 7
    shown = shown_options(start(stage, f"MODEL_PATH='a b' DATA_PATH=c OUTPUT_PATH=d N_GPUS=1 bash scripts/{name}"))
    assert (shown["model_path"], shown["data_path"], shown["output_path"]) == ("a b", "c", "d")


@needs_bash
def test_talking_and_continue_recipes_start(stage: Path) -> None:
    for name in TALKING:
        shown = shown_options(start(stage, f"LORA_PATH=outputs/mine bash scripts/{name} --max_new_tokens 7"))
        assert (shown["lora_path"], shown["max_new_tokens"]) == ("outputs/mine", 7)
        assert shown_options(start(stage, f"bash scripts/{name}"))["lora_path"] == "outputs/quickstart"
    assert shown_options(start(stage, "bash scripts/chat_cli.sh"))["cli"] is True
    assert shown_options(start(stage, "bash scripts/serve.sh"))["web"] is True
    shown = shown_options(start(stage, "MODEL_PATH='a b' bash scripts/chat_7B.sh"))
    assert (shown["model_path"], shown["lora_path"], shown["bits"]) == ("a b", None, 4)
    shown = shown_options(start(stage, "ADAPTERS_PATH=outputs bash scripts/chat_7B.sh"))
    assert (shown["adapters_path"], shown["lora_path"]) == ("outputs", None)
    shown = shown_options(
        start(stage, "OUTPUT_PATH=outputs/mine NUM_EPOCH=9 bash scripts/finetune_continue.sh --seed 3")
    )
    assert (shown["output_path"], shown["num_epoch"], shown["seed"]) == ("outputs/mine", 9, 3)
    refused = start(stage, "OUTPUT_PATH=outputs/nowhere bash scripts/finetune_continue.sh")
    assert refused.returncode == 1
    assert "outputs/nowhere holds no run" in refused.stderr


@needs_bash
def test_export_recipe_starts(stage: Path) -> None:
    done = start(
        stage, "LORA_PATH=outputs/mine OUTPUT_PATH='outputs/an export' bash scripts/export.sh --system 'Be brief.'"
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for line in ("lora_path: outputs/mine", "output_path: outputs/an export/merged", "system: Be brief.",
                 "model_path: outputs/an export/merged", "gguf_type: q8_0"):  # fmt: skip
        assert line in done.stdout.splitlines()


@needs_bash
def test_quickstart_starts_each_of_its_programs(stage: Path) -> None:
    done = start(stage, "bash scripts/quickstart.sh --seed 5")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "seed: 5" in done.stdout
    advice = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ") and ".py " in line]
    assert len(advice) == 3
    for command in advice:
        assert start(stage, command.replace("dry-python", "./dry-python", 1)).returncode == 0, command


def test_numbers_of_scripts_tools_and_settings() -> None:
    wanted = {"finetune", "finetune_4bit", "finetune_chat", "finetune_continue", "finetune_others_continue"}
    wanted |= {"finetune_multi_gpu", "finetune_deepspeed", "generate"}
    assert {name.removesuffix(".sh") for name in RECIPES} >= wanted
    assert len(TOOLS) >= 3
    assert len(SETTINGS) >= 6


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_says_what_it_is_for(name: str) -> None:
    text = text_of(f"scripts/{name}")
    header = text.split("\nset -")[0]
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert f"scripts/{name}" in header
    assert os.name == "nt" or os.access(REPOSITORY / "scripts" / name, os.X_OK)
    if name != "test.sh":
        assert "Card" in header
        assert "Time" in header
        assert "measured)" in header or "those of the run" in header


@pytest.mark.parametrize("name", TOOLS)
def test_tool_starts(name: str) -> None:
    done = subprocess.run(
        [sys.executable, f"tools/{name}", "--help"], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_data.json").touch()  # what settings for a data set of one's own name
    monkeypatch.chdir(REPOSITORY if name.startswith("tiny-llama") else tmp_path)
    text = text_of(f"config-sample/{name}")
    header = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    command = next(line for line in header if line.startswith("python finetune"))
    assert f"--config config-sample/{name}" in command, "its own command names it"
    config = cli.parse(
        FinetuneConfig, shlex.split(command.replace("config-sample", str(REPOSITORY / "config-sample")))[2:]
    )
    assert any(line.startswith("Card: ") and "Expected peak: " in line and "not measured)" in line for line in header)
    model, method, vram = name.removesuffix(".yaml").split("_")
    assert config.model.bits == {"qlora": 4, "lora-8bit": 8, "lora": 16}[method]
    assert model.split("-")[0] in config.model.model_path.lower()
    card = next(line for line in header if line.startswith("Card: "))
    assert vram == "cpu" or f"{vram.removesuffix('gb')} GB" in card


def test_deepspeed_settings() -> None:
    settings = json.loads(text_of("config-sample/deepspeed_zero2.json"))
    assert settings["zero_optimization"]["stage"] == 2


# --- what is named exists --------------------------------------------------------------------------------------------


def test_architecture_lists_every_module_as_it_is_now() -> None:
    script = [sys.executable, str(REPOSITORY / "scripts" / "write_architecture.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0, "run python scripts/write_architecture.py"


def test_every_path_in_the_documents_exists() -> None:
    folders = "onecard|tools|scripts|config-sample|sample|tests|docs|benchmarks"
    visited = 0
    for document in DOCUMENTS:
        for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*[\w/])", text_of(document)):
            assert (REPOSITORY / path).exists() or path == "onecard/programs/my_tool.py", f"{document}: {path}"
            visited += 1
        for link in re.findall(r"\]\(([^)#:]+)\)", text_of(document)):
            assert (REPOSITORY / document).parent.joinpath(link).exists(), f"{document}: {link}"
            visited += 1
    assert visited >= 45


def tool_options() -> Iterator[type]:
    """Every class of options that a tool declares itself."""
    for path in (REPOSITORY / "onecard" / "programs").glob("[!_]*.py"):
        module = importlib.import_module(f"onecard.programs.{path.stem}")
        declared = [value for value in vars(module).values() if isinstance(value, type) and is_dataclass(value)]
        yield from (kind for kind in declared if kind.__module__ == module.__name__)


def test_every_flag_in_the_documents_exists() -> None:
    known = {
        f"--{name}"
        for config in (FinetuneConfig, GenerateConfig, ChatConfig, ServeConfig, *tool_options())
        for name in cli.options_of(config)
    }
    known |= {"--config", "--print_config", "--help", "--all", "--gptq", "--real", "--examples"}
    # of pip, torchrun and pytest
    known |= {
        "--version",
        "--standalone",
        "--nproc_per_node",
        "--nnodes",
        "--node_rank",
        "--master_addr",
        "--master_port",
    }
    known |= {"--no-build-isolation", "--index-url", "--language", "--version"}
    names = [*DOCUMENTS, *(f"scripts/{name}" for name in RECIPES), "scripts/quickstart.sh"]
    names += [f"config-sample/{name}" for name in SETTINGS]
    visited = 0
    for name in names:
        for flag in re.findall(r"(?<![\w-])--[a-zA-Z_][\w-]*", text_of(name)):
            assert flag in known, f"{name}: {flag}"
            visited += 1
    assert visited >= 100


def test_no_machine_of_ours_is_named() -> None:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    ).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    suffixes = (".py", ".md", ".sh", ".yaml", ".toml", ".txt", ".jinja")
    places = re.compile(r"/(?:home|root|work|opt)/[a-z]|file:///")
    visited = 0
    for file in files:
        path = REPOSITORY / file
        if file.endswith(suffixes) and file != "tests/test_documents.py" and path.is_file():
            assert not places.search(path.read_text(encoding="utf-8", errors="replace")), file
            visited += 1
    assert visited >= 45


# --- for real --------------------------------------------------------------------------------------------------------


@needs_bash
@pytest.mark.slow
def test_quickstart_teaches_the_sample_and_is_reused(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT_PATH": str(tmp_path / "run"), "PYTHONUTF8": "1"}
    environment["HF_HOME"] = str(tmp_path / "cache" / "huggingface")

    def quickstart() -> str:
        done = subprocess.run(
            ["bash", str(REPOSITORY / "scripts" / "quickstart.sh")],
            env=environment, capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    first = quickstart()
    before, after = map(float, re.search(r"exact match\D+([\d.]+)%\D+([\d.]+)%", first).groups())
    assert before <= 20
    assert after >= 80
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert "already done" in quickstart()
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log
