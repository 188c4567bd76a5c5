"""The table of methods in the documents says what the plan says: weights that are trained in a 7B, and its GiB."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from onecard.config.lora import SHORT_NAMES
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import GIB, MemoryConfig, n_trained
from onecard.programs.plan import main
from tests.faults.test_objectives import METHODS

PAGES = ("en", "zh")
NUMBER_WORDS = {"million": 1e6, "万": 1e4, "亿": 1e8}
MODEL = "Llama-2-7B"


def table(language: str) -> dict[str, tuple[int, str, float]]:
    """Of each method in the table: the bits that its GiB are for, the weights that are trained, the GiB."""
    page = Path(__file__).resolve().parents[1] / "docs" / language / "training.md"
    cells = r"^\| ((?:`[\w:]+`[,、 ]*)+) \| ((?:4|8|16)(?:[,、][^|]*)?) \|[^|]*\|[^|]*\| ([^|]*) \| ([\d.]+) \|"
    rows = re.findall(cells, page.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (4 if bits.startswith("4") else 16, trained, float(gib))
            for names, bits, trained, gib in rows for name in re.findall(r"[\w:]+", names)}  # fmt: skip


def test_both_pages_have_each_method_with_the_same_numbers() -> None:
    english, chinese = (table(language) for language in PAGES)
    assert english.keys() == chinese.keys()
    assert {SHORT_NAMES.get(name, name) for name in english} == {*METHODS} - {"freeze:1"} | {"freeze:2"}
    for name, (bits, trained, gib) in english.items():
        assert (bits, gib) == (chinese[name][0], chinese[name][2]), name
        assert weights(trained) == pytest.approx(weights(chinese[name][1]), rel=0.05, abs=0.05e6), name


def weights(text: str) -> float:
    """20.0 million -> 20,000,000; 0 for a text without a number (all of it)."""
    number, word = re.match(r"([\d.]*) ?(million|万|亿)?", text).groups()  # type: ignore[union-attr]
    return float(number) * NUMBER_WORDS[word] if number else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(table(PAGES[0])))
def test_a_row_says_what_the_plan_says(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onecard.model.memory.plan.longest_context", lambda *_, **__: 1)  # takes several plans
    monkeypatch.setattr("onecard.model.memory.cards.largest_known", lambda *_: None)
    bits, trained, gib = table(PAGES[0])[name]
    recompute = "off" if name == "prefix" else "on"
    main(["--model_path", MODEL, "--peft_method", name, "--bits", str(bits), "--vram", "160", "--cutoff_len", "1024",
          "--micro_batch", "1", "--gradient_checkpointing", recompute, "--json"])  # fmt: skip
    out, err = capsys.readouterr()
    (plan,) = json.loads(out)["plans"]
    planned = sum(part["n_bytes"] for part in plan["parts"] if part["place"] == "card") / GIB
    n_weights = n_trained(architecture_of(MODEL), MemoryConfig(**plan["setup"]))
    print(name, bits, f"{planned:.3f} GiB, {n_weights / 1e6:.2f} million")
    assert "rough estimate" not in err
    assert round(planned, 1) == gib
    assert not weights(trained) or round(n_weights / 1e6, 1) == round(weights(trained) / 1e6, 1)
