"""Answers held to a grammar: JSON of a schema, a regular expression, one of some texts, a grammar of the client's own.

The one importer of llguidance, whose masks say before each token which tokens may follow; the end token is among them
only where the grammar may end. What surrounds an answer belongs to the grammar too: a thought before it, what the
template writes before every answer, the template's end where that is text. Knows grammars, tokenizers and scores. It
does not know requests, templates or tools' calls (`tool_grammar.py`).
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from onecard.errors import ConfigError
from onecard.inference.detokenize import decode

LONGEST_GRAMMAR = 200_000  # characters; 3,000 properties take about two seconds to compile
LONGEST_SEARCH = 20_000  # characters of a schema in which the place of a fault is looked for
LONGEST_PLACE = 200
FEW_EXPRESSIONS, MOST_SECONDS = 8, 10.0
KEPT_GRAMMARS = 32  # compiled, per tokenizer
# None, a space, or a new line with an indent: with any number of them, a model may write blanks until it is cut.
JSON_BLANK = r"( |\n[ \t]{0,32})"
ANYTHING = "ANYTHING: /(?s:.*)/"
# Where only one text may follow, llguidance would ask the tokenizer for its tokens, and some begin it with a space.
NO_FORCING = '%llguidance {"no_forcing": true}'
# What llguidance says of a token that is not among those that may follow, and where none may.
FORBIDDEN = ("doesn't satisfy the grammar", "parser stopped")
NO_TOKEN = "NoExtension"

_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = (
    "items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else", "additionalItems",
    "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip


class GrammarError(ConfigError):
    """A grammar that cannot be kept to; `flag` is the field or option that holds it."""


@dataclass(frozen=True)
class AnswerGrammar:
    """What an answer is held to.

    flag: where it was given, for errors, such as response_format or --regex. answer: the right-hand side of a rule of
        llguidance's, made of texts, `parts` (@name), and for each of the `marks` the rules `name` (the mark) and
        `until_name` (anything up to the first of it). rules: further rules. schemas: the parts that are schemas, with
        the field of each. thought: the mark of a thought that may come first; is_open: the prompt has opened it.
    """

    flag: str
    answer: str = "@answer"
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    schemas: Mapping[str, str] = field(default_factory=dict)
    thought: str = ""
    closing: str = ""
    is_open: bool = False


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar over a tokenizer's tokens; `matcher` stands at its beginning and is only copied."""

    flag: str
    matcher: Any


def json_grammar(schema: Any, field: str) -> AnswerGrammar:
    """JSON of a schema. Raises GrammarError for what is none."""
    return AnswerGrammar(field, parts={"answer": json_part(schema, field)}, schemas={"answer": field})


def json_part(schema: Any, field: str) -> Mapping[str, Any]:
    """A schema as a part of a grammar. Raises GrammarError."""
    if not isinstance(schema, (dict, bool)):
        raise GrammarError(field, "is no JSON schema: an object is expected")
    whole = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
    return {"json_schema": {**whole, "x-guidance": {"whitespace_pattern": JSON_BLANK}}}


def regex_grammar(expression: str, field: str) -> AnswerGrammar:
    """A regular expression that the whole answer matches; \\d is 0 to 9."""
    from llguidance import regex_to_lark

    lark = regex_to_lark(expression, "d")
    return AnswerGrammar(field, parts={"answer": {"lark_grammar": f"start: /{lark}/"}})


def choice_grammar(texts: Sequence[str], field: str) -> AnswerGrammar:
    """One of some texts, none of them empty."""
    return AnswerGrammar(field, " | ".join(literal(text) for text in texts))


