"""What is learned is what is fed: ids, masks, truncation and what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from onecard.data.built_in_templates import BUILT_IN
from onecard.data.chat_template import Segment, load_template
from onecard.data.encode import (
    IGNORE_INDEX,
    DroppedSample,
    EncodeSettings,
    LabelledSample,
    encode_prompt,
    encode_sample,
)
from onecard.data.messages import Conversation, Document, Turn
from onecard.data.sources import ReadReport, read
from onecard.data.tokenization import SegmentTokenizer, segment_tokenizer, tokenizer_fingerprint
from onecard.errors import DataError
from tests.data.conftest import APPEND_ONLY, CLOSES_AT_THE_END, REWRITES_HISTORY, SPACED

SAMPLE = Path(__file__).resolve().parents[2] / "sample"
TOKENIZERS = (
    "sp_tokenizer",
    "sp_legacy_tokenizer",
    "bytelevel_tokenizer",
    "bytelevel_bos_tokenizer",
    "plain_tokenizer",
)
ROOMY = EncodeSettings(cutoff_len=100_000)
# Characters that no tokenizer here changes: U+2581 is SentencePiece's own sign for a space.
characters = st.one_of(
    st.sampled_from(" \n\t你好吗🙂👩‍👩‍👧é{}%<>'\"\\ab1"), st.characters(codec="utf-8", exclude_characters="▁")
)
text = st.text(characters, max_size=16)


@st.composite
def conversations(draw, max_answers: int = 3) -> Conversation:
    system = [Turn("system", draw(text))] if draw(st.booleans()) else []
    pairs = [
        turn
        for _ in range(draw(st.integers(1, max_answers)))
        for turn in (Turn("user", draw(text), draw(st.one_of(st.just(""), text))), Turn("assistant", draw(text)))
    ]
    return Conversation((*system, *pairs), "drawn:1")


FEW, MANY = 6, 25
N_EXAMPLES = pytest.mark.parametrize("n_examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def drawn(n_examples: int, *case: str) -> Callable[[Any], Any]:
    """So many examples, others for each case and the same each time."""
    chosen = settings(
        max_examples=n_examples, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    return lambda test: seed(" ".join(case))(chosen(test))


def encode(conversation, template, tokenizer, settings=ROOMY) -> list[LabelledSample]:
    result = encode_sample(conversation, template, tokenizer, settings)
    assert not isinstance(result, DroppedSample), result.reason
    return result


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def spans(sample: LabelledSample) -> list[tuple[int, int]]:
    """[-, -, 7, 8, -, 9] -> [(2, 4), (5, 6)]"""
    learned = [label != IGNORE_INDEX for label in sample.labels]
    sides = [False, *learned, False]
    edges = [i for i in range(len(sides) - 1) if sides[i] != sides[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_equality(conversation: Conversation, template, tokenizer) -> int:
    """Ids up to each answer are generation's, learned ids are the answers and their ends. Returns answers visited."""
    end = template.end_text(tokenizer)
    ends = [k for k, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    samples = encode(conversation, template, tokenizer)
    found = [(sample, start, stop) for sample in samples for start, stop in spans(sample)]
    assert len(found) == len(ends)
    for (sample, start, stop), k in zip(found, ends, strict=True):
        assert sample.input_ids[:start] == encode_prompt(conversation.turns[:k], template, tokenizer)
        assert sample.labels[start:stop] == sample.input_ids[start:stop]
        assert learned_text(tokenizer, sample, start, stop) == conversation.turns[k].content + end
    for sample in samples:
        if tokenizer.bos_token:
            assert sample.input_ids[0] == tokenizer.bos_token_id
            assert sample.input_ids.count(tokenizer.bos_token_id) == 1
    return len(ends)


def learned_text(tokenizer, sample: LabelledSample, start: int, stop: int) -> str:
    """What ids[start:stop] add to a text; alone they would lose their first space with SentencePiece."""
    anchor = tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
    return decode(tokenizer, [*anchor, *sample.input_ids[start:stop]]).removeprefix("a")


@N_EXAMPLES
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("which", TOKENIZERS)
def test_what_is_learned_is_what_is_fed(request, which, name, n_examples):
    tokenizer = request.getfixturevalue(which)
    template = load_template(name, tokenizer)

    @drawn(n_examples, which, name)
    @given(conversation=conversations())
    @example(Conversation((Turn("user", " "), Turn("assistant", " ")), "spaces:1"))
    @example(
        Conversation((Turn("user", "a"), Turn("assistant", "  b \n"), Turn("user", ""), Turn("assistant", "")), "e:1")
    )
    def check(conversation):
        check_equality(_with_questions(conversation), template, tokenizer)

    check()


@pytest.fixture(scope="module")
def samples_of_files() -> list[list[Conversation | Document]]:
    """The first 12 of each file."""
    files = sorted(
        path
        for path in SAMPLE.rglob("*")
        if path.suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt") and path.parent.name != "tiny-llama"
    )
    return [list(islice(read(str(file), report=ReadReport()), 12)) for file in files]


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("which", TOKENIZERS)
def test_every_sample_file(request, which, name, samples_of_files):
    tokenizer = request.getfixturevalue(which)
    template = load_template(name, tokenizer)
    n_answers = n_documents = 0
    for sample in chain.from_iterable(samples_of_files):
        if isinstance(sample, Document):
            n_documents += len(encode(sample, template, tokenizer))
        else:
            n_answers += check_equality(sample, template, tokenizer)
    assert len(samples_of_files) == 15
    assert n_answers > 50
    assert n_documents > 3


@pytest.mark.parametrize("jinja", [APPEND_ONLY, CLOSES_AT_THE_END, REWRITES_HISTORY])
def test_a_tokenizers_own_template(bytelevel_tokenizer, with_template, jinja):
    tokenizer = with_template(bytelevel_tokenizer, jinja)
    template = load_template("auto", tokenizer)

    @drawn(MANY)
    @given(conversation=conversations())
    def check(conversation):
        if jinja is APPEND_ONLY:  # it trims what it is given
            turns = tuple(Turn(turn.role, turn.content.strip(), turn.input) for turn in conversation.turns)
            conversation = Conversation(turns, "trimmed:1")
        check_equality(conversation, template, tokenizer)

    check()


def test_the_space_that_sentencepiece_writes_itself_is_not_doubled(sp_tokenizer, with_template):
    tokenizer = with_template(sp_tokenizer, SPACED)
    template = load_template("auto", tokenizer)
    sample = encode(Conversation((Turn("user", "Hi"), Turn("assistant", "the fox")), "x:1"), template, tokenizer)[0]
    ((start, stop),) = spans(sample)
    prompt = encode_prompt((Turn("user", "Hi"),), template, tokenizer)
    assert prompt == tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
    assert sample.input_ids[:start] == prompt
    assert tokenizer.convert_ids_to_tokens(sample.input_ids[start:stop])[0].startswith("▁")
    assert decode(tokenizer, sample.input_ids[start:stop]) == "the fox </s>"


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("which", ("sp_tokenizer", "bytelevel_bos_tokenizer"))
def test_a_first_prompt_is_what_other_programs_make_of_the_template(request, which, name):
    tokenizer = request.getfixturevalue(which)
    template = load_template(name, tokenizer)
    theirs = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "你好 fox"}],
        chat_template=template.jinja,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert encode_prompt((Turn("system", "Be brief"), Turn("user", "你好 fox")), template, tokenizer) == theirs


