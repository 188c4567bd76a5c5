"""What is shown of an answer: its own text, to the last blank, and nothing that template or tokenizer put before it."""

from __future__ import annotations

import copy

import pytest

from onecard.data.chat_template import load_template
from onecard.data.encode import EncodeSettings, encode_sample, prompt_for
from onecard.data.messages import Conversation, Turn
from onecard.inference.call import PromptRow
from onecard.inference.stopping import answer_so_far, ended_answer
from tests.data.template_logics import TEMPLATES
from tests.data.tokenizer_kinds import KINDS


@pytest.mark.parametrize(
    ("before_answer", "written", "shown"),
    [("", "the fox", "the fox"), ("", " the fox", " the fox"), (" ", "the fox", "the fox"), (" ", " fox", " fox")],
)
def test_a_space_is_shown_where_the_data_have_it_and_not_where_the_template_writes_it(
    sp_tokenizer, before_answer, written, shown
):
    """`▁the` is one token for both; whose space it is, only the template knows."""
    tokenizer = copy.deepcopy(sp_tokenizer)
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{- '[Q] ' + m['content'] + ' [/Q]' if m['role'] == 'user' else '"
        + before_answer
        + "' + m['content'] + eos_token -}}{%- endfor -%}"
    )
    template = load_template("auto", tokenizer)
    turns = (Turn("user", "What?"), Turn("assistant", written))
    (sample,) = encode_sample(Conversation(turns, "x:1"), template, tokenizer, EncodeSettings(500))
    prompt = prompt_for(turns[:1], template, tokenizer)
    new_ids = sample.input_ids[len(prompt.ids) :]
    row = PromptRow(prompt.ids, 99, 0, prompt.continues, prompt.lead)
    ends = {"stop_ids": template.stop_ids(tokenizer), "stop_texts": [], "max_new_tokens": 99}
    texts = [
        answer_so_far(new_ids[:n], tokenizer, **ends, before=row.before, lead=row.lead).text
        for n in range(len(new_ids) + 1)
    ]
    assert texts[-1] == shown
    assert all(shown.startswith(text) for text in texts)
    assert ended_answer(new_ids, tokenizer, **ends, before=row.before, lead=row.lead).text == shown
    # And the next question finds the answer in its history as it was learned.
    again = (*turns[:1], Turn("assistant", shown), Turn("user", "Sure?"))
    assert prompt_for(again, template, tokenizer).ids[: len(sample.input_ids)] == sample.input_ids


def test_the_space_of_a_tokenizer_that_puts_one_behind_control_tokens_is_not_shown(tmp_path):

    tokenizer = KINDS["sp-prepend-stripping"](tmp_path)
    tokenizer.chat_template = TEMPLATES["phi-3"]
    template = load_template("auto", tokenizer)
    turns = (Turn("user", "What?"), Turn("assistant", "the fox"))
    (sample,) = encode_sample(Conversation(turns, "x:1"), template, tokenizer, EncodeSettings(500))
    prompt = prompt_for(turns[:1], template, tokenizer)
    row = PromptRow(prompt.ids, 99, 0, prompt.continues, prompt.lead)
    new_ids = sample.input_ids[len(prompt.ids) :]
    assert tokenizer.convert_ids_to_tokens(new_ids[0]).startswith("▁")
    ends = {"stop_ids": template.stop_ids(tokenizer), "stop_texts": [], "max_new_tokens": 99}
    assert ended_answer(new_ids, tokenizer, **ends, before=row.before, lead=row.lead).text == "the fox"
