"""Rows that are held out have no near-duplicate among the training rows, and a run that goes on splits as it began."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onecard.curation import alike
from onecard.data.batches import split, split_by_source
from onecard.errors import ConfigError
from onecard.recipes import finetune
from onecard.train.state import read_state
from tests import tiny

needs_rensa = pytest.mark.skipif(find_spec("rensa") is None, reason="rensa is not installed (requirements-data.txt)")
MOVED = "with near-duplicates among the training rows were moved to them"
SIZES = [4] * 6 + [1] * 16


def test_clusters_of_one_group_change_nothing() -> None:
    groups, parts = np.repeat(np.arange(60), 2), np.repeat([0, 1], [80, 40])
    for size in (0, 1, 0.2, 7):
        for plain, clustered in (
            (split(groups, size, 3), split(groups, size, 3, np.arange(60))),
            (
                split_by_source(groups, parts, [0.5, 2], size, 3),
                split_by_source(groups, parts, [0.5, 2], size, 3, np.arange(60)),
            ),
        ):
            assert [rows.tolist() for rows in plain] == [rows.tolist() for rows in clustered]


def test_clusters_are_held_out_whole_or_not_at_all() -> None:
    draw = np.random.RandomState(5)
    clusters = np.sort(draw.randint(0, 60, 200))
    clusters = np.array([np.flatnonzero(clusters == each)[0] for each in clusters])
    parts = np.repeat([0, 1], 100)
    n_held_out = np.zeros(200)
    for seed in range(100):
        train, test = split(np.arange(200), 20, seed, clusters)
        assert len(train) + len(test) == 200 and len(test) == 20
        assert not set(clusters[train]) & set(clusters[test])
        n_held_out[test] += 1
        train, test = split_by_source(np.arange(200), parts, [1, 2], 20, seed, clusters)
        assert len(train) + len(test) == 200 and 10 <= len(test) <= 20
        assert not set(clusters[train]) & set(clusters[test])
    large = np.bincount(clusters, minlength=200)[clusters] > 3
    assert n_held_out[large].mean() == pytest.approx(10, abs=1.5), "rows of many have the chance of the others"
    assert not len(split(np.arange(9), 3, 0, np.zeros(9, dtype=int))[1]), "no cluster fits"


def write_groups(path: Path, sizes: list[int] = SIZES, *, equal: bool = False) -> Path:
    """Groups of so many near-duplicates of 40 words, or equal rows; the first word is that of the group."""
    draw, rows = random.Random(1), []
    for group, size in enumerate(sizes):
        words = [f"group{group}", *(f"w{draw.randrange(10**4)}" for _ in range(40))]
        rows += [
            {"instruction": "Say it", "input": "", "output": " ".join([*words, f"end{0 if equal else member}"])}
            for member in range(size)
        ]
    path.write_text(json.dumps(draw.sample(rows, len(rows))), encoding="utf-8")
    return path


def leaks(data: Path, run: Path) -> tuple[int, int]:
    """Held-out rows, and how many of them are of a group with training rows."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    starts = [line for line, text in enumerate(data.read_text(encoding="utf-8").splitlines(), 1) if text]
    assert len(starts) == 1  # one line: records are named by their number in it
    held_out = json.loads((run / "base_comparison.json").read_text(encoding="utf-8"))["records"]
    numbers = {int(record.rpartition("#")[2]) - 1 for record in held_out}
    groups = [row["output"].split()[0] for row in rows]
    learned = {group for number, group in enumerate(groups) if number not in numbers}
    return len(numbers), sum(groups[number] in learned for number in numbers)


def run_of(base: Path, data: Path, run: Path, **changes: Any) -> Path:
    """Runs of one test lie in folders of their own, since each is one step that another goes on from."""
    return finetune(tiny.config_for(base, data, run, **{"test_size": 8, "max_steps": 1, **changes}))


def kept(run: Path) -> Any:
    return read_state(run).identity["batch"].get("near_duplicates")


