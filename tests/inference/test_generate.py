"""A batch answers as its questions would be answered alone; limits and stops are each row's own."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.config.inference import SamplingOptions
from onecard.data.chat_template import Template, load_template
from onecard.data.encode import encode_prompt
from onecard.data.messages import Turn
from onecard.errors import DataError
from onecard.inference.call import ModelBundle, PromptRow, pad_left, padding_id
from onecard.inference.detokenize import decode
from onecard.inference.generate import answer_rows, prepare
from tests.answers import answers_of

GREEDY = SamplingOptions(max_new_tokens=12)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_a_batch_equals_its_questions_one_by_one(bundle, questions, options) -> None:
    sampling = replace(GREEDY, **options)
    together = answers_of(bundle, questions, sampling)
    assert together == [answers_of(bundle, [question], sampling)[0] for question in questions]
    assert len({answer.text for answer in together}) == len(questions), "the test needs different answers"
    assert len({answer.n_prompt_tokens for answer in together}) >= 5, "the test needs ragged prompts"


def test_a_token_that_the_base_has_no_row_for_is_named(bundle) -> None:
    """Before the model is called: there it would be a bare IndexError, and on a card the end of the process."""
    tokenizer = copy.deepcopy(bundle.tokenizer)
    n_rows = bundle.model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<new_{i}>" for i in range(n_rows - len(tokenizer) + 1)])
    new = tokenizer.convert_ids_to_tokens(n_rows)
    with pytest.raises(DataError, match=rf"the token '{new}' has the id {n_rows}, but the base has rows for"):
        prepare(replace(bundle, tokenizer=tokenizer), [Turn("user", f"say {new}")], GREEDY)


def test_the_model_is_fed_what_training_would_feed_it(bundle, questions) -> None:
    for question, answer in zip(questions, answers_of(bundle, questions, GREEDY), strict=True):
        ids = torch.tensor([encode_prompt(question, bundle.template, bundle.tokenizer)])
        for _ in range(12):  # the plainest greedy search: no cache, no padding, no generate
            ids = torch.cat([ids, bundle.model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = decode(ids[0, -12:].tolist(), bundle.tokenizer)
        assert answer.text == expected.rstrip("\ufffd")


def test_a_sampled_answer_depends_on_the_rows_number_and_not_on_its_neighbours(bundle, questions) -> None:
    sampling = replace(GREEDY, temperature=1.0, top_p=0.95, seed=3)
    rows = [prepare(bundle, question, sampling, number=number) for number, question in enumerate(questions)]
    together = answer_rows(bundle, rows, sampling)
    reordered = answer_rows(bundle, rows[::-1], sampling)[::-1]
    assert together == reordered
    assert together == [answer_rows(bundle, [row], sampling)[0] for row in rows]
    same_question = [prepare(bundle, questions[0], sampling, number=number) for number in range(4)]
    assert len({answer.text for answer in answer_rows(bundle, same_question, sampling)}) == 4
    assert answer_rows(bundle, rows, replace(sampling, seed=4)) != together


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_same_seed_gives_the_same_answers_whatever_was_drawn_before(bundle, questions, beams, temperature) -> None:
    sampling = replace(GREEDY, num_beams=beams, temperature=temperature)
    first = answers_of(bundle, questions[:3], sampling)
    torch.rand(7)
    state = torch.get_rng_state()
    assert answers_of(bundle, questions[:3], sampling) == first
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were used up"


def test_generation_settings_that_came_with_the_base_count_for_nothing(bundle, questions, monkeypatch) -> None:
    expected = answers_of(bundle, questions[:2], GREEDY)
    changed = {"temperature": 0.1, "top_k": 1, "top_p": 0.2, "num_beams": 4, "do_sample": True, "typical_p": 0.1,
               "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "length_penalty": 5.0}  # fmt: skip
    for name, value in changed.items():
        monkeypatch.setattr(bundle.model.generation_config, name, value)
    assert answers_of(bundle, questions[:2], GREEDY) == expected


@dataclass(frozen=True)
class StopsAt(Template):
    """alpaca that ends answers at ids of the test's choice."""

    ids: tuple[int, ...] = ()

    def stop_ids(self, tokenizer: Any) -> list[int]:
        return list(self.ids)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_text_ends_its_own_row_only(bundle, questions, beams) -> None:
    sampling = replace(GREEDY, num_beams=beams)
    before = answers_of(bundle, questions, sampling)
    stop = before[1].text[6:10]
    stopping = ModelBundle(bundle.model, bundle.tokenizer, replace(bundle.template, stop=(stop,)))
    after = answers_of(stopping, questions, sampling)
    assert not any(stop in answer.text for answer in after)
    if beams == 1:  # with beams another answer may become the best one
        assert after[1].finish_reason == "stop"
        assert after[1].text == before[1].text[: before[1].text.index(stop)]
        assert after[1].n_new_tokens < before[1].n_new_tokens
        unaffected = [i for i, answer in enumerate(before) if stop not in answer.text]
        assert len(unaffected) >= 3
        assert [after[i] for i in unaffected] == [before[i] for i in unaffected]


