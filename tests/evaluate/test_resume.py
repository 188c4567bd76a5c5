"""An evaluation of every kind of suite, cut behind each batch and killed for real, goes on to the same report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from onecard.curation.make.journal import JOURNAL_FILE, Journal, JournalEntry
from onecard.data.extraction import ExtractionRow, ExtractionSchema, to_row
from onecard.installation import SHIPPED
from onecard.programs import evaluate
from tests.evaluate import layouts

WRITTEN = ("report.json", "report.md", "report.html", "answers.jsonl", JOURNAL_FILE)
PATIENCE_S = 120.0


@pytest.fixture
def words(tiny_base: Path, tmp_path: Path) -> list[str]:
    """A command line with a suite of each kind but for its --output_path; two records at once."""
    asked = [{"instruction": f"Say {k}", "output": f"{k} it is"} for k in range(3)]
    people = ExtractionSchema("entities", ("person",))
    found = [to_row(ExtractionRow(people, f"{name} left.", {"person": [name]})) for name in ("Ada", "Bob", "Cy")]
    for name, rows in (("open", asked), ("extraction", found), ("loss", asked)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "perplexity.txt").write_text(
        "The quick brown fox.\n\n中国的首都是北京。\n\nA third.\n", encoding="utf-8"
    )
    suites = [f"mmlu:{layouts.mmlu(tmp_path / 'mmlu', 3, subjects=('anatomy',))}"]
    suites += [f"{name}:{tmp_path / name}.jsonl" for name in ("open", "extraction", "loss")]
    suites.append(f"perplexity:{tmp_path / 'perplexity.txt'}")
    typed = [word for suite in suites for word in ("--suite", suite)]
    return [*typed, "--model_path", str(tiny_base), "--bits", "32", "--device", "cpu", "--max_new_tokens", "4",
            "--batch_size", "2"]  # fmt: skip


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in WRITTEN)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["likelihood", "choice", "free"])
def test_cut_behind_each_batch_the_report_is_the_same(
    method: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*words, "--method", method, "--output_path"]
    evaluate.main([*line, str(tmp_path / "whole")])
    n_batches = len((tmp_path / "whole" / JOURNAL_FILE).read_text(encoding="utf-8").splitlines()) - 1
    assert n_batches == 10
    add: Callable[[Journal, JournalEntry], None] = Journal.add
    starts = 0

    def cut(journal: Journal, entry: JournalEntry) -> None:
        add(journal, entry)
        raise SystemExit("cut")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", cut)
        for _ in range(n_batches):
            with pytest.raises(SystemExit, match="cut"):
                evaluate.main([*line, str(tmp_path / "cut")])
            with (tmp_path / "cut" / JOURNAL_FILE).open("ab") as stream:
                stream.write(b'{"key": "half a li')
            starts += 1
    evaluate.main([*line, str(tmp_path / "cut")])
    assert starts == 10 and "going on behind 15 of 15 records" in capsys.readouterr().out
    assert same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_killed_for_real_the_report_is_the_same(words: list[str], tmp_path: Path) -> None:
    evaluate.main([*words, "--output_path", str(tmp_path / "whole")])
    killed, deadline = tmp_path / "killed", time.monotonic() + PATIENCE_S
    typed = [sys.executable, "-m", "onecard", "evaluate", *words, "--output_path", str(killed)]
    process = subprocess.Popen(typed, cwd=SHIPPED, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / JOURNAL_FILE).is_file() or (killed / JOURNAL_FILE).read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    evaluate.main([*words, "--output_path", str(killed)])
    assert same(tmp_path / "whole", killed)
