"""What the documents say works: each command in them is taken out and started, each path and flag in them exists.

Programs are started with ``--print_config``, which reads all options as a real start does and ends before anything is
loaded. `scripts/quickstart.sh` runs for real in the slow test at the end.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from onecard.config import parsing as cli
from onecard.config.inference import ChatConfig, GenerateConfig, ServeConfig
from onecard.config.studio import StudioOptions
from onecard.config.training import FinetuneConfig
from onecard.translation import use_language

REPOSITORY = Path(__file__).resolve().parents[1]
ENGLISH = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs" / "en").rglob("*.md"))
CHINESE = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs" / "zh").rglob("*.md"))
TWINS = [("README.md", "docs/README_zh.md"), ("docs/coming-from.md", "docs/coming-from_zh.md"),
         ("docs/benchmarks.md", "docs/benchmarks_zh.md"),
         *((page, page.replace("/en/", "/zh/")) for page in ENGLISH if "/api/" not in page)]  # fmt: skip
DOCUMENTS = ["README.md", "docs/README_zh.md", "CONTRIBUTING.md", "docs/benchmarks.md", "docs/coming-from.md",
             "docs/coming-from_zh.md", "docs/benchmarks_zh.md", *ENGLISH, *CHINESE]  # fmt: skip
SCRIPTS = sorted(path.name for path in (REPOSITORY / "scripts").glob("*.sh") if path.name != "environment.sh")
TALKING = ("generate.sh", "chat_7B.sh", "chat_cli.sh", "serve.sh")
RECIPES = [name for name in SCRIPTS if name not in ("quickstart.sh", "test.sh", "docs.sh", "prove_gpu.sh")]
TOOLS = sorted(path.name for path in (REPOSITORY / "tools").glob("[!_]*.py"))
BENCHMARKS = sorted(f"benchmarks/{path.name}" for path in (REPOSITORY / "benchmarks").glob("*.py"))
SETTINGS = sorted(path.name for path in (REPOSITORY / "config-sample").glob("*.yaml"))

# In place of Python: starts it, and makes every program end once its options are read. torchrun, which imports torch
# for three seconds, is not started: its words are kept for its own parser, and the program behind them starts alone.
TORCHRUN_WORDS = "torchrun-words"
DRY_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m torch.distributed.run" ]; then
    shift 2
    printf '%s\\n' "$@" >"{words}"
    while [ "${{1%.py}}" = "$1" ]; do shift; done
fi
exec "{python}" "$@" --print_config
"""

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


def as_bash(block: str) -> str:
    """Commands of PowerShell, as bash would be given them."""
    for theirs, ours in (
        ("\\", "/"),
        (".venv/Scripts/python.exe", ".venv/bin/python"),
        ("py -m ", "python3 -m "),
    ):
        block = block.replace(theirs, ours)
    return block


def without_texts(command: str) -> str:
    """A command with its quoted texts taken out, which are in the page's language."""
    return re.sub(r'"[^"]*"', '""', command)


def in_table(document: str) -> Iterator[str]:
    """The commands in the last cells of a table of features."""
    yield "\n".join(re.findall(r"^\|.*\| `(.+)` \|$", text_of(document), re.MULTILINE) if "feature" in document else [])


COMMANDS = [
    (document, line)
    for document in DOCUMENTS
    for block in (*fenced(document, "bash"), *map(as_bash, fenced(document, "powershell")), *in_table(document))
    for line in commands(block)
]
# One start for all pages that show the command, whatever their language.
STARTED = {without_texts(line): line for _, line in reversed(COMMANDS)}


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
    for name in ("answers_old.jsonl", "answers_new.jsonl"):
        (root / name).touch()
    dry = root / "dry-python"
    dry.write_text(DRY_PYTHON.format(words=root / TORCHRUN_WORDS, python=sys.executable), encoding="utf-8")
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
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=stage,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    check_torchrun(stage / TORCHRUN_WORDS)
    return done


