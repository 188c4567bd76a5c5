"""A step of every method, over a base in every number of bits, takes what is planned for it, to 3 %."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from benchmarks.plan_accuracy import toy_config
from benchmarks.synthetic_run import real_run
from onecard.config.lora import NOT_IN_4_BITS, LoraOptions
from onecard.model.hardware import detect
from onecard.model.memory.architecture import Architecture, architecture_of
from onecard.model.memory.estimate import MemoryConfig, account, n_trained
from onecard.train.step import take_step
from tests.faults.test_objectives import METHODS, OF_BASE
from tests.live_memory import held_bytes, peak_bytes

CONFIG = toy_config("llama", num_hidden_layers=2)
# Small ones: the toy is small, too.
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4}, "vera": {"peft_option": "r=32"}, "oft": {"peft_option": "oft_block_size=8"},
    "miss": {"peft_option": "r=4"}, "randlora": {"peft_option": "r=8"}, "dora": {"use_dora": True},
    **{name: {"peft_option": "num_virtual_tokens=5"} for name in ("prompt_tuning", "p_tuning", "prefix_tuning")},
}  # fmt: skip
# What is LoRA but for its scale or the values that it begins with: they have one plan, and each its step.
AS_LORA: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True}, **{name: {"lora_init": name} for name in ("pissa", "loftq", "olora")},
}  # fmt: skip
FAST = {name: 16 if name in OF_BASE + NOT_IN_4_BITS else 4 for name in METHODS if name not in AS_LORA}
REFUSED = {("dora", 8), *((name, 4) for name in NOT_IN_4_BITS), *((name, bits) for name in OF_BASE for bits in (4, 8)),
           *((name, bits) for name in ("pissa", "olora") for bits in (4, 8)),
           *(("loftq", bits) for bits in (8, 16, 32))}  # fmt: skip
EVERY = [(name, bits) for name in METHODS for bits in (4, 8, 16, 32) if (name, bits) not in REFUSED]


@pytest.fixture(autouse=True)
def _own_number_format() -> Iterator[None]:
    """accelerate keeps one for the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def model() -> Architecture:
    return architecture_of(CONFIG)


def setup_of(method: str, bits: int, **changes: Any) -> MemoryConfig:
    named = LoraOptions("lora" if method in {*AS_LORA, "dora"} else method)  # a bottleneck's form becomes an option
    options = {"element_bytes": 2 if bits == 16 else 4, "rows": 2, "length": 96, "rank": 2, "loss_chunk": 64,
               "peft_method": named.peft_method, "peft_option": named.peft_option, "on_gpu": False,
               "gradient_checkpointing": named.may_recompute, **SETTINGS.get(method, {}), **changes}  # fmt: skip
    return MemoryConfig(bits, **options)


@pytest.mark.parametrize(
    ("method", "bits"),
    [pytest.param(*case, marks=[] if FAST.get(case[0]) == case[1] else pytest.mark.slow) for case in EVERY],
)
def test_a_step_takes_what_is_planned(
    method: str, bits: int, model: Architecture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup, config = setup_of(method, bits), CONFIG
    if method == "loftq":  # it reads what was lost in quantisation from files
        base: Any = AutoModelForCausalLM.from_config(model.source.read()[0])
        base.save_pretrained(tmp_path)
        config = {**CONFIG, "_name_or_path": str(tmp_path)}
    run = real_run(config, setup, detect("cpu"), **AS_LORA.get(method, {}))
    trained = [each for each in run.plain_model.parameters() if each.requires_grad]
    assert n_trained(model, setup) == sum(each.numel() for each in trained) > 0
    take_step(run)
    held = held_bytes(run.plain_model, run.optimizer, run.ranks and run.ranks.state_dict())
    measured = held + peak_bytes(lambda: take_step(run))
    planned = account(model, setup).tensor_bytes
    assert "rough estimate" not in capsys.readouterr().err
    print(method, bits, planned, measured, planned / measured)
    assert 0.97 <= planned / measured <= 1.03, (planned, measured)


def test_every_method_is_measured_here() -> None:
    assert {name for name, _ in EVERY} == {*METHODS} and len(EVERY) == 78
