"""Find, clean, split and make training data: a catalogue of open collections, and what makes rows better or new.

onecard data list --lang CN
onecard data show alpaca-gpt4-zh
onecard data get alpaca-gpt4-zh --endpoint https://hf-mirror.com
onecard data clean --data_path my.jsonl --output_path cleaned --languages zh,en
onecard data make self-instruct --data_path seeds.jsonl --output_path made --model NAME
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from onecard.config.curation import (
    CleanOptions,
    CotOptions,
    DocumentsOptions,
    ExtractionOptions,
    MakeOptions,
    SplitOptions,
)
from onecard.config.parsing import parse_verb, words_by_name
from onecard.programs import _data_make
from onecard.programs._data_catalogue import GetOptions, ListOptions, ShowOptions, get_entry, list_entries, show_entry

VERBS: dict[str, type] = {
    "list": ListOptions, "show": ShowOptions, "get": GetOptions, "clean": CleanOptions, "split": SplitOptions,
    "make": MakeOptions, "documents": DocumentsOptions, "cot": CotOptions, "extraction": ExtractionOptions,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["make"]:
        _data_make.main(words[1:])
        return
    if words and hasattr(VERBS.get(words[0]), "name"):  # `data show belle` is `data show --name belle`
        words = [words[0], *words_by_name(words[1:], "--name")]
    verb, options = parse_verb(VERBS, words, description=__doc__ or "")
    _work_of(verb)(options)


def _work_of(verb: str) -> Callable[[Any], Any]:
    """What a verb does. What works on rows is imported for those that do: numpy takes longer than a look at a list."""
    catalogue: dict[str, Callable[[Any], Any]] = {"list": list_entries, "show": show_entry, "get": get_entry}
    if verb in catalogue:
        return catalogue[verb]
    from onecard.curation import convert
    from onecard.curation.clean.run import clean
    from onecard.curation.split import split

    works: dict[str, Callable[[Any], Any]] = {
        "clean": clean, "split": split, "documents": convert.convert_documents, "cot": convert.convert_cot,
        "extraction": convert.convert_extraction,
    }  # fmt: skip
    return works[verb]
