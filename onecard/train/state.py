"""What a checkpoint holds besides the adapter, and how it is put back: bit for bit.

The order of the data, the learning rate and dropout are pure functions of (seed, step), so there is no sampler state
and no generator state to lose: `TrainerState.step` is the whole position. This module knows what goes into the files;
`checkpoint.py` knows how they reach the disk whole.
"""

from __future__ import annotations

import json
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onecard.config.run import TrainOptions
from onecard.console import warn
from onecard.errors import CheckpointError, ConfigError
from onecard.model.trained import restore_trained, save_trained
from onecard.train.optim import with_present_options

STATE_NAME, OPTIMIZER_NAME, RANKS_NAME = "trainer_state.json", "optimizer.pt", "rank_allocation.pt"


@dataclass
class TrainerState:
    """The position of a run, and what it was a run of."""

    step: int = 0
    """Optimizer steps done."""
    tokens_seen: int = 0
    """Supervised and unsupervised tokens that went through the model, padding excluded."""
    skipped_steps: int = 0
    """Steps that the fp16 scaler left out because a gradient overflowed; a few at the start are normal."""
    best_step: int | None = None
    """Step of the lowest evaluation loss so far."""
    best_loss: float | None = None
    """That loss."""
    balanced_step: int | None = None
    """Step of the lowest sum of evaluation loss and forgetting so far, where that is asked for."""
    balanced_sum: float | None = None
    """That sum."""
    evaluations_since_best: int = 0
    """By --eval_steps: how many in a row found nothing lower of what --stop_on names."""
    total_steps: int = 0
    """Steps that the whole run was planned for; the schedule depends on it."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """Of `tokens_seen`, those of each source of a mixture, by name."""
    seconds: float = 0.0
    """Wall time of its starts, where the clock ends it."""
    clock: str = ""
    """The option by which total_steps was cut to what fits, such as --finish_by 07:00."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What must not change between the parts of one run; see `differences`."""
    choices: dict[str, Any] = field(default_factory=dict)
    """What the first plan chose and the run keeps: the optimizer and the head's bits."""


def seed_step(seed: int, step: int, process: int) -> None:
    """Make dropout a function of (seed, step, process) alone, whatever ran before in this process."""
    mixed = int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])
    random.seed(mixed)
    torch.manual_seed(mixed)


def write_state(directory: Path, model: Any, training: dict[str, Any], state: TrainerState) -> None:
    """Write one checkpoint's files: the adapter, the state and what belongs to `training` by file name.

    Args:
        training: stored states, such as ``{"optimizer.pt": optimizer.state_dict()}``.
    """
    save_trained(model, directory)
    for name, stored in training.items():
        torch.save(stored, directory / name)
    write_position(directory, state)


def write_position(directory: Path, state: TrainerState) -> None:
    """The part of a checkpoint that `read_state` reads."""
    text = json.dumps(asdict(state), indent=2, ensure_ascii=False)
    (directory / STATE_NAME).write_text(text, encoding="utf-8")


def read_state(directory: Path) -> TrainerState:
    """The position stored in a checkpoint. Raises CheckpointError where it has none."""
    path = directory / STATE_NAME
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(TrainerState)}
        return TrainerState(**{name: value for name, value in stored.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError) as reason:
        raise CheckpointError(
            f"{path} cannot be read ({reason}). To train on from these weights in a new run: --init_adapter {directory}"
        ) from reason


def restore_state(
    directory: Path, model: Any, training: dict[str, Any], options: TrainOptions,
    weights: AbstractContextManager[Any] | None = None,
) -> None:  # fmt: skip
    """Put a checkpoint's adapter and `training` objects back, bit for bit. Raises CheckpointError on what is missing.

    weights: where the model's weights can be written, if they lie over several processes.

    The optimizer keeps the hyper-parameters that the present options gave it. A missing or unreadable optimizer file is
    an error: going on with an empty one would silently be another run.
    """
    with weights or nullcontext():
        restore_trained(model, directory)
    for name, holder in training.items():
        path = directory / name
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if name == OPTIMIZER_NAME:
                stored = with_present_options(stored, holder, options)
            holder.load_state_dict(stored)
        except ConfigError:
            raise
        except FileNotFoundError as reason:
            if name == "scaler.pt":
                # A run begun in bf16 or fp32 has no scaler; a fresh one finds its scale within some steps.
                warn(f"{directory} has no scaler.pt; the fp16 scaler starts anew")
                continue
            raise CheckpointError(f"{path} is missing. {_new_run_hint(directory)}") from reason
        except Exception as reason:  # torch.load raises many kinds; each means that the state cannot be used
            raise CheckpointError(f"{path} cannot be used ({reason}). {_new_run_hint(directory)}") from reason


def differences(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The parts of a run's identity that changed, by name, with their (stored, present) values."""
    return {name: (stored.get(name), value) for name, value in now.items() if stored.get(name) != value}


def _new_run_hint(directory: Path) -> str:
    return f"To start a new run from its weights: --init_adapter {directory}"
