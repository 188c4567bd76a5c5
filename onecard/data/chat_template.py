"""Prompt templates: the one place that decides how a conversation is written down for a model.

A template is a Hugging Face chat template (Jinja). The same file serves training, chat, `apply_chat_template`, vLLM,
llama.cpp and Ollama, and is stored in the run directory as `chat_template.jinja`. What Jinja cannot say is in a
comment on its first line: ``{#- onecard: {"end": "<|im_end|>" or "eos", "stop": ["\\n\\nUser:"]} -#}``.

Knows how a conversation becomes text and where each answer begins and ends in it.
Does not know token ids (tokenization.py), masks and truncation (encode.py), or files of data (sources.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from onecard.config.data import TEMPLATE_ALIASES
from onecard.console import nearest
from onecard.data.built_in_templates import (
    BUILT_IN,
    FLAG,
    FOLDER,
    METADATA,
    built_in_name,
    read_metadata,
    without_bos,
)
from onecard.data.jinja_chat import compile_chat_template, reads_input, render_chat, variables_read
from onecard.data.lost_turns import TurnKeeper
from onecard.data.message_forms import messages_for, with_thoughts_for
from onecard.data.messages import Turn, tools_of
from onecard.data.special_tokens import added_tokens, beginning_ids, single_token, special_tokens
from onecard.data.thoughts import completion, empty_thought, has_thought, opened_thought, split_thought, with_thought
from onecard.errors import ConfigError, DataError

EOS = "eos"
THOUGHT_SWITCHES = ("enable_thinking", "thinking")  # of Qwen3, GLM and SmolLM3; of DeepSeek V3.1 and Granite
_PLACEHOLDER = re.compile("\x00([0-9]+)\x00")
_MOST_SKELETONS = 4096
_PROBE = "onecard probe answer"


class Segment(NamedTuple):
    """A piece of a rendered conversation between two borders that no token crosses.

    `text + end` is what the template wrote; `end` (answers only) is the text that closes the answer. `learn` is False
    for what is never learned, whatever is asked for: an answer that the data mark so, a thought that nobody had.
    `weight` multiplies the loss of an answer.
    """

    text: str
    is_answer: bool
    end: str = ""
    learn: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class Template:
    """A chat template with how an answer ends: `end` is a text such as "<|im_end|>", or "eos" for the tokenizer's own.

    `stop` holds further texts at which generation ends, for models that were never taught the end token. `day`
    (2026-03-01) is the one a dated template writes down; empty for today. Training keeps the day of its first encoding.
    `variables` are what else an asker sets for it, such as {"enable_thinking": False}; training sets none.
    """

    name: str
    jinja: str
    end: str = EOS
    stop: tuple[str, ...] = ()
    day: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def known_name(self) -> str:
        """The name of the built-in template that this one is, whatever it was loaded from; else its own."""
        return built_in_name(self.jinja) or self.name

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text `tokenizer.apply_chat_template(messages, tools, self.jinja, tokenize=False)` gives.

        Raises DataError when the template refuses the messages.
        """
        return render_chat(self.jinja, messages, special_tokens, add_generation_prompt, self.day, self.variables, tools)

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Messages in this template's form; an alpaca input joins the question where it does not know inputs.

        (Turn("user", "Translate", "cat"),) -> [{"role": "user", "content": "Translate\\n\\ncat"}] for chatml
        """
        if not reads_input(self.jinja):
            turns = [replace(t, content=f"{t.content}\n\n{t.input}", input="") if t.input else t for t in turns]
        return messages_for(self.jinja, with_thoughts_for(self.jinja, turns))

    def with_thinking(self, wanted: str) -> Template:
        """The template with its own switch for thoughts turned on or off; auto: as it is.

        Raises ConfigError for on or off where it has no such switch.
        """
        if wanted == "auto":
            return self
        switch = thought_switch(self.jinja)
        if switch is None:
            text = f"{wanted}, but the prompt template {self.name} has no switch for thoughts"
            raise ConfigError("--thinking", f"{text} ({' or '.join(THOUGHT_SWITCHES)}); use auto")
        return replace(self, variables={**self.variables, switch: wanted == "on"})

    def end_text(self, tokenizer: Any) -> str:
        """The text that closes an answer. Raises ConfigError when it is the tokenizer's eos and there is none."""
        if self.end != EOS:
            return self.end
        if not tokenizer.eos_token:
            raise ConfigError(
                FLAG, f"template {self.name} ends answers with the tokenizer's eos token, and this one has none"
            )
        return str(tokenizer.eos_token)

    def stop_strings(self, tokenizer: Any) -> list[str]:
        """Texts at which generation ends; the end of an answer is among them when it is not one token."""
        texts = dict.fromkeys((*self.stop, self.end_text(tokenizer)))
        return [text for text in texts if single_token(text, tokenizer) is None]

    def stop_ids(self, tokenizer: Any) -> list[int]:
        """Token ids at which generation ends: the end of an answer, the tokenizer's eos, stops that are one token."""
        texts = [self.end_text(tokenizer), *self.stop]
        ids = [single_token(text, tokenizer) for text in texts] + [tokenizer.eos_token_id]
        return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