def test_a_template_that_rewrites_history_gives_one_sample_per_answer(bytelevel_tokenizer, with_template):
    tokenizer = with_template(bytelevel_tokenizer, REWRITES_HISTORY)
    template = load_template("auto", tokenizer)
    turns = (
        Turn("user", "a"),
        Turn("assistant", "<think>x</think>\nb"),
        Turn("user", "c"),
        Turn("assistant", "d"),
        Turn("user", "e"),
        Turn("assistant", "f"),
    )
    samples = encode(Conversation(turns, "x:1"), template, tokenizer)
    assert [len(spans(sample)) for sample in samples] == [1, 1, 1]
    assert "x</think>" in decode(tokenizer, samples[0].input_ids)
    assert "x</think>" not in decode(tokenizer, samples[1].input_ids)
    assert check_equality(Conversation(turns, "x:1"), template, tokenizer) == 3


@N_EXAMPLES
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("which", TOKENIZERS)
def test_truncation_keeps_the_equality_and_never_teaches_an_early_stop(request, which, name, n_examples):
    tokenizer = request.getfixturevalue(which)
    template = load_template(name, tokenizer)

    @drawn(n_examples, which, name)
    @given(conversation=conversations(), cutoff_len=st.integers(8, 120))
    def check(conversation, cutoff_len):
        check_truncation(_with_questions(conversation), template, tokenizer, cutoff_len)

    check()


