"""Where a run starts: what is gone on from, what is refused, and what the three ways to begin mean."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from onecard.config.given_paths import path_problems
from onecard.data import batches
from onecard.errors import CheckpointError, ConfigError, ModelError
from onecard.manifest import seal
from onecard.recipes import finetune
from onecard.train.checkpoint import verify
from tests import tiny
from tests.runs import final_checkpoint, run_and_stop


@pytest.fixture(scope="module")
def finished(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that has ended; copy it before changing it."""
    return finetune(tiny.config_for(tiny_base, instructions, tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def test_a_finished_run_given_again_changes_nothing(again: Path, tiny_base: Path, instructions: Path, capsys) -> None:
    before = tiny.tensors_of(again / "adapter_model.safetensors")
    finetune(tiny.config_for(tiny_base, instructions, again))
    assert tiny.same_tensors(before, tiny.tensors_of(again / "adapter_model.safetensors"))
    assert "already done its 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize("final_weights", ["last", "best"])
def test_a_finished_run_given_to_another_directory_ends_there(
    again: Path, tiny_base: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    final_weights: str,
) -> None:  # fmt: skip
    state = state_of(again / "checkpoint-3")
    state["best_step"], state["best_loss"] = 2, 1.0
    (again / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    seal(again / "checkpoint-3")
    options = {"resume_from_checkpoint": str(again), "final_weights": final_weights}
    other = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "other", **options))
    step = 3 if final_weights == "last" else 2
    wanted = tiny.tensors_of(again / f"checkpoint-{step}" / "adapter_model.safetensors")
    assert tiny.same_tensors(wanted, tiny.tensors_of(other / "adapter_model.safetensors"))
    assert not verify(other / "checkpoint-2") and not verify(other / "checkpoint-3")
    shutil.rmtree(again / "checkpoint-2")
    capsys.readouterr()
    third = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "third", **options))
    assert "checkpoint-2, cannot be used" in capsys.readouterr().err
    assert state_of(third)["best_step"] is None
    assert not verify(third)


def test_more_epochs_go_on_with_the_same_run(again: Path, tiny_base: Path, instructions: Path) -> None:
    finetune(tiny.config_for(tiny_base, instructions, again, num_epoch=2))
    assert [step for step, _ in tiny.losses_of(again)] == [1, 2, 3, 4, 5, 6]


def test_none_refuses_to_overwrite_a_run(again: Path, tiny_base: Path, instructions: Path) -> None:
    with pytest.raises(ConfigError, match=r"--resume_from_checkpoint: none, but .* holds checkpoint-3"):
        finetune(tiny.config_for(tiny_base, instructions, again, resume_from_checkpoint="none"))


@pytest.mark.parametrize(
    ("change", "name"),
    [({"lora_r": 4}, "lora: --lora_r 8 -> 4"), ({"bits": 4}, "bits: --bits 32 -> 4"),
     ({"prompt_type": "chatml"}, "template: --prompt_type alpaca -> chatml"),
     ({"train_on": "everything"}, "data: --train_on all -> everything"),
     ({"total_batch": 4}, "batch: --total_batch 8 -> 4"), ({"seed": 1}, "seed: --seed 42 -> 1")],
)  # fmt: skip
def test_another_run_is_refused_with_the_difference(
    change: dict, name: str, again: Path, tiny_base: Path, instructions: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)differs from this command:.*  {name}\n"):
        finetune(tiny.config_for(tiny_base, instructions, again, num_epoch=2, **change))


