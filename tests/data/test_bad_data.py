"""Broken data is used or named, by file, line and reason; nothing is lost silently and nothing crashes."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.data import documents, json_records, plain_text
from onecard.data import readers as records
from onecard.data.formats import UnusableRecord, to_sample
from onecard.data.json_records import JsonValues
from onecard.data.messages import Conversation, Document
from onecard.data.sources import ReadReport, read
from onecard.errors import DataError
from tests.faults.bad_data import BAD_FILES, OK, BadFile, pair, write_bad_corpus

NAMES = [file.name for file in BAD_FILES]


def read_all(path: Path | str, **options) -> tuple[list[Conversation | Document], ReadReport]:
    report = ReadReport()
    samples = []
    try:
        samples.extend(read(str(path), report=report, **options))
    except DataError:
        if report.n_good or options.get("strict"):
            raise
    assert len(samples) == report.n_good
    return samples, report


def test_the_corpus_covers_what_it_should() -> None:
    assert len(NAMES) == len(set(NAMES)) == 94


@pytest.mark.parametrize("file", BAD_FILES, ids=NAMES)
def test_every_record_is_good_or_named(file: BadFile, tmp_path: Path) -> None:
    path = file.write(tmp_path)
    samples, report = read_all(path)
    assert [bad.line for bad in report.bad] == [line for line, _ in file.bad], report.bad
    for bad, (_, words) in zip(report.bad, file.bad, strict=True):
        assert words in bad.reason
        assert bad.file == file.name
        assert bad.reason.isprintable(), "a reason is one line that any terminal can show"
    assert (report.n_good, report.n_bad, len(samples)) == (file.n_good, len(file.bad), file.n_good)
    assert report.n_seen == file.n_good + len(file.bad)
    assert any(file.note in note for note in report.notes) if file.note else not report.notes
    assert len({sample.record for sample in samples}) == len(samples), "a record's name finds one record"


@pytest.mark.parametrize("file", BAD_FILES, ids=NAMES)
def test_strict_ends_at_the_first_bad_record(file: BadFile, tmp_path: Path) -> None:
    path = file.write(tmp_path)
    if not file.bad:
        assert len(read_all(path, strict=True)[0]) == file.n_good
        return
    line, words = file.bad[0]
    with pytest.raises(DataError) as caught:
        read_all(path, strict=True)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)
    assert (caught.value.file, caught.value.line) == (str(path), line)


@pytest.mark.parametrize("file", [file for file in BAD_FILES if not file.n_good], ids=lambda file: file.name)
def test_no_usable_record_is_an_error(file: BadFile, tmp_path: Path) -> None:
    path = file.write(tmp_path)
    with pytest.raises(DataError, match="no usable record") as caught:
        list(read(str(path), report=ReadReport()))
    assert file.bad[0][1] in str(caught.value)


def test_the_whole_corpus_as_one_folder(tmp_path: Path) -> None:
    n_good, n_bad = write_bad_corpus(tmp_path / "corpus")
    samples, report = read_all(tmp_path / "corpus")
    assert (len(samples), report.n_good, report.n_bad) == (n_good, n_good, n_bad)
    assert {bad.file for bad in report.bad} == {file.name for file in BAD_FILES if file.bad}
    assert len({sample.record for sample in samples}) == n_good
    assert f"{n_bad:,} skipped:" in report.summary_lines()


def test_what_is_changed_is_changed_as_said(tmp_path: Path) -> None:
    turns = [["assistant", "0"], ["user", "1"], ["user", "2"], ["assistant", "3"], ["assistant", "4"], ["user", "5"]]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    shaped = to_sample(record, "a:1")
    assert shaped.sample.messages() == [
        {"role": "user", "content": "1\n\n2"},
        {"role": "assistant", "content": "3\n\n4"},
    ]
    assert len(set(shaped.notes)) == 3
    path = tmp_path / "windows.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert read_all(path)[0][0].text == "one\ntwo"
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"instruction": "Round", "input": 1.250, "output": 1e3}', encoding="utf-8")
    samples, _ = read_all(path)
    assert samples[0].messages() == [
        {"role": "user", "content": "Round", "input": "1.250"},
        {"role": "assistant", "content": "1e3"},
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_10_mb_record_is_read_and_the_next_one_too(tmp_path: Path, suffix: str) -> None:
    long = pair(output="long " * 2_000_000)
    separator, before, after = ("\n", "", "") if suffix == "jsonl" else (",\n", "[", "]")
    path = tmp_path / f"long.{suffix}"
    path.write_text(before + separator.join([OK, long, OK]) + after, encoding="utf-8")
    samples, report = read_all(path)
    assert [len(sample.turns[-1].content) for sample in samples] == [3, 10_000_000, 3]
    assert [sample.record for sample in samples] == [f"long.{suffix}:{line}" for line in (1, 2, 3)]
    assert report.n_bad == 0


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt"])
def test_a_record_beyond_the_limit_is_named_and_the_next_one_read(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (records, plain_text):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 2**20)
    long, short = pair(output="x" * (5 * 2**20)), OK
    path = tmp_path / f"long.{suffix}"
    text = {"jsonl": "{}\n{}\n{}", "json": "[\n{},\n{},\n{}\n]", "txt": "{}\n\n{}\n\n{}"}[suffix]
    path.write_text(text.format(short, long, short) if suffix != "json" else f"[\n{short},\n{long},\n{short}\n]")
    samples, report = read_all(path)
    assert len(samples) == 2
    assert [bad.line for bad in report.bad] == [{"jsonl": 2, "json": 3, "txt": 3}[suffix]]
    assert "longer than 1 MiB" in report.bad[0].reason


def test_parquet_names_the_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": None},
        {"instruction": None, "output": "a"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    pq.write_table(pa.table({"instruction": ["q", "r"], "score": [1.5, 2.0]}), tmp_path / "missing.parquet")
    pq.write_table(pa.table({"prompt": [1, 2], "response": [0.5, float("nan")]}), tmp_path / "numbers.parquet")
    samples, report = read_all(tmp_path)
    assert [sample.record for sample in samples] == ["numbers.parquet:1", "rows.parquet:1"]
    assert samples[0].turns[1].content == "0.5"
    assert [(bad.file, bad.line) for bad in report.bad] == [
        ("missing.parquet", 1),
        ("missing.parquet", 2),
        ("numbers.parquet", 2),
        ("rows.parquet", 2),
        ("rows.parquet", 3),
    ]
    assert '"output" is missing; keys seen: "instruction", "score"' in report.bad[0].reason
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as parquet" in read_all(tmp_path)[1].bad[-1].reason


def test_a_million_bad_records_keep_a_thousand_names_and_count_all(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(OK + "\n" + "{oops\n" * 5000, encoding="utf-8")
    _, report = read_all(path)
    assert (report.n_good, report.n_bad, len(report.bad)) == (1, 5000, 1000)
    assert "  ... and 4,990 more; python tools/inspect_data.py lists them" in report.summary_lines()


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big_minified.json", "big.csv", "big.txt"])
def test_reading_streams(tmp_path: Path, name: str) -> None:
    """16 MB of records in a few MB of memory: bound by the chunk and not by the file."""
    row, n_rows = pair(output="x" * 20_000), 800
    path = tmp_path / name
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write({"big.json": "[\n", "big_minified.json": "[", "big.csv": "prompt,response\n"}.get(name, ""))
        for number in range(n_rows):
            line = {"big.csv": "q," + "x" * 20_000 + "\n", "big.txt": "x" * 20_000 + "\n\n"}.get(name, row + "\n")
            last = number == n_rows - 1
            line = line.replace("\n", "" if last else ",") if name == "big_minified.json" else line
            stream.write(line.replace("\n", ",\n") if name == "big.json" and not last else line)
        stream.write("]" if name.endswith(".json") else "")
    report = ReadReport()
    tracemalloc.start()
    n_samples = sum(1 for _ in read(str(path), report=report))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (n_samples, report.n_bad) == (n_rows, 0)
    assert peak_bytes < 8e6


def test_values_are_found_whatever_the_chunk_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A value cut anywhere by the end of a chunk is the same value: characters, escapes, numbers, whole records."""
    lists = [file for file in BAD_FILES if file.name.endswith(".json") and len(file.content) < 2000]
    compared = 0
    for file in lists:
        path = file.write(tmp_path)
        with path.open("rb") as stream:
            expected = list(JsonValues(stream, 10_000))
        for chunk_bytes in (1, 2, 3, 7, 16, 61):
            monkeypatch.setattr(json_records, "_CHUNK_BYTES", chunk_bytes)
            with path.open("rb") as stream:
                assert list(JsonValues(stream, 10_000)) == expected, (file.name, chunk_bytes)
            compared += 1
        monkeypatch.undo()
    assert compared == 6 * len(lists) >= 6 * 20


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES_OF_KEYS = """
    messages conversations instruction input context output history system prompt response completion question answer
    query text role content from value type
"""
KEYS = st.sampled_from(NAMES_OF_KEYS.split())
TURN = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | JSON, "content": JSON,
                  "from": st.sampled_from(["human", "gpt", "system"]) | JSON, "value": JSON,
                  "weight": JSON, "tool_calls": JSON},
)  # fmt: skip
RECORD = JSON | st.dictionaries(
    KEYS, JSON | st.lists(TURN, max_size=5) | st.lists(st.lists(JSON, max_size=3)), max_size=5
)


