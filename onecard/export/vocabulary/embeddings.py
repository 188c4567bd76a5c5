"""Which tensors of a model have a row for each token: its embeddings, its head, the head's bias.

The model is built by transformers on torch's meta device, where tensors have shapes and no bytes. Knows names and
shapes; does not know what a row should hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onecard.errors import ModelError
from onecard.export.io.base import build_skeleton, read_config, refuse_quantized
from onecard.export.io.left_out import has_own_head
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

    Raises ModelError: no causal language model, quantised weights, missing tensors, mismatched shapes.
    """
    refuse_quantized(directory, read_config(directory), "give the 16-bit model it was made from")
    model = build_skeleton(directory)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted: dict[str, torch.Tensor] = {}
    for module in (embeddings, head):
        if module is not None:
            wanted |= {_name_in(model, p): p for p in module.parameters()}
    is_tied = head is not None and embeddings is not None and head.weight is embeddings.weight
    names: list[str] = []
    for name, parameter in wanted.items():
        stored = _stored_name(name, weights, directory)
        _check_shape(stored, parameter, weights, directory)
        names.append(stored)
    # Some files hold the tied head a second time; left short, it would not load.
    copies = [n for n in weights.entries if is_tied and n.endswith("lm_head.weight") and n not in names]
    is_tied = is_tied and not any(has_own_head(weights, names[0], copy) for copy in copies)
    names += copies
    n_rows = len(next(iter(wanted.values())))
    _check_rest(model, names, n_rows, weights, directory)
    row_bytes = sum(weights.entries[n].n_bytes // n_rows for n in names)
    return EmbeddingMatrices(tuple(names), n_rows, row_bytes, is_tied)


def _name_in(model: Any, parameter: torch.Tensor) -> str:
    return next(name for name, one in model.named_parameters() if one is parameter)


def _stored_name(name: str, weights: Weights, directory: Path) -> str:
    """The same tensor's name in the files; older ones lack or have a prefix such as "model."."""
    if name in weights.entries:
        return name
    end = ".".join(name.split(".")[-2:])
    alike = [other for other in weights.entries if other == end or other.endswith(f".{end}")]
    if len(alike) != 1:
        raise ModelError(
            f"{directory} lacks the tensor {name}; the copy is incomplete, or config.json is another model's"
        )
    return alike[0]


def _check_shape(name: str, parameter: torch.Tensor, weights: Weights, directory: Path) -> None:
    entry = weights.entries[name]
    if entry.shape != tuple(parameter.shape):
        raise ModelError(
            f"mismatched shapes: {name} in {directory} is {list(entry.shape)}, and its config.json calls for "
            f"{list(parameter.shape)}"
        )
    if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
        raise ModelError(f"{name} in {directory} is stored as {entry.dtype}; give the model in 16 or 32 bits")


def _check_rest(model: Any, names: list[str], n_rows: int, weights: Weights, directory: Path) -> None:
    """Refuse what would not load afterwards: tensors missing, or further tables by token (Gemma 3n has such)."""
    for name, parameter in model.named_parameters():
        entry = weights.entries.get(name)
        if entry is None or name in names:
            continue
        if entry.shape != tuple(parameter.shape):
            _check_shape(name, parameter, weights, directory)
        if n_rows in entry.shape and "embed" in name:
            raise ModelError(f"{directory} has a second table by token, {name}; such a model cannot grow here")
