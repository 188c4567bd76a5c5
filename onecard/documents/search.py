"""The chunks that a question is about, by words and by meaning, and whether they hold its answer at all.

The order by words (BM25) and the one by meaning are fused by reciprocal ranks: Cormack, Clarke and Buettcher,
"Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009, whose constant is 60.
Whether a question is answered is decided by its coverage: of all that its words tell, the share that is in one chunk;
and by whether it names a thing of its own (`onecard.documents.other_things`).
Knows an index. Does not know models that answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from onecard.documents.index import DocumentIndex, StoredChunk
from onecard.documents.other_things import is_about_another
from onecard.documents.words import names_in, question_words

FUSION = 60
N_RANKED = 50  # chunks of each order that are fused
N_COVERED = 10  # of the best, in which the words of a question are looked for
# Calibrated by benchmarks/documents.py on 100 questions that the planted documents answer and 20 that they do not,
# others than those that it measures with: the middle of the range (0.35 to 0.39) in which most are told apart.
LEAST_COVERAGE = 0.37
NAME_WEIGHT = 3.0  # of a name in the coverage: what is said of another thing of the same kind is no answer
FEW_WORDS = 3  # a question of fewer words says too little without the one before it


class SearchResult(NamedTuple):
    """The chunks of a question, the best first; is_there: whether they are likely to answer it."""

    chunks: tuple[StoredChunk, ...] = ()
    coverage: float = 0.0
    is_there: bool = False


@dataclass
class DocumentSearch:
    """Searches one index. vectors: a `VectorSearch`, or None where the index has no vectors."""

    index: DocumentIndex
    vectors: Any = None
    least_coverage: float = LEAST_COVERAGE

    def find(self, questions: Sequence[str], most: int) -> SearchResult:
        """At most so many chunks for the last question of a conversation, which may lean on the one before it."""
        last = questions[-1]
        both = "\n".join(questions[-2:])
        weights = [self._weights(text) for text in dict.fromkeys((last, both))]
        orders = [order for text, own in zip((last, both), weights, strict=False) for order in self._orders(text, own)]
        chunks = self.index.chunks(fused(orders)[: max(most, N_COVERED)])
        coverages = [max(self._coverages(chunks, own), default=0.0) for own in weights]
        # A question that says enough must have something in the chunk itself, else the subject has changed.
        is_short = len(weights[0]) < FEW_WORDS
        coverage = max(coverages) if is_short or coverages[0] > 0 else coverages[0]
        asked = both if is_short or coverages[0] < self.least_coverage else last
        is_there = coverage >= self.least_coverage and not is_about_another(asked, chunks, self.index.unknown)
        return SearchResult(tuple(chunks[:most]), coverage, is_there)

    def _weights(self, question: str) -> dict[str, float]:
        """What each word of a question tells; names tell more."""
        weights, names = self.index.weights(question_words(question)), self.index.weights(names_in(question))
        return weights | {name: NAME_WEIGHT * weight for name, weight in names.items() if name in weights}

    def _orders(self, question: str, weights: dict[str, float]) -> list[list[int]]:
        orders = [self.index.by_words(weights, N_RANKED)]
        if self.vectors is not None:
            orders.append([chunk for chunk, _ in self.vectors.nearest(question, N_RANKED)])
        return orders

    def _coverages(self, chunks: Sequence[StoredChunk], weights: dict[str, float]) -> list[float]:
        """Of all that the words tell, the share that stands in each chunk; one of several words alone is nothing."""
        found = [words & weights.keys() for words in self.index.words_of(chunks[:N_COVERED])]
        least, total = min(2, len(weights)), sum(weights.values()) or 1.0
        return [sum(weights[word] for word in words) / total if len(words) >= least else 0.0 for words in found]


def fused(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order of several: the sum of 1 / (60 + rank). [[1, 2, 3], [3, 1]] -> [1, 3, 2]."""
    scores: dict[int, float] = {}
    for order in orders:
        for rank, chunk in enumerate(order, start=1):
            scores[chunk] = scores.get(chunk, 0.0) + 1 / (FUSION + rank)
    return sorted(scores, key=lambda chunk: -scores[chunk])