def own_grammar(text: str, field: str) -> AnswerGrammar:
    """A grammar in Lark's form with the rule `start`, or in llama.cpp's (GBNF) with the rule `root`."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return AnswerGrammar(field, parts={"answer": {"lark_grammar": any_to_lark(text)}})
    except Exception as reason:
        raise GrammarError(field, f"is no grammar in GBNF: {first_line(reason)}") from None


def asked_grammar(json_schema: str | None, regex: str | None) -> AnswerGrammar | None:
    """What --json_schema, a file, or --regex holds answers to. Raises ConfigError for a file that is no JSON."""
    if regex:
        return regex_grammar(regex, "--regex")
    if not json_schema:
        return None
    try:
        schema = json.loads(Path(json_schema).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as reason:
        raise ConfigError("--json_schema", f"{json_schema} cannot be read as JSON: {reason}") from None
    return json_grammar(schema, "--json_schema")


def literal(text: str) -> str:
    """A text as it stands in a rule."""
    return json.dumps(text, ensure_ascii=False)


def compiled(
    grammar: AnswerGrammar,
    tokenizer: Any,
    *,
    stop_ids: Sequence[int],
    end_texts: Sequence[str] = (),
    lead: str = "",
    continues: bool = False,
) -> CompiledGrammar:
    """The grammar over these tokens. `stop_ids`, `end_texts`: what ends an answer; `lead`, `continues`: see `Prompt`.

    Raises GrammarError, which names the place in a schema that is to blame.
    """
    from llguidance import LLMatcher

    tokens = _tokens(tokenizer, tuple(stop_ids), grammar.flag)
    if not continues and not lead and decode(tokens.own.tokenize_bytes(b" a"), tokenizer) == "a":
        lead = " "  # SentencePiece writes it before a first word, and decoding takes it away again
    try:
        text = _whole(grammar, tokens.own, end_texts, lead)
    except RecursionError:
        raise GrammarError(grammar.flag, "is nested too deeply") from None
    if len(text) > LONGEST_GRAMMAR:
        raise GrammarError(grammar.flag, f"is longer than {LONGEST_GRAMMAR:,} characters; make it simpler")
    matcher = tokens.kept.pop(text, None)
    if matcher is None:
        _try_apart(text, grammar.flag)
        matcher = LLMatcher(tokens.own, text, log_level=0)
        if matcher.is_error():
            raise _fault(grammar, matcher.get_error())
        while len(tokens.kept) >= KEPT_GRAMMARS:
            tokens.kept.pop(next(iter(tokens.kept)), None)
    tokens.kept[text] = matcher
    return CompiledGrammar(grammar.flag, matcher)


class HoldToGrammar(LogitsProcessor):
    """Leaves each row only the tokens that its grammar lets follow what the row has so far.

    States are kept by the new ids that led to them, so that beams may change their past. Before temperature, top-k and
    top-p; what was forbidden before (a least length, n-grams) is let through where the grammar asks for it.
    """

    def __init__(
        self, grammars: Sequence[CompiledGrammar | None], n_prompt: int, stop_ids: Sequence[int], pad_id: int
    ) -> None:
        self._grammars, self._n_prompt, self._stop_ids, self._pad_id = grammars, n_prompt, frozenset(stop_ids), pad_id
        self._states: dict[tuple[int, ...], Any] = {}  # (row, new ids...) -> a matcher
        self._has_begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (rows * beams, prompt + new), scores (rows * beams, vocab) -> the same with -inf."""
        n_beams = len(input_ids) // len(self._grammars)
        allowed = np.ones(scores.shape, dtype=np.bool_)
        states: dict[tuple[int, ...], Any] = {}
        for place, ids in enumerate(input_ids[:, self._n_prompt :].tolist()):
            grammar = self._grammars[place // n_beams]
            key = (place // n_beams, *ids)
            state = states.get(key) or (self._next(grammar, key, shared=n_beams > 1) if grammar else None)
            if state is None or grammar is None:
                continue
            states[key] = state
            bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), dtype=np.uint8), bitorder="little")
            _check(grammar, state, is_stuck=not bits.any())
            allowed[place, : len(bits)] = bits[: scores.shape[1]]
            allowed[place, len(bits) :] = False
        self._states, self._has_begun = states, True
        mask = torch.from_numpy(allowed).to(scores.device)
        held = scores.masked_fill(~mask, -torch.inf)
        is_stuck = (held == -torch.inf).all(dim=-1, keepdim=True)
        return torch.where(is_stuck & mask, torch.zeros_like(scores), held)

    def _next(self, grammar: CompiledGrammar, key: tuple[int, ...], *, shared: bool) -> Any:
        """The state behind these ids; None where the answer has ended, or in a beam that cannot be chosen any more."""
        if len(key) == 1:
            return grammar.matcher.deep_copy()
        if not self._has_begun:  # with an answer that was begun before
            state = grammar.matcher.deep_copy()
            return state if state.consume_tokens(list(key[1:])) else _check(grammar, state)
        before = self._states.get(key[:-1])
        if before is None or key[-1] in self._stop_ids:
            return None
        state = before.deep_copy() if shared else before
        if state.consume_token(key[-1]):
            return state
        # A beam of score -inf, or padding behind a stop text.
        may_fail = shared or key[-1] == self._pad_id
        if not (may_fail and any(words in state.get_error() for words in FORBIDDEN)):
            _check(grammar, state)
        return None


