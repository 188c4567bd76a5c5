"""What of a model an export leaves out: every tensor of the source is in the result, or has a reason, or is an error.

Knows which tensors programs compute themselves or hold twice. Does not know the exports; all of them ask here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from onecard.console import few
from onecard.errors import ModelError
from onecard.export.io.weights import Weights, same_bits

# Tables that older files hold and that every program computes anew; nothing is missed without them.
TABLES = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rope.freqs")
# The two tables of the vocabulary, which may be one: no other tensors that happen to be equal stand for one another.
VOCABULARY = (
    "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight",
    "lm_head.weight", "embed_out.weight", "output_layer.weight", "output.weight",
)  # fmt: skip
IN_A_LAYER = re.compile(r"\.(\d+)\.")


def left_out(
    directory: Path, names: Iterable[str], kept: Collection[str], read: Callable[[str], Tensor], *,
    remedy: str, ignored: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """One line for each reason why some of a model's tensors are not `kept`.

    ignored: patterns of names that transformers does not load for this family, such as layers that predict further
    tokens. Raises ModelError, which ends in `remedy`, for tensors without a reason.
    """
    names = list(names)
    missing = [name for name in names if name not in kept]
    tables = [name for name in missing if name.endswith(TABLES)]
    unloaded = [n for n in missing if n not in tables and any(re.search(pattern, n) for pattern in ignored)]
    lines = [f"left out: {few(tables)}, computed anew by every program"] if tables else []
    if unloaded:
        lines.append(f"left out: {few(unloaded)}, which transformers does not load for this family")
    lost = []
    for name in (name for name in missing if name not in tables and name not in unloaded):
        twin = _twin(name, [other for other in names if other in kept], read)
        lost += [] if twin else [name]
        lines += [f"left out: {name}, the same as {twin} bit for bit"] if twin else []
    if lost:
        raise ModelError(f"{directory} holds {few(sorted(lost))}, which would be lost{remedy}")
    return lines


def _twin(name: str, others: list[str], read: Callable[[str], Tensor]) -> str | None:
    """The other table of the vocabulary where it is the same, as a stored tied head is."""
    tables = [other for other in others if other.endswith(VOCABULARY) and not IN_A_LAYER.search(other)]
    if not name.endswith(VOCABULARY) or IN_A_LAYER.search(name):
        return None
    tensor = read(name)
    return next((other for other in tables if same_bits(tensor, read(other))), None)


def has_own_head(weights: Weights, embedding: str, head: str) -> bool:
    """Whether the files hold both and they differ: then transformers does not tie them, whatever config.json says."""
    entries = weights.entries
    if embedding not in entries or head not in entries:
        return False
    return not same_bits(weights.read(embedding), weights.read(head))


def check_quantised(source: Weights, written: Weights, model: Any) -> list[str]:
    """Compare a quantised copy with its source: every tensor is there, and what is not packed has the same values.

    model: the source's, for the names it goes by; the meta device will do. Returns what `left_out` does, and raises
    ModelError as it does and for a tensor with other values.
    """
    kept = []
    for name, entry in source.entries.items():
        own = _written_name(name, written, f"{model.base_model_prefix}.")
        if own is None:
            continue
        kept.append(name)
        copy = written.entries.get(own)
        is_packed = copy is None or not copy.dtype.is_floating_point or copy.shape != entry.shape
        if not is_packed and not same_bits(source.read(name).to(written.entries[own].dtype), written.read(own)):
            raise ModelError(f"{written.directory}: {own} is not what the source holds; try again")
    source.close()
    written.close()
    return left_out(
        source.directory, source.entries, kept, source.read,
        ignored=getattr(model, "_keys_to_ignore_on_load_unexpected", None) or (),
        remedy=": the quantised model has no place for it; give a model of text alone, whose config.json speaks of it",
    )  # fmt: skip


def _written_name(name: str, written: Weights, prefix: str) -> str | None:
    """The name of a tensor in a quantised copy, with or without the model's prefix; GPTQ calls a packed one qweight."""
    for own in (name, name.removeprefix(prefix), prefix + name):
        packed = f"{own.removesuffix('.weight')}.qweight"
        if own in written.entries or packed in written.entries:
            return own
    return None
