"""Templates render what Hugging Face renders, and are cut where answers begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.data.built_in_templates import BUILT_IN, FOLDER
from onecard.data.chat_template import PromptRenderer, Segment, Template, load_template
from onecard.data.jinja_chat import render_chat
from onecard.data.messages import Turn
from onecard.data.special_tokens import special_tokens
from onecard.errors import ConfigError, DataError
from tests.data.conftest import APPEND_ONLY, CLOSES_AT_THE_END, REWRITES_HISTORY, SPACED

TOKENIZERS = ("sp_tokenizer", "bytelevel_tokenizer", "bytelevel_bos_tokenizer")
CONVERSATIONS = (
    (Turn("user", "Hi"), Turn("assistant", "Hello")),
    (Turn("system", "Be brief."), Turn("user", "翻译", "cat"), Turn("assistant", "猫")),
    (Turn("user", "Sum", "1 2"), Turn("assistant", "3"), Turn("user", "Again"), Turn("assistant", " 3 \n")),
)
text = st.text(st.one_of(st.sampled_from(" \n\t你好🙂é{}%<>'\"\\"), st.characters(codec="utf-8")), max_size=12)


def segments_of(template: Template, turns: Sequence[Turn], tokenizer: Any) -> list[Segment]:
    return PromptRenderer(template, tokenizer).segments(turns)


@st.composite
def turns(draw) -> tuple[Turn, ...]:
    system = [Turn("system", draw(text))] if draw(st.booleans()) else []
    pairs = [
        turn
        for _ in range(draw(st.integers(1, 3)))
        for turn in (Turn("user", draw(text), draw(text)), Turn("assistant", draw(text)))
    ]
    return (*system, *pairs)


@pytest.mark.parametrize("n_examples", [5, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("which", TOKENIZERS)
def test_renders_what_hugging_face_renders(request, which, name, n_examples):
    tokenizer = request.getfixturevalue(which)
    template = load_template(name, tokenizer)

    @settings(max_examples=n_examples, deadline=None)
    @given(turns=turns(), prompt=st.booleans())
    def check(turns, prompt):
        messages = template.messages(turns[:-1] if prompt else turns)
        ours = template.render(messages, special_tokens=special_tokens(tokenizer), add_generation_prompt=prompt)
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=template.jinja, add_generation_prompt=prompt, tokenize=False
        )
        assert ours == theirs

    check()


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(several=st.lists(turns(), min_size=1, max_size=4), prompt=st.booleans())
def test_the_quick_path_for_built_in_templates_is_what_rendering_gives(sp_tokenizer, name, several, prompt):
    writer = PromptRenderer(load_template(name, sp_tokenizer), sp_tokenizer)
    for conversation in several:
        end = -1 if prompt else None
        quick = writer.cut(conversation[:end], add_generation_prompt=prompt)
        assert quick == writer._cut_rendered(conversation[:end], add_generation_prompt=prompt)
        assert quick is not None


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_empty_question_is_cut_alike_in_both_ways(sp_tokenizer, name):
    writer = PromptRenderer(load_template(name, sp_tokenizer), sp_tokenizer)
    for prompt in (True, False):
        for turns in ([Turn("user", "")], [Turn("user", ""), Turn("assistant", "a"), Turn("user", "")]):
            quick = writer.cut(turns, add_generation_prompt=prompt)
            assert quick == writer._cut_rendered(turns, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("which", TOKENIZERS)
def test_segments_are_the_rendered_text_cut_at_the_answers(request, which, name):
    tokenizer = request.getfixturevalue(which)
    template = load_template(name, tokenizer)
    n_answers = 0
    for conversation in CONVERSATIONS:
        segments = segments_of(template, conversation, tokenizer)
        rendered = template.render(
            template.messages(conversation), special_tokens=special_tokens(tokenizer), add_generation_prompt=False
        )
        assert "".join(segment.text + segment.end for segment in segments) == rendered
        answers = [turn.content for turn in conversation if turn.role == "assistant"]
        assert [segment.text for segment in segments if segment.is_answer] == answers
        assert all(segment.end == template.end_text(tokenizer) for segment in segments if segment.is_answer)
        n_answers += len(answers)
    assert n_answers == 4


def test_the_newline_after_an_end_token_belongs_to_the_next_prompt(bytelevel_tokenizer):
    template = load_template("chatml", bytelevel_tokenizer)
    segments = segments_of(template, CONVERSATIONS[2], bytelevel_tokenizer)
    assert segments[1] == Segment("3", is_answer=True, end="<|im_end|>")
    assert segments[2].text.startswith("\n<|im_start|>user\nAgain")


def test_built_in_files_are_all_there_and_name_their_end():
    files = sorted(path.stem for path in FOLDER.glob("*.jinja"))
    assert files == sorted(BUILT_IN)
    for path in FOLDER.glob("*.jinja"):
        assert path.read_text(encoding="utf-8").startswith('{#- onecard: {"end": ')


def test_alpaca_has_both_wordings(sp_tokenizer):
    template = load_template("alpaca", sp_tokenizer)
    prompts = [segments_of(template, turns[:1], sp_tokenizer)[0].text for turns in (CONVERSATIONS[0], CONVERSATIONS[2])]
    assert prompts[0] == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi\n\n### Response:\n"
    )
    assert prompts[1].endswith("\n\n### Instruction:\nSum\n\n### Input:\n1 2\n\n### Response:\n")
    assert "paired with an input" in prompts[1]


def test_an_input_is_never_lost_where_the_template_does_not_know_inputs(bytelevel_tokenizer):
    n_visited = 0
    for name in BUILT_IN:
        prompt = segments_of(load_template(name, bytelevel_tokenizer), CONVERSATIONS[2], bytelevel_tokenizer)[0].text
        assert "Sum" in prompt
        assert "1 2" in prompt
        n_visited += 1
    assert n_visited == 7


def test_an_end_that_is_not_one_token_is_a_stop_string(sp_tokenizer, bytelevel_tokenizer):
    spelt = load_template("chatml", sp_tokenizer)
    assert spelt.stop_strings(sp_tokenizer) == ["<|im_end|>"]
    assert spelt.stop_ids(sp_tokenizer) == [2]
    token = load_template("chatml", bytelevel_tokenizer)
    assert token.stop_strings(bytelevel_tokenizer) == []
    assert token.stop_ids(bytelevel_tokenizer) == [bytelevel_tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_auto_takes_the_tokenizers_own_template_and_finds_its_end(
    sp_tokenizer, bytelevel_tokenizer, bytelevel_bos_tokenizer, with_template
):
    own = load_template("auto", with_template(bytelevel_tokenizer, APPEND_ONLY))
    assert (own.jinja, own.end) == (APPEND_ONLY, "<|im_end|>")
    assert load_template("auto", with_template(sp_tokenizer, SPACED)).end == "</s>"
    no_end = with_template(bytelevel_bos_tokenizer, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert load_template("auto", no_end).end == "eos"
    named = with_template(bytelevel_tokenizer, {"default": APPEND_ONLY, "tool_use": "x"})
    assert load_template("auto", named).jinja == APPEND_ONLY


def test_auto_without_an_own_template(sp_tokenizer):
    assert load_template("auto", sp_tokenizer).name == "alpaca"
    assert load_template("auto", sp_tokenizer, dialogue=True).name == "vicuna-chat"


def test_an_end_is_taught_even_where_the_template_has_none(bytelevel_bos_tokenizer, with_template):
    tokenizer = with_template(
        bytelevel_bos_tokenizer,
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )
    template, turns = load_template("auto", tokenizer), CONVERSATIONS[2]
    writer = PromptRenderer(template, tokenizer)
    assert writer.lead == "assistant: "
    # No more than that: the next prompt is what the template writes, where no end stands behind the first answer.
    assert writer.cut(turns) is None
    history = Segment(writer.render(turns[:3], prompt=True), is_answer=False)
    assert writer.prompt_and_answer(turns) == [history, Segment("assistant:  3 \n", True, "<|end_of_text|>")]
    assert writer.cut(turns[:2])[1] == Segment("assistant: 3", True, "<|end_of_text|>")


def test_a_template_that_closes_only_at_the_end_is_still_cut(bytelevel_tokenizer, with_template):
    tokenizer = with_template(bytelevel_tokenizer, CLOSES_AT_THE_END)
    segments = segments_of(load_template("auto", tokenizer), CONVERSATIONS[2], tokenizer)
    assert [segment.text for segment in segments if segment.is_answer] == ["3", " 3 \n"]


def test_what_a_template_writes_around_an_answer_is_learned_with_it(sp_tokenizer, with_template):
    tokenizer = with_template(sp_tokenizer, SPACED)
    template = load_template("auto", tokenizer)
    segments = segments_of(template, (Turn("user", "Hi"), Turn("assistant", "Hello")), tokenizer)
    assert segments == [
        Segment("<s>[INST] Hi [/INST]", is_answer=False),
        Segment(" Hello ", is_answer=True, end="</s>"),
    ]
    assert PromptRenderer(template, tokenizer).lead == " "


def test_a_template_that_rewrites_history_is_not_cut(bytelevel_tokenizer, with_template):
    tokenizer = with_template(bytelevel_tokenizer, REWRITES_HISTORY)
    template = load_template("auto", tokenizer)
    thinking = (Turn("user", "a"), Turn("assistant", "<think>x</think>\nb"), Turn("user", "c"), Turn("assistant", "d"))
    assert len(segments_of(template, thinking, tokenizer)) == 1
    plain = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    assert len(segments_of(template, plain, tokenizer)) == 5


def test_a_file_is_a_template(tmp_path, bytelevel_tokenizer):
    file = tmp_path / "mine.jinja"
    file.write_text('{#- onecard: {"end": "<|im_end|>", "stop": ["\\n\\nYou:"]} -#}\n' + APPEND_ONLY, encoding="utf-8")
    template = load_template(str(file), bytelevel_tokenizer)
    assert (template.name, template.end, template.stop) == ("mine", "<|im_end|>", ("\n\nYou:",))
    assert segments_of(template, CONVERSATIONS[0], bytelevel_tokenizer)[0].text.startswith("<|im_start|>user\nHi")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{% for m in messages %}", "broken at line"),
        ('{#- onecard: {"stop": []} -#}', "first line"),
        ('{#- onecard: {"end": 3} -#}', "must be a text"),
        ("{#- onecard: nonsense -#}", "first line"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_broken_template_files_are_refused(tmp_path, sp_tokenizer, content, told):
    file = tmp_path / "broken.jinja"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=told) as caught:
        load_template(str(file), sp_tokenizer)
    assert caught.value.flag == "--prompt_type"


def test_unknown_names_get_the_nearest_one(sp_tokenizer):
    with pytest.raises(ConfigError, match="did you mean alpaca"):
        load_template("alpacca", sp_tokenizer)
    with pytest.raises(ConfigError, match="cannot read"):
        load_template("nowhere/to/be/found.jinja", sp_tokenizer)


def test_a_template_without_eos_needs_a_tokenizer_with_one(bytelevel_tokenizer, with_template):
    import copy

    tokenizer = copy.deepcopy(bytelevel_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has none"):
        load_template("alpaca", tokenizer)


def test_what_a_template_refuses_is_a_data_error(sp_tokenizer, with_template):
    tokenizer = with_template(
        sp_tokenizer, "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}{{ messages }}"
    )
    with pytest.raises(DataError, match="too many"):
        segments_of(load_template("auto", tokenizer), CONVERSATIONS[2], tokenizer)


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "jinja",
    [
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace({'__call__': 1}) }}",
        "{{ namespace(_Namespace__attrs=1) }}",
        "{{ dict.update(messages[0], {'content': 'other'}) }}",
        "{{ dict.pop(messages[0], 'content') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_reaches_nothing_but_what_it_is_given(jinja):
    messages = [dict(each) for each in MESSAGES]
    with pytest.raises(DataError):
        render_chat(jinja, messages, {}, add_generation_prompt=False)
    assert messages == MESSAGES


def test_a_template_may_use_namespaces_and_dictionaries_of_its_own():
    jinja = (
        "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }} {{ dict(a=2).a }} {{ dict.fromkeys(['b'], 3).b }} {{ namespace(self=4).self }}"
    )
    assert render_chat(jinja, MESSAGES, {}, add_generation_prompt=False) == "2 2 3 4"


def test_the_environment_has_what_hub_templates_use(sp_tokenizer):
    jinja = (
        "{%- for m in messages -%}{%- if loop.index > 1 -%}{%- break -%}{%- endif -%}{% generation %}"
        "{{ m | tojson(indent=1) }}{% endgeneration %}{%- endfor -%}{{ strftime_now('%Y') | length }}"
        "{%- set ns = namespace(a=1) -%}{{ ns.a }}{{ tools is none }}\n"
        "  {% if true %}\n  yes\n  {% endif %}\n\n"
    )
    messages = [{"role": "user", "content": "<你好 & 'co'>"}, {"role": "assistant", "content": "x"}]
    from onecard.data.jinja_chat import render_chat

    theirs = sp_tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    assert render_chat(jinja, messages, special_tokens(sp_tokenizer), False) == theirs
    assert "<你好 & 'co'>" in theirs
