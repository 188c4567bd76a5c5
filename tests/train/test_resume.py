"""What a run takes up when it goes on: its learning rate, the adapter it began from, runs of earlier versions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from onecard.config.parsing import parse
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.errors import CheckpointError, ConfigError
from onecard.recipes import finetune
from onecard.train.optim import learning_rate_factor
from onecard.train.resume import changed_options
from onecard.train.state import read_state
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import final_checkpoint, run_and_stop

EARLIER = Path(__file__).parent / "run_of_earlier_version"


def rates_of(run: Path) -> dict[int, float]:
    return {row["step"]: row["learning_rate"] for row in read_log(run) if "loss" in row}


@pytest.fixture(scope="module")
def two_epochs(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps."""
    return finetune(tiny.config_for(tiny_base, instructions, tmp_path_factory.mktemp("two") / "run", num_epoch=2))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_extended_run_has_the_learning_rates_of_the_longer_plan(
    schedule: str, two_epochs: Path, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    run, options = Path(shutil.copytree(two_epochs, tmp_path / "run")), {"num_epoch": 4, "schedule": schedule}
    finetune(tiny.config_for(tiny_base, instructions, run, **options, keep_checkpoints=9))
    fresh = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "fresh" / "run", **options))
    extended, planned = rates_of(run), rates_of(fresh)
    assert list(extended) == list(planned) == list(range(1, 13))
    assert {step: extended[step] for step in range(7, 13)} == {step: planned[step] for step in range(7, 13)}
    assert extended[7] > 0.003
    weights = [tiny.tensors_of(run / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (6, 7)]
    assert tiny.largest_difference(*weights) > 1e-3, "step 7 learned nothing"


def test_a_run_cannot_end_before_the_steps_that_it_has_done(
    two_epochs: Path, tiny_base: Path, instructions: Path
) -> None:
    for flag, options in (("num_epoch", {"num_epoch": 1}), ("max_steps", {"num_epoch": 2, "max_steps": 4})):
        with pytest.raises(ConfigError, match=rf"--{flag}: it asks for \d steps, but .*checkpoint-6 has done 6"):
            finetune(tiny.config_for(tiny_base, instructions, two_epochs, **options))
    assert yaml.safe_load((two_epochs / "onecard.yaml").read_text())["num_epoch"] == 2


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_another_loraplus_ratio_is_used_and_none_is_refused(
    optimizer: str, tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"loraplus_ratio": 16.0, "learning_rate": 1e-4, "optimizer": optimizer}
    run_and_stop(tiny.config_for(tiny_base, instructions, tmp_path / "run", **options), monkeypatch, after_steps=1)
    with pytest.raises(ConfigError, match=r"--loraplus_ratio: 0 cannot go on .* began with LoRA\+"):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **{**options, "loraplus_ratio": 0.0}))
    finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **{**options, "loraplus_ratio": 4.0}))
    groups = torch.load(final_checkpoint(tmp_path / "run") / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["initial_lr"] for group in groups] == pytest.approx([1e-4, 4e-4])
    assert groups[1]["lr"] == pytest.approx(4 * groups[0]["lr"])


def test_a_run_from_an_adapter_goes_on_without_its_flag_and_not_from_another(
    two_epochs: Path, tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rank is that of the adapter (8), whatever --lora_r says."""
    moved = Path(shutil.copytree(two_epochs, tmp_path / "adapter"))
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", init_adapter=str(moved), lora_r=4)
    run_and_stop(config, monkeypatch, after_steps=1)
    with pytest.raises(ConfigError, match=r"--lora_remote_checkpoint: .* this run began from .*adapter"):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", lora_r=4,
                                 lora_remote_checkpoint=str(two_epochs)))  # fmt: skip
    finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", lora_r=4))
    assert [step for step, _ in tiny.losses_of(tmp_path / "run")] == [1, 2, 3]
    assert yaml.safe_load((tmp_path / "run" / "onecard.yaml").read_text())["init_adapter"] == str(moved)


def test_a_path_that_an_earlier_version_stored_with_a_tilde_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    config = parse(FinetuneConfig, ["--init_adapter=~/mine", "--data_path=~/rows.json"], opens_files=False)
    assert config.train.init_adapter == str(tmp_path / "mine")
    then = {"init_adapter": "~/mine", "data_path": "~/others.json"}
    assert changed_options(then, config) == [f"--data_path ~/others.json -> {tmp_path / 'rows.json'}"]


def test_a_new_run_from_old_weights_is_resumed_at_its_own_step(
    two_epochs: Path, tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, the same command does not begin its data once more."""
    options = {"resume_from_checkpoint": str(two_epochs / "checkpoint-6"), "from_data_beginning": True}
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **options)
    run_and_stop(config, monkeypatch, after_steps=2)
    assert final_checkpoint(tmp_path / "run").name == "checkpoint-2"
    finetune(config)
    assert [step for step, _ in tiny.losses_of(tmp_path / "run")] == [1, 2, 3]
    moments = torch.load(final_checkpoint(tmp_path / "run") / "optimizer.pt", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in moments.values()} == {9.0}, "six old steps and three new ones"


