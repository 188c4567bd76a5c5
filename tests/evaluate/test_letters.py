"""Letters in free answers: found where an answer chooses, and nowhere else."""

from __future__ import annotations

import pytest

from onecard.evaluate.letters import letters_in

OPTIONS = ("上海", "北京", "广州", "深圳市")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B. 北京", "B"), (" (C)", "C"), ("**D**", "D"), ("A 北京", "A"), ("C)", "C"), ("答案：C", "C"),
        ("答案：\nB", "B"), ("正确答案是 **D**。", "D"), ("正确选项为C", "C"), ("所以答案选 D 项", "D"),
        ("不选A，应选B", "B"), ("第一，A错误；B正确，答案为 B", "B"), ("So the answer is (B).", "B"),
        ("The correct answer is option C because", "C"), ("answer：Ａ", "A"), ("\\boxed{C}", "C"),
        ("Answer: A\nNo, wait. Answer: B", "B"), ("<think>答案是A</think>答案是B", "B"), ("我认为是北京", "B"),
        ("A cat is no fish.", ""), ("The answer is a cat", ""), ("Answer: b", ""), ("Apples", ""), ("", ""),
        ("it could be A or B", ""), ("答案是A和B", ""), ("<think>答案是A", ""), ("北京和上海", ""),
    ],
)  # fmt: skip
def test_one_letter(text: str, letter: str) -> None:
    assert letters_in(text, "ABCD", OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "letters"),
    [("ABD", "ABD"), ("A、C", "AC"), ("故选：$\\mathrm{ABD}$", "ABD"), ("答案是 C 和 A", "AC"), ("B", "B"), ("无", "")],
)
def test_several_letters(text: str, letters: str) -> None:
    assert letters_in(text, "ABCD", is_multiple=True) == letters


def test_an_option_inside_another_one_is_not_quoted() -> None:
    assert letters_in("我选深圳市", "AB", ("深圳", "深圳市")) == "B"
