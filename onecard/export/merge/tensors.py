"""The tensors of a merged model, one layer at a time, under the names of the base's files.

Each adapted layer is read once, merged in fp32 and rounded once. Knows tied heads and names. Does not know files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from onecard.export.io.base import LazyCheckpoint
from onecard.export.io.left_out import TABLES
from onecard.export.io.weights import own_memory
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


class LayerMerger:
    """Merges each layer once and writes it; meanwhile forward passes take the layer's weights in each of three states.

    Forward passes that run together (`forward.run_together`) ask for a layer as it is stored, then as the last adapter
    finds it, then merged and rounded: the base's file is read for the first of them, and the others work on that. A
    layer that is asked for again in an earlier state is read again.
    """

    def __init__(
        self, adapted: LoraStack, dtype: torch.dtype, report: MergeReport, write: Callable[[str, Tensor], object], *,
        strict: bool = False,
    ) -> None:  # fmt: skip
        self.adapted, self.base, self.dtype, self.report, self.strict = adapted, adapted.base, dtype, report, strict
        self._write = write
        self._groups = _groups(adapted)
        self._n_before_last = len(adapted.stages) - 1
        self._held: dict[str, tuple[int, dict[str, Tensor]]] = {}
        """Layers in fp32 and how many adapters they have merged in, -1: none, and not prepared for the first."""
        self._ready: dict[str, tuple[Tensor, Tensor | None]] = {}
        """Merged parameters that no forward pass has asked for: rounded, and memory for their fp32 values, if any."""
        self._written: set[str] = set()
        self._counted: set[str] = set()

    def as_stored(self, layer: str) -> dict[str, Tensor]:
        """Weights of a layer in the base, in fp32, by their names in the model."""
        return self._in_state(self.adapted.owner_of(layer), -1)

    def before_last(self, layer: str) -> dict[str, Tensor]:
        """Those that the last adapter works on."""
        return self._in_state(self.adapted.owner_of(layer), self._n_before_last)

    def merged(self, layer: str) -> dict[str, Tensor]:
        """Those of the result in fp32, as they were rounded. The first call writes them."""
        names = self.base.own_parameters_of(layer)
        if any(name not in self._ready for name in names):
            self._merge(self.adapted.owner_of(layer), layer)
        return {name: _as_float(*self._ready.pop(name)) for name in names}

    def finish(self) -> None:
        """Write what no forward pass has asked for, in the order of the base's files. Raises as `merge_into` does."""
        self._held.clear()
        for name in self.base.weights.entries:
            if name in self._written:
                continue
            if name.endswith(TABLES):
                self._put(name, self.base.weights.read(name))
            elif name in self._groups:
                self._merge(self._groups[name][0], "")
                self._ready.clear()
            else:
                self._put(name, self._rounded_copy(name))
        self.base.weights.close()

    def _in_state(self, module: str, n_stages: int) -> dict[str, Tensor]:
        start, tensors = self._held.pop(module, (n_stages + 1, {}))
        if start > n_stages:
            start, tensors = -1, self.adapted.read(module)
        if start < n_stages and module in self.adapted.touched:
            tensors = self.adapted.advance(module, tensors, max(start, 0), n_stages)
        self._held[module] = n_stages, tensors
        return tensors

    def _merge(self, module: str, layer: str) -> None:
        """Merge, round and write a touched layer, with the other half of a tied pair, or round one as it is.

        layer: the one that a forward pass needs next, whose memory in fp32 is used again.
        """
        if module not in self.adapted.touched:
            _, tensors = self._held.pop(module, (0, {}))
            for name in self.base.own_parameters_of(module):
                stored = self.base.required_name(name)
                result = self._rounded_copy(stored)
                self._ready[name] = result, tensors.get(name)
                self._put(stored, result)
            return
        group = self._groups[self.base.required_name(self.adapted.parameters_of(module)[0])]
        merged: dict[str, Tensor] = {}
        for member in group:
            given = self._in_state(member, self._n_before_last)
            places = {tensor.data_ptr() for tensor in given.values()}
            del self._held[member]
            sums = self.adapted.advance(member, given, self._n_before_last, self._n_before_last + 1)
            merged |= self._rounded_sums(member, sums)
            for name, tensor in sums.items():
                # Weights that the adapter holds itself are not written over.
                is_free = name.startswith(f"{layer}.") and tensor.data_ptr() in places
                self._ready[name] = merged[name], tensor if is_free else None
        self._write_group(merged)

    def _rounded_sums(self, module: str, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The final tensors of one layer by their names in the model; counts it."""
        result, is_changed = dict[str, Tensor](), False
        for name, tensor in sums.items():
            # Rounded by the name that is stored, so that a tied pair stays one.
            stored = self.base.required_name(name)
            dtype, before = kept_dtype(self.base, stored, self.dtype), self.base.weights.mapped(stored)
            # Of its own dtype, what is as it was stays so by itself.
            is_same = before.dtype != dtype and torch.equal(tensor, before.to(tensor.dtype))
            result[name] = (rounded if is_same else rounded_sum)(stored, tensor, dtype, strict=self.strict)
            is_changed = is_changed or not torch.equal(result[name], before.to(dtype))
        if module in self.adapted.targets and module not in self._counted:
            self._counted.add(module)
            self.report.n_targets += 1
            self.report.unchanged += [] if is_changed else [module]
        return result

    def _write_group(self, merged: dict[str, Tensor]) -> None:
        """Write one group under its stored names; of a pair that is still one, without what the files lacked."""
        base = self.base
        embedding, head = merged.get(f"{base.embedding}.weight"), merged.get(f"{base.head}.weight")
        if base.is_tied and embedding is not None and head is not None:
            self.report.is_tied = torch.equal(embedding, head)
        for parameter, tensor in merged.items():
            own = base.own_name(parameter)
            if own or not self.report.is_tied:
                self._put(own or parameter, tensor)

    def _rounded_copy(self, stored: str) -> Tensor:
        dtype = kept_dtype(self.base, stored, self.dtype)
        return rounded(stored, self.base.weights.read(stored), dtype, strict=self.strict)

    def _put(self, stored: str, tensor: Tensor) -> None:
        if stored not in self._written:
            self._written.add(stored)
            self._write(stored, tensor)


def _as_float(tensor: Tensor, place: Tensor | None) -> Tensor:
    if tensor.dtype == torch.float32:
        return tensor
    return (own_memory(tensor.shape, torch.float32) if place is None else place).copy_(tensor)


def _groups(adapted: LoraStack) -> dict[str, tuple[str, ...]]:
    """The layers that are merged together, by the stored name of each of their tensors: one, or a tied pair."""
    base, groups = adapted.base, dict[str, tuple[str, ...]]()
    for module in adapted.touched:
        is_pair = base.is_tied and module in adapted.vocabulary
        group = tuple(adapted.vocabulary) if is_pair else (module,)
        groups |= {base.required_name(parameter): group for parameter in adapted.parameters_of(module)}
    return groups


def kept_dtype(base: LazyCheckpoint, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a stored tensor gets: `dtype`, but for integers, tables, and what was kept wider on purpose."""
    stored = base.weights.entries[name].dtype
    is_wider = stored != base.dtype and stored.itemsize > dtype.itemsize
    return stored if not stored.is_floating_point or name.endswith(TABLES) or is_wider else dtype