_Skeleton = tuple[list[str | int], bool, str]


def thought_switch(jinja: str) -> str | None:
    """The variable by which a template turns thoughts on and off; None where it has none."""
    return next((name for name in THOUGHT_SWITCHES if name in variables_read(jinja)), None)


class PromptRenderer:
    """A template bound to a tokenizer's special tokens; made once per data set, because it runs once per record."""

    def __init__(self, template: Template, tokenizer: Any) -> None:
        self.template = template
        self.special_tokens = special_tokens(tokenizer)
        self.end = template.end_text(tokenizer)
        self._added = tuple(str(token) for token in added_tokens(tokenizer).values())
        self._inserts_as_it_is = built_in_name(template.jinja) is not None
        self._skeletons: dict[Any, list[_Skeleton] | None] = {}
        self._keeper = TurnKeeper(self._rendered)

    def render(self, turns: Sequence[Turn], *, prompt: bool) -> str:
        """The text of all turns. Raises DataError where the template refuses or leaves out one of them."""
        return self._rendered(self._keeper.kept(turns, prompt=prompt), prompt)

    def _rendered(self, turns: Sequence[Turn], prompt: bool) -> str:
        return self.template.render(
            self.template.messages(turns),
            special_tokens=self.special_tokens,
            add_generation_prompt=prompt,
            tools=tools_of(turns),
        )

    def segments(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> list[Segment]:
        """The rendered text cut at the answers' borders; one segment where the template is not append-only.

        chatml, [user "Hi", assistant "Hello"] ->
            Segment("<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", is_answer=False)
            Segment("Hello", is_answer=True, end="<|im_end|>")
            Segment("\\n", is_answer=False)        # with a next question: the beginning of the next prompt
        """
        pieces = self.cut(turns, add_generation_prompt=add_generation_prompt)
        if pieces is None:
            return [Segment(self.render(turns, prompt=add_generation_prompt), is_answer=False)]
        return pieces

    def cut(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> list[Segment] | None:
        """The segments, or None when the template is not append-only for these turns.

        Append-only: what generation was fed for each answer, then the answer and its end, is how the text that
        generation is fed for the next answer begins. Otherwise what is learned would not be what is fed later.
        """
        turns = with_thoughts_for(self.template.jinja, turns)
        if not self._inserts_as_it_is or any(turn.tool_calls or turn.role == "tool_list" for turn in turns):
            return self._cut_rendered(turns, add_generation_prompt=add_generation_prompt)
        shape = (add_generation_prompt, *[(turn.role, turn.input != "") for turn in turns])
        if shape not in self._skeletons:
            if len(self._skeletons) >= _MOST_SKELETONS:
                self._skeletons.clear()
            self._skeletons[shape] = self._skeleton(turns, add_generation_prompt)
        skeletons = self._skeletons[shape]
        if skeletons is None:
            return None
        texts = [text for turn in turns for text in (turn.content, turn.input)]
        found = [
            Segment("".join([part if isinstance(part, str) else texts[part] for part in parts]), is_answer, end)
            for parts, is_answer, end in skeletons
        ]
        # What follows the last answer is no segment where it is empty, such as an empty question without a template.
        return found[:-1] if found and not found[-1].is_answer and not found[-1].text else found

    def _skeleton(self, turns: Sequence[Turn], add_generation_prompt: bool) -> list[_Skeleton] | None:
        """The segments of any conversation of this shape, with numbers where contents and inputs go.

        Only for the built-in templates, which are known (and tested) to insert what they are given as it is. Jinja
        would otherwise take more time than everything else that is done to a short record.
        """
        numbered = [
            Turn(turn.role, f"\0{2 * k}\0", f"\0{2 * k + 1}\0" if turn.input else "") for k, turn in enumerate(turns)
        ]
        segments = self._cut_rendered(numbered, add_generation_prompt=add_generation_prompt)
        if segments is None:
            return None
        split = [_PLACEHOLDER.split(segment.text) for segment in segments]
        parts = [[part if k % 2 == 0 else int(part) for k, part in enumerate(pieces)] for pieces in split]
        return [(parts_of, seg.is_answer, seg.end) for parts_of, seg in zip(parts, segments, strict=True)]

    def _cut_rendered(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> list[Segment] | None:
        """`cut` by rendering the conversation up to each answer and comparing."""
        pieces: list[Segment] = []
        written = full = ""
        for k, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            try:
                prompt = self.render(turns[:k], prompt=True)
            except DataError:  # no question comes before this answer
                return None
            full = self.render(turns[: k + 1], prompt=False)
            if not prompt.startswith(written) or not full.startswith(prompt):
                return None
            answer, in_text = self._answer(full[len(prompt) :], turn, opened_thought(prompt))
            if not in_text.endswith(self.end) and (add_generation_prompt or k < len(turns) - 1):
                return None  # the end is taught all the same, and the text that goes on does not have it
            pieces += [Segment(prompt[len(written) :], is_answer=False), *answer]
            written = prompt + in_text
        finished = bool(pieces) and turns[-1].role == "assistant" and not add_generation_prompt
        last = full if finished else self.render(turns, prompt=add_generation_prompt)
        if not last.startswith(written):
            return None
        rest = last[len(written) :]
        return [*pieces, Segment(rest, is_answer=False)] if rest else pieces

    def prompt_and_answer(self, turns: Sequence[Turn]) -> list[Segment]:
        """What generation is fed for the last answer, then that answer.

        Used where only the last answer counts, and for templates that rewrite history (Qwen3 drops old thinking).
        """
        turns = with_thoughts_for(self.template.jinja, turns)
        history = self.segments(turns[:-1], add_generation_prompt=True)
        prompt = self.render(turns[:-1], prompt=True)
        full, opened = self.render(turns, prompt=False), opened_thought(prompt)
        if full.startswith(prompt):
            return [*history, *self._answer(full[len(prompt) :], turns[-1], opened)[0]]
        # The generation prompt holds more than the finished text, such as an opened thought: complete the prompt.
        content = (
            self._called(full, prompt.removesuffix(opened), turns[-1])
            if turns[-1].tool_calls
            else next((text for text in _as_written(turns[-1]) if text in full), turns[-1].content)
        )
        text = completion(opened, with_thought(turns[-1].thought, content)) if opened else content
        empty = empty_thought(opened + text)[len(opened) :] if not _has_thought(turns[-1]) else ""
        return [*history, *_without_thought(empty), Segment(text[len(empty) :], is_answer=True, end=self.end)]

    def _called(self, full: str, prompt: str, turn: Turn) -> str:
        """What is learned of an answer with calls: all that the template writes behind the prompt, and its thought."""
        if not full.startswith(prompt):
            raise DataError("the prompt template writes tool calls behind another prompt than it asks with")
        written = self._answer(full[len(prompt) :], turn)[0][-1].text
        thought, _ = split_thought(turn.content)
        return with_thought(thought, written) if thought and thought not in written else written

    @cached_property
    def opened_thought(self) -> str:
        """The thought that every generation prompt of this template opens at its end, or ""."""
        return opened_thought(self._probe[0])

    @cached_property
    def lead(self) -> str:
        """What the template writes between the generation prompt and an answer.

        " " for Llama 2; "assistant: " where the template knows no generation prompt; what closes an opened thought.
        The model learns to write it, and it is no part of the answer.
        """
        prompt, full = self._probe
        if full.startswith(prompt):
            return full[len(prompt) :].partition(_PROBE)[0]
        return completion(self.opened_thought, "") if self.opened_thought else ""

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """The generation prompt for a question, and the text with its answer; twice "" where the template refuses."""
        asked = (Turn("user", "question"), Turn("assistant", _PROBE))
        try:
            return self.render(asked[:1], prompt=True), self.render(asked, prompt=False)
        except DataError:  # it wants a system message, or other things
            return "", ""

    def _answer(self, rest: str, turn: Turn, opened: str = "") -> tuple[list[Segment], str]:
        """The answer in `rest`, the text after the prompt; and how much of `rest` the answer takes.

        rest "Hello<|im_end|>\\n", answer "Hello" -> [Segment("Hello", True, end="<|im_end|>")], "Hello<|im_end|>"

        An empty thought that the template puts before it, or closes where the prompt opened it, is a segment of its
        own, which is not learned.
        """
        thought = "" if _has_thought(turn) else empty_thought(opened + rest)[len(opened) :]
        start = len(self.lead) if rest.startswith(self.lead) else len(thought)
        content = next((text for text in _as_written(turn) if text in rest[start:]), None)
        after_content = start if content is None else rest.index(content, start) + len(content)
        stop = rest.find(self.end, after_content)
        in_text, end = rest[: stop + len(self.end)], self.end
        if stop < 0 and turn.tool_calls and rest.rstrip().endswith(self._added):
            # Calls may end with a token of their own, such as <|call|>.
            in_text, end = rest.rstrip(), ""
            stop = len(in_text)
        elif stop < 0:
            # The template does not close answers; the end must be taught all the same.
            stop = len(rest) if content is None or turn.tool_calls else after_content
            in_text = rest[:stop]
        answer = Segment(rest[len(thought) : stop], is_answer=True, end=end)
        return [*_without_thought(thought), answer], in_text


def _has_thought(turn: Turn) -> bool:
    return bool(turn.thought) or has_thought(turn.content)


def _without_thought(empty: str) -> list[Segment]:
    """The segment of an empty thought, if there is one: it stands there, and is never learned."""
    return [Segment(empty, is_answer=False, learn=False)] if empty else []


def _as_written(turn: Turn) -> tuple[str, str]:
    """What a template may have made of a turn's content: itself, or without the blanks around it."""
    return turn.content, turn.content.strip()


def load_template(prompt_type: str, tokenizer: Any, *, dialogue: bool = False) -> Template:
    """The template of this name or file; `auto` is the tokenizer's own, else alpaca, or vicuna-chat for dialogue.

    Raises ConfigError for an unknown name, an unreadable file, broken Jinja or broken metadata.
    """
    if prompt_type == "auto":
        own = own_chat_template(tokenizer)
        if own is not None:
            return _from_jinja("auto", own, tokenizer)
        prompt_type = "vicuna-chat" if dialogue else "alpaca"
    prompt_type = TEMPLATE_ALIASES.get(prompt_type, prompt_type)
    if prompt_type in BUILT_IN:
        jinja = (FOLDER / f"{prompt_type}.jinja").read_text(encoding="utf-8")
        # Many tokenizers name a BOS that they never write (Phi-3, SmolLM2): their models have not seen it in front.
        names_only = tokenizer.bos_token and tokenizer.bos_token_id not in beginning_ids(tokenizer)
        return _from_jinja(prompt_type, without_bos(jinja) if names_only else jinja, tokenizer)
    path = Path(prompt_type)
    if path.suffix not in (".jinja", ".jinja2", ".j2") and not path.is_file():
        known = ", ".join(("auto", *BUILT_IN))
        hint = nearest(prompt_type, ("auto", *BUILT_IN))
        raise ConfigError(FLAG, f"no template is called {prompt_type!r}{hint}; choose {known}, or give a .jinja file")
    try:
        return _from_jinja(path.stem, path.read_text(encoding="utf-8"), tokenizer)
    except (OSError, UnicodeDecodeError) as reason:
        raise ConfigError(FLAG, f"cannot read the template file {prompt_type}: {reason}") from reason


def own_chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template, if it has one; of several named ones, the one called default."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, list):
        own = {item["name"]: item["template"] for item in own}
    return own.get("default") if isinstance(own, dict) else own or None


def _from_jinja(name: str, jinja: str, tokenizer: Any) -> Template:
    """A template out of its text: end and stops from the first line, or found out by rendering a probe."""
    compile_chat_template(jinja)
    match = METADATA.match(jinja)
    told = read_metadata(name, match[1]) if match else (_find_end(jinja, tokenizer),)
    template = Template(name, jinja, *told)
    template.end_text(tokenizer)
    return template


def _find_end(jinja: str, tokenizer: Any) -> str:
    """How a template without metadata closes an answer: the first special token after a probe answer, else eos."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    text = render_chat(jinja, messages, special_tokens(tokenizer), False)
    tail = text.rpartition(_PROBE)[2].lstrip()
    added = [str(token) for token in added_tokens(tokenizer).values()]
    starts = [token for token in {*added, *tokenizer.all_special_tokens} if token and tail.startswith(token)]
    return max(starts, key=len) if starts else EOS
