"""Runs of each objective, killed at random disk operations: the same command goes on and ends with the same bits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.train.checkpoint import verify
from onecard.train.trackers import read_log
from tests import tiny
from tests.faults.conftest import assert_as_undisturbed
from tests.faults.fork_server import ForkServer
from tests.faults.test_stages import COMMON, SEED
from tests.objectives.test_preference import pair_file

N_KILLS = 10
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


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_killed_at_ten_random_moments_it_ends_with_the_same_bits(
    objective: str, server: ForkServer, tiny_base: Path, tmp_path: Path
) -> None:
    write, own = OBJECTIVES[objective]
    options = {"cutoff_len": 96, **COMMON, "test_size": 4, "eval_steps": 2, "max_steps": 5, "num_epoch": 9,
               "objective": objective, "model_path": tiny_base, "data_path": write(tmp_path / "data.jsonl"),
               **own, "prompt_type": "chatml"}  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def start(output: Path, kill_at: int = 0) -> tuple[int, str]:
        place = ["--output_path", str(output), "--cache_path", str(output.parent / f"{output.name}-cache")]
        begun = server.start_tool("finetune", [*words, *place], watched=output, kill_at=kill_at)
        return begun.wait(), begun.output()

    code, printed = start(tmp_path / "straight")
    assert code == 0, printed
    learned = tiny.tensors_of(tmp_path / "straight" / "adapter_model.safetensors")
    assert all(learned[name].any() for name in learned if "lora_B" in name), "nothing was learned, which proves little"
    n_operations, moments = int(printed.split()[-2]), random.Random(f"{SEED} {objective}")
    n_killed = n_whole = 0
    while n_killed < N_KILLS:
        output, most = tmp_path / f"run-{n_whole}", n_operations
        code = -9
        while code:
            kill_at = moments.randint(1, most) if n_killed < N_KILLS else 0
            code, printed = start(output, kill_at)
            assert code in (0, -9), f"seed {SEED}, kill {n_killed} at {kill_at}: {code}\n{printed}"
            n_killed += code == -9
            most = max(1, most - kill_at // 2)
        n_whole += 1
        assert_as_undisturbed(output, tmp_path / "straight")
        assert told(output) == told(tmp_path / "straight")
        assert verify(output) == []
