"""A tuned model published as its difference to a base, for bases that may not be passed on.

Exact: the bit patterns are subtracted as whole numbers modulo 2^bits, so base + difference is the tuned model bit for
bit, NaN included. Float: tuned - base in the tuned model's numbers, as Alpaca, Vicuna and WizardLM were published;
those are read too. Tensors pass one at a time by name; how either side is cut into files does not matter. The record
that proves who is who is in `weight_record`, the sums are in `weight_arithmetic`. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from onecard.console import few
from onecard.errors import ModelError
from onecard.export.io.base import read_config, refuse_quantized
from onecard.export.io.left_out import IN_A_LAYER, TABLES
from onecard.export.io.output import progress
from onecard.export.io.weights import ShardWriter, TensorEntry, Weights, copy_small_files, open_weights
from onecard.export.weight_diff.arithmetic import (
    NewRows,
    add_bits,
    add_floats,
    fit_rows,
    subtract_bits,
    subtract_floats,
)
from onecard.export.weight_diff.record import (
    RECORD,
    DiffRecord,
    TensorRecord,
    check_base,
    known_of,
    read_record,
    write_record,
)
from onecard.model.files import read_json

Mode = Literal["exact", "float"]
ROTARY_BUFFER = "rotary_emb.inv_freq"  # computed by every program that loads the model; old diffs hold its difference


@dataclass(frozen=True)
class WeightDiff:
    """A difference directory, opened. `record` is None for one that another program made."""

    weights: Weights
    record: DiffRecord | None
    new_rows: NewRows = "zeros"

    @property
    def mode(self) -> str:
        return self.record.mode if self.record else "float"


def make(
    base_path: Path, tuned_path: Path, directory: Path, mode: Mode, max_shard_bytes: int, base_name: str = ""
) -> list[str]:
    """Write the difference of two models into the existing empty `directory`; returns what was done, line by line.

    `base_name` tells who has only the difference what to look for. RAM: one output shard and
    three tensors. The result is opened again, the tuned model recovered from it in memory and compared. Raises
    ModelError: models that do not belong together, a float difference that is not finite.
    """
    base, tuned = open_weights(base_path), open_weights(tuned_path)
    _check_relatives(base, tuned)
    _check_layers(base, tuned)
    if mode == "float":
        _check_plain(base_path, tuned_path)
    record = DiffRecord(mode, base_name or base_path.name, {}, {}, {})
    writer = ShardWriter(directory, max_shard_bytes)
    with progress("subtracting", len(tuned.entries)) as moved:
        for name, tensor in tuned:
            difference = _subtract(name, tensor, base, record)
            if difference is not None:
                writer.add(name, difference)
            moved(1)
    base.close()
    if all(kind == "same" for kind in record.kinds.values()):
        lost = [name for name in base.entries if name not in record.tuned]
        less = f", but for {few(lost)} of the {len(base.entries)}, which it lacks," if lost else ""
        raise ModelError(f"{tuned_path} equals {base_path} in every tensor{less}; there is nothing to publish")
    writer.finish()
    copied = _copy_files(tuned_path, directory)
    write_record(directory, record)
    proven = _compare(base, open_difference(directory), None)
    return [
        *_story(record, base),
        f"copied with it: {', '.join(copied) or 'nothing'}",
        *(f"opened again: {line}" for line in proven),
    ]


def recover(
    base_path: Path, diff_path: Path, directory: Path, max_shard_bytes: int, new_rows: NewRows = "zeros"
) -> list[str]:
    """Write the tuned model, base + difference, into the existing empty `directory`; returns what was done.

    `new_rows`: what stands below the base's rows where a difference without a record has more of them: zeros as in
    Vicuna, or their mean as in Alpaca and WizardLM. RAM: one output shard and three tensors. Raises ModelError: another
    base (before anything is written), tensors without a counterpart, a result that is not the recorded one.
    """
    base, difference = open_weights(base_path), open_difference(diff_path, new_rows)
    remarks = check_before(base, difference)
    writer = ShardWriter(directory, max_shard_bytes)
    known: dict[str, TensorRecord] = {}
    with progress("adding", len(names_of(difference))) as moved:
        for name, tensor in recovered(base, difference):
            known[name] = known_of(tensor)
            _check_result(name, known[name], tensor, difference)
            writer.add(name, tensor)
            moved(1)
    files = writer.finish()
    _copy_files(diff_path, directory)
    written = open_weights(directory)
    wrong = [name for name, tensor in written if known.pop(name, None) != known_of(tensor)] + list(known)
    if wrong:
        raise ModelError(f"{directory}: {few(wrong)} not written as computed; the disk may be failing")
    proof = _proof(difference)
    return [*remarks, f"{len(written.entries)} tensors in {len(files)} file(s), opened again: {proof}"]


def verify(base_path: Path, diff_path: Path, tuned_path: Path | None = None, new_rows: NewRows = "zeros") -> list[str]:
    """Recover in memory, tensor by tensor, and compare with the record and, where given, with the tuned model.

    Raises ModelError for every disagreement. A float difference without a record may differ from the tuned model by
    the rounding of one subtraction and one addition.
    """
    base, difference = open_weights(base_path), open_difference(diff_path, new_rows)
    if difference.record is None and tuned_path is None:
        raise ModelError(f"{diff_path} has no {RECORD} to compare with; give --tuned_path")
    remarks = check_before(base, difference)
    return remarks + _compare(base, difference, open_weights(tuned_path) if tuned_path else None)


def _compare(base: Weights, difference: WeightDiff, tuned: Weights | None) -> list[str]:
    """Base + difference against the record, and against `tuned`; what that proved, in words."""
    names = names_of(difference)
    if tuned is not None and set(names) != set(_without_buffers(tuned.entries)):
        odd = sorted(set(names) ^ set(_without_buffers(tuned.entries)))
        raise ModelError(
            f"{tuned.directory} and {difference.weights.directory} do not hold the same tensors: {few(odd)}"
        )
    largest = 0.0
    with progress("verifying", len(names)) as moved:
        for name, tensor in recovered(base, difference):
            _check_result(name, known_of(tensor), tensor, difference)
            if tuned is not None:
                largest = max(largest, _deviation(name, tensor, tuned.read(name), difference))
            moved(1)
    lines = []
    if difference.record is not None:
        lines.append(f"base + difference, {len(names)} tensors: {_proof(difference)}")
    if tuned is not None:
        how = "bit for bit" if largest == 0.0 else f"within rounding: the largest difference is {largest:.3g}"
        lines.append(f"base + difference equals {tuned.directory} in {len(names)} tensors {how}")
    return lines


def open_difference(path: Path, new_rows: NewRows = "zeros") -> WeightDiff:
    """Open a difference directory. Raises ModelError when it is none, or its record and tensors disagree."""
    weights, record = open_weights(path), read_record(path)
    if record is None:
        whole = [name for name, entry in weights.entries.items() if entry.dtype in (torch.int16, torch.int32)]
        if len(whole) > len(weights.entries) / 2:
            raise ModelError(f"{path} holds an exact difference, but its {RECORD} is missing; copy it again")
        return WeightDiff(weights, None, new_rows)
    odd = sorted(record.stored ^ weights.entries.keys())
    if odd:
        raise ModelError(f"{path} and its {RECORD} disagree: {few(odd)}; copy it again")
    return WeightDiff(weights, record)


def names_of(difference: WeightDiff) -> list[str]:
    """The tensors of the tuned model, in the order of the difference's files; unchanged ones last."""
    stored = _without_buffers(difference.weights.entries) if difference.record is None else difference.weights.entries
    same = (
        [] if difference.record is None else [n for n in difference.record.tuned if n not in difference.weights.entries]
    )
    return [*stored, *same]


