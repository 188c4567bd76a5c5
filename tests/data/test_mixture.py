"""Several sources at once: what their names mean, how often their records are seen, and that it is a pure function."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from onecard.config.data import DataOptions, DataPortion, data_portions
from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.data.batches import SampleOrder, by_source, epoch_order, split, split_by_source, step_samples
from onecard.data.catalogue import entries as catalogue
from onecard.data.catalogue.place import describe
from onecard.data.mixture import parts_of
from onecard.data.sources import ReadReport, read
from onecard.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalogue.OWN_FILE, str(tmp_path / "none.yaml"))
    monkeypatch.setattr("onecard.data.catalogue.place.collections_folder", lambda: tmp_path / "collections")
    monkeypatch.chdir(tmp_path)


def rows(path: Path, n: int, word: str = "row") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"instruction": f"{word} {i}", "output": f"answer {i}"}) + "\n" for i in range(n))
    path.write_text(text, encoding="utf-8")
    return path


# --- words -----------------------------------------------------------------------------------------------------------


def test_portions_are_names_with_limits_and_amounts(tmp_path: Path) -> None:
    assert data_portions("alpaca-gpt4-zh, belle:0.2,my.jsonl:3,org/set#500:.5") == [
        DataPortion("alpaca-gpt4-zh"), DataPortion("belle", 0, 0.2), DataPortion("my.jsonl", 0, 3.0),
        DataPortion("org/set", 500, 0.5),
    ]  # fmt: skip
    assert data_portions(["a b.json", "c:2"]) == [DataPortion("a b.json"), DataPortion("c", 0, 2.0)]
    assert data_portions(r"C:\data\rows.json:2") == [DataPortion(r"C:\data\rows.json", 0, 2.0)]
    odd = rows(tmp_path / "one,two:3", 1)  # what is there is a file, whatever its name looks like
    assert data_portions(str(odd)) == [DataPortion(str(odd))]


def test_a_long_list_of_names_is_no_name_of_a_file() -> None:
    names = [f"collection-{number}" for number in range(300)]
    assert [portion.name for portion in data_portions(",".join(names))] == names


def test_an_amount_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--data: belle:0 is not between 0 and 10,000"):
        parse(FinetuneConfig, ["--data", "alpaca,belle:0"])


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_name_is_looked_up_in_the_folder_then_here_then_in_the_catalogue_then_on_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    (
        rows(folder / "own.jsonl", 3),
        rows(folder / "alpaca", 1).rename(folder / "alpaca.jsonl"),
        rows(tmp_path / "here.jsonl", 2),
    )
    info = {"alpaca": {"file_name": "alpaca.jsonl"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    parts = parts_of(DataOptions(data_path=str(folder), data="alpaca,own.jsonl:2,here.jsonl,belle,me/rows"))
    assert [part.source.paths for part in parts] == [
        (str(folder / "alpaca.jsonl"),), (str(folder / "own.jsonl"),), ("here.jsonl",), ("QingyiSi/Alpaca-CoT",),
        ("me/rows",),
    ]  # fmt: skip
    assert [part.amount for part in parts] == [1, 2, 1, 1, 1]
    belle = parts[3].source.description
    assert belle is not None and (belle.folder, belle.split) == ("belle_cn", "train")


def test_a_collection_that_was_brought_here_is_read_from_there(tmp_path: Path) -> None:
    rows(tmp_path / "collections" / "belle" / "belle_cn" / "belle.json", 4)
    describe(tmp_path / "collections" / "belle", catalogue.shipped()["belle"].data)
    (part,) = parts_of(DataOptions(data="belle:0.5"))
    assert len(list(read(part.source, report=ReadReport()))) == 4 and part.label == "belle:0.5"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"data": "bele"}, r"--data bele: there is no data set of this name \(did you mean belle\?\)"),
        ({"data": "belle,belle:2"}, "--data names belle twice; belle:2 has each"),
        ({"data": "belle", "data_path": "other.json"}, "--data_path other.json: with --data this is the folder"),
        ({"data": "gone.jsonl"}, "there is no data set of this name"),
    ],
)
def test_a_name_that_means_nothing_is_refused(options: dict, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        parts_of(DataOptions(**options))


def test_a_limit_draws_the_same_records_evenly_from_all_files(tmp_path: Path) -> None:
    rows(tmp_path / "sets" / "a.jsonl", 60), rows(tmp_path / "sets" / "b.jsonl", 40)
    (part,) = parts_of(DataOptions(data="sets#20"))
    taken = [[sample.record for sample in read(part.source, report=ReadReport())] for _ in range(2)]
    files = Counter(record.split(":")[0] for record in taken[0])
    assert taken[0] == taken[1] and len(set(taken[0])) == 20
    assert files["a.jsonl"] == 13 and files["b.jsonl"] == 7
    (more,) = parts_of(DataOptions(data="sets#500"))
    assert len(list(read(more.source, report=ReadReport()))) == 100


# --- shares ----------------------------------------------------------------------------------------------------------


def spec(number: int) -> tuple[np.ndarray, list[float]]:
    """One of 20 random mixtures: the source of each sample, and the amounts."""
    random = np.random.RandomState(number)
    sizes = random.randint(1, 60, random.randint(2, 6))
    amounts = [float(random.choice([0.05, 0.2, 0.5, 1, 1.5, 3, round(random.rand() + 0.01, 2)])) for _ in sizes]
    return np.repeat(np.arange(len(sizes)), sizes), amounts


@pytest.mark.parametrize("number", range(20))
def test_every_epoch_has_the_exact_share_of_each_source(number: int) -> None:
    parts, amounts = spec(number)
    order, sizes = SampleOrder(parts, amounts), np.bincount(parts)
    wanted = [max(1, round(amount * size)) for amount, size in zip(amounts, sizes, strict=True)]
    seen = np.zeros(len(parts), int)
    for epoch in range(7):
        chosen = order.epoch(5, epoch)
        assert np.bincount(parts[chosen], minlength=len(sizes)).tolist() == wanted
        seen += np.bincount(chosen, minlength=len(parts))
        for source in range(len(sizes)):  # none a second time before all have been seen once
            assert np.ptp(seen[parts == source]) <= 1
    n_steps = -(-len(order) // 8)
    steps = [step_samples(step, SampleOrder(parts, amounts), 8, 5) for step in range(2 * n_steps)]
    both = np.concatenate([step.indices for step in steps])
    assert both.tolist() == [*order.epoch(5, 0), *order.epoch(5, 1)] and steps[n_steps].epoch == 1


def test_a_step_depends_on_seed_and_step_alone() -> None:
    parts, amounts = np.repeat([0, 1, 2], [50, 30, 7]), [0.2, 1, 3]
    straight = [step_samples(step, SampleOrder(parts, amounts), 4, 1).indices.tolist() for step in range(60)]
    order = SampleOrder(parts, amounts)
    anyhow = {step: step_samples(step, order, 4, 1).indices.tolist() for step in np.random.permutation(60)}
    assert straight == [anyhow[step] for step in range(60)]
    assert straight != [step_samples(step, order, 4, 2).indices.tolist() for step in range(60)]
    # What a release draws, another one must draw too: runs go on with the version that is installed.
    assert [straight[0], straight[30]] == [[64, 68, 61, 0], [75, 80, 68, 37]]


def test_one_source_is_ordered_as_it_always_was() -> None:
    for step in range(6):
        assert (
            step_samples(step, 10, 4, 3).indices.tolist() == epoch_order(10, 3, step // 3)[step % 3 * 4 :][:4].tolist()
        )


def test_micro_batches_are_cut_by_source() -> None:
    parts = np.array([0, 0, 1, 1, 2])
    cut = by_source([np.array([4, 0, 2]), np.array([1, 1, 3])], parts)
    assert [micro.tolist() for micro in cut] == [[0], [2], [4], [1, 1], [3]]


def test_each_source_is_held_out_of_by_its_share() -> None:
    parts = np.repeat([0, 1, 2], [1000, 100, 100])
    groups = np.arange(1200)
    train, test = split_by_source(groups, parts, [0.1, 1, 2], 0.1, 3)
    assert np.bincount(parts[test]).tolist() == [10, 10, 10] and len(train) + len(test) == 1200
    _, counted = split_by_source(groups, parts, [0.1, 1, 2], 60, 3)
    assert np.bincount(parts[counted]).tolist() == [20, 20, 20]
    _, few = split_by_source(np.arange(4), np.array([0, 0, 0, 1]), [1, 3], 0.01, 3)
    assert few.tolist() and parts[few].max() == 0, "a source of one row keeps it"
    none = split_by_source(groups, parts, [0.1, 1, 2], 0, 3)[1]
    assert none.tolist() == split(groups, 0, 3)[1].tolist() == []
    with pytest.raises(ConfigError, match="none is left to train on"):
        split_by_source(groups, parts, [0.1, 1, 2], 1200, 3)
