"""Runs of each objective and method, killed at random disk operations: they go on and end with the same bits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from onecard.config.lora import BOTTLENECK_FORMS, METHOD_SETTINGS, PeftMethodName
from onecard.train.checkpoint import verify
from onecard.train.trackers import read_log
from tests import tiny
from tests.faults.conftest import assert_as_undisturbed
from tests.faults.fork_server import ForkServer
from tests.faults.test_stages import COMMON, SEED
from tests.objectives.test_preference import pair_file

OF_THIS_START = ("tokens_per_s",)  # what a row of the log has that another start may have otherwise


def text_file(path: Path) -> Path:
    rows = [{"text": " ".join(str(n * i) for i in range(1, 40))} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def pairs(path: Path) -> Path:
    return pair_file(path, 24)


def told(run: Path) -> list[dict[str, Any]]:
    """All that the log says of steps and evaluations."""
    rows = [row for row in read_log(run) if "loss" in row or "eval_loss" in row]
    return [{key: value for key, value in row.items() if key not in OF_THIS_START} for row in rows]


OBJECTIVES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "dpo": (pairs, {"cache_reference": True}),
    "ipo": (pairs, {}),
    "simpo": (pairs, {"label_smoothing": 0.1}),
    "orpo": (pairs, {}),
    "kto": (pairs, {}),
    "reward": (pairs, {"center_rewards": 0.01}),
    "grpo": (tiny.write_instructions, {"reward": "regex:[aeiou0-9]", "rollouts": 4, "rollout_max_tokens": 6,
                                       "grpo_updates": 2}),
    "pretrain": (text_file, {"cutoff_len": 64}),
}  # fmt: skip
# What a method takes beside its name; those without the option refuse a dropout.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 4}, "rslora": {}, "dora": {}, "pissa": {}, "olora": {}, "loftq": {"bits": 4}, "adalora": {},
    "ia3": {}, "vera": {"peft_option": "r=32"}, "oft": {"peft_option": "oft_block_size=8"},
    "miss": {"peft_option": "r=4"}, "shira": {}, "randlora": {"peft_option": "r=8"}, "loha": {}, "lokr": {},
    "prompt_tuning": {}, "p_tuning": {}, "prefix_tuning": {}, "houlsby": {}, "pfeiffer": {}, "parallel": {},
    "full": {"bits": 16}, "freeze:1": {"bits": 16},
}  # fmt: skip
OF_BASE = ("full", "freeze:1")
WITHOUT_DROPOUT = {*OF_BASE, *(name for name, taken in METHOD_SETTINGS.items() if "lora_dropout" not in taken)}
WITH_ONE_MORE = ("adalora", "p_tuning")  # file in a checkpoint: the ranks, and what makes the virtual tokens


@dataclass(frozen=True)
class KilledProgram:
    """A run that is started again and again and killed, beside one that nothing disturbs."""

    server: ForkServer
    folder: Path
    options: dict[str, Any]
    name: str

    def start(self, output: Path, kill_at: int = 0) -> tuple[int, str]:
        words = [word for name, value in self.options.items() for word in (f"--{name}", str(value))]
        place = ["--output_path", str(output), "--cache_path", str(output.parent / f"{output.name}-cache")]
        begun = self.server.start_tool("finetune", [*words, *place], watched=output, kill_at=kill_at)
        return begun.wait(), begun.output()

    def assert_survives(self, n_kills: int, n_files: int = 7) -> None:
        """Kill runs at random moments, `n_kills` times in all: each ends as the undisturbed one did."""
        code, printed = self.start(self.folder / "straight")
        assert code == 0, printed
        adapter = self.folder / "straight" / "adapter_model.safetensors"
        learned = tiny.tensors_of(adapter) if adapter.exists() else {}
        assert all(learned[name].any() for name in learned if "lora_B" in name), "nothing learned, which proves little"
        n_operations, moments = int(printed.split()[-2]), random.Random(f"{SEED} {self.name}")
        n_killed = n_whole = 0
        while n_killed < n_kills:
            output, most = self.folder / f"run-{n_whole}", n_operations
            code = -9
            while code:
                kill_at = moments.randint(1, most) if n_killed < n_kills else 0
                code, printed = self.start(output, kill_at)
                assert code in (0, -9), f"seed {SEED}, kill {n_killed} at {kill_at}: {code}\n{printed}"
                n_killed += code == -9
                most = max(1, most - kill_at // 2)
            n_whole += 1
            assert_as_undisturbed(output, self.folder / "straight", n_files=n_files)
            assert told(output) == told(self.folder / "straight")
            assert verify(output) == []


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_killed_at_ten_random_moments_it_ends_with_the_same_bits(
    objective: str, fork_server: ForkServer, tiny_base: Path, tmp_path: Path
) -> None:
    write, own = OBJECTIVES[objective]
    options = {"cutoff_len": 96, **COMMON, "test_size": 4, "eval_steps": 2, "max_steps": 5, "num_epoch": 9,
               "objective": objective, "model_path": tiny_base, "data_path": write(tmp_path / "data.jsonl"),
               **own, "prompt_type": "chatml"}  # fmt: skip
    KilledProgram(fork_server, tmp_path, options, objective).assert_survives(10)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_each_method_killed_at_random_moments_ends_with_the_same_bits(
    method: str, fork_server: ForkServer, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    dropout = 0.0 if method in WITHOUT_DROPOUT else 0.1
    options = {**COMMON, "max_steps": 5, "num_epoch": 9, "lora_dropout": dropout, "peft_method": method,
               "model_path": tiny_base, "data_path": instructions, **METHODS[method]}  # fmt: skip
    n_files = 7 + (method in WITH_ONE_MORE) - (method in OF_BASE)  # these have no adapter_config.json in a checkpoint
    KilledProgram(fork_server, tmp_path, options, method).assert_survives(4, n_files)


def test_no_method_is_left_out() -> None:
    known = {*get_args(PeftMethodName), *BOTTLENECK_FORMS, *OF_BASE}
    assert {*METHODS, "bottleneck"} == known  # which has its three forms
