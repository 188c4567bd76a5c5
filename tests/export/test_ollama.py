"""Modelfiles: the Go templates write what our Jinja templates write, and every text survives Ollama's reader.

Neither Go nor Ollama is here, so both are followed by small readers of our own: `GoTemplate` for the part of Go's
text/template that is used (https://pkg.go.dev/text/template), `read_modelfile` for Ollama's parser.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from onecard.data.built_in_templates import BUILT_IN, FOLDER, built_in_name
from onecard.data.jinja_chat import render_chat
from onecard.errors import ConfigError
from onecard.export.gguf.ollama import GO_TEMPLATES, go_template, modelfile, quoted
from onecard.export.gguf.options import OllamaOptions

BOS, EOS = "<s>", "</s>"
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\(|\)|:=|=|,|[^\s()=:,]+')


class GoTemplate:
    """Runs text with {{ actions }}: if, else if, else, end, range $i, $x := .Messages, assignments, a few functions."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"\s*\{\{- ", "{{ ", text)
        text = re.sub(r" -\}\}\s*", " }}", text)
        self.parts = re.split(r"\{\{(.*?)\}\}", text, flags=re.DOTALL)

    def render(self, system: str, messages: list[dict[str, str]]) -> str:
        data = {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        self.root, self.names, self.output = data, {}, []
        end = self._block(0, data, write=True)
        assert end == len(self.parts), "an {{ end }} too many"
        return "".join(self.output)

    def _block(self, place: int, dot: Any, *, write: bool) -> int:
        """Run parts until the `end` or `else` that closes this block; returns where that stands."""
        while place < len(self.parts):
            if place % 2 == 0:
                self.output += [self.parts[place]] if write else []
                place += 1
                continue
            words = WORD.findall(self.parts[place])
            if words[0] in ("end", "else"):
                return place
            if words[0] == "if":
                place = self._if(place, words[1:], dot, write=write)
            elif words[0] == "range":
                place = self._range(place, words, dot, write=write)
            else:
                if write:
                    self._action(words, dot)
                place += 1
        return place

    def _if(self, place: int, condition: list[str], dot: Any, *, write: bool) -> int:
        done = False
        while True:
            holds = write and not done and (not condition or bool(self._value(condition, dot)))
            place = self._block(place + 1, dot, write=holds)
            done = done or holds
            words = WORD.findall(self.parts[place])
            if words == ["end"]:
                return place + 1
            condition = words[2:] if words[1:2] == ["if"] else []

    def _range(self, place: int, words: list[str], dot: Any, *, write: bool) -> int:
        index, comma, _, assign = words[1:5]
        assert (comma, assign) == (",", ":=")
        end = self._block(place + 1, dot, write=False)
        for i, item in enumerate(self._value(words[5:], dot) if write else []):
            self.names[index] = i
            assert self._block(place + 1, item, write=True) == end
        return end + 1

    def _action(self, words: list[str], dot: Any) -> None:
        if words[1:2] in (["="], [":="]):
            assert words[1] == ":=" or words[0] in self.names, f"{words[0]} is assigned before it is declared"
            self.names[words[0]] = self._value(words[2:], dot)
        else:
            self.output.append(self._value(words, dot))

    def _value(self, words: list[str], dot: Any) -> Any:
        values: list[Any] = []
        while words:
            word, words = words[0], words[1:]
            if word == "(":
                depth = itertools.accumulate({"(": 1, ")": -1}.get(inner, 0) for inner in words)
                close = next(i for i, level in enumerate(depth) if level < 0)
                values.append(self._value(words[:close], dot))
                words = words[close + 1 :]
            else:
                values.append(self._term(word, dot))
        if not callable(values[0]):
            assert len(values) == 1
            return values[0]
        return values[0](*values[1:])

    def _term(self, word: str, dot: Any) -> Any:
        functions = {
            "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "not": lambda a: not a, "len": len,
            "and": lambda a, b: a and b, "or": lambda a, b: a or b, "slice": lambda items, start: items[start:],
        }  # fmt: skip
        if word in functions:
            return functions[word]
        if word.startswith('"'):
            return json.loads(word)
        if word.isdigit():
            return int(word)
        if word.startswith("$."):
            return self.root[word[2:]]
        return self.names[word] if word.startswith("$") else dot[word[1:]]


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(command, value) pairs as Ollama's parser takes them: a value ends at the first newline where its quotes close.

    https://github.com/ollama/ollama/blob/main/parser/parser.go
    """
    found, rest = [], text
    while rest.strip():
        match = re.match(r"\s*(FROM|TEMPLATE|SYSTEM|PARAMETER [a-z_]+) ", rest)
        assert match, f"no command: {rest[:40]!r}"
        rest = rest[match.end() :]
        ends = [i for i, character in enumerate(rest) if character == "\n"]
        value, end = next((v, i) for i in ends if (v := unquoted(rest[:i].strip())) is not None)
        found.append((match[1], value))
        rest = rest[end:]
    return found


def unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def dialogues() -> list[list[dict[str, str]]]:
    """1 to 3 questions, with and without a system prompt, awaiting an answer."""
    texts = ["Hi there", "把这句话翻译成英文：你好", 'a "b" {{ c }}\n\\n', "  spaces  ", "</s>?", "last"]
    made = []
    for n_turns, system in itertools.product((1, 2, 3), ("", "Be brief.\nSei höflich. 你好")):
        turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": texts[i]} for i in range(2 * n_turns - 1)]
        made.append([{"role": "system", "content": system}] * bool(system) + turns)
    return made


@pytest.mark.parametrize("bos", ["", BOS])
@pytest.mark.parametrize("name", BUILT_IN)
def test_go_template_writes_what_jinja_writes(name: str, bos: str) -> None:
    jinja = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    text = go_template(name, bos=bos, eos=EOS)
    assert text is not None
    template = GoTemplate(text)
    for messages in dialogues():
        wanted = render_chat(jinja, messages, {"bos_token": BOS, "eos_token": EOS}, True)
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        assert (BOS if not bos else "") + template.render(system, messages) == wanted
    assert len(dialogues()) == 6


@pytest.mark.parametrize("name", ["alpaca", "llama-2", "mistral"])
def test_go_template_writes_the_space_that_a_file_writes_before_answers(name: str) -> None:
    plain = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    jinja = plain.replace("{{- message['content'] + eos", "{{- ' ' + message['content'] + eos")
    assert jinja != plain
    assert built_in_name(jinja) == built_in_name(plain) == name
    template = GoTemplate(go_template(name, bos=BOS, eos=EOS, lead=" ") or "")
    for messages in dialogues():
        wanted = render_chat(jinja, messages, {"bos_token": BOS, "eos_token": EOS}, True)
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        assert template.render(system, messages) == wanted


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_last_answer_stays_open(name: str) -> None:
    """Ollama goes on with an assistant message that stands last: up to its end, the text is Jinja's."""
    jinja = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "begun"}]
    wanted = render_chat(jinja, messages, {"bos_token": BOS, "eos_token": EOS}, False)
    written = GoTemplate(go_template(name, bos=BOS, eos=EOS) or "").render("", messages)
    assert written.endswith("begun")
    assert wanted.startswith(written)


def test_every_built_in_template_has_its_go_form() -> None:
    assert set(GO_TEMPLATES) == set(BUILT_IN)
    assert go_template("a-file-of-my-own", bos="", eos=EOS) is None


def test_modelfile_reads_back_as_it_was_meant() -> None:
    template = go_template("alpaca", bos="", eos=EOS)
    system = 'You say "yes".\n\nThen: \\n {{ .x }} 你好"'
    settings = OllamaOptions(system=system, temperature=0.0, num_ctx=2048)
    text = modelfile("model-f16.gguf", template, [EOS, "\n### Instruction:", EOS], settings)
    assert read_modelfile(text) == [
        ("FROM", "./model-f16.gguf"),
        ("TEMPLATE", template),
        ("PARAMETER stop", EOS),
        ("PARAMETER stop", "\n### Instruction:"),
        ("PARAMETER num_ctx", "2048"),
        ("PARAMETER temperature", "0.0"),
        ("SYSTEM", system),
    ]


def test_without_a_template_ollama_is_left_to_its_own() -> None:
    assert read_modelfile(modelfile("m.gguf", None, [], OllamaOptions())) == [("FROM", "./m.gguf")]


@pytest.mark.parametrize("text", ['say """this"""', "zero\u200bwidth", "wide\u3000space", "return\r"])
def test_what_a_modelfile_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--system"):
        quoted(text, "--system")
    assert quoted("tab\tand\nline 你好 🚀", "--system")
