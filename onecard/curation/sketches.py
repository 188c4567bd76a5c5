"""Near-duplicates among any number of records: MinHash sketches in files, and the clusters that they make.

A record takes 8 bytes of exact hash, 8 a band and one a permutation, all on the disk; one band at a time is in memory.
https://doi.org/10.1109/SEQUEN.1997.666900 (MinHash), https://doi.org/10.1145/1772690.1772759 (b-bit MinHash)

Knows texts and numbers of rows. Does not know files of records.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from onecard.curation.words import runs_of, words_of
from onecard.errors import ConfigError

SKETCH_FILES = ("keys.bin", "minima.bin")
N_PERMUTATIONS = 128
RUN_LENGTH = 5  # words in a row; the usual choice for MinHash over text
_SEED = 1
_BATCH = 1000
_COMPARED = 200_000  # pairs of sketches in memory at once
# In one band a crowd of different texts may share a key; each round compares the rest with the first of it.
_ROUNDS = 64
_MOST_KEPT = 1000  # of one cluster that a member is compared with
_CHANCE = 1 / 256  # that two different minima agree in their lowest byte


class Duplicates(NamedTuple):
    """For each row that repeats an earlier one: that row, which stays; -1 for rows that stay. All of shape (rows,).

    similarity: the estimated Jaccard similarity of their runs of words; is_exact: their texts are equal.
    """

    like: np.ndarray
    similarity: np.ndarray
    is_exact: np.ndarray


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows each): the widest bands that still bring together 98 % of the pairs just above the threshold.

    0.7 -> (21, 6): of pairs with 0.75 98.4 % meet in a band, of those with 0.8 99.8 %, of those with 0.3 1.5 %.
    """
    above = min(1.0, threshold + 0.05)
    for rows in range(16, 1, -1):
        bands = N_PERMUTATIONS // rows
        if 1 - (1 - above**rows) ** bands >= 0.98:
            return bands, rows
    return N_PERMUTATIONS, 1


def require_rensa() -> None:
    """Raises ConfigError where the MinHash library is not installed."""
    if find_spec("rensa") is None:
        raise ConfigError(
            "--near_duplicates", "near-duplicates need rensa; pip install -r requirements-data.txt, or give 0"
        )


