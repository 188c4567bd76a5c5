"""The recipes of field-recipes/: data and settings in order, and on the tiny base an evaluation that improves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from onecard.config.parsing import options_of
from onecard.config.training import FinetuneConfig
from onecard.console import run_main
from onecard.data.sources import ReadReport, read
from onecard.evaluate.compare import compare_reports
from onecard.installation import SHIPPED
from onecard.programs import recipe
from onecard.train.findings import AFTER, BEFORE

RECIPES = ("classical-chinese", "code-comments", "customer-service", "extraction", "legal", "medical", "role-play")


def rows_of(name: str) -> list[dict]:
    lines = (SHIPPED / "field-recipes" / name / "data.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts_of(row: dict) -> list[str]:
    return [turn["content"] for turn in row["messages"]] if "messages" in row else list(row.values())


def test_the_recipes_are_those_that_help_and_pages_tell() -> None:
    assert tuple(recipe.names()) == RECIPES
    assert f"Recipes: {', '.join(RECIPES)}." in " ".join((recipe.__doc__ or "").split())
    for page in ("docs/en/recipes.md", "docs/zh/recipes.md"):
        text = (SHIPPED / page).read_text(encoding="utf-8")
        told = sorted(re.findall(r"^\| `([\w-]+)` \| ", text, re.MULTILINE))
        planned = re.findall(r"^\| ([\w-]+) \| ([\d,]+) \| [\d.]+ GiB", text, re.MULTILINE)
        lengths = {name: yaml.safe_load((recipe.RECIPES / name / "settings.yaml").read_text(encoding="utf-8"))
                   for name in RECIPES}  # fmt: skip
        assert told == list(RECIPES) == [name for name, _ in planned], "python scripts/write_recipe_plans.py"
        assert [int(length.replace(",", "")) for _, length in planned] == [
            lengths[name]["cutoff_len"] for name in RECIPES
        ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_hundred_rows_that_training_reads(name: str) -> None:
    report = ReadReport()
    samples = list(read(str(recipe.RECIPES / name / "data.jsonl"), report=report))
    rows = rows_of(name)
    assert len(samples) == len(rows) == 100 and not report.n_bad
    assert len({json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows}) == 100
    texts = [text for row in rows for text in texts_of(row)]
    assert len(texts) >= 200 and not [text for text in texts if text != text.strip() or "\ufffd" in text]


def test_what_is_extracted_stands_in_the_sentence() -> None:
    rows = rows_of("extraction")
    for row in rows:
        found = json.loads(row["output"])
        assert len(found) == 3 and all(str(value) in row["input"] for value in found.values()), row
    assert len({tuple(json.loads(row["output"])) for row in rows}) == 2, "the keys of each language"


def test_a_voice_is_told_by_the_system_text() -> None:
    rows = [row["messages"] for row in rows_of("role-play")]
    assert all([turn["role"] for turn in turns] == ["system", "user", "assistant"] for turns in rows)
    assert len({turns[0]["content"] for turns in rows}) == 10


def test_settings_name_options_alone() -> None:
    files = sorted(recipe.RECIPES.rglob("*.yaml"))
    assert len(files) == len(RECIPES) + 1
    for file in files:
        assert set(yaml.safe_load(file.read_text(encoding="utf-8"))) <= set(options_of(FinetuneConfig)), file


@pytest.mark.parametrize("name", RECIPES[-1:])
def test_settings_are_for_a_card_and_without_a_base_a_trial(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> dict:
        with pytest.raises(SystemExit):
            recipe.main([name, *words, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    trial, real = shown(), shown("--model_path", "owner/model", "--num_epoch", "7")
    assert (Path(trial["model_path"]).name, trial["bits"], trial["kl_anchor"]) == ("tiny-llama", 32, 10)
    assert (real["model_path"], real["bits"], real["kl_anchor"], real["num_epoch"]) == ("owner/model", 4, 0.1, 7)
    assert trial["data_path"] == real["data_path"] and Path(real["data_path"]).parent.name == name
    assert trial["output_path"] == f"outputs/recipe-{name}"


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "say which recipe: classical-chinese, "), (["medcal"], "no recipe (did you mean medical?); there are "),
     (["--seed", "3"], "say which recipe"), (["legal", "--num_epochs", "3"], "--num_epoch")],
)  # fmt: skip
def test_what_is_wrong_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(lambda: recipe.main(words)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_rows_put_aside_are_answered_better_after_the_trial(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    start = [name, "--cache_path", str(tmp_path / "cache"), "--device", "cpu"]
    assert run_main(lambda: recipe.main(start)) == 0
    run = tmp_path / "outputs" / f"recipe-{name}" / "run"
    (suite,) = compare_reports(run / BEFORE, run / AFTER, level=0.99)
    assert suite.test.direction * suite.is_better == 1 and suite.test.n == 20
    assert "verdict: ship" in capsys.readouterr().out
    assert run_main(lambda: recipe.main(start)) == 0, "the same command again finds it done"
