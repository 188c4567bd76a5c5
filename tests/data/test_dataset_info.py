"""LLaMA-Factory's dataset_info.json: each description is read as it is, or refused by the reason that is true."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onecard.config.data import DataOptions
from onecard.data.catalogue import entries as catalogue
from onecard.data.description import DatasetDescription, as_described, described
from onecard.data.messages import Conversation, Document
from onecard.data.mixture import parts_of
from onecard.data.sources import ReadReport, read
from onecard.data.values import UnusableRecord
from onecard.errors import DataError

ROLE_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TURNS = [{"from": "human", "value": "Is it raining?"}]
CALL = [
    *TURNS,
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"place": "Bern"}}'},
    {"from": "observation", "value": '{"rain": false}'},
    {"from": "gpt", "value": "No, it is dry in Bern."},
]
SEEN = [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A bridge."}]
TOOLS = '[{"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}]'
PAIR = {"conversations": TURNS, "chosen": {"from": "gpt", "value": "No."}, "rejected": {"from": "gpt", "value": "Why?"}}
# The sets of its demo folder that lie in files: description, rows of the same shape, and whether text is in them.
DEMO: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "identity": ({}, [{"instruction": "Who are you?", "input": "", "output": "I am a lamp."}] * 3),
    "alpaca_en_demo": ({}, [{"instruction": "Add", "input": "2 3", "output": "5"}] * 4),
    "alpaca_zh_demo": ({}, [{"instruction": "数一数", "input": "", "output": "一二三"}] * 4),
    "glaive_toolcall_en_demo": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
        [{"conversations": [*TURNS, {"from": "gpt", "value": "I cannot see."}], "tools": "[]"},
         {"conversations": CALL, "tools": TOOLS}],
    ),
    "mllm_demo": (
        {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": ROLE_TAGS},
        [{"messages": SEEN, "images": ["1.jpg"]}] * 2,
    ),
    "mllm_audio_demo": (
        {"formatting": "sharegpt", "columns": {"messages": "messages", "audios": "audios"}, "tags": ROLE_TAGS},
        [{"messages": SEEN, "audios": ["1.mp3"]}],
    ),
    "mllm_video_demo": (
        {"formatting": "sharegpt", "columns": {"messages": "messages", "videos": "videos"}, "tags": ROLE_TAGS},
        [{"messages": SEEN, "videos": ["1.mp4"]}],
    ),
    "mllm_video_audio_demo": (
        {"formatting": "sharegpt", "columns": {"messages": "messages", "videos": "videos", "audios": "audios"},
         "tags": ROLE_TAGS},
        [{"messages": SEEN, "videos": ["1.mp4"], "audios": ["1.mp3"]}],
    ),
    "dpo_en_demo": (
        {"ranking": True, "formatting": "sharegpt",
         "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
        [PAIR, PAIR],
    ),
    "kto_en_demo": (
        {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": ROLE_TAGS},
        [{"messages": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}], "label": good}
         for good in (True, False)],
    ),
    "c4_demo": ({"columns": {"prompt": "text"}}, [{"text": "A page of text."}, {"text": "Another."}]),
}  # fmt: skip
PICTURES = {
    "mllm_demo": "images",
    "mllm_audio_demo": "audios",
    "mllm_video_demo": "videos",
    "mllm_video_audio_demo": "videos",
}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalogue.OWN_FILE, str(tmp_path / "none.yaml"))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Its demo folder in small, rows of our own."""
    info: dict[str, Any] = {}
    for name, (told, rows) in DEMO.items():
        info[name] = {"file_name": f"{name}.json", **told}
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info["wiki_demo"] = {"file_name": "wiki_demo.txt", "columns": {"prompt": "text"}}
    (tmp_path / "wiki_demo.txt").write_text("One page.\n\nAnother page.\n", encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return tmp_path


def read_all(folder: Path, name: str) -> tuple[list[Any], ReadReport]:
    (part,) = parts_of(DataOptions(data_path=str(folder), data=name))
    report = ReadReport()
    try:
        return list(read(part.source, report=report)), report
    except DataError as error:  # every record of it is refused
        assert "no usable record" in str(error)
        return [], report


def test_every_set_of_the_demo_folder_loads_or_is_refused_by_a_true_reason(demo: Path) -> None:
    counts: dict[str, tuple[int, int]] = {}
    for name in [*DEMO, "wiki_demo"]:
        samples, report = read_all(demo, name)
        counts[name] = (len(samples), report.n_bad)
        if name in PICTURES:
            reasons = {bad.reason for bad in report.bad}
            assert reasons == {f"it has {PICTURES[name]}, and only text can be learned"}
    whole = {"identity": 3, "alpaca_en_demo": 4, "alpaca_zh_demo": 4, "kto_en_demo": 2, "c4_demo": 2, "wiki_demo": 2}
    assert {name: counts[name] for name in whole} == {name: (n, 0) for name, n in whole.items()}
    assert {name: counts[name] for name in PICTURES} == {
        "mllm_demo": (0, 2), "mllm_audio_demo": (0, 1), "mllm_video_demo": (0, 1), "mllm_video_audio_demo": (0, 1),
    }  # fmt: skip
    # Calls are learned; of a pair the chosen answer is.
    assert counts["glaive_toolcall_en_demo"] == counts["dpo_en_demo"] == (2, 0)
    assert {turn.content for sample in read_all(demo, "dpo_en_demo")[0] for turn in sample.turns[1:]} == {"No."}


def test_a_column_is_read_by_the_name_that_it_is_given(tmp_path: Path) -> None:
    info = {"orca": {"file_name": "orca.jsonl", "columns": {
        "prompt": "question", "response": "reply", "system": "rules", "history": "before"}}}  # fmt: skip
    row = {
        "id": 7,
        "question": "And 2+2?",
        "reply": "4",
        "rules": "Be short.",
        "before": [["1+1?", "2"]],
        "input": "no",
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (tmp_path / "orca.jsonl").write_text(json.dumps(row), encoding="utf-8")
    ((sample,), report) = read_all(tmp_path, "orca")
    assert isinstance(sample, Conversation)
    assert [(turn.role, turn.content, turn.input) for turn in sample.turns] == [
        ("system", "Be short.", ""), ("user", "1+1?", ""), ("assistant", "2", ""), ("user", "And 2+2?", ""),
        ("assistant", "4", ""),
    ]  # fmt: skip
    assert set(report.ignored_fields) == {"id", "input"}, "a column that is not described is not read"


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_tags_name_roles_and_texts(formatting: str) -> None:
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "Q", "assistant_tag": "A", "system_tag": "S"}
    told = DatasetDescription("chat", file_name="x", formatting="sharegpt", columns={"messages": "talk"}, tags=tags)
    turns = [{"who": "S", "said": "Rules."}, {"who": "Q", "said": "Hi"}, {"who": "A", "said": "Hello", "weight": 0}]
    if formatting == "openai":
        told = DatasetDescription("chat", file_name="x", formatting="openai", columns={"messages": "talk"})
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    record, left_out = as_described(told, {"talk": turns, "lang": "en"})
    assert left_out == ["lang"]
    if formatting == "openai":
        assert record == {"messages": turns}
    else:
        assert record["conversations"] == [
            {"from": "system", "value": "Rules."}, {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello", "weight": 0},
        ]  # fmt: skip


def test_a_prompt_alone_is_a_document(tmp_path: Path) -> None:
    told = DatasetDescription("web", file_name="x", columns={"prompt": "content"})
    assert as_described(told, {"content": "Text.", "url": "a"}) == ({"text": "Text."}, ["url"])
    pairs = DatasetDescription("web", file_name="x", columns={"prompt": "content", "response": "summary"})
    assert as_described(pairs, {"content": "Text.", "summary": "T."})[0] == {"instruction": "Text.", "output": "T."}


def test_a_record_without_its_column_says_which() -> None:
    told = DatasetDescription("orca", file_name="x", columns={"prompt": "question", "response": "reply"})
    with pytest.raises(
        UnusableRecord, match='it has no "question", which orca is described to have as prompt; keys seen: "q"'
    ):
        as_described(told, {"q": "?", "reply": "!"})


def test_a_set_of_the_hub_is_asked_for_by_subset_split_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"adgen": {"hf_hub_url": "me/adgen", "subset": "zh", "split": "validation", "folder": "python",
                      "num_samples": 2, "columns": {"prompt": "content", "response": "summary"}}}  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        asked.append((path, options))
        return [{"content": f"text {i}", "summary": f"short {i}"} for i in range(9)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    samples, _ = read_all(tmp_path, "adgen")
    options = {"split": "validation", "streaming": True, "name": "zh", "data_dir": "python"}
    assert asked == [("me/adgen", options)]
    assert [sample.turns[1].content for sample in samples] == ["short 0", "short 1"]


def test_num_samples_takes_so_many_of_a_file(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(50)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {"rows": {"file_name": "rows.json", "num_samples": 5}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    assert len(read_all(tmp_path, "rows")[0]) == 5
    assert len(read_all(tmp_path, "rows#3")[0]) == 3 and len(read_all(tmp_path, "rows#9")[0]) == 5


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"script_url": "x"}, "made by a script of its own, and code of data sets is never run here"),
        ({"cloud_file_name": "s3://x"}, "it lies in cloud storage"),
        (
            {"file_name": "x", "formatting": "chatml"},
            "formatting is 'chatml', one of alpaca, sharegpt, openai is expected",
        ),
        ({"file_name": "x", "columns": {"answer": "a"}}, "'answer' is no column of a description"),
        ({"file_name": "x", "tags": {"role": "a"}}, "'role' is no tag of a description (did you mean role_tag"),
        ({"file_name": "x", "num_samples": "ten"}, "num_samples is 'ten', a number of 1 or more is expected"),
        ({"file_name": "gone.json"}, "the is described to be this file, which is not there"),
        ({"ms_hub_url": "me/x"}, "the lies on ModelScope only (me/x)"),
        ({}, "it names neither file_name, hf_hub_url nor ms_hub_url"),
        ([], "a description is an object with keys such as file_name"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused(told: Any, problem: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"the": told}), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(problem)):
        parts_of(DataOptions(data_path=str(tmp_path), data="the"))


def test_keys_of_other_programs_are_passed_over() -> None:
    assert described("a", {"file_name": "x", "file_sha1": "0", "om_hub_url": "y"}, "f") == DatasetDescription("a", "x")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset_info.json: cannot be read as JSON"):
        parts_of(DataOptions(data_path=str(tmp_path), data="the"))


def test_documents_and_conversations_of_the_demo_are_what_they_are(demo: Path) -> None:
    assert all(isinstance(sample, Document) for sample in read_all(demo, "wiki_demo")[0])
    assert {turn.learn for sample in read_all(demo, "kto_en_demo")[0] for turn in sample.turns[1:]} == {True, False}
