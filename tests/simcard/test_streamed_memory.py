"""Models larger than the card, as shapes of their real sizes: what the allocator counts beside the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.random_models import config_of, random_base
from benchmarks.synthetic_run import build_run, planned_peak, random_samples, run_peak
from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.model.hardware import detect
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import CUDA_CONTEXT_BYTES, GIB
from onecard.model.memory.plan import CardSpec, make_plan
from onecard.model.memory_saving import streamed_layers
from onecard.model.out_of_memory import give_back_memory
from onecard.train.auto_config import _filled
from onecard.train.step import take_step
from tests.simcard.card import Card

pytestmark = pytest.mark.simcard

LLAMA_70B = config_of("Llama-3.1-70B")
MIDDLE = config_of("Llama-3.1-8B") | {"num_hidden_layers": 6, "vocab_size": 32000}


@pytest.fixture(autouse=True)
def _whole_card_again() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.shapes_only
@pytest.mark.parametrize(("config", "gib", "length"), [
    pytest.param(MIDDLE, 1.2, 512, id="6 layers"),
    pytest.param(config_of("Llama-3.1-8B"), 2.0, 512, id="8B", marks=pytest.mark.slow),
    pytest.param(LLAMA_70B, 5.5, 512, id="70B", marks=pytest.mark.slow),
    pytest.param(LLAMA_70B, 10.0, 4096, id="70B long", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_step_stays_within_the_card_that_the_plan_chose_streaming_for(
    config: dict[str, Any], gib: float, length: int, card: Card, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(streamed_layers, "_write", lambda *_: None)  # no page of so much RAM is touched
    give_back_memory()
    options = FinetuneConfig(
        ModelOptions("a model", bits=4), DataOptions(cutoff_len=length), train=TrainOptions(total_batch=4, max_steps=9),
        memory=MemoryOptions(pretend_turing=True),
    )  # fmt: skip
    here = CardSpec("a card", int(gib * GIB), 64 * GIB, expandable_segments=card.spec.expandable)
    plan = make_plan(architecture_of(config), options, here)
    assert plan.fits and plan.setup.stream_layers
    filled, turing = _filled(options, plan), detect("cuda", pretend_turing=True)
    samples = random_samples([length] * 4, config["vocab_size"])
    run = build_run(filled, turing, random_base(config, filled.model, turing), samples)
    give_back_memory()  # random weights are made on the card
    torch.cuda.set_per_process_memory_fraction((here.total_bytes - CUDA_CONTEXT_BYTES) / turing.total_bytes)
    in_ram = filled.memory.offload_embeddings == "on"
    peak, planned = run_peak(run, lambda: take_step(run), embeddings_in_ram=in_ram), planned_peak(plan.account)
    reserved, measured = (peak.reserved_bytes or 0) + CUDA_CONTEXT_BYTES, peak.tensor_bytes
    with capsys.disabled():
        print(
            f"\n{length} tokens: tensors {measured / GIB:.3f} GiB, {planned.tensor_bytes / GIB:.3f} planned; reserved"
        )
        print(f"with the context {reserved / GIB:.3f}, {plan.account.card_bytes / GIB:.3f} planned, {gib} there")
    # The allocator counts workspaces of cuBLAS, two of 8 MiB, which the plan has in the context.
    assert 0.97 * planned.tensor_bytes <= measured <= 1.03 * planned.tensor_bytes + 2 * 8.1 * 2**20
    assert not run.events  # no step ran out of memory and was cut smaller
