"""Run a recipe for a domain, from its data to a verdict: split, look, train, score, judge.

onecard recipe medical
onecard recipe legal --model_path Qwen/Qwen2.5-7B-Instruct --output_path outputs/legal
onecard recipe customer-service --data_path my_rows.jsonl --model_path Qwen/Qwen2.5-7B-Instruct
Recipes: classical-chinese, code-comments, customer-service, extraction, legal, medical, role-play. The words behind the
name are those of finetune. Without --model_path the embedded tiny base shows the way in a minute or two. --data_path
takes other rows in place of the recipe's; --data what is learned beside them, so that less is forgotten. The exit code
is the verdict's: 0 ship, 2 do not ship, 3 undecided. Cut off, the same command goes on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.console import nearest, say
from onecard.errors import ConfigError
from onecard.installation import SHIPPED
from onecard.model.allocator import prefer_expandable_segments

RECIPES = SHIPPED / "field-recipes"
TRIAL = RECIPES / "tiny-llama.yaml"  # the settings of a field are for a card; these make them a trial on the tiny base
VALIDATION_SIZE = 0.2


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else ""
    config = _config(name, words)
    prefer_expandable_segments()
    output = Path(config.train.output_path)
    train, validation = _split(config, output / "data")
    _look(config, train)
    run = _train(config, train, validation, output / "run")
    _score(config, run, validation)
    say("--- the verdict")
    from onecard.programs import _ship

    _ship.main(["--run", str(run)])


def names() -> list[str]:
    """The recipes that there are."""
    return sorted(path.parent.name for path in RECIPES.glob("*/settings.yaml"))


def _config(name: str, words: list[str]) -> FinetuneConfig:
    """The recipe's settings, with what is typed. Raises ConfigError for a recipe that is not there."""
    asks_help = {"-h", "--help"} & {*words}
    if name not in names() and (name or not asks_help):
        known = ", ".join(names())
        raise ConfigError("", f"{name!r} is no recipe{nearest(name, names())}; there are {known}" if name else
                          f"say which recipe: {known}")  # fmt: skip
    is_trial = not any(word.partition("=")[0] == "--model_path" for word in words)
    files = [] if not name else [RECIPES / name / "settings.yaml", *([TRIAL] if is_trial else [])]
    settings = [word for file in files for word in ("--config", str(file))]
    return parse(FinetuneConfig, [*settings, *words], description=__doc__ or "",
                 defaults={"output_path": f"outputs/recipe-{name}"})  # fmt: skip


def _split(config: FinetuneConfig, folder: Path) -> tuple[Path, Path]:
    """The rows to learn and those to measure on, which the first start has put apart."""
    from onecard.config.curation import SplitOptions
    from onecard.curation.split import TRAIN_FILE, VALIDATION_FILE, split

    say("--- the data: checked, and a fifth put aside; near-duplicates stay on one side")
    if not folder.is_dir():
        data = config.data
        split(SplitOptions(data_path=data.data_path, output_path=str(folder), validation_size=VALIDATION_SIZE,
                           columns=data.columns, seed=config.train.seed))  # fmt: skip
    return folder / TRAIN_FILE, folder / VALIDATION_FILE


def _look(config: FinetuneConfig, train: Path) -> None:
    from onecard.programs import inspect

    say("--- what training will learn of them")
    data = config.data
    inspect.main(["--data_path", str(train), "--model_path", config.model.model_path, "--prompt_type", data.prompt_type,
                  "--cutoff_len", str(data.cutoff_len), "--n_shown", "1"])  # fmt: skip


def _train(config: FinetuneConfig, train: Path, validation: Path, run: Path) -> Path:
    """Learn the rows beside what --data names, and measure the other ones before and after."""
    from onecard.recipes import finetune

    say("--- training, and the loss of the rows that were put aside, before and after")
    beside = f",{config.data.data}" if config.data.data else ""
    data = replace(config.data, data_path=DataOptions().data_path, data=f"{train}{beside}")
    suites = f"loss:{validation}" + (f",{config.train.eval_suites}" if config.train.eval_suites else "")
    settings = replace(config.train, output_path=str(run), eval_suites=suites)
    return finetune(replace(config, data=data, train=settings))


def _score(config: FinetuneConfig, run: Path, validation: Path) -> None:
    from onecard.programs.score import ScoreConfig, ScoreOptions, scored

    say("--- answers to the rows that were put aside")
    model = config.model
    options = ScoreOptions(data_path=str(validation), lora_path=str(run), examples=3)
    say(scored(ScoreConfig(options, ModelOptions(model.model_path, model.bits, device=model.device))), is_styled=True)
