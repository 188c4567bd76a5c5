"""The loss on held-out rows, computed exactly as in training, without gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from onecard.model.loss import summed_loss
from onecard.text.batches import collate, micro_batches, share_for_rank
from onecard.text.encode import Encoded


def evaluation_loss(model: torch.nn.Module, samples: list[Encoded], accelerator: Any, **limits: int) -> float:
    """Mean cross-entropy in nats per supervised token over `samples`; the same number on every process.

    Args:
        model: any causal LM, wrapped or not; it is put back into training mode if it was in it.
        samples: encoded held-out rows.
        accelerator: moves the batches and sums over processes.
        limits: `micro_batch` and `micro_tokens`, as in training.
    """
    was_training = model.training
    model.eval()
    lengths = np.array([len(sample.input_ids) for sample in samples])
    micros = micro_batches(np.arange(len(samples)), lengths, **limits)
    mine = share_for_rank(micros, accelerator.process_index, accelerator.num_processes, lengths)
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for micro in mine:
            if micro is None:
                continue
            batch = collate([samples[i] for i in micro], pad_id=0)
            loss_sum, supervised = summed_loss(model, {k: v.to(accelerator.device) for k, v in batch.items()})
            total += torch.tensor([float(loss_sum), supervised], dtype=torch.float64)
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
    model.train(was_training)
    return float(total[0] / total[1])
