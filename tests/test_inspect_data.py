"""tools/inspect_data.py shows what is learned, what is cut and what is skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onecard.data.encode import LabelledSample
from onecard.data.inspect import LengthBin, MaskedText, bars, pieces
from onecard.errors import ConfigError
from onecard.programs.inspect import main
from tests.data.plain_tokenizer import PlainTokenizer


@pytest.fixture
def words(tiny_base, tmp_path) -> list[str]:
    rows = [{"instruction": f"Say {i}", "output": f"{i} times"} for i in range(20)]
    rows += [{"instruction": "q", "output": "fox " * 200}, {"instruction": "long " * 300, "output": "b"}]
    rows += [{"instruction": "q", "output": "a</s>"}, {"instruction": "q"}]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    settings = {"model_path": tiny_base, "data_path": file, "cache_path": tmp_path / "cache", "cutoff_len": 200}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_text(words, capsys):
    main([*words, "--prompt_type", "alpaca"])
    shown = capsys.readouterr().out
    assert shown.count("\n--- data.jsonl:") == 3
    assert "### Response:\n«0 times</s>»" in shown
    assert "1 samples (4.5%) are cut to fit" in shown
    assert "1 samples (4.5%) are dropped" in shown
    assert "over the limit" in shown
    assert shown.count(' is missing; keys seen: "instruction"') == 1  # each skipped record once
    reason = "the question alone takes all 200 tokens of a sample (finetune --cutoff_len)"
    assert f"  data.jsonl:22: {reason}" in shown
    assert "  data.jsonl:23: holds the text '</s>'" in shown
    assert "  data.jsonl:24: " in shown
    assert "\x1b[" not in shown


def test_json(words, capsys):
    main([*words, "--prompt_type", "alpaca", "--json", "--n_shown", "2"])
    found = json.loads(capsys.readouterr().out)
    assert (found["n_records"], found["n_samples"], found["n_cut"], found["n_dropped"], found["n_bad"]) == (
        24,
        21,
        1,
        1,
        2,
    )
    assert found["share_cut"] == found["share_dropped"] == pytest.approx(1 / 22)
    assert sum(bar["n_samples"] for bar in found["bars"]) == 22
    assert sum(bar["n_samples"] for bar in found["bars"] if bar["low"] > 200) == 2
    assert [sample["record"] for sample in found["samples"]] == ["data.jsonl:1", "data.jsonl:11"]
    assert found["samples"][0]["pieces"][-1] == {"text": "0 times</s>", "learned": True}
    assert [record for record, _ in found["dropped"]] == ["data.jsonl:22"]
    assert sorted(record for record, _ in found["bad"]) == ["data.jsonl:23", "data.jsonl:24"]


def test_learned_text_is_coloured_on_a_terminal(words, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main([*words, "--prompt_type", "alpaca", "--n_shown", "1"])
    assert "\x1b[1;32m0 times</s>\x1b[0m" in capsys.readouterr().out


def test_a_wrong_count_is_refused():
    with pytest.raises(ConfigError, match="--n_shown"):
        main(["--n_shown", "-1"])


def test_it_starts_from_any_folder(tmp_path):
    tool = Path(__file__).resolve().parents[1] / "tools" / "inspect_data.py"
    done = subprocess.run([sys.executable, tool, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--cutoff_len" in done.stdout
    assert "--n_shown" in done.stdout


def test_pieces_worked_example():
    sample = LabelledSample([0, ord("H") + 2, ord("i") + 2, 1], [-100, ord("H") + 2, ord("i") + 2, 1], "a:1", 0)
    assert pieces(sample, PlainTokenizer()) == [MaskedText("<s>", False), MaskedText("Hi</s>", True)]


@pytest.mark.parametrize(
    ("lengths", "cutoff_len"), [([1], 8), ([8], 8), ([9], 8), ([3, 5, 9], 8), ([1, 7, 5000], 100), ([50, 99], 1024)]
)
def test_bars_hold_every_sample_and_the_limit_is_a_border(lengths, cutoff_len):
    found = bars(np.array(lengths, np.int32), cutoff_len)
    assert sum(bar.n_samples for bar in found) == len(lengths)
    assert [bar.low for bar in found[1:]] == [bar.high + 1 for bar in found[:-1]]
    assert all(bar.high <= cutoff_len or bar.low > cutoff_len for bar in found)
    assert len(found) < 30


def test_bars_worked_example():
    assert bars(np.array([3, 5, 9], np.int32), 8, 4) == [
        LengthBin(1, 2, 0),
        LengthBin(3, 4, 1),
        LengthBin(5, 6, 1),
        LengthBin(7, 8, 0),
        LengthBin(9, 10, 1),
    ]
