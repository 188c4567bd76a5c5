"""The catalogue of open collections: what an entry may say, how it is found, and that each is read as it describes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onecard.data.catalogue import entries as catalogue
from onecard.data.catalogue.entries import entry_named, read_entries, shipped
from onecard.errors import ConfigError, DataError
from onecard.programs import data

OWN = """
mine:
  about: letters of our own
  rows: 12
  language: CN/EN
  hf_hub_url: me/letters
  columns: {prompt: ask, response: reply}
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "datasets.yaml"
    monkeypatch.setenv(catalogue.OWN_FILE, str(file))
    return file


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    data.main(words)
    return capsys.readouterr().out


def test_every_collection_of_alpaca_cot_is_there_with_its_tags() -> None:
    of_platform = read_entries(Path(catalogue.__file__).parent / "alpaca_cot.yaml")
    assert len(of_platform) == 35
    assert of_platform["belle"].task == ("TS", "MT") and of_platform["xp3"].rows == 78_883_588
    tagged = [entry for entry in of_platform.values() if entry.generation]
    # The platform itself gives UltraChat and StackLLaMA no tags.
    assert len(tagged) == 33 and all(entry.language for entry in of_platform.values())


def test_list_filters_by_tags_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    names = [line.split()[0] for line in said(["list", "--lang", "ml"], capsys).splitlines()[:-1]]
    assert {"guanaco", "natural-instructions", "xp3"} <= set(names) and "alpaca" not in names
    found = json.loads(said(["list", "--search", "databricks", "--json"], capsys))
    assert [(one["name"], one["rows"], one["generation"]) for one in found] == [("dolly", 15015, "HG")]
    with pytest.raises(ConfigError, match="--generation: 'robots' is none of HG, SI, MIX, COL"):
        data.main(["list", "--generation", "robots"])


def test_show_takes_the_name_as_a_word_or_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["show", "belle"], capsys) == said(["show", "--name", "belle"], capsys)
    with pytest.raises(DataError, match=r"no collection is called 'bele' \(did you mean belle\?\); .* data list"):
        data.main(["show", "bele"])
    with pytest.raises(ConfigError, match="--name: is missing"):
        data.main(["show"])


def test_own_entries_stand_beside_the_others_and_win(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.write_text(OWN + "alpaca:\n  about: another\n  hf_hub_url: me/alpaca\n", encoding="utf-8")
    entry = entry_named("mine")
    assert (
        entry.is_own and entry.language == ("CN", "EN") and entry.data.columns == {"prompt": "ask", "response": "reply"}
    )
    assert entry_named("alpaca").data.hf_hub_url == "me/alpaca" and not entry_named("belle").is_own
    assert shipped()["alpaca"].rows == 52002
    assert "letters of our own" in said(["list"], capsys)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n- b\n", "holds no entries"),
        ("a: [", "cannot be read as YAML"),
        ("Big One:\n  hf_hub_url: a/b\n", "the name 'Big One' is not made of small letters"),
        ("a: b\n", '"a": an entry has lines such as hf_hub_url'),
        ("a:\n  about: x\n", '"a": it names neither file_name, hf_hub_url nor ms_hub_url'),
        (
            "a:\n  hf_hub_url: a/b\n  colums: {prompt: x}\n",
            r"'colums' is no key of a description \(did you mean columns",
        ),
        (
            "a:\n  hf_hub_url: a/b\n  columns: {promt: x}\n",
            r"'promt' is no column of a description \(did you mean prompt",
        ),
        ("a:\n  hf_hub_url: a/b\n  language: ZH\n", "language is 'ZH'; known are EN, CN, ML"),
        ("a:\n  hf_hub_url: a/b\n  rows: many\n", "rows is 'many', a number is expected"),
        ("a:\n  script_url: x\n", "code of data sets is never run here"),
    ],
)
def test_what_is_wrong_in_a_file_of_entries_is_named(text: str, problem: str, own: Path) -> None:
    own.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=problem) as caught:
        catalogue.entries()
    assert str(own) in str(caught.value)
