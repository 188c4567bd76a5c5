"""Answers typed live are the answers of `model.generate`, in every mode; they can be left at any time."""

from __future__ import annotations

import random
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.errors import ConfigError
from onecard.inference.call import GenerateCall, PromptRow, StreamingOptions
from onecard.inference.generate import prepare, stream, stream_rows
from onecard.inference.sampling import generation_config, logits_processors, mode_of, seeded
from onecard.inference.streamer import StreamState
from onecard.model.model_layers import decoder_layers

MODES = {
    "greedy": {},
    "sample": {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1},
    "beam": {"num_beams": 4, "no_repeat_ngram_size": 3},
    "beam-sample": {"num_beams": 3, "temperature": 1.2},
}
EVERY_STEP = StreamingOptions(interval_seconds=0.0)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[StreamState]:
    """What the threads of each answer share, the newest last."""
    made: list[StreamState] = []

    def remembered(*arguments) -> StreamState:
        made.append(StreamState(*arguments))
        return made[-1]

    monkeypatch.setattr("onecard.inference.generate.StreamState", remembered)
    return made


def layers_of(bundle) -> list[torch.nn.Module]:
    return decoder_layers(bundle.model)


def sampling_for(mode: str, **changes) -> SamplingOptions:
    sampling = SamplingOptions(**{"max_new_tokens": 12, **MODES[mode], **changes})
    assert mode_of(sampling) == mode
    return sampling


def plain_ids(bundle, row: PromptRow, sampling: SamplingOptions) -> list[int]:
    """`model.generate` as it is, without any hook of ours."""
    stop_ids = bundle.template.stop_ids(bundle.tokenizer)
    config = generation_config(sampling, stop_ids=stop_ids, pad_id=1, max_new_tokens=row.max_new_tokens)
    with torch.inference_mode(), seeded(sampling, [row.number], torch.device("cpu")):
        sequences = bundle.model.generate(
            input_ids=torch.tensor([row.ids]),
            attention_mask=torch.ones(1, len(row.ids), dtype=torch.long),
            generation_config=config,
            logits_processor=logits_processors(sampling, [row.number]),
        )
    return sequences[0, len(row.ids) :].tolist()


