"""Which rows of a run are held out: no row of which the training rows hold a near-duplicate.

What makes rows near-duplicates is handed in by the recipe. A run that goes on splits as it began.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from onecard.console import say, warn
from onecard.data.batches import split, split_by_source
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import Encoder
from onecard.data.mixture import MixturePart
from onecard.errors import ConfigError

CLUSTERED = "near_duplicates"  # in the identity of runs whose split it changed


class RowSplit(NamedTuple):
    """Rows to train and to evaluate on, ascending; `threshold` of the clusters that decided it, None: none did."""

    train: np.ndarray
    test: np.ndarray
    threshold: float | None = None


@dataclass(frozen=True)
class Likeness:
    """What finds near-duplicates: from which similarity on (0: equal texts only), and how.

    clusters: of the sources, their encoded data, its encoder and a similarity the first group of each group's cluster,
    int (n_groups,).
    """

    threshold: float
    clusters: Callable[[Sequence[MixturePart], EncodedDataset, type[Encoder], float], np.ndarray]


def held_out(
    dataset: EncodedDataset, test_size: float, seed: int, began: Mapping[str, Any] | None, available: float,
    clusters_of: Callable[[float], np.ndarray],
) -> RowSplit:  # fmt: skip
    """Split the rows so that no near-duplicate of a training row is held out.

    began: of a run that goes on, what it kept. available: the similarity that can be found here; clusters_of: the first
    group of each group's cluster, int (n_groups,), of a similarity.
    Raises ConfigError where that of the run needs a library that is missing, or nothing is left to train on.
    """
    plain = _split(dataset, test_size, seed, None)
    threshold = available if began is None else began.get(CLUSTERED)
    if not len(plain.test) or threshold is None:
        return plain
    if threshold and not available:
        raise ConfigError("--test_size", "the rows of this run were split with rensa, which finds near-duplicates; "
                          "pip install -r requirements-data.txt to go on")  # fmt: skip
    if not threshold and began is None:
        say("held-out rows: only equal texts are kept out of them; pip install -r requirements-data.txt finds "
            "near-duplicates of training rows, too")  # fmt: skip
    found = _split(dataset, test_size, seed, clusters_of(threshold))
    n_moved = len(np.setdiff1d(plain.test, found.test))
    if not len(found.test):
        warn("the rows are near-duplicates of one another, so that each held-out row has one among the training rows: "
             "its loss tells little of new ones")  # fmt: skip
        found = plain
    elif n_moved:
        say(f"held-out rows: {n_moved:,} with near-duplicates among the training rows were moved to them; "
            f"{len(found.test):,} of {len(plain.test):,} are held out")  # fmt: skip
    return found._replace(threshold=threshold if n_moved or began is not None else None)


def _split(dataset: EncodedDataset, test_size: float, seed: int, clusters: np.ndarray | None) -> RowSplit:
    """With shares, each source is held out of by its share."""
    if dataset.parts is None or set(dataset.amounts) == {1}:
        return RowSplit(*split(dataset.groups, test_size, seed, clusters))
    return RowSplit(*split_by_source(dataset.groups, dataset.parts, dataset.amounts, test_size, seed, clusters))