def check_truncation(conversation: Conversation, template, tokenizer, cutoff_len: int) -> None:
    end = template.end_text(tokenizer)
    whole = encode_sample(conversation, template, tokenizer, ROOMY)
    result = encode_sample(conversation, template, tokenizer, EncodeSettings(cutoff_len))
    if isinstance(whole, DroppedSample):
        return
    if isinstance(result, DroppedSample):
        prompt = encode_prompt(_last_exchange(conversation.turns)[:-1], template, tokenizer)
        assert len(prompt) >= cutoff_len or not conversation.turns[-1].content
        return
    if len(whole[0].input_ids) <= cutoff_len:
        assert result == whole
        return
    assert [sample.cut for sample in result] == [True]
    sample = result[0]
    assert len(sample.input_ids) <= cutoff_len
    kept = _kept_turns(sample, conversation.turns, template, tokenizer)
    answers = [turn.content for turn in kept if turn.role == "assistant"]
    pieces = [learned_text(tokenizer, sample, start, stop) for start, stop in spans(sample)]
    assert len(pieces) == len(answers)
    if pieces[-1] == answers[-1] + end:
        assert pieces == [answer + end for answer in answers]
        return
    # A cut answer: a beginning of it (perhaps of a character, too), no end token, and it stands alone.
    assert len(pieces) == 1
    assert answers[-1].startswith(pieces[0].rstrip("�"))
    assert len(sample.input_ids) == cutoff_len or pieces[0] == answers[-1]
    assert sample.input_ids[-1] not in template.stop_ids(tokenizer)


def _with_questions(conversation: Conversation) -> Conversation:
    """No question empty: with the template `none` nothing would stand between two answers."""
    turns = tuple(Turn(t.role, t.content or "?", t.input) if t.role == "user" else t for t in conversation.turns)
    return Conversation(turns, conversation.record)


def _last_exchange(turns):
    head = turns[:1] if turns[0].role == "system" else ()
    return (*head, *turns[-2:])


def _kept_turns(sample, turns, template, tokenizer):
    """The system turn and as many last exchanges as the sample's prompt shows, the oldest gone first."""
    head = turns[:1] if turns[0].role == "system" else ()
    (first, _), *_ = spans(sample)
    for start in range(len(head) + 2, len(turns), 2):
        kept = (*head, *turns[start:])
        if sample.input_ids[:first] == encode_prompt(kept[: len(head) + 1], template, tokenizer) and (
            2 * len(spans(sample)) == len(turns) - start
        ):
            return kept
    if 2 * len(spans(sample)) == len(turns) - len(head) == 2:
        return turns
    raise AssertionError("the sample is not the end of the conversation")


def test_whole_oldest_exchanges_go_first_and_the_system_turn_stays(bytelevel_tokenizer):
    template = load_template("chatml", bytelevel_tokenizer)
    exchanges = [turn for i in range(5) for turn in (Turn("user", f"q{i}"), Turn("assistant", f"a{i}"))]
    conversation = Conversation((Turn("system", "S"), *exchanges), "x:1")
    whole = encode(conversation, template, bytelevel_tokenizer)[0]
    n_visited = 0
    for cutoff_len in range(len(whole.input_ids), 60, -1):
        sample = encode(conversation, template, bytelevel_tokenizer, EncodeSettings(cutoff_len))[0]
        shown = decode(bytelevel_tokenizer, sample.input_ids)
        assert shown.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq")
        assert shown.endswith("a4<|im_end|>")
        n_gone = 5 - shown.count("<|im_start|>user")
        if n_gone:
            one_more = Conversation((conversation.turns[0], *exchanges[2 * n_gone - 2 :]), "x:1")
            assert len(encode(one_more, template, bytelevel_tokenizer)[0].input_ids) > cutoff_len
        assert [f"q{i}" in shown for i in range(5)] == [i >= n_gone for i in range(5)]
        n_visited += 1
    assert n_visited > 20
    assert sample.cut
    assert n_gone >= 2


