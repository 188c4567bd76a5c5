"""Engines of a training step, plain, sharded and DeepSpeed: backward, and the step that ends it.

DeepSpeed clips, steps and zeroes gradients inside its own engine (`deepspeed_engine.py`); everywhere else accelerate's
optimizer does. The loop sees one interface. Knows nothing of data or checkpoints.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import distributed


class TrainingEngine:
    """Backward and step through accelerate: one process or several, with or without the fp16 scaler.

    Several processes add up their gradients once, when all of a step's are gathered: a process whose memory runs out
    before can then say so, while in DistributedDataParallel the others would wait for it for ever, and the buffers of
    that, as large as the gradients, are not needed.
    """

    can_repeat = True
    """Gradients can be forgotten, and gathered again."""
    needs_every_turn = False
    """Each process has to run as many micro-batches as the others."""

    def __init__(self, accelerator: Any, model: torch.nn.Module, optimizer: Any, max_grad_norm: float) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.max_grad_norm = max_grad_norm or math.inf

    @property
    def scaler(self) -> Any:
        """The fp16 loss scaler, or None where the number format needs none."""
        return getattr(self.accelerator, "scaler", None)

    @property
    def has_scaler(self) -> bool:
        """Whether a gradient that overflows is normal: the fp16 scaler leaves the step out and lowers its scale."""
        return self.scaler is not None

    def whole_weights(self, *, written: bool = False) -> AbstractContextManager[Any]:
        """Where every trained weight is whole, as it always is here; written: new values are put there."""
        return nullcontext()

    def gathering(self, is_last: bool) -> AbstractContextManager[Any]:
        """The context of one micro-batch."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Add the gradients of one micro-batch."""
        self.accelerator.backward(loss)

    def clip(self) -> float:
        """Add up the processes' gradients and scale them down to `max_grad_norm`; returns their norm before that."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.accelerator.num_processes > 1:
            _add_up(trained)
        return float(self.accelerator.clip_grad_norm_(trained, self.max_grad_norm))

    def step(self) -> bool:
        """Apply the gradients and forget them; True when the fp16 scaler left the step out."""
        scale = self._scale()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Not what accelerate says: a fused optimizer is called after an overflow, too, and leaves the step out itself.
        return self._scale() < scale

    def _scale(self) -> float:
        return float(self.scaler.get_scale()) if self.scaler is not None else 0.0

    def forget(self) -> None:
        """Drop the gradients gathered so far, and what the scaler has noted of them."""
        self.optimizer.zero_grad()
        if self.scaler is None:
            return
        before = self.scaler.state_dict()
        with suppress(AssertionError):  # where they were not unscaled yet
            self.scaler.update()  # the only public way to make it forget that they were
        self.scaler.load_state_dict(before)


class ShardedEngine(TrainingEngine):
    """The same where a base lies over the processes: each pass through a layer is an exchange between all of them."""

    can_repeat = False
    needs_every_turn = True


def _add_up(trained: list[torch.nn.Parameter]) -> None:
    """Sum the gradients over all processes, in place; a process that had nothing to compute adds zeros."""
    for parameter in trained:
        if parameter.grad is None:
            (parameter * 0).sum().backward()
    waiting = [distributed.all_reduce(parameter.grad, async_op=True) for parameter in trained]
    for work in waiting:
        work.wait()
