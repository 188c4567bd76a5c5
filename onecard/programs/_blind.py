"""`onecard evaluate blind`: two answers to each question on a page, for a person who does not know whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onecard.config.base_model import ModelOptions
from onecard.config.given_paths import is_data_file
from onecard.config.inference import AnsweringModelOptions, PageOptions, SamplingOptions
from onecard.config.parsing import missing, parse
from onecard.config.problems import Problem, too_small
from onecard.console import say
from onecard.errors import ConfigError
from onecard.inference.run_files import stored_options


@dataclass
class BlindOptions:
    """Whose answers are compared, and to which questions."""

    a: str = ""
    """A: "base", a run directory (or another adapter or model), or a file of answers: that of onecard generate, or
    records with answers in any shape that training reads."""
    b: str = ""
    """B, as A."""
    questions: str = ""
    """Questions that the models answer first: a file in any shape that training reads. Not needed for two files."""
    output_path: str = ""
    """Folder for the answers, the votes, and preferences.jsonl with the pairs that were decided; the same command goes
    on where it was left."""
    prompt_type: str = "auto"
    """Prompt template. auto takes the one stored with the adapter, for the base beside it, too."""
    batch_size: int = 8
    """Questions that are answered at once."""

    def problems(self) -> list[Problem]:
        found = missing(self, "a", "b", "output_path")
        if self.a and self.a == self.b:
            found.append(("--b", f"{self.b} is A, too; there is nothing to compare"))
        are_files = [is_data_file(side) for side in (self.a, self.b)]
        if not all(are_files) and not self.questions and not found:
            found.append(("--questions", "is missing; a model needs questions to answer"))
        if all(are_files) and self.questions:
            found.append(("--questions", "goes with a model; --a and --b are both files of answers"))
        return found + too_small(self, batch_size=1)


@dataclass
class BlindConfig:
    """Everything this verb needs; see the classes of its fields."""

    blind: BlindOptions = field(default_factory=BlindOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(max_new_tokens=512))
    page: PageOptions = field(default_factory=PageOptions)


def main(words: list[str]) -> None:
    """Run the verb with these words. Raises OneCardError."""
    about = "Two answers to each question, order hidden: choose with the keys 1, 2 and 0 on a page in the browser."
    config = parse(BlindConfig, words, description=about, verb="blind", stored=_stored)
    compare_blind(config)


def _stored(typed: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run that is compared: the base beside it is its own."""
    sides = [str(typed.get(name) or "") for name in ("b", "a")]
    runs = [side for side in sides if side not in ("", "base") and not is_data_file(side)]
    return stored_options(runs[0] if runs else None)


def compare_blind(config: BlindConfig) -> None:
    """Collect the answers, serve the page until Ctrl-C, and say what was found where all is voted on."""
    from onecard.evaluate.blind import BlindJob, pairs_of
    from onecard.serve.web.app import blind_page, launch
    from onecard.serve.web.votes import PREFERENCES_FILE, VOTES_FILE, BlindVotes

    options = config.blind
    folder = Path(options.output_path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise ConfigError("--output_path", f"{folder} cannot be made: {reason.strerror or reason}") from None
    job = BlindJob((options.a, options.b), options.questions, folder, config.model, options.prompt_type,
                   config.sampling, options.batch_size)  # fmt: skip
    votes = BlindVotes(folder, pairs_of(job), job.sides, seed=config.sampling.seed)
    say(f"{len(votes.pairs)} pairs of answers, {votes.n_same} more are the same twice; {len(votes.votes)} have a vote")
    launch(blind_page(votes, config.page), config.page)
    done = f"{len(votes.votes)} of {len(votes.pairs)} pairs have a vote"
    say(f"{done}, in {folder / VOTES_FILE}; the same command goes on")
    if votes.current is None:
        found = votes.export()
        counts = f"A was chosen {found['wins_a']} times, B {found['wins_b']} times, neither {found['ties']} times"
        say(f"{counts}; B against A: {found['result']}; preference pairs: {folder / PREFERENCES_FILE}")
