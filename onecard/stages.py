"""A chain of runs: each stage of a stages file begins from the result of the one before, and is run once.

Each run lies in a folder of its own, OUTPUT/1-NAME, beside what this module notes of it (stage.json); the result of the
last one is put into OUTPUT itself. What a run is, is told in `recipes.py`; how a file becomes stages, in
`config/stages.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from onecard.config.given_paths import NOT_MERGEABLE
from onecard.config.objectives import CACHES_REFERENCE, WITH_REFERENCE
from onecard.config.parsing import to_yaml
from onecard.config.stages import Stage
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.console import quiet_rank, say, warn
from onecard.data.mixture import parts_of
from onecard.errors import CheckpointError, ConfigError, DataError
from onecard.export.io.base import open_base
from onecard.export.io.output import new_directory
from onecard.export.merge.merge import merge_into
from onecard.export.merge.options import MergeSettings
from onecard.manifest import MANIFEST, read_manifest
from onecard.model.hardware import detect
from onecard.model.lora.methods import MOVING_STARTS
from onecard.model.out_of_memory import give_back_memory
from onecard.recipes import finetune
from onecard.storage import sha256_of, write_whole
from onecard.train.checkpoint import CheckpointStore, verify
from onecard.train.resume import changed_options
from onecard.train.run_lock import RunLock
from onecard.train.rundir import portable

NOTE, MERGED = "stage.json", "merged"
# What may be others once a stage is done: they say where and in which cuts it is computed, and what is told and kept.
WITHOUT_EFFECT = (
    "output_path", "cache_path", "accept_changes", "device", "max_memory", "stream_layers", "gradient_checkpointing",
    "attn_implementation", "trust_remote_code", "micro_batch", "micro_tokens", "log_steps", "log_samples",
    "save_steps", "save_minutes", "keep_checkpoints", "wandb", "wandb_project", "tensorboard", "deepspeed", "debug",
    *(name for name in asdict(MemoryOptions()) if name != "head_bits"),
)  # fmt: skip


def finetune_stages(stages: Sequence[Stage]) -> Path:
    """Run every stage that is not done, in order; returns the directory with the last one's result.

    Given again after a kill it goes on in the stage that was cut off. Raises OneCardError as `recipes.finetune` does;
    CheckpointError for a stage that is done and has other options now, or began from another result.
    """
    output = Path(stages[0].config.train.output_path)
    with _locked(output):
        _check_directory(output, stages)
        _check_ahead(stages)
        base = stages[0].config.model.model_path
        for stage, before in zip(stages, [None, *stages], strict=False):
            config, base = _beginning(stage, before, base)
            _run(stage, before, config)
        _publish(output, stages[-1])
    return output


def _locked(output: Path) -> Any:
    return nullcontext() if quiet_rank() else RunLock(output)


def _check_directory(output: Path, stages: Sequence[Stage]) -> None:
    """Raise CheckpointError for a directory with a run of its own, or with stages that the file has elsewhere."""
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    own = next((name for name in names if re.fullmatch(r"checkpoint-\d+", name)), None)
    if own is not None:
        raise CheckpointError(f"{output} holds a run that had no stages ({own}); give another --output_path")
    known = {stage.directory.name for stage in stages}
    other = sorted(name for name in names if (output / name / NOTE).is_file() and name not in known)
    if other:
        raise CheckpointError(
            f"{output} holds the stage {other[0]}, but the file has {', '.join(sorted(known))}. Give the stages their "
            f"old names and order, give another --output_path, or remove {output / other[0]}"
        )


def _check_ahead(stages: Sequence[Stage]) -> None:
    """Find what a later stage cannot begin with, before the first one trains.

    Raises ConfigError and DataError with the stage; CheckpointError for a stage that is done with other options.
    """
    for stage, before in zip(stages, [None, *stages], strict=False):
        try:
            parts_of(stage.config.data)
            if before and not before.config.lora.tunes_base and why_merged(before.config, stage.config):
                _check_mergeable(before.config)
        except (ConfigError, DataError) as reason:
            raise ConfigError("", f"stage {stage.name}: {reason}") from reason
        note = _note_of(stage)
        if note.get("is_done") and not verify(stage.directory):
            _check_unchanged(stage, note["options"])


def _check_mergeable(config: FinetuneConfig) -> None:
    """Raise an error for a result that cannot be merged: of such a method, or over a quantised base."""
    if config.lora.peft_method.upper() in NOT_MERGEABLE:
        raise ConfigError("--peft_method", f"cannot differ from that of the stage before: {config.lora.peft_method} "
                          "adapters cannot be merged into their base")  # fmt: skip
    open_base(config.model.model_path, trust_remote_code=config.model.trust_remote_code)


def _check_unchanged(stage: Stage, done_with: dict[str, Any]) -> None:
    names = tuple(name for name in done_with if name not in WITHOUT_EFFECT)
    changed = changed_options(done_with, portable(stage.config), names)
    if changed:
        raise CheckpointError(
            f"stage {stage.name} is done, with other options than this command has:\n  {', '.join(changed)}\n"
            f"Give the old ones, or another --output_path; to run it and all after it again, remove {stage.directory} "
            "and the folders of the stages after it"
        )


def why_merged(before: FinetuneConfig, now: FinetuneConfig) -> str:
    """Why a stage cannot go on with the adapter of the one before: that is then merged into its base. Else empty."""
    train = now.train
    # Then --init_adapter itself is what is compared with.
    cached = train.objective in CACHES_REFERENCE and train.cache_reference is not False
    if not cached and (train.objective in WITH_REFERENCE or (train.objective == "grpo" and train.kl_beta)):
        return f"--objective {train.objective} compares with the base without an adapter"
    if now.lora.lora_init in MOVING_STARTS:
        return f"--lora_init {now.lora.lora_init} starts from the weights of the base"
    then, later = ({name: value == "only" or value for name, value in asdict(each.lora).items()}
                   for each in (before, now))  # fmt: skip
    differ = [f"--{name} {then[name]} -> {later[name]}" for name in later if later[name] != then[name]]
    return ", ".join(differ)


def _beginning(stage: Stage, before: Stage | None, base: str) -> tuple[FinetuneConfig, str]:
    """The stage's options with what it begins from, and the base that it has; merges the one before where it must."""
    config = replace(stage.config, train=replace(stage.config.train, output_path=str(stage.directory)))
    if before is None:
        return config, base
    start: str | None = str(before.directory)
    if before.config.lora.tunes_base:  # what it wrote is a model
        base, start = str(before.directory), None
    elif reason := why_merged(before.config, stage.config):
        merged = before.directory / MERGED
        if not quiet_rank() and not (merged / "config.json").is_file():
            say(f"stage {stage.name}: {reason}, so the result of {before.name} is merged into the base first")
            _merge(before, base, merged)
        _together(config)
        base, start = str(merged), None
    train = replace(config.train, init_adapter=start, lora_remote_checkpoint=None)
    return replace(config, model=replace(config.model, model_path=base), train=train), base


