"""Whether a question is about another thing than the documents: the Skelbeck foundry, where they tell of nine others.

Such a question has all the words of an answer but the one that names the thing. A word that no document holds is such a
name if what it stands beside is a kind of thing: if documents that were found call, where they say what they are about,
each a thing of its own by that word. "the Linbeck Foundry", "the Karholm Foundry" -> foundry is a kind; 龙泽泵站,
竹川泵站 -> so is 泵站. Knows chunks and texts; which words are unknown is told to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from onecard.documents.index import StoredChunk
from onecard.documents.words import is_function_word, runs_of, search_words

N_THINGS = 3  # documents that each name a thing of their own: fewer may be two names of one thing
_LEAD_CHARS = 80  # in which a text says what it is about, if no sign ends that before

Named = tuple[str, str]
"""(name, kind): ("linbeck", "foundry"), ("竹川", "泵站")."""


def is_about_another(
    question: str, chunks: Sequence[StoredChunk], unknown: Callable[[Collection[str]], set[str]]
) -> bool:
    """Whether a question names a thing that is not in the documents, of a kind of which the best chunks name others.

    unknown: those of some words that no document holds.
    """
    asked = named_in(question, with_places=True)
    strange = unknown([name for name, _ in asked]) if asked else set()
    asked = [(name, kind) for name, kind in asked if name in strange]
    if not asked:
        return False
    named, words = _named_by_document(chunks), set(search_words(question))
    return any(_names_others(kind, named, words) for _, kind in asked)


def named_in(text: str, *, with_places: bool = False) -> list[Named]:
    """Words beside each other that may be a thing's name and its kind, in small letters.

    with_places: the bridge at Netherby is then the Netherby bridge, too.
    """
    found: list[Named] = []
    for run in runs_of(text):
        if isinstance(run, str):  # of Chinese, of which two characters are a word
            found += [(run[k - 2 : k], run[k : k + 2]) for k in range(2, len(run) - 1)]
            continue
        telling = [word for word in run if not is_function_word(word)]
        found += [(one.lower(), two.lower()) for one, two in pairwise(run) if {one, two} <= set(telling)]
        if with_places:
            beside = set(pairwise(run))
            found += [(name.lower(), kind.lower()) for kind, name in pairwise(telling)
                      if name[0].isupper() and (kind, name) not in beside]  # fmt: skip
    return found


def _named_by_document(chunks: Iterable[StoredChunk]) -> dict[str, set[Named]]:
    """What each document says that it is about."""
    found: dict[str, set[Named]] = {}
    for chunk in chunks:
        lead = re.split(r"[^\w \t]", chunk.text[:_LEAD_CHARS], maxsplit=1)[0]
        for text in (Path(chunk.document).stem, chunk.headings, lead):
            pairs = {(name, kind) for name, kind in named_in(text) if not name.isdecimal()}
            found.setdefault(chunk.document, set()).update(pairs)
    return found


def _names_others(kind: str, named: dict[str, set[Named]], asked: set[str]) -> bool:
    """Whether documents each name a thing of this kind, and the question names none of them."""
    names = [{name for name, word in pairs if word == kind} for pairs in named.values()]
    own = [each - set().union(*names[:k], *names[k + 1 :]) for k, each in enumerate(names)]
    return sum(map(bool, own)) >= N_THINGS and not asked & set().union(*names)
