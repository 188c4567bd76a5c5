"""Answers held to a grammar: over every kind of tokenizer, for random schemas, in files of questions."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch

import generate
from onecard.config.inference import SamplingOptions
from onecard.console import run_main
from onecard.data.messages import Turn
from onecard.errors import ConfigError
from onecard.inference import grammar as grammars
from onecard.inference.call import ModelBundle
from onecard.inference.generate import answer_rows, prepare
from onecard.inference.grammar import (
    AnswerGrammar,
    GrammarError,
    HoldToGrammar,
    asked_grammar,
    choice_grammar,
    compiled,
    json_grammar,
    regex_grammar,
)
from onecard.inference.stopping import ended_answer
from tests.data.tokenizer_kinds import KINDS

PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["北京", "Köln", "a\n\"b\""]},
                   "n": {"type": "integer", "minimum": -9, "maximum": 99},
                   "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d{1,3}$"},
                   "word": {"type": "string", "maxLength": 5}},
    "required": ["city", "n", "code", "word"], "additionalProperties": False,
}  # fmt: skip


TOO_WIDE = {  # 600 properties, all of which may come next
    "anyOf": [
        {"type": "object", "properties": {f"{k}_{n}": {"pattern": f"^(.*{k}.){{3}}$"} for n in range(10)}}
        for k in range(60)
    ]
}


def walk(tokenizer: Any, grammar: AnswerGrammar, seed: int, **around: Any) -> str:
    """The text of tokens that were drawn among those that the grammar lets follow one another, until the end token."""
    stop_ids, rng = [tokenizer.eos_token_id], random.Random(seed)
    held = HoldToGrammar([compiled(grammar, tokenizer, stop_ids=stop_ids, **around)], 0, stop_ids, -1)
    ids: list[int] = []
    while ids[-1:] != stop_ids:
        scores = held(torch.tensor([ids], dtype=torch.long), torch.zeros(1, len(tokenizer) + 7))
        ids.append(rng.choice((scores[0] == 0).nonzero()[:, 0].tolist()))
        assert len(ids) < 400
    lead, before = around.get("lead", ""), [tokenizer.eos_token_id] if around.get("continues") else []
    ends: Any = {"stop_ids": stop_ids, "stop_texts": [], "max_new_tokens": 999, "before": before, "lead": lead}
    return ended_answer(ids, tokenizer, **ends).text


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_kind_of_tokenizer_are_read_as_they_are_shown(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind](tmp_path)
    form, n_whole = json_grammar(PLACE, "f"), 0
    if kind == "python":
        with pytest.raises(GrammarError, match=r"no tokenizer\.json"):
            walk(tokenizer, form, 0)
        return
    for seed in range(4):
        assert re.fullmatch("x[a-c ]{3}e", walk(tokenizer, regex_grammar("x[a-c ]{3}e", "f"), seed))
        assert walk(tokenizer, choice_grammar(["What is", "不"], "f"), seed, lead="# ") in ("What is", "不")
        try:
            assert jsonschema_rs.is_valid(PLACE, json.loads(walk(tokenizer, form, seed)))
            n_whole += 1
        except GrammarError as reason:  # without tokens for single bytes, some letters have none
            assert "no token of this model" in str(reason)
    assert n_whole == 4 or (kind.startswith("unigram") and n_whole)


@pytest.mark.parametrize("kind", ["sp-first", "qwen"])
def test_a_thought_and_the_templates_end_surround_an_answer(kind: str, tmp_path: Path) -> None:
    """Qwen's marks of a thought are added tokens; here "sp-first" has them too. The end token waits for the answer."""
    tokenizer = KINDS[kind](tmp_path)
    yes = choice_grammar(["yes"], "f")
    thinking = replace(yes, thought="<think>", closing="</think>")
    texts = {
        "<think>Hm, {no\n</think>\n\nyes": True,
        "yes": True,
        "yes<stop>": True,
        "Hm.</think>yes": False,
        "no": False,
    }
    for is_open in (False, True):
        grammar = replace(thinking, is_open=is_open)
        held = compiled(grammar, tokenizer, stop_ids=[tokenizer.eos_token_id], end_texts=["<stop>"])
        for text, is_right in texts.items():
            state = held.matcher.deep_copy()
            ids = tokenizer(text.removeprefix("<think>") if is_open else text, add_special_tokens=False)["input_ids"]
            n_taken = state.try_consume_tokens(ids)
            is_whole = n_taken == len(ids) and state.is_accepting()
            assert is_whole == ("</think>" in text if is_open else is_right), (is_open, text)


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema whose values are of bounded length, in keywords of every kind that is held to."""
    kinds = ["text", "pattern", "enum", "integer", "multiple", "boolean", "null", "const", "date"]
    kind = rng.choice([*kinds, *["object", "array", "any", "tuple", "map", "all"] * 3] if depth else kinds)
    least, below = rng.randint(0, 2), depth - 1
    return {
        "text": lambda: {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 3)},
        "pattern": lambda: {"type": "string", "pattern": rng.choice(["^[a-z]{1,3}$", "^(a|你){2}\\d?$"])},
        "enum": lambda: {"enum": rng.sample([1, "a b", None, True, 2.5, "\0\"\\", [1], {"k": "你"}], 3)},
        "integer": lambda: {"type": "integer", "minimum": -rng.randint(0, 500), "exclusiveMaximum": rng.randint(1, 99)},
        "multiple": lambda: {"type": "integer", "multipleOf": rng.randint(2, 9), "minimum": 0, "maximum": 200},
        "boolean": lambda: {"type": ["boolean", "null"]},
        "null": lambda: {"type": "null"},
        "const": lambda: {"const": rng.choice(["é", -3, {"a": [None]}])},
        "date": lambda: {"type": "string", "format": "date"},
        "object": lambda: random_object(rng, below),
        "array": lambda: {"type": "array", "items": random_schema(rng, below), "minItems": least,
                          "maxItems": least + rng.randint(0, 2)},
        "any": lambda: {"anyOf": [random_schema(rng, below), {"$ref": "#/$defs/leaf"}]},
        "tuple": lambda: {"type": "array", "prefixItems": [random_schema(rng, below), {"type": "boolean"}],
                          "items": False, "minItems": 2},
        "map": lambda: {"type": "object", "patternProperties": {"^[a-c]{1,2}$": random_schema(rng, below)},
                        "additionalProperties": False, "maxProperties": 2},
        "all": lambda: {"allOf": [random_object(rng, below), {"required": ["a"]}], "title": "both"},
    }[kind]()  # fmt: skip


def random_object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = ["a", *rng.sample(["b c", "你", 'd"e', "type", ""], rng.randint(0, 2))]
    properties = {name: random_schema(rng, max(depth, 0)) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@pytest.mark.parametrize("n", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_answers_to_random_schemas_parse_and_validate_at_any_temperature(bundle: ModelBundle, n: int) -> None:
    rng, n_valid, kinds = random.Random(n), 0, set()
    schemas = [random_object(rng, 2) | {"$defs": {"leaf": {"enum": ["leaf", 7]}}} for _ in range(n)]
    for begun in range(0, n, 30):
        temperature = (0.0, 1.0, 1.5)[begun // 30 % 3] if n > 30 else 1.5
        sampling = SamplingOptions(max_new_tokens=900, temperature=temperature, seed=begun)
        part = schemas[begun : begun + 30]
        rows = [
            prepare(bundle, [Turn("user", "Fill in.")], sampling, number=k, grammar=json_grammar(schema, "f"))
            for k, schema in enumerate(part)
        ]
        for schema, answer in zip(part, answer_rows(bundle, rows, sampling), strict=True):
            value = json.loads(answer.text)
            jsonschema_rs.validate(schema, value)
            assert answer.finish_reason == "stop"
            n_valid += 1
            kinds |= {type(part).__name__ for part in value.values()}
    assert n_valid == n
    assert kinds >= {"str", "int", "list", "dict"}


def test_a_tokenizer_that_cannot_be_read_is_refused(bundle: ModelBundle) -> None:
    grammar = json_grammar({}, "--json_schema")
    with pytest.raises(GrammarError, match="no end token"):
        compiled(grammar, bundle.tokenizer, stop_ids=[])
    with pytest.raises(GrammarError, match=r"no tokenizer\.json"):
        compiled(grammar, NoBackend(), stop_ids=[2])


class NoBackend:
    """A tokenizer in Python, which llguidance has no way into."""


def test_grammars_are_compiled_once_and_few_are_kept(bundle: ModelBundle) -> None:
    stop_ids = [bundle.tokenizer.eos_token_id]
    matchers = [compiled(regex_grammar("a{5}", "f"), bundle.tokenizer, stop_ids=stop_ids).matcher for _ in range(2)]
    assert matchers[0] is matchers[1]
    for k in range(grammars.KEPT_GRAMMARS + 3):
        compiled(regex_grammar(f"b{{{k}}}c", "f"), bundle.tokenizer, stop_ids=stop_ids)
    kept = grammars._known[bundle.tokenizer][tuple(stop_ids)].kept
    assert len(kept) == grammars.KEPT_GRAMMARS
    assert compiled(regex_grammar("a{5}", "f"), bundle.tokenizer, stop_ids=stop_ids).matcher is not matchers[0]


def test_an_answer_that_was_begun_before_is_held_as_if_from_its_start(bundle: ModelBundle) -> None:
    """A batch that ran out of memory begins its rows again from the tokens that they have."""
    held = compiled(regex_grammar("[ab]{3}c", "--regex"), bundle.tokenizer, stop_ids=(2,))
    ids = bundle.tokenizer("abac", add_special_tokens=False)["input_ids"][-4:]
    whole, scores = HoldToGrammar([held], 0, [2], 1), torch.zeros(1, len(bundle.tokenizer))
    for n in range(len(ids)):
        expected = whole(torch.tensor([ids[:n]], dtype=torch.long), scores)
        again = HoldToGrammar([held], 0, [2], 1)(torch.tensor([ids[:n]], dtype=torch.long), scores)
        assert torch.equal(again, expected)
        assert 0 < int(torch.isfinite(again).sum()) < len(bundle.tokenizer)
    with pytest.raises(GrammarError):
        HoldToGrammar([held], 0, [2], 1)(torch.tensor([[*ids, *ids]]), scores)


def test_too_much_work_ends_in_an_error(bundle: ModelBundle) -> None:
    """The error names the option, and comes instead of a text."""
    held = compiled(json_grammar(TOO_WIDE, "--json_schema"), bundle.tokenizer, stop_ids=[2])
    brace, processor = bundle.tokenizer.convert_tokens_to_ids("{"), HoldToGrammar([held], 0, [2], 1)
    processor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 448))
    with pytest.raises(GrammarError, match=r"--json_schema: .*items; max is 2000.*make it simpler"):
        processor(torch.tensor([[brace]]), torch.zeros(1, 448))


def test_padding_behind_a_stop_text_ends_a_row(bundle: ModelBundle) -> None:
    held = compiled(regex_grammar("a{3}b", "f"), bundle.tokenizer, stop_ids=[2])
    a, b = bundle.tokenizer.convert_tokens_to_ids(["a", "b"])
    processor = HoldToGrammar([held, held], 0, [2], 1)
    for ids in ([[], []], [[a], [a]], [[a, 1], [a, a]], [[a, 1, 1], [a, a, a]], [[a, 1, 1, 1], [a, a, a, b]]):
        scores = processor(torch.tensor(ids, dtype=torch.long), torch.zeros(2, 448))
        assert bool((scores[0] == 0).all()) == (1 in ids[0])
    assert (scores[1] == 0).nonzero()[:, 0].tolist() == [2]


def test_what_takes_too_long_to_compile_is_given_up(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty expressions that must all match would take years."""
    monkeypatch.setattr(grammars, "MOST_SECONDS", 0.5)
    schema = {"allOf": [{"pattern": f"(.*{k}){{9}}"} for k in range(40)]}
    with pytest.raises(GrammarError, match=r"^f: takes longer than 0\.5 seconds to compile"):
        compiled(json_grammar(schema, "f"), bundle.tokenizer, stop_ids=[2])


