"""The verbs of `onecard data make`: self-instruct, qa-from-documents and think."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.config.curation import QaFromDocumentsOptions, SelfInstructOptions, ThinkOptions
from onecard.config.parsing import parse_verb

if TYPE_CHECKING:
    from onecard.curation.make.journal import Journal

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

    folder = Path(options.output_path)
    settings = EndpointSettings(**{name: getattr(options, name) for name in EndpointSettings.__dataclass_fields__})
    # Only what differs from its default: options that later versions add leave a journal as it is.
    defaults = vars(type(options)())
    chosen = {name: value for name, value in vars(options).items() if value != defaults[name]}
    depends_on = {name: value for name, value in chosen.items() if name not in _MAY_CHANGE}
    depends_on |= {"verb": verb, "data": data_fingerprint(source_of(options))}
    prices = TokenPrices(options.price_prompt, options.price_completion)
    with Endpoint(settings, **({"wait": wait} if wait else {})) as endpoint, Journal(folder, depends_on) as journal:
        try:
            make(endpoint, options.model, journal, _tasks(options, journal), prices)
        finally:
            n_rows = _write(folder / MADE_FILE, options, journal)
            say(f"{n_rows:,} rows are in {folder / MADE_FILE}")


def _tasks(options: Any, journal: Journal) -> Any:
    if isinstance(options, SelfInstructOptions):
        from onecard.curation.make.self_instruct import SelfInstruct

        return SelfInstruct(options, journal).tasks()
    if isinstance(options, QaFromDocumentsOptions):
        from onecard.curation.make.qa_from_documents import qa_tasks

        return qa_tasks(options, journal)
    from onecard.curation.make.think import think_tasks

    return think_tasks(options, journal)


def _write(file: Path, options: Any, journal: Journal) -> int:
    from onecard.curation.make.run import lines_of, write_lines

    if not isinstance(options, ThinkOptions):
        return write_lines(file, lines_of(journal))
    from onecard.curation.make.think import thought_lines

    rest = file.with_name("without_thought.jsonl")
    write_lines(rest, (line for thinks, line in thought_lines(options, journal) if not thinks))
    return write_lines(file, (line for thinks, line in thought_lines(options, journal) if thinks))
