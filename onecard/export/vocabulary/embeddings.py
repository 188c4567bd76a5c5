"""Which tensors of a model have a row for each token: its embeddings, its head, the head's bias.

The model is built by transformers on torch's meta device, where tensors have shapes and no bytes. Knows names and
shapes; does not know what a row should hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from onecard.errors import ModelError
from onecard.export.io.base import open_base
from onecard.export.io.weights import Weights


@dataclass(frozen=True)
class EmbeddingMatrices:
    """Names as they stand in the weight files. `row_bytes` is what one more token takes in all of them."""

    names: tuple[str, ...]
    n_rows: int
    row_bytes: int
    is_tied: bool


def find_tables(directory: Path, weights: Weights) -> EmbeddingMatrices:
    """The tables of a model directory, checked against its config.json.

    Raises ModelError as `open_base`, and for tables that are missing, of few bits, or further ones (Gemma 3n has such).
    """
    base = open_base(str(directory), remedy="give the 16-bit model it was made from")
    parameters = [each for layer in filter(None, (base.embedding, base.head)) for each in base.own_parameters_of(layer)]
    names = list(dict.fromkeys(base.stored_name(each) or _missing(each, directory) for each in parameters))
    for entry in (weights.entries[name] for name in names):
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            raise ModelError(f"{entry.name} in {directory} is stored as {entry.dtype}; give the model in 16 or 32 bits")
    for name, parameter in base.skeleton.named_parameters():
        if base.rows in parameter.shape and "embed" in name and base.stored_name(name) not in (None, *names):
            raise ModelError(f"{directory} has a second table by token, {name}; such a model cannot grow here")
    row_bytes = sum(weights.entries[name].n_bytes // base.rows for name in names)
    return EmbeddingMatrices(tuple(names), base.rows, row_bytes, base.is_tied)


def _missing(name: str, directory: Path) -> NoReturn:
    raise ModelError(f"{directory} lacks the tensor {name}; the copy is incomplete, or config.json is another model's")