@needs_rensa
def test_a_run_holds_out_no_near_duplicate_and_goes_on_as_it_began(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, old = write_groups(tmp_path / "data.json"), tmp_path / "run", tmp_path / "old"
    run_of(tiny_base, data, run)
    assert f"{MOVED}; 8 of 8 are held out" in capsys.readouterr().out
    assert leaks(data, run) == (8, 0) and kept(run) == 0.7
    records = json.loads((run / "base_comparison.json").read_text(encoding="utf-8"))["records"]
    run_of(tiny_base, data, run, max_steps=2)
    assert json.loads((run / "base_comparison.json").read_text(encoding="utf-8"))["records"] == records
    with monkeypatch.context() as patch:
        patch.setattr(alike, "likeness", lambda: 0.0)
        with pytest.raises(ConfigError, match=r"--test_size.*rensa"):
            run_of(tiny_base, data, run, max_steps=3)
        # As a run of before there were clusters: its identity has no word of them.
        patch.setattr(alike, "clusters_of_groups", lambda *_: np.arange(100))
        run_of(tiny_base, data, old)
    n_held_out, n_leaks = leaks(data, old)
    assert n_held_out == 8 and n_leaks > 0 and kept(old) is None
    capsys.readouterr()
    run_of(tiny_base, data, old, max_steps=2)
    assert leaks(data, old) == (8, n_leaks) and kept(old) is None and MOVED not in capsys.readouterr().out


def test_equal_texts_are_found_without_rensa(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alike, "likeness", lambda: 0.0)
    data, run = write_groups(tmp_path / "data.json", equal=True), tmp_path / "run"
    run_of(tiny_base, data, run)
    said = capsys.readouterr().out
    assert "only equal texts are kept out of them; pip install -r requirements-data.txt" in said and MOVED in said
    assert leaks(data, run) == (8, 0) and kept(run) == 0
    run_of(tiny_base, data, run, max_steps=2)
    assert leaks(data, run) == (8, 0) and "pip install" not in capsys.readouterr().out


def test_rows_that_are_all_alike_are_held_out_all_the_same(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_groups(tmp_path / "data.json", [40], equal=True)
    run_of(tiny_base, data, tmp_path / "run")
    output = capsys.readouterr()
    assert "the rows are near-duplicates of one another" in output.out + output.err
    assert leaks(data, tmp_path / "run") == (8, 8)


@needs_rensa
def test_clusters_reach_over_sources_and_count_dropped_conversations(tiny_base: Path, tmp_path: Path) -> None:
    from onecard.data.chat_template import load_template
    from onecard.data.encode import Encoder, EncodeSettings
    from onecard.data.joined import encode_parts
    from onecard.data.mixture import parts_of
    from onecard.model.load import load_tokenizer

    texts = [" ".join(f"w{(7 * row + word) % 97}" for word in range(row, row + 30)) for row in range(3)]
    first = [{"instruction": "a", "output": texts[0]}, {"instruction": "a", "output": ""}, {"instruction": "b"}]
    second = [{"instruction": "a", "output": ""}, {"instruction": "a", "output": f"{texts[0]} more"},
              {"instruction": "a", "output": texts[1]}, {"instruction": "a", "output": texts[1]}]  # fmt: skip
    for name, rows in (("one.json", first), ("two.json", second)):
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
    config = tiny.config_for(tiny_base, tmp_path, tmp_path / "run", data=["one.json", "two.json"])
    parts, tokenizer = parts_of(config.data), load_tokenizer(str(tiny_base))
    template = load_template("alpaca", tokenizer)
    dataset = encode_parts(parts, template, tokenizer, EncodeSettings(256), tmp_path / "cache", encoder=Encoder)
    clusters = alike.clusters_of_groups(parts, dataset, Encoder, 0.7)
    assert len(clusters) == dataset.groups.max() + 1
    a, b, c, d = clusters[dataset.groups].tolist()
    assert a == b != c == d
