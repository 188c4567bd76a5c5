"""Learning rate and parameter groups, against numbers that can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

from onecard.config.run import ScheduleName, TrainOptions
from onecard.errors import ConfigError
from onecard.train.optim import (
    build_optimizer,
    default_learning_rate,
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


@pytest.mark.parametrize("schedule", list(get_args(ScheduleName)))
def test_every_schedule_is_that_of_transformers_after_the_warmup(schedule: str) -> None:
    """Their warm-up begins with a step of rate 0, so step n of ours is step n of theirs from its end on."""
    settings = {"cosine_with_restarts": "num_cycles:2", "cosine_with_min_lr": "min_lr_rate:0.1",
                "polynomial": "power:2", "warmup_stable_decay": "num_decay_steps:5, min_lr_ratio:0.2"}  # fmt: skip
    options = TrainOptions(schedule=schedule, schedule_options=settings.get(schedule, ""), warmup_steps=4,
                           learning_rate=1e-3)  # fmt: skip
    assert not options.problems()
    given: dict[str, Any] = {name: int(v) if v == int(v) else v for name, v in options.schedule_settings.items()}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    wanted = get_scheduler(schedule, optimizer, 4, 24, given).lr_lambdas[0]
    mine = [learning_rate_factor(options, step, 24) for step in range(24)]
    if schedule == "inverse_sqrt":
        assert mine[4:] == pytest.approx([wanted(step) for step in range(4, 24)])
    elif schedule == "constant":
        assert mine[4:] == [1.0] * 20
    else:
        assert mine[4:] == pytest.approx([wanted(step) for step in range(4, 24)])
    assert mine[:4] == [0.25, 0.5, 0.75, 1]
    assert 0 <= learning_rate_factor(options, 24, 24) <= 1, "the rate of the step after the end is set, too"


def test_warmup_stable_decay_falls_over_the_last_fifth_by_itself() -> None:
    rates = [learning_rate_factor(TrainOptions(schedule="warmup_stable_decay"), step, 100) for step in range(100)]
    assert rates[5:80] == [1.0] * 75
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert rates[81] < 1 and rates[99] < 0.02
    short = [learning_rate_factor(TrainOptions(schedule="warmup_stable_decay"), step, 2) for step in range(3)]
    assert all(0 <= rate <= 1 for rate in short)


@pytest.mark.parametrize(
    ("schedule", "typed", "said"),
    [("linear", "num_cycles:2", "num_cycles is unknown; --schedule linear takes none"),
     ("polynomial", "num_cycles:2", "takes power, lr_end"), ("polynomial", "power", "not of the form name:number"),
     ("polynomial", "power:high", "not of the form"), ("cosine_with_restarts", "num_cycles:0", "is not above 0"),
     ("polynomial", "power:nan", "is not above 0"), ("cosine_with_min_lr", "", "needs one of min_lr"),
     ("cosine_with_min_lr", "min_lr:1e-5,min_lr_rate:0.1", "needs one of min_lr")],
)  # fmt: skip
def test_what_a_schedule_cannot_take_is_refused(schedule: str, typed: str, said: str) -> None:
    ((flag, problem),) = TrainOptions(schedule=schedule, schedule_options=typed).problems()
    assert flag == "--schedule_options"
    assert said in problem


@pytest.mark.parametrize(
    ("model_type", "width", "expected"),
    [("llama", 4096, 2.9e-4), ("qwen3", 4096, 4.7e-4), ("qwen2", 3584, 4.8e-4), ("llama", 8192, 1.7e-4),
     ("llama", 576, 5e-4), ("mistral", 4096, 2e-4)],
)  # fmt: skip
def test_the_learning_rate_of_a_base(model_type: str, width: int, expected: float) -> None:
    """The first two are the published ones, https://thinkingmachines.ai/blog/lora/."""
    assert default_learning_rate(model_type, width)[0] == expected
    assert default_learning_rate(model_type, width, "dpo") == (5e-6, "usual for preference pairs")
    assert default_learning_rate(model_type, width, method="ia3") == (3e-3, "as (IA)3 was published with")
    assert default_learning_rate(model_type, width, "dpo", "ia3")[0] == 5e-6
    rate, reason = default_learning_rate(model_type, width, method="vera")
    assert rate == pytest.approx(10 * expected)
    assert reason.startswith("ten times what LoRA gets, as PEFT compares VeRA")


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
