"""Command line and YAML: order of precedence, every problem at once, nearest names, an instant --help."""

from __future__ import annotations

import cProfile
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from onecard.config import parsing as cli
from onecard.config.given_paths import paths_in
from onecard.config.inference import ChatConfig, GenerateConfig, ServeConfig
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError
from onecard.programs.verify_server import VerifyServerConfig

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRIES = ["finetune.py", "finetune_chat.py", "generate.py", "chat.py"]
TOOLS = sorted(f"tools/{path.name}" for path in (REPOSITORY / "tools").glob("[!_]*.py"))
HELP_LIMIT_S = 0.3
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy", "pandas", "matplotlib"}


def finetune(*words: str, **keywords) -> FinetuneConfig:
    return cli.parse(FinetuneConfig, list(words), **keywords)


def refusal(*words: str, config_class: type = FinetuneConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        cli.parse(config_class, list(words))
    return str(caught.value)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("lora_r: 4\nlearning_rate: 1e-3\nmodel_path: from/yaml\ndialogue: true\n", encoding="utf-8")
    return path


# --- order -----------------------------------------------------------------------------------------------------------


def test_flags_win_over_yaml_and_yaml_over_defaults(settings: Path) -> None:
    plain = finetune()
    config = finetune("--lora_r", "64", "--config", str(settings), defaults={"model_path": "program", "seed": 7})
    assert plain.lora.lora_r == 8
    assert config.lora.lora_r == 64  # flag, although it stands before --config
    assert config.model.model_path == "from/yaml"  # YAML, over the program's own default
    assert config.train.seed == 7  # the program's own default, over the class's
    assert config.lora.lora_alpha == plain.lora.lora_alpha  # the class's default
    assert config.train.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as text; it is a number here all the same


def test_later_yaml_wins(settings: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("lora_r: 5\n", encoding="utf-8")
    config = finetune("--config", str(settings), f"--config={second}")
    assert (config.lora.lora_r, config.model.model_path) == (5, "from/yaml")


def test_stored_options_stand_between_defaults_and_yaml(settings: Path) -> None:
    asked: list[dict] = []

    def stored(typed) -> dict:
        asked.append(dict(typed))
        return {"lora_r": 2, "lora_alpha": 99, "model_path": "from/run"}

    config = finetune("--config", str(settings), "--lora_r", "16", "--seed=3", stored=stored)
    assert (config.lora.lora_r, config.lora.lora_alpha, config.model.model_path) == (16, 99, "from/yaml")
    assert len(asked) == 1
    assert (asked[0]["seed"], asked[0]["lora_r"], asked[0]["model_path"]) == (3, 16, "from/yaml")


def test_yaml_round_trip(tmp_path: Path) -> None:
    data = tmp_path / "训练.json"
    data.write_text("[]", encoding="utf-8")
    first = finetune("--bits=8", "--data_path", str(data), "--test_size", "0", "--wandb", "--resume_from_checkpoint")
    path = tmp_path / "onecard.yaml"
    path.write_text(cli.to_yaml(first), encoding="utf-8")
    assert finetune("--config", str(path)) == first
    assert first.train.wandb is True
    assert first.train.resume_from_checkpoint == "auto"


@pytest.mark.parametrize(
    "words",
    [
        ["--data_path", "a.json", "b c.txt", "--bits", "8"],
        ["--data_path", "a.json", "--bits", "8", "--data_path=b c.txt"],
        ["--config", "several.yaml", "--bits", "8"],
    ],
)
def test_several_files_follow_one_flag_or_several(words: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("several.yaml").write_text("data_path: [a.json, b c.txt]\n", encoding="utf-8")
    for name in ("a.json", "b c.txt", "one.json"):
        Path(name).touch()
    config = finetune(*words)
    assert (config.data.data_path, config.model.bits) == (["a.json", "b c.txt"], 8)
    Path("again.yaml").write_text(cli.to_yaml(config), encoding="utf-8")
    assert finetune("--config", "again.yaml") == config
    assert finetune("--config", "several.yaml", "--data_path", "one.json").data.data_path == "one.json"


def test_print_config_shows_the_resolved_options(capsys: pytest.CaptureFixture, settings: Path) -> None:
    with pytest.raises(SystemExit) as left:
        finetune("--config", str(settings), "--bits", "16", "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert left.value.code == 0
    assert (shown["bits"], shown["lora_r"], shown["model_path"]) == (16, 4, "from/yaml")
    assert set(shown) == set(cli.options_of(FinetuneConfig))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "a: b",
        "[1, 2]",
        "{x: 1}",
        "null",
        "true",
        "007",
        "1e5",
        "- a",
        "# not a comment",
        "",
        " spaced ",
        "写一首诗：春天",
        "a\nb",
    ],
)
def test_text_is_taken_as_typed(words: str) -> None:
    config = cli.parse(GenerateConfig, [f"--instruction={words}", f"--system={words}"])
    assert config.ask.instruction == words
    assert config.inference.system == words


def test_numbers_and_switches() -> None:
    config = finetune(
        "--learning_rate", "2e-5", "--num_epoch=1.5", "--strict", "--dialogue", "false", "--max_steps", "3"
    )
    assert (config.train.learning_rate, config.train.num_epoch, config.train.max_steps) == (2e-5, 1.5, 3)
    assert (config.data.strict, config.data.dialogue) == (True, False)


def test_negative_numbers_are_values_not_flags() -> None:
    assert "--num_epoch: -1.0 would train nothing" in refusal("--num_epoch", "-1")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lora_rr", "--lora_r"),
        ("--tries", "--num_epoch"),
        ("--learning-rate", "--learning_rate"),
        ("--ouput_path", "--output_path"),
    ],
)
def test_unknown_flag_names_the_nearest(typed: str, meant: str) -> None:
    message = refusal(typed, "3")
    assert message.startswith(f"{typed}: no such option")
    if typed != "--tries":  # not close enough to guess at
        assert f"did you mean {meant}?" in message


