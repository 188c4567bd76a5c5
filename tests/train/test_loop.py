"""The loop's rarer branches: evaluation, the best checkpoint, a loss that is not finite, steps left out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard.config.problems import problems_of, refuse
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError, OneCardError
from onecard.recipes import finetune
from onecard.train import checkpoint, loop, validation
from onecard.train.checkpoint import CheckpointStore, verify
from onecard.train.loop import total_steps
from onecard.train.state import read_state
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import assert_same_end, final_checkpoint, run_and_stop


@pytest.mark.parametrize(
    ("options", "n", "expected"),
    [({"num_epoch": 3}, 10, 9), ({"num_epoch": 0.5}, 10, 2), ({"num_epoch": 3, "max_steps": 4}, 10, 4),
     ({"num_epoch": 1, "max_steps": 50}, 10, 3), ({"num_epoch": 0, "max_steps": 50}, 10, 50)],
)  # fmt: skip
def test_total_steps(options: dict, n: int, expected: int) -> None:
    assert total_steps(TrainOptions(total_batch=4, **options), n) == expected


def test_evaluation_finds_and_keeps_the_best_checkpoint(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """The rate is so high that the loss falls first and rises later: the best step is in the middle."""
    config = tiny.config_for(
        tiny_base, instructions, tmp_path / "run", total_batch=4, num_epoch=6, test_size=4, eval_steps=3,
        save_steps=100, learning_rate=0.03, schedule="constant", final_weights="best",
    )  # fmt: skip
    run = finetune(config)
    evaluations = {row["step"]: row["eval_loss"] for row in read_log(run) if "eval_loss" in row}
    assert sorted(evaluations) == list(range(3, 31, 3))
    best = min(evaluations, key=lambda step: evaluations[step])
    assert (run / f"checkpoint-{best}").is_dir()
    state = json.loads((run / "checkpoint-30" / "trainer_state.json").read_text())
    assert (state["best_step"], state["best_loss"]) == (best, evaluations[best])
    published = tiny.tensors_of(run / "adapter_model.safetensors")
    assert tiny.same_tensors(published, tiny.tensors_of(run / f"checkpoint-{best}" / "adapter_model.safetensors"))


RISING = {"total_batch": 4, "num_epoch": 6, "test_size": 4, "eval_steps": 3, "save_steps": 100, "learning_rate": 0.03,
          "schedule": "constant"}  # fmt: skip


def test_a_run_ends_early_where_the_evaluation_loss_no_longer_falls(
    tiny_base: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two evaluations after the best; killed between them, given again after its end, and given more patience."""

    def config(output: str, **changes: Any) -> FinetuneConfig:
        return tiny.config_for(tiny_base, instructions, tmp_path / output, **RISING | changes)

    whole = finetune(config("run", early_stopping_patience=2))
    state = read_state(whole)
    assert state.best_step is not None and state.step == state.best_step + 6 < state.total_steps == 30
    assert "2 evaluations in a row found no lower loss" in capsys.readouterr().out
    assert read_state(finetune(config("run", early_stopping_patience=2))).step == state.step
    run_and_stop(config("cut", early_stopping_patience=2), monkeypatch, after_steps=state.best_step + 4)
    assert_same_end(whole, finetune(config("cut", early_stopping_patience=2)))
    assert read_state(finetune(config("run", early_stopping_patience=3))).step > state.step


