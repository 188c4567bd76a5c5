"""Find training data: list the catalogue of open collections, show what is known of one.

onecard data list --lang CN
onecard data show alpaca-gpt4
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from onecard.config.parsing import parse_verb
from onecard.programs._data_catalogue import ListOptions, ShowOptions, list_entries, show_entry

# Each verb: its options, and what is done with them.
VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "list": (ListOptions, list_entries),
    "show": (ShowOptions, show_entry),
}


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    kinds = {name: kind for name, (kind, _) in VERBS.items()}
    # `data show belle` is `data show --name belle`.
    if len(words) > 1 and not words[1].startswith("-") and hasattr(kinds.get(words[0]), "name"):
        words.insert(1, "--name")
    verb, options = parse_verb(kinds, words, description=__doc__ or "")
    VERBS[verb][1](options)
