"""Text comes out of ids exactly, whatever they cut through, and what was shown is never taken back."""

from __future__ import annotations

import random

import pytest

from onecard.inference.detokenize import REPLACEMENT, decode, without_cut_character, without_open_end
from onecard.inference.stopping import answer_so_far, ended_answer

PIECES = [
    "你好，世界", "🦊", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\u00e9",
    "e\u0301", "ก็", "क्षि", "a", " ", "\n", "  x", "\u0301", "\u200d", "𝒳", "ﷺ", "한국어", "ß", "\U0001f1e8\U0001f1f3",
    "1\ufe0f\u20e3", "...", "the fox", "\t", "𠮷野家",
]  # fmt: skip


@pytest.fixture(params=["sp_tokenizer", "bytelevel_tokenizer"])
def tokenizer(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def texts(n: int) -> list[str]:
    draw = random.Random(5)
    return ["x" + "".join(draw.choices(PIECES, k=draw.randint(1, 7))) for _ in range(n)]


def test_every_split_point_shows_a_beginning_without_replacement_and_the_whole_at_the_end(tokenizer) -> None:
    n_splits = n_held_back = 0
    for text in texts(60):
        ids = ids_of(tokenizer, text)
        assert decode(ids, tokenizer) == text
        pieces, shown = [], ""
        for n in range(1, len(ids) + 1):
            now = without_open_end(decode(ids[:n], tokenizer), [])
            assert REPLACEMENT not in now
            assert now.startswith(shown), (text, shown, now)
            n_held_back += now == shown
            pieces.append(now[len(shown) :])
            shown = now
            n_splits += 1
        assert "".join(pieces) == text
    assert n_splits > 1000
    assert n_held_back > 300, "the texts do cut through characters"


def test_bytes_that_are_no_character_do_not_take_back_what_was_shown(tokenizer) -> None:
    draw = random.Random(9)
    n_broken = 0
    for _ in range(100):
        ids = [draw.randrange(3, 400) for _ in range(30)]
        shown = ""
        for n in range(1, len(ids) + 1):
            now = without_open_end(decode(ids[:n], tokenizer), [])
            assert now.startswith(shown), (shown, now)
            shown = now
        n_broken += REPLACEMENT in shown
        assert decode(ids, tokenizer).startswith(shown)
    assert n_broken > 20, "random ids do hold broken characters"


def test_a_valid_character_before_a_broken_one_survives(sp_tokenizer) -> None:
    ids = sp_tokenizer.convert_tokens_to_ids(["<0xE7>", "<0x8C>", "<0xAB>", "<0xE5>"])
    assert sp_tokenizer.decode(ids) == REPLACEMENT * 4
    assert decode(ids, sp_tokenizer) == "猫" + REPLACEMENT
    assert without_cut_character(decode(ids, sp_tokenizer)) == "猫"


def test_a_stop_text_never_flashes_up_and_what_only_looks_like_one_is_shown_late(tokenizer) -> None:
    stops = ["\nUser:", "<|end|>", "。。", "aab", "ab"]
    n_seen = n_open = 0
    for text in ("Yes.\nUser: hi", "a <|end of it|> and <|end|> there", "好。x。。y", "aaa aacab", "b\nUse it\nUs"):
        ids = ids_of(tokenizer, text)
        final = ended_answer(ids, tokenizer, stop_ids=[], stop_texts=stops, max_new_tokens=len(ids))
        shown = ""
        for n in range(1, len(ids)):
            now = answer_so_far(ids[:n], tokenizer, stop_ids=[], stop_texts=stops, max_new_tokens=len(ids))
            assert final.text.startswith(now.text), (now.text, final.text)
            assert now.text.startswith(shown)
            shown = now.text
            n_seen += 1
            n_open += now.reason is None and now.text != decode(ids[:n], tokenizer)
    assert n_seen > 40
    assert n_open > 8


def test_the_examples_of_the_docstring() -> None:
    assert without_open_end("Yes.\nUs", ["\nUser:"]) == "Yes."
    assert without_open_end("Yes.\n\n", ["\nUser:"]) == "Yes.\n"
    assert without_open_end("好\ufffd", ["\nUser:"]) == "好"
    assert without_open_end("ab", ["abc", "b!"]) == ""
    assert without_open_end("", ["abc"]) == ""
