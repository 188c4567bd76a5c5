"""Vectors of texts by meaning, where model2vec is installed and a model of it was chosen for the index.

Static vectors are computed on the CPU in well under a millisecond a text, so the card's memory stays the language
model's. All vectors are compared, exactly, in one product of matrices. Knows texts and numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from onecard.console import first_line
from onecard.documents.index import DocumentIndex
from onecard.errors import DataError

NEEDS = "finding by meaning needs model2vec: pip install -r requirements-documents.txt"


class TextVectors:
    """A model that gives texts vectors of length 1."""

    def __init__(self, model: str) -> None:
        """Load a directory or a Hub id. Raises DataError."""
        if find_spec("model2vec") is None:
            raise DataError(NEEDS)
        from model2vec import StaticModel

        try:
            self._model = StaticModel.from_pretrained(model, force_download=False)
        except Exception as reason:  # of the Hub, of files, of safetensors and of tokenizers
            what = f"cannot be loaded ({first_line(reason)}); a directory or Hub id of a model2vec model is needed"
            raise DataError(what, model) from None

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """(n, width) float32."""
        found = self._model.encode(list(texts), normalize=True, use_multiprocessing=False)
        return np.asarray(found, dtype=np.float32)


class VectorSearch:
    """The vectors of an index in memory, read again when it has changed."""

    def __init__(self, index: DocumentIndex, model: TextVectors) -> None:
        self._index, self._model = index, model
        self._lock = threading.Lock()
        self._version: Any = None
        self._vectors: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty((0, 0), np.float32))

    def nearest(self, text: str, most: int) -> list[tuple[int, float]]:
        """(chunk, cosine) of the chunks nearest to a text, the nearest first."""
        with self._lock:
            if (version := self._index.version()) != self._version:
                self._vectors, self._version = self._read(), version
            ids, matrix = self._vectors
        if not len(ids):
            return []
        cosines = matrix @ self._model.of([text])[0]
        best = np.argpartition(-cosines, min(most, len(ids)) - 1)[:most]
        best = best[np.argsort(-cosines[best], kind="stable")]
        return [(int(ids[k]), float(cosines[k])) for k in best]

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        rows = list(self._index.vectors())
        matrix = np.frombuffer(b"".join(vector for _, vector in rows), np.float16).astype(np.float32)
        return np.array([chunk for chunk, _ in rows], np.int64), matrix.reshape(len(rows) or 1, -1)


def stored(vectors: np.ndarray) -> list[bytes]:
    """Vectors as the index keeps them: two bytes a number."""
    return [vector.astype(np.float16).tobytes() for vector in vectors]