@pytest.mark.parametrize(
    ("word", "switch", "choice"), [("on", True, "on"), ("off", False, "off"), ("auto", "auto", "auto")]
)
def test_on_and_off_mean_the_same_as_flags_and_in_yaml(word: str, switch: object, choice: str, tmp_path: Path) -> None:
    """YAML 1.1 reads them as true and false."""
    path = tmp_path / "settings.yaml"
    path.write_text(f"gradient_checkpointing: {word}\noffload_embeddings: {word}\n", encoding="utf-8")
    for words in (["--config", str(path)], ["--gradient_checkpointing", word, "--offload_embeddings", word]):
        config = cli.parse(FinetuneConfig, words)
        assert (config.model.gradient_checkpointing, config.memory.offload_embeddings) == (switch, choice)


def test_a_switch_with_a_third_word_is_still_a_switch() -> None:
    for words, expected in ((["--rehearsal"], True), (["--rehearsal", "true"], True), (["--rehearsal=false"], False)):
        assert cli.parse(FinetuneConfig, words).memory.rehearsal is expected
    with pytest.raises(ConfigError, match=r"--rehearsal: 'maybe' is not one of auto, true, false"):
        cli.parse(FinetuneConfig, ["--rehearsal", "maybe"])


def test_unknown_yaml_key_names_file_and_nearest(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("lora_rr: 3\n", encoding="utf-8")
    message = refusal("--config", str(path))
    assert f"{path}: lora_rr" in message
    assert "did you mean --lora_r?" in message


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("cutoff_len: many\nwarmup_ratioo: 1\n", encoding="utf-8")
    words = [
        "--config",
        str(path),
        "--bits",
        "5",
        "--lorar",
        "3",
        "stray",
        "--learning_rate=x",
        "--num_epoch=-1",
        "--seed",
    ]
    message = refusal(*words)
    expected = [
        "--cutoff_len",
        "warmup_ratioo",
        "--bits",
        "--lorar",
        "stray",
        "--learning_rate",
        "--num_epoch",
        "--seed",
    ]
    missing = [flag for flag in expected if f"{flag}: " not in message]
    assert not missing
    assert message.startswith(f"{len(expected)} settings cannot work:")
    assert len(message.splitlines()) == len(expected) + 1


@pytest.mark.parametrize(
    ("flag", "path", "words"),
    [
        ("data_path", "~nobody-here/rows.json", "the home directory of ~nobody-here is not known"),
        ("output_path", "~nobody-here", "the home directory of ~nobody-here is not known"),
        ("lora_path", "~nobody-here/a,outputs/b", "the home directory of ~nobody-here is not known"),
        ("run", "~nobody-here/run", "the home directory of ~nobody-here is not known"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="~NAME is a folder beside one's own there")
def test_a_path_that_the_system_cannot_look_for(flag: str, path: str, words: str) -> None:
    kinds = {"lora_path": GenerateConfig, "run": VerifyServerConfig}
    message = refusal(f"--{flag}", path, "--no_option", "1", config_class=kinds.get(flag, FinetuneConfig))
    assert f"--{flag}: {words}" in message and "--no_option" in message


def test_the_home_directory_stands_for_a_tilde_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
    (tmp_path / "settings.yaml").write_text("output_path: ~/runs/a\nprompt_type: ~/mine.jinja\n", encoding="utf-8")
    words = [
        f"--config={tmp_path / 'settings.yaml'}",
        "--data_path=~/rows.json",
        "sample/rows.json",
        "--wandb_project=~",
    ]
    config = finetune(*words, opens_files=False)
    assert config.train.output_path == str(tmp_path / "runs" / "a")
    assert config.data.prompt_type == str(tmp_path / "mine.jinja")
    assert config.data.data_path == [str(tmp_path / "rows.json"), "sample/rows.json"]
    assert config.train.wandb_project == "~"
    assert "cannot read ~nobody-here/a.yaml" in refusal("--config=~nobody-here/a.yaml")
    (tmp_path / "~" / "runs" / "a").mkdir(parents=True)  # as earlier versions made
    monkeypatch.chdir(tmp_path)
    assert finetune(*words, opens_files=False).train.output_path == "~/runs/a"


def test_several_paths_may_be_longer_together_than_one() -> None:
    runs = [f"run-{number}" for number in range(60)]
    assert paths_in(",".join(runs)) == runs


@pytest.mark.skipif(sys.platform == "win32", reason="names may be longer there, and links need rights")
def test_a_name_too_long_and_a_loop_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")  # as a name it might be a data set of the Hub
    for path, why in (("loop", "Too many levels"), ("m" * 300 + "/rows.json", "File name too long")):
        assert f"--data_path: {path[:100]} cannot be looked for: {why}" in refusal("--data_path", path)
    assert "cannot be looked for" in refusal("--resume_from_checkpoint", "a\0b")


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [", "is not YAML"), ("- a\n- b\n", "not a list"), ("just words", "not a str")],
)
def test_a_file_that_is_no_settings_file(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    message = refusal("--config", str(path))
    assert message.startswith("--config: ")
    assert words in message
    assert str(path) in message


def test_missing_and_empty_settings_files(tmp_path: Path) -> None:
    assert "cannot read" in refusal("--config", str(tmp_path / "none.yaml"))
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n", encoding="utf-8")
    assert finetune("--config", str(empty)) == finetune()


@pytest.mark.parametrize("config_class", [FinetuneConfig, GenerateConfig, ServeConfig])
def test_a_line_without_a_value_stands_for_the_default(config_class: type, tmp_path: Path) -> None:
    """As in the files of other kits, where most options stand with nothing behind them."""
    path, names = tmp_path / "empty.yaml", list(cli.options_of(config_class))
    path.write_text("".join(f"{name}:\n" for name in names), encoding="utf-8")
    assert len(names) > 40
    words = ["--config", str(path)] + (["--instruction", "a"] if config_class is GenerateConfig else [])
    assert cli.parse(config_class, words) == cli.parse(config_class, words[2:])
    assert "--num_beams: 'null' is not a whole number" in refusal("--num_beams", "null", config_class=GenerateConfig)


def test_yaml_that_holds_objects_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    marker = tmp_path / "marker"
    path.write_text(f"model_path: !!python/object/apply:os.mkdir ['{marker.as_posix()}']\n", encoding="utf-8")
    assert "is not YAML" in refusal("--config", str(path))
    assert not marker.exists()


# --- every option of every command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [FinetuneConfig, GenerateConfig, ChatConfig, ServeConfig])
def test_every_option_takes_a_flag(config_class: type) -> None:
    options = cli.options_of(config_class)
    words = [f"--{name}={option.default}" for name, option in options.items() if option.default is not None]
    assert cli.parse(config_class, words) == config_class()
    assert len(words) >= {FinetuneConfig: 45}.get(config_class, 28)


def test_a_flag_for_texts_may_be_repeated_and_takes_a_json_list_too(tmp_path: Path) -> None:
    def stops(*words: str) -> list[str]:
        return cli.parse(GenerateConfig, list(words)).sampling.stop

    assert stops() == []
    assert stops("--stop", "[INST]", "--stop=\\nUser:", "--stop", "a: b") == ["[INST]", "\nUser:", "a: b"]
    assert stops("--stop", '["x", "y\\n"]', "--stop", "z") == ["x", "y\n", "z"]
    (tmp_path / "c.yaml").write_text("stop: [x, 'y z']", encoding="utf-8")
    assert stops("--config", str(tmp_path / "c.yaml")) == ["x", "y z"]
    (tmp_path / "c.yaml").write_text("stop: {x: 1}", encoding="utf-8")
    with pytest.raises(ConfigError, match="--stop"):
        stops("--config", str(tmp_path / "c.yaml"))


@dataclass
class Shape:
    """A group with one of each type."""

    size: int = 1
    """How many."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    name: str | None = None
    """Whose."""


@dataclass
class Sample:
    """A command with one group."""

    shape: Shape = field(default_factory=Shape)


def test_help_holds_each_docstring_and_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        cli.parse(Sample, ["--size", "3", "--help"], description="What it does.", defaults={"size": 12})
    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    for words in ("What it does.", "--size", "How many.", "12", "--kind {a,b}", "Which.", "Whose.", "--config"):
        assert words in shown


def test_help_lists_each_option_by_the_one_flag_that_is_taken(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        finetune("--help")
    lines = re.findall(r"^  (--.+?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    listed = [re.sub(r" (?!--)\S+", "", line).removeprefix("--") for line in lines]
    assert sorted(listed) == sorted([*cli.options_of(FinetuneConfig), "config", "print_config", "language"])


def test_a_long_file_of_options_is_read_at_once(tmp_path: Path) -> None:
    """Counted in calls of functions: looking at all options for each one in the file takes millions of them."""
    file = tmp_path / "all.yaml"
    file.write_text(cli.to_yaml(FinetuneConfig()), encoding="utf-8")
    finetune("--config", str(file))  # what is kept of each type is made
    with cProfile.Profile() as profile:
        assert finetune("--config", str(file)) == FinetuneConfig()
    assert sum(entry.callcount for entry in profile.getstats()) < 400_000


def test_commands_in_a_description_keep_their_lines(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    description = (
        "What it does," + " in many words" * 6 + ".\n\npython a.py --x " + "1" * 60 + "\npython a.py --y\nAnd a\nnote."
    )
    with pytest.raises(SystemExit):
        cli.parse(Sample, ["--help"], description=description)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("python")] == ["python a.py --x " + "1" * 60, "python a.py --y"]
    assert "And a note." in lines
    assert max(len(line) for line in lines if not line.startswith("python")) <= 60


# --- as a process ----------------------------------------------------------------------------------------------------


def run(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def spent_by_children_s() -> float:
    """Processor time of all children that ended; wall time where the system does not tell it (Windows)."""
    times = os.times()
    return times.children_user + times.children_system if os.name == "posix" else times.elapsed


@pytest.fixture(scope="module")
def help_limit_s() -> float:
    """0.3 s; on a slow machine six times what Python takes there to start and to read the file of options."""
    least_s = float("inf")
    for _ in range(5):
        start = spent_by_children_s()
        assert (
            run("-c", "import ast; ast.parse(open('onecard/config/training.py', encoding='utf-8').read())").returncode
            == 0
        )
        least_s = min(least_s, spent_by_children_s() - start)
    return max(HELP_LIMIT_S, 6 * least_s)


# Those with the most options; that none loads anything heavy is the next test's.
@pytest.mark.parametrize("entry", ["finetune.py", "tools/serve.py"])
def test_help_is_instant(entry: str, help_limit_s: float) -> None:
    best_s = float("inf")
    n_runs = 0
    # The best of five, of processor time: caches that other work on the machine fills cost some of it, too.
    while n_runs < 5 and best_s >= help_limit_s:
        start = spent_by_children_s()
        done = run(entry, "--help")
        best_s = min(best_s, spent_by_children_s() - start)
        n_runs += 1
        assert done.returncode == 0, done.stderr
        assert "--" in done.stdout
    assert best_s < help_limit_s, f"best of {n_runs}: {best_s:.3f} s, {help_limit_s:.3f} allowed"


@pytest.mark.parametrize("entry", [*ENTRIES, *TOOLS])
def test_help_imports_nothing_heavy(entry: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{entry!r}, '--help']\n"
        f"sys.path[0] = {str(REPOSITORY / entry).rpartition('/')[0]!r}\n"
        "try:\n"
        f"    runpy.run_path({entry!r}, run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    print('\\nLEFT', left.code)\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    lines = run("-c", code).stdout.splitlines()
    loaded = set(lines[-1].split()[1:])
    assert lines[-2] == "LEFT 0"
    assert "onecard" in loaded  # the list is real
    assert not loaded & HEAVY


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_flag_is_one_message_and_exit_2(entry: str) -> None:
    done = run(entry, "--model_pth", "x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --model_pth: no such option (did you mean --model_path?)\n"
    assert "Traceback (most recent call last)" in run(entry, "--model_pth", "x", "--debug").stderr


def test_words_in_front_of_all_options_have_names() -> None:
    assert cli.words_by_name(["vllm", "RUN", "--port", "1"], "--engine", "--run", "--out") == [
        "--engine", "vllm", "--run", "RUN", "--port", "1",
    ]  # fmt: skip
    assert cli.words_by_name(["a", "b"], "--run") == ["--run", "a", "b"]  # which `parse` refuses by name
    assert cli.words_by_name(["--run", "a"], "--url") == ["--run", "a"]


def test_every_program_takes_debug(tmp_path: Path) -> None:
    stored = tmp_path / "stored.yaml"
    stored.write_text("debug: false\nseed: 7\n", encoding="utf-8")  # as --print_config has written it
    for words in (["--debug"], ["--debug", "true"], ["--debug=false"], ["--config", str(stored)]):
        assert cli.parse(GenerateConfig, words).sampling.seed == (7 if "--config" in words else 42)
    assert refusal("--debug", "x", config_class=GenerateConfig) == "--debug: 'x' is not one of true, false"


def test_finetune_chat_starts_from_its_own_defaults() -> None:
    shown = yaml.safe_load(run("finetune_chat.py", "--print_config").stdout)
    plain = yaml.safe_load(run("finetune.py", "--print_config").stdout)
    assert shown["dialogue"] is True
    assert Path(shown["data_path"]).name == "chat_sample.json"
    assert Path(shown["data_path"]).is_file()
    assert shown["output_path"] != plain["output_path"]
    assert set(shown) == set(plain)


@dataclass
class Make:
    """Make a thing."""

    path: str = "here"
    """Where."""


def test_a_verb_stands_first(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = {"make": Make, "verify": Make}
    verb, config = cli.parse_verb(verbs, ["verify", "--path", "there"])
    assert (verb, config.path) == ("verify", "there")
    with pytest.raises(ConfigError, match=r"'maek' is none of make, verify \(did you mean make\?\)"):
        cli.parse_verb(verbs, ["maek", "--path", "there"])
    for words in ([], ["--path", "there"]):
        with pytest.raises(ConfigError, match="say first what to do: make, verify"):
            cli.parse_verb(verbs, words)
    with pytest.raises(SystemExit) as ended:
        cli.parse_verb(verbs, ["--help"], description="About it.")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "About it." in shown
    assert "make       Make a thing." in shown
    with pytest.raises(SystemExit):
        cli.parse_verb(verbs, ["make", "--help"])
    shown = capsys.readouterr().out
    assert " make [--config FILE.yaml]" in shown
    assert "--path" in shown


@pytest.mark.parametrize("typed", ["regex:[0-9]+, 'a'", 'regex:^["{]', "number,length:-20:0.5"])
def test_patterns_of_rewards_and_paths_of_suites_stay_as_they_were_typed(typed: str) -> None:
    config = finetune("--objective", "grpo", "--reward", typed, "--eval_suites", f"open:{typed}")
    assert config.train.reward == typed and config.train.eval_suites == f"open:{typed}"
    assert finetune("--objective", "grpo", "--reward", "number", "length:-20").train.reward == "number,length:-20"
