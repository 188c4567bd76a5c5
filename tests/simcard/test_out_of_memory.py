"""Memory runs out at each allocation of a step: the step is done again, bit for bit, or an error says what to do."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch

from benchmarks.random_models import random_base
from benchmarks.synthetic_run import build_run, random_samples
from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.lora import LoraOptions
from onecard.config.training import FinetuneConfig, MemoryOptions, TrainOptions
from onecard.errors import ModelError
from onecard.model.hardware import detect
from onecard.model.out_of_memory import give_back_memory
from onecard.train.run import Run
from onecard.train.step import take_step
from tests.simcard.card import Card

pytestmark = pytest.mark.simcard

SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
         "tie_word_embeddings": False}  # fmt: skip
LENGTH = 24  # so short that no limit can be made smaller: the second attempt is the same step


@pytest.fixture
def run(card: Card) -> Iterator[Run]:
    config = FinetuneConfig(
        ModelOptions("small", bits=4, gradient_checkpointing=True),
        DataOptions(cutoff_len=LENGTH),
        LoraOptions(lora_r=4, lora_target_modules="q_proj,down_proj", lora_dropout=0.1),
        TrainOptions(total_batch=2, micro_batch=1, max_steps=9, optimizer="adamw"),
        MemoryOptions(loss_chunk=8, offload_activations="on", pretend_turing=True),
    )
    turing = detect("cuda", pretend_turing=True)
    yield build_run(config, turing, random_base(SMALL, config.model, turing), random_samples([LENGTH] * 4, 128))
    gc.unfreeze()
    card.native.fail_after(0, -1)
    give_back_memory()


class Snapshot:
    """Weights, optimizer and scaler of a run, to be put back and compared."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.weights = [p.detach().clone() for p in self._trained()]
        self.optimizer = copy.deepcopy(run.optimizer.state_dict())
        self.scaler = copy.deepcopy(run.accelerator.scaler.state_dict())

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.run.plain_model.parameters() if p.requires_grad]

    def put_back(self) -> None:
        self.run.engine.forget()
        with torch.no_grad():
            for parameter, weight in zip(self._trained(), self.weights, strict=True):
                parameter.copy_(weight)
        self.run.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        self.run.accelerator.scaler.load_state_dict(self.scaler)
        self.run.n_failures = 0
        self.run.events.clear()

    def is_now(self) -> bool:
        """Bit for bit."""
        states = [[value for state in one["state"].values() for value in state.values()]
                  for one in (self.optimizer, self.run.optimizer.state_dict())]  # fmt: skip
        pairs = [*zip(self.weights, self._trained(), strict=True), *zip(*states, strict=True)]
        same = all(torch.equal(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()) for a, b in pairs)
        return len(pairs) > 4 and same and self.run.accelerator.scaler.state_dict() == self.scaler


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_each_allocation_of_a_step_may_fail(run: Run, card: Card, every: int) -> None:
    for _ in range(2):
        take_step(run)  # the optimizer has its state, the offload its buffers
    before = Snapshot(run)
    n_before = torch.cuda.memory_stats()["allocation.all.allocated"]
    loss = take_step(run).loss
    n_allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - n_before
    after = Snapshot(run)
    repeated, ended = 0, 0
    gc.freeze()  # each failure looks for cycles: not among all modules
    for number in range(0, n_allocations, every):
        before.put_back()
        assert before.is_now()
        card.native.fail_after(0, number)
        try:
            result = take_step(run)
        except ModelError as reason:
            assert "inside the optimizer" in str(reason) and "--head_bits 4" in str(reason), number
            ended += 1
        else:
            assert [event.row["event"] for event in run.events] == ["out_of_memory"], number
            assert result.loss == loss and after.is_now(), number
            repeated += 1
        card.native.fail_after(0, -1)
    assert n_allocations > 300 and repeated + ended == -(-n_allocations // every)
    assert repeated > 5 * ended > (0 if every == 1 else -1)
