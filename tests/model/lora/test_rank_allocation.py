"""AdaLoRA's ranks: the budget by step, what is cut, and files that PEFT wrote without what it cut."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.config.lora import LoraOptions
from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError
from onecard.model.lora.adapter import add_lora, load_adapter, rank_allocation, save_adapter
from onecard.model.lora.rank_allocation import RankAllocation

IDS = torch.tensor([[1, 5, 9, 33, 7, 120, 64, 3]])


def base(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def allocation(tiny_base: Path, **options: Any) -> tuple[Any, RankAllocation]:
    lora = LoraOptions(peft_method="adalora", **{"lora_r": 2, **options})
    torch.manual_seed(0)
    model = add_lora(base(tiny_base), lora)
    found = rank_allocation(model, lora)
    assert found is not None
    return model, found


def n_left(ranks: RankAllocation) -> int:
    return sum(int((values != 0).sum()) for values, _, _ in ranks.triplets.values())


def learn(model: Any, ranks: RankAllocation, step: int, total: int) -> None:
    """One step of gradient descent, as training takes it."""
    model.zero_grad()
    (model(IDS, labels=IDS).loss + ranks.penalty()).backward()
    ranks.observe()
    with torch.no_grad():
        for tensor in (tensor for triplet in ranks.triplets.values() for tensor in triplet):
            tensor -= 0.5 * tensor.grad
    ranks.allocate(step, total)


def test_the_budget_is_pefts_and_what_is_cut_stays_cut(tiny_base: Path) -> None:
    """By the steps in which PEFT's own allocator has no say in which singular values go: their number is the same."""
    model, ranks = allocation(tiny_base, peft_option="tinit=2,tfinal=3")
    theirs = model.base_model.rankallocator
    theirs.peft_config = types.SimpleNamespace(**{**vars(ranks.config), "tinit": 2, "tfinal": 3, "total_step": 12})
    n_adapters = len(ranks.triplets)
    assert (ranks.first_budget, ranks.last_budget) == (3 * n_adapters, 2 * n_adapters)
    patterns = []
    for step in range(1, 13):
        learn(model, ranks, step, 12)
        budget = ranks.budget(step, 12)
        assert budget == (theirs.budget_schedule(step)[0] if step != 9 else ranks.last_budget)
        assert n_left(ranks) == (ranks.first_budget if step <= 2 else budget)
        patterns.append({name: values.detach() != 0 for name, (values, _, _) in ranks.triplets.items()})
    assert all(torch.equal(patterns[-1][name], patterns[8][name]) for name in ranks.triplets)
    assert ranks.config.total_step == 12


def test_its_scores_are_pefts(tiny_base: Path) -> None:
    """PEFT's allocator, shown the same weights and gradients, keeps the same singular values."""
    model, ranks = allocation(tiny_base)
    theirs, inner = model.base_model.rankallocator, model.base_model.model
    theirs.peft_config = types.SimpleNamespace(**{**vars(ranks.config), "tinit": 0, "tfinal": 0, "total_step": 6})
    with torch.no_grad():
        for values, _, _ in ranks.triplets.values():
            values.normal_()
    for step in range(1, 4):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        kept = {name: values.detach().clone() for name, (values, _, _) in ranks.triplets.items()}
        ranks.observe()
        _, pattern = theirs.update_and_allocate(inner, step)
        with torch.no_grad():
            for name, (values, _, _) in ranks.triplets.items():
                values.copy_(kept[name])
        ranks.allocate(step, 6)
        for name, (values, _, _) in ranks.triplets.items():
            assert (values != 0).flatten().tolist() == pattern[name.removeprefix("base_model.model.")]


def test_a_cut_schedule_ends_at_the_budget(tiny_base: Path) -> None:
    """Fewer steps than were planned, down to none of the last phase: the ranks are still cut to what was asked for."""
    model, ranks = allocation(tiny_base, peft_option="tinit=4,tfinal=4")
    ranks.check(12)
    learn(model, ranks, 1, 12)
    learn(model, ranks, 2, 2)
    assert n_left(ranks) == ranks.last_budget
    stored = ranks.state_dict()
    other = allocation(tiny_base)[1]
    other.load_state_dict(stored)
    assert all(torch.equal(other.kept[name], which) for name, which in (ranks.kept or {}).items())  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"peft_option": "init_r=2"}, r"--peft_option: init_r=2 is to be above the rank that is left, --lora_r 2"),
     ({"peft_option": "tinit=6,tfinal=4"}, r"--peft_option: tinit=6 and tfinal=4 leave no step of 10")],
)  # fmt: skip
def test_what_leaves_nothing_to_cut_is_refused(options: dict[str, Any], said: str, tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        allocation(tiny_base, **options)[1].check(10)


@pytest.mark.parametrize(("flag", "value"), [("--deepspeed", "true"), ("--shard", "true")])
def test_divided_gradients_are_refused(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{flag}: does not go with --peft_method adalora"):
        parse(FinetuneConfig, ["--peft_method", "adalora", "--bits", "16", flag, value])


def test_an_adapter_that_peft_saved_without_what_it_cut_answers_alike(tiny_base: Path, tmp_path: Path) -> None:
    model, ranks = allocation(tiny_base)
    with torch.no_grad():
        for values, _, _ in ranks.triplets.values():
            values.normal_()
            values[0] = 0
    pattern = {name.removeprefix("base_model.model."): (values != 0).flatten().tolist()
               for name, (values, _, _) in ranks.triplets.items()}  # fmt: skip
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    save_adapter(model, tmp_path / "ours")
    model.peft_config["default"].rank_pattern = pattern
    model.peft_config["default"].total_step = 9
    model.save_pretrained(tmp_path / "theirs")
    plain: Any = peft.PeftModel.from_pretrained(base(tiny_base), tmp_path / "ours")
    loaded = load_adapter(base(tiny_base), tmp_path / "theirs", trainable=False).model
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, expected)
        assert torch.allclose(loaded(IDS).logits, expected, atol=1e-6)
