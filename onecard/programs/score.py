"""Score a model on questions with known answers, before and after training: loss, exact match, examples.

onecard score --data_path sample/held_out.json --lora_path outputs/my-first-adapter
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from onecard.config.base_model import ModelOptions
from onecard.config.data import ReadingOptions
from onecard.config.inference import AnsweringModelOptions
from onecard.config.parsing import parse
from onecard.config.problems import Problem, too_small
from onecard.console import escaped, rendered, say
from onecard.inference.run_files import stored_by_first
from onecard.installation import SHIPPED

# Case and Score of onecard.inference.batch.evaluate, which is imported only after the options are known to be good.
Case: TypeAlias = Any
Score: TypeAlias = Any


@dataclass
class ScoreOptions(ReadingOptions):
    """What is scored, and on which questions."""

    data_path: str | list[str] = str(SHIPPED / "sample" / "held_out.json")
    """Questions with answers: files in any shape that training reads; one or several."""
    lora_path: str | None = None
    """Adapter: a run directory, one of its checkpoints, or a Hub id. Without it only the base is scored."""
    with_base: bool = True
    """Score the base without the adapter as well, as `before`."""
    prompt_type: str = "auto"
    """Prompt template. auto takes the one stored with the adapter."""
    batch_size: int = 32
    """Questions answered at once."""
    limit: int = 0
    """Score only so many questions from the top; 0: all."""
    examples: int = 3
    """Answers shown side by side."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def problems(self) -> list[Problem]:
        return super().problems() + too_small(self, batch_size=1, limit=0, examples=0)


@dataclass
class ScoreConfig:
    """Everything this tool needs; see the classes of its fields."""

    score: ScoreOptions = field(default_factory=ScoreOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    # The run knows its base model; what is typed wins over that.
    config = parse(ScoreConfig, argv, description=__doc__, stored=stored_by_first)

    say(scored(config), is_styled=not config.score.json)


def scored(config: ScoreConfig) -> str:
    """Answer every question with and without the adapter; the report, ready to print."""
    from onecard.data.sources import source_of
    from onecard.inference.batch.evaluate import read_cases, score
    from onecard.inference.load import load_bundle
    from onecard.model.trained import has_adapter, without_adapter

    options = config.score
    bundle, _ = load_bundle(config.model, options.lora_path, options.prompt_type)
    with_base = options.with_base and has_adapter(bundle.model)
    if options.lora_path and options.with_base and not with_base:
        say(f"{options.lora_path} is no adapter but a model of its own: score its base by itself, with --model_path")
    cases = read_cases(source_of(options), bundle, limit=options.limit)
    scores: dict[str, Score] = {}
    if with_base or not options.lora_path:
        # One model serves both: the adapter is switched off for the first round.
        with without_adapter(bundle.model):
            scores["before" if options.lora_path else "base"] = score(bundle, cases, batch_size=options.batch_size)
    if options.lora_path:
        scores["after"] = score(bundle, cases, batch_size=options.batch_size)
    return as_json(options, cases, scores) if options.json else as_tables(options, cases, scores)


def as_json(options: ScoreOptions, cases: list[Case], scores: dict[str, Score]) -> str:
    """One object: counts, the scores by name, and examples."""
    result: dict[str, Any] = {"data_path": options.data_path, "lora_path": options.lora_path, "n_questions": len(cases)}
    for name, one in scores.items():
        result[name] = {"loss": round(one.loss, 6), "exact_match": round(one.exact_match, 6)}
    result["examples"] = [
        {"question": question_of(cases[i]), "expected": cases[i].reference}
        | {name: one.answers[i] for name, one in scores.items()}
        for i in shown(options, cases)
    ]
    return json.dumps(result, ensure_ascii=False, indent=1)


def as_tables(options: ScoreOptions, cases: list[Case], scores: dict[str, Score]) -> str:
    """A table of the scores and one of examples, ready to print."""
    from rich.table import Table
    from rich.text import Text

    paths = [options.data_path] if isinstance(options.data_path, str) else options.data_path
    names = ", ".join(Path(path).name for path in paths)
    numbers = Table(title=f"{len(cases)} questions of {names}")
    for heading in ("", *scores):
        numbers.add_column(heading, justify="right" if heading else "left")
    numbers.add_row("loss per answer token", *(f"{one.loss:.3f}" for one in scores.values()))
    numbers.add_row("exact match", *(f"{one.exact_match:.1%}" for one in scores.values()))
    examples = Table(title="answers", show_lines=True)
    for heading in ("question", "expected", *scores):
        examples.add_column(heading, overflow="fold")
    for i in shown(options, cases):
        answers = [one.answers[i].strip() for one in scores.values()]
        # As Text, because [brackets] in an answer are no markup.
        examples.add_row(*(Text(escaped(cell)) for cell in (question_of(cases[i]), cases[i].reference, *answers)))
    return rendered(numbers, *([examples] if options.examples else []))


def question_of(case: Case) -> str:
    """The last thing that was asked, with its input below it."""
    text: str = case.conversation.turns[-2].one_text()
    return text


def shown(options: ScoreOptions, cases: list[Case]) -> list[int]:
    """Which cases are shown: spread evenly over the file, so that several kinds of task are among them."""
    n = min(options.examples, len(cases))
    return [i * len(cases) // n for i in range(n)]
