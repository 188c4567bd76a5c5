"""`onecard evaluate ship`: the right word for planted runs, its exit code, its reasons, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onecard.console import run_main
from onecard.evaluate.compare import CHOICE_SCORE, SCORES
from onecard.evaluate.report import word
from onecard.evaluate.ship import DO_NOT_SHIP, SHIP, UNDECIDED, ShipVerdict, judge_run
from onecard.programs import evaluate
from onecard.programs._ship import ShipOptions
from onecard.statistics import paired_test
from onecard.translation import translated


def planted(
    folder: Path, seed: int, *, gain: float = 0.0, forgetting: float | None = 0.01, n: int = 40, noise: float = 1e-6
) -> Path:
    """A run whose records gain so much on the mean, between records that differ far more."""
    random = np.random.default_rng(seed)
    base = random.gamma(4, 0.5, n)
    tuned = base - gain + random.normal(0, 0.1, n)
    folder.mkdir()
    content = {"records": [f"data.json:{k}" for k in range(n)], "base": base.tolist(), "tuned": tuned.tolist()}
    (folder / "base_comparison.json").write_text(json.dumps(content), encoding="utf-8")
    rows: list[dict[str, Any]] = [{"step": 5, "event": "forgetting", "texts": 200, "noise": noise}]
    rows += [{"step": step, "eval_loss": 1.0, "forgetting": forgetting} for step in (5, 10) if forgetting is not None]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def judge(run: Path) -> ShipVerdict:
    return judge_run(run, most_forgetting=ShipOptions.most_forgetting, level=ShipOptions.level)


def measured(folder: Path, right: list[int], digest: str = "d") -> Path:
    """A folder of onecard evaluate with one suite whose answers are right (1) or wrong."""
    folder.mkdir()
    suites = [{"name": "mmlu/test", "kind": "mmlu", "settings": {"method": "likelihood"}}]
    (folder / "report.json").write_text(json.dumps({"suites": suites}), encoding="utf-8")
    rows = [{"suite": "mmlu/test", "key": f"{k}\u2028", "score": score} for k, score in enumerate(right)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "answers.jsonl").write_text(lines, encoding="utf-8")
    head = json.dumps({"suites": {"mmlu/test": {"digest": digest}}}) + "\n"
    (folder / "journal.jsonl").write_text(head, encoding="utf-8")
    return folder


def test_planted_runs_get_the_right_word(tmp_path: Path) -> None:
    for seed in range(20):
        runs = {
            SHIP: planted(tmp_path / f"better{seed}", seed, gain=0.1),
            DO_NOT_SHIP: planted(tmp_path / f"forgot{seed}", seed, gain=0.1, forgetting=0.3),
            UNDECIDED: planted(tmp_path / f"noise{seed}", seed),
        }
        assert {word: judge(run).word for word, run in runs.items()} == {word: word for word in runs}, seed


def test_chance_alone_is_seldom_taken_for_a_difference() -> None:
    """Of 400 comparisons of nothing with nothing about one in a hundred is called one."""
    random = np.random.default_rng(1)
    losses = [paired_test(*random.normal(0, 1, (2, 60)).tolist(), level=0.99).direction for _ in range(400)]
    answers = [paired_test(*random.binomial(1, 0.9, (2, 60)).tolist(), level=0.99).direction for _ in range(400)]
    assert np.count_nonzero(losses) <= 11 and np.count_nonzero(answers) <= 11  # 99.9 % of draws of 400 at 0.01
    # All of five is what chance gives once in sixteen times, whatever resampling says of them.
    assert [paired_test([0.0] * n, list(range(1, n + 1))).direction for n in (1, 5, 6)] == [0, 0, 1]
    assert paired_test([0] * 100, [1] * 4 + [0] * 96).direction == 0
    assert paired_test([0] * 100, [1] * 6 + [0] * 94).direction == 1


def test_the_exit_code_and_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def judged(*words: str) -> tuple[int | str | None, str]:
        try:
            code: Any = run_main(lambda: evaluate.main(["ship", *words]))
        except SystemExit as ended:
            code = ended.code
        return code, "".join(capsys.readouterr())

    runs = {
        "good": planted(tmp_path / "good", 0, gain=0.1),
        "noise": planted(tmp_path / "noise", 0),
        "worse": planted(tmp_path / "worse", 0, gain=-0.1),
        "blind": planted(tmp_path / "blind", 0, gain=0.1, forgetting=None),
        "forgot": planted(tmp_path / "forgot", 0, gain=0.1, forgetting=0.3),
    }  # fmt: skip
    code, said = judged("--run", str(runs["good"]))
    assert code == 0 and said.endswith("verdict: ship\n") and "40 records): better" in said
    assert "forgetting: 0.01 nats per token, within the limit of 0.1 (rounding alone gives 1e-06)" in said
    code, said = judged("--run", str(runs["forgot"]))
    assert code == 2 and said.startswith("forgetting: 0.3 nats per token, more than the limit of 0.1")
    assert judged("--run", str(runs["forgot"]), "--most_forgetting", "0.5")[0] == 0
    assert judged("--run", str(runs["worse"]))[0] == 2 and judged("--run", str(runs["noise"]))[0] == 3
    code, said = judged("--run", str(runs["blind"]))
    assert code == 3 and "did not measure forgetting; give --reports" in said

    before = measured(tmp_path / "before", [1] * 50 + [0] * 50)
    same, dropped = (
        measured(tmp_path / "same", [1] * 49 + [0] * 50 + [1]),
        measured(tmp_path / "drop", [0] * 9 + [1] * 41 + [0] * 50),
    )
    assert judged("--run", str(runs["blind"]), "--reports", str(before), str(same))[0] == 0
    code, said = judged("--run", str(runs["good"]), "--reports", str(before), str(dropped))
    assert code == 2 and "mmlu/test: accuracy 0.5000 before, 0.4100 now" in said
    # What the baseline has forgotten too is not held against a run.
    words = ["--baseline", str(planted(tmp_path / "older", 0, forgetting=0.3))]
    assert judged("--run", str(runs["forgot"]), *words)[0] == 0
    (runs["good"] / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "older" / "tokenizer.json").write_text("[]", encoding="utf-8")
    code, said = judged("--run", str(runs["good"]), *words)
    assert code == 3 and "another tokenizer.json" in said


def test_the_forgetting_is_that_of_the_step_that_was_published(tmp_path: Path) -> None:
    run = planted(tmp_path / "run", 0, gain=0.1)
    with (run / "log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 15, "forgetting": 0.4}\n')
    assert judge(run).word == DO_NOT_SHIP
    (run / "trainer_state.json").write_text('{"step": 10}', encoding="utf-8")
    assert judge(run).word == SHIP
    # Below what rounding gives, the figure means nothing.
    noisy = planted(tmp_path / "noisy", 0, gain=0.1, forgetting=0.3, noise=0.5)
    assert judge(noisy).word == SHIP


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--run: is missing"),
        (["--run", "none"], "neither base_comparison.json nor log.jsonl"),
        (["--run", "run", "--baseline", "other"], "held out other records"),
        (["--run", "run", "--reports", "a"], "--reports: takes two folders"),
        (["--run", "run", "--reports", "a", "other"], "other: there is no report.json"),
        (["--run", "run", "--reports", "a", "b"], "mmlu/test: the two evaluations read other data"),
        (["--run", "broken"], "base_comparison.json: cannot be read"),
        (["--run", "short"], "does not hold a loss of base and result for each record"),
        (["--run", "run", "--level", "99"], "--level: 99.0 is not from 0.5"),
        (["--run", "run", "--most_forgetting", "-1"], "--most_forgetting: -1.0 is too little; use 0 or more"),
    ],
)
def test_what_cannot_be_judged_is_no_verdict(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    planted(Path("run"), 0)
    planted(Path("other"), 0, n=30)
    measured(Path("a"), [1] * 9)
    measured(Path("b"), [1] * 9, digest="e")
    for name, text in (("broken", "{"), ("short", '{"records": ["a"], "base": [1], "tuned": [1, 2]}')):
        Path(name).mkdir()
        Path(name, "base_comparison.json").write_text(text, encoding="utf-8")
    assert run_main(lambda: evaluate.main(["ship", *words])) == 1
    assert said in capsys.readouterr().err


def test_a_run_that_has_no_result_yet_is_undecided(tmp_path: Path) -> None:
    run = planted(tmp_path / "run", 0)
    (run / "base_comparison.json").write_text('{"records": ["a"], "base": [1.0]}', encoding="utf-8")
    found = judge(run)
    assert found.word == UNDECIDED and "it has not ended" in found.open[0]


def test_a_run_that_learned_from_rewards_is_told_what_shows_its_gain(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.0, "reward": 0.5}\n', encoding="utf-8")
    found = judge_run(tmp_path, most_forgetting=0.1, level=0.99)
    assert found.word == UNDECIDED and found.open[0].endswith("two folders of onecard evaluate, --reports BEFORE AFTER")
    reports = measured(tmp_path / "before", [0] * 20), measured(tmp_path / "after", [0] * 5 + [1] * 15)
    found = judge_run(tmp_path, reports=reports, most_forgetting=0.1, level=0.99)
    assert found.word == SHIP and found.open[0].endswith("learned from rewards and has no losses to compare")


def test_a_reward_model_is_judged_by_its_held_out_pairs_alone(tmp_path: Path) -> None:
    """It writes no text, so it forgets none, and `onecard evaluate` cannot ask it."""
    for wanted, gain in ((SHIP, 0.1), (DO_NOT_SHIP, -0.1), (UNDECIDED, 0.0)):
        run = planted(tmp_path / wanted, 0, gain=gain, forgetting=None)
        (run / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}', encoding="utf-8")
        found = judge(run)
        assert found.word == wanted and not found.missing


def test_the_reasons_are_in_chinese_with_the_names_of_the_figures(tmp_path: Path) -> None:
    before, after = measured(tmp_path / "a", [0] * 20), measured(tmp_path / "b", [1] * 20)
    run = planted(tmp_path / "run", 0, gain=0.1)
    verdict = judge_run(run, reports=(before, after), most_forgetting=0.1, level=0.99)
    shown = [translated(text, "zh") for text in (*verdict.better, *verdict.open)]
    assert len(shown) == 3 and "：准确率 从 0.0000 到 1.0000" in shown[1]
    figures = {score.name for score in (*SCORES.values(), CHOICE_SCORE)}
    assert {name: translated(name, "zh") for name in figures} == {name: word(name, 1) for name in figures}


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run = planted(tmp_path / "run", 0)
    code = (
        "import sys; from onecard.programs import evaluate\n"
        f"try: evaluate.main(['ship', '--run', {str(run)!r}])\n"
        "except SystemExit as ended: assert ended.code == 3\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
