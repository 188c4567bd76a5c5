"""The run directory tells where everything lies, from any folder, and a start that is refused leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from onecard.config.parsing import parse, to_yaml
from onecard.config.training import FinetuneConfig
from onecard.errors import OneCardError
from onecard.recipes import finetune
from onecard.train.rundir import PATHS, portable
from tests import tiny

RELATIVE = {"model_path": "base", "data_path": "data.json", "output_path": "outputs/mine", "cache_path": "cache"}


@pytest.fixture
def here(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: base and data lie in it."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    (tmp_path / "home" / "base").symlink_to(tiny_base)
    tiny.write_instructions(Path("data.json"))
    return tmp_path / "home"


def test_the_stored_options_mean_the_same_in_another_folder(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config_for(Path("base"), Path("data.json"), Path("outputs/mine"), cache_path="cache")
    finetune(config)
    stored = yaml.safe_load(Path("outputs/mine/onecard.yaml").read_text(encoding="utf-8"))
    assert {name: stored[name] for name in RELATIVE} == {n: str(here / path) for n, path in RELATIVE.items()}
    assert stored["ask_file"] == "", "no file of questions is not the folder that one is in"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    finetune(parse(FinetuneConfig, ["--config", str(here / "outputs/mine/onecard.yaml"), "--num_epoch", "2"]))
    assert [step for step, _ in tiny.losses_of(here / "outputs/mine")] == [1, 2, 3, 4, 5, 6]
    assert list(Path().iterdir()) == []


def test_every_option_that_may_name_a_file_is_stored_by_its_whole_path(here: Path) -> None:
    """Hub ids, names of templates and words are no files, even where a file is called like them."""
    for name in ("file", "alpaca", "auto", "none"):
        Path(name).write_text("x", encoding="utf-8")
    changed = portable(tiny.with_options(FinetuneConfig(), dict.fromkeys(PATHS, "file")))
    values = yaml.safe_load(to_yaml(changed))
    assert [values[name] for name in PATHS] == [str(here / "file")] * len(PATHS)
    words = {"data_path": "someone/dataset", "model_path": "gpt2", "prompt_type": "alpaca", "init_adapter": None,
             "resume_from_checkpoint": "auto"}  # fmt: skip
    kept = portable(tiny.with_options(FinetuneConfig(), words))
    assert {name: yaml.safe_load(to_yaml(kept))[name] for name in words} == words


@pytest.mark.parametrize("wrong", [
    {"data_path": "nothing.json"}, {"model_path": "no-model"}, {"vram": 0.0001}, {"device": "cuda:9"},
    {"resume_from_checkpoint": "nowhere"},
])  # fmt: skip
def test_a_start_that_is_refused_leaves_nothing_behind(wrong: dict[str, object], here: Path) -> None:
    before = sorted(Path().iterdir())
    options = {"cache_path": str(here.parent / "cache"), **wrong}
    with pytest.raises(OneCardError):
        finetune(tiny.config_for(Path("base"), Path("data.json"), Path("new/outputs/mine"), **options))
    assert sorted(Path().iterdir()) == before


def test_a_folder_that_was_there_stays(here: Path) -> None:
    Path("mine").mkdir()
    with pytest.raises(OneCardError):
        finetune(tiny.config_for(Path("base"), Path("nothing.json"), Path("mine"), cache_path="../cache"))
    assert list(Path("mine").iterdir()) == []
