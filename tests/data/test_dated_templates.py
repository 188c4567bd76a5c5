"""A template that writes down the day: samples keep the day of their first encoding, a question has today's."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

from onecard.data.chat_template import load_template
from onecard.data.dataset import encode_dataset
from onecard.data.encode import EncodeSettings, encode_prompt, encode_sample
from onecard.data.messages import Conversation, Turn
from tests.data.conftest import APPEND_ONLY
from tests.tiny import write_instructions

SETTINGS = EncodeSettings(cutoff_len=500)


def test_a_dated_template_keeps_its_day_in_the_cache_and_its_data_on_any_day(
    tmp_path, bytelevel_tokenizer, with_template, monkeypatch
):
    dated = "{{- strftime_now('%d %b %Y') + '\\n' -}}" + APPEND_ONLY
    file = write_instructions(tmp_path / "d.json")
    texts, prints = {}, {}
    for jinja, kind in ((dated, "dated"), (APPEND_ONLY, "plain")):
        tokenizer = with_template(bytelevel_tokenizer, jinja)
        template = load_template("auto", tokenizer)
        for day, cache in ((1, "a"), (2, "a"), (2, "b")):
            monkeypatch.setattr("onecard.data.dataset.date", FixedDay(day))
            found = encode_dataset(str(file), template, tokenizer, SETTINGS, tmp_path / cache)
            texts[kind, day, cache] = tokenizer.decode(found[0].input_ids)
            prints[kind, day, cache] = found.fingerprint
    assert texts["dated", 1, "a"].startswith("01 Mar 2026\n")
    assert texts["dated", 2, "a"] == texts["dated", 1, "a"]
    assert texts["dated", 2, "b"].startswith("02 Mar 2026\n")
    assert len(set(prints.values())) == 2, "a run that goes on on another day has the same data"
    assert len({prints[key] for key in prints if key[0] == "dated"}) == 1
    # Other answers, or another limit, are other data also where the day is left aside.
    template = load_template("auto", with_template(bytelevel_tokenizer, dated))
    other = encode_dataset(str(file), template, bytelevel_tokenizer, EncodeSettings(60), tmp_path / "a")
    write_instructions(file, 25)
    another = encode_dataset(str(file), template, bytelevel_tokenizer, SETTINGS, tmp_path / "a")
    assert len({other.fingerprint, another.fingerprint, *prints.values()}) == 4


class FixedDay:
    """Stands for `datetime.date`."""

    def __init__(self, day: int) -> None:
        self.day = day

    def today(self) -> date:
        return date(2026, 3, self.day)


def test_asking_writes_the_present_day(bytelevel_tokenizer, with_template):
    tokenizer = with_template(bytelevel_tokenizer, "{{- strftime_now('%Y-%m-%d') -}}" + APPEND_ONLY)
    template = load_template("auto", tokenizer)
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    days = {date.today().isoformat()}
    prompt = tokenizer.decode(encode_prompt(turns[:1], template, tokenizer))
    days.add(date.today().isoformat())  # midnight may have passed
    assert prompt[:10] in days
    dated = replace(template, day="2024-02-29")
    (sample,) = encode_sample(Conversation(turns, "x:1"), dated, tokenizer, SETTINGS)
    assert tokenizer.decode(sample.input_ids).startswith("2024-02-29<|im_start|>")
