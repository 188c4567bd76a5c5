"""Each option of `finetune.py --help`, changed alone between two starts: used and told, or refused by its flag.

Never recorded and ignored. An option without a row in the table fails the test.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from onecard.config.parsing import options_of
from onecard.config.training import FinetuneConfig
from onecard.errors import OneCardError
from onecard.model.memory.estimate import GIB
from onecard.recipes import finetune
from onecard.train import asking, intervals, loop
from onecard.train.resume import NOT_OF_THE_RUN
from onecard.train.step_log import QUESTIONS_NAME, read_rows
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import final_checkpoint, run_and_stop

# 20 rows to train on, 5 per step: 4 steps per epoch and 8 in all, of which 6 are done.
RUN = {"total_batch": 5, "micro_batch": 0, "test_size": 4, "num_epoch": 2, "prompt_type": "auto", "keep_checkpoints": 2,
       "eval_steps": 4, "gradient_checkpointing": "auto"}  # fmt: skip
DONE, PLANNED = 6, 8


@dataclass
class Second:
    """What the second start did."""

    output: Path
    run: Any
    printed: str
    control: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for row in read_log(self.output) if row.get("step", 0) > DONE]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows if "loss" in row]

    @property
    def rates(self) -> list[float]:
        """The learning rates as shares of the highest one."""
        return [row["learning_rate"] / self.run.options.learning_rate for row in self.rows if "loss" in row]

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in self.output.glob("checkpoint-*"))

    @property
    def difference(self) -> float:
        """How far the weights are from those of a run that went on unchanged."""
        return tiny.largest_difference(
            *(
                tiny.tensors_of(final_checkpoint(run) / "adapter_model.safetensors")
                for run in (self.output, self.control)
            )
        )


@dataclass
class Row:
    """A new value, and what must come of it; `seen` None: the start is refused."""

    value: Any
    seen: Callable[[Second], bool] | None = None


def used(value: Any, seen: Callable[[Second], bool]) -> Row:
    """It decides the result: the weights differ from those of the unchanged run, and it is seen at work."""
    return Row(value, lambda second: second.difference > 1e-6 and seen(second))


def same(value: Any, seen: Callable[[Second], bool] = lambda second: True) -> Row:
    """It decides memory, speed or what is written, not the result."""
    return Row(value, lambda second: second.difference < 1e-6 and seen(second))


TABLE = {
    "model_path": Row("OTHER_BASE"), "bits": Row(4), "dtype": Row("bf16"), "device": same("auto"),
    "attn_implementation": same("eager", lambda s: s.run.plain_model.config._attn_implementation == "eager"),
    "gradient_checkpointing": same(True, lambda s: s.run.plan.setup.gradient_checkpointing),
    "max_memory": Row("0:1GiB"),  # there is no card 0
    "stream_layers": same("on", lambda s: s.run.plan.setup.stream_layers),
    "rope_scaling": Row("yarn:2"), "trust_remote_code": same(True),
    "columns": same("instruction:instruction"), "txt_split": same("line"),  # the data are no txt
    "data_path": Row("OTHER_DATA"), "data": Row("OTHER_DATA"),
    "prompt_type": Row("chatml"), "dialogue": Row(True), "cutoff_len": Row(40),
    "train_on": Row("everything"), "thinking": same("drop"),  # no answer of the data thinks
    "test_size": Row(5), "strict": same(True),
    "cache_path": same("CACHE", lambda s: bool(list((s.output.parent / "other-cache").glob("*.arrow")))),
    "peft_method": Row("ia3"), "peft_option": Row("lora_bias=true"),
    "lora_r": Row(4), "lora_alpha": Row(8), "lora_dropout": Row(0.5), "lora_target_modules": Row("q_proj"),
    "lora_target_parameters": Row("experts"),  # there are none
    "use_rslora": Row(True), "use_dora": Row(True), "lora_init": Row("pissa"), "train_new_tokens": Row(True),
    "train_embeddings": Row(True),
    # What samples answers is of grpo.
    "reward": Row("exact"), "reward_file": Row("rewards.py"), "reward_seconds": Row(3.0), "rollouts": Row(4),
    "rollout_temperature": Row(0.5), "rollout_max_tokens": Row(32), "rollout_batch": Row(2),
    "grpo_loss": Row("dr_grpo"),
    "grpo_updates": Row(2), "grpo_clip": Row(0.1), "grpo_clip_high": Row(0.3), "kl_beta": Row(0.1),
    "mask_overlong": Row(True), "log_rollouts": Row(True),
    "output_path": Row("OTHER_RUN", lambda s: read_log(s.output)[0]["step"] == 1),
    "stages": Row("stages.yaml"),
    "objective": Row("documents"),
    "packing": same(True, lambda s: s.run.limits.row_tokens == 256),
    "pack_attention": Row("block"),  # of packed rows
    "pref_beta": Row(0.5), "label_smoothing": Row(0.1), "sft_weight": Row(0.5), "simpo_gamma": Row(0.5),  # not of sft
    "desirable_weight": Row(2.0), "undesirable_weight": Row(2.0), "center_rewards": Row(0.01),
    "cache_reference": Row(True), "share_prompt": Row(True),
    "num_epoch": Row(3, lambda s: s.steps == [7, 8, 9, 10, 11, 12]),
    "max_steps": Row(7, lambda s: s.steps == [7]),
    "finish_by": same("23:59", lambda s: s.run.clock.option == "--finish_by 23:59"),
    "max_hours": same(9.0, lambda s: s.run.clock.option == "--max_hours 9"),
    "total_batch": Row(4),
    "micro_batch": same(2, lambda s: s.run.limits.micro_batch == 2),
    "micro_tokens": same(300, lambda s: s.run.limits.micro_tokens == 300),
    "learning_rate": used(2e-3, lambda s: s.rates == pytest.approx([2 / 7, 1 / 7])),
    "optimizer": Row("adamw_8bit"), "loraplus_ratio": Row(16.0),
    "weight_decay": used(0.5, lambda s: [g["weight_decay"] for g in s.run.optimizer.param_groups] == [0.5]),
    "max_grad_norm": used(1e-3, lambda s: s.run.engine.max_grad_norm == 1e-3),
    "schedule": used("constant", lambda s: s.rates == [1, 1]),
    "schedule_options": Row("power:2"),  # linear takes none
    "warmup_ratio": used(0.9, lambda s: s.rates == pytest.approx([7 / 8, 1])),
    "warmup_steps": used(10, lambda s: s.rates == pytest.approx([0.7, 0.8])),
    "neftune_alpha": used(5.0, lambda s: s.run.plain_model.get_input_embeddings().neftune_noise_alpha == 5),
    "seed": Row(7),
    "log_steps": same(8, lambda s: s.steps == [8]),
    "log_samples": same(True, lambda s: len(s.rows[0]["samples"]) == 5),
    "eval_steps": same(1, lambda s: [row["step"] for row in s.rows if "eval_loss" in row] == [7, 8]),
    "early_stopping_patience": same(9, lambda s: s.run.state.evaluations_since_best == 0),
    "stop_on": Row("balanced"),  # of --early_stopping_patience
    "eval_suites": Row("open:missing.jsonl"),
    "ask": same(["Say hello"], lambda s: [row["step"] for row in read_rows(s.output / QUESTIONS_NAME)] == [8]),
    "ask_file": same("QUESTIONS", lambda s: "step 8: 数到 0 -> " in s.printed),
    "compare_with_base": same(False, lambda s: "held-out records" not in s.printed),
    "server_check": same(True, lambda s: (s.output / "server_check.json").is_file()),
    "measure_forgetting": same(False, lambda s: "forgetting is" not in s.printed),
    "kl_anchor": used(0.5, lambda s: s.run.anchor.weight == 0.5 and s.rows[0]["kl_anchor"] > 0),
    "save_steps": same(100, lambda s: s.checkpoints == [6, 8]),
    "eval_minutes": same(1e-9, lambda s: [row["step"] for row in s.rows if "eval_loss" in row] == [7, 8]),
    "save_minutes": same(1e-9, lambda s: s.checkpoints == [7, 8]),
    "keep_checkpoints": same(3, lambda s: s.checkpoints == [6, 7, 8]),
    "final_weights": same("best", lambda s: f"adapter of step {s.run.state.best_step} saved" in s.printed),
    "resume_from_checkpoint": Row("none"), "init_adapter": Row("ADAPTER"), "lora_remote_checkpoint": Row("ADAPTER"),
    "from_data_beginning": Row(True), "accept_changes": same("data"),
    "wandb": Row(True), "wandb_project": same("mine"),
    "tensorboard": same(True, lambda s: (s.output / "tensorboard").is_dir()),
    "deepspeed": Row("zero.json"), "shard": Row(True), "debug": same(True),
    "vram": same(1.0, lambda s: s.run.plan.card.total_bytes == GIB),
    "loss_chunk": same(16, lambda s: s.run.limits.loss_chunk == 16),
    "offload_activations": same("on", lambda s: s.run.offload is not None),
    "offload_embeddings": same("on", lambda s: s.run.plan.setup.offload_embeddings),
    "head_bits": Row("8"),
    "mlp_tile": same(64, lambda s: s.run.limits.mlp_tile == 64),
    "kernels": Row("liger"), "pretend_turing": same(True),
    "rehearsal": same(True, lambda s: "rehearsed 5 x " in s.printed), "ignore_plan": same(True),
}  # fmt: skip


@dataclass
class Bench:
    """Starts of one run of which six steps are done."""

    base: Path
    data: Path
    half: Path
    control: Path

    def config(self, output: Path, **changes: Any) -> FinetuneConfig:
        return tiny.config_for(self.base, self.data, output, **RUN | changes)

    def value(self, row: Row, folder: Path) -> Any:
        """The new value, made where it is a file."""
        make: dict[Any, Callable[[], object]] = {
            "OTHER_BASE": lambda: tiny.save_tiny_llama(folder / "base", seed=1),
            "OTHER_DATA": lambda: tiny.write_instructions(folder / "data.json", n=25),
            "OTHER_RUN": lambda: folder / "new",
            "CACHE": lambda: folder / "other-cache",
            "ADAPTER": lambda: self.control,
            "QUESTIONS": lambda: tiny.write_instructions(folder / "questions.json", n=1),
        }
        return str(make[row.value]()) if isinstance(row.value, str) and row.value in make else row.value


@pytest.fixture(scope="module")
def bench(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("changed")
    bench = Bench(tiny_base, instructions, folder / "half", folder / "control")
    with pytest.MonkeyPatch.context() as patch:
        run_and_stop(bench.config(bench.half), patch, after_steps=DONE)
        shutil.copytree(bench.half, bench.control)
        finetune(bench.config(bench.control))
    return bench


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "WAIT_PER_TIME_TAKEN", 0)
    monkeypatch.setattr(asking, "STANDING_TOKENS", 4)
    monkeypatch.setitem(sys.modules, "wandb", None)


def test_every_option_has_a_row() -> None:
    assert list(TABLE) == list(options_of(FinetuneConfig))


@pytest.mark.parametrize("name", TABLE)
def test_changed_alone_it_is_used_or_refused_by_name(
    name: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row, output, runs = TABLE[name], Path(shutil.copytree(bench.half, tmp_path / "run")), list[Any]()
    value, before = bench.value(row, tmp_path), (output / "onecard.yaml").read_text(encoding="utf-8")
    config = bench.config(output, **{"cache_path": str(bench.half.parent / "cache"), name: value})
    real = loop.train
    monkeypatch.setattr(loop, "train", lambda run, reporter: (runs.append(run), real(run, reporter))[1])
    capsys.readouterr()
    if row.seen is None:
        with pytest.raises(OneCardError, match=rf"--{name}\b") as refused:
            finetune(config)
        assert not runs and refused.value.exit_code in (1, 2)
        assert (output / "onecard.yaml").read_text(encoding="utf-8") == before, "recorded all the same"
        return
    finetune(config)
    where = Path(config.train.output_path)
    second = Second(where, runs[0], "".join(capsys.readouterr()), bench.control)
    assert row.seen(second), (second.difference, second.steps, second.rates, second.checkpoints, second.printed)
    stored = yaml.safe_load((where / "onecard.yaml").read_text(encoding="utf-8"))[name]
    assert stored == value
    told = [line for line in second.printed.splitlines() if line.startswith(f"from step {DONE + 1} on: ")]
    assert len(told) == (name not in NOT_OF_THE_RUN)
    assert all(f" --{name} " in line and line.count(" -> ") == 1 for line in told)
