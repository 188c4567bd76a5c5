"""What the buttons of the page for a blind comparison do: two answers, one choice, and at the end what the choices say.

Knows the votes and the words for them. It does not know gradio. Whose an answer is never goes to the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onecard.data.messages import Turn
from onecard.errors import OneCardError
from onecard.serve.web.answer import as_html, failure_words, letters
from onecard.serve.web.chat import remembered_language
from onecard.serve.web.events import HIDDEN, Changes, GradioHooks, PageWiring, TranslatedComponents
from onecard.serve.web.i18n import word
from onecard.serve.web.sanitize import plain_markdown
from onecard.serve.web.votes import PREFERENCES_FILE, BlindVotes

PLACES = (1, 0, 2)  # the keys, in the order of their buttons; 0: a tie
VIEW = ("pair", "status", "question", "answers", "answer_1", "answer_2", "votes", "result", "note")


class BlindWiring(PageWiring):
    """The handlers of the page, and the components they read and write."""

    def __init__(
        self, votes: BlindVotes, parts: dict[str, Any], labels: TranslatedComponents, language: str,
        gradio: GradioHooks,
    ) -> None:  # fmt: skip
        super().__init__(parts, labels, language, gradio)
        self.votes = votes

    def connect(self, blocks: Any) -> None:
        p = self.parts
        view = [p[name] for name in VIEW]
        for place in PLACES:
            self.on(p[f"vote_{place}"].click, self._voting(place), [p["pair"], p["language"]], view)
        self.on(p["undo"].click, self.undo, [p["language"]], view)
        self.on(p["reveal"].click, self.reveal, [p["language"]], view)
        self.on(p["language"].change, self.speak, [p["language"]], [*self.labels.components, *view])
        self.connect_page(blocks, view, "() => onecard.look()")

    def _voting(self, place: int) -> Callable[[str, str, str], Changes]:
        return lambda browser, key, language: self._after(lambda: self.votes.vote(key, place), language)

    def undo(self, browser: str, language: str) -> Changes:
        return self._after(self.votes.undo, language)

    def reveal(self, browser: str, language: str) -> Changes:
        return self._after(lambda: None, language, is_asked=True)

    def speak(self, browser: str, language: str) -> Changes:
        return [*self.labels.updates(language), *self._after(lambda: None, language)]

    def restore(self, browser: str, stored: str, browser_language: str) -> Changes:
        language = remembered_language(stored, browser_language, self.wanted_language)
        return [*self._after(lambda: None, language), {"value": language}]

    def _after(self, work: Callable[[], None], language: str, *, is_asked: bool = False) -> Changes:
        """What the page shows once this is done: the next pair, or the result where all is voted or it is asked for."""
        note, result = "", ""
        try:
            work()
            if is_asked or self.votes.current is None:
                result = _result_html(self.votes.export(), len(self.votes.preferences()), language)
        except OneCardError as reason:
            note = failure_words(reason, language)
        pair, n_all, n_done = self.votes.current, len(self.votes.pairs), len(self.votes.votes)
        first, second = self.votes.in_order(pair) if pair else ("", "")
        status = word(language, "blind.progress", n=n_done, m=n_all)
        question = _question(pair.turns, language) if pair else word(language, "blind.done")
        shown = bool(pair)  # a row knows no "hidden"
        return [
            {"value": pair.key if pair else ""}, {"value": as_html(status, "oc-line")}, {"value": question},
            {"visible": shown}, {"value": plain_markdown(first)}, {"value": plain_markdown(second)},
            {"visible": shown}, {"value": result, "visible": bool(result) or HIDDEN},
            {"value": as_html(note, "oc-notice"), "visible": bool(note) or HIDDEN},
        ]  # fmt: skip


def _question(turns: Sequence[Turn], language: str) -> str:
    """The conversation that both answer, as Markdown; who speaks is told where there are several turns."""
    texts = [plain_markdown(turn.one_text("\n\n")) for turn in turns]
    if len(turns) == 1:
        return texts[0]
    names = {"user": word(language, "script.you"), "assistant": word(language, "script.model")}
    return "\n\n".join(f"**{names.get(t.role, t.role)}**\n\n{text}" for t, text in zip(turns, texts, strict=True))


def _result_html(result: dict[str, Any], n_preferences: int, language: str) -> str:
    """Who was chosen how often, with the interval, as a table and two sentences."""
    rows = [
        (f"A: {result['a']}", result["wins_a"]), (f"B: {result['b']}", result["wins_b"]),
        (word(language, "blind.ties"), result["ties"]),
    ]  # fmt: skip
    table = "".join(f"<tr><th>{letters(name)}</th><td>{n}</td></tr>" for name, n in rows)
    lines = []
    if result["share_b"]:
        share, low, high = (f"{100 * part:.0f} %" for part in result["share_b"])
        lines.append(word(language, "blind.share", share=share, low=low, high=high))
    lines.append(word(language, f"blind.{result['result'].partition(' ')[0]}"))
    if result["same"]:
        lines.append(word(language, "blind.same", n=result["same"]))
    lines.append(word(language, "blind.exported", n=n_preferences, file=PREFERENCES_FILE))
    told = "".join(f"<p>{letters(line)}</p>" for line in lines)
    return f'<h2 class="oc-label">{letters(word(language, "blind.result"))}</h2><table>{table}</table>{told}'
