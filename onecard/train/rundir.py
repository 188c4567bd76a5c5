"""The directory of one run: what is in it, and how it is kept complete enough to resume, chat and export from.

adapter_model.safetensors adapter_config.json   the trained adapter, plain PEFT files (when the run has ended)
model.safetensors config.json                   in its place the whole model, of --peft_method full and freeze:N
tokenizer files, chat_template.jinja            how text becomes ids; the prompt of training, chat and export
onecard.yaml                                    the resolved options
trainer_state.json manifest.json                where the run ended and what it was a run of; sizes and hashes
log.jsonl loss.png                              what happened on the way
evaluation/before evaluation/after              reports of --eval_suites
base_comparison.json advice.json                whether it helped, and what the figures say of the run
server_check.json                               some answers of the result, to compare servers with
control/                                        requests to the run while it goes on; see control.py
questions.jsonl rollouts.jsonl                  what its model answered on the way
checkpoint-N/                                   see checkpoint.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from onecard import manifest
from onecard.config.data import data_portions
from onecard.config.given_paths import is_tuned_model
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.console import quiet_rank, say, warn
from onecard.data.built_in_templates import BUILT_IN
from onecard.data.dataset_info import names_in
from onecard.storage import move
from onecard.train.checkpoint import CheckpointStore
from onecard.train.control_folder import ControlFolder, open_control
from onecard.train.run_lock import RunLock
from onecard.train.state import STATE_NAME, TrainerState

OPTIONS_NAME, TEMPLATE_NAME = "onecard.yaml", "chat_template.jinja"
# Options that may name a file or a directory, and their values that never do.
PATHS = ("model_path", "data_path", "prompt_type", "cache_path", "output_path", "resume_from_checkpoint",
         "init_adapter", "lora_remote_checkpoint", "deepspeed", "ask_file")  # fmt: skip
WORDS = ("auto", "none", *BUILT_IN)


def portable(config: FinetuneConfig) -> FinetuneConfig:
    """The config with what lies on this machine by absolute path, so that it means the same in every folder.

    Hub ids and names stay.
    """

    def moved(group: Any) -> Any:
        values = {f.name: getattr(group, f.name) for f in fields(group) if f.name in PATHS}
        found = {name: _absolute(value) for name, value in values.items() if value is not None}
        return replace(group, **found)

    folder = Path(str(config.data.data_path)).expanduser()
    named = [
        f"{portion.name if _is_in(folder, portion.name) else _absolute(portion.name)}{portion.suffix}"
        for portion in data_portions(config.data.data)
    ]
    data = replace(moved(config.data), data=named or config.data.data)
    return replace(config, model=moved(config.model), data=data, train=moved(config.train))


def _is_in(folder: Path, name: str) -> bool:
    """Whether a name of --data is one of the folder --data_path, wherever else it is too."""
    return folder.is_dir() and ((folder / name).exists() or name in names_in(folder))


def _absolute(value: Any) -> Any:
    """A path, or each of several; an empty text is none, though Path("") is the folder that one is in."""
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    path = Path(value).expanduser()
    return value if value in ("", *WORDS) or not path.exists() else str(path.absolute())


@dataclass(frozen=True)
class RunSettings:
    """What a run directory tells about itself from its first minute on."""

    options_yaml: str
    tokenizer: Any
    template_jinja: str

    def write(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)
        # After the tokenizer's files: its own template must not be the one that is found here.
        (directory / TEMPLATE_NAME).write_text(self.template_jinja, encoding="utf-8", newline="")
        (directory / OPTIONS_NAME).write_text(self.options_yaml, encoding="utf-8")


class RunDirectory:
    """One run's directory. Only the first process of several writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = CheckpointStore(path)

    def locked(self) -> AbstractContextManager[Any]:
        """Hold the directory for this run; raises CheckpointError when another run has it."""
        return nullcontext() if quiet_rank() else RunLock(self.path)

    def control(self) -> AbstractContextManager[ControlFolder]:
        """What others may ask of the run that holds this directory."""
        return open_control(None if quiet_rank() else self.path)

    def write_settings(self, settings: RunSettings) -> None:
        """Put tokenizer, template and options in place, so that even a killed run can be chatted with."""
        if quiet_rank():
            return
        partial = self.path / ".settings.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            settings.write(partial)
            for file in sorted(partial.iterdir()):
                move(file, self.path / file.name)
        except OSError as reason:
            warn(f"the settings could not be written to {self.path} ({reason}); they follow at the end")
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def publish(
        self, settings: RunSettings, state: TrainerState, options: TrainOptions,
        write_result: Callable[[Sequence[Path], Path], None],
    ) -> None:  # fmt: skip
        """Put the weights of --final_weights and all else that the directory promises in place.

        write_result: writes those of a checkpoint, or the mean of several, into a directory.
        The manifest with the hashes comes last. Raises CheckpointError when that cannot be written: then the run has
        not succeeded.
        """
        if quiet_rank():
            return
        if manifest.problems(self.path, sizes_only=True):  # no result yet: starts killed before a rotation left more
            self.store.rotate(state.step, (state.best_step, state.balanced_step), options.n_kept)
        best = {"best": state.best_step, "balanced": state.balanced_step}.get(options.final_weights)
        step = state.step if best is None else best
        averaged = self.store.newest_steps(options.n_averaged)
        taken = [self.path / f"checkpoint-{number}" for number in averaged or [step]]

        def write(directory: Path) -> None:
            write_result(taken, directory)
            settings.write(directory)
            shutil.copyfile(self.path / f"checkpoint-{step}" / STATE_NAME, directory / STATE_NAME)

        self.store.publish(write)
        which = f"the mean of steps {', '.join(map(str, averaged))}" if averaged else f"step {step}"
        say(f"{'model' if is_tuned_model(self.path) else 'adapter'} of {which} saved in {self.path}")
        if options.final_weights == "balanced" and state.balanced_sum is not None:
            say(f"there the sum of evaluation loss and forgetting was lowest: {state.balanced_sum:.4f}")
        if state.best_step is not None and state.best_step != step:
            lowest = f"the lowest evaluation loss was {state.best_loss:.4f}"
            if options.objective == "grpo":  # by the reward, negated
                lowest = f"the highest mean reward of held-out prompts was {-(state.best_loss or 0):.4f}"
            say(f"{lowest} at step {state.best_step}: checkpoint-{state.best_step}")
