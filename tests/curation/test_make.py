"""Making data against an endpoint that fails in every way: bounded tries, nothing twice, nothing lost, all counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.config.curation import QaFromDocumentsOptions, SelfInstructOptions, ThinkOptions
from onecard.curation.make.answers import agrees, objects_in, prompts, split_thought
from onecard.curation.make.endpoint import EndpointError
from onecard.curation.make.journal import JOURNAL_FILE, Journal, JournalEntry
from onecard.curation.make.novelty import Novelty, rouge_l
from onecard.curation.make.qa_from_documents import passages
from onecard.curation.make.self_instruct import seed_tasks
from onecard.curation.make.think import _can_be_asked, _thinks
from onecard.curation.rows import read_rows
from onecard.curation.words import texts_of, words_of
from onecard.data.sources import ReadReport, Source, read
from onecard.errors import ConfigError, DataError
from onecard.programs._data_make import make_data
from tests.curation.scripted_endpoint import Reply, ScriptedEndpoint, completion, scripted

KEY = "sk-very-secret-0123456789"
SEEDS = [
    {"instruction": "Name three rivers of Asia.", "input": "", "output": "Yangtze, Mekong, Ganges."},
    {"instruction": "Translate the word into French.", "input": "cat", "output": "chat"},
]
OPTIONS = {"self-instruct": SelfInstructOptions, "qa-from-documents": QaFromDocumentsOptions, "think": ThinkOptions}


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def run(verb: str, server: ScriptedEndpoint, data: str, out: Path, **more: Any) -> list[float]:
    """Make; returns the seconds that were waited between tries."""
    waited: list[float] = []
    options = OPTIONS[verb](data_path=data, output_path=str(out), base_url=server.url, model="m", **more)
    assert options.problems() == []
    make_data(verb, options, wait=waited.append)
    return waited


def new_tasks(number: int, n: int = 2) -> str:
    """A list of tasks that are unlike those of any other number."""
    tasks = [
        {"instruction": " ".join(f"w{number}x{task}y{word}" for word in range(8)), "input": "", "output": f"o{number}"}
        for task in range(n)
    ]
    return "Here they are:\n```json\n" + json.dumps(tasks) + "\n```"


def number_of(body: dict[str, Any]) -> int:
    """A number that depends on what was asked only, so a repeated request gets the same answer."""
    return body["seed"] % 1_000_003


def test_self_instruct_makes_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    with scripted(lambda body, _: completion(new_tasks(number_of(body)))) as server:
        run("self-instruct", server, seeds, tmp_path / "out", n_rows=7, n_per_request=2)
    rows = rows_of(tmp_path / "out" / "data.jsonl")
    assert len(rows) == 7
    assert len(server.requests) == 4
    first = server.requests[0]
    assert (first["path"], first["model"]) == ("/v1/chat/completions", "m")
    assert all(seed["instruction"] in first["messages"][0]["content"] for seed in SEEDS)
    assert rows[0]["instruction"] in server.requests[-1]["messages"][0]["content"] or len(rows) > 2
    assert [row["provenance"]["task"] for row in rows] == [f"request {n // 2}" for n in range(7)]
    assert {(row["provenance"]["made_by"], row["provenance"]["model"]) for row in rows} == {("self-instruct", "m")}
    report = ReadReport()
    assert len(list(read(str(tmp_path / "out" / "data.jsonl"), report=report))) == 7


def test_instructions_like_earlier_ones_are_left_out(tmp_path: Path) -> None:
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    repeated = {"instruction": "Name three rivers of Asia!", "output": "x"}
    near = {"instruction": "Name three long rivers of Asia.", "output": "x"}  # ROUGE-L 10 / 11
    own = {"instruction": "Write a haiku about rain on a tin roof.", "output": "x"}
    short = {"instruction": "Go on", "output": "x"}
    unanswered = {"instruction": "Say why the sky is blue at noon.", "output": " "}
    answer = json.dumps([repeated, near, own, own, short, unanswered])
    with scripted(lambda body, number: completion(answer if not number else new_tasks(number))) as server:
        run("self-instruct", server, seeds, tmp_path / "out", n_rows=2, n_per_request=6)
    rows = rows_of(tmp_path / "out" / "data.jsonl")
    assert rows[0]["instruction"] == own["instruction"]
    assert len(rows) == len(server.requests) == 2


def test_a_model_with_nothing_new_ends_the_run(tmp_path: Path) -> None:
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    with (
        scripted(lambda body, _: completion(json.dumps(SEEDS))) as server,
        pytest.raises(DataError, match="last 20 requests gave nothing new: 0 of 5 rows"),
    ):
        run("self-instruct", server, seeds, tmp_path / "out", n_rows=5)
    assert len(server.requests) == 20


PASSING_FAULTS: dict[str, tuple[Callable[[], Reply], list[float]]] = {
    "429 with Retry-After": (lambda: Reply(b'{"error": {"message": "slow"}}', 429, (("Retry-After", "7"),)), [7.0]),
    "429 for a day": (lambda: Reply(b"", 429, (("Retry-After", "86400"),)), [300.0]),
    "429 with a date": (lambda: Reply(b"", 429, (("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),)), [1.0]),
    "500": (lambda: Reply(b"oops", 500), [1.0]),
    "503 in HTML": (lambda: Reply(b"<html>\xff", 503), [1.0]),
    "no JSON": (lambda: Reply(b'{"choices": [{"mess'), [1.0]),
    "JSON of another kind": (lambda: Reply(b'{"choices": []}'), [1.0]),
    "an error with 200": (lambda: Reply(b'{"error": "overloaded"}'), [1.0]),
    "a list": (lambda: Reply(b"[]"), [1.0]),
    "a cut connection": (lambda: completion("[")._replace(cut=1000), [1.0]),
    "a time-out": (lambda: completion("[]")._replace(late_s=30.0), [1.0]),
}


@pytest.mark.parametrize("fault", PASSING_FAULTS)
def test_what_passes_by_itself_is_tried_again(tmp_path: Path, fault: str) -> None:
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    reply, waits = PASSING_FAULTS[fault]
    with scripted(lambda body, number: reply() if number == 0 else completion(new_tasks(number))) as server:
        limit = 0.5 if fault == "a time-out" else 30.0
        waited = run("self-instruct", server, seeds, tmp_path / "out", n_rows=2, n_per_request=2, timeout_s=limit)
    assert waited == waits or (fault == "a time-out" and waited[:1] == waits)  # a busy machine may be late again
    assert len(rows_of(tmp_path / "out" / "data.jsonl")) == 2
    assert server.requests[0]["messages"] == server.requests[1]["messages"]
    entries = rows_of(tmp_path / "out" / JOURNAL_FILE)[1:]
    assert [(entry["n_requests"], entry["prompt_tokens"]) for entry in entries] == [(1, 10)]


def test_tries_are_bounded_and_what_was_made_is_kept(tmp_path: Path) -> None:
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    healthy = False

    def answer(body: dict[str, Any], number: int) -> Reply:
        return completion(new_tasks(number_of(body))) if healthy or number < 2 else Reply(b"down", 500)

    with scripted(answer) as server:
        with pytest.raises(EndpointError, match=r"did not answer in 4 tries; the last: HTTP 500: down"):
            run("self-instruct", server, seeds, tmp_path / "out", n_rows=8, n_per_request=2, max_attempts=4)
        assert len(server.requests) == 2 + 4
        assert len(rows_of(tmp_path / "out" / "data.jsonl")) == 4
        healthy = True
        run("self-instruct", server, seeds, tmp_path / "out", n_rows=8, n_per_request=2, max_attempts=9)
        assert len(server.requests) == 6 + 2
    rows = rows_of(tmp_path / "out" / "data.jsonl")
    assert len({row["instruction"] for row in rows}) == len(rows) == 8


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"HTTP 401: bad key \*\*\*; the key in the environment variable MY_KEY is not the right one"),
        (403, "MY_KEY is not the right one"),
        (404, r"check --base_url .* and the model's name"),
        (400, r"HTTP 400: bad key \*\*\*"),
        (307, "the server leads elsewhere"),
    ],
)
def test_what_no_retry_mends_ends_at_once_without_the_key(
    tmp_path: Path, status: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    body = json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
    reply = Reply(body, status, (("Location", "http://127.0.0.1:9/v1"),) if status == 307 else ())
    with scripted(lambda *_: reply) as server, pytest.raises(EndpointError, match=says) as caught:
        run("self-instruct", server, seeds, tmp_path / "out", api_key_env="MY_KEY")
    assert len(server.requests) == 1
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    everything = [str(caught.value), *capsys.readouterr()]
    everything += [file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir() if file.is_file()]
    assert len(everything) >= 4
    assert not any(KEY in text for text in everything)


def test_half_answers_give_their_whole_rows_and_broken_ones_are_asked_for_again(tmp_path: Path) -> None:
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    half = new_tasks(1, n=3).rsplit(", ", 1)[0]  # the last object has no end
    script = ["no JSON here", half, "{'instruction': 1}", '[{"instruction": 3}]', "again nothing", new_tasks(9)]
    replies = [completion(text, "length" if text == half else "stop") for text in script]
    with scripted(lambda _, number: replies[number]) as server:
        run("self-instruct", server, seeds, tmp_path / "out", n_rows=4, n_per_request=3)
    entries = rows_of(tmp_path / "out" / JOURNAL_FILE)[1:]
    found = [(len(entry["rows"]), entry["n_requests"], entry["problem"]) for entry in entries]
    assert found == [(2, 2, ""), (0, 3, "no usable row in 3 answers"), (2, 1, "")]
    assert len(server.requests) == 6
    assert sum(entry["completion_tokens"] for entry in entries) == 30


def test_a_start_goes_on_wherever_the_last_one_was_killed(tmp_path: Path) -> None:
    """The journal is cut at places all over it; each time the end is the same, and nothing is asked for twice."""
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    whole = tmp_path / "whole"
    with scripted(lambda body, _: completion(new_tasks(number_of(body)))) as server:
        run("self-instruct", server, seeds, whole, n_rows=6, n_per_request=2)
        content = (whole / JOURNAL_FILE).read_bytes()
        first = content.index(b"\n") + 1
        places = [*range(first, len(content), 211), len(content) - 1, len(content)]
        assert len(places) > 5
        for place in places:
            out = tmp_path / f"cut{place}"
            out.mkdir()
            (out / JOURNAL_FILE).write_bytes(content[:place])
            n_before = len(server.requests)
            run("self-instruct", server, seeds, out, n_rows=6, n_per_request=2)
            n_done = content[:place].count(b"\n") - 1
            assert len(server.requests) - n_before == 3 - n_done
            assert (out / JOURNAL_FILE).read_bytes() == content
            assert (out / "data.jsonl").read_bytes() == (whole / "data.jsonl").read_bytes()


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    seeds = write(tmp_path / "seeds.jsonl", SEEDS)
    with scripted(lambda body, _: completion(new_tasks(number_of(body)))) as server:
        run("self-instruct", server, seeds, tmp_path / "out", n_rows=2)
        with pytest.raises(ConfigError, match=r"begun with other settings \(novelty, temperature\)"):
            run("self-instruct", server, seeds, tmp_path / "out", n_rows=2, temperature=0.1, novelty=0.5)
        write(tmp_path / "seeds.jsonl", SEEDS[:1])
        with pytest.raises(ConfigError, match=r"other settings \(data\)"):
            run("self-instruct", server, seeds, tmp_path / "out", n_rows=2)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
        with pytest.raises(ConfigError, match="holds other files"):
            run("self-instruct", server, seeds, tmp_path / "mine", n_rows=2)
        (tmp_path / "out" / JOURNAL_FILE).write_text('{"a": 1}\nnonsense\n', encoding="utf-8")
        with pytest.raises(ConfigError, match="is no journal of this program"):
            run("self-instruct", server, seeds, tmp_path / "out", n_rows=2)
    with Journal(tmp_path / "held", {}), pytest.raises(ConfigError, match="written by another process"):
        Journal(tmp_path / "held", {}).__enter__()


def test_a_task_in_the_journal_twice_counts_once(tmp_path: Path) -> None:
    with Journal(tmp_path, {}) as journal:
        journal.add(JournalEntry("a", [{"x": 1}]))
        journal.add(JournalEntry("a", [{"x": 2}]))
        assert list(journal.rows()) == [{"x": 1}]
    with Journal(tmp_path, {}) as journal:
        assert list(journal.rows()) == [{"x": 1}]


def test_questions_come_from_every_passage_once(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number} tells of lake {number} and its long shore. " * 3 for number in range(4)]
    documents = write(tmp_path / "docs.jsonl", [{"text": "\n\n".join(paragraphs)}, {"text": paragraphs[0].strip()}])

    def answer(body: dict[str, Any], number: int) -> Reply:
        if number == 1:
            return completion("[]")  # nothing to ask about: no second request
        pairs = [{"question": f"Q{number}.{n}?", "answer": "A."} for n in range(3)]
        return completion(json.dumps(pairs))

    with scripted(answer) as server:
        for _ in range(2):
            run("qa-from-documents", server, documents, tmp_path / "out", passage_chars=200, n_per_passage=2)
    assert len(server.requests) == 4
    rows = rows_of(tmp_path / "out" / "data.jsonl")
    assert [row["instruction"] for row in rows] == ["Q0.0?", "Q0.1?", "Q2.0?", "Q2.1?", "Q3.0?", "Q3.1?"]
    assert rows[0]["provenance"]["record"] == "docs.jsonl:1"
    assert "lake 3" in server.requests[3]["messages"][0]["content"]


def test_passages_hold_all_of_a_text_and_no_more_than_asked() -> None:
    text = "\n\n".join(f"Line one of {n}. It goes on and on, word after word.\nLine two of {n}" * 4 for n in range(9))
    for most in (200, 333, 5000):
        pieces = passages(text, most)
        assert max(map(len, pieces)) <= most
        assert "".join("".join(pieces).split()) == "".join(text.split())
    assert passages("中文句子没有空格。" * 100, 200)[0].endswith("。")
    assert passages("x" * 1000, 200) == ["x" * 200] * 5
    assert passages("3", 200) == []


def test_thoughts_stay_where_the_answer_agrees(tmp_path: Path) -> None:
    rows = [
        {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
        {"instruction": "What is 3 + 3?", "input": "", "output": "6", "id": 7},
        {"instruction": "And 5?", "output": "<think>\nFive.\n</think>\n\n5"},
        {"instruction": "Name a colour.", "output": "Red"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "What is 1 + 1?"},
                      {"role": "assistant", "content": "2"}]},
        {"prompt": "Say hello", "chosen": "Hello", "rejected": "No"},
        {"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": "{}"}}]}]},
    ]  # fmt: skip
    source = write(tmp_path / "rows.jsonl", rows)
    script = [
        completion("<think>Two and two.</think>The answer is 4."),
        completion("<think>Hm.</think>7"),
        completion("6", reasoning_content="Three twice."),
        completion("Red"),
        completion("<think>Long", "length"),
        completion("One more.</think>\n2"),
    ]
    with scripted(lambda _, number: script[number]) as server:
        run("think", server, source, tmp_path / "out", price_prompt=1.0)
    made = rows_of(tmp_path / "out" / "data.jsonl")
    assert [row.get("messages", [{}])[-1].get("content") for row in made] == [
        "<think>\nTwo and two.\n</think>\n\n4",
        "<think>\nThree twice.\n</think>\n\n6",
        None,
        "<think>\nOne more.\n</think>\n\n2",
    ]
    assert made[2] == rows[2]
    assert made[3]["messages"][:2] == rows[4]["messages"][:2]
    assert made[1]["provenance"] == {"made_by": "think", "model": "m", "task": "rows.jsonl:2"}
    assert rows_of(tmp_path / "out" / "without_thought.jsonl") == [rows[3], *rows[5:]]
    assert server.requests[5]["messages"][0] == {"role": "system", "content": "S"}
    entries = rows_of(tmp_path / "out" / JOURNAL_FILE)[1:]
    assert [(entry["n_requests"], entry["problem"]) for entry in entries] == [
        (1, ""),
        (2, ""),
        (2, "the model wrote no thought"),
        (1, ""),
    ]


@pytest.mark.parametrize(
    ("answer", "expected", "is_so"),
    [
        ("The answer is 4.", "4", True),
        ("so we get #### 1,000", "#### 1000", True),
        ("\\boxed{12}", "After some steps the end is reached.\n#### 12", True),
        ("答案是：北京", "北京", True),
        ("答案：12", "15", False),
        ("It is long, and says very many things on the way, until at its end there stands 42", "42", True),
        ("It is long, and says very many things on the way, until at its end there stands 43", "42", False),
        ("Paris", "paris.", True),
        ("Paris", "London", False),
        ("-4", "4", False),
        ("2 apples", "3 apples", False),
    ],
)
def test_answers_agree_by_their_end(answer: str, expected: str, is_so: bool) -> None:
    assert agrees(answer, expected) is is_so


def test_long_answers_agree_by_their_words() -> None:
    text = "Water boils at a lower temperature on a mountain because the air presses less there than at the sea."
    assert agrees(text.replace("mountain", "hill"), text)
    assert not agrees("Nobody knows why this should be so, and those who say they do are mostly wrong about it.", text)


def test_thoughts_are_split_from_answers() -> None:
    assert split_thought("<think>\nHm.\n</think>\n\n4") == ("Hm.", "4")
    assert split_thought("Hm.</think>4") == ("Hm.", "4")
    assert split_thought("4", " Hm. ") == ("Hm.", "4")
    assert split_thought("4") == ("", "4")


def test_objects_are_found_among_other_words() -> None:
    assert objects_in('x {"a": "1"} {"b": {"c": "{"}}, {broken {"d": "e"') == [{"a": "1"}, {"b": {"c": "{"}}]
    assert objects_in("no { at all }") == []


def lcs_length(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        above = 0
        for place, other in enumerate(right, start=1):
            above, row[place] = row[place], above + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def test_rouge_l_is_that_of_the_textbook() -> None:
    import random

    draw = random.Random(1)
    for _ in range(300):
        left, right = (draw.choices("abcdef", k=draw.randint(1, 80)) for _ in range(2))
        expected = 2 * lcs_length(left, right) / (len(left) + len(right))
        assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected)
    assert rouge_l("把这句话翻译成英文", "把这段话翻译成英文") == pytest.approx(8 / 9)
    assert rouge_l("", "a") == 0.0


def test_the_nearest_is_found_among_many_lengths() -> None:
    known = Novelty()
    for text in ("a", "a b c d e f", "a b c d x f g h"):
        known.add(text)
    assert known.nearest("a b c d e f", 0.7) == 1.0
    assert known.nearest("a b c d e f g h", 0.7) == pytest.approx(14 / 16)
    assert known.nearest("q r s", 0.7) == 0.0


def test_prompts_are_there_in_both_languages() -> None:
    texts = prompts()
    assert {language: sorted(found) for language, found in texts.items()} == {
        "en": ["qa", "self_instruct", "think"],
        "zh": ["qa", "self_instruct", "think"],
    }
    for found in texts.values():
        assert "{examples}" in found["self_instruct"]
        assert "{passage}" in found["qa"]
        assert "{question}" in found["think"]
    assert sum("一" <= word <= "龥" for word in words_of(texts["zh"]["qa"])) > 50


def test_rows_with_tools_are_left_as_they_are(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    user, result = {"role": "user", "content": "q"}, {"role": "tool", "content": "3"}
    records = [
        {"messages": [user, call, result, {"role": "assistant", "content": "three"}], "tools": [{"name": "add"}]},
        {"messages": [user, {"role": "assistant", "content": "four", "reasoning_content": "Hm."}]},
        {"messages": [user, {"role": "assistant", "content": "five"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    rows = list(read_rows(Source((str(file),)), ReadReport()))
    assert [(_thinks(row), _can_be_asked(row)) for row in rows] == [(False, False), (True, True), (False, True)]
    assert [task["output"] for task in seed_tasks(Source((str(file),)))] == ["four", "five"]
    assert [role for role, _ in texts_of(rows[0].sample, with_frame=False)] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert "add" in texts_of(rows[0].sample, with_frame=False)[1][1]
