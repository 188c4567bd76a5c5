"""What a chat request asks of the model's prompt template: variables, thoughts, tools; what it cannot do is refused.

Knows templates. It does not know how answers are generated or sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from onecard.data.chat_template import THOUGHT_SWITCHES, Template, thought_switch
from onecard.data.jinja_chat import variables_read
from onecard.data.thoughts import thought_mark
from onecard.data.tool_answers import CallStyle, call_style
from onecard.inference.tool_grammar import calls_grammar
from onecard.serve.api.requests import GenerationParams
from onecard.serve.http_error import bad_request

EFFORT = "reasoning_effort"


def for_template(ask: GenerationParams, template: Template) -> GenerationParams:
    """The request with what this template makes of it. Raises ApiError naming the field that it cannot serve."""
    variables = with_effort(with_own_switch(ask.template_variables, template.jinja), ask.reasoning_effort, template)
    check_variables(variables, variables_read(template.jinja))
    style = style_of_calls(template.jinja) if ask.tools else None
    grammar = ask.grammar
    if ask.tools and style and (grammar or ask.tools.is_strict):
        grammar = calls_grammar(ask.tools, style, grammar, has_args_mark="[ARGS]" in template.jinja)
    return replace(
        ask,
        template_variables=variables,
        call_style=style,
        grammar=grammar,
        thought_mark=thought_mark(template.jinja) if ask.splits_thoughts else "",
    )


def with_own_switch(variables: Mapping[str, Any], jinja: str) -> Mapping[str, Any]:
    """The variables with the switch for thoughts under the name that this template reads: thinking, enable_thinking."""
    switch = thought_switch(jinja)
    if switch is None or switch in variables:
        return variables
    return {switch if name in THOUGHT_SWITCHES else name: value for name, value in variables.items()}


def with_effort(variables: Mapping[str, Any], effort: str | None, template: Template) -> Mapping[str, Any]:
    """The variables with what `reasoning_effort` means: a variable of that name, or the switch turned off for none."""
    if effort is None:
        return variables
    switch = thought_switch(template.jinja)
    own: dict[str, Any] = {}
    if EFFORT in variables_read(template.jinja):
        own = {EFFORT: effort}
    elif effort == "none" and switch is not None:
        own = {switch: False}
    elif effort == "none" and not thought_mark(template.jinja):
        return variables
    else:
        can = "can only turn thoughts off, with none" if switch else "has no variable of that name"
        message = f"'{EFFORT}' {effort!r} is not supported: the prompt template of this model {can}"
        raise bad_request(message, EFFORT, "unsupported_parameter")
    for name in own.keys() & variables.keys():
        if variables[name] != own[name]:
            raise bad_request(f"{EFFORT} {effort!r} and chat_template_kwargs.{name} say different things", EFFORT)
    return {**variables, **own}


def check_variables(variables: Mapping[str, Any], read: Set[str]) -> None:
    """Refuse what the template does not read, unless its value asks for nothing. Raises ApiError."""
    for name, value in variables.items():
        if name not in read and value is not None and value is not False:
            known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
            message = f"the prompt template of this model does not read {name!r}; {known}"
            raise bad_request(message, f"chat_template_kwargs.{name}", "unsupported_parameter")


def style_of_calls(jinja: str) -> CallStyle:
    """How answers of this template call tools. Raises ApiError where that cannot be read."""
    style = call_style(jinja)
    if style is None:
        message = (
            "'tools' are not supported with the prompt template of this model: it lists none, or writes calls in "
            "another form than Hermes and Qwen, Llama 3 or Mistral; the server's --prompt_type chatml does"
        )
        raise bad_request(message, "tools", "unsupported_parameter")
    return style
