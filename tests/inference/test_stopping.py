"""An answer ends at the first token that completes a stop, shows nothing of it, and loses nothing else."""

from __future__ import annotations

import pytest
import torch

from onecard.inference.detokenize import decode, without_cut_character
from onecard.inference.stopping import MaxNewTokensPerRow, StopAtText, ended_answer

TEXTS = [
    "Yes.\n### Instruction:\nmore", "好的。\nUser: 再见", "a\nUser:b\nUser:c", " \n\nUser: leading blanks", "User:",
    "no stop in here", "\n\n\nUser", "The fox says 🦊\nUser: ok",
]  # fmt: skip
STOPS = ["\n### Instruction:", "\nUser:", "🦊"]


@pytest.fixture(params=["sp_tokenizer", "bytelevel_tokenizer"])
def tokenizer(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_criterion_fires_at_the_first_token_that_completes_a_stop(tokenizer) -> None:
    n_fired = 0
    prompt = ids_of(tokenizer, "\nUser: this belongs to the prompt\nUser:")
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        criterion = StopAtText(STOPS, tokenizer, len(prompt))
        contained = [any(stop in decode(ids[:n], tokenizer) for stop in STOPS) for n in range(1, len(ids) + 1)]
        fired = [bool(criterion(torch.tensor([prompt + ids[:n]]), None)) for n in range(1, len(ids) + 1)]
        first = contained.index(True) if True in contained else len(ids)
        assert fired[: first + 1] == contained[: first + 1], text
        n_fired += True in fired
    assert n_fired == 5


def test_rows_end_one_by_one(tokenizer) -> None:
    rows = [ids_of(tokenizer, text) for text in ("xyzxyz\nUser:", "abcabcabcabc")]
    width = max(map(len, rows))
    padded = torch.tensor([[rows[0][0]] * (width - len(row)) + row for row in rows])
    assert StopAtText(STOPS, tokenizer, 0)(padded, None).tolist() == [True, False]


def test_a_stop_text_ends_the_answer_and_is_not_shown(tokenizer) -> None:
    shown = {0: "Yes.", 1: "好的。", 2: "a", 3: " \n", 7: "The fox says "}
    for text, expected in [(TEXTS[i], text) for i, text in shown.items()]:
        # Behind the row's end generate fills up with padding.
        ids = [*ids_of(tokenizer, " " + text if text[0] == " " and "▁" in tokenizer.get_vocab() else text), *[0] * 5]
        ended = ended_answer(ids, tokenizer, stop_ids=[], stop_texts=STOPS, max_new_tokens=100)
        assert (ended.text, ended.reason) == (expected, "stop")
        assert any(stop in decode(ids[: ended.n_tokens], tokenizer) for stop in STOPS)
        assert not any(stop in decode(ids[: ended.n_tokens - 1], tokenizer) for stop in STOPS)


def test_a_stop_id_ends_the_answer_and_is_counted(tokenizer) -> None:
    words = ids_of(tokenizer, "one two")
    ended = ended_answer([*words, 2, *words], tokenizer, stop_ids=[2], stop_texts=STOPS, max_new_tokens=100)
    assert (ended.text, ended.reason, ended.n_tokens) == ("one two", "stop", len(words) + 1)


def test_nothing_else_is_stripped(tokenizer) -> None:
    text = "two  blanks , a tab\t and a newline \n"
    ended = ended_answer([*ids_of(tokenizer, text), 2], tokenizer, stop_ids=[2], stop_texts=STOPS, max_new_tokens=100)
    assert ended.text == text


def test_at_the_length_limit_half_a_character_is_held_back(tokenizer) -> None:
    whole = ids_of(tokenizer, "a fox: 🦊")
    n_shown = 0
    for limit in range(1, len(whole) + 1):
        ended = ended_answer(whole, tokenizer, stop_ids=[], stop_texts=[], max_new_tokens=limit)
        assert "a fox: 🦊".startswith(ended.text), ended.text
        assert (ended.reason, ended.n_tokens) == ("length", limit)
        n_shown += "🦊" in ended.text
    assert n_shown == 1, "the character shows when all its bytes are there, and not before"
    assert len(whole) - len(ids_of(tokenizer, "a fox: ")) >= 3, "the test needs a character of several tokens"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("猫\ufffd\ufffd", "猫"), ("猫", "猫"), ("\ufffd" * 5, "\ufffd" * 2), ("a\ufffdb", "a\ufffdb"), ("", "")],
)
def test_at_most_one_characters_bytes_are_held_back(text: str, shown: str) -> None:
    assert without_cut_character(text) == shown


def test_room_is_each_rows_own_and_counts_for_all_its_beams() -> None:
    used_up = MaxNewTokensPerRow([2, 3], n_prompt=10)
    assert used_up(torch.zeros(4, 12), None).tolist() == [True, True, False, False]
    assert used_up(torch.zeros(2, 13), None).tolist() == [True, True]
