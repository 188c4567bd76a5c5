"""Multiple choice: the likelihood of letters is that of a hand computation, and planted answers get the known score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.data.encode import EncodeSettings, encode_sample, prompt_for
from onecard.data.messages import Conversation, Turn
from onecard.errors import ConfigError
from onecard.evaluate import choice
from onecard.evaluate.choice import ChoicePrompts, ChoiceSettings, ChoiceTask, OptionTexts, constrained_choice
from onecard.evaluate.likelihood import option_log_probs
from onecard.evaluate.questions import ChoiceSuite
from onecard.evaluate.submissions import submissions
from onecard.evaluate.suites import load_choice_suite
from onecard.evaluate.tables import categories_of as load_subjects
from onecard.inference.generate import Generation
from tests.evaluate import layouts


def by_hand(model: Any, ids: list[int], n_prompt: int) -> float:
    """The sum of log p of everything behind the prompt, from one unpadded pass over the whole text."""
    with torch.no_grad():
        table = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(table[k - 1, ids[k]]) for k in range(n_prompt, len(ids)))


def test_letters_of_plain_prompts_are_a_hand_computation(bundle: Any, tmp_path: Path) -> None:
    suite = load_choice_suite("mmlu", layouts.mmlu(tmp_path))
    task = ChoiceTask(suite, ChoiceSettings(shots=2))
    rows = task.work(bundle, suite.questions[:5])
    n = 0
    for question, row in zip(suite.questions, rows, strict=False):
        shots = "\n\n".join(f"{q.text}\nAnswer: {q.answer}" for q in suite.examples[question.subject][:2])
        header = f"The following are multiple choice questions (with answers) about {question.subject}."
        prompt = f"{header}\n\n{shots}\n\n{question.text}\nAnswer:"
        for letter in "ABCD":
            ids = bundle.tokenizer(f"{prompt} {letter}")["input_ids"]
            n_prompt = len(bundle.tokenizer(prompt)["input_ids"])
            assert ids[:n_prompt] == bundle.tokenizer(prompt)["input_ids"] and len(ids) > n_prompt
            assert row["log_probs"][letter] == pytest.approx(by_hand(bundle.model, ids, n_prompt), abs=1e-6)
            n += 1
        assert row["got"] == max("ABCD", key=row["log_probs"].__getitem__)
    assert n == 20


def test_letters_in_the_chat_template_stand_where_an_answer_is_learned(bundle: Any, tmp_path: Path) -> None:
    suite = load_choice_suite("mmlu", layouts.mmlu(tmp_path))
    settings = ChoiceSettings(is_chat=True, shots=1)
    task = ChoiceTask(suite, settings)
    rows = task.work(bundle, suite.questions[:3])
    prompts = ChoicePrompts(suite, settings, suite.examples, bundle)
    n = 0
    for question, row in zip(suite.questions, rows, strict=False):
        turns = prompts.turns(question, suite.examples[question.subject][:1])
        for letter in "ABCD":
            learned = Conversation((*turns, Turn("assistant", letter)), "")
            sample = encode_sample(learned, bundle.template, bundle.tokenizer, EncodeSettings(512, "last"))[0]
            ids, n_prompt = sample.input_ids[:-1], sample.labels.index(sample.input_ids[-2])
            assert (
                ids[:n_prompt] == prompt_for(turns, bundle.template, bundle.tokenizer).ids and len(ids) == n_prompt + 1
            )
            assert row["log_probs"][letter] == pytest.approx(by_hand(bundle.model, ids, n_prompt), abs=1e-6)
            n += 1
    assert n == 12


def test_options_of_several_tokens_and_any_company(bundle: Any) -> None:
    questions = [[[5, 6, 8], [5, 6, 9, 7]], [[5, 9], [5, 10], [5, 11]], [[4] * 30 + [3, 8], [4] * 30 + [7]]]
    found = option_log_probs(bundle.model, questions, [1, 1, 30])
    assert [[len(option) for option in question] for question in found] == [[2, 3], [1, 1, 1], [2, 1]]
    for options, values, n_prompt in zip(questions, found, [1, 1, 30], strict=True):
        for ids, each in zip(options, values, strict=True):
            assert sum(each) == pytest.approx(by_hand(bundle.model, ids, n_prompt), abs=2e-6)
    alone = [option_log_probs(bundle.model, [q], [n])[0] for q, n in zip(questions, [1, 1, 30], strict=True)]
    assert [v for q in alone for o in q for v in o] == pytest.approx([v for q in found for o in q for v in o], abs=1e-6)


def test_a_constrained_choice_goes_token_by_token() -> None:
    options = OptionTexts(("A", "B", "AB"), ([1, 5, 0], [1, 6, 0], [1, 5, 6, 0]), 1)
    # The likeliest whole option is B; greedy decoding begins with A, and then goes on to AB.
    assert constrained_choice(options, [[-0.5, -3.0], [-0.9, 0.0], [-0.5, -1.0, -1.0]]) == "AB"
    assert constrained_choice(options, [[-0.9, -3.0], [-0.5, 0.0], [-0.9, -1.0, -1.0]]) == "B"


def planted(monkeypatch: pytest.MonkeyPatch, letters: str) -> None:
    """The model finds these letters likeliest, one question after another."""
    remaining = iter(letters)

    def found(_: Any, questions: list[Any], __: list[int]) -> list[list[list[float]]]:
        return [[[0.0 if "ABCDEFG"[k] == letter else -1.0 - k] for k in range(len(options))]
                for options in questions for letter in [next(remaining)]]  # fmt: skip

    monkeypatch.setattr(choice, "option_log_probs", found)


@pytest.mark.parametrize("kind", ["ceval", "cmmlu", "mmlu"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_planted_letters_get_the_known_score(
    kind: str, is_chat: bool, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_choice_suite(kind, layouts.LAYOUTS[kind](tmp_path))
    task = ChoiceTask(suite, ChoiceSettings(is_chat=is_chat))
    planted(monkeypatch, "BDACBD" + "BDAAAA")
    report = task.report(task.work(bundle, suite.questions))
    total, *rest = report["measures"]
    assert total["values"]["accuracy"] == pytest.approx([0.75, 0.4677, 0.9111], abs=1e-4)
    assert total["values"]["mean_of_subjects"] == 0.75
    subjects = [(one["n"], one["values"]["accuracy"][0]) for one in rest if one["group"] == "subject"]
    assert subjects == [(6, 1.0), (6, 0.5)]
    assert {one["name"] for one in rest if one["group"] == "category"} >= {"Humanities" if kind != "mmlu" else "other"}
    assert len(report["worst"]) == 3 and report["worst"][0]["got"] == "A"
    assert report["settings"]["prompt"] == ("chat_template" if is_chat else "base_prompt")


@pytest.mark.parametrize("layout", ["csv", "json"])
def test_planted_answers_to_mmcu_get_the_known_score(
    layout: str, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right are B, D, AC, B in the tables, and B, D, A, C in the file."""
    path = layouts.mmcu_csv(tmp_path) if layout == "csv" else layouts.mmcu_json(tmp_path / "test.json")
    task = ChoiceTask(load_choice_suite("mmcu", path), ChoiceSettings(method="free"))
    texts = iter(["B", "D", "ACD", "B"] if layout == "csv" else ["B", "D", "A", "B"])
    monkeypatch.setattr(
        choice, "answer_safely", lambda _, rows, __: [Generation(next(texts), "stop", 1, 1) for _ in rows]
    )
    total, *rest = task.report(task.work(bundle, task.items))["measures"]
    assert (total["n"], total["values"]["accuracy"][0], total["values"]["unparsed"]) == (4, 0.75, 0)
    subjects = {one["name"]: one["values"]["accuracy"][0] for one in rest if one["group"] == "subject"}
    assert subjects == ({"心理": 1.0, "法律": 0.5} if layout == "csv" else {"心理": 0.75})