def test_no_step_is_spent_behind_the_end_of_the_last_row(bundle, questions) -> None:
    text = answers_of(bundle, questions[:1], GREEDY)[0].text
    template = replace(bundle.template, stop=(text[4:7],))
    n_steps = 0

    def count(*_: Any) -> None:
        nonlocal n_steps
        n_steps += 1

    hook = bundle.model.register_forward_pre_hook(count)
    try:
        answer = answers_of(ModelBundle(bundle.model, bundle.tokenizer, template), questions[:1], GREEDY)[0]
    finally:
        hook.remove()
    assert answer.finish_reason == "stop"
    assert n_steps == answer.n_new_tokens < GREEDY.max_new_tokens


def test_a_stop_id_ends_its_own_row_only(bundle, questions) -> None:
    before = answers_of(bundle, questions, GREEDY)
    prompt = torch.tensor([encode_prompt(questions[2], bundle.template, bundle.tokenizer)])
    ids = bundle.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    template = StopsAt(bundle.template.name, bundle.template.jinja, ids=(ids[3],))
    after = answers_of(ModelBundle(bundle.model, bundle.tokenizer, template), questions, GREEDY)
    assert (after[2].finish_reason, after[2].n_new_tokens) == ("stop", 1 + ids.index(ids[3]))
    assert before[2].text.startswith(after[2].text)
    assert sum(answer.finish_reason == "length" for answer in after) >= 3


def test_a_long_prompt_is_answered_in_the_room_that_is_left_and_costs_its_neighbours_nothing(bundle, questions) -> None:
    limit = bundle.model.config.max_position_embeddings
    texts = ("fox" + "!" * n for n in range(600))
    text = next(text for text in texts if prepare(bundle, [Turn("user", text)], GREEDY).max_new_tokens <= 4)
    long, short = answers_of(bundle, [[Turn("user", text)], questions[0]], GREEDY)
    assert (long.n_prompt_tokens + long.n_new_tokens, long.finish_reason) == (limit, "length")
    assert short == answers_of(bundle, [questions[0]], GREEDY)[0]


def test_a_prompt_longer_than_the_model_reads_is_refused_with_both_numbers(bundle) -> None:
    with pytest.raises(DataError, match=r"the prompt has 5\d\d tokens, and the model reads at most 512"):
        answers_of(bundle, [[Turn("user", "fox!" * 150)]], GREEDY)


def test_no_questions_no_answers(bundle) -> None:
    assert answers_of(bundle, [], GREEDY) == []


def test_padding_stands_left_and_is_masked() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_padding_is_never_a_stop(bundle, bytelevel_tokenizer) -> None:
    assert padding_id(bundle.tokenizer, [2]) == bundle.tokenizer.bos_token_id
    assert padding_id(bytelevel_tokenizer, [2]) == bytelevel_tokenizer.pad_token_id
    assert padding_id(bytelevel_tokenizer, [0, 1, 2]) == 3


def test_a_byte_level_tokenizer_without_bos_works_as_well(bytelevel_tokenizer, questions, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=448, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15,
    )).eval()  # fmt: skip
    bundle = ModelBundle(model, bytelevel_tokenizer, load_template("chatml", bytelevel_tokenizer))
    together = answers_of(bundle, questions, GREEDY)
    assert together == [answers_of(bundle, [question], GREEDY)[0] for question in questions]


def test_rows_are_plain_values() -> None:
    assert PromptRow([1, 2], 3) == PromptRow([1, 2], 3, 0)
