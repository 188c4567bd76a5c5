"""When a check of servers is made: at the end of a run, or on demand for a run that has none."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.training import FinetuneConfig
from onecard.console import say, warn
from onecard.data.mixture import parts_of
from onecard.data.sources import Source
from onecard.errors import OneCardError
from onecard.inference.call import ModelBundle
from onecard.inference.load import base_path, load_bundle
from onecard.inference.run_files import OPTIONS_NAME, run_directory
from onecard.model.lora.methods import MOVING_STARTS
from onecard.serve.verify.check_file import CHECK_NAME, ServerCheck, make_check, read_check
from onecard.train.build import TrainingData
from onecard.train.run import Run
from onecard.train.state import restore_state


def check_after_training(config: FinetuneConfig, run: Run, data: TrainingData, directory: Path) -> None:
    """Store a check in the run's directory, in bounded time; what keeps it from being made is said, and ends nothing.

    With several processes or DeepSpeed, whose parts of the model lie apart, `onecard verify-server` makes it. A reward
    model answers nothing.
    """
    options = config.train
    lies_apart = options.deepspeed or run.accelerator.num_processes > 1
    if not options.server_check or lies_apart or options.objective == "reward":
        return
    try:
        if options.final_weights != "last":
            restore_state(directory, run.plain_model, {}, options)
        run.plain_model.eval()
        bundle = ModelBundle(run.plain_model, data.tokenizer, data.template, objective=options.objective)
        records = {str(sample.record) for sample in run.test_samples}
        about = {"base": config.model.model_path, "bits": config.model.bits, "at": "the end of training"}
        sources = [part.source for part in parts_of(config.data)]
        check = make_check(bundle, sources, records, about, with_base=config.lora.lora_init not in MOVING_STARTS)
        check.write(directory)
    except Exception as reason:  # whatever it is: the run has its result
        warn(f"{CHECK_NAME} was not written ({reason}); onecard verify-server makes it when it is needed")


def check_of(run: Path, options: ModelOptions) -> ServerCheck:
    """The check of a run, made now where it has none. Raises OneCardError."""
    directory = run_directory(str(run)) or run
    check = read_check(directory)
    if check is not None:
        return check
    say(f"{directory} has no {CHECK_NAME}; its model is loaded and asked once")
    bundle, _ = load_bundle(options, str(run), "auto")
    about = {"base": base_path(options.model_path, str(run)), "bits": options.bits, "at": "the first comparison"}
    check = make_check(bundle, _sources_of(directory), (), about)
    try:
        check.write(directory)
    except OSError as reason:
        warn(f"{CHECK_NAME} was not written to {directory} ({reason}); the next comparison makes it again")
    return check


def _sources_of(directory: Path) -> list[Source]:
    """What the run learned from, where its options say so and it is still there."""
    try:
        stored: Any = yaml.safe_load((directory / OPTIONS_NAME).read_text(encoding="utf-8"))
        known = {each.name: stored[each.name] for each in fields(DataOptions) if each.name in stored}
        return [part.source for part in parts_of(replace(DataOptions(), **known))]
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, OneCardError):
        return []
