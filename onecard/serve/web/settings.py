"""The settings that a page shows: their bounds, what the browser sends of them, and words for what cannot be used.

Knows options, limits and the engine's adapters. It does not know gradio, sessions or how anything is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onecard.config.inference import SamplingOptions
from onecard.data.built_in_templates import BUILT_IN
from onecard.data.chat_template import thought_switch
from onecard.inference.engine import InferenceEngine
from onecard.serve.web.i18n import word

OWN_PROMPT_TYPE = ""  # the adapter's own template
MAX_SEED = 2**32 - 1
MAX_STOP_TEXTS, MAX_TEXT_CHARS = 16, 100_000
THINKING = ("auto", "on", "off")  # auto: as the server was started


@dataclass(frozen=True)
class Bounds:
    """What a slider can be set to."""

    least: float
    most: float
    step: float


@dataclass(frozen=True)
class AdjustedValue:
    """A value that could not be used, and the one that was used instead. No name: the values did not fit the page."""

    name: str = ""
    given: Any = None
    used: Any = None
    allowed: Bounds | Sequence[str] = ()


@dataclass(frozen=True)
class PageSettings:
    """Everything beside the conversation that an answer depends on, in the order in which the page sends it."""

    adapter: str
    prompt_type: str
    system: str
    sampling: SamplingOptions
    show_beams: bool = False
    thinking: str = "auto"

    def values(self) -> list[Any]:
        """As the page's components hold them; `from_values` reads them back."""
        sampling = self.sampling
        stop = "\n".join(text.replace("\n", "\\n") for text in sampling.stop)
        numbers = [getattr(sampling, name) for name in NUMBERS]
        return [self.adapter, self.prompt_type, self.system, *numbers, stop, self.show_beams, self.thinking]


NUMBERS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "seed",
)
NAMES = ("adapter", "prompt_type", "system", *NUMBERS, "stop_texts", "show_beams", "thinking")
FRACTIONS = ("temperature", "top_p", "repetition_penalty")


def bounds_of(engine: InferenceEngine, start: SamplingOptions) -> dict[str, Bounds]:
    """The bounds of each number. They follow the engine's limits, and hold what the owner started with in any case."""
    longest = max(1, min(engine.limits.max_answer_tokens, engine.context_limit - 1))
    usual = {
        "max_new_tokens": Bounds(1, longest, 1),
        "min_new_tokens": Bounds(0, longest, 1),
        "temperature": Bounds(0, 2, 0.05),
        "top_p": Bounds(0.05, 1, 0.05),
        "top_k": Bounds(0, 200, 1),
        "num_beams": Bounds(1, engine.limits.max_beams, 1),
        "repetition_penalty": Bounds(1, 2, 0.05),
        "no_repeat_ngram_size": Bounds(0, 20, 1),
        "seed": Bounds(0, MAX_SEED, 1),
    }
    limited = ("max_new_tokens", "min_new_tokens", "num_beams")
    return {
        name: bounds if name in limited else _holding(bounds, getattr(start, name)) for name, bounds in usual.items()
    }


def _holding(bounds: Bounds, value: float) -> Bounds:
    # Off the grid of steps a slider would show the value that was started with as another one.
    on_grid = math.isclose((value - bounds.least) / bounds.step, round((value - bounds.least) / bounds.step))
    step = bounds.step if on_grid else 0.01
    return Bounds(min(bounds.least, value), max(bounds.most, value), step)


