"""Learning rate and parameter groups, against numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from onecard.config.training import TrainOptions
from onecard.errors import ConfigError
from onecard.train.optim import (
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
    warmup_steps,
    with_present_options,
)


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
    options = TrainOptions(schedule=schedule, warmup_steps=2)
    assert [learning_rate_factor(options, step, 6) for step in range(6)] == pytest.approx(expected)


def test_warmup_steps_take_the_place_of_the_ratio() -> None:
    assert warmup_steps(TrainOptions(warmup_ratio=0.1), 95) == 10
    assert warmup_steps(TrainOptions(warmup_ratio=0.1, warmup_steps=3), 95) == 3
    assert warmup_steps(TrainOptions(warmup_ratio=0), 95) == 0


def test_few_steps_have_a_warmup_too() -> None:
    assert [warmup_steps(TrainOptions(), total) for total in (1, 4, 12, 24, 30, 200, 1000)] == [1, 1, 2, 4, 5, 6, 30]
    assert warmup_steps(TrainOptions(warmup_steps=1), 30) == 1


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
    for step, share in ((0, 0.5), (1, 1.0), (6, 0.5), (0, 0.5)):
        assert set_learning_rate(optimizer, TrainOptions(warmup_steps=2), step, 10) == pytest.approx(0.1 * share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * share, 1.6 * share])


def test_a_stored_state_takes_the_hyper_parameters_of_the_present_options() -> None:
    """Also where, as under DeepSpeed, a group of the optimizer at work holds its parameters as one."""
    settings = ({"learning_rate": 0.1, "loraplus_ratio": 16}, {"learning_rate": 0.01, "loraplus_ratio": 4})
    old, new = (
        build_optimizer(TwoMatrices(), TrainOptions(**each, weight_decay=each["learning_rate"])) for each in settings
    )
    stored = old.state_dict()
    joined = with_present_options(stored, new, TrainOptions(loraplus_ratio=4))
    assert [(g["initial_lr"], g["weight_decay"]) for g in joined["param_groups"]] == [(0.01, 0.01), (0.04, 0.01)]
    assert [g["params"] for g in joined["param_groups"]] == [[0], [1]] and joined["state"] is stored["state"]
    assert stored["param_groups"][0]["lr"] == 0.1, "what was stored is not changed"
    plain = build_optimizer(TwoMatrices(), TrainOptions())
    with pytest.raises(ConfigError, match=r"--loraplus_ratio: 0 cannot go on .* Give its ratio"):
        with_present_options(stored, plain, TrainOptions())
    with pytest.raises(ConfigError, match=r"--loraplus_ratio: 16 cannot go on .* Give 0,"):
        with_present_options(plain.state_dict(), old, TrainOptions(loraplus_ratio=16))
