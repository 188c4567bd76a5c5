"""Where a run begins: anew or from a checkpoint, and whether that checkpoint belongs to the same run.

What makes two starts parts of one run is its identity; whatever else is changed between them is used from the next step
on and told, or refused by the name of its flag. Knows options and checkpoints; does not load a model.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from onecard.config import parsing as cli
from onecard.config.given_paths import foreign_advice, is_tuned_model, newest_checkpoints
from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.console import quiet_rank, say, warn
from onecard.errors import CheckpointError, ConfigError
from onecard.installation import command
from onecard.model.files import base_fingerprint
from onecard.model.lora.formats import find_config, kept_fingerprint, other_base, read_config
from onecard.train.checkpoint import FoundCheckpoint, verify
from onecard.train.end_by_clock import clock_option
from onecard.train.rundir import OPTIONS_NAME, RunDirectory
from onecard.train.state import TrainerState, differences, read_state, write_position
from onecard.train.trackers import read_log

GONE_BACK_NAME = "gone_back_to.txt"
# The options behind each part of a run's identity that is stored as a hash.
HASHED = {
    "base": ("model_path",),
    "data": ("data_path", "data", "columns", "txt_split", "cutoff_len", "train_on", "prompt_type", "dialogue",
             "strict", "thinking", "packing", "pack_attention"),
    "template": ("prompt_type", "dialogue"),
    "reference": ("cache_reference",),
}  # fmt: skip
OTHER_REASONS = {"base": "the files of --model_path", "data": "the content of --data_path, or the base's tokenizer",
                 "template": "the file of --prompt_type, or the base's own template",
                 "reference": "the adapter of --init_adapter"}  # fmt: skip
# In the identity of runs from before there was a choice.
UNNAMED = {"objective": "sft", "reference": "base", "rope_scaling": "none"}
NEW_DATA = {"data", "batch", "seed", "template"}  # what --from_data_beginning allows to be others
# Where a run lies and how it was found is no change of the run.
NOT_OF_THE_RUN = ("output_path", "resume_from_checkpoint", "from_data_beginning", "accept_changes")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from, verified, and what is known of the start that wrote it."""

    path: Path
    state: TrainerState
    options: dict[str, Any]
    """Of that start, by name, as its onecard.yaml tells them; empty where there is none."""
    same_run: bool
    """False: --from_data_beginning starts a new run from its weights and optimizer."""

    def changed(self, config: FinetuneConfig, names: tuple[str, ...] = ()) -> list[str]:
        """`--flag then -> now` of each option that differs, of those in `names` or of all."""
        return changed_options(self.options, config, names)


def changed_options(then: dict[str, Any], config: FinetuneConfig, names: tuple[str, ...] = ()) -> list[str]:
    """`--flag then -> now` of each option that differs from a stored one, of those in `names` or of all."""
    now = yaml.safe_load(cli.to_yaml(config))
    return [
        f"--{name} {_shown(then[name])} -> {_shown(now[name])}"
        for name in names or tuple(name for name in now if name not in NOT_OF_THE_RUN)
        if name in then and name in now and not _same(then[name], now[name])
    ]


def start_position(config: FinetuneConfig, directory: RunDirectory, accelerator: Accelerator) -> ResumePoint | None:
    """The checkpoint to go on from, verified, or None for a new run; the same on every process.

    Raises CheckpointError for checkpoints that are all broken, ConfigError for contradictions.
    """
    with accelerator.main_process_first():  # the first one sets broken checkpoints aside
        found = find_start(config.train, directory)
    steps = gather_object([found.step if found is not None else None])
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes see different checkpoints in {directory.path} (steps {steps}). Several machines need an "
            "--output_path that all of them share."
        )
    if found is None:
        return None
    same_run = not config.train.from_data_beginning or found.path.resolve().parent == directory.path.resolve()
    return ResumePoint(found.path, read_state(found.path), _stored_options(found.path.parent), same_run)


