"""A reward model that judges answers: the number that finetune --objective reward has taught it to give a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from onecard.config.base_model import ModelOptions
from onecard.console import warn
from onecard.data.batches import micro_batches
from onecard.data.encode import DroppedSample, EncodeSettings, LabelledSample, encode_sample
from onecard.data.messages import Conversation, Turn
from onecard.data.pairs import GoodOrBadEncoder
from onecard.errors import ConfigError
from onecard.inference.batch.evaluate import MICRO_TOKENS, UNLIMITED
from onecard.inference.generate import longest_sequence
from onecard.inference.load import adapter_fingerprint, base_path, load_tokenizer_and_template
from onecard.inference.run_files import stored_options, trained_bits, trained_objective
from onecard.model.answer_bits import with_answer_bits
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.model.lora.adapter import load_adapter
from onecard.model.lora.formats import adapter_scaling
from onecard.model.reward_head import rewards
from onecard.objectives.reward import collate_rows


class RewardModel:
    """The model of a run, loaded with its own base, tokenizer and template."""

    def __init__(self, run: str, options: ModelOptions) -> None:
        """options: only where it lies in memory counts. Raises ConfigError for a run of another kind, ModelError."""
        if (objective := trained_objective(run)) != "reward":
            raise ConfigError("--reward", f"{run} was trained for {objective}, and a reward model is needed (finetune "
                              "--objective reward)")  # fmt: skip
        base = base_path(str(stored_options(run).get("model_path", "auto")), run)
        options = replace(options, model_path=base, gradient_checkpointing=False, stream_layers="off",
                          rope_scaling=adapter_scaling(run))  # fmt: skip
        self._tokenizer, self._template = load_tokenizer_and_template(options, run, "auto")
        hardware = detect(options.device)
        loaded = load_base(with_answer_bits(options, hardware, trained_bits(run)), hardware, gptq=True)
        adapter = load_adapter(loaded.model, Path(run).expanduser(), trainable=False, fingerprint=loaded.fingerprint,
                               gives_reward=True)  # fmt: skip
        for note in adapter.notes:
            warn(note)
        self._model = adapter.model.eval()
        self._settings = EncodeSettings(longest_sequence(adapter.model) or UNLIMITED, train_on="last")
        self.fingerprint = adapter_fingerprint(adapter.model)

    def rewards(self, asked: Sequence[tuple[tuple[Turn, ...], str]]) -> list[float | None]:
        """The reward of each (turns, answer); None for an answer that cannot be read, such as one that is too long."""
        rows = [self._row(*each) for each in asked]
        found: list[float | None] = [None] * len(rows)
        places = np.array([place for place, row in enumerate(rows) if row is not None], dtype=np.int64)
        lengths = np.array([len(row.input_ids) if row is not None else 0 for row in rows])
        with torch.inference_mode():
            for micro in micro_batches(places, lengths, micro_tokens=MICRO_TOKENS) if len(places) else []:
                batch = collate_rows([row for place in micro if (row := rows[place]) is not None])
                batch = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
                for place, reward in zip(micro, rewards(self._model, batch).tolist(), strict=True):
                    found[place] = reward
        return found

    def _row(self, turns: tuple[Turn, ...], answer: str) -> LabelledSample | None:
        """The ids of a conversation that ends with this answer, as those of a pair were in training."""
        conversation = Conversation((*turns, Turn("assistant", answer)), "an answer", label=True)
        coded = encode_sample(conversation, self._template, self._tokenizer, self._settings, encoder=GoodOrBadEncoder)
        return None if isinstance(coded, DroppedSample) else coded[0]
