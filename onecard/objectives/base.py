"""What an objective is: how a record becomes samples, how samples become a batch, and the loss of a batch.

Training, evaluation, scores and the quantisers take an `Objective` and know no more of it than stands here. It knows
no steps, devices or optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.data.batches import SampleOrder
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import Encoder, LabelledSample
from onecard.data.packing import in_rows


class SampleView:
    """The samples that some rows of an encoded dataset make, in order; here each row is one.

    lengths (n,): what a sample adds to a micro-batch, in tokens. units (n,): what its loss is divided by, summed over
    the step: supervised tokens, their weights, pairs. parts (n,): the source of each sample; None where there is one
    source. Each sample has `record`, its name in the data. A subclass may
    make one sample of several rows, such as the two answers of a pair, which lie side by side.
    """

    def __init__(self, dataset: EncodedDataset, rows: np.ndarray) -> None:
        self.dataset, self.rows = dataset, rows
        self.lengths, self.units = dataset.lengths[rows], dataset.units[rows]
        self.parts = None if dataset.parts is None else dataset.parts[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        return self.dataset[int(self.rows[position])]

    @property
    def fingerprint(self) -> str:
        """Stands for all that is learned, held-out samples included."""
        return self.dataset.fingerprint

    @property
    def longest_sample(self) -> LabelledSample:
        """The longest one of the data set, or a sequence of it, held-out ones included."""
        return self.dataset[int(np.argmax(self.dataset.lengths))]

    @property
    def summary(self) -> str:
        """What the samples are, in words, where that is not told by the data."""
        return ""

    shares_prompt: bool = False
    """Whether the two answers of a sample are in one row."""

    @property
    def tokens_per_character(self) -> float | None:
        """Of the texts that are learned; None where samples are no texts."""
        return None

    @cached_property
    def order(self) -> int | SampleOrder:
        """What `step_samples` finds a step's samples by: their number, or how shares of several sources are drawn."""
        amounts = self.dataset.amounts
        return len(self) if self.parts is None or set(amounts) == {1} else SampleOrder(self.parts, amounts)

    @property
    def n_per_epoch(self) -> int:
        """Samples of one epoch."""
        return self.order if isinstance(self.order, int) else len(self.order)


class LossSums(NamedTuple):
    """What a batch adds to a step: its loss and units, and (n_metrics, 2) of each metric a sum and what divides it."""

    loss: Tensor
    n_units: float
    metrics: Tensor


class Objective(ABC):
    """One way to learn from data. Stateless: the same call gives the same result at any step of any run."""

    name: ClassVar[str]
    unit: ClassVar[str] = "supervised token"
    """What its loss is divided by, in words."""
    encoder: ClassVar[type[Encoder]] = Encoder
    """Makes the rows of an encoded dataset out of records."""
    samples: ClassVar[type[SampleView]] = SampleView
    """Makes samples out of these rows."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """What a step and an evaluation tell beside the loss, by TRL's names; `sums` has them in this order."""

    def with_options(self, options: TrainOptions) -> Objective:
        """The same objective with what the options say about it."""
        return self

    def view(self, dataset: EncodedDataset, rows: np.ndarray, config: FinetuneConfig) -> SampleView:
        """The samples that these rows make under these options."""
        return self.samples(dataset, rows)

    looks_ahead: ClassVar[bool] = False
    """Whether the loss of a sample depends on the whole step: its `estimator` is then asked before the gradients."""

    def estimator(self, samples: Sequence[Any]) -> tuple[Objective, Sequence[Any]] | None:
        """What is to be known of all samples of a step or an evaluation before their loss is computed: the mean loss of
        another objective over samples made of them. None where there is nothing to know."""
        return None

    def with_estimate(self, estimate: float) -> Objective:
        """The same objective for the step of which this was found."""
        return self

    def length(self, sample: Any) -> int:
        """What `samples` has for this sample under `lengths`."""
        return len(sample.input_ids)

    def lengths(self, samples: Sequence[Any]) -> np.ndarray:
        """`length` of each of these samples, (n,)."""
        known = getattr(samples, "lengths", None)
        return np.array([self.length(sample) for sample in samples]) if known is None else known

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        """One batch of these samples, on the CPU."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> tuple[Tensor, float]:
        """The loss summed over the units of a batch (a scalar, fp32), and the number of these units.

        A sum, so that a step does not depend on how it is cut into micro-batches. It calls the forward of `model` as it
        is, wrapped or not, so that hooks of gradients fire. chunk_tokens: at most so many tokens have logits at a time,
        0: all. An objective has this or `sums`.
        """
        return self.sums(model, batch, chunk_tokens=chunk_tokens)[:2]

    def sums(self, model: nn.Module, batch: dict[str, Tensor], *, chunk_tokens: int = 0) -> LossSums:
        """`loss` with the sums of the metrics; an objective that has some computes both here."""
        return LossSums(*self.loss(model, batch, chunk_tokens=chunk_tokens), torch.zeros(len(self.metrics), 2))

    def sums_of(
        self, model: nn.Module, samples: Sequence[Any], device: Any, *, chunk_tokens: int = 0, row_tokens: int = 0
    ) -> LossSums:
        """`sums` of samples, moved to the device, where they lie too: the head may lie on another one.

        row_tokens: samples share rows of so many tokens (`packing.in_rows`), which changes nothing; 0: each is a row.
        """
        samples = in_rows(samples, row_tokens) if row_tokens else samples
        batch = {name: tensor.to(device) for name, tensor in self.collate(samples).items()}
        loss, n_units, metrics = self.sums(model, batch, chunk_tokens=chunk_tokens)
        return LossSums(loss.to(device), n_units, metrics.to(device))

    def loss_of(
        self, model: nn.Module, samples: Sequence[Any], device: Any, *, chunk_tokens: int = 0, row_tokens: int = 0
    ) -> tuple[Tensor, float]:
        """`sums_of` without the metrics."""
        return self.sums_of(model, samples, device, chunk_tokens=chunk_tokens, row_tokens=row_tokens)[:2]

    def flat_sums(self, model: nn.Module, samples: Sequence[Any], device: Any, **cut: int) -> Tensor:
        """`sums_of` in one tensor, float64 (2 + 2 n_metrics,)."""
        loss, n_units, metrics = self.sums_of(model, samples, device, **cut)
        return torch.tensor([float(loss), n_units, *metrics.flatten().tolist()], dtype=torch.float64)

    def sample_sums(
        self, model: nn.Module, samples: Sequence[Any], device: Any, *, chunk_tokens: int = 0, row_tokens: int = 0
    ) -> Tensor:
        """The loss and the units of each sample alone, float64 (n, 2); here one after the other."""
        each = [self.flat_sums(model, [sample], device, chunk_tokens=chunk_tokens)[:2] for sample in samples]
        return torch.stack(each)

    def means(self, metrics: Sequence[float]) -> dict[str, float]:
        """The metrics by name, out of their sums over a step or an evaluation, flat; none where nothing was counted."""
        counted = zip(self.metrics, metrics[::2], metrics[1::2], strict=True)
        return {name: total / count for name, total, count in counted if count}