def find_start(options: TrainOptions, directory: RunDirectory) -> FoundCheckpoint | None:
    """What `--resume_from_checkpoint` means here.

    Checkpoints in the run's own directory win over another directory that was typed, so that the same command can be
    given again after a kill; an older checkpoint of the same run can be gone back to, which sets the newer ones aside.
    """
    typed = options.resume_from_checkpoint
    foreign = foreign_advice(directory.path)
    if foreign:
        raise CheckpointError(f"--output_path {directory.path}: {foreign}, and another --output_path")
    if options.from_data_beginning and typed in ("auto", "none"):
        raise ConfigError("--from_data_beginning", "needs --resume_from_checkpoint DIR, the checkpoint to start from")
    inside = typed not in ("auto", "none") and Path(typed).resolve().parent == directory.path.resolve()
    if inside and options.from_data_beginning:
        raise ConfigError("--from_data_beginning", "needs an --output_path of its own; the checkpoint lies in this one")
    if inside:
        return _gone_back(Path(typed), directory)
    own = directory.store.newest_whole()
    if own is None and typed not in ("auto", "none"):
        return _named(_newest_in(Path(typed)))
    if own is None:
        _tell_unfinished(directory)
        return None
    if typed == "none":
        hint = "give another --output_path, or let the run go on with --resume_from_checkpoint auto"
        raise ConfigError("--resume_from_checkpoint", f"none, but {directory.path} holds {own.path.name}; {hint}")
    for name, reason in own.skipped:
        warn(f"{name} was set aside: {reason}")
    say(f"going on from {own.path}")
    return own


def resolve_start_adapter(config: FinetuneConfig, point: ResumePoint | None) -> FinetuneConfig:
    """A run that began from an adapter goes on as one, typed again or not.

    Raises ConfigError for an adapter that the run did not begin from: its weights would not be used; and for one of
    another base.
    """
    if point is None and config.train.start_adapter is not None:
        _check_base_of(config, config.train.start_adapter)
        _check_vocabulary_of(config, config.train.start_adapter)
    if point is None or not point.same_run or not point.options:
        return config
    stored = point.options.get("init_adapter") or point.options.get("lora_remote_checkpoint")
    typed = config.train.start_adapter
    if typed is None:
        return replace(config, train=replace(config.train, init_adapter=stored))
    if not _same(typed, stored):
        began = f"from {stored}" if stored else "without one"
        raise ConfigError(_start_flag(config), f"{typed} cannot be used: this run began {began} and goes on from "
                          f"{point.path}. Leave the flag out, or give another --output_path")  # fmt: skip
    return config


def _check_base_of(config: FinetuneConfig, start: str) -> None:
    """Refuse an adapter that was trained on other weights: hours would go into mending it. Old runs do not say it."""
    base = config.model.model_path
    if kept_fingerprint(start) is None:
        return
    other = other_base(start, base, base_fingerprint(base))
    if other and "base" in cli.comma_list(config.train.accept_changes):
        warn(f"{other}; accepted")
    elif other:
        raise ConfigError(
            _start_flag(config),
            f"{other}. Give that base as --model_path, or --accept_changes base if you mean it or this one is the same "
            "in another form (other shards, another dtype)",
        )


def _check_vocabulary_of(config: FinetuneConfig, start: str) -> None:
    """Refuse to train embeddings or new tokens from an adapter without any: only what it trained goes on."""
    flag = config.lora.trains_vocabulary
    if not flag:
        return
    place = find_config(start)
    kept = read_config(place) if place is not None else {}
    if not kept.get("trainable_token_indices" if flag == "--train_new_tokens" else "modules_to_save"):
        raise ConfigError(flag, f"does not go with {_start_flag(config)} {start}, which has not trained that: what an "
                          f"adapter trains, goes on. Merge it first ({command('merge')})")  # fmt: skip


def _start_flag(config: FinetuneConfig) -> str:
    return "--init_adapter" if config.train.init_adapter else "--lora_remote_checkpoint"


