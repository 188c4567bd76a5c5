"""The loss on held-out rows, computed exactly as in training, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from onecard.data.batches import micro_batches, share_for_rank
from onecard.data.packing import padded_tokens
from onecard.errors import ModelError
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory
from onecard.objectives.base import Objective
from onecard.train.oom import SMALLEST_CHUNK, MicroBatchLimits

MAX_FAILURES = 3  # of one row, at a chunk of logits that cannot be made smaller
TOO_LONG = "a single held-out row does not fit in memory; use a shorter --cutoff_len, or --test_size 0"


@dataclass
class EvaluationLimits:
    """What has been found not to fit in evaluation, so that it is not tried again; each process finds its own."""

    too_many_tokens: float = math.inf
    """Of a micro-batch, padding included."""
    loss_chunk: int = 0
    """Supervised tokens whose logits did fit; 0: as in training."""
    every_turn: bool = False
    """Each process has to run as many micro-batches as the others, so nothing can be tried twice."""


SumsOf = Callable[..., torch.Tensor]
"""What an objective makes of a micro-batch: `Objective.flat_sums` or `Objective.sample_sums`."""


@dataclass
class Evaluator:
    """Evaluates samples with a model under limits of memory, on all processes together."""

    model: torch.nn.Module
    """Any causal LM, wrapped or not; it is put back into training mode if it was in it."""
    accelerator: Any
    """Moves the batches and sums over processes."""
    limits: MicroBatchLimits = field(default_factory=MicroBatchLimits)
    """As in training."""
    own: EvaluationLimits = field(default_factory=EvaluationLimits)
    """What did not fit before, and now."""
    on_change: Callable[[str], None] = lambda change: None
    """Is given words each time that memory ran out."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Is given how many of this process's rows are done, and how many there are."""
    _n_failures: int = 0

    def sums(self, objective: Objective, samples: Sequence[Any]) -> torch.Tensor:
        """The objective's sums over `samples`: loss, units, metrics flat, float64 (2 + 2 n_metrics,), on every process.

        Raises ModelError when a single row does not fit.
        """
        objective = self.estimated(objective, samples)
        total = torch.zeros(2 + 2 * len(objective.metrics), dtype=torch.float64)
        return self._evaluated(objective, samples, objective.flat_sums, total)

    def sample_sums(self, objective: Objective, samples: Sequence[Any]) -> torch.Tensor:
        """The loss and the units of each sample, float64 (n, 2), on every process. Raises as `sums`."""
        objective = self.estimated(objective, samples)
        total = torch.zeros(len(samples), 2, dtype=torch.float64)
        return self._evaluated(objective, samples, objective.sample_sums, total)

    def estimated(self, objective: Objective, samples: Sequence[Any]) -> Objective:
        """The objective with what it has to know of all these samples."""
        asked = objective.estimator(samples)
        if asked is None:
            return objective
        loss, n_units = self.sums(*asked)[:2].tolist()
        return objective.with_estimate(loss / n_units)

    def _evaluated(
        self, objective: Objective, samples: Sequence[Any], sums_of: SumsOf, total: torch.Tensor
    ) -> torch.Tensor:
        """Add what the objective finds in each micro-batch to `total`: to the rows of its samples, or to all of it."""
        was_training, lengths, accelerator = self.model.training, objective.lengths(samples), self.accelerator
        self.model.eval()
        micros = micro_batches(np.arange(len(samples)), lengths, **self.limits.cut)
        row_tokens = self.limits.row_tokens
        mine = share_for_rank(micros, accelerator.process_index, accelerator.num_processes, lengths, row_tokens)
        waiting = [micro for micro in mine if micro is not None]
        n_done, n_mine, n_more = 0, sum(map(len, waiting)), (len(mine) - len(waiting)) * self.own.every_turn
        self._n_failures = 0
        while waiting:
            micro = waiting.pop(0)
            half = len(micro) // 2
            if half and padded_tokens(micro, lengths, row_tokens) >= self.own.too_many_tokens:
                waiting[:0] = [micro[:half], micro[half:]]
                continue
            found = self._within_memory(sums_of, [samples[i] for i in micro])
            if found is None:
                self._ask_for_less(micro, lengths)
                waiting.insert(0, micro)
                continue
            total[torch.from_numpy(micro) if total.dim() == 2 else ...] += found
            n_done, self._n_failures = n_done + len(micro), 0
            self.progress(n_done, n_mine)
        for _ in range(n_more):  # of no weight
            self._within_memory(sums_of, [samples[0]])
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
        self.model.train(was_training)
        return total.cpu()

    @property
    def _loss_chunk(self) -> int:
        chosen, fitted = self.limits.loss_chunk, self.own.loss_chunk
        return min(fitted or chosen, chosen or fitted)

    def _within_memory(self, sums_of: SumsOf, samples: Sequence[Any]) -> torch.Tensor | None:
        """What is found in one micro-batch, without gradients; None when memory ran out."""
        try:
            with torch.no_grad():
                return sums_of(self.model, samples, self.accelerator.device, chunk_tokens=self._loss_chunk,
                               row_tokens=self.limits.row_tokens)  # fmt: skip
        except (RuntimeError, MemoryError) as reason:
            if not is_out_of_memory(reason):
                raise
        return None

    def _ask_for_less(self, micro: np.ndarray, lengths: np.ndarray) -> None:
        """After a micro-batch that did not fit: make smaller what passes at once, fewer rows first, then fewer logits.

        Raises ModelError when there is nothing left to be made smaller.
        """
        if self.own.every_turn:
            raise ModelError(TOO_LONG)
        give_back_memory()
        if len(micro) > 1:
            self.own.too_many_tokens = padded_tokens(micro, lengths, self.limits.row_tokens)
            self.on_change(f"fewer than {self.own.too_many_tokens:,} tokens at once")
            return
        longest = int(lengths[micro[0]])
        smaller = min(self._loss_chunk or longest, longest) // 2
        self._n_failures += smaller < SMALLEST_CHUNK
        if self._n_failures > MAX_FAILURES:
            raise ModelError(TOO_LONG)
        if smaller < SMALLEST_CHUNK:
            self.on_change("the same once more")
            return
        self.own.loss_chunk = smaller
        self.on_change(f"logits of {smaller} tokens at once")
