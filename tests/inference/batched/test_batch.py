"""Answers that are computed at once: the same as alone, fair to each other, and none lost when memory is full."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from onecard.config.inference import LimitOptions, ParallelOptions, SamplingOptions
from onecard.errors import ModelError
from onecard.inference.batched.batch import check_batched, open_batch
from onecard.inference.call import ModelBundle
from onecard.inference.engine import InferenceEngine
from onecard.inference.grammar import GrammarError, json_grammar, regex_grammar
from onecard.inference.out_of_memory import OutOfMemory
from onecard.inference.queue import QueueFull
from onecard.model.attention import avoid_flash
from tests.inference.batched.conftest import (
    LONG,
    Asked,
    answers,
    batch_of,
    mixes,
    open_parallel,
    request_of,
    settle,
)
from tests.inference.test_grammar import TOO_WIDE
from tests.serve.api.serving import wait_until

# Each option with a value that changes the answer, and the way that such a request takes.
OPTIONS = {
    "max_new_tokens": (5, "batched"),
    "min_new_tokens": (24, "batched"),
    "temperature": (1.5, "batched"),
    "top_p": (0.3, "batched"),
    "top_k": (2, "batched"),
    "num_beams": (3, "serial"),
    "repetition_penalty": (3.0, "batched"),
    "no_repeat_ngram_size": (1, "batched"),
    "stop": (["R", "i"], "batched"),
    "seed": (7, "batched"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_answer_on_both_paths_alike(
    name: str, engine: InferenceEngine, alone: InferenceEngine
) -> None:
    value, path = OPTIONS[name]
    samples = {"temperature": 1.2} if name in ("top_p", "top_k", "seed") else {}
    end = {"logit_bias": {2: 20.0}} if name == "min_new_tokens" else {}  # an end that comes too early
    usual = SamplingOptions(max_new_tokens=24, **samples)
    changed = SamplingOptions(**{"max_new_tokens": 24, **samples, name: value})
    found = answers(engine, request_of(sampling=changed, **end))
    assert found == answers(alone, request_of(sampling=changed, **end))
    assert found[0].path == path
    assert found[0].text != answers(engine, request_of(sampling=usual, **end))[0].text
    assert set(OPTIONS) == set(vars(usual))


def test_several_answers_biases_and_log_probabilities(engine: InferenceEngine, alone: InferenceEngine) -> None:
    wild = SamplingOptions(max_new_tokens=8, temperature=1.5)
    request = request_of(sampling=wild, n=3, number=4, logit_bias={9: 3.0})
    several = answers(engine, request)
    assert several == answers(alone, request) and len({chunk.text for chunk in several}) == 3
    request = request_of(sampling=wild, top_logprobs=2)
    for own, other in zip(answers(engine, request)[0].logprobs, answers(alone, request)[0].logprobs, strict=True):
        assert own.token_id == other.token_id
        assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in own.top] == [token for token, _ in other.top]


def test_grammars_hold_on_both_paths_alike(engine: InferenceEngine, alone: InferenceEngine) -> None:
    """Answers of one request, and one whose grammar takes too much work, which ends alone."""
    wild, form = SamplingOptions(max_new_tokens=60, temperature=1.5), regex_grammar("([ab]|你){9}[0-9]!", "f")
    request = request_of(sampling=wild, n=3, grammar=form)
    beside = Asked(engine, request_of(sampling=SamplingOptions(max_new_tokens=60)))
    lost = Asked(engine, request_of(sampling=wild, grammar=json_grammar(TOO_WIDE, "g")))
    found = answers(engine, request)
    assert found == answers(alone, request)
    assert all(re.fullmatch("([ab]|你){9}[0-9]!", chunk.text) and chunk.path == "batched" for chunk in found)
    with pytest.raises(GrammarError, match=r"^g: .*make it simpler"):
        lost.result()
    assert beside.result() == answers(alone, request_of(sampling=SamplingOptions(max_new_tokens=60)))


def test_streamed_chunks_grow(engine: InferenceEngine) -> None:
    chunks = [chunks[0] for chunks in engine.stream(request_of(sampling=SamplingOptions(max_new_tokens=100)))]
    assert all(later.text.startswith(earlier.text) for earlier, later in itertools.pairwise(chunks))
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"


def test_greedy_answers_are_those_of_each_request_alone(engine: InferenceEngine, alone: InferenceEngine) -> None:
    assert mixes(engine, alone, 8).total() > 20


@pytest.mark.slow
def test_greedy_answers_of_many_mixes(engine: InferenceEngine, alone: InferenceEngine) -> None:
    assert mixes(engine, alone, 200).total() > 500


def test_a_newcomer_waits_for_two_steps(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [Asked(engine, request_of("fox " * k, sampling=LONG)) for k in range(1, 9)]
    assert all(one.began.wait(30) for one in long)
    manager, batch, steps = batch_of(engine)._manager, batch_of(engine), []
    submit, take = batch._submit, batch.take

    def noted_submit(row) -> None:
        steps.append((row.name, manager.current_batch))
        submit(row)

    def noted_take(name, generated, *, ended) -> None:
        if steps and name == steps[0][0]:
            steps.append((name, manager.current_batch))
        take(name, generated, ended=ended)

    monkeypatch.setattr(batch, "_submit", noted_submit)
    monkeypatch.setattr(batch, "take", noted_take)
    answers(engine, request_of("What is the capital of France?"))
    assert steps[1][1] - steps[0][1] <= 2  # the one that runs, and that of its own prompt
    assert all(one.is_alive() for one in long)
    for one in long:
        one.cancel.set()
    assert {one.result()[0].finish_reason for one in long} == {"cancelled"}
    settle(engine)


def test_beams_and_the_batch_take_turns(engine: InferenceEngine) -> None:
    long = Asked(engine, request_of(sampling=LONG))
    assert long.began.wait(30)
    beams = Asked(engine, request_of(sampling=SamplingOptions(max_new_tokens=400, min_new_tokens=400, num_beams=2)))
    assert beams.began.wait(30) and long.is_alive()
    assert answers(engine, request_of())[0].path == "batched" and beams.is_alive()
    long.cancel.set(), beams.cancel.set()
    assert long.result()[0].finish_reason == beams.result()[0].finish_reason == "cancelled"
    counts = engine.paths.counts()
    assert counts["batched"] >= 2 and counts["serial"] >= 1


def test_more_wait_and_too_many_are_sent_away(lively_base: Path) -> None:
    engine = open_parallel(lively_base, 2, LimitOptions(max_queue=1))
    running = [Asked(engine, request_of(sampling=LONG)) for _ in range(2)]
    assert all(one.began.wait(30) for one in running)
    waiting = engine.stream(request_of())
    assert next(waiting)[0].place == 1 and engine.n_waiting == 1
    with pytest.raises(QueueFull):
        answers(engine, request_of())
    running[0].cancel.set()
    assert list(waiting)[-1][0].finish_reason
    engine.close()
    assert running[1].result()[0].finish_reason == "cancelled"
    with pytest.raises(ModelError):
        answers(engine, request_of())


@pytest.fixture
def small(lively_base: Path):
    engine = open_parallel(lively_base, 8)
    yield engine
    engine.close()


def failing_above(engine: InferenceEngine, n_tokens: int, error: Exception):
    """Let a step of more tokens fail."""

    def check(_module, _inputs, options) -> None:
        if options.get("input_ids") is not None and options["input_ids"].shape[1] > n_tokens:
            raise error

    return engine._adapters.model.register_forward_pre_hook(check, with_kwargs=True)


def test_full_memory_makes_fewer_run_at_once_and_loses_nothing(small: InferenceEngine, alone: InferenceEngine) -> None:
    sampling = SamplingOptions(max_new_tokens=30, min_new_tokens=30, temperature=1.3)
    requests = [request_of("fox " * k, sampling=sampling, top_logprobs=0, number=k) for k in range(6)]
    hook = failing_above(small, 130, torch.OutOfMemoryError("full"))
    try:
        with batch_of(small).pause():  # so that all are there at its next step
            asked = [Asked(small, request) for request in requests]
            wait_until(lambda: batch_of(small).n_running == len(requests), 60)
        found = [one.result()[0] for one in asked]
    finally:
        hook.remove()
    for one, request in zip(found, requests, strict=True):
        expected = answers(alone, request)[0]
        assert (one.text, one.usage) == (expected.text, expected.usage)
        assert [token.token_id for token in one.logprobs] == [token.token_id for token in expected.logprobs]
    assert batch_of(small).size.step_tokens < 512
    settle(small)


@pytest.mark.slow
def test_an_answer_that_does_not_fit_is_told_so_and_the_next_one_works(small: InferenceEngine) -> None:
    hook = failing_above(small, 0, torch.OutOfMemoryError("full"))
    try:
        with pytest.raises(OutOfMemory, match="does not fit into memory"):
            answers(small, request_of())
    finally:
        hook.remove()
    assert batch_of(small).size.n_parallel == 1
    assert answers(small, request_of())[0].text


@pytest.mark.slow
def test_another_fault_ends_what_runs_and_the_next_one_works(small: InferenceEngine) -> None:
    hook = failing_above(small, 0, ValueError("a broken kernel"))
    try:
        with pytest.raises(ModelError, match="a broken kernel"):
            answers(small, request_of())
    finally:
        hook.remove()
    assert answers(small, request_of())[0].path == "batched"


@pytest.mark.slow
def test_a_cache_that_is_too_small_for_all_serves_them_one_after_another(lively_base: Path, alone) -> None:
    engine = open_parallel(lively_base, 4, kv_cache_gib=300 * 512 / 2**30)
    assert batch_of(engine).size.n_tokens < 400
    sampling = SamplingOptions(max_new_tokens=120, min_new_tokens=120)
    requests = [request_of("fox " * k, sampling=sampling) for k in range(1, 5)]
    asked = [Asked(engine, request) for request in requests]
    assert [one.result() for one in asked] == [answers(alone, request) for request in requests]
    assert answers(engine, request_of(sampling=LONG))[0].path == "serial"  # it would not fit
    settle(engine)
    engine.close()


def test_the_next_turn_reads_only_what_is_new(engine: InferenceEngine) -> None:
    question = "What is the capital of France? " * 4
    answers(engine, request_of(question))
    usage = answers(engine, request_of(question + "And of Spain?"))[0].usage
    assert usage.n_cached_tokens > usage.n_prompt_tokens / 2


def test_a_model_that_cannot_is_told_by_name(bundle: ModelBundle, lively_base: Path, capsys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle.model.config, "_attn_implementation_internal", "eager")
        with pytest.raises(ModelError, match="eager"):
            check_batched(bundle.model)
    check_batched(bundle.model)


def test_cards_without_flash_attention(lively_base: Path, alone: InferenceEngine) -> None:
    with_own = open_parallel(lively_base, 1)
    model = with_own._adapters.model
    assert avoid_flash(model)
    try:
        with_own._batch = open_batch(with_own._adapters, ParallelOptions(max_parallel=2), 0.0)
        request = request_of("Write a fox " * 9, sampling=SamplingOptions(max_new_tokens=30))
        found = answers(with_own, request)
        assert found == answers(alone, request) and found[0].path == "batched"
    finally:
        with_own.close()
        AttentionInterface.register("sdpa", sdpa_attention_forward)
