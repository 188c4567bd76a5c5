"""Which new pieces a BPE tokenizer can really use, and the joins by which it comes to each.

A BPE tokenizer starts from single symbols and joins two neighbours at a time, the best rule first. A piece that is
only put into its vocabulary is never met: each needs two halves that are joined just then. Every new rule stands after
all old ones, so a text is first cut exactly as before, and only then are its tokens joined further.

Does not know files, ids or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

MAX_MISSING_HALVES = 2  # more are left out: halves that stand for nothing of their own take rows of the embeddings


@dataclass
class MergeRules:
    """Byte-level BPE: only the listed pairs are joined, in the order of the list, the lowest rank first."""

    order: dict[Any, int]
    _next: int = 0

    def __post_init__(self) -> None:
        self._next = max(self.order.values(), default=-1) + 1

    def key(self, left: str, right: str) -> Any:
        """What `order` has for this join."""
        return left, right

    def rank(self, left: str, right: str) -> int | None:
        """How early the two are joined; None when they never are."""
        return self.order.get(self.key(left, right))

    def learn(self, left: str, right: str) -> None:
        """Let the two be joined, after all that is known."""
        self.order[self.key(left, right)] = self._next
        self._next += 1

    def forget(self, left: str, right: str) -> None:
        """Undo `learn`."""
        del self.order[self.key(left, right)]


class PieceRules(MergeRules):
    """SentencePiece: any two neighbours are joined that make a piece; the order is that of the pieces' scores.

    https://github.com/google/sentencepiece/blob/master/src/bpe_model.cc
    """

    def key(self, left: str, right: str) -> str:
        return left + right


@dataclass
class VocabularyExtension:
    """What is added, in order: `pieces`, and `joins` as (left, right), and what was left out and why."""

    pieces: list[str] = field(default_factory=list)
    joins: list[tuple[str, str]] = field(default_factory=list)
    n_characters: int = 0
    n_halves: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def segment(symbols: Sequence[str], rules: MergeRules) -> list[str]:
    """Join neighbours, the lowest rank first and the leftmost among equals, until none is left to join.

    ["中", "国", "人"] with the rules 中+国 (0), 国+人 (1) -> ["中国", "人"]
    """
    parts = list(symbols)
    while len(parts) > 1:
        ranks = [(rank, i) for i in range(len(parts) - 1) if (rank := rules.rank(parts[i], parts[i + 1])) is not None]
        if not ranks:
            break
        i = min(ranks)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def grow(
    candidates: Iterable[str],
    rules: MergeRules,
    known: Collection[str],
    *,
    max_new: int = 0,
    characters_may_be_new: bool = False,
    moved_on: Callable[[int], object] = lambda n: None,
) -> VocabularyExtension:
    """Choose from `candidates`, the best first, what can be reached, at most `max_new` pieces (0: no limit).

    Where a half is missing it is added before the piece, up to two of them; a character without a piece of its own
    gets one where `characters_may_be_new`. `rules` learns on the way.
    """
    growth = VocabularyExtension()
    wanted = {piece: i for i, piece in enumerate(candidates)}
    present = set(known)
    for piece in wanted:
        moved_on(1)
        if piece in present:
            growth.left_out["there already"] += 1
            continue
        characters = [c for c in dict.fromkeys(piece) if c not in present]
        if characters and not characters_may_be_new:
            growth.left_out["made of characters that the tokenizer lacks"] += 1
            continue
        joins = _learn(piece, rules, wanted, present)
        if joins is None:
            growth.left_out["out of reach: other joins come before theirs, or halves are missing"] += 1
            continue
        new = [p for p in dict.fromkeys([*characters, *(left + right for left, right in joins)]) if p not in present]
        if max_new and len(growth.pieces) + len(new) > max_new:
            _forget(joins, rules)
            growth.left_out["no room below --max_new"] += 1
            continue
        growth.pieces += new
        growth.joins += joins
        present.update(new)
        growth.n_characters += sum(p not in wanted for p in characters)
        growth.n_halves += sum(p not in wanted and len(p) > 1 for p in new)
    return growth


def _learn(
    piece: str, rules: MergeRules, wanted: dict[str, int], present: Collection[str]
) -> list[tuple[str, str]] | None:
    """The joins that are missing on the way to a piece, learned; None, and nothing learned, where it is too far."""
    joins: list[tuple[str, str]] = []
    while len(parts := segment(list(piece), rules)) > 1:
        # A half that is wanted for itself costs nothing; the best of these first, else from the left.
        pairs = list(pairwise(parts))
        costs = [(wanted.get(left + right, len(wanted)), i) for i, (left, right) in enumerate(pairs)]
        free = [(cost, i) for cost, i in costs if _may_join(pairs[i], piece, present, rules)]
        if not free or len(joins) > MAX_MISSING_HALVES:
            _forget(joins, rules)
            return None
        join = pairs[min(free)[1]]
        rules.learn(*join)
        joins.append(join)
    return joins


def _may_join(pair: tuple[str, str], piece: str, present: Collection[str], rules: MergeRules) -> bool:
    """Whether this join may be learned: not where SentencePiece has that text as a token of another type."""
    text = pair[0] + pair[1]
    return text == piece or text not in present or not isinstance(rules, PieceRules)


def _forget(joins: Sequence[tuple[str, str]], rules: MergeRules) -> None:
    for left, right in joins:
        rules.forget(left, right)
