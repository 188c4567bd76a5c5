"""Turns are asked, answered, undone and edited without touching the old session; history is cut by whole exchanges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.data.messages import Turn
from onecard.errors import DataError
from onecard.inference.history import ChatHistory, PromptTooLong, fit_history, prompt_budget


def turns_of(*contents: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(contents))


THREE = ChatHistory("Be kind.", turns_of("u1", "a1", "u2", "a2", "u3", "a3"))


def contents(session: ChatHistory) -> list[str]:
    return [turn.content for turn in session.turns]


def test_a_question_is_asked_and_answered() -> None:
    asked = ChatHistory("Be kind.").ask("Hi")
    assert asked.awaits_answer
    assert asked.prompt == (Turn("system", "Be kind."), Turn("user", "Hi"))
    answered = asked.answer("Hello")
    assert not answered.awaits_answer
    assert answered.turns == turns_of("Hi", "Hello")
    assert asked.turns == turns_of("Hi"), "the old session is as it was"
    assert ChatHistory(" \n").ask("Hi").prompt == turns_of("Hi"), "a blank system prompt is none"


def test_a_stopped_answer_is_kept_and_the_chat_goes_on() -> None:
    session = ChatHistory().ask("Tell me").answer("Once upon a").ask("And then?")
    assert contents(session) == ["Tell me", "Once upon a", "And then?"]


def test_a_question_without_an_answer_is_replaced_by_the_next() -> None:
    assert contents(THREE.ask("failed").ask("again")) == ["u1", "a1", "u2", "a2", "u3", "a3", "again"]


def test_regenerate_takes_the_answer_away_and_keeps_the_question() -> None:
    assert contents(THREE.regenerate()) == ["u1", "a1", "u2", "a2", "u3"]
    assert THREE.regenerate().awaits_answer
    failed = THREE.ask("u4")
    assert failed.regenerate() == failed, "a question that failed is asked again"


def test_undo_gives_the_text_back() -> None:
    session, text = THREE.undo()
    assert (contents(session), text) == (["u1", "a1", "u2", "a2"], "u3")
    session, text = THREE.ask("u4").undo()
    assert (session, text) == (THREE, "u4")


def test_an_edited_question_awaits_its_answer_and_an_edited_answer_stands() -> None:
    question = THREE.edit(2, "new")
    assert (contents(question), question.awaits_answer) == (["u1", "a1", "new"], True)
    answer = THREE.edit(1, "new")
    assert (contents(answer), answer.awaits_answer) == (["u1", "new"], False)
    with_input = ChatHistory("", (Turn("user", "Translate", "cat"),)).edit(0, "Spell")
    assert with_input.turns == (Turn("user", "Spell", "cat"),)


def test_clear_keeps_the_system_prompt() -> None:
    assert THREE.clear() == ChatHistory("Be kind.")
    assert THREE.with_system("Be short.").turns == THREE.turns


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda: ChatHistory().ask(" \n\t"), "empty"),
        (lambda: ChatHistory().answer("Hello"), "no question"),
        (lambda: THREE.answer("Hello"), "no question"),
        (lambda: ChatHistory().regenerate(), "no answer"),
        (lambda: ChatHistory().undo(), "nothing to undo"),
        (lambda: THREE.edit(6, "x"), "no message 7; this chat has 6"),
        (lambda: THREE.edit(-1, "x"), "no message 0"),
        (lambda: THREE.edit(0, " "), "empty"),
        (lambda: ChatHistory("", (Turn("assistant", "Hi"),)), "message 1 has the role assistant; user"),
        (lambda: ChatHistory("", (Turn("user", "a"), Turn("user", "b"))), "message 2"),
        (lambda: ChatHistory("", (Turn("system", "a"),)), "message 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(step, words: str) -> None:
    with pytest.raises(DataError, match=words):
        step()


def test_the_budget_leaves_room_for_the_answer() -> None:
    assert prompt_budget(2048, 512) == 1536
    assert prompt_budget(256, 512) == 128, "a long answer cannot take the question's place"
    assert prompt_budget(2048, 512, max_prompt_tokens=1000) == 1000
    assert prompt_budget(2048, 512, max_prompt_tokens=1900) == 1536


class Counter:
    """Counts what a conversation costs, by a price per character and per turn, and how often it was asked."""

    def __init__(self, per_turn: int = 3) -> None:
        self.per_turn, self.n_calls = per_turn, 0

    def __call__(self, turns: Sequence[Turn]) -> int:
        assert next(turn.role for turn in turns if turn.role != "system") == "user", "templates refuse anything else"
        self.n_calls += 1
        return 1 + sum(self.per_turn + len(turn.content) for turn in turns)


def test_whole_exchanges_go_and_the_numbers_are_told() -> None:
    turns = list(THREE.prompt[:-1])
    before = list(turns)
    count = Counter()
    full = count(turns)
    assert fit_history(turns, count, full) == (tuple(turns), 0, full)
    cut = fit_history(turns, count, full - 1)
    assert [turn.content for turn in cut.turns] == ["Be kind.", "u2", "a2", "u3"]
    assert (cut.n_dropped, cut.n_tokens) == (2, full - 10)
    assert turns == before


def test_what_is_too_long_alone_is_refused_with_numbers() -> None:
    turns = (Turn("system", "s" * 10), *turns_of("u1", "a1", "q" * 30))
    with pytest.raises(PromptTooLong, match=r"takes 47 tokens, and 46 are free.*max_new_tokens") as caught:
        fit_history(turns, Counter(), 46)
    assert (caught.value.n_tokens, caught.value.budget) == (47, 46)
    assert fit_history(turns, Counter(), 47).n_dropped == 2
    for budget in (0, -5):
        with pytest.raises(PromptTooLong, match="and 0 are free"):
            fit_history(turns, Counter(), budget)


@pytest.mark.parametrize("turns", [(), (Turn("system", "s"),)])
def test_without_a_question_there_is_nothing_to_fit(turns) -> None:
    with pytest.raises(DataError, match="no user message"):
        fit_history(turns, lambda turns: 1, 100)


def test_a_greeting_in_front_goes_first() -> None:
    turns = (Turn("system", "s"), Turn("assistant", "Welcome!"), *turns_of("u1", "a1", "u2"))
    count = lambda turns: len(turns)  # noqa: E731
    assert fit_history(turns, count, 5).turns == turns
    assert fit_history(turns, count, 4).turns == (turns[0], *turns[2:])
    assert fit_history(turns, count, 3).turns == (turns[0], turns[4])


texts = st.text(max_size=20)
conversations = st.builds(
    lambda system, contents: [*([Turn("system", system)] if system else []), *turns_of(*contents)],
    texts,
    st.lists(texts, min_size=1, max_size=41).map(lambda items: items if len(items) % 2 else items[:-1]),
)


@given(conversations, st.integers(-10, 900))
def test_any_conversation_and_budget(turns: list[Turn], budget: int) -> None:
    before, count = list(turns), Counter()
    n_head = sum(turn.role == "system" for turn in turns)
    price = Counter()
    try:
        fitted = fit_history(turns, count, budget)
    except PromptTooLong as reason:
        assert reason.n_tokens == price((*turns[:n_head], turns[-1])) > budget, "refused only where nothing helps"
    else:
        assert fitted.n_tokens == price(fitted.turns) <= budget
        assert fitted.turns[:n_head] == tuple(turns[:n_head])
        assert fitted.turns[-1] is turns[-1]
        assert fitted.turns[n_head:] == tuple(turns[len(turns) - len(fitted.turns) + n_head :]), "the newest ones"
        assert fitted.n_dropped == len(turns) - len(fitted.turns)
        roles = [turn.role for turn in fitted.turns[n_head:]]
        assert roles[0] == "user" and all(one != two for one, two in pairwise(roles))
        if fitted.n_dropped:
            longer = (*turns[:n_head], *turns[n_head + fitted.n_dropped - 2 :])
            assert price(longer) > budget, "no more is dropped than must be"
    assert turns == before
    assert count.n_calls <= 2 + math.ceil(math.log2(max(1, len(turns) // 2 + 1)))


@given(conversations, st.integers(0, 60), st.randoms(use_true_random=False))
def test_counts_in_any_order_never_exceed_the_budget(turns: list[Turn], budget: int, random) -> None:
    """Templates may leave things out of long histories, so that a longer conversation has fewer tokens."""
    told: dict[int, int] = {}

    def count(turns: Sequence[Turn]) -> int:
        return told.setdefault(len(turns), random.randint(1, 80))

    n_head = sum(turn.role == "system" for turn in turns)
    try:
        fitted = fit_history(turns, count, budget)
    except PromptTooLong:
        assert told[n_head + 1] > budget
    else:
        assert told[len(fitted.turns)] == fitted.n_tokens <= budget
        assert fitted.turns[-1] == turns[-1]
