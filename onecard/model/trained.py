"""What a run trains, an adapter over the frozen base or the base's own weights: made, saved, put back, described.

The one place that tells the two apart; training, planning and answering ask here.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from onecard.config.given_paths import is_tuned_model, trained_weights_in
from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError
from onecard.model import full_tuning
from onecard.model.lora import adapter
from onecard.model.lora.formats import ADAPTER_PREFIX, average_adapters
from onecard.model.lora.peft_model import unwrap


def make_trainable(
    model: Any, options: LoraOptions, *, new_ids: list[int] | None = None, gives_reward: bool = False
) -> Any:
    """The frozen base made ready for training, by `add_lora` or `tune_base`. Raises ModelError and ConfigError."""
    return (
        full_tuning.tune_base(model, options)
        if options.tunes_base
        else adapter.add_lora(model, options, new_ids=new_ids, gives_reward=gives_reward)
    )


def has_adapter(model: Any) -> bool:
    """Whether an adapter is trained or answers, and the base is frozen under it."""
    return not isinstance(model, PreTrainedModel)


def base_of(model: Any) -> Any:
    """The base model, without an adapter around it."""
    return unwrap(model).get_base_model() if has_adapter(model) else model


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """Switch the adapter off, where there is one."""
    disabled: Any = model.disable_adapter() if has_adapter(model) else nullcontext()
    return disabled


def save_trained(model: Any, directory: Path) -> None:
    """Write what is trained into a checkpoint. Raises ModelError where it must not be written."""
    (adapter.save_adapter if has_adapter(model) else full_tuning.save_tuned)(model, directory)


def restore_trained(model: Any, directory: Path) -> None:
    """Put what `save_trained` wrote back, bit for bit, in place. Raises ModelError where it does not fit."""
    (adapter.restore_adapter if has_adapter(model) else full_tuning.restore_tuned)(model, directory)


def describe_trained(model: Any) -> str:
    """One line: how many weights are trained, of how many, and where."""
    return (adapter.describe_trainable if has_adapter(model) else full_tuning.describe_tuned)(model)


def load_trained(model: Any, source: str, fingerprint: str | None = None, scale: float = 1.0) -> adapter.LoadedAdapter:
    """Put what a run has trained on its base, for answers, `scale` times as strongly. Raises ModelError where it does
    not fit, ConfigError where it cannot be scaled.

    A whole model is its own base: nothing is put on it.
    """
    is_tuned, weights = is_tuned_model(Path(source)), trained_weights_in(Path(source))
    if scale != 1 and (is_tuned or weights is not None):
        raise ConfigError(
            "--adapter_scale", f"{source} trained weights of the base itself, and has no adapter to scale"
        )
    if is_tuned:
        return adapter.LoadedAdapter(model, [])
    if weights is not None:
        full_tuning.load_tuned(model, source)
        return adapter.LoadedAdapter(model, [])
    return adapter.load_adapter(model, source, trainable=False, fingerprint=fingerprint, scale=scale)


def write_result(model: Any, checkpoints: Sequence[Path], directory: Path) -> None:
    """Write what a run directory ends with: the adapter, or the whole model, of a checkpoint or the mean of several."""
    if not has_adapter(model):
        full_tuning.write_tuned_model(model, checkpoints, directory)
        return
    for file in checkpoints[-1].iterdir():
        if file.name.startswith(ADAPTER_PREFIX):
            shutil.copyfile(file, directory / file.name)
    if len(checkpoints) > 1:
        average_adapters(checkpoints, directory)
