"""The tensors of a merged model, one layer at a time, under the names of the base's files.

Each adapted layer is merged in fp32 and rounded once. Knows tied heads and names. Does not write anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from onecard.export.io.base import LazyCheckpoint
from onecard.export.io.left_out import TABLES
from onecard.export.io.output import progress
from onecard.export.merge.lora_stack import LoraStack
from onecard.export.merge.rounding import rounded, rounded_sum


@dataclass
class MergeReport:
    """What was merged, and what was seen while doing so."""

    directory: Path
    dtype: str
    adapters: list[str]
    n_targets: int = 0
    """Layers that an adapter targets."""
    unchanged: list[str] = field(default_factory=list)
    """Those that came out as they went in: their adapter was never trained, or moved them by less than one rounding."""
    checksums: dict[str, int] = field(default_factory=dict)
    """CRC-32 of each tensor that was written, by its stored name."""
    is_tied: bool = False
    """Whether the result's head is its embeddings' weight."""
    n_tensors: int = 0
    total_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    proof: str = ""
    """What the verification found, in one line; empty where there was none."""
    files_proof: str = ""
    """What comparing Meta's files with the merged weights found; empty where none were written."""


def merged_tensors(
    adapted: LoraStack, dtype: torch.dtype, report: MergeReport, *, strict: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the result by their stored names, in the order of the base's files.

    Counts targets in `report` and says there whether head and embeddings are still one. Raises as `merge_into` does;
    strict: DoesNotFit, too, for values too small for fp16.
    """
    base, weights, groups, done = adapted.base, adapted.base.weights, _groups(adapted), set[str]()
    with progress("merging", weights.total_bytes, in_bytes=True) as move_on:
        for name, entry in weights.entries.items():
            group = groups.get(name, ())
            if name.endswith(TABLES):
                yield name, weights.read(name)
            elif not group:
                yield name, rounded(name, weights.read(name), kept_dtype(base, name, dtype), strict=strict)
            elif group[0] not in done:
                done.add(group[0])
                yield from _stored(base, _merged_group(adapted, group, dtype, report, strict), report)
            move_on(entry.n_bytes)
    weights.close()


def _stored(base: LazyCheckpoint, merged: dict[str, Tensor], report: MergeReport) -> Iterator[tuple[str, Tensor]]:
    """One group under its stored names; of a pair that is still one, the half that the files lacked stays out."""
    embedding, head = merged.get(f"{base.embedding}.weight"), merged.get(f"{base.head}.weight")
    if base.is_tied and embedding is not None and head is not None:
        report.is_tied = torch.equal(embedding, head)
    for parameter, tensor in merged.items():
        own = base.own_name(parameter)
        if own or not report.is_tied:
            yield own or parameter, tensor


def _groups(adapted: LoraStack) -> dict[str, tuple[str, ...]]:
    """The layers that are merged together, by the stored name of each of their tensors: one, or a tied pair."""
    base, groups = adapted.base, dict[str, tuple[str, ...]]()
    for module in adapted.touched:
        is_pair = base.is_tied and module in adapted.vocabulary
        group = tuple(adapted.vocabulary) if is_pair else (module,)
        groups |= {base.required_name(parameter): group for parameter in adapted.parameters_of(module)}
    return groups


def _merged_group(
    adapted: LoraStack, group: tuple[str, ...], dtype: torch.dtype, report: MergeReport, strict: bool
) -> dict[str, Tensor]:
    """The final tensors of one layer, or of a tied pair, by their names in the model."""
    base, result = adapted.base, dict[str, Tensor]()
    for module in group:
        is_changed = False
        for name, tensor in adapted.merged(module).items():
            # Rounded by the name that is stored, so that a tied pair stays one.
            stored, before = base.required_name(name), base.read(name)
            round_it = rounded if torch.equal(tensor, before) else rounded_sum
            result[name] = round_it(stored, tensor, kept_dtype(base, stored, dtype), strict=strict)
            is_changed = is_changed or not torch.equal(result[name], before.to(result[name].dtype))
        if module in adapted.targets:
            report.n_targets += 1
            report.unchanged += [] if is_changed else [module]
    return result


def kept_dtype(base: LazyCheckpoint, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a stored tensor gets: `dtype`, but for integers, tables, and what was kept wider on purpose."""
    stored = base.weights.entries[name].dtype
    is_wider = stored != base.dtype and stored.itemsize > dtype.itemsize
    return stored if not stored.is_floating_point or name.endswith(TABLES) or is_wider else dtype
