"""The ids of training and generation are Hugging Face's own for the rendered text, whatever tokenizer and template.

Away from the borders of answers, that is: no token crosses these. Where Hugging Face has a token across a border, the
words around the border are left out of the comparison, and nothing else is.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain
from typing import Any

import pytest

from onecard.data.chat_template import Segment, Template, load_template
from onecard.data.encode import IGNORE_INDEX, Encoder, EncodeSettings, encode_prompt, encode_sample
from onecard.data.lost_turns import without_system_turns
from onecard.data.messages import Conversation, Turn
from onecard.data.special_tokens import added_tokens, beginning_ids
from onecard.data.tokenization import SegmentTokenizer
from onecard.errors import DataError
from tests.data.template_logics import TEMPLATES
from tests.data.tokenizer_kinds import KINDS, STRIPPING

CONVERSATIONS = (
    (Turn("user", "Hi"), Turn("assistant", "Hello you")),
    (Turn("system", "Be brief."), Turn("user", "翻译成英文：你好"), Turn("assistant", "Hello, world.\n\n1 2 3")),
    (
        Turn("user", " What is  the fox?\n"),
        Turn("assistant", "Paris."),
        Turn("user", "And 北京?"),
        Turn("assistant", "中国的首都 🙂"),
    ),
    (Turn("user", "a"), Turn("assistant", " Sure.\n"), Turn("user", "\n1"), Turn("assistant", "  2")),
)
SETTINGS = EncodeSettings(cutoff_len=10_000)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in KINDS.items()}


def reference(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Hugging Face's ids and offsets of a whole text; BOS where the tokenizer writes it and the text does not.

    The offsets of an added token are those of its own text, without the blanks that it may take.
    """
    bos = tokenizer.bos_token
    adds = bool(beginning_ids(tokenizer)) and not text.lstrip().startswith(bos)
    found = tokenizer(text, add_special_tokens=adds, return_offsets_mapping=tokenizer.is_fast)
    added = added_tokens(tokenizer)
    offsets = [
        (first, first + len(str(added[token_id]))) if token_id in added and last > first else (first, last)
        for token_id, (first, last) in zip(found["input_ids"], found.get("offset_mapping") or [], strict=False)
    ]
    return found["input_ids"], offsets


def compare(segments: list[Segment], tokens: SegmentTokenizer, tokenizer: Any) -> tuple[list[int], bool]:
    """Check each segment's ids against Hugging Face's for the joined text; all ids, and whether they are wholly equal.

    A segment at whose border Hugging Face has a token that crosses it is compared without the word at this border.
    """
    text = "".join(segment.text + segment.end for segment in segments)
    theirs, offsets = reference(tokenizer, text)
    per_segment = tokens.ids([segments])[0]
    ours = [*tokens.beginning_of(text), *chain.from_iterable(per_segment)]
    if ours == theirs or not offsets:
        assert ours == theirs, (tokenizer.convert_ids_to_tokens(ours), tokenizer.convert_ids_to_tokens(theirs))
        return ours, True
    n_before = len(tokens.beginning_of(text))
    theirs, offsets, start = theirs[n_before:], offsets[n_before:], 0
    for segment, ids in zip(segments, per_segment, strict=True):
        end = start + len(segment.text + segment.end)
        crossed = [any(first < border < last for first, last in offsets) for border in (start, end)]
        # What such a token takes from an answer is left to the answer here.
        crossed[0] |= segment.is_answer and segment.text[:1].isspace() and text[:start].rstrip().endswith(STRIPPING)
        low = start + len(re.match(r"\s*\S*", text[start:end]).group()) if crossed[0] else start
        high = start + len(text[start:end].rstrip().rpartition(" ")[0]) if crossed[1] else end
        inside = [i for i, (first, last) in zip(theirs, offsets, strict=True) if low <= first < high and last <= high]
        shown = (text[start:end], tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(inside))
        assert crossed[1] or not inside or ids[-len(inside) :] == inside, shown
        assert crossed[0] or ids[: len(inside)] == inside, shown
        assert any(crossed) or ids == inside, shown
        start = end
    return ours, False


def check(conversation: tuple[Turn, ...], template: Template, tokenizer: Any, tally: Counter[str]) -> None:
    """Prompts and training samples of a conversation."""
    encoder = Encoder(template, tokenizer, SETTINGS)
    answered = [k for k, turn in enumerate(conversation) if turn.role == "assistant"]
    prompts = []
    for k in answered:
        segments = encoder.writer.segments(conversation[:k], add_generation_prompt=True)
        # A system text that Hugging Face would drop stands before the question.
        first, *rest = conversation[:k]
        dropped = first.role == "system" and "USER: " in tokenizer.chat_template
        turns = without_system_turns([first, *rest]) if dropped else [first, *rest]
        rendered = tokenizer.apply_chat_template(template.messages(turns), tokenize=False, add_generation_prompt=True)
        assert "".join(segment.text + segment.end for segment in segments) == rendered
        ids, is_whole = compare(segments, encoder.tokens, tokenizer)
        prompts.append(encode_prompt(conversation[:k], template, tokenizer))
        assert prompts[-1] == ids
        tally["prompts"] += 1
        tally["whole prompts"] += is_whole
    samples = encode_sample(Conversation(conversation, "x:1"), template, tokenizer, SETTINGS)
    drafts = encoder.plan(Conversation(conversation, "x:1"))
    n_learned = 0
    for sample, draft in zip(samples, drafts, strict=True):
        ids, is_whole = compare(draft.segments, encoder.tokens, tokenizer)
        assert sample.input_ids == ids
        tally["samples"] += 1
        tally["whole samples"] += is_whole
        starts = [k for k in range(1, len(ids)) if sample.labels[k] != IGNORE_INDEX == sample.labels[k - 1]]
        for start in starts:
            prompt = prompts[n_learned]
            assert ids[: len(prompt)] == prompt
            assert len(prompt) <= start
            n_learned += 1
    assert n_learned == len(answered)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_hugging_faces_own(tokenizers: dict[str, Any], kind: str) -> None:
    tokenizer, tally = tokenizers[kind], Counter()
    for jinja in TEMPLATES.values():
        tokenizer.chat_template = jinja
        template = load_template("auto", tokenizer)
        for conversation in CONVERSATIONS:
            try:
                check(conversation, template, tokenizer, tally)
            except DataError as reason:
                assert "System role not supported" in str(reason)
                tally["refused"] += 1
    assert tally["refused"] == 1
    assert tally["prompts"] == 6 * len(TEMPLATES) - 1
    # Where Hugging Face has a token across a border: a blank at the end of an answer, mostly.
    assert tally["whole prompts"] > 0.94 * tally["prompts"]
    assert tally["whole samples"] > 0.7 * tally["samples"]
