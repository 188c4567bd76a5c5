"""The one place that differs between plain training and DeepSpeed: backward, and the step that ends it.

DeepSpeed clips, steps and zeroes gradients inside its own engine (`deepspeed_engine.py`); everywhere else accelerate's
optimizer does. The loop sees one interface. Knows nothing of data or checkpoints.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch


class Engine:
    """Backward and step through accelerate: one process, DDP, with or without the fp16 scaler."""

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

    def gathering(self, is_last: bool) -> Any:
        """The context of one micro-batch: gradients are exchanged between processes only with the last one."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Add the gradients of one micro-batch."""
        # DDP averages gradients over processes; the step's loss is a sum over them.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self) -> float:
        """Scale the gradients down to `max_grad_norm`; returns their norm before that."""
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))

    def step(self) -> bool:
        """Apply the gradients and forget them; True when the fp16 scaler left the step out."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.has_scaler and bool(self.optimizer.step_was_skipped)

    def forget(self) -> None:
        """Drop the gradients gathered so far."""
        self.optimizer.zero_grad()
