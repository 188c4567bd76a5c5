"""Attention in fp32 on a card that has FlashAttention for 16 bits only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.random_models import config_of, random_base
from benchmarks.synthetic_run import build_run, plan_for, planned_peak, random_samples, run_peak
from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.model.hardware import Hardware, detect
from onecard.model.memory.architecture import architecture_of
from onecard.model.out_of_memory import give_back_memory
from onecard.train.step import take_step
from tests.simcard.card import CONTEXT_BYTES, Card

pytestmark = [pytest.mark.simcard, pytest.mark.shapes_only]

LENGTH = 2048


@pytest.fixture
def ampere(card: Card) -> Iterator[Hardware]:
    """Device 0 as one of the Ampere generation."""
    first = card.spec.devices[0]
    card.native.configure(0, first.total_bytes, CONTEXT_BYTES, 8, 6)
    yield replace(detect("cuda"), bf16_native=True, capability=(8, 6))
    give_back_memory()
    card.native.configure(0, first.total_bytes, CONTEXT_BYTES, *first.capability)


def test_the_scores_of_shared_key_heads_do_not_exist(ampere: Hardware) -> None:
    config = FinetuneConfig(
        ModelOptions("Llama-3.2-1B", bits=32, gradient_checkpointing=True),
        DataOptions(cutoff_len=LENGTH),
        LoraOptions(lora_r=16),
        TrainOptions(total_batch=1, micro_batch=1, max_steps=9, optimizer="adamw"),
        MemoryOptions(loss_chunk=512, offload_activations="off", offload_embeddings="off", head_bits="16", mlp_tile=-1),
    )
    plan = plan_for(config, architecture_of("Llama-3.2-1B"), ampere, LENGTH)
    base = random_base(config_of("Llama-3.2-1B"), config.model, ampere)
    run = build_run(config, ampere, base, random_samples([LENGTH], 128256))
    measured = run_peak(run, lambda: take_step(run), embeddings_in_ram=False).tensor_bytes
    planned = planned_peak(plan.account).tensor_bytes
    assert 0.97 * planned < measured < 1.01 * planned, f"{measured / 2**30:.3f} of {planned / 2**30:.3f} GiB"
