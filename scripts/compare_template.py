#!/usr/bin/env python3
"""Compare what is written here with `tokenizer.apply_chat_template`, for the chat template of a model on this disk.

    python scripts/compare_template.py PATH/TO/MODEL

Conversations with system texts, thoughts, tool calls and their results are asked and learned: prompts must be the text
and the ids that transformers gives, samples must begin with them, and no result or empty thought may be learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.console import run_main, say
from onecard.data.chat_template import Template, load_template
from onecard.data.encode import IGNORE_INDEX, DroppedSample, EncodeSettings, encode_prompt, encode_sample
from onecard.data.formats import to_sample
from onecard.data.message_forms import thought_key
from onecard.data.messages import Conversation
from onecard.data.thoughts import with_thought
from onecard.errors import DataError
from onecard.model.load import load_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}},
        },
    }
]
RESULT = "the result of a tool"


def answer(content: str, *calls: dict[str, int], thought: str = "") -> dict[str, Any]:
    """An answer with calls of the tool, whose ids are of nine characters."""
    made = [{"id": f"call{x['x']:05d}", "type": "function", "function": {"name": "add", "arguments": x}} for x in calls]
    more = {"tool_calls": made, "reasoning_content": thought}
    return {"role": "assistant", "content": content, **{key: value for key, value in more.items() if value}}


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "content": f"{RESULT} {number}", "tool_call_id": f"call{number:05d}"}


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 2?"}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "two answers": ([USER, answer("Three."), USER, answer("Still three.")], False),
    "system": ([SYSTEM, USER, answer("Three.")], False),
    "thoughts": ([USER, answer("Three.", thought="Easy."), USER, answer("Three.", thought="Again.")], False),
    "a thought, then none": ([USER, answer("Three.", thought="Easy."), USER, answer("Three.")], False),
    "a call": ([USER, answer("", {"x": 1}), result(1), answer("Three.")], True),
    "a call and a system text": ([SYSTEM, USER, answer("", {"x": 1}), result(1), answer("Three.")], True),
    "two calls at once": ([USER, answer("", {"x": 1}, {"x": 2}), result(1), result(2), answer("Three.")], True),
    "two calls in steps": (
        [USER, answer("", {"x": 1}), result(1), answer("", {"x": 2}), result(2), answer("Three.")],
        True,
    ),
    "a thought beside a call": ([USER, answer("", {"x": 1}, thought="Easy."), result(1), answer("Three.")], True),
    "a text beside a call": ([USER, answer("One moment.", {"x": 1}), result(1), answer("Three.")], True),
    "tools that are not called": ([USER, answer("Three.")], True),
}


def theirs(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, arguments_as_text: bool) -> str:
    """The prompt that transformers writes; thoughts stand in the text where the template knows no key for them."""
    messages = json.loads(json.dumps(messages))
    key = thought_key(tokenizer.chat_template)
    for message in messages:
        thought = message.pop("reasoning_content", "")
        if thought and key:
            message[key] = thought
        elif thought:
            message["content"] = with_thought(thought, message["content"])
        for call in message.get("tool_calls", ()) if arguments_as_text else ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True))


def differences(name: str, template: Template, tokenizer: Any) -> Iterator[str]:
    """What differs in one of the conversations, in words."""
    messages, has_tools = CONVERSATIONS[name]
    tools = TOOLS if has_tools else None
    sample = to_sample({"messages": messages, "tools": tools}, name).sample
    assert isinstance(sample, Conversation)
    coded = encode_sample(sample, template, tokenizer, EncodeSettings(100_000))
    if isinstance(coded, DroppedSample):
        raise DataError(coded.reason)
    for sample_ids in coded:
        learned = tokenizer.decode(
            [i for i, label in zip(sample_ids.input_ids, sample_ids.labels, strict=True) if label != IGNORE_INDEX]
        )
        if RESULT in learned:
            yield "the result of a tool is learned"
        if "<think>\n\n</think>" in learned or learned.lstrip().startswith("</think>"):
            yield "an empty thought is learned"
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        ids = encode_prompt(sample.turns[: k + has_tools], template, tokenizer)
        wanted = []
        for as_text in (False, True):
            with suppress(Exception):  # a template raises what it likes where it wants the other form
                text = theirs(tokenizer, messages[:k], tools, as_text)
                adds = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
                wanted.append(tokenizer(text, add_special_tokens=adds)["input_ids"])
        if ids not in wanted:
            yield f"the prompt of message {k + 1} is another one"
        if not any(one.input_ids[: len(ids)] == ids for one in coded):
            yield f"no sample begins with the prompt of message {k + 1}"


def main() -> None:
    """Run the comparison. Raises DataError where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a model, or of its tokenizer alone")
    parser.add_argument("--prompt_type", default="auto", help="another template: a built-in name or a .jinja file")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model, trust_remote_code=False)
    template = load_template(options.prompt_type, tokenizer)
    tokenizer.chat_template = template.jinja
    n_different = 0
    for name in CONVERSATIONS:
        try:
            found = list(dict.fromkeys(differences(name, template, tokenizer)))
        except DataError as reason:
            say(f"{name}: refused ({reason})")
            continue
        n_different += bool(found)
        say(f"{name}: {'; '.join(found) or 'the same'}")
    if n_different:
        raise DataError(f"{n_different} of {len(CONVERSATIONS)} conversations differ", options.model)


if __name__ == "__main__":
    sys.exit(run_main(main))