@pytest.mark.parametrize("by", ["the defaults", "its onecard.yaml"])
def test_a_run_of_an_earlier_version_goes_on(by: str, tmp_path: Path) -> None:
    """Its checkpoint has a scheduler.pt, its options none that came later, and batches of 32 that nobody typed."""
    run = Path(shutil.copytree(EARLIER, tmp_path / "run"))
    # What the ids of a sample are may change between versions; that is another matter.
    words = ["--data_path", str(tiny.write_instructions(tmp_path / "data.json", n=72)), "--output_path", str(run),
             "--cache_path", str(tmp_path / "cache"), "--accept_changes", "data,template"]  # fmt: skip
    typed = {"device": "cpu", "bits": 32, "lora_r": 1, "lora_target_modules": "k_proj", "learning_rate": 1e-2,
             "num_epoch": 2, "log_steps": 1, "test_size": 4, "prompt_type": "alpaca"}  # fmt: skip
    words += (
        ["--config", str(run / "onecard.yaml"), "--model_path", FinetuneConfig().model.model_path]
        if (by == "its onecard.yaml")
        else [f"--{name}={value}" for name, value in typed.items()]
    )
    finetune(parse(FinetuneConfig, words))
    rates, options = rates_of(run), TrainOptions()
    assert list(rates) == [1, 2, 3, 4, 5, 6]
    assert rates == pytest.approx({step: 1e-2 * learning_rate_factor(options, step - 1, 6) for step in rates})
    state = read_state(final_checkpoint(run))
    assert (state.step, state.identity["batch"]["total_batch"]) == (6, 32)
    assert yaml.safe_load((run / "onecard.yaml").read_text(encoding="utf-8"))["total_batch"] == 32


def test_a_run_on_a_txt_goes_on_with_the_texts_that_it_had(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Versions that knew no --txt_split made one text of all lines without a blank one between them."""
    data, run = tmp_path / "data.txt", tmp_path / "run"
    data.write_text("\n".join(f"line {number} of one text" for number in range(60)), encoding="utf-8")
    settings = {"prompt_type": "none", "total_batch": 1, "max_steps": 3, "cutoff_len": 32}
    run_and_stop(tiny.config_for(tiny_base, data, run, txt_split="uncut", **settings), monkeypatch, after_steps=1)
    stored = yaml.safe_load((run / "onecard.yaml").read_text(encoding="utf-8"))
    old = {name: value for name, value in stored.items() if name not in ("txt_split", "columns")}
    (run / "onecard.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    capsys.readouterr()
    finetune(tiny.config_for(tiny_base, data, run, **settings))
    assert "1 of 1 records are usable" in capsys.readouterr().out
    assert [step for step, _ in tiny.losses_of(run)] == [1, 2, 3]
    assert yaml.safe_load((run / "onecard.yaml").read_text(encoding="utf-8"))["txt_split"] == "uncut"
    with pytest.raises(CheckpointError, match="--txt_split uncut -> line"):
        finetune(tiny.config_for(tiny_base, data, run, txt_split="line", **settings))
    finetune(tiny.config_for(tiny_base, data, tmp_path / "new", **settings))
    assert "60 of 60 records are usable" in capsys.readouterr().out


def test_an_unfinished_run_without_a_checkpoint_is_reported(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run")
    finetune(config)
    assert "without a checkpoint" not in capsys.readouterr().err
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    finetune(config)
    assert "holds the result of a finished run but no checkpoint" in capsys.readouterr().err
    for path in (tmp_path / "run").glob("*adapter*"):
        path.unlink()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    finetune(config)
    assert "an earlier start ended at step 3 or later without a checkpoint" in capsys.readouterr().err
