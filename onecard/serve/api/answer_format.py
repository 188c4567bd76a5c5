"""What a request holds its answer to: the fields of OpenAI (response_format), vLLM (guided_..., structured_outputs) and
llama.cpp (json_schema, grammar), one of them at a time.

Knows these fields. It does not know how a grammar is kept to, or templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from onecard.inference.grammar import AnswerGrammar, choice_grammar, json_grammar, own_grammar, regex_grammar
from onecard.serve.api.schema import SamplingParameters
from onecard.serve.http_error import bad_request

ANY_OBJECT = {"type": "object"}
MOST_CHOICES = 10_000
# What else vLLM's structured_outputs may hold, with the values that ask for nothing.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "disable_fallback": (None, False, True),
    "disable_any_whitespace": (None, False),
    "disable_additional_properties": (None, False),
    "whitespace_pattern": (None,),
    "structural_tag": (None,),
    "json_object": (None, False),
}


def answer_grammar(body: SamplingParameters) -> AnswerGrammar | None:
    """What the answer is held to, None for nothing. Raises ApiError and GrammarError, which name the field."""
    found = [
        grammar
        for name in READERS
        if (value := getattr(body, name)) is not None and (grammar := READERS[name](value, name)) is not None
    ]
    if len(found) > 1:
        names = [grammar.flag.partition(".")[0] for grammar in found]
        raise bad_request(f"{names[0]} and {names[1]} both say what the answer is held to; send one of them", names[1])
    return found[0] if found else None


def response_format(value: Any, place: str) -> AnswerGrammar | None:
    """OpenAI's, and llama.cpp's with a `schema` beside the type json_object."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
        return json_grammar(schema, f"{place}.schema") if schema is not None else json_grammar(ANY_OBJECT, place)
    if kind != "json_schema":
        message = f'{place} can be {{"type": "text"}}, "json_object" or "json_schema"'
        raise bad_request(message, f"{place}.type" if isinstance(value, dict) else place, "unsupported_parameter")
    named = value.get("json_schema")
    if not isinstance(named, dict) or "schema" not in named:
        message = f'{place}.json_schema is no {{"name": ..., "schema": {{...}}}}'
        raise bad_request(message, f"{place}.json_schema")
    return json_grammar(named["schema"], f"{place}.json_schema.schema")


def structured_outputs(value: Any, place: str) -> AnswerGrammar | None:
    """vLLM's newer form: {"json": ...}, {"regex": ...}, {"choice": ...}, {"grammar": ...} or {"json_object": true}."""
    if not isinstance(value, dict):
        raise bad_request(f"{place} is no object", place)
    given = {name: one for name, one in value.items() if one is not None}
    if given.get("json_object") is True:
        given["json_object"] = ANY_OBJECT
    readers = {**KINDS, "json_object": schema_of}
    found = [name for name in readers if name in given and given[name] is not False]
    for name, one in given.items():
        if name not in found and not any(one is neutral for neutral in OPTIONS.get(name, ())):
            raise bad_request(f"{name!r} of {place} is not supported", f"{place}.{name}", "unsupported_parameter")
    if len(found) > 1:
        raise bad_request(f"{place} holds both {found[0]} and {found[1]}; send one of them", f"{place}.{found[1]}")
    return readers[found[0]](given[found[0]], f"{place}.{found[0]}") if found else None


def schema_of(value: Any, place: str) -> AnswerGrammar:
    """A schema, or its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as reason:
            raise bad_request(f"{place} is no JSON: {reason}", place) from None
    return json_grammar(value, place)


def expression_of(value: Any, place: str) -> AnswerGrammar:
    """A regular expression."""
    if not isinstance(value, str) or not value:
        raise bad_request(f"{place} is no regular expression: a text is expected", place)
    return regex_grammar(value, place)


def choice_of(value: Any, place: str) -> AnswerGrammar:
    """Some texts."""
    texts = value if isinstance(value, list) else []
    if not 1 <= len(texts) <= MOST_CHOICES or not all(isinstance(text, str) and text for text in texts):
        raise bad_request(f"{place} is no list of 1 to {MOST_CHOICES:,} texts, none of them empty", place)
    return choice_grammar(texts, place)


def grammar_of(value: Any, place: str) -> AnswerGrammar | None:
    """A grammar in Lark's form or in GBNF, "" for none."""
    if not isinstance(value, str):
        raise bad_request(f"{place} is no text of a grammar", place)
    return own_grammar(value, place) if value else None


Reader = Callable[[Any, str], AnswerGrammar | None]
KINDS: Mapping[str, Reader] = {
    "json": schema_of, "regex": expression_of, "choice": choice_of, "grammar": grammar_of
}  # fmt: skip
READERS: Mapping[str, Reader] = {
    "response_format": response_format,
    "structured_outputs": structured_outputs,
    "guided_json": schema_of,
    "guided_regex": expression_of,
    "guided_choice": choice_of,
    "guided_grammar": grammar_of,
    "json_schema": schema_of,
    "grammar": grammar_of,
}
