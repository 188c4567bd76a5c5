"""A split keeps groups of duplicates together, has the size that was asked for, and is the same for the same rows."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onecard.config.curation import SplitOptions
from onecard.curation.split import _dealt, split
from onecard.errors import ConfigError, DataError

needs_rensa = pytest.mark.skipif(find_spec("rensa") is None, reason="rensa is not installed (requirements-data.txt)")


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def options_of(source: Path, target: Path, **settings: Any) -> SplitOptions:
    return SplitOptions(data_path=str(source), output_path=str(target), **settings)


def sides(target: Path) -> tuple[list[Any], list[Any]]:
    files = (target / "train.jsonl", target / "validation.jsonl")
    train, validation = ([json.loads(line)["id"] for line in file.read_text("utf-8").splitlines()] for file in files)
    return train, validation


def groups(n: int) -> list[dict[str, Any]]:
    """Rows in groups of 1 to 4 near-duplicates; id is "group/member"."""
    draw = random.Random(5)
    rows = []
    for group in range(n):
        words = [f"w{draw.randrange(10**6)}" for _ in range(80)]
        for member in range(1 + group % 4):
            text = " ".join([*words, f"end{member}"])
            rows.append({"instruction": "Say it", "output": text, "id": f"{group}/{member}"})
    return rows


@needs_rensa
def test_groups_stay_together_in_any_order(tmp_path: Path) -> None:
    rows = groups(80)
    shuffled = random.Random(1).sample(rows, len(rows))
    found = []
    for number, order in enumerate((rows, shuffled)):
        source = written(tmp_path / f"{number}.jsonl", order)
        counts = split(options_of(source, tmp_path / f"out{number}", validation_size=0.2))
        train, validation = sides(tmp_path / f"out{number}")
        assert counts == (160, 40, 0, 60)
        assert sorted([*train, *validation]) == sorted(row["id"] for row in rows)
        assert not {name.split("/")[0] for name in train} & {name.split("/")[0] for name in validation}
        assert train == [row["id"] for row in order if row["id"] in set(train)]  # in the order of the file
        found.append(set(validation))
    assert found[0] == found[1]
    split(options_of(written(tmp_path / "0.jsonl", rows), tmp_path / "other", validation_size=0.2, seed=1))
    assert set(sides(tmp_path / "other")[1]) != found[0]


def test_equal_texts_stay_together_without_the_library(tmp_path: Path) -> None:
    rows = [{"instruction": f"Q{n // 2}", "output": "A", "id": str(n)} for n in range(40)]
    rows.append({"instruction": "Q", "output": "", "id": "unusable"})
    counts = split(
        options_of(written(tmp_path / "rows.jsonl", rows), tmp_path / "out", validation_size=11, near_duplicates=0.0)
    )
    assert counts == (30, 10, 1, 20)  # pairs do not fill an odd number
    train, validation = sides(tmp_path / "out")
    assert {int(name) // 2 for name in train}.isdisjoint(int(name) // 2 for name in validation)
    report = json.loads((tmp_path / "out" / "split.json").read_text(encoding="utf-8"))
    assert (report["n_wanted"], report["n_unusable"]) == (11, 1)
    assert report["unusable"][0].startswith("rows.jsonl:41: ")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "split.json",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_sizes_that_leave_a_side_empty_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl", [{"text": f"text {n}"} for n in range(10)])
    for size in (0.01, 10.0, 11.0):
        with pytest.raises(ConfigError, match="both sides need at least one"):
            split(options_of(source, tmp_path / "out", validation_size=size, near_duplicates=0.0))
    with pytest.raises(DataError, match="1 usable rows are too few"):
        one = written(tmp_path / "one.jsonl", [{"text": "a"}, {"b": 1}])
        split(options_of(one, tmp_path / "out", validation_size=0.5, near_duplicates=0.0))
    assert not (tmp_path / "out").exists()


def test_clusters_are_dealt_by_their_smallest_mark() -> None:
    roots = np.array([0, 1, 0, 3, 3, 3])
    marks = np.array([9, 1, 5, 7, 0, 8], dtype=np.uint64)  # cluster 3 first, then 1, then 0
    assert _dealt(roots, marks, 3).tolist() == [False, False, False, True, True, True]
    assert _dealt(roots, marks, 4).tolist() == [False, True, False, True, True, True]
    assert _dealt(roots, marks, 2).tolist() == [False, True, False, False, False, False]