def test_generate_holds_one_answer_and_files_of_them(
    lively_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, questions, answers = tmp_path / "form.json", tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    schema.write_text(json.dumps({"enum": [["yes"], ["no", 1]]}), encoding="utf-8")
    questions.write_text('{"instruction": "Hi"}\n{"instruction": "And?"}\n', encoding="utf-8")
    base = ["--model_path", str(lively_base), "--bits", "32", "--prompt_type", "alpaca", "--device", "cpu"]

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["generate.py", *base, *words])
        code = run_main(generate.main)
        said = capsys.readouterr()
        return code, said.out, said.err

    code, said, _ = run("--instruction", "Hi", "--regex", "(yes|no)!")
    assert (code, said.strip() in ("yes!", "no!")) == (0, True)
    files = ["--data_path", str(questions), "--output_path", str(answers)]
    assert run(*files, "--json_schema", str(schema), "--temperature", "1.5")[0] == 0
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [json.loads(row["output"]) in (["yes"], ["no", 1]) for row in rows] == [True, True]
    code, _, told = run(*files, "--temperature", "1.5")
    assert code != 0 and "grammar" in told
    for words, reason in (
        (["--regex", "(a"], "--regex"),
        (["--json_schema", str(questions)], "--json_schema"),
        (["--regex", "a", "--json_schema", "b"], "contradict"),
        (["--web", "--regex", "a"], "--web"),
    ):
        code, _, told = run("--instruction", "Hi", *words) if "--web" not in words else run(*words)
        assert code != 0 and reason in told


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    for text, reason in (("{", "JSON"), ("[]", "object"), ("5", "object")):
        path = tmp_path / "form.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=f"--json_schema: .*{reason}"):
            asked_grammar(str(path), None)
