"""Runs of mixtures of experts and of state-space models: planned, trained, stopped and gone on with bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from onecard.recipes import finetune
from tests import tiny
from tests.model.every_family import save_small
from tests.runs import run_and_stop


@pytest.fixture(autouse=True)
def _accelerate_as_new() -> Iterator[None]:
    """It keeps one number format per process; 16-bit models compute in another one than the rest."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("traced_peaks")
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mixtral", {"bits": 4}),
        ("mixtral", {"bits": 8, "lora_target_parameters": "experts"}),
        ("falcon_h1", {"bits": 32, "gradient_checkpointing": True}),
    ],
)
def test_a_run_goes_on_bit_for_bit(
    model_type: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_small(model_type, tmp_path / "base", vocab_size=448, max_position_embeddings=512)
    tiny.save_sentencepiece_tokenizer(base)
    data = tiny.write_instructions(tmp_path / "data.json", 16)
    whole = finetune(tiny.config_for(base, data, tmp_path / "whole", **options))
    config = tiny.config_for(base, data, tmp_path / "parts", **options)
    run_and_stop(config, monkeypatch, after_steps=1)
    parts = finetune(config)
    one, other = (tiny.tensors_of(run / "adapter_model.safetensors") for run in (whole, parts))
    assert tiny.same_tensors(one, other) and tiny.losses_of(whole) == tiny.losses_of(parts)
    assert any("experts" in name for name in one) == ("lora_target_parameters" in options)