def check_before(base: Weights, difference: WeightDiff) -> list[str]:
    """Refuse a base that is not the recorded one, or that cannot be; returns remarks for the reader.

    Raises ModelError with the first tensors that differ. Reads the base once; writes nothing.
    """
    if difference.record is not None:
        check_base(base, difference.record)
        return [f"the base is the recorded one: {len(difference.record.base)} tensors compared by SHA-256"]
    place, names = difference.weights.directory, names_of(difference)
    _check_layers(base, difference.weights)
    lines = [f"{place} has no {RECORD} (another program made it), so the base could not be told from another"]
    for name in names:
        entry = difference.weights.entries[name]
        if name not in base.entries:
            raise ModelError(f"{base.directory} has no tensor {name}, which {place} holds; it is another base")
        fits = _same_but_rows(entry, base.entries[name])
        if not fits:
            raise ModelError(
                f"{base.directory}: {name} is {base.entries[name].shape}, in {place} it is {entry.shape}; another base"
            )
        if entry.shape != base.entries[name].shape:
            n_rows = entry.shape[0] - base.entries[name].shape[0]
            lines.append(f"{name} has {n_rows:+d} rows; base rows that are lacking count as {difference.new_rows}")
    kinds = {(base.entries[name].dtype, difference.weights.entries[name].dtype) for name in names}
    lines += [
        f"base in {one}, difference in {other}: added in fp32, rounded to the latter"
        for one, other in kinds
        if one != other
    ]
    only_base = [name for name in base.entries if name not in difference.weights.entries]
    if only_base:
        lines.append(f"only in the base, not in the result: {few(only_base)}")
    return lines


