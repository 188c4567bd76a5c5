"""`onecard evaluate blind` but for its page: pairs of files and of a base with its run, votes, result, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.data.messages import Conversation, Turn
from onecard.data.sources import ReadReport, read
from onecard.errors import CheckpointError, ConfigError, DataError
from onecard.evaluate.blind import pair_up, read_answers
from onecard.programs import evaluate
from onecard.serve.web import app, votes
from onecard.serve.web.votes import BlindVotes, VotedPair


def pairs(n: int) -> list[VotedPair]:
    return [VotedPair(str(k), (Turn("user", f"Q{k}", "more"),), f"a{k}", f"b{k}") for k in range(n)]


def choose(given: BlindVotes, side: str) -> None:
    pair = given.current
    assert pair is not None
    given.vote(pair.key, 1 if given.in_order(pair)[0].startswith(side) else 2)


def test_votes_are_kept_and_the_wrong_pair_is_never_voted_on(tmp_path: Path) -> None:
    given = BlindVotes(tmp_path, pairs(30), ("base", "run"))
    assert 5 < sum(given.b_is_first(key) for key in given.pairs) < 25
    choose(given, "b")
    given.vote("0", 1)  # a second press for a pair that has its vote
    given.vote("7", 1)  # a page that is behind
    assert given.votes == {"0": "b"}
    choose(given, "a")
    given.vote("2", 0)
    given.undo()
    again = BlindVotes(tmp_path, pairs(30), ("base", "run"))
    assert again.votes == {"0": "b", "1": "a"} and again.current is not None and again.current.key == "2"
    for changed, seed in ((pairs(29), 42), (pairs(30), 1)):
        with pytest.raises(ConfigError, match=r"--output_path: .*holds 2 votes on other answers"):
            BlindVotes(tmp_path, changed, ("base", "run"), seed=seed)
    (tmp_path / "votes.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no file of votes"):
        BlindVotes(tmp_path, pairs(30), ("base", "run"))


def test_a_vote_that_cannot_be_written_is_no_vote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = BlindVotes(tmp_path, pairs(3), ("a", "b"))
    choose(given, "a")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(votes, "write_whole", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier votes are safe"):
        choose(given, "a")
    assert given.votes == {"0": "a"}


def test_what_votes_say_and_that_dpo_reads_them(tmp_path: Path) -> None:
    same = [VotedPair("s", (Turn("user", "Q"),), "x", " x\n")]
    turns = (Turn("system", "Be short."), Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Bye", "now"))
    given = BlindVotes(tmp_path, [*pairs(19), VotedPair("c", turns, "a!", "b!"), *same], ("base", "run"))
    assert given.result()["result"] == "no difference beyond noise" and given.result()["share_b"] is None
    for number in range(20):
        choose(given, "a" if number < 3 else "b")
    result = given.export()
    assert (result["wins_a"], result["wins_b"], result["ties"], result["same"], result["left"]) == (3, 17, 1, 1, 0)
    assert result["share_b"] == [0.85, 0.639581, 0.947631]  # Wilson's interval of 17 of 20, by hand
    assert result["result"] == "better"
    found = list(read(str(tmp_path / "preferences.jsonl"), report=ReadReport()))
    assert len(found) == 20 and all(isinstance(one, Conversation) and one.rejected for one in found)
    first, last = found[0], found[-1]
    assert isinstance(first, Conversation) and isinstance(last, Conversation)
    assert [first.turns[-1].content, first.rejected[-1].content] == ["a0", "b0"]
    assert first.turns[0] == Turn("user", "Q0", "more") and first.rejected[:-1] == first.turns[:-1]
    assert [turn.content for turn in last.turns] == ["Be short.", "Hi", "Hello", "Bye\nnow", "b!"]


def test_answers_of_files_meet_at_their_questions(tmp_path: Path) -> None:
    generated = [
        {"instruction": "One", "input": "", "reference_output": "ref", "output": "gen 1", "finish_reason": "stop"},
        {"instruction": "Two", "output": None, "finish_reason": "error", "error": "too long"},
        {"instruction": "Three", "output": "gen 3", "finish_reason": "stop"},
    ]
    shaped = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"chat {q}"}]}
              for q in ("Three", "Two", "One", "Four")]  # fmt: skip
    for name, rows in (("a", generated), ("b", shaped)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    met = pair_up(read_answers(tmp_path / "a.jsonl"), read_answers(tmp_path / "b.jsonl"))
    assert [(pair.turns[0].content, pair.a, pair.b) for pair in met] == [
        ("One", "gen 1", "chat One"), ("Three", "gen 3", "chat Three")
    ]  # fmt: skip
    (tmp_path / "c.jsonl").write_text(
        '{"instruction": "One", "output": "x"}\n{"text": "no question"}', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"c\.jsonl:2: the record holds no question with an answer"):
        read_answers(tmp_path / "c.jsonl")


def test_a_base_and_its_run_answer_once(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), peft.LoraConfig(target_modules=["q_proj"])
    )
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "q.jsonl").write_text('{"instruction": "Say a"}\n{"instruction": "Say b"}', encoding="utf-8")
    served: list[Any] = []
    monkeypatch.setattr(app, "launch", lambda *_: None)
    monkeypatch.setattr(app, "blind_page", lambda given, _: served.append(given))
    line = ["blind", "--a", "base", "--b", str(tmp_path / "run"), "--questions", str(tmp_path / "q.jsonl"),
            "--output_path", str(tmp_path / "out"), "--model_path", str(tiny_base), "--bits", "32", "--device", "cpu",
            "--prompt_type", "alpaca", "--max_new_tokens", "6"]  # fmt: skip
    evaluate.main(line)
    monkeypatch.setattr("onecard.evaluate.blind.load_bundle", None)  # no model is loaded again
    evaluate.main(line)
    assert [pair.key for pair in served[0].pairs.values()] == [pair.key for pair in served[1].pairs.values()]
    rows = [
        [json.loads(row)["output"] for row in (tmp_path / "out" / f"answers_{x}.jsonl").read_text("utf-8").splitlines()]
        for x in "ab"
    ]
    assert len(rows[0]) == len(rows[1]) == 2 and rows[0] != rows[1]
    by_hand = [
        json.loads(row)["output"] for row in generated(tiny_base, tmp_path).read_text(encoding="utf-8").splitlines()
    ]
    assert rows[0] == by_hand


def generated(base: Path, folder: Path) -> Path:
    """What `onecard generate` writes with the base alone."""
    from onecard.programs import generate

    out = folder / "by_hand.jsonl"
    asked = ["--data_path", str(folder / "q.jsonl"), "--output_path", str(out), "--model_path", str(base)]
    generate.main([*asked, "--bits", "32", "--device", "cpu", "--prompt_type", "alpaca", "--max_new_tokens", "6"])
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--a", "base", "--b", "base"], "--b: base is A, too"),
        (["--a", "base", "--b", "run"], "--questions: is missing; a model needs questions"),
        (["--a", "{a}", "--b", "{b}", "--questions", "{a}"], "--questions: goes with a model"),
        (["--a", "{a}", "--b", "{b}"], "answer no question in common"),
        (["--a", "{a}", "--b", "gone.jsonl"], "--b: there is no file gone.jsonl"),
        (["--a", "{a}", "--b", "{b}", "--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from other machines"),
    ],
)
def test_what_cannot_be_compared_is_named(words: list[str], message: str, tmp_path: Path) -> None:
    for name in "ab":
        row = {"instruction": f"Only {name}", "output": "x"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    typed = [word.format(a=tmp_path / "a.jsonl", b=tmp_path / "b.jsonl") for word in words]
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate.main(["blind", *typed, "--output_path", str(tmp_path / "out")])
