"""Bottleneck adapters under each objective, in packed rows and with streamed layers: the same as any adapter.

Over several processes: tests/invariants/test_processes.py (--shard) and test_deepspeed.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.config.lora import BOTTLENECK_FORMS
from onecard.recipes import finetune
from tests import tiny
from tests.objectives.test_preference import pair_file
from tests.runs import assert_same_end, run_and_stop


def pairs(path: Path) -> Path:
    return pair_file(path, 24)


OBJECTIVES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "dpo": (pairs, {}),
    "reward": (pairs, {}),
    "grpo": (tiny.write_instructions, {"reward": "regex:[aeiou0-9]", "rollouts": 4, "rollout_max_tokens": 6,
                                       "kl_beta": 0.1}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("form", BOTTLENECK_FORMS)
def test_it_learns_by_each_objective_and_goes_on_bitwise(form, objective, tiny_base, tmp_path, monkeypatch) -> None:
    write, own = OBJECTIVES[objective]
    options = {"objective": objective, "peft_method": "bottleneck", "peft_option": f"form={form}", "max_steps": 4,
               "num_epoch": 9, "learning_rate": 1e-2, "save_steps": 100, "prompt_type": "chatml",
               "cutoff_len": 96, **own}  # fmt: skip
    data = write(tmp_path / "data.json")
    straight = finetune(tiny.config_for(tiny_base, data, tmp_path / "straight", **options))
    losses = [loss for _, loss in tiny.losses_of(straight)]
    assert len(losses) == 4
    if objective == "dpo":  # without the adapter, which is its reference, the model says what it says with a new one
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    if objective != "grpo":
        assert losses[-1] < losses[0]
    trained = tiny.tensors_of(straight / "adapter_model.safetensors")
    raised = [name for name, weight in trained.items() if "bottleneck_up.weight" in name and weight.abs().max() > 0]
    assert len(raised) == 2 * (1 + (form == "houlsby"))
    config = tiny.config_for(tiny_base, data, tmp_path / "run", **options)
    run_and_stop(config, monkeypatch, after_steps=2)
    assert_same_end(finetune(config), straight)


@pytest.mark.parametrize("form", ["houlsby", *(pytest.param(form, marks=pytest.mark.slow) for form in
                                               BOTTLENECK_FORMS[1:])])  # fmt: skip
def test_packed_rows_and_streamed_layers_are_the_same_run(form, tiny_base, instructions, tmp_path) -> None:
    options = {"peft_method": "bottleneck", "peft_option": f"form={form}", "gradient_checkpointing": True,
               "learning_rate": 1e-3}  # fmt: skip
    runs = {
        name: finetune(tiny.config_for(tiny_base, instructions, tmp_path / name, **{**options, **more}))
        for name, more in {"plain": {}, "packed": {"packing": True}, "streamed": {"stream_layers": "on"}}.items()
    }
    assert_same_end(runs["plain"], runs["streamed"])
    weights = [tiny.tensors_of(runs[name] / "adapter_model.safetensors") for name in ("plain", "packed")]
    assert tiny.largest_difference(*weights) < 1e-5
    losses = [tiny.losses_of(runs[name]) for name in ("plain", "packed")]
    assert [loss for _, loss in losses[1]] == pytest.approx([loss for _, loss in losses[0]], abs=1e-5)
