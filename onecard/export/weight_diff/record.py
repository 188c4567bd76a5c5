"""weight_diff.json: which base a difference belongs to and what it must give, tensor by tensor, as SHA-256.

Knows names, shapes and hashes; not how differences are computed.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.console import few
from onecard.errors import ModelError
from onecard.export.io.weights import DTYPES, Weights
from onecard.model.files import read_json, write_json

RECORD = "weight_diff.json"
FORMAT = 1
MODES, KINDS = ("exact", "float"), ("difference", "same", "whole")


@dataclass(frozen=True)
class TensorRecord:
    """What identifies one tensor: kind of number, shape, and the SHA-256 of its bytes in row order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class DiffRecord:
    """The content of weight_diff.json.

    `base` holds the base's tensors that were used, `tuned` every tensor that base + difference gives, `kinds` how each
    is stored: as a difference, not at all (same), or whole. `base_name` helps a person to find the base.
    """

    mode: str
    base_name: str
    base: dict[str, TensorRecord]
    tuned: dict[str, TensorRecord]
    kinds: dict[str, str]

    @property
    def stored(self) -> set[str]:
        """The tensors that the difference's own files hold."""
        return {name for name, kind in self.kinds.items() if kind != "same"}


def known_of(tensor: Tensor) -> TensorRecord:
    """The identity of a tensor on the CPU."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    dtype = next(name for name, kind in DTYPES.items() if kind == tensor.dtype)
    return TensorRecord(dtype, tuple(tensor.shape), hashlib.sha256(data.data).hexdigest())


def check_base(base: Weights, record: DiffRecord) -> None:
    """Raises ModelError when `base` is not the recorded one, with the first tensors that differ.

    Compares tensors, not files: a base that was cut into other shards is the same base.
    """
    lacking = [name for name in record.base if name not in base.entries]
    if lacking:
        raise ModelError(f"{base.directory} is not the base ({record.base_name}): it lacks {few(lacking)}")
    differing = [name for name in record.base if tuple(base.entries[name].shape) != record.base[name].shape]
    if not differing:
        in_order = [name for name in base.entries if name in record.base]
        differing = [name for name in in_order if known_of(base.read(name)) != record.base[name]]
        base.close()
    if differing:
        raise ModelError(
            f"{base.directory} is not the base of this difference: {len(differing)} of {len(record.base)} tensors "
            f"differ ({few(differing)}); take the one that it was made from: {record.base_name}"
        )


def write_record(directory: Path, record: DiffRecord) -> None:
    """Write weight_diff.json into `directory`."""
    write_json(directory / RECORD, {"format": FORMAT, **asdict(record)})


def read_record(directory: Path) -> DiffRecord | None:
    """The record of a difference; None where there is none. Raises ModelError when it is damaged or newer."""
    file = directory / RECORD
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise ModelError(f"{file} has format {content.get('format')!r}; this version reads {FORMAT}")
    try:
        record = DiffRecord(
            mode=content["mode"],
            base_name=str(content["base_name"]),
            base=_tensors(content["base"]),
            tuned=_tensors(content["tuned"]),
            kinds=dict(content["kinds"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as reason:
        raise ModelError(f"{file} is damaged; copy the difference again") from reason
    is_whole = record.tuned.keys() == record.kinds.keys() and record.base.keys() <= record.tuned.keys()
    used = {name for name, kind in record.kinds.items() if kind != "whole"}
    if not is_whole or used != record.base.keys() or record.mode not in MODES or set(record.kinds.values()) - {*KINDS}:
        raise ModelError(f"{file} is damaged: its lists do not agree; copy the difference again")
    return record


def _tensors(content: dict[str, Any]) -> dict[str, TensorRecord]:
    found = {name: TensorRecord(one["dtype"], tuple(one["shape"]), one["sha256"]) for name, one in content.items()}
    unknown = {known.dtype for known in found.values()} - DTYPES.keys()
    if unknown:
        raise ValueError(f"kinds of numbers {unknown}")
    return found