@pytest.mark.slow
def test_balanced_weights_have_the_lowest_sum_of_loss_and_forgetting(
    tiny_base: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is forgotten grows while the loss still falls, so the balanced step comes before the best one.

    A base of random weights has little to forget, so what is measured counts 20 times.
    """
    real = validation.measure_forgetting

    def measured(*arguments: Any) -> Any:
        found = real(*arguments)
        assert found is not None
        return replace(found, kl=20 * found.kl)

    monkeypatch.setattr(validation, "measure_forgetting", measured)

    def config(output: str, **changes: Any) -> FinetuneConfig:
        options = RISING | {"final_weights": "balanced", **changes}
        return tiny.config_for(tiny_base, instructions, tmp_path / output, **options)

    whole = finetune(config("whole"))
    rows = [row for row in read_log(whole) if "eval_loss" in row]
    sums = {row["step"]: row["eval_loss"] + row["forgetting"] for row in rows}
    balanced, state = min(sums, key=lambda step: sums[step]), read_state(final_checkpoint(whole))
    assert (state.balanced_step, state.balanced_sum) == (balanced, sums[balanced]) and len(sums) == 10
    assert balanced < state.best_step < 30, "else this shows nothing"
    chosen = next(row for row in rows if row["step"] == balanced)
    assert not any(row["eval_loss"] < chosen["eval_loss"] and row["forgetting"] < chosen["forgetting"] for row in rows)
    for step in (balanced, state.best_step):
        assert (whole / f"checkpoint-{step}").is_dir()
    published = tiny.tensors_of(whole / "adapter_model.safetensors")
    assert tiny.same_tensors(published, tiny.tensors_of(whole / f"checkpoint-{balanced}" / "adapter_model.safetensors"))
    said = capsys.readouterr().out
    assert f"adapter of step {balanced} saved" in said and f"forgetting was lowest: {sums[balanced]:.4f}" in said
    run_and_stop(config("cut"), monkeypatch, after_steps=balanced + 4)
    assert_same_end(whole, finetune(config("cut")))
    moved = finetune(config("moved", resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-30")))
    assert tiny.same_tensors(published, tiny.tensors_of(moved / "adapter_model.safetensors"))
    assert {path.name for path in moved.glob("checkpoint-*")} >= {f"checkpoint-{balanced}", "checkpoint-30"}
    stopped = read_state(final_checkpoint(finetune(config("short", stop_on="balanced", early_stopping_patience=2))))
    assert stopped.step == balanced + 6
    assert "2 evaluations in a row found no lower sum of loss and forgetting" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "flag", "text"),
    [
        ({"final_weights": "balanced", "measure_forgetting": False}, "--final_weights", "--measure_forgetting true"),
        ({"final_weights": "balanced", "objective": "grpo"}, "--final_weights", "which has rewards and no loss"),
        ({"final_weights": "balanced", "lora_init": "pissa"}, "--final_weights", "--lora_init default"),
        ({"final_weights": "even"}, "--final_weights", "'even' is none of last, best, balanced and average:N"),
        ({"stop_on": "balanced"}, "--stop_on", "--early_stopping_patience"),
        ({"stop_on": "balanced", "early_stopping_patience": 2, "peft_method": "full"}, "--stop_on", "use an adapter"),
    ],
)
def test_balanced_is_refused_where_there_is_nothing_to_weigh(
    changes: dict[str, Any], flag: str, text: str, tmp_path: Path
) -> None:
    config = tiny.config_for(tmp_path, tmp_path, tmp_path / "run", **changes)
    assert [problem for problem in problems_of(config) if problem[0] == flag and text in problem[1]]


def test_final_weights_are_the_mean_of_the_newest_checkpoints(
    tiny_base: Path,
    instructions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They stay although two would be enough, and PEFT reads the mean like any adapter."""
    from safetensors.torch import load_file

    changes = {"final_weights": "average:3", "save_steps": 1, "num_epoch": 2}
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **changes))
    assert "adapter of the mean of steps 4, 5, 6 saved" in capsys.readouterr().out
    each = [load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 5, 6)]
    mean = load_file(run / "adapter_model.safetensors")
    assert mean.keys() == each[0].keys() and len(mean) > 10
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, sum(one[name] for one in each) / 3, rtol=1e-6, atol=1e-8)
        assert tensor.dtype == each[0][name].dtype
    assert not verify(run)
    store, seen = CheckpointStore(run), list[str]()
    read = checkpoint.manifest.problems
    spy = SimpleNamespace(problems=lambda path: (seen.append(path.name), read(path))[1])
    monkeypatch.setattr(checkpoint, "manifest", spy)
    (run / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    assert store.newest_steps(2) == [4, 5] and seen == ["checkpoint-6", "checkpoint-5", "checkpoint-4"]
    assert store.newest_steps(0) == [] and len(seen) == 3, "whoever wants none reads none"
    with pytest.raises(ConfigError, match="none of last, best, balanced and average:N of 2 or more"):
        refuse(TrainOptions(final_weights="average:1").problems())


def test_evaluation_loss_is_per_token_and_leaves_training_mode_on(tiny_base: Path, instructions: Path) -> None:
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    from onecard.data.chat_template import load_template
    from onecard.data.dataset import encode_dataset
    from onecard.data.encode import IGNORE_INDEX, EncodeSettings
    from onecard.model.load import load_tokenizer
    from onecard.objectives.registry import objective_named
    from onecard.train.evaluate import Evaluator
    from onecard.train.oom import MicroBatchLimits

    tokenizer = load_tokenizer(str(tiny_base))
    template = load_template("alpaca", tokenizer)
    data = encode_dataset(str(instructions), template, tokenizer, EncodeSettings(256), instructions.parent)
    samples = [data[i] for i in range(7)]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).train()
    losses, n_of_samples = [], []
    for sample in samples:
        logits = model(torch.tensor([sample.input_ids])).logits[0, :-1].detach()
        labels = torch.tensor(sample.labels[1:])
        losses.append(
            float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
        )
        n_of_samples.append(int((labels != IGNORE_INDEX).sum()))
    loss_sum, n_tokens = sum(losses), sum(n_of_samples)
    sft, limits = objective_named("sft"), MicroBatchLimits(micro_batch=3)
    evaluator = Evaluator(model, Accelerator(cpu=True), limits)
    assert evaluator.sums(sft, samples).tolist() == pytest.approx([loss_sum, n_tokens], rel=1e-5)
    for chunk in (0, 3):
        each = Evaluator(model, Accelerator(cpu=True), replace(limits, loss_chunk=chunk)).sample_sums(sft, samples)
        assert each[:, 1].tolist() == n_of_samples
        assert each[:, 0].tolist() == pytest.approx(losses, rel=1e-5)
    assert model.training


