"""The parts of one run, and the events that its steps report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from onecard.config.run import TrainOptions
from onecard.model.divergence import BaseStates
from onecard.model.lora.rank_allocation import RankAllocation
from onecard.model.memory.plan import RECOMPUTE, Plan
from onecard.model.memory_saving.activation_offload import ActivationOffload
from onecard.objectives.base import Objective
from onecard.objectives.registry import objective_named
from onecard.train.accelerator import ShardedEngine, TrainingEngine
from onecard.train.checkpoint import CheckpointStore
from onecard.train.deepspeed_engine import DeepSpeedEngine
from onecard.train.end_by_clock import EndByClock
from onecard.train.evaluate import EvaluationLimits
from onecard.train.oom import MicroBatchLimits
from onecard.train.state import OPTIMIZER_NAME, RANKS_NAME, TrainerState
from onecard.train.trackers import Reporter


@dataclass(frozen=True)
class RunEvent:
    """Something to report once: a row of log.jsonl, and words."""

    row: dict[str, Any]
    message: str


@dataclass(frozen=True)
class HeldOutSources:
    """The sources of held-out samples: parts int (n,) into `names`."""

    names: Sequence[str]
    parts: np.ndarray


@dataclass
class Run:
    """Everything that one run is made of. The recipe fills it; `train` uses it up."""

    options: TrainOptions
    model: Any
    """The adapter over the base, as accelerate prepared it."""
    plain_model: Any
    """The same without a wrapper: what is saved."""
    optimizer: Any
    accelerator: Any
    train_samples: Any
    """A sequence of the objective's samples, with `lengths` and `units` arrays of the same order."""
    test_samples: Any
    """The same of held-out ones, with `lengths`, or a list of them."""
    store: CheckpointStore
    state: TrainerState = field(default_factory=TrainerState)
    limits: MicroBatchLimits = field(default_factory=MicroBatchLimits)
    """How much passes through the model at once; smaller after memory ran out."""
    offload: ActivationOffload | None = None
    """Where the layers' inputs wait, if they do."""
    evaluation_limits: EvaluationLimits = field(default_factory=EvaluationLimits)
    """What does not fit in evaluation."""
    plan: Plan | None = None
    """What was planned for this start, with the card that it is for."""
    clock: EndByClock | None = None
    """Ends the run by a time."""
    events: list[RunEvent] = field(default_factory=list)
    """What happened and has not been reported yet."""
    ranks: RankAllocation | None = None
    """What cuts the ranks of AdaLoRA."""
    rollouts: Any = None
    """A `rollouts.Rollouts` where the samples of a step are answers that are sampled for it."""
    test_sources: HeldOutSources | None = None
    """Where the held-out samples are from, if there are several sources."""
    forgetting_rows: Sequence[Sequence[int]] = ()
    """Token ids of the texts on which forgetting is measured at each evaluation; none: it is not."""
    base_states: BaseStates = field(default_factory=BaseStates)
    """What the base was asked for that."""
    knows_noise: bool = False
    """Whether what rounding gives of that was said in this start."""
    anchor: Any = None
    """An `anchor.Anchor` where each step also learns to stay near the base."""
    control: Any = None
    """A `run_control.RunControl` where others may ask something of the run while it goes on."""
    n_failures: int = 0
    """Times that memory ran out in the present step, at limits that could not be made smaller."""

    @property
    def objective(self) -> Objective:
        """What is learned from the samples."""
        return objective_named(self.options.objective).with_options(self.options)

    @cached_property
    def engine(self) -> TrainingEngine | DeepSpeedEngine:
        """Backward and step, plain or through DeepSpeed."""
        if self.options.deepspeed:
            return DeepSpeedEngine(self.accelerator, self.model, self.optimizer)
        engine = ShardedEngine if self.options.shard else TrainingEngine
        return engine(self.accelerator, self.model, self.optimizer, self.options.max_grad_norm)

    @property
    def training(self) -> dict[str, Any]:
        """What a checkpoint holds besides the adapter, by file name."""
        scaler = self.engine.scaler
        others = {"scaler.pt": scaler, RANKS_NAME: self.ranks}
        return {OPTIMIZER_NAME: self.optimizer, **{name: held for name, held in others.items() if held is not None}}

    @property
    def may_recompute(self) -> bool:
        """Whether layers may be recomputed when memory runs out: where they can, unless it was switched off by hand."""
        if self.plan is None or not self.plan.model.checkpoints:
            return False
        return any(choice.flag == RECOMPUTE and not choice.by_hand for choice in self.plan.choices)

    @property
    def planned_bytes(self) -> int:
        """What the plan said the card would hold at most."""
        return self.plan.account.card_bytes if self.plan is not None else 0

    def samples_of_step(self, indices: np.ndarray) -> tuple[Any, np.ndarray]:
        """What is learned in a step with these samples, and the numbers of its samples in that."""
        if self.rollouts is None:
            return self.train_samples, indices
        sampled = self.rollouts.of_step(self, indices)
        return sampled, np.arange(len(sampled))

    def records(self, indices: np.ndarray) -> list[str]:
        """The names of samples, as a person finds them in the data."""
        return [self.train_samples[int(i)].record for i in indices]


def report_events(run: Run, reporter: Reporter) -> None:
    """Report what happened since the last time, each event once."""
    while run.events:
        event = run.events.pop(0)
        reporter.event(event.row, event.message)
