"""--eval_suites: chosen suites with the base before the first step and with the result at the end of a run.

Each part is a folder as `onecard evaluate` writes it, in the run's directory; one that is whole is not measured again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from onecard.config.evaluation import EvaluateOptions
from onecard.config.lora import LoraOptions
from onecard.console import say
from onecard.curation.make.journal import JOURNAL_FILE, Journal
from onecard.errors import ConfigError, DataError
from onecard.evaluate.compare import compare_reports
from onecard.evaluate.page import write_report
from onecard.evaluate.report import REPORT_FILE, build_report
from onecard.evaluate.run import EvaluationTask
from onecard.evaluate.tasks import answered, tasks_of
from onecard.inference.call import ModelBundle
from onecard.installation import command
from onecard.model.lora.methods import MOVING_STARTS
from onecard.objectives.preference import adapter_off
from onecard.storage import sha256_of
from onecard.train.findings import AFTER, BEFORE
from onecard.train.run import Run
from onecard.train.state import restore_state

FLAG = "--eval_suites"
BATCH_SIZE = 8
LEVEL = 0.95  # of the intervals
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


def read_suites(suites: Sequence[str], seed: int) -> list[EvaluationTask]:
    """The tasks of --eval_suites. Raises ConfigError that names it, and DataError."""
    with _by_its_flag():
        return tasks_of(EvaluateOptions(suite=list(suites), seed=seed), is_chat=True)


@contextmanager
def _by_its_flag() -> Iterator[None]:
    """What is said of the options of `onecard evaluate` is said of the one that this program has."""
    try:
        yield
    except ConfigError as reason:
        raise ConfigError(FLAG, str(reason).removeprefix(f"{reason.flag}: ")) from None


class RunSuites:
    """One run's suites: `before` is called before the first step, `after` when the result is in its directory."""

    def __init__(
        self, tasks: Sequence[EvaluationTask], run: Run, bundle: ModelBundle, directory: Path, lora: LoraOptions
    ) -> None:
        if run.accelerator.num_processes > 1:
            raise ConfigError(FLAG, "is measured in one process, and this run has several; leave it out, and measure "
                              f"base and result with {command('evaluate')}")  # fmt: skip
        self.tasks, self.run, self.bundle, self.directory = tasks, run, bundle, directory
        self.moves_base = lora.tunes_base or lora.lora_init in MOVING_STARTS

    def before(self) -> None:
        """Measure the base, unless an earlier start has done it."""
        folder, identity = self.directory / BEFORE, self.run.state.identity
        depends_on = self._depends_on({"base": identity["base"], "template": identity["template"]})
        if _is_whole(folder, depends_on):
            return
        if self.moves_base and self.run.state.step:
            say("the suites are not compared with the base: no earlier start measured it, and by now it has been "
                "trained")  # fmt: skip
            return
        with nullcontext() if self.moves_base else adapter_off(self.run.model):
            self._measure(folder, depends_on, "the base")

    def after(self) -> None:
        """Measure what was published, and say how it differs from the base."""
        run, folder = self.run, self.directory / AFTER
        weights = [sha256_of(self.directory / name) for name in WEIGHTS if (self.directory / name).is_file()]
        depends_on = self._depends_on({"weights": weights})
        if not _is_whole(folder, depends_on):
            if run.options.final_weights != "last":
                restore_state(self.directory, run.plain_model, {}, run.options)
            self._measure(folder, depends_on, "the result")
        if not _is_whole(self.directory / BEFORE, None):
            return
        try:
            for suite in compare_reports(self.directory / BEFORE, folder, level=LEVEL, seed=run.options.seed):
                say(suite.told(LEVEL, "before", "now"))
        except (ConfigError, DataError) as reason:
            say(f"the suites cannot be compared: {reason}")

    def _depends_on(self, model: dict[str, Any]) -> dict[str, Any]:
        found = {"model": model, "suites": {task.name: task.depends_on() for task in self.tasks}}
        return dict(json.loads(json.dumps(found)))  # as the journal has it

    def _measure(self, folder: Path, depends_on: dict[str, Any], what: str) -> None:
        """Answer the suites with the model as it now is; a folder of other weights or suites gives way."""
        if folder.is_dir() and _began_with(folder) != depends_on:
            shutil.rmtree(folder)
        n_records = sum(len(task.items) for task in self.tasks)
        say(f"measuring {what} on {', '.join(task.name for task in self.tasks)} ({n_records:,} records)")
        model = self.run.model
        was_training = model.training
        model.eval()
        try:
            with _by_its_flag(), Journal(folder, depends_on) as journal:
                parts = answered(folder, self.tasks, self.bundle, journal, BATCH_SIZE, self.directory.name)
        finally:
            model.train(was_training)
        settings = {"model": what, "template": self.bundle.template.known_name, "seed": self.run.options.seed}
        write_report(folder, build_report({**settings, "interval": "95 %"}, parts))


def _is_whole(folder: Path, depends_on: dict[str, Any] | None) -> bool:
    """Whether a folder holds a report, of what depends on this unless it is None."""
    return (folder / REPORT_FILE).is_file() and depends_on in (None, _began_with(folder))


def _began_with(folder: Path) -> Any:
    """The first line of a folder's journal; None where it cannot be read."""
    try:
        return json.loads((folder / JOURNAL_FILE).read_text(encoding="utf-8").partition("\n")[0])
    except (OSError, ValueError):
        return None
