"""How new an instruction is among those before it: ROUGE-L below a limit, as in Self-Instruct.

https://arxiv.org/abs/2212.10560, section 2.2 (0.7); ROUGE-L: https://aclanthology.org/W04-1013 (its F1, words as in
words.py, so that Chinese is counted by characters).

Knows texts. Does not know where they come from.
"""

from __future__ import annotations

from onecard.curation.words import words_of


class Novelty:
    """Remembers instructions; says how much a further one is like the nearest of them."""

    def __init__(self) -> None:
        self._known: list[list[str]] = []

    def add(self, text: str) -> None:
        """Remember an instruction."""
        self._known.append(words_of(text))

    def nearest(self, text: str, limit: float = 0.0) -> float:
        """The largest ROUGE-L F1 with a remembered text; texts too long or short to reach `limit` are left out."""
        words = words_of(text)
        masks = _masks(words)
        best = 0.0
        for known in self._known:
            shorter, both = min(len(words), len(known)), len(words) + len(known)
            if both and 2 * shorter / both >= max(limit, best):
                best = max(best, 2 * _common(masks, len(words), known) / both)
        return best


def rouge_l(left: str, right: str) -> float:
    """ROUGE-L F1 of two texts: "a b c d", "a c d e" -> 0.75."""
    known = Novelty()
    known.add(right)
    return known.nearest(left)


def _masks(words: list[str]) -> dict[str, int]:
    """For each word the places where it stands, as bits."""
    masks: dict[str, int] = {}
    for place, word in enumerate(words):
        masks[word] = masks.get(word, 0) | 1 << place
    return masks


def _common(masks: dict[str, int], length: int, other: list[str]) -> int:
    """The length of the longest common subsequence, a word of `other` at a time over all places at once.

    https://doi.org/10.1007/s00236-003-0130-0 (Hyyrö's form of the bit-parallel algorithm).
    """
    every = (1 << length) - 1
    row = every
    for word in other:
        hits = row & masks.get(word, 0)
        row = (row + hits | row - hits) & every
    return length - row.bit_count()