def _merge(stage: Stage, base: str, target: Path) -> None:
    model = stage.config.model
    settings = MergeSettings(dtype="fp32" if model.bits == 32 else "auto", trust_remote_code=model.trust_remote_code)
    with new_directory(target, inputs=[Path(base)]) as partial:
        report = merge_into(partial, base, [str(stage.directory)], settings)
    for note in report.notes:
        warn(note)


def _run(stage: Stage, before: Stage | None, config: FinetuneConfig) -> None:
    """Run one stage, or say that it is done. Raises CheckpointError when it began from what is no longer there."""
    note, origin = _note_of(stage), _result_of(before)
    if note and note["began_from"] != origin:
        raise CheckpointError(
            f"{stage.directory} began from another result of the stage before it than lies there now. Remove "
            f"{stage.directory}, and the folders of the stages after it, to run them again"
        )
    if note.get("is_done") and not verify(stage.directory):
        say(f"stage {stage.number}, {stage.name}, is done: {stage.directory}")
        return
    say(f"stage {stage.number}, {stage.name}: {stage.directory}")
    _write_note(stage, origin, is_done=False)
    finetune(config)
    _together(config)
    _write_note(stage, origin, is_done=True)
    _leave_number_format()


def _together(config: FinetuneConfig) -> None:
    """Wait for all processes of a run that has several: what the first one writes, the others read."""
    from accelerate import PartialState

    PartialState(cpu=not detect(config.model.device).is_gpu).wait_for_everyone()


def _leave_number_format() -> None:
    """Let go of the memory of a run and of the number format that accelerate keeps for the process."""
    from accelerate.state import AcceleratorState

    give_back_memory()
    AcceleratorState._reset_state()


def _note_of(stage: Stage) -> dict[str, Any]:
    """What was noted of a stage; empty where it has not begun. Raises CheckpointError for a damaged note."""
    file = stage.directory / NOTE
    if not file.is_file():
        return {}
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        return {"began_from": note["began_from"], "is_done": note["is_done"], "options": dict(note["options"])}
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise CheckpointError(f"{file} is damaged ({reason}); remove {stage.directory} to run it again") from reason


def _write_note(stage: Stage, origin: str, *, is_done: bool) -> None:
    if quiet_rank():
        return
    options = yaml.safe_load(to_yaml(portable(stage.config)))
    note = {"began_from": origin, "is_done": is_done, "options": options}
    try:
        stage.directory.mkdir(parents=True, exist_ok=True)
        for left in stage.directory.glob(f".{NOTE}.*.partial"):  # by a start that was killed
            left.unlink()
        write_whole(stage.directory / NOTE, json.dumps(note, indent=1, ensure_ascii=False) + "\n")
    except OSError as reason:
        raise CheckpointError(f"{stage.directory / NOTE} cannot be written ({reason})", disk_full=True) from reason


def _result_of(stage: Stage | None) -> str:
    """A hash over the result of a stage; empty for none."""
    return sha256_of(stage.directory / MANIFEST) if stage is not None else ""


def _publish(output: Path, last: Stage) -> None:
    """Put the result of the last stage into OUTPUT, where chat, merge and export look."""
    if quiet_rank():
        return

    def copy(directory: Path) -> None:
        for name in read_manifest(last.directory):
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(last.directory / name, target)

    store = CheckpointStore(output)
    store.tidy()
    store.publish(copy)
    say(f"the result of stage {last.name}, the last one, lies in {output}")