def test_a_poisoned_record_ends_the_run_and_is_named(tiny_base: Path, tmp_path: Path) -> None:
    """One token's embedding is NaN, so exactly the records that hold it give a loss that is not finite."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    token = AutoTokenizer.from_pretrained(base)("法", add_special_tokens=False).input_ids[-1]
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    rows = [{"instruction": f"say {i}", "output": str(i)} for i in range(24)]
    rows[13]["instruction"] = "法"
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    config = tiny.config_for(base, data, tmp_path / "run", total_batch=2, save_steps=100)
    with pytest.raises(OneCardError, match=r"(?s)the loss is nan.*data\.jsonl:14") as raised:
        finetune(config)
    assert raised.value.exit_code == 1
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    done = [step for step, _ in tiny.losses_of(tmp_path / "run")]
    if done:  # the record was not in the very first step
        assert [path.name for path in checkpoints] == [f"checkpoint-{done[-1]}"]
        adapter = tiny.tensors_of(checkpoints[-1] / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter.values())
    assert done, "the poisoned record came first; choose another one, or the test shows nothing"


def test_a_short_last_step_counts_its_own_tokens_only(tiny_base: Path, tmp_path: Path) -> None:
    """5 samples in steps of 4: the second step holds one sample and its loss is that sample's own mean."""
    data = tiny.write_instructions(tmp_path / "data.json", n=5)
    run = finetune(tiny.config_for(tiny_base, data, tmp_path / "run", total_batch=4, log_samples=True))
    assert [len(row["samples"]) for row in read_log(run)] == [4, 1]


def test_endless_overflow_ends_the_run(tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch) -> None:
    """A scaler that leaves out every step learns nothing all night; some steps left out are normal."""
    real_step, n_steps = loop.take_step, 0

    def overflowing(*args, **kwargs):
        nonlocal n_steps
        n_steps += 1
        return dataclasses.replace(real_step(*args, **kwargs), skipped=n_steps != 10)

    monkeypatch.setattr(loop, "take_step", overflowing)
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", total_batch=1, num_epoch=3, save_steps=100)
    with pytest.raises(OneCardError, match=r"step 60: the gradients overflowed fp16 in 50 steps in a row"):
        finetune(config)
