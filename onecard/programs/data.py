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
    ConvertOptions,
    CotOptions,
    DocumentsOptions,
    ExtractionOptions,
    MakeOptions,
    SplitOptions,
)
from onecard.config.parsing import parse_verb, words_by_name
from onecard.programs import _data_make
from onecard.programs._data_catalogue import (
    GetOptions,
    ListOptions,
    ShowOptions,
    get_entry,
    list_entries,
    show_entry,
)


def clean_data(options: CleanOptions) -> None:
    """Clean as the options say."""
    from onecard.curation.clean.run import clean

    clean(options)


def split_data(options: SplitOptions) -> None:
    """Split as the options say."""
    from onecard.curation.split import split

    split(options)


def convert_data(options: ConvertOptions) -> None:
    """Convert as the options say."""
    from onecard.curation.convert import convert_cot, convert_documents, convert_extraction

    if isinstance(options, CotOptions):
        convert_cot(options)
    elif isinstance(options, ExtractionOptions):
        convert_extraction(options)
    elif isinstance(options, DocumentsOptions):
        convert_documents(options)


# Each verb: its options, and what is done with them.
VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "list": (ListOptions, list_entries),
    "show": (ShowOptions, show_entry),
    "get": (GetOptions, get_entry),
    "clean": (CleanOptions, clean_data),
    "split": (SplitOptions, split_data),
    "make": (MakeOptions, lambda _: None),  # it has verbs of its own
    "documents": (DocumentsOptions, convert_data),
    "cot": (CotOptions, convert_data),
    "extraction": (ExtractionOptions, convert_data),
}


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["make"]:
        _data_make.main(words[1:])
        return
    kinds = {name: kind for name, (kind, _) in VERBS.items()}
    if words and hasattr(kinds.get(words[0]), "name"):  # `data show belle` is `data show --name belle`
        words = [words[0], *words_by_name(words[1:], "--name")]
    verb, options = parse_verb(kinds, words, description=__doc__ or "")
    VERBS[verb][1](options)
