"""The list of lines that need a card: both ways of asking, and what follows an early return."""

from __future__ import annotations

from pathlib import Path

from tests.simcard.cuda_lines import PACKAGE, cuda_lines, report

SOURCE = '''\
"""Says cuda, and is no statement."""
import torch
def early(device):
    """cuda"""
    plain = 1
    if device.type != "cuda":
        return plain
    plain += 1
    return plain
def both(hardware):
    if hardware.is_gpu:
        plain = 1
    else:
        plain = 2
    if not hardware.is_gpu and plain:
        plain = 3
    elif plain:
        plain = 4
    return plain
class Card:
    def copy(self):
        with torch.cuda.stream(self.stream):
            plain = 1
        return new_stream(plain)
'''


def test_a_line_needs_a_card_when_it_asks_for_one_or_follows_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(SOURCE, encoding="utf-8")
    # 3-9: early; 11-12 the way with a card; 15 asks, 17-18 its other way; 24 asks.
    assert cuda_lines(file) == {6, 8, 9, 11, 12, 15, 17, 18, 24}


def test_what_did_not_run_is_told_with_its_reason_or_counted() -> None:
    everything = {p.relative_to(PACKAGE).as_posix(): set(range(1, 2000)) for p in PACKAGE.rglob("*.py")}
    assert report(everything)[-1].endswith(", 0 did not")
    del everything["model/load.py"]
    rows = report(everything)
    assert [row for row in rows if row.endswith("(NOT RUN)")]
    assert rows[-1].endswith(", 2 did not")
    assert report({})[-1] != rows[-1]
    assert any("needs Triton" in row for row in report({}))