def test_a_run_keeps_the_split_that_it_began_with(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """5 % was the default before there was a cap: 3 of 60 rows, where 2 would be held out now."""
    monkeypatch.setattr(batches, "MOST_HELD_OUT", 2)
    data = tiny.write_instructions(tmp_path / "data.json", n=60)
    old, new = (tiny.config_for(tiny_base, data, tmp_path / name / "run", test_size=size, max_steps=1)
                for name, size in (("old", 0.05), ("new", "auto")))  # fmt: skip
    for config, held_out in ((old, 3), (new, 2)):
        finetune(config)
        assert f"{60 - held_out} samples to train on, {held_out} to evaluate on" in capsys.readouterr().out
        config.train.max_steps, config.data.test_size = 2, "auto"
        finetune(config)
        printed = capsys.readouterr().out
        assert f"{60 - held_out} samples to train on, {held_out} to evaluate on" in printed
        assert "--test_size auto" not in printed and "--test_size 0.05 ->" not in printed
    new.train.max_steps, new.data.test_size = 3, 0.05
    with pytest.raises(CheckpointError, match=r"batch: --test_size 2 -> 0.05"):
        finetune(new)


def test_a_checkpoint_of_another_kit_leads_to_init_adapter_at_once(
    again: Path, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    """As the Trainer of transformers leaves it: typed, newest of a typed run, or lying in --output_path."""
    theirs = tmp_path / "theirs" / "checkpoint-500"
    shutil.copytree(final_checkpoint(again), theirs)
    (theirs / "manifest.json").unlink()
    state = {"global_step": 500, "log_history": [], "epoch": 1.0, "is_world_process_zero": True}
    (theirs / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    expected = f"start a new run from its weights: --init_adapter {theirs}"
    for typed in (theirs, theirs.parent):
        (problem,) = path_problems({"resume_from_checkpoint": str(typed)})
        assert problem[0] == "--resume_from_checkpoint" and expected in problem[1]
        config = tiny.config_for(tiny_base, instructions, tmp_path / "run-2", resume_from_checkpoint=str(typed))
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            finetune(config)
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        finetune(tiny.config_for(tiny_base, instructions, theirs.parent))
    assert theirs.is_dir(), "it is not set aside"
    finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run-2", init_adapter=str(theirs)))


def test_edited_data_is_refused_unless_asked_for(again: Path, tiny_base: Path, tmp_path: Path) -> None:
    edited = tiny.write_instructions(tmp_path / "edited.json", n=23)
    with pytest.raises(CheckpointError, match=r"--accept_changes data"):
        finetune(tiny.config_for(tiny_base, edited, again, num_epoch=2))
    finetune(tiny.config_for(tiny_base, edited, again, num_epoch=2, accept_changes="data"))
    assert len(tiny.losses_of(again)) == 6


def test_another_base_is_refused(again: Path, instructions: Path, tmp_path: Path) -> None:
    other = tiny.save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=rf"  base: --model_path .* -> {other}\n"):
        finetune(tiny.config_for(other, instructions, again, num_epoch=2))


def test_a_named_checkpoint_of_the_same_run_is_gone_back_to(
    again: Path, tiny_base: Path, instructions: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Once: the same command given again after a stop goes on from what was done since."""
    options = {"resume_from_checkpoint": str(again / "checkpoint-2"), "num_epoch": 2}
    config = tiny.config_for(tiny_base, instructions, again, **options)
    straight = tiny.losses_of(again)
    run_and_stop(config, monkeypatch, after_steps=2)
    assert (again / "checkpoint-3.abandoned").is_dir()
    capsys.readouterr()
    finetune(config)
    assert "checkpoint-4, which came from it" in capsys.readouterr().out
    assert [step for step, _ in tiny.losses_of(again)] == [1, 2, 3, 4, 5, 6]
    assert tiny.losses_of(again)[:2] == straight[:2]


def test_from_data_beginning_keeps_weights_and_optimizer_but_not_the_position(
    finished: Path, tiny_base: Path, tmp_path: Path
) -> None:
    new_data = tiny.write_instructions(tmp_path / "new.json", n=16)
    options = {"resume_from_checkpoint": str(finished / "checkpoint-3"), "from_data_beginning": True}
    run = finetune(tiny.config_for(tiny_base, new_data, tmp_path / "next", **options))
    state = state_of(final_checkpoint(run))
    assert state["step"] == 2
    import torch

    moments = torch.load(final_checkpoint(run) / "optimizer.pt", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in moments.values()} == {5.0}  # 3 old steps and 2 new ones


def test_from_data_beginning_needs_another_run(again: Path, tiny_base: Path, instructions: Path) -> None:
    for typed in ("auto", str(again / "checkpoint-2")):
        config = tiny.config_for(tiny_base, instructions, again, from_data_beginning=True, resume_from_checkpoint=typed)
        with pytest.raises(ConfigError, match="--from_data_beginning: needs"):
            finetune(config)


@pytest.mark.parametrize("flag", ["init_adapter", "lora_remote_checkpoint"])
def test_init_adapter_starts_a_new_run_from_trained_weights(
    flag: str, finished: Path, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", learning_rate=1e-9, **{flag: str(finished)})
    run = finetune(config)
    state = state_of(final_checkpoint(run))
    assert (state["step"], state["best_step"]) == (3, None)
    weights = [tiny.tensors_of(path / "adapter_model.safetensors") for path in (finished, run)]
    assert tiny.largest_difference(*weights) < 1e-6


def test_an_adapter_of_another_base_is_no_start_unless_accepted(
    finished: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base of the same shapes: nothing else would show it."""
    other = tiny.save_tiny_llama(tmp_path / "other", seed=1)
    for flag in ("init_adapter", "lora_remote_checkpoint"):
        config = tiny.config_for(other, instructions, tmp_path / "run", **{flag: str(finished)})
        with pytest.raises(ConfigError, match=rf"(?s)^--{flag}: .*trained on another base.*--accept_changes base"):
            finetune(config)
    config.train.accept_changes = "base"
    finetune(config)
    assert "trained on another base" in capsys.readouterr().err
    # A run of before fingerprints were kept says nothing.
    old = tmp_path / "old"
    shutil.copytree(finished, old, ignore=shutil.ignore_patterns("checkpoint-*", "trainer_state.json"))
    finetune(tiny.config_for(other, instructions, tmp_path / "run-2", init_adapter=str(old)))
    assert "another base" not in capsys.readouterr().err


def test_init_adapter_that_is_not_there_is_named(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such-run"):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", init_adapter=str(tmp_path / "no-such-run")))


def test_the_run_directory_is_complete(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "onecard.yaml",
              "manifest.json", "log.jsonl", "loss.png", "tokenizer.json", "trainer_state.json"}  # fmt: skip
    assert wanted <= names
    wanted = {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json",
              "manifest.json"}  # fmt: skip
    assert wanted <= {path.name for path in (finished / "checkpoint-3").iterdir()}
    assert [path.name for path in sorted(finished.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
