"""The shared model: limits, turns, adapters, and a way back from every fault."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, SamplingOptions
from onecard.data.messages import Turn
from onecard.errors import ConfigError, DataError, ModelError
from onecard.inference.call import Chunk
from onecard.inference.engine import (
    ContextTooLong,
    GenerationRequest,
    InferenceEngine,
    LimitExceeded,
    OutOfMemory,
    QueueFull,
    open_engine,
)
from onecard.inference.generate import stream
from onecard.model.model_layers import decoder_layers

ASK = (Turn("user", "What is the capital of France?"),)
BRIEF = SamplingOptions(max_new_tokens=8)
LONG = SamplingOptions(max_new_tokens=400, min_new_tokens=400)


@pytest.fixture(scope="module")
def options(lively_base: Path) -> ModelOptions:
    return ModelOptions(model_path=str(lively_base), bits=32, device="cpu", gradient_checkpointing=False)


@pytest.fixture(scope="module")
def engine(options: ModelOptions) -> InferenceEngine:
    return open_engine(options, InferenceOptions(prompt_type="alpaca"), LimitOptions(max_queue=2, max_beams=4))


def answer(engine: InferenceEngine, **request) -> Chunk:
    return list(engine.stream(GenerationRequest(**{"turns": ASK, "sampling": BRIEF, **request})))[-1][0]


def test_an_answer_is_that_of_the_generator(engine: InferenceEngine, bundle) -> None:
    assert answer(engine) == list(stream(bundle, ASK, BRIEF))[-1]
    assert engine.count_tokens(ASK) == answer(engine).usage.n_prompt_tokens
    assert engine.context_limit == 512


def test_several_answers_differ_and_the_first_is_the_one_alone(engine: InferenceEngine) -> None:
    sampling = SamplingOptions(max_new_tokens=10, temperature=1.5)
    several = [chunk.text for chunk in list(engine.stream(GenerationRequest(ASK, sampling=sampling, n=3)))[-1]]
    assert len(set(several)) == 3
    assert answer(engine, sampling=sampling).text == several[0]
    assert answer(engine, sampling=sampling, number=1).text == several[1]


@pytest.mark.parametrize(
    ("request_changes", "flag"),
    [
        ({"sampling": SamplingOptions(max_new_tokens=5000)}, "--max_new_tokens"),
        ({"sampling": SamplingOptions(num_beams=5)}, "--num_beams"),
        ({"sampling": SamplingOptions(temperature=-1)}, "--temperature"),
        ({"n": 9}, "--n"),
        ({"n": 0}, "--n"),
        ({"top_logprobs": 21}, "--top_logprobs"),
        ({"top_logprobs": 1, "sampling": SamplingOptions(num_beams=2)}, "--num_beams"),
    ],
)
def test_limits_are_refused_by_name(engine: InferenceEngine, request_changes: dict, flag: str) -> None:
    with pytest.raises(LimitExceeded) as refused:
        answer(engine, **request_changes)
    assert refused.value.flag == flag
    assert answer(engine).text


def test_prompts_that_cannot_be_asked(engine: InferenceEngine) -> None:
    with pytest.raises(ContextTooLong) as refused:
        answer(engine, turns=(Turn("user", "fox!" * 300),))
    assert refused.value.limit == 512
    for turns in ((), (Turn("user", "a"), Turn("assistant", "b"))):
        with pytest.raises(DataError, match="last message"):
            answer(engine, turns=turns)
    for ids in ((), (1, 448), (-1,)):
        with pytest.raises(DataError):
            answer(engine, turns=(), prompt_ids=ids)
    with pytest.raises(ConfigError, match="no adapter is called 'livly'"):
        answer(engine, adapter="livly")
    with pytest.raises(ConfigError, match="--prompt_type"):
        answer(engine, prompt_type="/etc/passwd")
    assert answer(engine, turns=(), prompt_ids=(1, 5, 6)).usage.n_prompt_tokens == 3


def test_another_template_for_one_request(engine: InferenceEngine) -> None:
    assert engine.count_tokens(ASK, prompt_type="chatml") != engine.count_tokens(ASK)
    assert answer(engine, prompt_type="chatml").text != answer(engine).text


def test_who_waits_is_told_the_place_and_a_full_line_sends_away(engine: InferenceEngine) -> None:
    first = engine.stream(GenerationRequest(ASK, sampling=LONG))
    next(first)
    places: list[int] = []

    def ask() -> None:
        places.extend(chunks[0].place for chunks in engine.stream(GenerationRequest(ASK, sampling=BRIEF)))

    others = [threading.Thread(target=ask) for _ in range(2)]
    for thread in others:
        thread.start()
    while engine.n_waiting < 2:
        time.sleep(0.01)
    with pytest.raises(QueueFull):
        answer(engine)
    time.sleep(0.6)
    first.close()
    for thread in others:
        thread.join(timeout=20)
    assert {1, 2, 0} <= set(places)
    assert answer(engine).text


def test_cancelling_while_waiting_gives_the_place_up(engine: InferenceEngine) -> None:
    first = engine.stream(GenerationRequest(ASK, sampling=LONG))
    next(first)
    cancel = threading.Event()
    waiting = engine.stream(GenerationRequest(ASK, sampling=BRIEF), cancel)
    assert next(waiting)[0].place == 1
    cancel.set()
    begun = time.monotonic()
    assert [chunks[0].finish_reason for chunks in waiting] == ["cancelled"]
    assert time.monotonic() - begun < 0.5
    assert engine.n_waiting == 0
    first.close()
    assert answer(engine).text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: 9 bytes")])
def test_out_of_memory_says_what_to_lower_and_the_next_request_works(engine: InferenceEngine, bundle, error) -> None:
    def full(*_):
        raise error

    layer = decoder_layers(engine._adapters.model)[1]
    handle = layer.register_forward_pre_hook(full)
    try:
        with pytest.raises(OutOfMemory, match="--max_new_tokens"):
            answer(engine)
        with pytest.raises(OutOfMemory, match="shorter"):
            engine.embed([[1, 5]])
    finally:
        handle.remove()
    assert answer(engine) == list(stream(bundle, ASK, BRIEF))[-1]


def test_other_faults_are_not_taken_for_memory(engine: InferenceEngine) -> None:
    def broken(*_):
        raise RuntimeError("device-side assert")

    handle = decoder_layers(engine._adapters.model)[1].register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="device-side"):
            answer(engine)
    finally:
        handle.remove()
    assert answer(engine).text


def test_adapters_are_switched_by_name_each_with_its_own_words(options: ModelOptions, adapters_folder: Path) -> None:
    alone = {
        name: answer(open_engine(options, InferenceOptions(lora_path=str(adapters_folder / name)), LimitOptions()))
        for name in ("first", "second")
    }
    engine = open_engine(
        options, InferenceOptions(lora_path=str(adapters_folder / "second")), LimitOptions(), str(adapters_folder)
    )
    base = engine.names[2]
    assert engine.names == ("second", "first", Path(options.model_path).name)
    assert alone["first"].text != alone["second"].text
    for name in ("second", "first", base, "first", "second", ""):
        got = answer(engine, adapter=name)
        if name != base:
            assert got == alone[name or "second"]
    assert engine.template("first").jinja != engine.template("second").jinja
    plain = answer(open_engine(options, InferenceOptions(), LimitOptions()))
    assert answer(engine, adapter=base) == plain, "nothing of an adapter stays on the base"


def test_an_adapter_that_does_not_load_leaves_the_one_before(
    options: ModelOptions, adapters_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapters_folder, tmp_path / "mixed")
    (tmp_path / "mixed" / "second" / "adapter_model.safetensors").write_bytes(b"damaged")
    engine = open_engine(options, InferenceOptions(), LimitOptions(), str(tmp_path / "mixed"))
    before = answer(engine)
    with pytest.raises(ModelError):
        answer(engine, adapter="second")
    assert answer(engine) == before


def test_a_folder_without_adapters_is_refused(options: ModelOptions, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="--adapters_path"):
            open_engine(options, InferenceOptions(), LimitOptions(), str(path))


def test_embeddings_have_length_one_and_do_not_depend_on_pieces(engine: InferenceEngine, monkeypatch) -> None:
    ids = [1, *range(5, 60)]
    (vector,) = engine.embed([ids])
    assert len(vector) == 64
    assert sum(value**2 for value in vector) == pytest.approx(1)
    monkeypatch.setattr("onecard.inference.embeddings.PIECE_TOKENS", 7)
    (pieces,) = engine.embed([ids])
    assert pieces == pytest.approx(vector, abs=1e-5)
    hidden = engine._adapters.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
    assert torch.nn.functional.normalize(hidden, dim=0).tolist() == pytest.approx(vector, abs=1e-5)


def test_scores_are_those_of_one_forward_pass(engine: InferenceEngine, monkeypatch) -> None:
    monkeypatch.setattr("onecard.inference.embeddings.PIECE_TOKENS", 4)
    ids = [1, *range(5, 20)]
    scores = engine.score(ids, top_logprobs=2)
    logits = engine._adapters.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert scores[0] is None
    assert len(scores) == len(ids)
    for k, entry in enumerate(scores[1:], start=1):
        assert entry is not None
        assert entry.token_id == ids[k]
        assert entry.logprob == pytest.approx(float(logits[k - 1, ids[k]]), abs=1e-4)
        assert entry.top[0][0] == int(logits[k - 1].argmax())


def test_closing_cancels_what_runs_and_refuses_what_comes(options: ModelOptions) -> None:
    engine = open_engine(options, InferenceOptions(), LimitOptions())
    chunks = engine.stream(GenerationRequest(ASK, sampling=LONG))
    next(chunks)
    engine.close()
    assert list(chunks)[-1][0].finish_reason == "cancelled"
    with pytest.raises(ModelError, match="shut down"):
        answer(engine)


def test_a_completion_goes_on_in_the_prompts_words_with_the_space_between(engine: InferenceEngine, bundle) -> None:
    tokenizer = bundle.tokenizer
    n_spaces = 0
    for k in range(12):
        ids = [1, *tokenizer(f"The quick brown fox {k}", add_special_tokens=False)["input_ids"]]
        sampling = SamplingOptions(max_new_tokens=6, temperature=2.0, seed=k)
        chunk = answer(engine, turns=(), prompt_ids=tuple(ids), sampling=sampling, top_logprobs=0)
        new = [entry.token_id for entry in chunk.logprobs]
        whole = tokenizer.decode([*ids, *new], skip_special_tokens=True)
        if "\ufffd" not in whole:
            assert tokenizer.decode(ids, skip_special_tokens=True) + chunk.text == whole
            n_spaces += chunk.text.startswith(" ")
    assert n_spaces >= 1


def test_reading_can_be_cancelled_and_has_its_time(options: ModelOptions) -> None:
    cancel = threading.Event()
    cancel.set()
    engine = open_engine(options, InferenceOptions(), LimitOptions(max_request_seconds=1e-6))
    with pytest.raises(ModelError, match="cancelled"):
        engine.embed([[1, 5]], cancel=cancel)
    with pytest.raises(ModelError, match="max_request_seconds"):
        engine.score([1, 5, 6])
