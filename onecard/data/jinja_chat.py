"""Rendering chat templates exactly as Hugging Face does, without transformers.

The environment follows `transformers/utils/chat_template_utils.py` (v5): a sandbox, trim_blocks, lstrip_blocks, loop
controls, `raise_exception`, `strftime_now`, `tojson` that keeps characters readable, and a tolerated `generation` tag.
https://huggingface.co/docs/transformers/chat_templating_writing

Knows Jinja. Does not know which templates exist or where answers begin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from onecard.errors import ConfigError, DataError

_QUESTION = "onecard probe question"
# What a template is given by whoever renders it; variables of other names are the asker's.
OWN_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
)
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks answers for other programs; here it is only tolerated."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own convention)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return caller()


def render_chat(
    jinja: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    day: str = "",
    variables: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The rendered text; `day` (2026-03-01) is what a dated template takes for today, empty for the present one.

    `tools` are those that may be called. `variables` are further ones that the template may read, such as
    {"enable_thinking": False} for Qwen3.

    A template that loops over the parts of a content is given parts. Raises DataError when the template refuses these
    messages, such as two user turns in a row.
    """
    today = {"strftime_now": date.fromisoformat(day).strftime} if day else {}
    try:
        return compile_chat_template(jinja).render(
            **(variables or {}),
            messages=in_parts(messages) if reads_parts(jinja) else messages,
            tools=tools or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
            **today,
        )
    except _REFUSALS as reason:
        given = f" with {', '.join(variables)}" if variables else ""
        raise DataError(f"the prompt template refuses it{given}: {reason}") from reason


@lru_cache(maxsize=32)
def compile_chat_template(jinja: str) -> jinja2.Template:
    """The compiled template. Raises ConfigError with the line of a syntax error."""
    try:
        return _environment().from_string(jinja)
    except jinja2.TemplateSyntaxError as reason:
        raise ConfigError(
            "--prompt_type", f"the template is broken at line {reason.lineno}: {reason.message}"
        ) from reason


@lru_cache(maxsize=32)
def is_dated(jinja: str) -> bool:
    """Whether the template writes down the present day, as that of Llama 3.2 does."""
    return any(node.name == "strftime_now" for node in _environment().parse(jinja).find_all(jinja2.nodes.Name))


@lru_cache(maxsize=32)
def variables_read(jinja: str) -> frozenset[str]:
    """Names of the variables that an asker may set: what the template reads, but for what it is given anyway."""
    names = jinja2.meta.find_undeclared_variables(_environment().parse(jinja)) - OWN_VARIABLES
    return frozenset(name for name in names if not is_own_variable(name) and name not in _environment().globals)


def is_own_variable(name: str) -> bool:
    """Whether the template is given this by whoever renders it: the messages, a special token, ..."""
    return name in OWN_VARIABLES or name.endswith(("_token", "_tokens"))


@lru_cache(maxsize=32)
def reads_input(jinja: str) -> bool:
    """Whether the template reads `message.input`, the second field of an alpaca record, by itself."""
    tree = _environment().parse(jinja)
    by_dot = any(node.attr == "input" for node in tree.find_all(jinja2.nodes.Getattr))
    constants = (node.arg for node in tree.find_all(jinja2.nodes.Getitem))
    return by_dot or any(isinstance(arg, jinja2.nodes.Const) and arg.value == "input" for arg in constants)


@lru_cache(maxsize=32)
def reads_parts(jinja: str) -> bool:
    """Whether a question vanishes as a text and is shown as a list of parts, as in templates of models that see."""
    template = compile_chat_template(jinja)
    question = [{"role": "user", "content": _QUESTION}]

    def shows(messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
            return _QUESTION in template.render(messages=messages, tools=None, add_generation_prompt=True, **tokens)
        except (jinja2.TemplateError, TypeError, ValueError):
            return False

    return not shows(question) and shows(in_parts(question))


def in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each content as a list of one text part."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"], environment.globals["dict"] = _SafeNamespace, _NewDict()
    return environment


class _SafeNamespace(jinja2.utils.Namespace):
    """Jinja's namespace without names of Python's internals: templates come from the Hub and are not to be trusted."""

    def __init__(*args: Any, **names: Any) -> None:  # so that `namespace(self=...)` is possible, as in Jinja's own
        self, *given = args
        values = dict(*given, **names)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _NewDict:
    """The type `dict` where it is called; by the methods of the type a template could change what it is given."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args: Any, **names: Any) -> dict[Any, Any]:
        return dict(*args, **names)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a template may not use the name {name!r}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
