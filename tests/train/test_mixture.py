"""A run over several sources with shares: the same after a kill and in two processes, and told source by source."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from onecard.config.training import FinetuneConfig
from onecard.errors import CheckpointError
from onecard.recipes import finetune
from onecard.train.rundir import portable
from onecard.train.state import read_state
from onecard.train.trackers import draw_loss, read_log
from tests import tiny
from tests.launching import finish, launch, torchrun
from tests.runs import assert_same_end, final_checkpoint, run_and_stop

SHARES = ["many:0.25", "few.json:3", "once.json"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three sources of 24, 3 and 6 rows."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "many").mkdir()
    rows = json.loads(tiny.write_instructions(folder / "many" / "rows.json", 33).read_text(encoding="utf-8"))
    for name, some in (("few.json", rows[24:27]), ("once.json", rows[27:]), ("many/rows.json", rows[:24])):
        (folder / name).write_text(json.dumps(some), encoding="utf-8")
    return folder


def config_of(base: Path, sets: Path, run: Path, **changes: object) -> FinetuneConfig:
    """`changes` are options by name; --data_path is the folder of the sources."""
    options = {
        "data": SHARES,
        "data_path": str(sets),
        "test_size": 0,
        "num_epoch": 4,
        "log_steps": 1,
        "log_samples": True,
        "save_steps": 100,
    }
    return tiny.with_options(tiny.config_for(base, sets, run), {**options, **changes})


@pytest.fixture(scope="module")
def straight(tiny_base: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing disturbed."""
    return finetune(config_of(tiny_base, sets, tmp_path_factory.mktemp("straight") / "run"))


def losses_by_source(run: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name.startswith("loss/")} for row in read_log(run) if "loss" in row]


def test_every_epoch_has_its_shares_and_the_log_tells_them(straight: Path) -> None:
    rows = [row for row in read_log(straight) if "loss" in row]
    seen = [record for row in rows for record in row["samples"]]
    per_epoch = 6 + 9 + 6
    assert len(seen) == 4 * per_epoch
    for epoch in range(4):
        of_epoch = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        names = Counter(record.partition(":")[0] for record in of_epoch)
        assert names == {"many/rows.json": 6, "few.json": 9, "once.json": 6}
    # A quarter in each of four epochs: every row of the large one, once.
    assert set(Counter(record for record in seen if record.startswith("many")).values()) == {1}
    last, state = rows[-1], read_state(final_checkpoint(straight))
    counted = {name: last[f"tokens/{name}"] for name in ("many", "few.json", "once.json")}
    assert counted == state.source_tokens and sum(counted.values()) == state.tokens_seen
    assert rows[-1]["epoch"] == 4.0


def test_the_losses_of_the_sources_make_the_loss_of_the_step(straight: Path) -> None:
    """Weighed by what each of them learned in a step; with one source in it, its loss is the step's."""
    rows = [row for row in read_log(straight) if "loss" in row]
    alone = [row for row in rows if len([name for name in row if name.startswith("loss/")]) == 1]
    for row in rows:
        losses = [value for name, value in row.items() if name.startswith("loss/")]
        assert losses and min(losses) - 1e-6 <= row["loss"] <= max(losses) + 1e-6
    for row in alone:
        assert row["loss"] == pytest.approx(next(row[name] for name in row if name.startswith("loss/")), abs=1e-6)


def test_held_out_rows_of_each_source_have_their_loss(tiny_base: Path, sets: Path, tmp_path: Path) -> None:
    changes = {"test_size": 0.4, "max_steps": 2, "eval_steps": 1}
    run = finetune(config_of(tiny_base, sets, tmp_path / "run", **changes))
    rows = [row for row in read_log(run) if "eval_loss" in row]
    assert len(rows) == 2
    for row in rows:
        losses = [row[f"eval_loss/{name}"] for name in ("many", "few.json", "once.json")]
        assert min(losses) < row["eval_loss"] < max(losses)
    whole = finetune(config_of(tiny_base, sets, tmp_path / "whole", **changes, micro_batch=1))
    again = [row["eval_loss"] for row in read_log(whole) if "eval_loss" in row]
    assert again == pytest.approx([row["eval_loss"] for row in rows], rel=1e-4)


def test_loss_png_has_a_line_for_each_source(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    labels: list[str] = []
    real = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *args, **kw: (labels.append(kw.get("label", "")), real(self, *args, **kw))[1]
    )
    assert draw_loss(straight)
    named = [label for label in labels if label]
    assert set(named[2:]) == {"many", "few.json", "once.json"} and len(named) == 5


def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    straight: Path, tiny_base: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_base, sets, tmp_path / "run")
    run_and_stop(config, monkeypatch, after_steps=4)
    finetune(config)
    assert_same_end(straight, tmp_path / "run")
    assert losses_by_source(straight) == losses_by_source(tmp_path / "run")
    assert read_state(final_checkpoint(tmp_path / "run")) == read_state(final_checkpoint(straight))


def test_another_share_is_another_run_and_another_folder_is_not(
    straight: Path, tiny_base: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run_and_stop(config_of(tiny_base, sets, run), monkeypatch, after_steps=2)
    stored = yaml.safe_load((run / "onecard.yaml").read_text(encoding="utf-8"))
    assert stored["data"] == SHARES and stored["data_path"] == str(sets)
    with pytest.raises(CheckpointError, match=r"data: --data many:0\.25 few\.json:3 once\.json -> many:0\.5 "):
        finetune(config_of(tiny_base, sets, run, data=["many:0.5", *SHARES[1:]]))


def test_a_run_keeps_what_its_names_meant(
    tiny_base: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of the folder stay, whatever has the same name here; files here are kept by their whole path."""
    (tmp_path / "few.json").write_text("[]", encoding="utf-8")
    (tmp_path / "mine.json").write_text("[]", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = config_of(tiny_base, sets, tmp_path / "run", data="few.json:3,mine.json:0.5,belle#9")
    assert portable(config).data.data == ["few.json:3", f"{tmp_path / 'mine.json'}:0.5", "belle#9"]


def test_sources_without_shares_are_learned_as_paths_are(tiny_base: Path, sets: Path, tmp_path: Path) -> None:
    """`--data a,b` has the samples of `--data_path a b`, step by step."""
    names = ["few.json", "once.json"]
    both = finetune(config_of(tiny_base, sets, tmp_path / "names", data=names, max_steps=3))
    paths = [str(sets / name) for name in names]
    other = finetune(config_of(tiny_base, sets, tmp_path / "paths", data="", data_path=paths, max_steps=3))
    one, two = ([row["samples"] for row in read_log(run) if "loss" in row] for run in (both, other))
    assert one == two and len(one) == 3
    single = finetune(config_of(tiny_base, sets, tmp_path / "single", data="once.json", max_steps=2))
    plain = finetune(config_of(tiny_base, sets, tmp_path / "plain", data="", data_path=paths[1], max_steps=2))
    assert_same_end(single, plain)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(straight: Path, tiny_base: Path, sets: Path, tmp_path: Path) -> None:
    config = config_of(tiny_base, sets, tmp_path / "run")
    finish(launch(torchrun(2), config, tmp_path / "launch"))
    one, two = losses_by_source(straight), losses_by_source(tmp_path / "run")
    assert len(one) == len(two) > 10
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, abs=2e-3)
    assert (
        read_state(final_checkpoint(tmp_path / "run")).source_tokens
        == read_state(final_checkpoint(straight)).source_tokens
    )
