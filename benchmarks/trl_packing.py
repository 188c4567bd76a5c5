"""TRL's SFTTrainer on the samples of `packing.py`, with packing and with padding: tokens per CPU second.

The same base with the same adapter in fp32, the same samples in the same order and as many to a step, and else TRL's
defaults. Its packing joins all rows of a micro-batch to one, as its kernels of FlashAttention want it; without these
attention is computed over all of that row. It knows nothing of this project's training.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.random_models import base_model
from onecard.config.base_model import DEFAULT_BASE, ModelOptions
from onecard.config.lora import LoraOptions
from onecard.data.batches import step_samples
from onecard.model.hardware import detect
from onecard.model.load import load_tokenizer
from onecard.model.lora.adapter import add_lora


class CpuClock(TrainerCallback):
    """CPU seconds from the end of the first step to that of the last one, and the losses."""

    begun = ended = 0.0

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        self.begun = 0.0

    def on_step_end(self, *given: Any, **more: Any) -> None:
        self.ended = time.process_time()
        self.begun = self.begun or self.ended

    def on_log(self, *given: Any, **more: Any) -> None:
        logs: dict[str, float] = more["logs"]
        self.losses += [logs["loss"]] if "loss" in logs else []


class TrlRun:
    """A trainer that takes the first steps of the samples again and again, its first one uncounted."""

    def __init__(self, options: Any, samples: Any, folder: Path, *, packing: bool, rows: int) -> None:
        """rows: of a micro-batch. A packed row holds several samples, so a step has fewer of them."""
        n_steps, batch = options.steps + 1, options.total_batch
        order = [step_samples(n, len(samples), batch, options.seed).indices for n in range(n_steps)]
        chosen = [samples[index] for indices in order for index in indices]
        data = Dataset.from_list([{"input_ids": one.input_ids, "labels": one.labels} for one in chosen])
        hardware = detect("cpu")
        base = base_model(ModelOptions(bits=32, gradient_checkpointing=False), hardware)
        settings = SFTConfig(
            output_dir=str(folder), per_device_train_batch_size=rows, max_steps=n_steps, logging_steps=1,
            gradient_accumulation_steps=1 if packing else batch // rows, learning_rate=1e-6, report_to=[],
            lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, bf16=False, use_cpu=True,
            gradient_checkpointing=False, packing=packing, max_length=options.cutoff_len,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        self.clock = CpuClock()
        self.trainer = SFTTrainer(model=add_lora(base.model, LoraOptions()), args=settings, train_dataset=data,
                                  callbacks=[self.clock], processing_class=load_tokenizer(DEFAULT_BASE))  # fmt: skip
        each = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        lengths = [len(ids) for ids in self.trainer.train_dataset["input_ids"]]
        # What is left at the end goes on with the first rows, as an epoch of the trainer does.
        self.n_tokens = sum(lengths[number % len(lengths)] for number in range(each, each * n_steps))

    def speed(self) -> float:
        """Tokens of samples per CPU second."""
        self.trainer.train()
        return self.n_tokens / (self.clock.ended - self.clock.begun)
