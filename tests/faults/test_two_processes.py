"""Every objective on two processes (gloo on CPU) takes the steps that one process takes.

Here because the fork server makes the starts cheap; `tests/invariants/test_processes.py` starts torchrun itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onecard.train.trackers import read_log
from tests import tiny
from tests.faults.fork_server import ForkServer
from tests.launching import free_port
from tests.objectives.test_preference import pair_file

SHARED = {"total_batch": 5, "micro_batch": 2, "num_epoch": 9, "max_steps": 4, "test_size": 4, "eval_steps": 2,
          "learning_rate": 1e-3, "cutoff_len": 96, "prompt_type": "chatml", "rehearsal": False}  # fmt: skip
GRPO = {"objective": "grpo", "reward": "regex:[aeiou0-9],length:-20:0.5", "rollouts": 4, "rollout_max_tokens": 6,
        "kl_beta": 0.1, "grpo_updates": 2}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "cache_reference": True, "sft_weight": 0.3},
    **{name: {"objective": name} for name in ("ipo", "simpo", "orpo", "kto")},
    "reward": {"objective": "reward", "center_rewards": 0.1},
    **{f"grpo, {bits} bits": {**GRPO, "bits": bits} for bits in (32, 8, 4)},
}
OF_THIS_START = ("tokens_per_s",)


def told(run: Path) -> list[dict[str, float]]:
    rows = [row for row in read_log(run) if "loss" in row or "eval_loss" in row or "eval_reward" in row]
    return [{key: value for key, value in row.items() if key not in OF_THIS_START} for row in rows]


def run_on(
    n_processes: int, fork_server: ForkServer, base: Path, data: Path, output: Path, options: dict[str, Any]
) -> None:
    """One run on so many processes, each with the variables that torchrun gives it."""
    port = str(free_port())
    of_ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_processes), "MASTER_PORT": port,
                 "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} for rank in range(n_processes)]  # fmt: skip
    output.parent.mkdir()
    places = of_ranks if n_processes > 1 else [{}]
    begun = [fork_server.start(base, data, output, options, environment=place) for place in places]
    ended = [(each.wait(), each.output()[-2000:]) for each in begun]
    assert [code for code, _ in ended] == [0] * n_processes, ended


def test_two_processes_take_the_steps_of_one_and_one_clock_decides_for_both(
    fork_server: ForkServer, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    """When to evaluate and save: else one would wait for the other for ever. 20 rows are 4 steps: none fits evenly."""
    options = {**SHARED, "prompt_type": "alpaca", "cutoff_len": 256, "num_epoch": 2, "max_steps": 0}
    by_clock = {"eval_steps": 100, "save_steps": 100, "eval_minutes": 1e-9, "save_minutes": 1e-9}
    for n_processes, more in ((1, {}), (2, by_clock)):
        output = tmp_path / str(n_processes) / "run"
        run_on(n_processes, fork_server, tiny_base, instructions, output, options | more)
    runs = [tmp_path / name / "run" for name in ("1", "2")]
    one, two = map(tiny.losses_of, runs)
    assert len(two) == 8 and [step for step, _ in two] == [step for step, _ in one]
    assert max(abs(a - b) for (_, a), (_, b) in zip(two, one, strict=True)) < 1e-6
    assert tiny.largest_difference(*(tiny.tensors_of(run / "adapter_model.safetensors") for run in runs)) < 1e-5
    evaluated = [row["step"] for row in read_log(runs[1]) if "eval_loss" in row]
    assert evaluated[0] == 1 and evaluated[-1] == 8


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_take_the_steps_of_one(
    case: str, fork_server: ForkServer, tiny_base: Path, tmp_path: Path
) -> None:
    options = {**SHARED, **CASES[case]}
    is_grpo = options["objective"] == "grpo"
    data = tmp_path / "data.jsonl"
    data = tiny.write_instructions(data.with_suffix(".json")) if is_grpo else pair_file(data, 24)
    places = ("one", "two")
    for number, name in enumerate(places, 1):
        run_on(number, fork_server, tiny_base, data, tmp_path / name / "run", options)
    one, two = (told(tmp_path / name / "run") for name in places)
    assert len(one) == len(two) == 6
    apart = [(abs(other[key] - row[key]) / max(1, abs(row[key])), key)
             for row, other in zip(one, two, strict=True) for key in row]  # fmt: skip
    weights = [tiny.tensors_of(tmp_path / name / "run" / "adapter_model.safetensors") for name in places]
    worst, of_losses = max(apart), max(each for each in apart if each[1] in ("loss", "eval_loss", "grad_norm"))
    print(case, worst, of_losses, tiny.largest_difference(*weights))
    assert of_losses[0] <= 1e-6, of_losses
    assert worst[0] <= 1e-5, worst  # sums of log-probabilities in fp32, and rounded to six digits in the log
    assert tiny.largest_difference(*weights) < 1e-6
    assert all(weights[0][name].any() for name in weights[0] if "lora_B" in name)
