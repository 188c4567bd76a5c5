"""A step of eight samples, taken as 1 x 8, 2 x 4 and 8 x 1: loss and gradients are alike to 1e-6 for each objective."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.model.lora.adapter import add_lora
from onecard.objectives.base import Objective
from onecard.objectives.grpo import GroupRelative
from onecard.objectives.registry import objective_named
from tests.objectives.test_grpo import rollout
from tests.objectives.test_kto import row
from tests.objectives.test_preference import load, pair

PAIRS = ("dpo", "ipo", "simpo", "orpo", "reward")
OPTIONS = {"grpo": {"kl_beta": 0.1, "rollout_max_tokens": 9}}


def eight_samples(name: str, objective: Objective) -> Sequence[Any]:
    torch.manual_seed(4)
    draw = random.Random(4)
    sizes = [(draw.randint(2, 9), draw.randint(1, 9), draw.randint(1, 9)) for _ in range(8)]
    if isinstance(objective, GroupRelative):
        groups = [[rollout(prompt, n, reward=draw.random()) for _, n, _ in sizes[:4]] for prompt, _, _ in sizes[:2]]
        return objective.rollout_view(groups, None)
    if name in PAIRS:
        return [pair(*each) for each in sizes]
    return [row(prompt, n, name == "sft" or n % 2 == 0) for prompt, n, _ in sizes]


def step(objective: Objective, model: Any, samples: Sequence[Any], rows: int) -> tuple[float, list[Tensor]]:
    """The loss of the step and its gradients, so many samples at a time."""

    def cut(every: Sequence[Any]) -> list[list[Any]]:
        return [[every[i] for i in range(start, start + rows)] for start in range(0, 8, rows)]

    found = objective.estimator(samples) if objective.looks_ahead else None
    if found:
        with torch.no_grad():
            sums = [found[0].loss_of(model, part, "cpu") for part in cut(found[1])]
        objective = objective.with_estimate(sum(float(each) for each, _ in sums) / sum(n for _, n in sums))
    n_units, total = sum(objective.flat_sums(model, part, "cpu")[1].item() for part in cut(samples)), 0.0
    model.zero_grad()
    for part in cut(samples):
        loss = objective.loss_of(model, part, "cpu")[0] / n_units
        loss.backward()
        total += float(loss)
    return total, [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("name", ["sft", *PAIRS, "kto", "grpo"])
def test_loss_and_gradients_do_not_depend_on_the_cut(name: str, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = TrainOptions(objective=name, **OPTIONS.get(name, {}))  # type: ignore[arg-type]
    objective = objective_named(name).with_options(options)
    samples = eight_samples(name, objective)
    assert len(samples) == 8 and len({objective.length(each) for each in samples}) > 3
    model: Any
    if name == "reward":
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = add_lora(base, LoraOptions(lora_r=4), gives_reward=True)
    else:
        model = load(tiny_base)
    whole, gradients = step(objective, model, samples, 8)
    largest = max(float(each.abs().max()) for each in gradients)
    assert largest > 1e-3
    for rows in (4, 1):
        loss, others = step(objective, model, samples, rows)
        assert loss == pytest.approx(whole, rel=1e-6, abs=1e-6)  # that of ipo is about 25
        assert len(others) == len(gradients) > 20
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(other, one, atol=1e-6 * max(1.0, largest), rtol=0)
