#!/usr/bin/env python
"""Three libraries that hold answers to a grammar: compile time, time of a token's mask, keywords of JSON Schema.

    python benchmarks/grammars.py

Libraries that are not installed are left out; xgrammar 0.2.9 and outlines-core 0.2.14 are no requirements of the kit.
A keyword is "held" where all valid values and no invalid ones are let through, "refused" where the library says that
it does not know it, "ignored" where an invalid value passes, "too strict" where a valid one does not.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machine import ROOT, machine

from onecard.config.parsing import parse
from onecard.console import run_main, say

PACKAGES = {"llguidance": "llguidance", "xgrammar": "xgrammar", "outlines": "outlines_core"}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 60},
                   "age": {"type": "integer", "minimum": 0, "maximum": 130},
                   "mail": {"type": "string", "pattern": "^[a-z.]{1,30}@[a-z]{1,20}[.](org|com)$"},
                   "mood": {"enum": ["good", "bad", None]}},
    "required": ["name", "age", "mail", "mood"], "additionalProperties": False,
}  # fmt: skip
ADA = {"name": "Ada Lovelace 你好", "age": 36, "mail": "ada@x.org", "mood": None}
NODE = {
    "type": "object", "properties": {"value": {"type": "number"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"], "additionalProperties": False,
}  # fmt: skip
# Name -> a schema and a value that it admits.
SCHEMAS: dict[str, tuple[Any, Any]] = {
    "person": (PERSON, ADA),
    "team": ({"type": "object", "properties": {"members": {"type": "array", "items": PERSON, "maxItems": 20}},
              "required": ["members"], "additionalProperties": False}, {"members": [ADA] * 4}),
    "linked list": (NODE, {"value": 1.5, "next": {"value": -2, "next": None}}),
    "30 fields": ({"type": "object", "properties": {f"field_{k}": {"type": "string"} for k in range(30)},
                   "required": [f"field_{k}" for k in range(30)], "additionalProperties": False},
                  {f"field_{k}": "some text" for k in range(30)}),
}  # fmt: skip
AB = {"a": {"type": "integer"}, "b": {"type": "string"}}
CLOSED = {"type": "object", "properties": AB, "additionalProperties": False}
# Keyword -> a schema, values that it admits, values that it does not.
KEYWORDS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "type": ({"type": "integer"}, [1, -5], ["a", 1.5, None]),
    "type (several)": ({"type": ["integer", "null"]}, [1, None], ["a"]),
    "enum": ({"enum": [1, "a", None]}, [1, "a", None], [2, "b"]),
    "const": ({"const": {"a": 1}}, [{"a": 1}], [{"a": 2}]),
    "properties": ({"type": "object", "properties": AB, "required": ["a"]}, [{"a": 1}], [{"a": "x"}]),
    "required": (CLOSED | {"required": ["a"]}, [{"a": 1}, {"a": 1, "b": "x"}], [{"b": "x"}, {}]),
    "additionalProperties: false": (CLOSED, [{"a": 1}], [{"a": 1, "c": 2}]),
    "additionalProperties": ({"type": "object", "properties": AB, "additionalProperties": {"type": "boolean"}},
                             [{"a": 1, "c": True}], [{"a": 1, "c": 2}]),
    "patternProperties": ({"type": "object", "patternProperties": {"^x_": {"type": "integer"}},
                           "additionalProperties": False}, [{"x_a": 1}], [{"x_a": "a"}, {"y": 1}]),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, [{"a": 1}], [{"A": 1}]),
    "minProperties": ({"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    "maxProperties": ({"type": "object", "maxProperties": 1}, [{"a": 1}], [{"a": 1, "b": 2}]),
    "dependentRequired": (CLOSED | {"dependentRequired": {"a": ["b"]}}, [{"a": 1, "b": "x"}, {"b": "x"}], [{"a": 1}]),
    "items": ({"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["a"]]),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False,
                     "minItems": 2}, [[1, "a"]], [["a", 1]]),
    "minItems": ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [[1, 2]], [[1]]),
    "maxItems": ({"type": "array", "items": {"type": "integer"}, "maxItems": 2}, [[1, 2]], [[1, 2, 3]]),
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [[1, 2]], [[1, 1]]),
    "contains": ({"type": "array", "contains": {"const": 1}}, [[2, 1]], [[2]]),
    "minLength": ({"type": "string", "minLength": 2}, ["ab", "你好"], ["a", "你"]),
    "maxLength": ({"type": "string", "maxLength": 2}, ["ab", "你好"], ["abc"]),
    "pattern": ({"type": "string", "pattern": "^[a-c]+$"}, ["abc"], ["abd"]),
    "pattern (not anchored)": ({"type": "string", "pattern": "b"}, ["abc"], ["acd"]),
    "format: date-time": ({"type": "string", "format": "date-time"}, ["2026-11-29T10:00:00Z"], ["today"]),
    "format: uuid": ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["12"]),
    "format: email": ({"type": "string", "format": "email"}, ["a@x.org"], ["a"]),
    "format: uri": ({"type": "string", "format": "uri"}, ["https://x.org/a"], ["a b"]),
    "minimum": ({"type": "integer", "minimum": 5}, [5, 70], [4, -9]),
    "maximum": ({"type": "integer", "maximum": 5}, [5, -70], [6]),
    "exclusiveMinimum": ({"type": "number", "exclusiveMinimum": 0}, [0.5, 3], [0, -1]),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 1}, [0.5, -3], [1, 7]),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, [10, 15], [11]),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["a"]),
    "oneOf": ({"oneOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]}, [1, 9], [4]),
    "oneOf (apart)": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
    "allOf": ({"allOf": [CLOSED, {"required": ["a"]}]}, [{"a": 1}], [{"b": "x"}]),
    "not": ({"type": "integer", "not": {"const": 1}}, [2], [1]),
    "if/then/else": ({"if": {"type": "integer"}, "then": {"minimum": 5}, "else": {"type": "string"}}, [5, "a"], [4]),
    "$ref": ({"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}}, [[1]], [["a"]]),
    "$ref (recursive)": (NODE, [{"value": 1, "next": {"value": 2, "next": None}}], [{"value": 1, "next": {}}]),
}  # fmt: skip


@dataclass
class BenchmarkOptions:
    """What is measured."""

    rounds: int = 5
    """Times that each schema is compiled and each value walked through; medians are reported."""
    large: int = 131_072
    """Tokens of the large vocabulary, which is made of bytes and syllables."""
    output: str = str(ROOT / "benchmarks" / "results" / "grammars.json")
    """Where the result is written."""


LONG_SECONDS = 10.0  # after so many, a schema is not compiled once more


class LlGuidance:
    """Everything through `LLMatcher`."""

    def __init__(self, vocabulary: list[bytes], tokenizer_json: str) -> None:
        import llguidance

        self.lib = llguidance
        self.tokenizer = llguidance.LLTokenizer(tokenizer_json, eos_token=[len(vocabulary) - 1])

    def compile(self, schema: Any) -> Any:
        grammar = self.lib.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = self.lib.LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def seconds(self, compiled: Any, ids: list[int]) -> list[float]:
        matcher = compiled.deep_copy()
        return [timed(matcher.compute_bitmask) + 0 * matcher.consume_token(token_id) for token_id in ids]

    def accepts(self, compiled: Any, ids: list[int]) -> bool:
        matcher = compiled.deep_copy()
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


class XGrammar:
    """`GrammarCompiler` without its cache, and `GrammarMatcher`."""

    def __init__(self, vocabulary: list[bytes], tokenizer_json: str) -> None:
        import xgrammar

        self.lib, self.end = xgrammar, len(vocabulary) - 1
        info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[self.end])
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.mask = xgrammar.allocate_token_bitmask(1, len(vocabulary))

    def compile(self, schema: Any) -> Any:
        return self.compiler.compile_json_schema(json.dumps(schema), strict_mode=False)

    def seconds(self, compiled: Any, ids: list[int]) -> list[float]:
        matcher = self.lib.GrammarMatcher(compiled)
        fill = lambda: matcher.fill_next_token_bitmask(self.mask)  # noqa: E731
        return [timed(fill) + 0 * matcher.accept_token(token_id) for token_id in ids]

    def accepts(self, compiled: Any, ids: list[int]) -> bool:
        matcher = self.lib.GrammarMatcher(compiled)
        if not all(matcher.accept_token(token_id) for token_id in ids):
            return False
        matcher.fill_next_token_bitmask(self.mask)
        return bool(int(self.mask[0, self.end // 32]) >> (self.end % 32) & 1)


class Outlines:
    """A regular expression out of the schema, and its `Index` over the vocabulary."""

    def __init__(self, vocabulary: list[bytes], tokenizer_json: str) -> None:
        import outlines_core

        self.lib = outlines_core
        tokens: dict[bytes, list[int]] = {}
        for token_id, value in enumerate(vocabulary[:-1]):
            tokens.setdefault(value, []).append(token_id)
        self.vocabulary = outlines_core.Vocabulary(len(vocabulary) - 1, tokens)
        self.words = (len(vocabulary) + 31) // 32

    def compile(self, schema: Any) -> Any:
        return self.lib.Index(self.expression(schema), self.vocabulary)

    def expression(self, schema: Any) -> str:
        return str(self.lib.json_schema.build_regex_from_schema(json.dumps(schema)))

    def seconds(self, compiled: Any, ids: list[int]) -> list[float]:
        import torch

        guide, mask = self.lib.Guide(compiled), torch.zeros(self.words, dtype=torch.int32)
        fill = lambda: guide.write_mask_into(mask.data_ptr(), mask.numel(), mask.element_size())  # noqa: E731
        return [timed(fill) + 0 * len(guide.advance(token_id) or ()) for token_id in ids]


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def small_vocabulary() -> tuple[list[bytes], str]:
    """A byte and an end, as small as vocabularies get: 257."""
    return byte_level([bytes([value]) for value in range(256)])


def large_vocabulary(size: int) -> tuple[list[bytes], str]:
    """Bytes, runs of blanks and signs of JSON, and words of syllables, half of them with a space in front."""
    rng = random.Random(0)
    tokens = dict.fromkeys(bytes([value]) for value in range(256))
    signs = ['"', '":', '",', '{"', '"}', "},", '", "', '": "', '": ', "]}", "[{", '"],', "\n", "\n\n", "..", "//"]
    tokens.update(dict.fromkeys(sign.encode() for sign in signs))
    tokens.update(dict.fromkeys(b" " * n for n in range(1, 60)))
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "st")]
    while len(tokens) < size - 1:
        word = "".join(rng.choice(syllables) for _ in range(rng.randint(1, 4)))
        word = rng.choice(["", " "]) + rng.choice([word, word, word.title(), str(rng.randint(0, 999))])
        tokens[word.encode()] = None
    return byte_level(list(tokens))


def byte_level(tokens: list[bytes]) -> tuple[list[bytes], str]:
    """The vocabulary with an end behind it, and the same as a tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = bytes_to_unicode()
    vocabulary = {"".join(names[value] for value in token): token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return [*tokens, b"<|end|>"], tokenizer.to_str()


def longest_first(text: bytes, vocabulary: list[bytes]) -> list[int]:
    """The ids of a text, always the longest token that fits."""
    ids = {token: token_id for token_id, token in enumerate(vocabulary[:-1])}
    found, at = [], 0
    while at < len(text):
        length = next(n for n in range(min(24, len(text) - at), 0, -1) if text[at : at + n] in ids)
        found.append(ids[text[at : at + length]])
        at += length
    return found


def timings(library: Any, vocabulary: list[bytes], rounds: int) -> dict[str, Any]:
    """Milliseconds of compiling each schema and of the masks along its value, or why there are none."""
    found: dict[str, Any] = {}
    for name, (schema, value) in SCHEMAS.items():
        ids = longest_first(json.dumps(value, ensure_ascii=False).encode(), vocabulary)
        compiling: list[float] = []
        masks: list[float] = []
        try:
            while len(compiling) < rounds and sum(compiling) < LONG_SECONDS:
                begun = time.perf_counter()
                compiled = library.compile(schema)
                compiling.append(time.perf_counter() - begun)
                masks += library.seconds(compiled, ids)
        except Exception as reason:
            found[name] = {"failed": str(reason)[:120]}
            continue
        found[name] = {
            "compile_ms": round(1000 * statistics.median(compiling), 2),
            "mask_ms_median": round(1000 * statistics.median(masks), 4),
            "mask_ms_p99": round(1000 * statistics.quantiles(masks, n=100)[98], 4),
            "mask_ms_longest": round(1000 * max(masks), 3),
        }
    return found


def verdict(library: Any, schema: Any, valid: list[Any], invalid: list[Any], vocabulary: list[bytes]) -> str:
    """What a library makes of a keyword; see the top of this file."""
    try:
        if isinstance(library, Outlines):
            expression = re.compile(library.expression(schema))
            accepts = lambda value: expression.fullmatch(json.dumps(value, ensure_ascii=False)) is not None  # noqa: E731
        else:
            compiled = library.compile(schema)
            accepts = lambda value: library.accepts(  # noqa: E731
                compiled, longest_first(json.dumps(value, ensure_ascii=False).encode(), vocabulary)
            )
    except Exception:
        return "refused"
    if any(accepts(value) for value in invalid):
        return "ignored"
    return "held" if all(accepts(value) for value in valid) else "too strict"


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)
    small, large = small_vocabulary(), large_vocabulary(options.large)
    libraries = {"llguidance": LlGuidance, "xgrammar": XGrammar, "outlines": Outlines}
    result: dict[str, Any] = {"rounds": options.rounds, "libraries": {}, "machine": machine("cpu")}
    for name, kind in libraries.items():
        if find_spec(PACKAGES[name]) is None:
            say(f"{name} is not installed and left out")
            continue
        entry: dict[str, Any] = {"version": version(PACKAGES[name].replace("_", "-"))}
        for size, (vocabulary, text) in {"small": small, "large": large}.items():
            begun = time.perf_counter()
            library: Any = kind(vocabulary, text)
            entry[f"{size}: {len(vocabulary)} tokens"] = {
                "vocabulary_ms": round(1000 * (time.perf_counter() - begun), 1)
            } | timings(library, vocabulary, options.rounds)
            if size == "small":
                entry["keywords"] = {word: verdict(library, *case, vocabulary) for word, case in KEYWORDS.items()}
        counts = entry["keyword_counts"] = dict(Counter(entry["keywords"].values()))
        result["libraries"][name] = entry
        say(f"{name} {entry['version']}: {counts} of {len(KEYWORDS)} keywords")
        for size in entry:
            if "tokens" in size:
                say(f"  {size}: {json.dumps(entry[size])}")
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"written to {options.output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