def recovered(base: Weights, difference: WeightDiff) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the tuned model by name: base plus difference."""
    for name in names_of(difference):
        yield name, _add(name, base, difference)
    base.close()
    difference.weights.close()


def _subtract(name: str, tensor: Tensor, base: Weights, record: DiffRecord) -> Tensor | None:
    """What is stored of one tuned tensor, noted in the record; None where it equals the base's."""
    record.tuned[name] = known_of(tensor)
    other = base.read(name) if name in base.entries else None
    if other is None or not _same_but_rows(tensor, other) or not _comparable(tensor, other, record.mode):
        record.kinds[name] = "whole"
        return tensor
    record.base[name] = known_of(other)
    if record.mode == "exact" and record.base[name] == record.tuned[name]:
        record.kinds[name] = "same"
        return None
    record.kinds[name] = "difference"
    if tensor.ndim:
        other = fit_rows(other, tensor.shape[0])
    if record.mode == "exact" or not tensor.is_floating_point():
        return subtract_bits(tensor, other.to(tensor.dtype))
    difference = subtract_floats(tensor, other)
    if not torch.isfinite(difference).all():
        raise ModelError(f"{name}: tuned - base is not finite in {tensor.dtype}; use --mode exact, or mend the model")
    # What base + difference gives is what is promised: rounding can make it differ from the tuned tensor.
    record.tuned[name] = known_of(add_floats(other, difference))
    return difference


def _add(name: str, base: Weights, difference: WeightDiff) -> Tensor:
    record = difference.record
    kind = record.kinds[name] if record else "difference"
    if kind == "same":
        return base.read(name)
    stored = difference.weights.read(name)
    if kind == "whole" or stored.dtype == torch.bool:
        return stored
    other = base.read(name)
    if stored.ndim:
        other = fit_rows(other, stored.shape[0], difference.new_rows)
    if record is not None and (record.mode == "exact" or not stored.is_floating_point()):
        dtype = record.tuned[name].torch_dtype
        return add_bits(other.to(dtype), stored, dtype)
    return add_floats(other, stored) if stored.is_floating_point() else other.to(stored.dtype) + stored


def _check_result(name: str, known: TensorRecord, tensor: Tensor, difference: WeightDiff) -> None:
    place = difference.weights.directory
    if difference.record is not None:
        if known != difference.record.tuned[name]:
            raise ModelError(f"{place}: base + difference is not the recorded {name}; the difference is damaged")
    elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ModelError(f"{place}: base + difference is NaN or infinite in {name}; one of the two is damaged")


def _deviation(name: str, tensor: Tensor, tuned: Tensor, difference: WeightDiff) -> float:
    """The largest difference to the tuned model's tensor; more than rounding explains is a ModelError."""
    if known_of(tensor) == known_of(tuned):
        return 0.0
    same_kind = tensor.shape == tuned.shape and tensor.dtype == tuned.dtype
    if difference.mode == "exact" or not same_kind or not tensor.is_floating_point():
        raise ModelError(f"base + difference is not the tuned model's {name}")
    apart = float((tensor.double() - tuned.double()).abs().max())
    # One rounding of the difference and one of the sum, each at most half a step at the size of the largest number.
    stored = difference.weights.read(name)
    largest = max(float(t.double().abs().max()) for t in (tensor, tuned, stored))
    if not apart <= torch.finfo(tensor.dtype).eps * largest:
        raise ModelError(f"base + difference is not the tuned model's {name}: they are up to {apart:.3g} apart")
    return apart