def test_planted_answers_to_gaokao_get_points_and_half_points(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ChoiceTask(load_choice_suite("gaokao", layouts.gaokao(tmp_path)), ChoiceSettings(method="free"))
    texts = iter(["答案：A", "故选B。", "G", "不知道"])
    monkeypatch.setattr(
        choice, "answer_safely", lambda _, rows, __: [Generation(next(texts), "stop", 1, 1) for _ in rows]
    )
    rows = task.work(bundle, task.items)
    assert [(row["got"], row["score"]) for row in rows] == [("A", 0.5), ("B", 1.0), ("G", 1.0), ("", 0.0)]
    values = task.report(rows)["measures"][0]["values"]
    assert (values["accuracy"][0], values["unparsed"], values["points_share"]) == (0.5, 1, 11 / 16)
    files = {name: json.loads(text) for name, text in task.submissions(rows, "mine").items()}
    physics = files["submission_gaokao_all_2010-2022_Physics_MCQs.json"]
    assert (physics["keywords"], physics["model_name"]) == ("2010-2022_Physics_MCQs", "mine")
    first, second = physics["example"]
    assert (first["standard_answer"], first["model_answer"], first["score"], first["index"]) == (["AC"], ["A"], 6, 0)
    assert second["model_answer"] == ["B"] and second["year"] == "2011" and "answer" not in second
    (cloze,) = files["submission_gaokao_all_2012-2022_English_Cloze_Test.json"]["example"]
    assert cloze["model_answer"] == ["G", "Z"] and len(cloze["model_output"].split("\n")) == 2
    assert [*task.submissions(rows[:3], "mine")] == [*files][:1]  # a text of which a part was not asked


def test_a_row_of_cmmlus_leaderboard_has_the_means_of_subjects() -> None:
    names = load_subjects("cmmlu")[0]
    suite = ChoiceSuite("cmmlu", Path("cmmlu"), "test", (), {}, names, {})
    rows = [
        {"key": f"cmmlu/test/{subject}/{k}", "got": "A", "score": float(k < 3 if "STEM" in named else k < 1)}
        for subject, named in names.items()
        for k in range(4)
    ]
    text = submissions(suite, "cmmlu/test", rows, "mine")["submission_cmmlu_test.md"]
    n_stem = sum("STEM" in named for named in names.values())
    average = (75 * n_stem + 25 * (67 - n_stem)) / 67
    assert len(names) == 67
    assert text.splitlines()[2] == f"| mine | 75.00 | 25.00 | 25.00 | 25.00 | 25.00 | {average:.2f} |"
    some = [row for row in rows if "STEM" in names[row["key"].split("/")[2]]]
    last = submissions(suite, "cmmlu/test", some, "mine")["submission_cmmlu_test.md"].splitlines()[2]
    assert last == "| mine | 75.00 |  |  |  |  |  |"


def test_several_right_letters_are_chosen_among_all_sets(bundle: Any, tmp_path: Path) -> None:
    suite = load_choice_suite("mmcu", layouts.mmcu_csv(tmp_path))
    several = [question for question in suite.questions if question.is_multiple]
    for method in ("likelihood", "choice"):
        rows = ChoiceTask(suite, ChoiceSettings(method=method)).work(bundle, several)
        assert [len(row["log_probs"]) for row in rows] == [15, 15]


def test_questions_without_answers_become_a_submission(bundle: Any, tmp_path: Path) -> None:
    suite = load_choice_suite("ceval", layouts.ceval(tmp_path), split="test", subjects=["law"])
    task = ChoiceTask(suite, ChoiceSettings(shots=1))
    rows = task.work(bundle, suite.questions)
    files = task.submissions(rows, "mine")
    assert list(files) == ["submission_ceval_test.json"]
    submission = json.loads(files["submission_ceval_test.json"])
    assert list(submission) == ["law"]
    assert list(submission["law"]) == ["0", "1", "2", "3", "4", "5"] and set(submission["law"].values()) <= set("ABCD")
    report = task.report(rows)
    assert report["measures"][0]["n"] == 0 and report["notes"]["untold"] == 6


def test_examples_that_do_not_fit_are_left_out_and_counted(bundle: Any, tmp_path: Path) -> None:
    suite = load_choice_suite("ceval", layouts.ceval(tmp_path, 20))
    rows = (task := ChoiceTask(suite, ChoiceSettings(shots=20))).work(bundle, suite.questions[:2])
    assert all(0 < row["shots"] < 20 for row in rows), "the model reads 512 tokens"
    assert task.report(rows)["notes"] == {"untold": 0, "fewer_shots": 2, "too_long": 0}


def test_without_a_split_of_examples_some_questions_are_shown_and_not_asked(tmp_path: Path) -> None:
    suite = load_choice_suite("mmcu", layouts.mmcu_json(tmp_path / "test.json"))
    task = ChoiceTask(suite, ChoiceSettings(shots=1))
    assert len(task.items) == 3
    with pytest.raises(ConfigError, match="--shots"):
        ChoiceTask(suite, ChoiceSettings(shots=1, method="free", cot=True))


def test_a_chain_of_thought_is_asked_for_and_shown(bundle: Any, tmp_path: Path) -> None:
    suite = load_choice_suite("ceval", layouts.ceval(tmp_path))
    settings = ChoiceSettings(method="free", cot=True, shots=1)
    prompts = ChoicePrompts(suite, settings, suite.examples, bundle)
    shots = suite.examples["law"][:1]
    assert prompts.plain(suite.questions[0], shots).endswith(
        "D. 丁0\n解析：如此\n答案： B\n\n第0题，选？\nA. 甲0\nB. 乙0\nC. 丙0\nD. 丁0\n解析："
    )
    turns = prompts.turns(suite.questions[0], shots)
    assert [turn.role for turn in turns] == ["user", "assistant", "user"] and turns[1].content == "如此\n答案：B"
    assert "一步一步" in turns[2].content


@pytest.mark.slow
def test_a_random_model_is_at_chance(bundle: Any, tmp_path: Path) -> None:
    import random

    right = "".join(random.Random(5).sample("ABCD" * 250, 1000))
    suite = load_choice_suite("mmlu", layouts.mmlu(tmp_path, 1000, right, ("anatomy",)))
    task = ChoiceTask(suite, ChoiceSettings())
    report = task.report(task.work(bundle, suite.questions))
    _, low, high = report["measures"][0]["values"]["accuracy"]
    assert report["measures"][0]["n"] == 1000 and low <= 0.25 <= high
