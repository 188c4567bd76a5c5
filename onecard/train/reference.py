"""The log-probabilities of a preference run's reference, computed once before training and kept with the encoded data.

Knows which model is the reference (the base alone, or the adapter that the run starts from) and the file of the cached
values. Does not know what a loss makes of them (objectives/preference.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from onecard.config.objectives import CACHES_REFERENCE
from onecard.config.training import FinetuneConfig
from onecard.console import say, warn
from onecard.data.arrow_cache import content_fingerprint
from onecard.data.dataset import EncodedDataset
from onecard.errors import CheckpointError
from onecard.model.files import base_fingerprint
from onecard.model.lora.formats import read_adapter
from onecard.objectives.base import LossSums, Objective
from onecard.objectives.preference import AnswerPair, adapter_off, pair_log_probs
from onecard.storage import sha256_of, write_whole
from onecard.train.resume import ResumePoint
from onecard.train.run import Run
from onecard.train.validation import evaluate

BASE = "base"
BLOCK = 512  # pairs between two looks at the clock
SAVE_S = 60
DIGEST_BYTES = 32


def reference_of(config: FinetuneConfig, point: ResumePoint | None) -> str | None:
    """What a run compares with, for its identity: base, the SHA-256 of the adapter that it starts from, or nothing.

    Runs of versions that knew no other reference go on with the base.
    """
    train = config.train
    if train.objective not in CACHES_REFERENCE:
        return None
    if train.start_adapter is None or train.cache_reference is False:
        return BASE
    if point is None or not point.same_run:
        return sha256_of(read_adapter(train.start_adapter).weights)
    return point.state.identity.get("reference", BASE)


@dataclass
class CachedReference:
    """values: float32 (n_rows of the data set,), the log-probability of each answer; NaN where it is not yet known."""

    path: Path
    key: str
    values: np.ndarray
    adapter: str | None
    """The SHA-256 of the adapter that is the reference; None: the base alone."""

    @property
    def is_whole(self) -> bool:
        return not np.isnan(self.values).any()

    def save(self) -> None:
        content = self.values.astype("<f4").tobytes()
        try:
            write_whole(self.path, _digest(self.key, content) + content)
        except OSError as reason:
            warn(f"{self.path} was not written ({reason}); a later start computes the reference again")


def cached_reference(
    config: FinetuneConfig, dataset: EncodedDataset, dtype: torch.dtype, reference: str | None
) -> CachedReference | None:
    """What is known of the reference, as the first process finds it; None where it is computed in every step.

    The key holds all that the values depend on: the ids, the base and how it lies in memory, and the adapter.
    """
    adapter = None if reference == BASE else reference
    if reference is None or (config.train.cache_reference is not True and adapter is None):
        return None
    head_bits = config.memory.head_bits if config.memory.head_bits in ("4", "8") else "16"
    parts = [content_fingerprint(dataset.batches), base_fingerprint(config.model.model_path), config.model.bits,
             str(dtype), head_bits, config.model.attn_implementation, config.memory.kernels, adapter]  # fmt: skip
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = dataset.path.parent / f"{key[:32]}.reference"
    values = broadcast_object_list([_read(path, key, len(dataset))])[0]
    return CachedReference(path, key, values, adapter)


def check_start(config: FinetuneConfig, adapter: str) -> None:
    """Raise CheckpointError where the adapter that the run began from is another one by now."""
    start = str(config.train.start_adapter)
    if sha256_of(read_adapter(start).weights) != adapter:
        raise CheckpointError(
            f"{start} is the reference of this run and has changed since it began, and its cached log-probabilities "
            "are gone. Put the adapter back, or begin a new run with another --output_path"
        )


def fill_reference(run: Run, cached: CachedReference) -> None:
    """Compute what is missing, with the adapter as it is now or off, and give the samples their values."""
    what = "the base without adapter" if cached.adapter is None else f"the adapter {run.options.start_adapter}"
    rows = run.train_samples.pairs[:, 0].tolist() + [pair.row for pair in run.test_samples]
    missing = sorted(row for row in rows if np.isnan(cached.values[row : row + 2]).any())
    if missing:
        say(f"{len(missing):,} pairs are given to the reference, once, before training")
        _compute(run, cached, missing)
    say(f"the reference is {what}: log-probabilities of {len(rows):,} pairs in {cached.path}")
    run.train_samples.reference = cached.values
    run.test_samples = [replace(pair, reference=cached.values[pair.row : pair.row + 2]) for pair in run.test_samples]


def _compute(run: Run, cached: CachedReference, missing: Sequence[int]) -> None:
    dataset, is_main = run.train_samples.dataset, run.accelerator.is_main_process
    # The longest first: what does not fit is found at once.
    ordered = sorted(missing, key=lambda row: -int(dataset.lengths[row : row + 2].max()))
    saved_s = time.monotonic()
    try:
        for start in range(0, len(ordered), BLOCK):
            block = [run.train_samples.pair(row) for row in ordered[start : start + BLOCK]]
            found = ReferenceScores(run, of_adapter=cached.adapter is not None)
            evaluate(run, block, objective=found)
            own = torch.tensor([found.scores.get(pair.row, (0.0, 0.0)) for pair in block])
            if run.accelerator.num_processes > 1:
                own = run.accelerator.reduce(own.to(run.accelerator.device), reduction="sum")
            for pair, scores in zip(block, own.cpu().numpy(), strict=True):
                cached.values[pair.row : pair.row + 2] = scores
            if is_main and time.monotonic() - saved_s > SAVE_S:
                cached.save()
                say(f"reference: {start + len(block):,} of {len(ordered):,} pairs")
                saved_s = time.monotonic()
    finally:
        if is_main:
            cached.save()


class ReferenceScores(Objective):
    """Learns nothing: what it is given to evaluate, it keeps the log-probabilities of, by row."""

    name = "reference"

    def __init__(self, run: Run, *, of_adapter: bool) -> None:
        self.pairs, self.autocast, self.of_adapter = run.objective, run.accelerator.autocast, of_adapter
        self.scores: dict[int, list[float]] = {}

    def length(self, sample: AnswerPair) -> int:
        return self.pairs.length(sample)

    def collate(self, samples: Sequence[AnswerPair]) -> dict[str, torch.Tensor]:
        return self.pairs.collate(samples)

    def loss(self, model: Any, batch: dict[str, torch.Tensor], *, chunk_tokens: int = 0) -> tuple[torch.Tensor, float]:
        with self.autocast(), nullcontext() if self.of_adapter else adapter_off(model):
            scores = pair_log_probs(model, batch, chunk_tokens=chunk_tokens)[0]
        return scores, len(scores)

    def sums_of(
        self, model: Any, samples: Sequence[AnswerPair], device: Any, *, chunk_tokens: int = 0, row_tokens: int = 0
    ) -> LossSums:
        batch = {name: tensor.to(device) for name, tensor in self.collate(samples).items()}
        scores, n = self.loss(model, batch, chunk_tokens=chunk_tokens)
        self.scores |= {pair.row: each for pair, each in zip(samples, scores.tolist(), strict=True)}
        return LossSums(torch.zeros(()), n, torch.zeros(0, 2))


def _read(path: Path, key: str, n_rows: int) -> np.ndarray:
    if path.is_file():
        stored = path.read_bytes()
        digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        if digest == _digest(key, content) and len(content) == 4 * n_rows:
            return np.frombuffer(content, "<f4").astype(np.float32)
        warn(f"the cached reference in {path} is damaged; it is computed anew")
    return np.full(n_rows, np.nan, np.float32)


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()