class SettingsReader:
    """Reads settings that come from a browser, where anybody may have written anything."""

    def __init__(self, engine: InferenceEngine, start: PageSettings) -> None:
        self.engine = engine
        self.bounds = bounds_of(engine, start.sampling)
        self.start = self._within(start)

    def read(self, values: Sequence[Any]) -> tuple[PageSettings, tuple[AdjustedValue, ...]]:
        """The settings, and which values were missing or not allowed, so that others took their place."""
        if len(values) != len(NAMES):
            return self.start, (AdjustedValue(),)
        given = dict(zip(NAMES, values, strict=True))
        stop = _stop_texts(given["stop_texts"])
        sampling = SamplingOptions(**{name: self._number(name, given[name]) for name in NUMBERS}, stop=stop)
        settings = PageSettings(
            _text(given["adapter"]), _text(given["prompt_type"]), _text(given["system"]), sampling,
            given["show_beams"] is True, _text(given["thinking"]),
        )  # fmt: skip
        settings = self._within(settings)
        return settings, self._moves(given, settings)

    def stored(self, memory: Mapping[str, Any]) -> PageSettings:
        """The settings in what a browser has stored of a page; those of the start where there are none."""
        values = memory.get("settings")
        if not isinstance(values, list):
            return self.start
        if len(values) == len(NAMES) - 1:  # stored before there was a switch for thoughts
            values = [*values, self.start.thinking]
        return self.read(values)[0]

    def with_sampling(
        self, settings: PageSettings, sampling: SamplingOptions | None
    ) -> tuple[PageSettings, tuple[AdjustedValue, ...]]:
        """These settings with the sampling of a loaded chat, moved into bounds."""
        if sampling is None:
            return settings, ()
        given = replace(settings, sampling=sampling)
        inside = self._within(given)
        return inside, self._moves(dict(zip(NAMES, given.values(), strict=True)), inside)

    def _moves(self, given: Mapping[str, Any], settings: PageSettings) -> tuple[AdjustedValue, ...]:
        used = dict(zip(NAMES, settings.values(), strict=True))
        choices = {"adapter": self.engine.names, "prompt_type": BUILT_IN, "thinking": THINKING}
        allowed: dict[str, Bounds | Sequence[str]] = {**self.bounds, **choices}
        allowed["min_new_tokens"] = replace(self.bounds["min_new_tokens"], most=settings.sampling.max_new_tokens)
        names = [name for name in allowed if given[name] != used[name]]
        return tuple(AdjustedValue(name, given[name], used[name], allowed[name]) for name in names)

    def _within(self, settings: PageSettings) -> PageSettings:
        sampling = settings.sampling
        values = {name: self._number(name, getattr(sampling, name)) for name in NUMBERS}
        values["min_new_tokens"] = min(values["min_new_tokens"], values["max_new_tokens"])
        adapter = settings.adapter if settings.adapter in self.engine.names else self.engine.names[0]
        stop = [text[:MAX_TEXT_CHARS] for text in sampling.stop if text][:MAX_STOP_TEXTS]
        prompt_type = settings.prompt_type if settings.prompt_type in BUILT_IN else OWN_PROMPT_TYPE
        thinking = settings.thinking if settings.thinking in THINKING else THINKING[0]
        inside = replace(settings, adapter=adapter, prompt_type=prompt_type, thinking=thinking)
        return replace(inside, sampling=replace(sampling, **values, stop=stop))

    def _number(self, name: str, value: Any) -> Any:
        bounds = self.bounds[name]
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        number = value if usable else getattr(self.start.sampling, name)
        number = min(max(number, bounds.least), bounds.most)
        return float(number) if name in FRACTIONS else round(number)


def template_variables(engine: InferenceEngine, settings: PageSettings) -> dict[str, bool]:
    """What the page sets of the template's own variables: its switch for thoughts, where one was chosen.

    A template without such a switch gets nothing: the page does not show the setting for it.
    """
    if settings.thinking == "auto":
        return {}
    switch = thought_switch(engine.template(settings.adapter, settings.prompt_type).jinja)
    return {switch: settings.thinking == "on"} if switch else {}


def moved_words(moves: Sequence[AdjustedValue], language: str) -> str:
    """What to tell a person about values that others took the place of: a line for each."""
    lines = []
    for move in moves:
        if not move.name:
            lines.append(word(language, "note.clamped"))
            continue
        allowed = (
            ", ".join(move.allowed)
            if not isinstance(move.allowed, Bounds)
            else word(language, "note.from_to", least=f"{move.allowed.least:g}", most=f"{move.allowed.most:.10g}")
        )
        given = word(language, "note.no_value") if move.given in (None, "") else str(move.given)[:40]
        used = move.used if move.used != OWN_PROMPT_TYPE else word(language, "prompt_type.own", name="")
        lines.append(
            word(language, "note.moved", name=word(language, move.name), given=given, used=used, allowed=allowed)
        )
    return "\n".join(lines)


def _text(value: Any) -> str:
    return value[:MAX_TEXT_CHARS] if isinstance(value, str) else ""


def _stop_texts(value: Any) -> list[str]:
    """One stop text per line; the two characters \\n stand for a line break."""
    lines = [line.replace("\\n", "\n") for line in _text(value).splitlines() if line]
    return lines[:MAX_STOP_TEXTS]
