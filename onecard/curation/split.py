"""Split a data set into training and validation so that near-duplicates stay on one side.

The order in which clusters are dealt is a hash of the seed and the texts of a cluster: the same rows are split the
same way in any order and on any machine, and rows that are added later move few others.

Knows rows and clusters. Does not know what makes two rows alike (sketches.py).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onecard.config.curation import SplitOptions
from onecard.console import say
from onecard.curation.rows import read_rows
from onecard.curation.sketches import SKETCH_FILES, Sketches, require_rensa
from onecard.curation.words import texts_of
from onecard.data.sources import ReadReport, Source, source_of
from onecard.errors import ConfigError, DataError
from onecard.export.io.output import new_directory

TRAIN_FILE, VALIDATION_FILE, REPORT_FILE = "train.jsonl", "validation.jsonl", "split.json"
SIZE_FLAG = "--validation_size"
_LINES = "lines"


class SplitCounts(NamedTuple):
    """Rows on each side, rows that no training could use, and clusters of more than one row."""

    n_train: int
    n_validation: int
    n_unusable: int
    n_clusters: int


def split(options: SplitOptions) -> SplitCounts:
    """Write train.jsonl, validation.jsonl and split.json as a new directory.

    Raises ConfigError (rensa is missing, the target, a size that leaves no rows), DataError (nothing to read),
    ModelError (no room).
    """
    if options.near_duplicates:
        require_rensa()
    source, target = source_of(options), Path(options.output_path)
    inputs = [Path(path) for path in source.paths]
    with new_directory(target, overwrite=options.overwrite, inputs=inputs) as partial:
        with Sketches(partial, options.near_duplicates) as sketches:
            marks, bad = _read(source, options.seed, partial, sketches)
            roots = sketches.clusters()
        wanted = _wanted(options.validation_size, len(roots))
        is_validation = _dealt(roots, marks, wanted)
        with (
            (partial / _LINES).open(encoding="utf-8", newline="\n") as lines,
            (partial / TRAIN_FILE).open("w", encoding="utf-8", newline="\n") as train,
            (partial / VALIDATION_FILE).open("w", encoding="utf-8", newline="\n") as validation,
        ):
            for line, here in zip(lines, is_validation, strict=True):
                (validation if here else train).write(line)
        for name in (_LINES, *SKETCH_FILES):
            (partial / name).unlink(missing_ok=True)
        n_validation = int(is_validation.sum())
        n_clusters = int((np.bincount(roots, minlength=1) > 1).sum())
        counts = SplitCounts(len(roots) - n_validation, n_validation, len(bad), n_clusters)
        plain = {**counts._asdict(), "n_wanted": wanted, "seed": options.seed, "unusable": bad[:1000]}
        (partial / REPORT_FILE).write_text(json.dumps(plain, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    _tell(counts, wanted, bad)
    say(f"they are in {target / TRAIN_FILE} and {target / VALIDATION_FILE}")
    return counts


def _read(source: Source, seed: int, partial: Path, sketches: Sketches) -> tuple[np.ndarray, list[str]]:
    """Put the usable rows aside; a number for each, by which clusters are dealt, and what is wrong with the others."""
    marks, bad = [], []
    with (partial / _LINES).open("w", encoding="utf-8", newline="\n") as lines:
        for row in read_rows(source, ReadReport()):
            if row.sample is None:
                bad.append(f"{row.place}: {row.problem}")
                continue
            text = "\n".join(text for _, text in texts_of(row.sample, with_frame=False))
            sketches.add(text)
            digest = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
            marks.append(np.frombuffer(digest, dtype="<u8")[0])
            lines.write(row.line() + "\n")
    if len(marks) < 2:
        shown = "".join(f"\n  {problem}" for problem in bad[:10])
        raise DataError(f"{len(marks)} usable rows are too few to split{shown}", source.name)
    return np.array(marks, dtype=np.uint64), bad


def _wanted(size: float, n_rows: int) -> int:
    wanted = round(size * n_rows) if size < 1 else int(size)
    if not 0 < wanted < n_rows:
        raise ConfigError(SIZE_FLAG, f"{size:g} of {n_rows:,} rows is {wanted:,}: both sides need at least one")
    return wanted


def _dealt(roots: np.ndarray, marks: np.ndarray, wanted: int) -> np.ndarray:
    """Which rows are for validation, shape (rows,): whole clusters by their smallest mark, while they fit."""
    names, which, sizes = np.unique(roots, return_inverse=True, return_counts=True)
    smallest = np.full(len(names), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, which, marks)
    chosen = np.zeros(len(names), dtype=bool)
    left = wanted
    for cluster in np.argsort(smallest, kind="stable"):
        if left == 0:
            break
        if sizes[cluster] <= left:
            chosen[cluster] = True
            left -= int(sizes[cluster])
    return np.asarray(chosen[which])


def _tell(counts: SplitCounts, wanted: int, bad: list[str]) -> None:
    say(
        f"{counts.n_train:,} rows to train on, {counts.n_validation:,} to validate; "
        f"{counts.n_clusters:,} groups of near-duplicates are each on one side"
    )
    if counts.n_validation < wanted:
        say(f"{wanted:,} were wanted: no group was small enough for the rest")
    if bad:
        say(f"{len(bad):,} rows cannot be used and are on neither side:")
        for problem in bad[:10]:
            say(f"  {problem}")