def resolve_txt_split(config: FinetuneConfig, point: ResumePoint | None) -> FinetuneConfig:
    """A run that goes on reads its txt files as it did, also one of a version that knew no --txt_split."""
    if point is None or not point.same_run or not point.options or config.data.txt_split != "auto":
        return config
    return replace(config, data=replace(config.data, txt_split=point.options.get("txt_split", "uncut")))


def continued(config: FinetuneConfig, point: ResumePoint, fresh: TrainerState) -> TrainerState:
    """The position to train on from, once it is sure that the checkpoint belongs to this run.

    Raises CheckpointError that names the flags of what differs, ConfigError for fewer steps than the run has done.
    """
    _check_same_run(config, point, fresh.identity)
    if not point.same_run:
        return fresh
    stored = point.state
    if stored.step > fresh.total_steps:
        flag = "--max_steps" if config.train.max_steps == fresh.total_steps else "--num_epoch"
        raise ConfigError(
            flag,
            f"it asks for {fresh.total_steps} steps, but {point.path} has done {stored.step}. Give more, or go back "
            "to an earlier one with --resume_from_checkpoint DIR",
        )
    changed = point.changed(config)
    if changed:
        say(f"from step {stored.step + 1} on: {', '.join(changed)}")
    clock = stored.clock if stored.clock == clock_option(config.train) else ""
    if clock:  # the learning rate goes on falling as it did
        fresh = replace(fresh, total_steps=min(stored.total_steps, fresh.total_steps))
    if stored.total_steps != fresh.total_steps:
        warn(f"the run was planned for {stored.total_steps} steps, now for {fresh.total_steps}: the schedule changes")
    if stored.step == fresh.total_steps and not clock:
        say(f"this run has already done its {stored.step} steps; a larger --num_epoch would go on")
    return replace(stored, total_steps=fresh.total_steps, identity=fresh.identity, clock=clock)


def take_over(point: ResumePoint, state: TrainerState, directory: RunDirectory) -> None:
    """Copy the checkpoint that a run goes on from, and its best one, here from the directory where it began.

    All that the run needs then lies in one directory: when no step is left, when the best weights are wanted, and when
    it is killed before it saves. A best one that is gone or broken is forgotten, with a warning. Raises CheckpointError
    when they cannot be written.
    """
    if not point.same_run or point.path.resolve().parent == directory.path.resolve():
        return
    best_steps = (state.best_step, state.balanced_step)
    for name, value in (("best_step", "best_loss"), ("balanced_step", "balanced_sum")):
        step = getattr(state, name)
        if step is None or step == state.step:
            continue
        best = point.path.parent / f"checkpoint-{step}"
        if problems := verify(best):
            warn(f"the best checkpoint of that run, {best}, cannot be used ({'; '.join(problems)}): "
                 "the best is looked for anew from here on")  # fmt: skip
            setattr(state, name, None)
            setattr(state, value, None)
        elif not quiet_rank():
            directory.store.save(step, partial(shutil.copytree, best, dirs_exist_ok=True), best_steps=best_steps)

    def copy(target: Path) -> None:
        shutil.copytree(point.path, target, dirs_exist_ok=True)
        write_position(target, state)

    if not quiet_rank():
        directory.store.save(state.step, copy, best_steps=best_steps)


def _check_same_run(config: FinetuneConfig, point: ResumePoint, identity: dict[str, Any]) -> None:
    allowed = set(cli.comma_list(config.train.accept_changes)) | (set() if point.same_run else NEW_DATA)
    changed = differences(UNNAMED | point.state.identity, identity)
    refused = {name: values for name, values in changed.items() if name not in allowed}
    if refused:
        listed = "\n".join(f"  {name}: {_difference(config, point, name, *values)}" for name, values in refused.items())
        raise CheckpointError(
            f"{point.path} belongs to a run that differs from this command:\n{listed}\n"
            f"Give the old settings, another --output_path, or --accept_changes {','.join(refused)} if you mean it."
        )
    for name in changed:
        warn(f"{name} differs from the run that wrote {point.path.name}, as asked for")