@pytest.mark.parametrize("n_prompts", [6, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_watching_does_not_change_the_ids(bundle, mode: str, n_prompts: int) -> None:
    draw = random.Random(mode)
    n_tokens = 0
    for k in range(n_prompts):
        row = PromptRow([1, *(draw.randrange(3, 440) for _ in range(draw.randint(1, 40)))], 12, number=k)
        sampling = sampling_for(mode, seed=k)
        expected = plain_ids(bundle, row, sampling)
        watch = StreamState(len(row.ids), threading.Event(), float("inf"))
        (got,) = GenerateCall(bundle, [row], sampling, StreamingOptions()).run(watch)
        assert got[: len(expected)] == expected
        n_tokens += len(expected)
    assert n_tokens > 10 * n_prompts


@pytest.mark.parametrize("n_questions", [2, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_the_last_chunk_is_the_whole_answer_and_the_first_ones_come_early(
    bundle, questions, mode: str, n_questions: int
) -> None:
    n_chunks = 0
    for turns in questions[:n_questions]:
        sampling = sampling_for(mode, max_new_tokens=24)
        row = prepare(bundle, turns, sampling)
        call = GenerateCall(bundle, [row], sampling)
        (expected,) = call.answers(call.run())
        chunks = list(stream(bundle, turns, sampling, EVERY_STEP))
        assert (chunks[-1].text, chunks[-1].finish_reason) == (expected.text, expected.reason)
        assert chunks[-1].usage.n_new_tokens == expected.n_tokens
        assert chunks[-1].usage.n_prompt_tokens == len(row.ids)
        assert all(chunk.finish_reason is None for chunk in chunks[:-1])
        if sampling.num_beams == 1:
            for before, after in pairwise(chunks):
                assert after.text.startswith(before.text)
        n_chunks += len(chunks)
    assert n_chunks >= 5 * n_questions


def test_all_beams_are_shown_best_first_and_at_the_end_as_generate_orders_them(bundle, questions) -> None:
    sampling = sampling_for("beam", max_new_tokens=16)
    chunks = list(stream(bundle, questions[1], sampling, StreamingOptions(show_beams=True, interval_seconds=0.0)))
    assert len(chunks) > 3
    for chunk in chunks[1:]:
        assert len(chunk.beams) == 4
        assert chunk.beams[0] == chunk.text
    alone = list(stream(bundle, questions[1], sampling))[-1]
    assert (alone.text, alone.beams) == (chunks[-1].text, ())
    assert len(set(chunks[-1].beams)) > 1


def test_rows_stream_side_by_side_and_equal_themselves_alone(bundle, questions) -> None:
    for mode in ("greedy", "sample"):
        sampling = sampling_for(mode, max_new_tokens=10)
        rows = [prepare(bundle, turns, sampling, number=k) for k, turns in enumerate(questions)]
        together = list(stream_rows(bundle, rows, sampling, EVERY_STEP))[-1]
        alone = [list(stream_rows(bundle, [row], sampling))[-1][0] for row in rows]
        assert [chunk.text for chunk in together] == [chunk.text for chunk in alone]
        assert [chunk.usage for chunk in together] == [chunk.usage for chunk in alone]


def test_stop_texts_of_the_request_end_the_answer(bundle, questions) -> None:
    whole = list(stream(bundle, questions[1], sampling_for("greedy", max_new_tokens=40)))[-1].text
    stop = whole[len(whole) // 2 :][:2]
    chunks = list(stream(bundle, questions[1], sampling_for("greedy", max_new_tokens=40, stop=[stop]), EVERY_STEP))
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].text == whole[: whole.index(stop)]
    assert not any(stop in chunk.text for chunk in chunks)


def test_min_new_tokens_keep_the_end_token_away(bundle, questions) -> None:
    (end,) = bundle.template.stop_ids(bundle.tokenizer)
    wants_to_end = StreamingOptions(logit_bias={end: 30.0})
    for mode in ("greedy", "sample"):
        short = sampling_for(mode, max_new_tokens=40)
        assert list(stream(bundle, questions[0], short, wants_to_end))[-1].usage.n_new_tokens == 1
        long = sampling_for(mode, max_new_tokens=40, min_new_tokens=20)
        assert list(stream(bundle, questions[0], long, wants_to_end))[-1].usage.n_new_tokens == 21


@pytest.mark.parametrize("n_times", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["close", "event"])
@pytest.mark.parametrize("mode", MODES)
def test_leaving_stops_the_work_at_once(bundle, questions, states, mode: str, how: str, n_times: int) -> None:
    sampling = sampling_for(mode, max_new_tokens=400, min_new_tokens=400)
    expected = list(stream(bundle, questions[1], sampling_for(mode)))[-1]
    n_threads = threading.active_count()
    late: list[bool] = []  # of each layer that computes: nobody waited any more when it began
    handles = [layer.register_forward_hook(lambda *_: late.append(states[-1].must_end)) for layer in layers_of(bundle)]
    for k in range(n_times):
        cancel = threading.Event()
        chunks = stream(bundle, questions[k % 6], sampling, EVERY_STEP, cancel)
        next(chunks)
        if how == "close":
            chunks.close()
        else:
            cancel.set()
            last = list(chunks)[-1]
            assert last.finish_reason == "cancelled"
            assert last.usage.n_new_tokens < 400
        assert states[-1].must_end
        assert sum(late) <= 1, "the layer that was computing ends, and no other one begins"
        late.clear()
    for handle in handles:
        handle.remove()
    assert threading.active_count() == n_threads
    assert list(stream(bundle, questions[1], sampling_for(mode)))[-1] == expected, "the model is as it was"


def test_a_long_prompt_is_left_between_two_layers(bundle) -> None:
    layers = layers_of(bundle)
    assert len(layers) == 2
    cancel = threading.Event()
    handle = layers[0].register_forward_hook(lambda *_: cancel.set())  # set while the prompt is being read
    n_reached = []
    other = layers[1].register_forward_hook(lambda *_: n_reached.append(1))
    try:
        (last,) = list(stream(bundle, [Turn("user", "Hi")], sampling_for("greedy"), None, cancel))
    finally:
        handle.remove()
        other.remove()
    assert (last.finish_reason, last.text, n_reached) == ("cancelled", "", [])
    assert not any(layer._forward_pre_hooks for layer in layers), "nothing of ours stays on the model"


def test_out_of_time_is_an_answer_that_was_cut(bundle, questions, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    for module in ("generate", "streamer"):
        monkeypatch.setattr(f"onecard.inference.{module}.time", SimpleNamespace(monotonic=lambda: clock.now))
    sampling = sampling_for("greedy", max_new_tokens=400, min_new_tokens=400)
    for chunk in stream(bundle, questions[1], sampling, StreamingOptions(max_seconds=60.0, interval_seconds=0.0)):
        last = chunk
        if chunk.usage.n_new_tokens:
            clock.now = 60.0
    assert last.finish_reason == "length"
    assert 0 < last.usage.n_new_tokens < 400


def test_what_generate_raises_reaches_the_reader(bundle, questions) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = layers_of(bundle)[1].register_forward_pre_hook(full)
    n_threads = threading.active_count()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            list(stream(bundle, questions[0], sampling_for("greedy")))
    finally:
        handle.remove()
    assert threading.active_count() == n_threads
    assert list(stream(bundle, questions[0], sampling_for("greedy")))[-1].text


def test_logprobs_are_those_of_a_forward_pass_and_of_shown_tokens_only(bundle, questions) -> None:
    for mode in ("greedy", "sample"):
        sampling = sampling_for(mode, repetition_penalty=1.0, max_new_tokens=30)
        row = prepare(bundle, questions[1], sampling)
        chunks = list(stream_rows(bundle, [row], sampling, StreamingOptions(top_logprobs=3, interval_seconds=0.0)))
        assert chunks[-1][0].text == list(stream_rows(bundle, [row], sampling))[-1][0].text
        for (chunk,) in chunks:
            assert len(chunk.logprobs) <= chunk.usage.n_new_tokens
        entries = chunks[-1][0].logprobs
        ids = [entry.token_id for entry in entries]
        assert len(ids) >= 10
        logits = bundle.model(torch.tensor([row.ids + ids])).logits[0, len(row.ids) - 1 : -1].float().log_softmax(-1)
        for k, entry in enumerate(entries):
            assert entry.logprob == pytest.approx(float(logits[k, entry.token_id]), abs=1e-4)
            assert [token_id for token_id, _ in entry.top] == logits[k].topk(3).indices.tolist()


def test_logprobs_of_beams_are_refused(bundle, questions) -> None:
    with pytest.raises(ConfigError, match="num_beams"):
        next(stream(bundle, questions[0], sampling_for("beam"), StreamingOptions(top_logprobs=1)))


def test_a_slow_reader_misses_chunks_and_not_text(bundle, questions) -> None:
    n_tokens = 60
    sampling = sampling_for("greedy", max_new_tokens=n_tokens, min_new_tokens=n_tokens)
    steps = threading.Semaphore(0)
    handle = bundle.model.register_forward_hook(lambda *_: steps.release())
    shown = []
    for chunk in stream(bundle, questions[1], sampling, EVERY_STEP):
        shown.append(chunk)
        for _ in range(min(5, n_tokens - 5 * (len(shown) - 1))):  # reads no further before five more steps are made
            assert steps.acquire(timeout=60)
    handle.remove()
    assert 3 < len(shown) <= n_tokens // 5 + 2
    assert shown[-1] == list(stream(bundle, questions[1], sampling))[-1]