def check_torchrun(words: Path) -> None:
    """What torchrun was started with, if it was, is read by its own parser as one program and its words."""
    if words.exists():
        from torch.distributed.run import get_args_parser

        assert (
            get_args_parser().parse_args(words.read_text(encoding="utf-8").splitlines()).training_script[-3:] == ".py"
        )
        words.unlink()


def start_here(stage: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess:
    """`start` for a command without shell's signs, in this process: a new one takes ten times as long."""
    name, *words = shlex.split(re.sub(r"^(\.venv/bin/)?(python3? (-m )?)?", "", command))
    monkeypatch.chdir(stage)
    monkeypatch.setattr(sys, "argv", [name, *words, "--print_config"])
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        if name.endswith(".py"):
            monkeypatch.syspath_prepend((stage / name).parent)  # as Python does for a script
            runpy.run_path(str(stage / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__")
    use_language("auto")
    return subprocess.CompletedProcess(command, ended.value.code, out.getvalue(), errors.getvalue())


def shown_options(done: subprocess.CompletedProcess) -> dict:
    """The options that a dry start printed."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return yaml.safe_load("\n".join(line for line in done.stdout.splitlines() if re.match(r"^[a-z_]+: |^- ", line)))


def is_installation(command: str) -> bool:
    return bool(re.search(r"-m (venv|pip) ", command))


@needs_bash
@pytest.mark.parametrize("command", sorted(line for line in STARTED.values() if not is_installation(line)))
def test_command_starts(stage: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if re.search(r"scripts/test\.sh|onecard test\b", command):
        done = start(stage, f"{command} --help")  # it cannot run itself
        assert done.returncode == 0, done.stderr
        assert "ruff" in done.stdout
        return
    is_plain = re.match(r"(\.venv/bin/)?(python3? (-m )?)?(onecard|[\w/]+\.py)\b[^|&;<>$`*#~{}\\]*$", command)
    # What makes environments is told by PYTHON to use none.
    makes_venv = "onecard quickstart" in command
    done = start_here(stage, command, monkeypatch) if is_plain and not makes_venv else start(stage, command)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^(?!usage)[a-z_]+: ", done.stdout, re.MULTILINE), (
        done.stdout
    )  # an option, as --print_config has it


def test_commands_were_found() -> None:
    found = {document: [line for name, line in COMMANDS if name == document] for document in DOCUMENTS}
    assert len(found["README.md"]) >= 15
    assert len(found["CONTRIBUTING.md"]) >= 3
    assert len(found["docs/en/feature-table.md"]) == text_of("docs/en/feature-table.md").count("\n| ") - 1 >= 30
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


def test_every_page_has_a_twin_in_the_other_language() -> None:
    assert [page for _, page in TWINS[3:]] == [page for page in CHINESE if not page.endswith("/api.md")]


@pytest.mark.parametrize("twins", TWINS, ids=lambda twins: twins[0])
def test_both_languages_give_the_same_commands_and_sections(twins: tuple[str, str]) -> None:
    english, chinese = ([without_texts(line) for name, line in COMMANDS if name == page] for page in twins)
    assert english == chinese
    for pattern in (r"^##+ ", r"^ *\|", r"^- ", r"^\d\. ", r"^!\["):
        counts = [len(re.findall(pattern, text_of(page), re.MULTILINE)) for page in twins]
        assert counts[0] == counts[1], pattern


def test_both_languages_tell_the_same_numbers() -> None:
    english, chinese = (
        [re.findall(r"\d[\d,.]*\d|\d", line) for line in text_of(page).splitlines() if line.startswith("|")]
        for page in ("docs/benchmarks.md", "docs/benchmarks_zh.md")
    )
    assert len(english) >= 50
    assert english == chinese


@pytest.mark.parametrize("page", TWINS[0])
def test_a_readme_stays_short_and_has_a_picture(page: str) -> None:
    assert len(text_of(page).splitlines()) <= 200
    assert text_of(page).count("](screenshots/" if "docs/" in page else "](docs/screenshots/") == 1


# --- scripts, tools, settings ----------------------------------------------------------------------------------------


@needs_bash
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in RECIPES
        if name not in (*TALKING, "finetune_continue.sh", "finetune_preferences.sh", "export.sh", "pretrain_zh.sh")
    ],
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
    advice = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ") and " -m onecard " in line]
    assert len(advice) == 3
    for command in advice:
        assert start(stage, command).returncode == 0, command


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
    if name not in ("test.sh", "docs.sh"):
        assert "Card" in header
        assert "Time" in header
        assert "measured)" in header or "those of the run" in header


@pytest.mark.parametrize("name", TOOLS)
def test_tool_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = start_here(REPOSITORY, f"python tools/{name} --help", monkeypatch)
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
    for stage in (2, 3):
        settings = json.loads(text_of(f"config-sample/deepspeed_zero{stage}.json"))
        assert settings["zero_optimization"]["stage"] == stage


# --- what is named exists --------------------------------------------------------------------------------------------


def test_architecture_lists_every_module_as_it_is_now() -> None:
    script = [sys.executable, str(REPOSITORY / "scripts" / "write_architecture.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0, "run python scripts/write_architecture.py"


def anchors(page: Path) -> list[str]:
    """What a link may name in a page: its headings, as GitHub and mkdocs.yml write them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


def defined_in(module: Path) -> set[str]:
    """The classes, functions and methods of a module, by their names inside it."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    top = [node for node in ast.parse(module.read_text(encoding="utf-8")).body if isinstance(node, kinds)]
    inner = [(node.name, child.name) for node in top for child in node.body if isinstance(child, kinds)]
    return {node.name for node in top} | {".".join(names) for names in inner}


@pytest.mark.parametrize("page", ["docs/en/architecture.md", "docs/zh/architecture.md"])
def test_every_function_of_the_call_chains_exists(page: str) -> None:
    named = re.findall(
        r"`((?:config|data|model|objectives|train|inference|serve|export)\.[\w.]+)`", text_of(page).split("<!--")[0]
    )
    assert len(named) >= 40
    for name in named:
        parts = name.split(".")
        files = [(n, (REPOSITORY / "onecard").joinpath(*parts[:n]).with_suffix(".py")) for n in range(1, len(parts))]
        (depth, module), *_ = [found for found in files if found[1].is_file()] or pytest.fail(f"no module: {name}")
        assert ".".join(parts[depth:]) in defined_in(module), name


def test_every_template_in_the_documents_exists() -> None:
    built_in = {path.stem for path in (REPOSITORY / "onecard" / "data" / "templates").glob("*.jinja")}
    visited = 0
    for document in DOCUMENTS:
        for name in re.findall(r"--prompt_type ([\w.-]+)`", text_of(document)):
            assert name in built_in | {"auto", "chat"}, f"{document}: {name}"
            visited += 1
    assert visited >= 6
    for page in ("docs/en/training.md", "docs/zh/training.md"):
        (row,) = (line for line in text_of(page).splitlines() if line.startswith("| `--prompt_type auto`"))
        names = set(re.findall(r"[a-z]{2,}[a-z0-9-]*", row.split("|")[2].split(".jinja")[0]))
        assert len(names) >= 7 and names <= built_in, page


def test_every_path_in_the_documents_exists() -> None:
    folders = "onecard|tools|scripts|config-sample|field-recipes|notebooks|sample|tests|docs|benchmarks"
    visited = 0
    for document in DOCUMENTS:
        for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*[\w/])", text_of(document)):
            assert (REPOSITORY / path).exists() or re.search("NAME|my_tool", path), f"{document}: {path}"
            visited += 1
        for link, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text_of(document)):
            target = (REPOSITORY / document).parent.joinpath(link) if link else REPOSITORY / document
            assert target.exists(), f"{document}: {link}"
            assert not anchor or anchor in anchors(target), f"{document}: {link}#{anchor}"
            visited += 1
    assert visited >= 45


OF_TOOLS = ("onecard.config.curation", "onecard.config.evaluation", "onecard.export.vocabulary.options")


def tool_options() -> Iterator[type]:
    """Every class of options that belongs to a tool alone."""
    for path in (REPOSITORY / "onecard" / "programs").glob("*.py"):
        module = importlib.import_module(f"onecard.programs.{path.stem}")
        declared = [value for value in vars(module).values() if isinstance(value, type) and is_dataclass(value)]
        yield from (kind for kind in declared if kind.__module__ in (module.__name__, *OF_TOOLS))


def test_every_flag_in_the_documents_exists() -> None:
    known = {
        f"--{name}"
        for config in (FinetuneConfig, GenerateConfig, ChatConfig, ServeConfig, StudioOptions, *tool_options())
        for name in cli.options_of(config)
    }
    known |= {"--config", "--print_config", "--help", "--all", "--gptq", "--trl", "--real", "--examples", "--serve"}
    # of pip, torchrun and pytest
    known |= {"--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    known |= {"--no-build-isolation", "--index-url", "--language", "--version", "--stat"}
    # of Slurm
    known |= {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal"}
    known |= {"--requeue", "--open-mode", "--wait"}
    of_benchmarks = re.findall(r"^    (\w+): ", "".join(map(text_of, BENCHMARKS)), re.MULTILINE)
    known |= {f"--{name}" for name in of_benchmarks}
    # Those of other kits, beside each other with ours, are tests/config/test_old_names.py's.
    names = [name for name in DOCUMENTS if "coming-from" not in name]
    names += [*(f"scripts/{name}" for name in RECIPES), "scripts/quickstart.sh"]
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


@pytest.mark.slow
@needs_bash
def test_the_chinese_recipe_runs_from_a_corpus_to_gguf(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT_PATH": str(tmp_path / "zh")}

    def recipe() -> str:
        done = subprocess.run(
            ["bash", str(REPOSITORY / "scripts" / "pretrain_zh.sh"), "--max_steps", "12", "--total_batch", "8"],
            env={**environment, "PYTHONUTF8": "1"}, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    found = re.findall(r"perplexity_per_character ([\d.]+), bits_per_byte [\d.]+, tokens (\d+)", recipe())
    (_, old), (untrained, new), (rows, _), (both, _) = [tuple(map(float, pair)) for pair in found]
    assert new < old and both < rows < untrained
    (file,) = (tmp_path / "zh" / "export" / "gguf").glob("*.gguf")
    written = file.stat().st_mtime_ns
    assert recipe().count("is done: ") == 3 and file.stat().st_mtime_ns == written


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path: Path) -> None:
    python = next((path for path in (REPOSITORY / ".venv-docs").glob("*/python*") if path.stem == "python"), None)
    if python is None:
        pytest.skip("requirements-docs.txt is not installed; bash scripts/docs.sh makes .venv-docs")
    built = [str(python), "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(built, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [path for path in (tmp_path / "site").rglob("*") if path.suffix in (".html", ".css")]
    assert len(pages) >= 45
    loads = r"<(?:script|img|iframe|source)[^>]+src=|<link[^>]+href=|@import |url\("
    foreign = re.compile(rf"""(?:{loads})["']?(?:https?:)?//""")
    for page in pages:
        found = foreign.search(page.read_text(encoding="utf-8"))
        assert not found, f"{page.name}: {found}"
    for language, page in (("en", "en/data.html"), ("zh", "zh/data.html"), ("zh", "coming-from_zh.html")):
        assert f'<html lang="{language}"' in (tmp_path / "site" / page).read_text(encoding="utf-8")
