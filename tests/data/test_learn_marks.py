"""What data mark as not to be learned is not learned, and what of a message nothing reads is counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecard.data.chat_template import load_template
from onecard.data.dataset import encode_dataset
from onecard.data.encode import IGNORE_INDEX, DroppedSample, EncodeSettings, encode_sample
from onecard.data.formats import to_sample
from onecard.data.learn_marks import NOT_A_GOOD_ANSWER, NOT_LEARNED, WEIGHTED
from onecard.data.messages import Conversation, Turn
from onecard.data.sources import ReadReport, read
from onecard.data.values import UnusableRecord
from tests.data.template_logics import TEMPLATES
from tests.data.tokenizer_kinds import KINDS

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
MODES = ("all", "last", "everything")


def turns_of(*messages: dict[str, Any]) -> tuple[Turn, ...]:
    return to_sample({"messages": list(messages)}, "x:1").sample.turns


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return KINDS["llama3"](tmp_path_factory.mktemp("llama3"))


def learned(tokenizer: Any, conversation: Conversation, name: str, mode: Any, cutoff_len: int = 1000) -> list[str]:
    """The learned texts of all samples, in order."""
    tokenizer.chat_template = TEMPLATES[name]
    settings = EncodeSettings(cutoff_len, mode)
    found = encode_sample(conversation, load_template("auto", tokenizer), tokenizer, settings)
    if isinstance(found, DroppedSample):
        assert not found.bad
        return []
    texts = []
    for sample in found:
        ids = [i if label != IGNORE_INDEX else None for i, label in zip(sample.input_ids, sample.labels, strict=True)]
        runs: list[list[int]] = [[]]
        for token_id in ids:
            if token_id is None:
                runs.append([])
            else:
                runs[-1].append(token_id)
        texts += [tokenizer.decode(run) for run in runs if run]
    return texts


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss", "train", "training", "trainable", "learn"])
@pytest.mark.parametrize("value", [False, 0, 0.0, "0", "false", "False", " no "])
def test_an_answer_marked_so_is_not_learned(key, value):
    shaped = to_sample({"messages": [USER, {**ANSWER, key: value}, USER, ANSWER]}, "x:1")
    assert [turn.learn for turn in shaped.sample.turns] == [True, False, True, True]
    assert shaped.notes == [NOT_LEARNED]
    assert shaped.ignored == []
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", key: value}]
    assert [turn.learn for turn in to_sample({"conversations": sharegpt}, "x:1").sample.turns] == [True, False]


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", "true", None, float("nan"), ""])
def test_an_answer_marked_to_be_learned_is_like_any_other(value):
    shaped = to_sample({"messages": [USER, {**ANSWER, "weight": value}]}, "x:1")
    assert (shaped.sample.turns[1].learn, shaped.notes) == (True, [])


@pytest.mark.parametrize("value", [0.5, 2, "0.25"])
def test_other_weights_are_those_of_the_answer(value):
    shaped = to_sample({"messages": [USER, {**ANSWER, "weight": value, "train": True}]}, "x:1")
    turn = shaped.sample.turns[1]
    assert (turn.learn, turn.weight, shaped.notes) == (True, float(value), [WEIGHTED])


@pytest.mark.parametrize("value", [-1, "inf", 1700000000])
def test_a_number_that_is_no_weight_is_refused(value):
    with pytest.raises(UnusableRecord, match='turn 2 has "weight"'):
        to_sample({"messages": [USER, {**ANSWER, "weight": value}]}, "x:1")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["chatml", "llama-2", "qwen-3", "deepseek-r1", "falcon"])
def test_unlearned_answers_stay_as_context(tokenizer, name, mode):
    turns = turns_of(
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "q3"},
        {"role": "assistant", "content": "worse", "train": False},
    )
    texts = learned(tokenizer, Conversation(turns, "x:1"), name, mode)
    assert not any("bad" in text or "worse" in text for text in texts)
    assert sum("good" in text for text in texts) == 1
    tokenizer.chat_template = TEMPLATES[name]
    (sample, *_) = encode_sample(
        Conversation(turns, "x:1"), load_template("auto", tokenizer), tokenizer, EncodeSettings(1000, mode)
    )
    assert "bad" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_marked_so_is_learned_where_a_sample_is_cut(tokenizer, mode):
    turns = turns_of(USER, {**ANSWER, "content": "good " * 30}, USER, {**ANSWER, "content": "bad " * 30, "weight": 0})
    n_visited = 0
    for cutoff_len in range(20, 400, 20):
        texts = learned(tokenizer, Conversation(turns, "x:1"), "chatml", mode, cutoff_len)
        assert not any("bad" in text for text in texts)
        n_visited += any("good" in text for text in texts)
    assert n_visited > 3


def test_a_part_that_is_not_to_be_learned_is_not_learned_when_joined():
    joined = turns_of(USER, ANSWER, {**ANSWER, "weight": 0})
    assert [(turn.content, turn.learn) for turn in joined] == [("Hi", True), ("Hello\n\nHello", False)]


@pytest.mark.parametrize(
    "marked",
    [
        {"prompt": "q", "completion": "a", "label": False},
        {"prompt": "q", "completion": "a", "label": "False"},
        {"messages": [USER, ANSWER], "kto_tag": False},
        {"instruction": "q", "output": "a", "weight": 0},
        {"question": "q", "answer": "a", "train": "false"},
    ],
)
def test_records_marked_as_bad_answers_are_counted_and_not_learned(tokenizer, tmp_path, marked):
    good = {"prompt": "q", "completion": "good", "label": True}
    file = tmp_path / "kto.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in (marked, good)), encoding="utf-8")
    settings = EncodeSettings(1000, strict=True)  # such a record is no fault of the data
    dataset = encode_dataset(str(file), load_template("chatml", tokenizer), tokenizer, settings, tmp_path / "cache")
    assert len(dataset) == 1
    assert "good" in tokenizer.decode(dataset[0].input_ids)
    assert dataset.report.read.notes == {NOT_A_GOOD_ANSWER: [1, "kto.jsonl:1"]}
    assert dataset.report.dropped_records == [("kto.jsonl:1", "the record marks all its answers as not to be learned")]
    assert not {"label", "kto_tag", "train"} & set(dataset.report.read.ignored_fields)


def test_a_label_of_another_kind_is_only_a_field_that_is_not_used():
    for value in (0, 1, "positive", 0.5, None):
        shaped = to_sample({"prompt": "q", "completion": "a", "label": value}, "x:1")
        assert shaped.sample.turns[1].learn
        assert shaped.ignored == ["label"]


def test_keys_of_messages_that_nothing_reads_are_counted_and_named(tmp_path: Path):
    answer = {**ANSWER, "reasoning_content": "Hm.", "name": "bot", "weight": 1, "mood": None, "tone": "dry"}
    record = {"messages": [{**USER, "name": "ann"}, answer], "id": 7}
    file = tmp_path / "named.jsonl"
    file.write_text(json.dumps(record) + "\n" + json.dumps(record), encoding="utf-8")
    report = ReadReport()
    assert len(list(read(str(file), report=report))) == 2
    assert report.ignored_fields == {"id": 2, "messages[].name": 4, "messages[].tone": 2}
    assert "  fields not used: id, messages[].name, messages[].tone" in report.summary_lines()
