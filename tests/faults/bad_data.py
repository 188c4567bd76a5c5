"""A corpus of broken data files: what each holds, and what a reader must say about it.

Written out byte by byte and counted by hand, so that nothing of the code under test decides what is right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BadFile:
    """A file, how many usable records it has, and (line, words of the reason) of each that is not."""

    name: str
    content: bytes
    n_good: int
    bad: tuple[tuple[int, str], ...] = ()
    note: str = ""  # words that the report must say about a record that was changed

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        path.write_bytes(self.content)
        return path


def pair(instruction: str = "Say hi", output: str = "Hi.") -> str:
    return json.dumps({"instruction": instruction, "input": "", "output": output})


def _lines(*lines: str | bytes, end: bytes = b"\n") -> bytes:
    return b"".join((line if isinstance(line, bytes) else line.encode()) + end for line in lines)


def _messages(*turns: object) -> str:
    return json.dumps({"messages": turns})


def _turn(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


OK = pair()
BROKEN_JSON_LINES = (
    BadFile("broken_line.jsonl", _lines(OK, '{"instruction": "cut he', OK), 2, ((2, "broken JSON at column"),)),
    BadFile("first_line_broken.jsonl", _lines('{"instruction": "cut he', OK), 1, ((1, "broken JSON"),)),
    BadFile("last_line_cut.jsonl", _lines(OK) + b'{"instruction": "half', 1, ((2, "broken JSON"),)),
    BadFile("bom.jsonl", b"\xef\xbb\xbf" + _lines(OK, OK), 2),
    BadFile("bom_inside.jsonl", _lines(OK) + b"\xef\xbb\xbf" + _lines(OK), 2),
    BadFile("crlf.jsonl", _lines(OK, OK, end=b"\r\n"), 2),
    BadFile("blank_lines.jsonl", _lines("", OK, "   ", OK, "", "x"), 2, ((6, "broken JSON"),)),
    BadFile("empty.jsonl", b"", 0, ((1, "no record"),)),
    BadFile("blank.jsonl", b"\n \r\n", 0, ((1, "no record"),)),
    BadFile("zero_tail.jsonl", _lines(OK) + b"\0" * 4096, 1, ((2, "broken JSON at column 1"),)),
    BadFile("not_utf8.jsonl", _lines(OK, '{"instruction": "你"}'.encode("gbk"), OK), 2, ((2, "byte 0xc4"),)),
    BadFile("utf16.jsonl", (OK + "\n").encode("utf-16"), 0, ((1, "UTF-16"),)),
    BadFile("comma_after.jsonl", _lines(OK + ",", OK), 2, note="comma after the record"),
    BadFile("two_on_a_line.jsonl", _lines(OK + OK, OK), 1, ((1, "more text after the end"),)),
    BadFile(
        "duplicate_key.jsonl",
        _lines('{"output": "a", "instruction": "q", "output": "b"}', OK),
        1,
        ((1, 'key "output" appears twice'),),
    ),
    BadFile(
        "duplicate_key_deep.jsonl",
        _lines('{"messages": [{"role": "user", "role": "user"}]}', OK),
        1,
        ((1, 'key "role" appears twice'),),
    ),
    BadFile("nested_too_deep.jsonl", _lines(OK, "[" * 100_000 + "]" * 100_000, OK), 2, ((2, "nested too deep"),)),
    BadFile("trailing_comma.jsonl", _lines('{"instruction": "q", "output": "a",}', OK), 1, ((1, "broken JSON"),)),
    BadFile("first_is_a_list.jsonl", _lines("[1]", OK), 1, ((1, "is a list"),)),
    BadFile("pretty.jsonl", (json.dumps(json.loads(OK), indent=2) + "\n").encode() * 2, 2),
    BadFile("git_lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 0, ((1, "git lfs pull"),)),
    BadFile("zipped.jsonl", b"\x1f\x8b\x08\x00", 0, ((1, "gzip"),)),
)

WRONG_VALUES = (
    BadFile("nul.jsonl", _lines(pair(output="a\0b"), OK), 1, ((1, '"output" holds a NUL'),)),
    BadFile(
        "lone_surrogate.jsonl",
        _lines('{"instruction": "q", "output": "\\ud83d"}', OK),
        1,
        ((1, "lone surrogate U+D83D"),),
    ),
    BadFile(
        "not_objects.jsonl",
        _lines(OK, "[1, 2]", "7", '"text"', "null", "true", "[]"),
        1,
        ((2, "is a list"), (3, "the number 7"), (4, "is text"), (5, "is null"), (6, "is true"), (7, "empty list")),
    ),
    BadFile(
        "wrong_types.jsonl",
        _lines(
            '{"instruction": ["q"], "output": "a"}',
            '{"instruction": "q", "output": {"a": 1}}',
            '{"instruction": "q", "output": true}',
            '{"instruction": "q", "input": [], "output": "a"}',
            '{"instruction": "q", "output": NaN}',
            OK,
        ),
        1,
        (
            (1, '"instruction" is a list'),
            (2, '"output" is an object'),
            (3, '"output" is true'),
            (4, '"input" is an empty list'),
            (5, '"output" is the number nan'),
        ),
    ),
    BadFile(
        "null_fields.jsonl",
        _lines(
            '{"instruction": "q", "input": null, "output": null}',
            '{"instruction": null, "input": null, "output": "a"}',
            '{"instruction": "q", "input": null, "output": "a"}',
        ),
        1,
        ((1, '"output" is null'), (2, '"instruction" is null')),
    ),
    BadFile(
        "numbers.jsonl",
        _lines('{"instruction": "1.0 + 0.50", "input": 0, "output": 1.50}'),
        1,
        note="a number was taken as text",
    ),
    BadFile(
        "no_answer.jsonl",
        _lines(
            '{"instruction": "q", "output": ""}', '{"instruction": "q", "output": " \\n"}', '{"instruction": "q"}', OK
        ),
        1,
        ((1, '"output" is empty'), (2, '"output" is empty'), (3, '"output" is missing')),
    ),
    BadFile(
        "no_question.jsonl",
        _lines('{"instruction": "", "input": " ", "output": "a"}', '{"prompt": "", "response": "a"}', OK),
        1,
        ((1, '"instruction" and "input" are empty'), (2, '"prompt" is empty')),
    ),
    BadFile(
        "input_only.jsonl", _lines('{"instruction": "", "input": "q", "output": "a"}'), 1, note="`input` was taken"
    ),
    BadFile(
        "unknown_shape.jsonl",
        _lines('{"instrution": "q", "output": "a"}', '{"foo": "q", "bar": "a"}', "{}", OK),
        1,
        (
            (1, 'did you mean "instruction" for "instrution"'),
            (2, 'keys seen: "foo", "bar"; other names for question and answer: --columns foo:instruction,bar:output'),
            (3, "keys seen: none"),
        ),
    ),
    BadFile(
        "history.jsonl",
        _lines(
            '{"instruction": "q", "output": "a", "history": [["q1"]]}',
            '{"instruction": "q", "output": "a", "history": "q1"}',
            '{"instruction": "q", "output": "a", "history": [["q1", null]]}',
            '{"instruction": "q", "output": "a", "history": [["q1", "a1"]]}',
        ),
        1,
        ((1, '"history" entry 1 is a list of 1'), (2, '"history" is text'), (3, "entry 1, answer, is null")),
    ),
    BadFile(
        "lists.jsonl",
        _lines(
            '{"input": ["q", "r"], "output": []}',
            '{"input": ["q", 5, null], "output": ["a", "b"]}',
            '{"input": ["q"], "output": ["a"]}',
        ),
        1,
        ((1, '"input" has 2 turns and "output" has 0'), (2, '"input" turn 3 is null')),
    ),
)

USER, ANSWER = _turn("user", "q"), _turn("assistant", "a")
DIALOGUES = (
    BadFile(
        "messages_types.jsonl",
        _lines(
            '{"messages": []}',
            '{"messages": "hi"}',
            '{"messages": ["hi"]}',
            _messages({"role": "user"}, ANSWER),
            _messages(_turn("narrator", "q"), ANSWER),
            _messages(_turn("user", None), ANSWER),
            _messages(USER, _turn("assistant", "")),
            '{"messages": [{"role": 3, "content": "q"}]}',
            _messages(USER, ANSWER),
        ),
        1,
        (
            (1, '"messages" is an empty list'),
            (2, '"messages" is text'),
            (3, "turn 1 is text"),
            (4, 'turn 1 has "role"'),
            (5, 'role "narrator"; known: system'),
            (6, "turn 1 is null"),
            (7, "turn 2 is empty"),
            (8, "role the number 3"),
        ),
    ),
    BadFile(
        "tools.jsonl",
        _lines(
            _messages(USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
            _messages(USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}),
            _messages(USER, ANSWER, _turn("tool", "42"), ANSWER),
            _messages(USER, {"role": "assistant", "content": "a", "tool_calls": []}),
        ),
        1,
        (
            (1, 'turn 2, "tool_calls", is no tool call: {"name", "arguments"} is expected'),
            (2, 'turn 2, "tool_calls", is no tool call'),
            (3, "the result of a tool stands where no tool was called"),
        ),
    ),
    BadFile(
        "parts.jsonl",
        _lines(
            _messages(_turn("user", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]), ANSWER),
            _messages(_turn("user", [{"type": "text", "text": "a"}, "b"]), ANSWER),
            _messages(_turn("user", []), ANSWER),
            _messages(_turn("user", [{"type": "text", "text": "a"}]), ANSWER),
            _messages(_turn("user", [{"type": "text", "value": "a"}, {"type": "input_text", "text": "b"}]), ANSWER),
            _messages(_turn("user", [{"type": "text", "text": None}]), ANSWER),
            _messages(_turn("user", [{"type": "text", "text": 3}, {"type": "text", "value": []}]), ANSWER),
            _messages(_turn("user", [True]), ANSWER),
        ),
        3,
        (
            (1, 'part 2, is of type "image_url"'),
            (3, "turn 1 is empty"),
            (6, 'part 1, has no text: its keys are "type", "text"'),
            (7, 'part 2, "value" is an empty list, text is expected'),
            (8, "part 1, is true; only text can be learned"),
        ),
    ),
    BadFile(
        "weight.jsonl",
        _lines(
            _messages(USER, {**ANSWER, "weight": 0}),
            _messages(USER, {**ANSWER, "weight": "low"}),
            _messages(USER, {**ANSWER, "train": []}),
        ),
        1,
        ((2, "turn 2 has \"weight\": 'low'; 0 or false"), (3, "turn 2 has \"train\": '[]'")),
        note="marked as not to be learned",
    ),
    BadFile(
        "preference.jsonl",
        _lines(
            json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}),
            json.dumps({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}),
            json.dumps({"conversations": [{"from": "human", "value": "q"}], "chosen": ANSWER, "rejected": ANSWER}),
            json.dumps({"messages": [USER, ANSWER], "chosen": [ANSWER], "rejected": [ANSWER]}),
            json.dumps({"chosen": "a", "rejected": "b"}),
            json.dumps({"prompt": "q", "chosen": " ", "rejected": "b"}),
        ),
        4,
        (
            (5, '"chosen" is text, and no question stands beside it'),
            (6, 'the conversation with the "chosen" answer: "response" is empty'),
        ),
        note="of preference pairs the chosen answers are learned",
    ),
    BadFile(
        "system_inside.jsonl",
        _lines(_messages(USER, _turn("system", "s"), ANSWER), _messages(USER, ANSWER)),
        1,
        ((1, "turn 2 is a system turn"),),
    ),
    BadFile(
        "no_answer_at_all.jsonl",
        _lines(_messages(USER), _messages(_turn("system", "s")), _messages(ANSWER), _messages(USER, ANSWER)),
        1,
        ((1, "no question with an answer"), (2, "no question with an answer"), (3, "no question with an answer")),
    ),
    BadFile("json_lines.txt", _lines(OK, OK), 2, note="holds JSON"),
    BadFile(
        "json_first_broken.txt", _lines('{"instruction": "a", "out', OK), 1, ((1, "broken JSON"),), note="holds JSON"
    ),
    BadFile(
        "json_wrapped.txt",
        b'{"prompt": "a",\n "response": "b"}\n{"prompt": "c",\n "response": "d"}\n',
        2,
        note="holds JSON",
    ),
    BadFile("columns.txt", _lines("instruction,input,output", "a,,b", '"c\n\nd",e,f'), 2, note="holds CSV"),
    BadFile("sentence.txt", _lines("Question, answer and question again.", "input"), 2, note="one text per line"),
    BadFile("bracket.txt", _lines("[1] Smith, 1990", "", "{x | x > 1} is a set", "", "[]"), 3, note="blank lines"),
    BadFile(
        "json_list.txt",
        b'[{"instruction": "a", "output": "b"},\n {"instruction": "c"}]',
        1,
        ((2, '"output" is missing'),),
        note="holds JSON",
    ),
    BadFile("trailing_user.jsonl", _lines(_messages(USER, ANSWER, USER)), 1, note="trailing turns"),
    BadFile("leading_answer.jsonl", _lines(_messages(ANSWER, USER, ANSWER)), 1, note="leading assistant turns"),
    BadFile("two_users.jsonl", _lines(_messages(USER, USER, ANSWER)), 1, note="same role in a row"),
)

JSON_LISTS = (
    BadFile(
        "cut_in_record.json",
        f'[\n{OK},\n{OK},\n{{"instruction": "ha'.encode(),
        2,
        ((4, "the file ends inside this record"),),
    ),
    BadFile("cut_between.json", f"[\n{OK},\n{OK},\n".encode(), 2, ((4, "the list is not closed"),)),
    BadFile("cut_minified.json", f'[{OK}, {OK}, {{"instruction'.encode(), 2, ((1, "the file ends inside"),)),
    BadFile("trailing_comma.json", f"[\n{OK},\n{OK},\n]\n".encode(), 2),
    BadFile(
        "record_comma.json",
        f'[\n{OK},\n{{"instruction": "q", "output": "a",}},\n{OK}\n]'.encode(),
        2,
        ((3, "broken JSON at line 3"),),
    ),
    BadFile(
        "record_comma_last.json",
        f'[\n  {OK},\n  {{"instruction": "q", "output": "a",}}\n]'.encode(),
        1,
        ((3, "broken JSON at line 3"),),
    ),
    BadFile(
        "pretty_broken.json",
        b'[\n  {\n    "instruction": "q",\n    "output": "a"\n  },\n'
        b'  {\n    "instruction": "q"\n    "output": "a"\n  },\n'
        b'  "five",\n  5,\n  {\n    "instruction": "q",\n    "output": "a"\n  }\n]\n',
        2,
        ((6, "broken JSON at line 8"), (10, "is text"), (11, "the number 5")),
    ),
    BadFile(
        "lost_quote_minified.json", f'[{OK},{{"instruction": q", "output": "a"}},{OK}]'.encode(), 2, ((1, "broken"),)
    ),
    BadFile(
        "lost_brace_minified.json",
        f'[{OK},{{"instruction": "q", "output": "a",{OK},{OK}]'.encode(),
        3,
        ((1, "broken"),),
    ),
    BadFile("garbage.json", f"[{OK}, oops, {OK}]".encode(), 2, ((1, "broken JSON at line 1"),)),
    BadFile("text_after.json", f"[{OK}]\nThe end.\n".encode(), 1, ((2, "text after the end of the list"),)),
    BadFile(
        "wrong_byte.json",
        f'[\n{OK},\n{{"instruction": "q", "output": "'.encode() + b'\xff"},\n' + f"{OK}]".encode(),
        2,
        ((3, "byte 0xff at line 3"),),
    ),
    BadFile(
        "duplicate.json",
        f'[\n{{"instruction": "q", "output": "a", "output": "b"}},\n{OK}]'.encode(),
        1,
        ((2, "appears twice"),),
    ),
    BadFile("not_objects.json", f"[1, null, [2], {OK}]".encode(), 1, ((1, "number 1"), (1, "null"), (1, "a list"))),
    BadFile("too_deep.json", f"[\n{'[' * 100_000}{']' * 100_000},\n{OK}\n]".encode(), 1, ((2, "nested too deep"),)),
    BadFile("long_numbers.json", f"[123456, {OK}, 654321]".encode(), 1, ((1, "number 123456"), (1, "number 654321"))),
    BadFile(
        "lost_quote_in_turns.json",
        f"[{_messages(USER, ANSWER)}, {_messages(USER, ANSWER)}, {_messages(USER, ANSWER)}]".replace(
            '"content": "q"', '"content": q"', 1
        ).encode(),
        2,
        ((1, "broken JSON at line 1 column 44"),),
    ),
    BadFile("bom.json", b"\xef\xbb\xbf" + f"[{OK}]".encode(), 1),
    BadFile("crlf.json", f"[\r\n{OK},\r\n{{]}},\r\n{OK}\r\n]\r\n".encode(), 2, ((3, "broken JSON at line 3"),)),
    BadFile("one_object.json", b'{\n  "instruction": "q",\n  "output": "a"\n}\n', 1),
    BadFile(
        "objects.json",
        b'{\n  "instruction": "q",\n  "output": "a"\n}\n{\n  "instruction": "q"\n}\n',
        1,
        ((5, '"output" is missing'),),
    ),
    BadFile(
        "first_object_broken.json",
        b'{\n  "output": a",\n  "instruction": "q"\n}\n{\n  "instruction": "q",\n  "output": "a"\n}\n',
        1,
        ((1, "broken JSON at line 2"),),
    ),
    BadFile("wrapped.json", f'{{"data": [{OK}]}}'.encode(), 0, ((1, 'keys seen: "data"'),)),
    BadFile("lines_called_json.json", _lines(OK, "{oops", OK), 2, ((2, "broken JSON"),)),
    BadFile("list_called_jsonl.jsonl", f"[\n{OK},\n{OK}\n]".encode(), 2),
    BadFile("empty_list.json", b"[]", 0, ((1, "no record"),)),
    BadFile("empty.json", b"", 0, ((1, "no record"),)),
    BadFile("word.json", b"hello", 0, ((1, "broken JSON"),)),
)

TABLES_AND_TEXT = (
    BadFile(
        "quotes.csv",
        b'prompt,response\n"two\nlines","a ""b"""\nq\nq,a,more\n\nq,\nlast,row\n',
        2,
        ((4, "the row has 1 fields, the header has 2"), (5, "3 fields"), (7, '"response" is empty')),
    ),
    BadFile(
        "open_quote.csv",
        b'prompt,response\nq,a\nq,"never closed\nq,a\nq,a\n',
        1,
        ((3, "lines 3 to 5 were read as one"),),
    ),
    BadFile("bad_quote.csv", b'prompt,response\n"q"x,a\nq,a\n', 1, ((2, "broken csv"),)),
    BadFile("bom_crlf.csv", b"\xef\xbb\xbfprompt,response\r\nq,a\r\nq,\r\n", 1, ((3, '"response" is empty'),)),
    BadFile("not_utf8.csv", b"prompt,response\nq,\xb4\nq,a\n", 1, ((2, "byte 0xb4 in the column 'response'"),)),
    BadFile("twice.csv", b"prompt,response,prompt\nq,a,q\n", 0, ((1, "'prompt' twice"),)),
    BadFile("nul.csv", b"prompt,response\nq,a\0b\nq,a\n", 1, ((2, "NUL"),)),
    BadFile("bad_header.csv", b'"prompt"x,response\nq,a\n', 0, ((1, "this is the header, no row is used"),)),
    BadFile("header_only.csv", b"prompt,response\n", 0, ((1, "no record"),)),
    BadFile(
        "unknown.csv", b"promt,answr\nq,a\n", 0, ((2, 'did you mean "prompt" for "promt" and "answer" for "answr"'),)
    ),
    BadFile("empty.csv", b"", 0, ((1, "no record"),)),
    BadFile(
        "plain.txt",
        b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree\nfour\xff\n\nfive\0\n\nsix",
        2,
        ((5, "line 6: not valid UTF-8: byte 0xff at column 5"), (8, "NUL")),
        note="blank lines",
    ),
    BadFile("empty.txt", b"\n\n", 0, ((1, "no record"),)),
    BadFile("not_parquet.parquet", b"PAR1 or not", 0, ((1, "cannot be read as parquet"),)),
    BadFile("empty.parquet", b"", 0, ((1, "cannot be read as parquet"),)),
)

BAD_FILES = BROKEN_JSON_LINES + WRONG_VALUES + DIALOGUES + JSON_LISTS + TABLES_AND_TEXT


def write_bad_corpus(folder: Path) -> tuple[int, int]:
    """Write every file of the corpus into `folder`; returns (usable records, unusable records)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in BAD_FILES:
        file.write(folder)
    return sum(file.n_good for file in BAD_FILES), sum(len(file.bad) for file in BAD_FILES)
