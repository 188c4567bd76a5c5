"""Find, clean, split and make training data: a catalogue of open collections, and what makes rows better or new.

onecard data list --lang CN
onecard data show alpaca-gpt4-zh
onecard data get alpaca-gpt4-zh --endpoint https://hf-mirror.com
onecard data clean --data_path my.jsonl --output_path cleaned --languages zh,en
onecard data make self-instruct --data_path seeds.jsonl --output_path made --model NAME
"""

from __future__ import annotations

import sys
from importlib import import_module

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
from onecard.programs._data_catalogue import GetOptions, ListOptions, ShowOptions

# Each verb: its options, and what is done with them (imported when it is).
VERBS: dict[str, tuple[type, str]] = {
    "list": (ListOptions, "programs._data_catalogue:list_entries"),
    "show": (ShowOptions, "programs._data_catalogue:show_entry"),
    "get": (GetOptions, "programs._data_catalogue:get_entry"),
    "clean": (CleanOptions, "curation.clean.run:clean"),
    "split": (SplitOptions, "curation.split:split"),
    "make": (MakeOptions, ""),  # it has verbs of its own
    "documents": (DocumentsOptions, "curation.convert:convert_documents"),
    "cot": (CotOptions, "curation.convert:convert_cot"),
    "extraction": (ExtractionOptions, "curation.convert:convert_extraction"),
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
    module, work = VERBS[verb][1].split(":")
    getattr(import_module(f"onecard.{module}"), work)(options)
