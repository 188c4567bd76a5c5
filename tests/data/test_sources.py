"""Every shape and format of sample/ is read as what it says; the order, the report and the fingerprint are exact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from onecard.data.formats import _SHAPES, to_sample
from onecard.data.messages import Conversation, Document, Turn
from onecard.data.plain_text import AT_BLANK_LINES
from onecard.data.sources import ReadReport, data_fingerprint, read
from onecard.errors import DataError

SAMPLE = Path(__file__).parents[2] / "sample"
SHAPES = SAMPLE / "shapes"
# file: (records, shape of each)
EXPECTED = {
    "alpaca_history.json": {"instruction/input/output + history": 5, "instruction/input/output": 1},
    "dialogue_lists.jsonl": {"input/output lists": 6},
    "instructions.parquet": {"instruction/input/output": 8},
    "openai_messages.jsonl": {"OpenAI messages": 7},
    "plain.txt": {"text": 5},
    "input_target.jsonl": {"input/target": 2},
    "ask_answer.csv": {"ask/answer": 2},
    "conversation_pairs.jsonl": {"conversation": 1, "instruction/input/output + history": 1},
    "prompt_response.csv": {"prompt/response": 8},
    "sharegpt.json": {"ShareGPT conversations": 6},
    "text.jsonl": {"text": 5},
}


def read_all(path: Path | str, **options) -> tuple[list[Conversation | Document], ReadReport]:
    report = ReadReport()
    return list(read(str(path), report=report, **options)), report


def test_every_sample_file_is_expected() -> None:
    assert sorted(path.name for path in SHAPES.iterdir()) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_sample_files_are_read_whole_and_clean(name: str) -> None:
    samples, report = read_all(SHAPES / name, strict=True)
    assert report.shapes == {name: EXPECTED[name]}
    assert len(samples) == report.n_good == sum(EXPECTED[name].values())
    assert (report.n_bad, list(report.notes)) == (0, [AT_BLANK_LINES] if name == "plain.txt" else [])
    assert len({sample.record for sample in samples}) == len(samples)


@pytest.mark.parametrize("name", ["merge_sample.json", "chat_sample.json"])
def test_the_main_samples_are_clean(name: str) -> None:
    samples, report = read_all(SAMPLE / name, strict=True)
    assert len(samples) >= 60
    assert (report.n_bad, list(report.notes)) == (0, [AT_BLANK_LINES] if name == "plain.txt" else [])
    if name == "chat_sample.json":
        assert all(len(sample.turns) >= 4 for sample in samples)


def test_the_first_record_of_each_shape_word_for_word() -> None:
    first = {name: read_all(SHAPES / name)[0][0] for name in EXPECTED}
    assert first["alpaca_history.json"] == Conversation(
        (
            Turn("system", "You are an astronomer who keeps it short."),
            Turn("user", "Which planet is the smallest?"),
            Turn("assistant", "Mercury."),
            Turn("user", "And the largest?"),
            Turn("assistant", "Jupiter, eleven times as wide as the Earth."),
        ),
        "alpaca_history.json:2",
    )
    assert first["dialogue_lists.jsonl"].turns[2:] == (
        Turn("user", "太阳有影响吗？"),
        Turn("assistant", "有，大约是月亮的一半。太阳和月亮成一线时潮水最大。"),
    )
    assert first["instructions.parquet"] == Conversation(
        (Turn("user", "Translate into Chinese.", "The train is late again."), Turn("assistant", "火车又晚点了。")),
        "instructions.parquet:1",
    )
    assert first["openai_messages.jsonl"].turns[0] == Turn("system", "你是一位耐心的数学老师。")
    assert first["plain.txt"] == Document("The river and the road", "plain.txt:1")
    assert first["prompt_response.csv"] == Conversation(
        (Turn("user", "Name the four seasons."), Turn("assistant", "Spring, summer, autumn and winter.")),
        "prompt_response.csv:2",
    )
    assert first["sharegpt.json"].turns[1] == Turn("assistant", "植物用阳光把水和二氧化碳变成糖和氧气。")
    assert first["text.jsonl"].text.startswith("The lighthouse keeper")


def test_a_record_is_named_by_the_line_on_which_it_begins() -> None:
    samples, _ = read_all(SHAPES / "prompt_response.csv")
    lines = (SHAPES / "prompt_response.csv").read_text(encoding="utf-8").split("\n")
    for sample in samples:
        line = int(sample.record.partition(":")[2])
        assert sample.turns[0].content.split(",")[0].replace("“", "").split()[0] in lines[line - 1].replace("“", "")
    assert samples[-1].record == "prompt_response.csv:10", "the answer on lines 4 and 5 counts as two lines"
    text, _ = read_all(SHAPES / "plain.txt")
    assert [sample.record for sample in text] == [f"plain.txt:{line}" for line in (1, 3, 6, 8, 11)]
    assert text[1].text.count("\n") == 1


def test_records_on_one_line_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "one_line.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}, {"text": "c"}]), encoding="utf-8")
    assert [s.record for s in read_all(path)[0]] == ["one_line.json:1", "one_line.json:1#2", "one_line.json:1#3"]


@pytest.mark.parametrize(
    ("record", "shape", "question", "answer"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "instruction/input/output", Turn("user", "q"), "a"),
        ({"instruction": "q", "input": "i", "output": "a", "text": "x"}, "instruction/input/output",
         Turn("user", "q", "i"), "a"),
        ({"instruction": "q", "context": "c", "response": "a"}, "instruction/context/response",
         Turn("user", "q", "c"), "a"),
        ({"input": "q", "output": "a"}, "input/output", Turn("user", "q"), "a"),
        ({"prompt": "q", "response": "a"}, "prompt/response", Turn("user", "q"), "a"),
        ({"prompt": "q", "completion": " a"}, "prompt/completion", Turn("user", "q"), " a"),
        ({"question": "q", "answer": "a\n"}, "question/answer", Turn("user", "q"), "a\n"),
        ({"query": "q", "response": "a"}, "query/response", Turn("user", "q"), "a"),
        ({"input": ["q"], "output": ["a"]}, "input/output lists", Turn("user", "q"), "a"),
        ({"instruction": "", "input": ["q"], "output": ["a"]}, "input/output lists", Turn("user", "q"), "a"),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         "ShareGPT conversations", Turn("user", "q"), "a"),
        ({"prompt": "p", "messages": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]},
         "OpenAI messages", Turn("user", "q"), "a"),
        ({"messages": None, "instruction": "q", "output": "a"}, "instruction/input/output", Turn("user", "q"), "a"),
    ],
)  # fmt: skip
def test_each_shape_and_its_other_names(record: dict, shape: str, question: Turn, answer: str) -> None:
    shaped = to_sample(record, "a:1")
    assert shaped.shape == shape
    assert shaped.sample == Conversation((question, Turn("assistant", answer)), "a:1")


def test_an_input_without_an_instruction_is_the_question() -> None:
    shaped = to_sample({"instruction": " ", "input": "q", "output": "a"}, "a:1")
    assert shaped.sample.turns == (Turn("user", "q"), Turn("assistant", "a"))


def test_a_system_text_beside_the_turns_comes_first() -> None:
    dialogue = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [
        {"system": "s", "conversations": dialogue},
        {"system": "s", "prompt": "q", "response": "a"},
        {"instruction": "s", "input": ["q"], "output": ["a"]},
        {"messages": [{"role": "developer", "content": "s"}, *dialogue]},
    ]
    expected = (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a"))
    assert [to_sample(record, "a:1").sample.turns for record in records] == [expected] * 4
    empty = to_sample({"system": "", "conversations": [{"from": "system", "value": ""}, *dialogue]}, "a:1")
    assert empty.sample.turns == expected[1:]


def test_content_parts_are_joined_with_a_line_break() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    assert to_sample({"messages": messages}, "a:1").sample.turns[0].content == "one\ntwo"


def test_messages_have_input_only_where_there_is_one() -> None:
    turns = (Turn("user", "q", "i"), Turn("assistant", "a"), Turn("user", "r"), Turn("assistant", "b"))
    assert [sorted(message) for message in Conversation(turns, "a:1").messages()] == [
        ["content", "input", "role"], ["content", "role"], ["content", "role"], ["content", "role"],
    ]  # fmt: skip


def test_a_folder_is_read_in_the_order_of_names_with_every_shape(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in {"b/x.jsonl": '{"text": "3"}', "a.jsonl": '{"text": "1"}\n{"text": "2"}', "c.TXT": "4",
                       "README.md": "no data", ".hidden.jsonl": "{", "b/.cache.json": "{"}.items():  # fmt: skip
        (tmp_path / name).write_text(text, encoding="utf-8")
    samples, report = read_all(tmp_path)
    assert [(sample.text, sample.record) for sample in samples] == [
        ("1", "a.jsonl:1"), ("2", "a.jsonl:2"), ("3", "b/x.jsonl:1"), ("4", "c.TXT:1"),
    ]  # fmt: skip
    assert report.skipped_files == ["README.md"]
    assert report.n_bad == 0, "files whose names begin with a dot are not data"
    mixed = read_all(SHAPES)[1]
    assert set(mixed.shapes) == set(EXPECTED)
    assert mixed.n_good == sum(sum(counts.values()) for counts in EXPECTED.values()) == 57


def test_the_summary_says_what_a_person_must_know(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    lines = [{"messages": turns, "id": 1}, {"text": "t"}, {"promt": "q"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "notes.docx").write_bytes(b"PK")
    report = read_all(tmp_path)[1]
    assert report.summary_lines()[:4] == [
        "2 of 3 records are usable (OpenAI messages 1, text 1)",
        "  in 1 (first: a.jsonl:1): trailing turns without an answer were cut",
        "  fields not used: id",
        "  files not read (1; not .json .jsonl .csv .parquet .txt): notes.docx",
    ]
    assert report.summary_lines()[4:][0] == "1 skipped:"
    assert report.summary_lines()[5].startswith('  a.jsonl:3: unknown shape: keys seen: "promt"; did you mean "prompt"')


def test_a_report_survives_json_and_a_later_refusal(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "t", "id": 0}\n{"prompt": "q", "response": 1}\n{"foo": 1}', encoding="utf-8")
    report = read_all(path)[1]
    copy = ReadReport.from_dict(json.loads(json.dumps(report.as_dict())))
    assert copy == report
    assert copy.ignored_fields.most_common(1) == [("id", 1)]
    assert copy.summary_lines() == report.summary_lines()
    report.reject("a.jsonl:1#3", "it holds a control token")
    assert (report.n_good, report.n_bad, report.n_seen) == (1, 2, 3)
    assert report.bad[-1] == ("a.jsonl", 1, "it holds a control token", 3)
    assert report.bad[-1].place == "a.jsonl:1#3"


def test_the_fingerprint_follows_names_and_bytes_and_nothing_else(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> Path:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text, encoding="utf-8")
        return tmp_path / name

    first = folder("one", {"a.jsonl": "12", "b.jsonl": "3"})
    same = folder("two", {"b.jsonl": "3", "a.jsonl": "12", "README.md": "is not data"})
    others = [
        folder("three", {"a.jsonl": "1", "b.jsonl": "23"}),
        folder("four", {"a.jsonl": "12", "c.jsonl": "3"}),
        folder("five", {"a.jsonl": "12"}),
        folder("six", {"a.jsonl": "12", "x/b.jsonl": "3"}),
        folder("seven", {"a.jsonl": "21", "b.jsonl": "3"}),
        folder("eight", {"a.jsonl": "127 b.jsonl 3"}),
    ]
    assert data_fingerprint(str(first)) == data_fingerprint(str(same))
    prints = [data_fingerprint(str(path)) for path in (first, *others)]
    assert len(set(prints)) == 7
    assert data_fingerprint(str(tmp_path / "five" / "a.jsonl")) == prints[3], "a folder of one file is that file"
    assert len(prints[0]) == 64


@pytest.mark.parametrize("path", ["missing.jsonl", "no/such/folder/at/all", "./missing", "C:\\data\\x", ""])
def test_a_missing_path_is_named_before_any_network(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (data_fingerprint, lambda name: read_all(name)):
        with pytest.raises(DataError, match="there is no such file or folder"):
            use(path)


def test_a_folder_without_data_and_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"no usable record; it has no file of \.json"):
        read_all(tmp_path)
    with pytest.raises(DataError, match=r"\.xlsx is no known format; known: \.json"):
        read_all(tmp_path / "notes.xlsx")


def test_a_hub_data_set_streams_with_row_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, **options):
        asked.append((name, options))
        if name == "nobody/nothing":
            raise ConnectionError("no network\nlong traceback")
        return iter([{"text": "t"}, {"foo": 1}, {"prompt": "q", "response": "a"}])

    def dataset_info(name: str):
        return SimpleNamespace(sha=f"commit of {name}")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    hub = SimpleNamespace(HfApi=lambda: SimpleNamespace(dataset_info=dataset_info))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    samples, report = read_all("somebody/instructions-1.5")
    assert asked == [("somebody/instructions-1.5", {"split": "train", "streaming": True})]
    assert [sample.record for sample in samples] == ["somebody/instructions-1.5:1", "somebody/instructions-1.5:3"]
    assert [(bad.file, bad.line) for bad in report.bad] == [("somebody/instructions-1.5", 2)]
    with pytest.raises(
        DataError,
        match=r"^nobody/nothing: there is no such file .* no network; .*HF_ENDPOINT.*--repo_type dataset --endpoint",
    ):
        read_all("nobody/nothing")
    assert data_fingerprint("a/b") != data_fingerprint("a/c")


def test_reading_imports_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys; from onecard.data.sources import ReadReport, read\n"
        f"n = sum(1 for _ in read({str(SAMPLE / 'chat_sample.json')!r}, report=ReadReport()))\n"
        "print(n, [m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "68 []"


def test_every_shape_has_a_name_of_its_own() -> None:
    assert len(_SHAPES) == len({shape.name for shape in _SHAPES}) >= 14
