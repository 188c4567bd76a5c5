"""Preference pairs and marked answers: the good side is learned, the other one is kept for those who want it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecard.data.formats import to_sample
from onecard.data.messages import Turn
from onecard.data.preference import CHOSEN_LEARNED, REJECTED_UNUSABLE
from onecard.data.questions import to_question
from onecard.data.sources import ReadReport, read
from onecard.data.values import UnusableRecord

QUESTION, GOOD, BAD = Turn("user", "q"), Turn("assistant", "good"), Turn("assistant", "bad")
USER = {"role": "user", "content": "q"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "texts of a question": {"question": "q", "chosen": "good", "rejected": "bad"},
    "alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": [USER], "chosen": [answer("good")], "rejected": [answer("bad")]},
    "whole conversations": {"chosen": [USER, answer("good")], "rejected": [USER, answer("bad")]},
    "whole conversations beside a text": {
        "prompt": "q", "chosen": [USER, answer("good")], "rejected": [USER, answer("bad")],
    },
    "an answer as a message": {"prompt": "q", "chosen": [answer("good")], "rejected": [answer("bad")]},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "a list of turns and texts": {"messages": [USER], "chosen": "good", "rejected": "bad"},
    "hh-rlhf": {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair(form):
    shaped = to_sample({**FORMS[form], "score": 3}, "x:1")
    assert shaped.sample.turns == (QUESTION, GOOD)
    assert shaped.sample.rejected == (QUESTION, BAD)
    assert (shaped.notes, shaped.ignored) == ([CHOSEN_LEARNED], ["score"])
    assert shaped.shape.startswith("preference pair (")


def test_a_pair_with_system_tools_and_several_turns():
    tools = json.dumps([{"name": "add", "parameters": {}}])
    before = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "q"}]
    record = {"conversations": before, "system": "s", "tools": tools,
              "chosen": {"from": "function_call", "value": '{"name": "add"}'},
              "rejected": {"from": "gpt", "value": "bad"}}  # fmt: skip
    sample = to_sample(record, "x:1").sample
    assert [turn.role for turn in sample.turns] == ["system", "tool_list", "user", "assistant", "user", "assistant"]
    assert sample.turns[:-1] == sample.rejected[:-1]
    assert sample.turns[-1].tool_calls[0].name == "add"
    assert sample.rejected[-1] == BAD


def test_a_pair_whose_worse_answer_cannot_be_used_still_teaches_the_better_one():
    shaped = to_sample({"prompt": "q", "chosen": "good", "rejected": ""}, "x:1")
    assert (shaped.sample.turns, shaped.sample.rejected) == ((QUESTION, GOOD), ())
    assert shaped.notes == [CHOSEN_LEARNED, REJECTED_UNUSABLE]


@pytest.mark.parametrize(
    "record",
    [{"chosen": "good", "rejected": "bad"}, {"id": 1, "chosen": {"content": "good"}, "rejected": {"content": "bad"}}],
)
def test_a_pair_without_a_question_is_named(record):
    with pytest.raises(UnusableRecord, match='"chosen" is text, and no question stands beside it'):
        to_sample(record, "x:1")


@pytest.mark.parametrize(("value", "label"), [(True, True), ("false", False), (1, None), (None, None)])
def test_labels_are_kept(value, label):
    sample = to_sample({"prompt": "q", "completion": "a", "label": value}, "x:1").sample
    assert sample.label is label
    assert sample.turns[1].learn is (label is not False)


def test_the_question_of_a_pair_is_asked():
    for record in FORMS.values():
        if "prompt" in record or "messages" in record or "conversations" in record:
            question = to_question(record, "x:1")
            assert question.sample.turns == (QUESTION,), record


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"instruction": "<image>What is it?", "output": "a", "images": ["a.png"]}, "images"),
        ({"instruction": "What is it?", "output": "a", "videos": ["a.mp4"]}, "videos"),
        ({"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}], "image": "a.jpg"},
         "image"),
        ({"messages": [{"role": "user", "content": "<audio>q"}, answer("a")], "audios": [b"RIFF"]}, "audios"),
    ],
)  # fmt: skip
def test_records_about_images_audio_and_video_are_named_skips(record, key, tmp_path: Path):
    with pytest.raises(UnusableRecord, match=f'"{key}" names {key.rstrip("s")} files; only text can be learned'):
        to_sample(record, "x:1")


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": "a", "images": []},
        {"instruction": "q", "output": "a", "images": None, "videos": [None], "image": float("nan")},
        {"instruction": "q", "output": "a", "image": "cover.png"},  # beside text that has no place for it
    ],
)
def test_texts_without_media_are_learned(record):
    assert to_sample(record, "x:1").sample.turns == (QUESTION, Turn("assistant", "a"))


def test_placeholders_without_files_are_noted(tmp_path: Path):
    file = tmp_path / "web.jsonl"
    file.write_text(json.dumps({"instruction": "Explain <video> in HTML", "output": "a"}), encoding="utf-8")
    report = ReadReport()
    assert len(list(read(str(file), report=report))) == 1
    assert any("<image>, <audio> or <video> was taken as text" in line for line in report.summary_lines())
