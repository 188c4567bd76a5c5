"""The loss and the tokens of each source of a mixture, between two rows of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class SourceLosses:
    """Sums over the steps since the last row: loss in nats, units that were learned, tokens; each by source."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._sums = np.zeros((len(self.names), 2))

    def add(self, of_step: np.ndarray, tokens_seen: dict[str, int]) -> None:
        """Count one step, and its tokens in `tokens_seen` too.

        of_step (n_sources, 3): the loss summed over units, the units, and the tokens. Without names nothing is done.
        """
        for number, name in enumerate(self.names):
            self._sums[number] += of_step[number, :2]
            tokens_seen[name] = tokens_seen.get(name, 0) + int(of_step[number, 2])

    def row(self, tokens_seen: dict[str, int]) -> dict[str, Any]:
        """What goes into the log, after which the sums begin anew: loss/NAME per unit, tokens/NAME of the whole run.

        A source that had no sample since the last row has no loss in this one.
        """
        found: dict[str, Any] = {}
        for name, (loss, units) in zip(self.names, self._sums, strict=True):
            if units:
                found[f"loss/{name}"] = round(float(loss / units), 6)
            found[f"tokens/{name}"] = tokens_seen.get(name, 0)
        self._sums[:] = 0
        return found
