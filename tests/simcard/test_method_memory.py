"""Steps of adapter methods on the simulated card, as shapes of a real size: its live tensors are those of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.random_models import config_of
from benchmarks.synthetic_run import real_run
from onecard.model.hardware import detect
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import account
from onecard.model.out_of_memory import give_back_memory
from onecard.train.step import take_step
from tests.model.memory.test_methods import AS_LORA, SETTINGS, setup_of
from tests.simcard.card import Card

pytestmark = pytest.mark.simcard

# LLaMA's shape, small enough to train all of it. Its products are large enough for `shapes_only` to leave them out.
CONFIG = config_of("Llama-2-7B") | {
    "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 4000,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 8}, "vera": {}, "oft": {}, "prefix_tuning": {"peft_option": "num_virtual_tokens=20"},
    "pissa": {"rank": 64},
}  # fmt: skip
FAST = [("dora", 4), ("freeze:1", 16)]
CASES = [*FAST, *((name, 4) for name in ("lora", "oft", "vera", "adalora", "prefix_tuning")), ("dora", 8),
         *((name, 16) for name in ("dora", "pissa", "full"))]  # fmt: skip


@pytest.mark.shapes_only
@pytest.mark.parametrize(
    ("method", "bits"), [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_a_step_on_a_card_takes_what_is_planned(
    method: str, bits: int, card: Card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"rank": 8, "peft_option": "", **DEFAULTS.get(method, SETTINGS.get(method, {}))}
    setup = setup_of(method, bits, **settings, element_bytes=2, rows=1, length=256, loss_chunk=128, on_gpu=True,
                     repeats_kv=True, expandable_segments=card.spec.expandable)  # fmt: skip
    planned = account(architecture_of(CONFIG), setup).tensor_bytes
    give_back_memory()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    run = real_run(CONFIG, setup, detect("cuda", pretend_turing=True), **AS_LORA.get(method, {}))
    take_step(run)
    torch.cuda.reset_peak_memory_stats()
    take_step(run)
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    workspaces = held - torch.cuda.memory_allocated()  # the plan has them in the context
    measured = peak - before - workspaces
    assert "rough estimate" not in capsys.readouterr().err
    print(method, bits, planned, measured, planned / measured)
    assert 0.97 <= planned / measured <= 1.03, (planned, measured)
