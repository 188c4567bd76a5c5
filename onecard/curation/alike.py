"""Which conversations of encoded data are near-duplicates, so that they are held out together or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

from onecard.curation.sketches import Sketches
from onecard.curation.words import texts_of
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import Encoder
from onecard.data.mixture import MixturePart
from onecard.data.sources import ReadReport, read

NEAR_DUPLICATES = 0.7  # as `onecard data split` has it


def likeness() -> float:
    """The estimated Jaccard similarity from which rows are near-duplicates here; 0 (equal texts only) without rensa."""
    return 0.0 if find_spec("rensa") is None else NEAR_DUPLICATES


def clusters_of_groups(
    parts: Sequence[MixturePart], dataset: EncodedDataset, encoder: type[Encoder], threshold: float
) -> np.ndarray:
    """The first group of each group's cluster, int64 (n_groups,), by the texts that are read anew; frames do not count.

    parts: what the data set was encoded from. Raises DataError as `read`.
    """
    n_groups = int(dataset.groups.max()) + 1
    ends = [*dataset.first_groups[1:], n_groups]
    sources = zip(parts, dataset.first_groups, ends, strict=True)
    texts = (text for part, first, end in sources for text in _texts(part, encoder, end - first))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Sketches(Path(folder), threshold) as found:
        for text in texts:
            found.add(text)
        return found.clusters()


def _texts(part: MixturePart, encoder: type[Encoder], n_groups: int) -> Iterator[str]:
    """The text of each conversation of a source, up to the last one that was encoded."""
    for sample in islice(read(part.source, report=ReadReport(), shape=encoder.reads), n_groups):
        yield "\n".join(text for _, text in texts_of(sample, with_frame=False))
