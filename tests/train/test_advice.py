"""Advice at the end of a run: what planted figures prove, nothing where they do not, and that a run writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onecard.recipes import finetune
from onecard.train.advice import ADVICE_NAME, LearnedData, advice_of
from onecard.train.findings import RunFindings
from tests import tiny

FALLING = [2.0, 1.8, 1.6, 1.5, 1.45, 1.42, 1.41, 1.4]


def advised(
    losses: list[float], tests: list[float], *, base: list[float] | None = None, tuned: list[float] | None = None,
    cut: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The advice by name on a run that logs at every step and evaluates at every second one."""
    rows: list[dict[str, Any]] = [{"step": k, "loss": loss} for k, loss in enumerate(losses, 1)]
    rows += [{"step": 2 * k, "eval_loss": loss} for k, loss in enumerate(tests, 1)]
    rows += [{"step": 1, "event": "resumed"}]
    found = RunFindings(("r",) * len(base or []), tuple(base or []), tuple(tuned or []))
    return {one.name: one for one in advice_of(rows, found, LearnedData(40, 100, cut))}


def test_a_run_that_went_well_gets_no_advice() -> None:
    assert advised(FALLING, [1.9, 1.6, 1.595, 1.59], base=[2.0] * 8, tuned=[1.5 + 0.01 * k for k in range(8)]) == {}
    assert advised([], []) == {} and advised([float("nan")] * 9, [float("nan")] * 4) == {}


def test_overfitting_is_told_from_the_step_after_which_the_loss_only_rose() -> None:
    found = advised(FALLING, [1.8, 1.5, 1.6, 1.7])
    assert [*found] == ["overfitting"] and found["overfitting"].figures["step"] == 4
    assert (
        "since step 4: the evaluation loss rose from 1.5000 there to 1.7000 at step 8, while"
        in found["overfitting"].text
    )
    assert advised([2.0, 1.8, 1.6, 1.5, 1.5, 1.6, 1.7, 1.7], [1.8, 1.5, 1.6, 1.7]) == {}  # training did not fall either
    for tests in ([1.8, 1.5, 1.7], [1.8, 1.5, 1.7, 1.6], [1.8, 1.5, 1.501, 1.502]):  # once; up and down; by too little
        assert advised(FALLING, tests) == {}


def test_rows_that_were_learned_by_heart_are_too_few() -> None:
    found = advised([2.0, 1.8, 1.5, 1.2, 0.9, 0.6, 0.4, 0.2], [1.8, 1.5, 1.6, 1.7])
    assert [*found] == ["overfitting", "too_few_rows"]
    assert (
        "the 40 rows were learned by heart (training loss 0.3000, evaluation loss 1.7000)" in found["too_few_rows"].text
    )


def test_a_loss_that_still_falls_is_undertrained() -> None:
    found = advised(FALLING, [2.0, 1.8, 1.6])
    assert [*found] == ["undertrained"] and "from 1.8000 at step 4 to 1.6000 at step 6" in found["undertrained"].text
    assert advised(FALLING, [2.0, 1.8]) == {}


def test_a_training_loss_that_rose_tells_of_the_rate() -> None:
    found = advised([2.0, 2.0, 2.1, 2.5, 3.0, 3.5, 4.0, 4.4], [2.4])
    assert [*found] == ["learning_rate_too_high"]
    assert "from 2.0000 in the first quarter of the run to 4.2000" in found["learning_rate_too_high"].text
    # Where it jumped at once, the evaluation loss rises too, which is no overfitting.
    high = [6.0, 6.0, 6.0, 6.1, 6.0, 6.0, 5.9, 5.9]
    found = advised(high, [5.0, 5.5, 6.0], base=[2.0] * 8, tuned=[6.0 + 0.1 * k for k in range(8)])
    assert [*found] == ["learning_rate_too_high"]
    assert "training loss of the last quarter, 5.9000, is above the base's on held-out records, 2.0000" in str(found)
    assert advised([2.0, 2.0, 2.1, 2.0, 2.0, 2.0, 2.05, 2.05], []) == {}  # noise
    assert advised([2.0, 4.0, 5.0], []) == {}  # too short


def test_cut_answers_and_a_held_out_part_that_shows_nothing() -> None:
    assert "3 of 100 samples were cut to --cutoff_len" in advised(FALLING, [], cut=3)["answers_cut"].text
    assert advised(FALLING, [], cut=1) == {}
    found = advised(FALLING, [], base=[1.0, 2.0, 3.0, 1.5], tuned=[1.2, 1.7, 3.1, 1.4])["too_few_held_out"]
    assert found.text.startswith("4 held-out records do not tell") and "found -0.0250" in found.text
    assert found.figures["visible"] > 0.1


def test_a_run_says_and_keeps_its_advice(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"Count from {k}", "output": "one two three " * 40} for k in range(12)]
    data, run = tmp_path / "data.json", tmp_path / "run"
    data.write_text(json.dumps(rows), encoding="utf-8")
    finetune(tiny.config_for(tiny_base, data, run, num_epoch=1, test_size=0, cutoff_len=160))
    kept = json.loads((run / ADVICE_NAME).read_text(encoding="utf-8"))
    assert [(one["name"], one["figures"]) for one in kept] == [("answers_cut", {"cut": 12, "samples": 12})]
    assert capsys.readouterr().out.rstrip().endswith(kept[0]["text"])


def test_it_needs_no_torch() -> None:
    code = "import sys, onecard.train.advice; assert not {'torch', 'transformers'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