def _difference(config: FinetuneConfig, point: ResumePoint, part: str, then: Any, now: Any) -> str:
    """What differs in one part of the identity, by flag."""
    if part in HASHED:
        flags = point.changed(config, HASHED[part])
        return ", ".join(flags) or f"{OTHER_REASONS[part]} ({', '.join(f'--{name}' for name in HASHED[part])})"
    if not isinstance(now, dict) or not isinstance(then, dict):
        return f"--{part} {then} -> {now}"
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    before = asdict(LoraOptions())  # what runs from before an option had
    sides = [{**before, **side} for side in (then, now)]
    return ", ".join(f"--{name} {_shown(sides[0].get(name))} -> {_shown(sides[1].get(name))}" for name in names)


def _stored_options(run: Path) -> dict[str, Any]:
    """The options in a run's onecard.yaml; empty where it has none that can be read."""
    try:
        stored = yaml.safe_load((run / OPTIONS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _same(one: Any, other: Any) -> bool:
    """Equal, also as paths: earlier versions stored them as they were typed, with ~ too."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if not isinstance(one, str) or not isinstance(other, str):
        return bool(one == other)
    with suppress(RuntimeError):  # the home of nobody who is known here
        one, other = (str(Path(each).expanduser().resolve()) for each in (one, other))
    return one == other


def _shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value) or "''"


def _tell_unfinished(directory: RunDirectory) -> None:
    """Say that an earlier start left no checkpoint, so that nobody takes step 1 for the next one."""
    if not (directory.path / OPTIONS_NAME).is_file():
        return
    steps = max((row.get("step", 0) for row in read_log(directory.path)), default=0)
    if (directory.path / "adapter_model.safetensors").is_file() or is_tuned_model(directory.path):
        warn(f"{directory.path} holds the result of a finished run but no checkpoint to go on from: the run begins "
             "anew, and will replace it")  # fmt: skip
    else:
        reached = f"at step {steps} or later" if steps else "before its first step was logged"
        warn(f"{directory.path}: an earlier start ended {reached} without a checkpoint; the run begins anew at step 1. "
             "A smaller --save_steps or --save_minutes saves earlier")  # fmt: skip


def _gone_back(path: Path, directory: RunDirectory) -> FoundCheckpoint:
    """An older checkpoint of this very run; newer ones are set aside, unless they came from it already.

    So the same command can be given again after a kill without losing what was done since it went back.
    """
    if path.is_dir():
        _explicit(path)  # a damaged one is refused before anything is renamed
    newest = directory.store.newest_whole()
    mark = directory.path / GONE_BACK_NAME
    came_from = mark.read_text(encoding="utf-8") if mark.is_file() else None
    if newest is not None and newest.path.name != path.name and came_from == path.name:
        say(f"it was gone back to before; going on from {newest.path}, which came from it")
        return newest
    found = _named(path)
    for name in directory.store.set_aside_newer(found.step):
        warn(f"going back to step {found.step}: a newer checkpoint is now {name}")
    if not quiet_rank():
        mark.write_text(path.name, encoding="utf-8")
    return found


def _named(path: Path) -> FoundCheckpoint:
    """As `_explicit`, and say so."""
    found = _explicit(path)
    say(f"going on from {path}")
    return found


def _explicit(path: Path) -> FoundCheckpoint:
    """A checkpoint that was typed by name. Raises CheckpointError when it cannot be trusted."""
    if not path.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint: there is no directory {path}")
    foreign = foreign_advice(path)
    if foreign:
        raise CheckpointError(f"--resume_from_checkpoint: {foreign}")
    problems = verify(path, require_manifest=False)
    if problems:
        raise CheckpointError(f"--resume_from_checkpoint: {path} is broken: {'; '.join(problems)}")
    return FoundCheckpoint(path, read_state(path).step)


def _newest_in(path: Path) -> Path:
    """`path` itself when it is a checkpoint; else the newest one in it, as for a run directory."""
    if (path / "optimizer.pt").exists() or not path.is_dir():
        return path
    return next((checkpoint for checkpoint in newest_checkpoints(path) if not verify(checkpoint)), path)