class Sketches:
    """Takes texts in order, then gives their clusters. With threshold 0 only equal texts are found, without rensa.

    A context manager: the files in `folder` are closed when the block ends. Raises OSError where there is no room.
    """

    def __init__(self, folder: Path, threshold: float) -> None:
        self._threshold = threshold
        self._bands, self._rows = bands_for(threshold) if threshold else (0, 0)
        self._keys, self._minima = (folder / name for name in SKETCH_FILES)
        self._files: list[BinaryIO] = [self._keys.open("wb"), self._minima.open("wb")]
        self._waiting: list[str] = []
        self.n_rows = 0

    def __enter__(self) -> Sketches:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, text: str) -> None:
        """Take the text of the next row."""
        self._waiting.append(text)
        self.n_rows += 1
        if len(self._waiting) == _BATCH:
            self._sketch()

    def _sketch(self) -> None:
        texts, self._waiting = self._waiting, []
        if not texts:
            return
        exact = [hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=8).digest() for text in texts]
        keys = [np.frombuffer(b"".join(exact), dtype="<u8")]
        if self._threshold:
            import rensa  # optional: requirements-data.txt

            runs = [runs_of(words_of(text), RUN_LENGTH) for text in texts]
            matrix = rensa.RMinHash.digest_matrix_from_token_sets(runs, N_PERMUTATIONS, _SEED)
            minima = np.array(matrix.to_rows(), dtype=np.uint64)
            keys += [self._band_key(minima, band) for band in range(self._bands)]
            self._files[1].write((minima & np.uint64(255)).astype(np.uint8).tobytes())
        self._files[0].write(np.stack(keys, axis=1).tobytes())

    def _band_key(self, minima: np.ndarray, band: int) -> np.ndarray:
        """One 64-bit number for the minima of a band, shape (rows,): FNV-1a over its columns, mixed at the end."""
        key = np.full(len(minima), 0xCBF29CE484222325, dtype=np.uint64)
        for column in range(band * self._rows, (band + 1) * self._rows):
            key = (key ^ minima[:, column]) * np.uint64(0x100000001B3)
            key ^= key >> np.uint64(29)
        return key

    def clusters(self) -> np.ndarray:
        """The first row of each row's cluster, shape (rows,): rows linked by equal text or by likeness."""
        self._sketch()
        for file in self._files:
            file.flush()
        roots = np.arange(self.n_rows, dtype=np.int64)
        if not self.n_rows:
            return roots
        keys = np.memmap(self._keys, dtype="<u8", mode="r").reshape(self.n_rows, -1)
        roots = _linked(roots, *_first_and_others(np.ascontiguousarray(keys[:, 0])))
        minima = self._open_minima()
        for band in range(1, keys.shape[1]):
            roots = self._link_band(roots, np.ascontiguousarray(keys[:, band]), minima)
        return roots

    def _open_minima(self) -> np.ndarray:
        if not self._threshold or not self.n_rows:
            return np.zeros((self.n_rows, 0), dtype=np.uint8)
        return np.memmap(self._minima, dtype=np.uint8, mode="r").reshape(self.n_rows, N_PERMUTATIONS)

    def _link_band(self, roots: np.ndarray, keys: np.ndarray, minima: np.ndarray) -> np.ndarray:
        """The roots after the rows of one key have been compared with the first of them, the rest among themselves."""
        members = np.arange(self.n_rows)
        for _ in range(_ROUNDS):
            first, other = _first_and_others(keys[members])
            first, other = members[first], members[other]
            apart = roots[first] != roots[other]
            first, other = first[apart], other[apart]
            if not len(other):
                break
            alike = _similarities(minima, first, other) >= self._threshold
            roots = _linked(roots, first[alike], other[alike])
            members = np.unique(other[~alike])
        return roots

    def duplicates(self) -> Duplicates:
        """Which rows to leave out, each with the earlier row that stays and is like it: no chains of likeness.

        In a cluster a ~ b ~ c with a unlike c, a and c stay: c is like b only, which is left out.
        """
        clusters = self.clusters()
        found = Duplicates(
            np.full(self.n_rows, -1, dtype=np.int64),
            np.zeros(self.n_rows, dtype=np.float32),
            np.zeros(self.n_rows, dtype=bool),
        )
        if not self.n_rows:
            return found
        minima = self._open_minima()
        exact = np.memmap(self._keys, dtype="<u8", mode="r").reshape(self.n_rows, -1)[:, 0]
        order = np.argsort(clusters, kind="stable")
        starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
        sizes = np.diff(starts, append=self.n_rows)
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            self._judge(order[start : start + size], exact, minima, found)
        return found

    def _judge(self, rows: np.ndarray, exact: np.ndarray, minima: np.ndarray, found: Duplicates) -> None:
        """Decide over the rows of one cluster, in order."""
        kept: list[int] = []
        by_text: dict[int, int] = {}
        for row in map(int, rows):
            text = int(exact[row])
            if text in by_text:
                found.like[row], found.similarity[row], found.is_exact[row] = by_text[text], 1.0, True
                continue
            similar = _similarities(minima, np.array(kept, dtype=np.int64), np.full(len(kept), row))
            best = int(np.argmax(similar)) if kept else 0
            if kept and similar[best] >= self._threshold:
                found.like[row], found.similarity[row] = kept[best], similar[best]
                continue
            by_text[text] = row
            if len(kept) < _MOST_KEPT:
                kept.append(row)


def _first_and_others(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows that share a key, the place of the first and of each other one: keys [7, 5, 7, 7] -> [0, 0], [2, 3]."""
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    starts = np.append(True, in_order[1:] != in_order[:-1])[: len(keys)]
    first = np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))
    return order[first[~starts]], order[~starts]


def _similarities(minima: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of pairs of rows, shape (pairs,), freed of agreement by chance."""
    if not minima.shape[1] or not len(left):
        return np.zeros(len(left))
    parts = []
    for start in range(0, len(left), _COMPARED):
        pairs = slice(start, start + _COMPARED)
        parts.append((minima[left[pairs]] == minima[right[pairs]]).mean(axis=1))
    return (np.concatenate(parts) - _CHANCE) / (1 - _CHANCE)


def _linked(roots: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The roots after these pairs of rows have been put into one cluster; a root is the smallest row of its cluster."""
    while len(left):
        lower, upper = np.minimum(roots[left], roots[right]), np.maximum(roots[left], roots[right])
        apart = lower != upper
        left, right = left[apart], right[apart]
        np.minimum.at(roots, upper[apart], lower[apart])
        while not np.array_equal(roots[roots], roots):
            roots = roots[roots]
    return roots
