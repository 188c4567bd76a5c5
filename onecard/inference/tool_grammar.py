"""The grammar of tools' calls in the forms that `data/tool_answers.py` reads, with arguments of each tool's schema.

Knows the marks of these forms. Does not know how a grammar is kept to (`grammar.py`) or who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onecard.data.tool_answers import CallStyle
from onecard.inference.grammar import AnswerGrammar, json_part, literal

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS = {"type": "object"}


@dataclass(frozen=True)
class HeldTools:
    """The tools that an answer may call, held to their schemas.

    tools: OpenAI's functions. fields: where each stands in the request. must_call: whether nothing but calls is said;
    then all arguments are held to their schemas, else those of `strict` tools. most: calls in one answer, None for any.
    """

    tools: Sequence[Mapping[str, Any]]
    fields: Sequence[str]
    must_call: bool = False
    most: int | None = None

    @property
    def is_strict(self) -> bool:
        return self.must_call or any(tool.get("strict") for tool in self.tools)


def calls_grammar(
    held: HeldTools, style: CallStyle, content: AnswerGrammar | None, *, has_args_mark: bool = False
) -> AnswerGrammar:
    """Calls of these tools; where none must be made, also what is said: anything, or `content` and nothing else.

    has_args_mark: Mistral's form since 2025, name[ARGS]{...}. Raises GrammarError for parameters that are no schema.
    """
    parts: dict[str, Mapping[str, Any]] = {}
    schemas: dict[str, str] = {}
    calls = []
    for k, (tool, place) in enumerate(zip(held.tools, held.fields, strict=True)):
        name, schema = f"arguments_{k}", tool.get("parameters", NO_ARGUMENTS)
        is_held = held.must_call or tool.get("strict")
        schemas[name] = f"{place}.parameters"
        parts[name] = json_part(schema if is_held else ANY_ARGUMENTS, schemas[name])
        calls.append(_call(str(tool["name"]), name, style, has_args_mark=has_args_mark))
    form = _mistral_args if style == "mistral" and has_args_mark else _FORMS[style]
    begun, marks = form(several=held.most != 1)
    any_call = f"any_call: {' | '.join(calls)}"
    grammar = AnswerGrammar(schemas[next(iter(schemas))], "calls", parts, marks, (any_call, *begun), schemas)
    if held.must_call:
        return grammar
    if content is not None:
        all_parts = {**parts, **content.parts}
        return replace(
            grammar, answer=f"{content.answer} | calls", parts=all_parts, schemas={**schemas, **content.schemas}
        )
    return replace(grammar, answer="said")


def _call(name: str, arguments: str, style: CallStyle, *, has_args_mark: bool) -> str:
    if style == "mistral" and has_args_mark:
        return f"{literal(name)} args @{arguments}"
    key = "parameters" if style == "llama" else "arguments"
    beginning = literal(f'{{"name": "{name}", "{key}": ')
    return f'{beginning} @{arguments} "}}"'


Rules = tuple[list[str], dict[str, str]]


def _hermes(*, several: bool) -> Rules:
    """<tool_call>\\n{...}\\n</tool_call>, one after another."""
    one = r'"\n" any_call "\n" call_end'
    more, times = (rf'("\n" call_begin {one})*', "*") if several else ("", "?")
    rules = [f"calls: call_begin {one} {more}", f"said: (until_call_begin {one}){times} ANYTHING"]
    return rules, {"call_begin": "<tool_call>", "call_end": "</tool_call>"}


def _llama(*, several: bool) -> Rules:
    """{...}; {...}: what does not begin with a brace is no call."""
    more = '("; " any_call)*' if several else ""
    return [f"calls: any_call {more}", r"said: calls | /([^\s{](?s:.*))?/"], {}


def _mistral(*, several: bool) -> Rules:
    """[TOOL_CALLS] [{...}, {...}]"""
    more = '(", " any_call)*' if several else ""
    listed = f'call_begin " "? "[" any_call {more} "]"'
    return [f"calls: {listed}", f"said: ANYTHING | until_{listed}"], {"call_begin": "[TOOL_CALLS]"}


def _mistral_args(*, several: bool) -> Rules:
    """[TOOL_CALLS]name[ARGS]{...}, one after another."""
    more = "(call_begin any_call)*" if several else ""
    rules = [f"calls: call_begin any_call {more}", f"said: ANYTHING | until_call_begin any_call {more}"]
    return rules, {"call_begin": "[TOOL_CALLS]", "args": "[ARGS]"}


_FORMS = {"hermes": _hermes, "llama": _llama, "mistral": _mistral}
