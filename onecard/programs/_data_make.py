"""The verbs of `onecard data make`: self-instruct, qa-from-documents and think."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onecard.config.data import ReadingOptions
from onecard.config.parsing import missing, parse_verb
from onecard.config.problems import Problem, too_small

if TYPE_CHECKING:
    from onecard.curation.make.journal import Journal


@dataclass
class MakeOptions(ReadingOptions):
    """Write new rows with a model: make self-instruct, make qa-from-documents, make think."""

    data_path: str | list[str] = ""
    """Data: files, folders of these, or Hub data sets; one or several."""
    output_path: str = ""
    """Folder for data.jsonl, and for journal.jsonl, by which the same command goes on where it was cut off."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """Address of an OpenAI-compatible endpoint, such as that of onecard serve; it ends before /chat/completions."""
    model: str = ""
    """Name of the model there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; without one in it none is sent."""
    prompt_language: Literal["en", "zh"] = "en"
    """Language of the prompts, and of what is made."""
    temperature: float = 0.7
    """Temperature of sampling."""
    max_tokens: int = 2048
    """Most tokens of an answer."""
    timeout_s: float = 300.0
    """Seconds until an answer must be whole."""
    max_attempts: int = 6
    """Times that a request is tried where the endpoint is busy, broken or slow."""
    price_prompt: float = 0.0
    """Price of a million tokens of prompts, for the cost."""
    price_completion: float = 0.0
    """Price of a million tokens of answers, for the cost."""

    def problems(self) -> list[Problem]:
        found = super().problems() + missing(self, "data_path", "output_path", "model")
        found += too_small(self, max_tokens=1, max_attempts=1, price_prompt=0, price_completion=0, temperature=0)
        if self.timeout_s <= 0:
            found.append(("--timeout_s", f"{self.timeout_s} leaves no time; use some minutes"))
        return found


@dataclass
class SelfInstructOptions(MakeOptions):
    """Write new instructions after the example of seed tasks."""

    n_rows: int = 100
    """Rows to make, those of earlier starts included."""
    n_per_request: int = 8
    """Tasks that one request asks for."""
    novelty: float = 0.7
    """An instruction stays if its ROUGE-L with every earlier one is below this."""
    seed: int = 42
    """Which examples are shown."""

    def problems(self) -> list[Problem]:
        found = super().problems() + too_small(self, n_rows=1, n_per_request=1)
        if not 0 < self.novelty <= 1:
            found.append(("--novelty", f"{self.novelty} is not between 0 and 1"))
        return found


@dataclass
class QaFromDocumentsOptions(MakeOptions):
    """Write questions with answers out of documents."""

    n_per_passage: int = 5
    """Questions that each passage is asked for."""
    passage_chars: int = 3000
    """Most characters of a passage; documents are cut between paragraphs."""

    def problems(self) -> list[Problem]:
        found = super().problems() + too_small(self, n_per_passage=1)
        if self.passage_chars < 200:
            found.append(("--passage_chars", f"{self.passage_chars} is too short to ask about; use 200 or more"))
        return found


@dataclass
class ThinkOptions(MakeOptions):
    """Write thoughts for rows without; a thought stays where its answer agrees with the row's."""

    n_tries: int = 2
    """Times that a row is asked for until an answer agrees."""

    def problems(self) -> list[Problem]:
        return super().problems() + too_small(self, n_tries=1)


_ABOUT = """Ask any OpenAI-compatible endpoint, that of onecard serve too. Started again, a command goes on.

onecard serve --model_path MODEL
onecard data make qa-from-documents --data_path texts.jsonl --output_path made --model MODEL
"""
VERBS = {"self-instruct": SelfInstructOptions, "qa-from-documents": QaFromDocumentsOptions, "think": ThinkOptions}
_OF_THE_ENDPOINT = ("api_key_env", "timeout_s", "max_attempts", "base_url", "price_prompt", "price_completion")
_MAY_CHANGE = (*_OF_THE_ENDPOINT, "n_rows", "output_path", "data_path")


def main(argv: list[str] | None = None) -> None:
    """Run the verb with these words, or those of the command line."""
    verb, options = parse_verb(VERBS, argv, description=_ABOUT, above="make")
    make_data(verb, options)


def make_data(verb: str, options: Any, wait: Callable[[float], None] | None = None) -> None:
    """Make as the options say; `wait` replaces waiting between tries."""
    from onecard.console import say
    from onecard.curation.make.endpoint import Endpoint, EndpointSettings
    from onecard.curation.make.journal import Journal
    from onecard.curation.make.run import MADE_FILE, TokenPrices, make
    from onecard.data.sources import data_fingerprint, source_of

    folder, source = Path(options.output_path), source_of(options)
    settings = EndpointSettings(**{name: getattr(options, name) for name in EndpointSettings.__dataclass_fields__})
    # Only what differs from its default: options that later versions add leave a journal as it is.
    defaults = vars(type(options)())
    chosen = {name: value for name, value in vars(options).items() if value != defaults[name]}
    depends_on = {name: value for name, value in chosen.items() if name not in _MAY_CHANGE}
    depends_on |= {"verb": verb, "data": data_fingerprint(source)}
    prices = TokenPrices(options.price_prompt, options.price_completion)
    with Endpoint(settings, **({"wait": wait} if wait else {})) as endpoint, Journal(folder, depends_on) as journal:
        try:
            make(endpoint, options.model, journal, _tasks(options, source, journal), prices)
        finally:
            n_rows = _write(folder / MADE_FILE, options, source, journal)
            say(f"{n_rows:,} rows are in {folder / MADE_FILE}")


def _tasks(options: Any, source: Any, journal: Journal) -> Any:
    if isinstance(options, SelfInstructOptions):
        from onecard.curation.make.self_instruct import SelfInstruct, SelfInstructSettings

        names = ("n_rows", "n_per_request", "novelty", "seed")
        chosen = {name: getattr(options, name) for name in names}
        return SelfInstruct(SelfInstructSettings(source, language=options.prompt_language, **chosen), journal).tasks()
    if isinstance(options, QaFromDocumentsOptions):
        from onecard.curation.make.qa_from_documents import QaSettings, qa_tasks

        asked = (options.n_per_passage, options.passage_chars, options.prompt_language)
        return qa_tasks(QaSettings(source, *asked), journal)
    from onecard.curation.make.think import ThinkSettings, think_tasks

    return think_tasks(ThinkSettings(source, options.n_tries, options.prompt_language), journal)


def _write(file: Path, options: Any, source: Any, journal: Journal) -> int:
    from onecard.curation.make.run import lines_of, write_lines

    if not isinstance(options, ThinkOptions):
        return write_lines(file, lines_of(journal))
    from onecard.curation.make.think import ThinkSettings, thought_lines

    settings = ThinkSettings(source, options.n_tries, options.prompt_language)
    rest = file.with_name("without_thought.jsonl")
    write_lines(rest, (line for thinks, line in thought_lines(settings, journal) if not thinks))
    return write_lines(file, (line for thinks, line in thought_lines(settings, journal) if thinks))
