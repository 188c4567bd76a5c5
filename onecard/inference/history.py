"""A conversation as page, terminal and API hold it: asked, answered, undone, edited, and cut to the context.

A `ChatHistory` is immutable: each step gives a new one, so that a page can keep the old one until an answer is whole.
Knows turns and numbers of tokens. It does not know models, the engine, tokenizers, pages or terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from onecard.data.messages import Role, Turn
from onecard.errors import DataError

Count = Callable[[Sequence[Turn]], int]  # turns -> tokens of the prompt that they become


class PromptTooLong(DataError):
    """Even the system prompt and the newest message alone are over the budget, both in tokens."""

    def __init__(self, n_tokens: int, budget: int) -> None:
        self.n_tokens, self.budget = n_tokens, budget
        super().__init__(
            f"the newest message, with the system prompt, takes {n_tokens} tokens, and {max(0, budget)} are free for "
            "them beside the answer: shorten one of the two, or lower max_new_tokens"
        )


class UndoneTurn(NamedTuple):
    """The session without its last exchange, and the text that was asked, for the input box."""

    session: ChatHistory
    text: str


class FittedHistory(NamedTuple):
    """What is sent to the model: `n_tokens` of prompt; the `n_dropped` oldest turns were left out."""

    turns: tuple[Turn, ...]
    n_dropped: int
    n_tokens: int


@dataclass(frozen=True)
class ChatHistory:
    """A system prompt ("" for none), then user and assistant turns in alternation, the user's first.

    A last turn of the user awaits its answer. Raises DataError for turns in any other order.
    """

    system: str = ""
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        for number, turn in enumerate(self.turns, 1):
            if turn.role != expected_role(number):
                raise DataError(
                    f"message {number} has the role {turn.role}; {expected_role(number)} must stand there: "
                    "user and assistant take turns, and the user begins"
                )

    @property
    def awaits_answer(self) -> bool:
        """Whether the last turn is a question without an answer."""
        return bool(self.turns) and self.turns[-1].role == "user"

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """All turns as a template takes them, with the system turn in front where there is one."""
        return (Turn("system", self.system), *self.turns) if self.system.strip() else self.turns

    def ask(self, text: str, input: str = "") -> ChatHistory:
        """With a new question, which awaits its answer.

        It takes the place of a question that never got one: templates refuse two user turns in a row. Raises DataError
        for an empty text.
        """
        if not text.strip() and not input.strip():
            raise DataError("the message is empty; type something")
        answered = self.turns[:-1] if self.awaits_answer else self.turns
        return replace(self, turns=(*answered, Turn("user", text, input)))

    def answer(self, text: str) -> ChatHistory:
        """With the answer, whole or stopped half-way, to the question that awaits one. Raises DataError: none does."""
        if not self.awaits_answer:
            raise DataError("there is no question to answer; ask one first")
        return replace(self, turns=(*self.turns, Turn("assistant", text)))

    def regenerate(self) -> ChatHistory:
        """Without the last answer, whose question awaits another one. Raises DataError when nothing was asked yet."""
        if not self.turns:
            raise DataError("there is no answer to make anew; ask something first")
        return self if self.awaits_answer else replace(self, turns=self.turns[:-1])

    def undo(self) -> UndoneTurn:
        """Without the last question and its answer. Raises DataError when nothing was asked yet."""
        if not self.turns:
            raise DataError("there is nothing to undo")
        start = len(self.turns) - (1 if self.awaits_answer else 2)
        return UndoneTurn(replace(self, turns=self.turns[:start]), self.turns[start].content)

    def edit(self, index: int, text: str) -> ChatHistory:
        """With another text for `turns[index]`; everything behind it goes.

        An edited question awaits its answer; an edited answer stands, and the next question follows it.
        Raises DataError when there is no such turn, or for an empty question.
        """
        if not 0 <= index < len(self.turns):
            raise DataError(f"there is no message {index + 1}; this chat has {len(self.turns)}")
        turn = self.turns[index]
        if turn.role == "user" and not text.strip() and not turn.input.strip():
            raise DataError("the message is empty; type something")
        return replace(self, turns=(*self.turns[:index], replace(turn, content=text)))

    def clear(self) -> ChatHistory:
        """Without turns; the system prompt stays."""
        return replace(self, turns=())

    def with_system(self, text: str) -> ChatHistory:
        """With another system prompt, which holds for the whole conversation from the next answer on."""
        return replace(self, system=text)


def expected_role(number: int) -> Role:
    """Who speaks in message `number`, counted from 1 behind the system prompt: 1 -> "user", 2 -> "assistant"."""
    return "user" if number % 2 else "assistant"


def prompt_budget(context_limit: int, max_new_tokens: int, max_prompt_tokens: int = 0) -> int:
    """The most tokens a prompt may have, so that the answer finds room too.

    `max_new_tokens` of room, but never more than half the context: prompt_budget(2048, 512) -> 1536,
    prompt_budget(256, 512) -> 128. `max_prompt_tokens` above 0 is a limit of its own.
    """
    budget = context_limit - min(max_new_tokens, context_limit // 2)
    return min(budget, max_prompt_tokens) if max_prompt_tokens > 0 else budget


def fit_history(turns: Sequence[Turn], count: Count, budget: int) -> FittedHistory:
    """The turns without as many of the oldest exchanges as it takes for the prompt to have at most `budget` tokens.

    The system turn and the newest question always stay; what is kept begins with a question. `turns` is not changed.
    `count` is called at most 2 + log2(exchanges) times. What is returned was counted, so it fits even where a longer
    conversation happens to have fewer tokens; only then may more be left out than had to be.

    system, u1, a1, u2, a2, u3 with room for 3 turns -> FittedHistory((system, u3), 4, ...): never half an exchange

    Raises PromptTooLong when system turn and newest question alone are over the budget, DataError without a question.
    """
    n_head = next((place for place, turn in enumerate(turns) if turn.role not in ("system", "tool_list")), len(turns))
    starts = [place for place in range(n_head, len(turns)) if turns[place].role == "user"]
    if not starts:
        raise DataError("there is no user message to answer")
    n_tokens = count(tuple(turns))
    if n_tokens <= budget:
        return FittedHistory(tuple(turns), 0, n_tokens)
    # A place below 0 stands for the whole conversation, which is known not to fit.
    too_long, fits = (-1 if starts[0] > n_head else 0), len(starts) - 1
    kept = _from(turns, n_head, starts[fits])
    if kept != tuple(turns):
        n_tokens = count(kept)
    if n_tokens > budget:
        raise PromptTooLong(n_tokens, budget)
    while fits - too_long > 1:
        middle = (too_long + fits) // 2
        candidate = _from(turns, n_head, starts[middle])
        n_candidate = count(candidate)
        if n_candidate <= budget:
            fits, kept, n_tokens = middle, candidate, n_candidate
        else:
            too_long = middle
    return FittedHistory(kept, len(turns) - len(kept), n_tokens)


def _from(turns: Sequence[Turn], n_head: int, start: int) -> tuple[Turn, ...]:
    return (*turns[:n_head], *turns[start:])