def test_the_end_spelt_by_ordinary_tokens_is_cut_off_with_a_cut_answer(sp_tokenizer):
    template = load_template("chatml", sp_tokenizer)
    conversation = Conversation((Turn("user", "q"), Turn("assistant", "the lazy dog " * 3)), "x:1")
    whole = encode(conversation, template, sp_tokenizer)[0]
    ((start, _),) = spans(whole)
    assert decode(sp_tokenizer, whole.input_ids[start:]).endswith("dog <|im_end|>")
    n_visited = 0
    for cutoff_len in range(start + 1, len(whole.input_ids)):
        sample = encode(conversation, template, sp_tokenizer, EncodeSettings(cutoff_len))[0]
        assert conversation.turns[1].content.startswith(decode(sp_tokenizer, sample.input_ids[start:]))
        n_visited += 1
    assert n_visited > 10


def test_nothing_left_to_learn_is_dropped_with_the_reason(bytelevel_tokenizer):
    template = load_template("chatml", bytelevel_tokenizer)
    conversation = Conversation((Turn("user", "long " * 50), Turn("assistant", "a")), "x:1")
    result = encode_sample(conversation, template, bytelevel_tokenizer, EncodeSettings(32))
    assert isinstance(result, DroppedSample)
    assert not result.bad
    assert "all 32 tokens" in result.reason and "--cutoff_len" in result.reason


@pytest.mark.parametrize("which", TOKENIZERS)
def test_train_on(request, which):
    tokenizer = request.getfixturevalue(which)
    template = load_template("vicuna-chat", tokenizer)
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    conversation = Conversation(turns, "x:1")
    every = encode(conversation, template, tokenizer, EncodeSettings(1000, "everything"))[0]
    last = encode(conversation, template, tokenizer, EncodeSettings(1000, "last"))[0]
    both = encode(conversation, template, tokenizer, EncodeSettings(1000, "all"))[0]
    assert every.input_ids == last.input_ids == both.input_ids
    assert every.labels[1:] == every.input_ids[1:]
    assert every.labels[0] == IGNORE_INDEX
    assert spans(last) == spans(both)[-1:]
    assert len(spans(both)) == 2


@pytest.mark.parametrize("which", TOKENIZERS)
def test_a_long_document_is_learned_whole_in_pieces(request, which):
    tokenizer = request.getfixturevalue(which)
    template = load_template("none", tokenizer)
    document = Document(" The quick brown 狐狸 jumps.\n" * 9, "x:1")
    whole = encode(document, template, tokenizer)[0]
    n_special = (tokenizer.bos_token is not None) + 1
    n_visited = 0
    for cutoff_len in range(8, 40):
        pieces = encode(document, template, tokenizer, EncodeSettings(cutoff_len))
        assert all(len(piece.input_ids) <= cutoff_len for piece in pieces)
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
        assert all(piece.input_ids[: len(bos)] == bos for piece in pieces)
        joined = [token for piece in pieces for token in piece.input_ids[len(bos) :]]
        assert joined[: len(whole.input_ids) - n_special] == whole.input_ids[len(bos) : -1]
        assert all(piece.labels[1:] == piece.input_ids[1:] and piece.labels[0] == IGNORE_INDEX for piece in pieces)
        stops = [piece.input_ids.count(tokenizer.eos_token_id) for piece in pieces]
        assert sum(stops[:-1]) == 0
        assert len(pieces[-1].input_ids) > len(bos) + stops[-1]
        n_visited += 1
    assert n_visited == 32
    assert whole.input_ids == [
        *tokenizer([document.text], add_special_tokens=True)["input_ids"][0],
        tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ((Turn("user", "q"), Turn("assistant", "a<|im_end|>b")), "'<|im_end|>'"),
        ((Turn("user", "q<|endoftext|>"), Turn("assistant", "a")), "'<|endoftext|>'"),
        ((Turn("user", "q", "x<|im_start|>"), Turn("assistant", "a")), "'<|im_start|>'"),
        ((Turn("system", "<|im_end|>"), Turn("user", "q"), Turn("assistant", "a")), "'<|im_end|>'"),
        ((Turn("user", "q"),), "does not end with an answer"),
        ((), "does not end with an answer"),
    ],
)
def test_records_that_would_teach_a_false_stop_are_bad(bytelevel_tokenizer, turns, told):
    template = load_template("chatml", bytelevel_tokenizer)
    result = encode_sample(Conversation(turns, "x.json:7"), template, bytelevel_tokenizer, ROOMY)
    assert isinstance(result, DroppedSample)
    assert result.bad
    assert told in result.reason
    with pytest.raises(DataError, match=r"x\.json:7"):
        encode_sample(Conversation(turns, "x.json:7"), template, bytelevel_tokenizer, EncodeSettings(1000, strict=True))


