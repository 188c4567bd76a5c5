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


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_take_the_steps_of_one(
    case: str, fork_server: ForkServer, tiny_base: Path, tmp_path: Path
) -> None:
    options = {**SHARED, **CASES[case]}
    is_grpo = options["objective"] == "grpo"
    data = tmp_path / "data.jsonl"
    data = tiny.write_instructions(data.with_suffix(".json")) if is_grpo else pair_file(data, 24)
    port = str(free_port())
    of_ranks = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "GLOO_SOCKET_IFNAME": "lo"} for rank in ("0", "1")]  # fmt: skip
    places = {"one": [{}], "two": of_ranks}
    for name, ranks in places.items():
        output = tmp_path / name / "run"
        output.parent.mkdir()
        begun = [fork_server.start(tiny_base, data, output, options, environment=rank) for rank in ranks]
        ended = [(each.wait(), each.output()[-2000:]) for each in begun]
        assert [code for code, _ in ended] == [0] * len(ranks), ended
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
