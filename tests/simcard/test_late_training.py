"""Whole runs with streams that run late and memory full of garbage end bit for bit as with eager ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from onecard.recipes import finetune
from tests import tiny
from tests.runs import assert_same_end
from tests.simcard.card import Card

pytestmark = pytest.mark.simcard

COMMON = {"device": "cuda", "total_batch": 8, "micro_batch": 4, "num_epoch": 1, "learning_rate": 1e-3, "test_size": 4,
          "eval_steps": 2, "gradient_checkpointing": True, "lora_dropout": 0.1}  # fmt: skip
NUMBERS = ({"bits": 4, "dtype": "fp16"}, {"bits": 8, "dtype": "fp16"}, {"bits": 16}, {"bits": 32})
MOVED = (
    {},
    {"offload_activations": "on"},
    {"offload_activations": "on", "offload_embeddings": "on"},
    {"stream_layers": "on"},
    {"stream_layers": "on", "offload_activations": "on", "offload_embeddings": "on"},
)
OTHERS = ({}, {"mlp_tile": 64, "loss_chunk": 16}, {"optimizer": "paged_adamw_8bit", "head_bits": 4})

FAST = list(zip(NUMBERS, MOVED[1:], cycle(OTHERS[1:])))  # every way of moving, in every number format
CASES = [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in product(NUMBERS, MOVED, OTHERS)
]


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    """It has one arithmetic per process, and these runs have several."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("numbers", "moved", "others"), CASES)
def test_late_streams_change_no_bit(
    numbers: dict[str, Any], moved: dict[str, Any], others: dict[str, Any],
    card: Card, tiny_base: Path, instructions: Path, tmp_path: Path,
) -> None:  # fmt: skip
    runs = []
    for name, how in (("eager", {}), ("late", {"late": True, "garbage": True})):
        config = tiny.config_for(tiny_base, instructions, tmp_path / name, **COMMON, **numbers, **moved, **others)
        AcceleratorState._reset_state(True)
        with card.behaving(**how):
            runs.append(finetune(config))
            torch.cuda.synchronize()
    assert len(tiny.losses_of(runs[0])) > 1
    assert_same_end(*runs)
