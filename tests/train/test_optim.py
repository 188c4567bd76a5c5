"""Learning rate and parameter groups, against numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from onecard.config import TrainOptions
from onecard.train.optim import build_optimizer, build_schedule, learning_rate_factor, warmup_steps


class TwoMatrices(torch.nn.Module):
    """The parameter names of one LoRA layer, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(4, 4)
        self.lora_A = torch.nn.Linear(4, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, 4, bias=False)
        self.base.requires_grad_(False)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("cosine", [0.5, 1] + [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]),
    ],
)
def test_learning_rate_follows_the_closed_form(schedule: str, expected: list[float]) -> None:
    factor = learning_rate_factor(TrainOptions(schedule=schedule, warmup_steps=2), total_steps=6)
    assert [factor(step) for step in range(6)] == pytest.approx(expected)


def test_warmup_steps_take_the_place_of_the_ratio() -> None:
    assert warmup_steps(TrainOptions(warmup_ratio=0.1), 95) == 10
    assert warmup_steps(TrainOptions(warmup_ratio=0.1, warmup_steps=3), 95) == 3
    assert warmup_steps(TrainOptions(warmup_ratio=0), 95) == 0


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_each_optimizer_trains_only_what_is_trainable(name: str) -> None:
    model = TwoMatrices()
    frozen = model.base.weight.clone()
    optimizer = build_optimizer(model, TrainOptions(optimizer=name, learning_rate=0.1))
    before = model.lora_B.weight.detach().clone()
    model.lora_B(model.lora_A(model.base(torch.ones(3, 4)))).sum().backward()
    optimizer.step()
    assert torch.equal(model.base.weight, frozen)
    assert not torch.equal(model.lora_B.weight, before)


def test_loraplus_gives_only_the_b_matrices_the_higher_rate() -> None:
    model = TwoMatrices()
    optimizer = build_optimizer(model, TrainOptions(learning_rate=0.1, loraplus_ratio=16))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(model.lora_A.weight): 0.1, id(model.lora_B.weight): pytest.approx(1.6)}
    schedule = build_schedule(optimizer, TrainOptions(warmup_steps=2), 10)
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.8])
