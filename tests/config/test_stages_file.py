"""A stages file: what each stage gets, and every bad line named by file, stage and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from onecard.config.parsing import parse
from onecard.config.stages import parse_stages
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError
from onecard.programs import finetune_chat

TWO = [{"name": "one", "num_epoch": 1}, {"name": "two", "learning_rate": 5e-5, "lora_target_modules": ["q_proj"]}]


@pytest.fixture
def write(tmp_path: Path):
    def file(content: object) -> str:
        path = tmp_path / "stages.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return file


def stages_of(file: str, *words: str):
    return parse_stages(["--stages", file, *words], description="", defaults={})


def test_a_stage_has_the_common_options_its_own_and_the_flags(write) -> None:
    file = write({"lora_r": 16, "num_epoch": 2, "learning_rate": 1e-3, "stages": TWO})
    one, two = stages_of(file, "--output_path", "out", "--learning_rate", "3e-4")
    assert [(stage.number, stage.name, stage.directory) for stage in (one, two)] == [
        (1, "one", Path("out/1-one")), (2, "two", Path("out/2-two"))
    ]  # fmt: skip
    assert one.config.lora.lora_r == two.config.lora.lora_r == 16
    assert (one.config.train.num_epoch, two.config.train.num_epoch) == (1, 2)
    assert one.config.train.learning_rate == two.config.train.learning_rate == 3e-4, "flags win"
    assert two.config.lora.lora_target_modules == "q_proj"
    assert [stage.name for stage in stages_of(write(TWO))] == ["one", "two"], "a list alone"
    assert stages_of(write(TWO))[1].config.train.learning_rate == 5e-5
    assert parse_stages(["--num_epoch", "1"], description="", defaults={}) == []


def test_what_finetune_chat_starts_from_is_every_stages_start(write, monkeypatch) -> None:
    found = []
    monkeypatch.setattr("onecard.stages.finetune_stages", found.extend)
    finetune_chat.main([f"--stages={write(TWO)}"])
    assert [stage.config.data.dialogue for stage in found] == [True, True]


BAD = {
    "unknown-key": ([{"name": "a", "epoch": 1}], r"stages\.yaml: stage a: epoch: no such option"),
    "unknown-common": ({"epohcs": 1, "stages": TWO}, r"stages\.yaml: epohcs: no such option"),
    "wrong-type": ([*TWO, {"name": "c", "num_epoch": "many"}], r"stages\.yaml: stage c: --num_epoch: 'many' is not a"),
    "no-file": ([*TWO, {"name": "c", "data_path": "none.json"}], r"stage c: --data_path: there is no file"),
    "contradiction": ([{"name": "a", "bits": 32, "dtype": "fp16"}], "stage a: --bits: 32 contradicts"),
    "several": (
        [{"name": "a", "lora_r": 0, "num_epoch": 0}],
        r"stage a: 2 settings cannot work:\n  --lora_r.*\n  --num_e",
    ),
    "in-all": ({"lora_r": 0, "stages": TWO}, r"^\S+stages\.yaml: all 2 stages: --lora_r: 0 would train nothing[^\n]*$"),
    "base-of-one": ([{"name": "a", "model_path": "x"}], "stage a: model_path: is of all stages"),
    "adapter-of-one": ([{"name": "a", "init_adapter": "x"}], "stage a: init_adapter: is of all stages"),
    "clock-of-all": ({"max_hours": 3, "stages": TWO}, "max_hours: say for which stage"),
    "resume": (
        [{"name": "a", "resume_from_checkpoint": "x"}],
        "stage a: resume_from_checkpoint: does not go with --st",
    ),
    "no-name": ([{"num_epoch": 1}], "stage 1: name: None is no name"),
    "path": ([{"name": "../a"}], r"name: '\.\./a' is no name"),
    "twice": ([{"name": "a"}, {"name": "a"}], "stage a: name: there are two stages of this name"),
    "empty": ({"stages": []}, "must hold `stages:` and under it a list"),
    "no-list": ("lora_r: 8", "must hold `stages:` and under it a list"),
    "text": ("stages", "must hold `stages:`"),
    "no-yaml": ("a: [", "is not YAML"),
}


@pytest.mark.parametrize("bad", list(BAD))
def test_a_bad_file_is_refused_by_stage_and_key(bad, write) -> None:
    content, expected = BAD[bad]
    with pytest.raises(ConfigError, match=expected):
        stages_of(write(content))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "a.yaml"], "--config: does not go with --stages"),
        (["--max_hours", "3"], "--max_hours: say for which stage"),
        (["--resume_from_checkpoint=none"], "--resume_from_checkpoint: does not go with --stages"),
    ],
)
def test_flags_that_a_chain_cannot_have(words, expected, write) -> None:
    with pytest.raises(ConfigError, match=expected):
        stages_of(write(TWO), *words)


def test_the_flag_alone_and_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--stages: needs a value"):
        parse_stages(["--stages", "--bits", "4"], description="", defaults={})
    with pytest.raises(ConfigError, match=r"--stages: cannot read .*none\.yaml: No such file"):
        stages_of(str(tmp_path / "none.yaml"))
    config = tmp_path / "config.yaml"
    config.write_text("stages: a.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="--stages: is for the command line"):
        parse(FinetuneConfig, ["--config", str(config)])


def test_print_config_shows_every_stage(write, capsys) -> None:
    with pytest.raises(SystemExit):
        stages_of(write(TWO), "--print_config", "--lora_r", "4")
    printed = capsys.readouterr().out
    one, two, end = yaml.safe_load_all(printed)
    assert "# stage 1: one" in printed and end is None
    assert one["lora_r"] == two["lora_r"] == 4 and two["learning_rate"] == 5e-5