def _check_relatives(base: Weights, tuned: Weights) -> None:
    """Two models of which less than half can be compared, or whose layers differ in shape, are no base and offspring.

    More tokens change the rows of embeddings and head, which belong to no numbered layer.
    """
    layers = [name for name in tuned.entries if name in base.entries and IN_A_LAYER.search(name)]
    reshaped = next((name for name in layers if tuned.entries[name].shape != base.entries[name].shape), None)
    if reshaped:
        raise ModelError(
            f"{tuned.directory} is not made from {base.directory}: {reshaped} is {tuned.entries[reshaped].shape} in the"
            f" one, {base.entries[reshaped].shape} in the other; give the base that it was tuned from"
        )
    related = [e for name, e in tuned.entries.items() if name in base.entries and _same_but_rows(e, base.entries[name])]
    if 2 * sum(entry.n_bytes for entry in related) < tuned.total_bytes:
        odd = next(name for name, entry in tuned.entries.items() if entry not in related)
        there = base.entries[odd].shape if odd in base.entries else "not there"
        raise ModelError(
            f"{tuned.directory} is not made from {base.directory}: {len(related)} of {len(tuned.entries)} tensors have "
            f"a counterpart; the shape of {odd} is {tuned.entries[odd].shape} in the one, {there} in the other"
        )


def _check_layers(base: Weights, tuned: Weights) -> None:
    """Raise ModelError where a numbered layer has lost tensors that the base has, and config.json still counts it."""
    config = read_json(tuned.directory / "config.json") if (tuned.directory / "config.json").is_file() else {}
    n_layers = config.get("num_hidden_layers", config.get("n_layer", float("inf")))
    lost = [
        name for name in base.entries
        if name not in tuned.entries and not name.endswith(TABLES)
        and (found := IN_A_LAYER.search(name)) and int(found[1]) < n_layers
    ]  # fmt: skip
    if lost:
        raise ModelError(
            f"{tuned.directory} lacks {len(lost)} tensors of layers that {base.directory} has, such as {few(lost)}; "
            "copy it again. Where layers were taken out on purpose, its config.json has to say how many are left "
            "(num_hidden_layers)"
        )


def _check_plain(*paths: Path) -> None:
    for path in paths:
        if (path / "config.json").is_file():
            refuse_quantized(path, read_config(path), "packed numbers have no float difference; use --mode exact")


def _story(record: DiffRecord, base: Weights) -> list[str]:
    by_kind = {kind: [n for n, k in record.kinds.items() if k == kind] for kind in ("difference", "same", "whole")}
    counts = {"difference": "as a difference", "same": "unchanged, not stored", "whole": "whole"}
    differences = [f"{len(names)} {counts[kind]}" for kind, names in by_kind.items() if names]
    lines = [f"{len(record.tuned)} tensors: {', '.join(differences)}"]
    if by_kind["whole"]:
        lines.append(f"without a counterpart in the base, stored whole: {few(by_kind['whole'])}")
    resized = [n for n, known in record.base.items() if known.shape != record.tuned[n].shape]
    if resized:
        lines.append(f"rows added or removed: {few(resized)}")
    only_base = [name for name in base.entries if name not in record.tuned]
    if only_base:
        lines.append(f"only in the base, not in the tuned model: {few(only_base)}")
    return lines


def _proof(difference: WeightDiff) -> str:
    if difference.record is None:
        return "finite, in the shapes of the difference"
    if difference.mode == "float":
        return "SHA-256 of every tensor as recorded (the tuned model, but for the rounding of a float difference)"
    return "SHA-256 of every tensor as recorded: the tuned model, bit for bit"


def _copy_files(source: Path, target: Path) -> list[str]:
    """Copy configuration, tokenizer and the like; a record belongs to the difference alone. Returns the names."""
    copied = copy_small_files(source, target)
    (target / RECORD).unlink(missing_ok=True)
    return [name for name in copied if name != RECORD]


def _without_buffers(entries: dict[str, TensorEntry]) -> list[str]:
    return [name for name in entries if not name.endswith(ROTARY_BUFFER)]


def _same_but_rows(one: TensorEntry | Tensor, other: TensorEntry | Tensor) -> bool:
    return len(one.shape) == len(other.shape) and one.shape[1:] == other.shape[1:]


def _comparable(tensor: Tensor, base: Tensor, mode: str) -> bool:
    if mode == "float" and tensor.dtype == torch.bool:
        return False
    return tensor.dtype == base.dtype or (tensor.is_floating_point() and base.is_floating_point())
