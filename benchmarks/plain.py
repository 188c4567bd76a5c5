"""Plain Hugging Face QLoRA, the way that most people train: what the benchmarks compare with.

A loop like the Trainer's: rows in the order of the data, padded to the longest of each micro-batch, a mask per row, the
model's own loss over all logits, scaled by the tokens of the whole step. The adapters, the optimizer and the learning
rate are those of our runs, so that both compute the same numbers.
https://huggingface.co/docs/peft/developer_guides/quantization  https://huggingface.co/docs/transformers/trainer
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.synthetic_run import Samples
from onecard.config.training import FinetuneConfig
from onecard.data.batches import collate, step_samples
from onecard.model.hardware import Hardware
from onecard.model.load import LoadedBase
from onecard.model.lora.adapter import add_lora
from onecard.train.build import build_accelerator
from onecard.train.optim import build_optimizer

HALF = (torch.float16, torch.bfloat16)


@dataclass
class PlainRun:
    """Everything that the plain loop needs."""

    config: FinetuneConfig
    model: Any
    optimizer: Any
    accelerator: Any
    samples: Samples
    rows: int
    """per_device_train_batch_size of the Trainer."""

    def step(self, number: int) -> float:
        """One optimizer step over the samples of step `number`; its loss per supervised token."""
        total = torch.zeros((), device=self.accelerator.device)
        indices = self.chosen(number)
        n_supervised = int(self.samples.units[indices].sum())
        for micro in self.micros(indices):
            rows = [self.samples[i] for i in micro]
            batch = {name: t.to(self.accelerator.device) for name, t in collate(rows, pad_id=0).items()}
            with self.accelerator.autocast():
                loss = self.model(**batch, use_cache=False, num_items_in_batch=n_supervised).loss
            self.accelerator.backward(loss)
            total += loss.detach()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.accelerator.clip_grad_norm_(trained, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def chosen(self, number: int) -> np.ndarray:
        """The samples of step `number`: the same as our runs take."""
        options = self.config.train
        return step_samples(number, len(self.samples), options.total_batch, options.seed).indices

    def micros(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """The step's samples as they come, `rows` at a time."""
        for start in range(0, len(indices), self.rows):
            yield indices[start : start + self.rows]


def build_plain(
    config: FinetuneConfig, hardware: Hardware, base: LoadedBase, samples: Samples, *, rows: int, upcast: bool = True
) -> PlainRun:
    """The plain loop over a base that was made with `gradient_checkpointing` off; `upcast`: as peft prepares it."""
    accelerator = build_accelerator(config, hardware, str(base.model.config.model_type))
    if upcast:
        upcast_like_peft(base.model)
    enable = getattr(base.model, "activation_checkpointing_enable", None) or base.model.gradient_checkpointing_enable
    enable()
    torch.manual_seed(config.train.seed)
    model = add_lora(base.model, config.lora)
    base.model.enable_input_require_grads()
    optimizer = build_optimizer(model, config.train)
    prepared, stepper = accelerator.prepare_model(model), accelerator.prepare(optimizer)
    prepared.train()
    return PlainRun(config, prepared, stepper, accelerator, samples, rows)


def upcast_like_peft(model: nn.Module) -> None:
    """Turn every 16-bit weight that is not quantised into fp32, as peft's `prepare_model_for_kbit_training` does.

    Written again here because only `model/lora` imports peft; a test compares the two. Tied weights stay
    tied.
    """
    wide: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype in HALF and type(parameter).__name__ != "Params4bit":
                key = id(parameter)
                wide.setdefault(key, nn.Parameter(parameter.detach().float(), requires_grad=False))
                module.register_parameter(name, wide[key])