def test_an_end_of_text_inside_an_answer_is_bad_also_where_no_token_spells_it(sp_tokenizer):
    spelt = Conversation((Turn("user", "q"), Turn("assistant", "a<|im_end|>")), "x:1")
    assert encode_sample(spelt, load_template("chatml", sp_tokenizer), sp_tokenizer, ROOMY).bad
    html = Conversation((Turn("user", "q"), Turn("assistant", "<s>struck</s>")), "x:1")
    assert encode_sample(html, load_template("alpaca", sp_tokenizer), sp_tokenizer, ROOMY).bad
    stop = Conversation((Turn("user", "q"), Turn("assistant", "a\n### Instruction:\nb")), "x:1")
    assert encode_sample(stop, load_template("alpaca", sp_tokenizer), sp_tokenizer, ROOMY).bad
    question = Conversation((Turn("user", "a\n### Instruction:\nb"), Turn("assistant", "a")), "x:1")
    assert len(encode(question, load_template("alpaca", sp_tokenizer), sp_tokenizer)) == 1


def test_messages_that_the_template_refuses_are_bad_records(sp_tokenizer, with_template):
    tokenizer = with_template(
        sp_tokenizer, "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}"
    )
    template = load_template("auto", tokenizer)
    result = encode_sample(
        Conversation((Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")), "x:1"),
        template,
        tokenizer,
        ROOMY,
    )
    assert isinstance(result, DroppedSample)
    assert "no system role" in result.reason


@pytest.mark.parametrize("which", TOKENIZERS)
@drawn(MANY)
@given(texts=st.lists(text, min_size=1, max_size=4))
def test_the_fast_path_gives_the_tokenizers_own_ids(request, which, texts):
    tokenizer = request.getfixturevalue(which)
    template = load_template("chatml", tokenizer)
    fast, plain = segment_tokenizer(template, tokenizer), SegmentTokenizer(template, tokenizer)
    assert (type(fast) is type(plain)) == (which == "plain_tokenizer")
    segments = [
        Segment(text, is_answer=True, end=template.end_text(tokenizer) * (k % 2)) for k, text in enumerate(texts)
    ]
    assert fast.ids([segments, segments[1:]]) == plain.ids([segments, segments[1:]])
    assert [fast.text_ids(text) for text in texts] == [plain.text_ids(text) for text in texts]


def test_padding_left_on_by_somebody_else_changes_nothing(bytelevel_tokenizer):
    template = load_template("chatml", bytelevel_tokenizer)
    before = tokenizer_fingerprint(bytelevel_tokenizer)
    bytelevel_tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(bytelevel_tokenizer) == before
    tokens = segment_tokenizer(template, bytelevel_tokenizer)
    assert [len(tokens.text_ids(text)) > 3 for text in ("a", "a b c d e f g")] == [False, True]


def test_tokenizers_that_differ_have_other_fingerprints(sp_tokenizer, sp_legacy_tokenizer, bytelevel_tokenizer):
    assert len({tokenizer_fingerprint(t) for t in (sp_tokenizer, sp_legacy_tokenizer, bytelevel_tokenizer)}) == 3