def is_sound(sample: Conversation | Document) -> bool:
    if isinstance(sample, Document):
        return bool(sample.text.strip())
    roles = [turn.role for turn in sample.turns]
    dialogue = roles[1:] if roles[0] == "system" else roles
    assert dialogue == ["user", "assistant"] * (len(dialogue) // 2), roles
    assert all(type(turn.content) is str and turn.content.strip() and type(turn.input) is str for turn in sample.turns)
    "".join(turn.content + turn.input for turn in sample.turns).encode("utf-8")
    return bool(dialogue)


@pytest.mark.parametrize("n_examples", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_any_value_is_a_sound_sample_or_has_a_reason(n_examples: int) -> None:
    @given(RECORD)
    @settings(max_examples=n_examples, deadline=None)
    def check(value: object) -> None:
        try:
            shaped = to_sample(value, "a:1")
        except UnusableRecord as problem:
            reason = str(problem)
            assert reason
            assert reason.isprintable()
        else:
            assert is_sound(shaped.sample)

    check()


@pytest.mark.parametrize("n_examples", [25, pytest.param(250, marks=pytest.mark.slow)])
def test_any_file_of_values_is_counted_whole(tmp_path: Path, n_examples: int) -> None:
    @given(st.lists(RECORD, min_size=1, max_size=6), st.sampled_from([None, 2]), st.sampled_from(["json", "jsonl"]))
    @settings(max_examples=n_examples, deadline=None)
    def check(values: list[object], indent: int | None, suffix: str) -> None:
        path = tmp_path / f"any.{suffix}"
        if suffix == "json":
            text = json.dumps(values, indent=indent)
        else:
            values = [{"a": value} for value in values]
            text = "".join(json.dumps(value) + "\n" for value in values)
        path.write_text(text, encoding="utf-8", newline="\n")
        samples, report = read_all(path)
        assert len(samples) + report.n_bad == len(values)
        assert all(is_sound(sample) for sample in samples)

    check()


@given(st.binary(max_size=200) | st.text(alphabet='[]{},:"\\ \n\t1aé', max_size=80).map(lambda text: text.encode()))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_never_crash_and_never_hide_the_good_ones(tmp_path: Path, noise: bytes) -> None:
    noise = noise.replace(b"\n", b" ")
    path = tmp_path / "noise.jsonl"
    path.write_bytes(f"{OK}\n".encode() + noise + f"\n{OK}\n".encode())
    samples, report = read_all(path)
    assert len(samples) == 2
    assert report.n_bad == bool(noise.removeprefix(b"\xef\xbb\xbf").strip())
    for suffix in ("json", "csv", "txt", "parquet"):
        path = tmp_path / f"noise.{suffix}"
        path.write_bytes(noise)
        assert read_all(path)[1].n_seen >= 1


def test_a_little_parquet_that_unpacks_to_much_is_read_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long text that stands in every row: kilobytes on disk, and gigabytes where many rows are read together."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for module in (plain_text, records):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 2**21)
    monkeypatch.setattr(records, "_AT_ONCE_BYTES", 2**22)
    long, short = "a" * (2**21 - 100), "short"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000 + [1], pa.int32()), [long, short])
    pq.write_table(pa.table({"text": column}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    reading = records.read_file(tmp_path / "bomb.parquet")
    assert [len(next(reading).value["text"]) for _ in range(3)] == [len(long)] * 3
    assert pa.total_allocated_bytes() - before < 5 * len(long)
    reading.close()
    longer = pa.DictionaryArray.from_arrays([0, 1], ["a" * (2**21 + 1), short])
    pq.write_table(pa.table({"text": longer}), tmp_path / "long.parquet", compression="zstd")
    first, second = records.read_file(tmp_path / "long.parquet")
    assert first.problem == "longer than 2 MiB" and second.value == {"text": short}


def test_a_column_that_unpacks_to_far_more_than_data_do_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a" * 10_000_000]}), tmp_path / "bomb.parquet", compression="zstd")
    monkeypatch.setattr(records, "_AT_ONCE_BYTES", 1_000_000)
    (found,) = records.read_file(tmp_path / "bomb.parquet")
    assert "text unpacks to" in found.problem and found.value is None


def test_an_office_document_that_unpacks_to_much_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_MOST_UNPACKED", 2**21)
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * 3 * 2**20)
    (found,) = records.read_file(tmp_path / "bomb.docx")
    assert "unpacks to 3 MiB" in found.problem