@dataclass
class _Tokens:
    """A tokenizer in llguidance's form, and the grammars that were compiled for it, the latest last."""

    own: Any
    kept: dict[str, Any] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], _Tokens]] = weakref.WeakKeyDictionary()


def _tokens(tokenizer: Any, stop_ids: tuple[int, ...], flag: str) -> _Tokens:
    from llguidance import LLTokenizer

    by_ends = _known.setdefault(tokenizer, {})
    if stop_ids not in by_ends:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not stop_ids or not hasattr(backend, "to_str"):
            lack = "has no tokenizer.json" if stop_ids else "has no end token"
            raise GrammarError(flag, f"the tokenizer of this model {lack}, so no answer can be held to a grammar")
        try:
            by_ends[stop_ids] = _Tokens(LLTokenizer(_tokenizer_json(backend), eos_token=list(stop_ids)))
        except Exception as reason:
            raise GrammarError(flag, f"llguidance cannot read this model's tokenizer: {first_line(reason)}") from None
    return by_ends[stop_ids]


def _tokenizer_json(backend: Any) -> str:
    """The tokenizer as text; llguidance does not read Metaspace, SentencePiece's decoder without bytes, by itself."""
    whole = json.loads(backend.to_str())
    if (whole["decoder"] or {}).get("type") == "Metaspace":
        blank = {"type": "Replace", "pattern": {"String": whole["decoder"]["replacement"]}, "content": " "}
        whole["decoder"] = {"type": "Sequence", "decoders": [blank, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps(whole)


def _whole(grammar: AnswerGrammar, tokens: Any, end_texts: Sequence[str], lead: str) -> str:
    """The whole grammar as llguidance's JSON: start: lead? thought? answer end?"""
    start, rules, marks = [], [*grammar.rules, ANYTHING], dict(grammar.marks)
    if lead:
        start.append(f"({literal(lead)})?")
    if grammar.thought:
        marks |= {"thought_end": grammar.closing} if grammar.is_open else {
            "thought": grammar.thought, "thought_end": grammar.closing
        }  # fmt: skip
        thought = r"until_thought_end /[ \n]{0,4}/"
        start.append(thought if grammar.is_open else f"(thought {thought})?")
    start.append("answer")
    if end_texts:
        start.append(f"({' | '.join(literal(text) for text in end_texts)})?")
    for name, text in marks.items():
        ids = tokens.tokenize_str(text, parse_special=True)
        if len(ids) == 1 and tokens.is_special_token(ids[0]):
            rules += [f"{name}: <[{ids[0]}]>", f"until_{name}: ANYTHING {name}"]
        else:
            rules += [f"{name}: {literal(text)}", f"until_{name}[lazy]: ANYTHING {literal(text)}"]
    lark = "\n".join([NO_FORCING, f"start: {' '.join(start)}", f"answer: {grammar.answer}", *rules])
    parts = [{"name": name} | dict(part) for name, part in grammar.parts.items()]
    return json.dumps({"grammars": [{"name": "whole", "lark_grammar": lark}, *parts]}, ensure_ascii=False)


def _check(grammar: CompiledGrammar, state: Any, *, is_stuck: bool = False) -> None:
    """Raises GrammarError where a state is of no more use."""
    if state.is_error() or is_stuck:
        said = first_line(state.get_error())
        reason = "no token of this model can follow" if is_stuck or NO_TOKEN in said else f"{said}; make it simpler"
        raise GrammarError(grammar.flag, f"the answer cannot be held to it any further: {reason}")


def _may_take_long(text: str) -> bool:
    """Whether many expressions stand in a grammar: of those that must all match, each may double the time."""
    return sum(text.count(sign) for sign in ('"pattern', '"format"', "&")) > FEW_EXPRESSIONS


def _try_apart(text: str, flag: str) -> None:
    """Compile what may take long in a process of its own first, which can be ended. Raises GrammarError."""
    if not _may_take_long(text):
        return
    code = "import sys, llguidance; llguidance.LLMatcher.validate_grammar(sys.stdin.buffer.read().decode())"
    try:
        subprocess.run([sys.executable, "-c", code], input=text.encode(), timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        message = f"takes longer than {MOST_SECONDS:g} seconds to compile; ask for fewer patterns that must all match"
        raise GrammarError(flag, message) from None


def _fault(grammar: AnswerGrammar, message: str) -> GrammarError:
    """What is wrong, with the place in the schema that is to blame where that is found soon."""
    for name, flag in grammar.schemas.items():
        schema = dict(grammar.parts[name]["json_schema"])
        schema.pop("x-guidance")
        written = json.dumps(schema)
        if len(written) > LONGEST_SEARCH or _may_take_long(written):
            continue
        if problem := _problem(schema, schema):
            try:
                place = _place(schema, schema, problem)
            except RecursionError:
                place = ""
            is_told = 0 < len(place) <= LONGEST_PLACE
            return GrammarError(flag, f"at {place.removeprefix('.')}: {problem}" if is_told else problem)
    return GrammarError(grammar.flag, first_line(message))


def _problem(schema: Any, root: Mapping[str, Any]) -> str:
    """What llguidance says against a schema, "" for nothing. References are looked up in the root."""
    from llguidance import LLMatcher

    if isinstance(schema, dict):
        schema = {name: root[name] for name in ("$defs", "definitions") if name in root} | schema
    try:
        return first_line(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema))))
    except ValueError as reason:
        return first_line(reason)


def _place(schema: Any, root: Mapping[str, Any], problem: str) -> str:
    """Where in a schema the deepest subschema with this problem stands: ".properties.a.items"."""
    for place, part in _subschemas(schema):
        if part is not root and isinstance(part, dict) and _problem(part, root) == problem:
            return place + _place(part, root, problem)
    return ""


def _subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _SCHEMA_MAPS and isinstance(value, dict):
            yield from ((f".{key}.{name}", part) for name, part in value.items())
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            yield from ((f".{key}[{k}]", part) for k, part in enumerate(value))
        elif key in _SCHEMAS:
            yield f".{key}", value


def first_line(reason: object) -> str:
    """The first line of a message, for some go on with the whole grammar; with the error that a regex's tells below."""
    lines = str(reason).strip().splitlines() or [""]
    error = next((line for line in lines if line.startswith("error: ")), "")
    unknown = lines[0].removeprefix("Unimplemented keys: ")
    return f"{lines[0]} {error}".strip() if unknown == lines[0] else f"cannot be held to the keywords {unknown}"
