"""Did training help? The loss of each held-out record under the base and under the result, and their difference.

The base is scored before the first step (the same model with its adapter off), the result after the last one, on the
same records in the same template. The difference is paired, its interval a bootstrap over records.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate.utils import broadcast_object_list

from onecard.config.lora import LoraOptions
from onecard.console import say, warn
from onecard.model.lora.methods import MOVING_STARTS
from onecard.objectives.preference import adapter_off
from onecard.statistics import paired_test
from onecard.storage import write_whole
from onecard.train.findings import COMPARISON_NAME as FILE_NAME
from onecard.train.run import Run
from onecard.train.state import restore_state
from onecard.train.validation import evaluator_of


class BaseComparison:
    """One run's comparison: `before` is called before the first step, `after` when the result is in its directory.

    Nothing is compared without held-out rows, nor where answers are sampled while training: their figure is a reward.
    """

    def __init__(self, run: Run, directory: Path, lora: LoraOptions) -> None:
        self.run, self.directory = run, directory
        self.moves_base = lora.tunes_base or lora.lora_init in MOVING_STARTS
        self.wanted = run.options.compare_with_base and bool(run.test_samples) and run.rollouts is None
        self.records = [str(sample.record) for sample in run.test_samples]
        self.base: list[float] | None = None

    def before(self) -> None:
        """Score the base, or read what an earlier start of the run found."""
        if not self.wanted:
            return
        self.base = self._stored()
        if self.base is not None:
            return
        if self.run.state.step and self.moves_base:
            say("the result is not compared with the base: no earlier start scored it, and by now it has been trained")
            return
        # Where the base itself is trained, or the adapter took a part of it into itself, both together are it at first.
        with nullcontext() if self.moves_base else adapter_off(self.run.model):
            self.base = self._scores()
        self._write({"records": self.records, "base": self.base})

    def after(self) -> None:
        """Score what was published, say how it differs from the base, and write both."""
        if self.base is None:
            return
        if self.run.options.final_weights != "last":
            weights = self.run.engine.whole_weights(written=True)
            restore_state(self.directory, self.run.plain_model, {}, self.run.options, weights)
        tuned = self._scores()
        test = paired_test(self.base, tuned, seed=self.run.options.seed)
        difference, n_better = test.difference, test.n_down
        found = {"mean_base": fmean(self.base), "mean_tuned": fmean(tuned), "difference": difference._asdict()}
        self._write({**found, "n_better": n_better, "records": self.records, "base": self.base, "tuned": tuned})
        if not math.isfinite(difference.value):
            warn("the result cannot be compared with the base: the loss of a held-out record is no number")
            return
        say(f"held-out records: mean loss {fmean(self.base):.4f} with the base, {fmean(tuned):.4f} with the result")
        change, low, high = (f"{number:+.4f}" for number in difference)
        say(f"difference {change}, 95 % interval {low} to {high}; better in {n_better} of {len(tuned)} records")
        if test.direction < 0:
            say("on such records the result is better than the base")
        elif test.direction > 0:
            say("on such records the result is worse than the base")
        else:
            say("on such records no difference from the base beyond noise is seen")

    def _scores(self) -> list[float]:
        """The loss of each held-out record per unit, in order."""
        sums = evaluator_of(self.run).sample_sums(self.run.objective, self.run.test_samples)
        return [float(loss / n_units) for loss, n_units in sums]

    def _stored(self) -> list[float] | None:
        """The scores of the base that an earlier start wrote, on the same records."""
        try:
            content = json.loads((self.directory / FILE_NAME).read_text(encoding="utf-8"))
            stored = [float(loss) for loss in content["base"]] if content["records"] == self.records else None
        except (OSError, ValueError, TypeError, KeyError):
            stored = None
        # The first process's word counts: all score, or none does.
        found: list[float] | None = broadcast_object_list([stored])[0]
        return found

    def _write(self, content: dict[str, Any]) -> None:
        if not self.run.accelerator.is_main_process:
            return
        try:
            write_whole(self.directory / FILE_NAME, json.dumps(content, ensure_ascii=False, indent=1))
        except OSError as reason:
            warn(f"{FILE_NAME} was not written ({reason})")
