"""Memory runs out at each allocation of a step: the step is done again, bit for bit, or an error says what to do."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_models import random_base
from benchmarks.synthetic_run import build_run, random_samples
from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.errors import ModelError
from onecard.model.hardware import detect
from onecard.model.out_of_memory import give_back_memory
from onecard.recipes import finetune
from onecard.train import build, step
from onecard.train.run import Run
from onecard.train.step import make_room, take_step
from tests import tiny
from tests.simcard.card import Card

pytestmark = pytest.mark.simcard

SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
         "tie_word_embeddings": False}  # fmt: skip
LENGTH = 24  # so short that no limit can be made smaller: the second attempt is the same step


@pytest.fixture
def run(card: Card, request: pytest.FixtureRequest) -> Iterator[Run]:
    """With all layers on the card, or of three that pass through it."""
    where = getattr(request, "param", "off")
    config = FinetuneConfig(
        ModelOptions("small", bits=4, gradient_checkpointing=True, stream_layers=where),
        DataOptions(cutoff_len=LENGTH),
        LoraOptions(lora_r=4, lora_target_modules="q_proj,down_proj", lora_dropout=0.1),
        TrainOptions(total_batch=2, micro_batch=1, max_steps=9, optimizer="adamw"),
        MemoryOptions(loss_chunk=8, offload_activations="on", pretend_turing=True),
    )
    turing, base = detect("cuda", pretend_turing=True), SMALL | {"num_hidden_layers": 3 if where == "on" else 1}
    yield build_run(config, turing, random_base(base, config.model, turing), random_samples([LENGTH] * 4, 128))
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


def _places(run: Run) -> list[int]:
    """Where the frozen weights lie: those of layers that pass through, in their slots."""
    return [p.data_ptr() for p in run.plain_model.parameters() if not p.requires_grad]


@pytest.mark.parametrize(("run", "every"), [
    ("off", 25), pytest.param("off", 1, marks=pytest.mark.slow),
    ("on", 211), pytest.param("on", 1, marks=pytest.mark.slow),  # 1,360 allocations
], indirect=["run"])  # fmt: skip
def test_each_allocation_of_a_step_may_fail(run: Run, card: Card, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many allocations fail one after the other as a step is tried again for: a step is dear, and each is tried."""
    for _ in range(2):
        take_step(run)  # the optimizer has its state, the offload its buffers
    before, places = Snapshot(run), _places(run)
    n_before = torch.cuda.memory_stats()["allocation.all.allocated"]
    loss = take_step(run).loss
    n_allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - n_before
    after = Snapshot(run)
    held, repeated, ended = torch.cuda.memory_allocated(), 0, 0
    waiting: list[int] = []

    def let_the_next_fail() -> None:
        card.native.fail_after(0, waiting.pop(0) if waiting else -1)

    def made_room(*args: Any) -> None:
        make_room(*args)
        let_the_next_fail()

    monkeypatch.setattr(step, "make_room", made_room)
    gc.freeze()  # each failure looks for cycles: not among all modules
    left = list(range(0, n_allocations, every))
    while left:
        before.put_back()
        assert before.is_now()
        waiting = left[: step.MAX_FAILURES]
        let_the_next_fail()
        try:
            result = take_step(run)
        except ModelError as reason:
            assert "inside the optimizer" in str(reason) and "--head_bits 4" in str(reason), left[0]
            ended += 1
        else:
            assert not waiting and result.loss == loss and after.is_now(), left[0]
            assert _places(run) == places and torch.cuda.memory_allocated() == held, left[0]
            assert len(run.events) == min(step.MAX_FAILURES, len(left))
        card.native.fail_after(0, -1)
        assert {event.row["event"] for event in run.events} <= {"out_of_memory"}
        repeated += len(run.events)
        left = left[min(step.MAX_FAILURES, len(left)) - len(waiting) :]
    assert n_allocations > 300 and repeated + ended == -(-n_allocations // every)
    assert repeated > 5 * ended > (0 if every == 1 else -1)


@pytest.mark.parametrize("every", [67, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["off", "on"])
def test_each_allocation_while_a_run_is_built_may_fail(
    where: str, every: int, card: Card, tiny_base: Path, instructions: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tiny.config_for(
        tiny_base, instructions, tmp_path / "run", device="cuda", bits=4, dtype="fp16", max_steps=1,
        gradient_checkpointing=True, stream_layers=where, head_bits="8", offload_embeddings="on",
    )  # fmt: skip
    real, n_allowed, n_taken = build.build_run, -1, 0

    def counted(*args: Any) -> Run:
        nonlocal n_taken
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        card.native.fail_after(0, n_allowed)
        try:
            return real(*args)
        finally:
            card.native.fail_after(0, -1)
            n_taken = torch.cuda.memory_stats()["allocation.all.allocated"] - before

    monkeypatch.setattr(build, "build_run", counted)
    finetune(config)
    n_allocations = n_taken
    for n_allowed in range(0, n_allocations, every):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with pytest.raises(ModelError, match=r"out of memory on|do not fit on|does not fit on") as told:
            finetune(config)
        assert "fewer --bits" in str(told.value), n_allowed
    assert n_allocations > 100
