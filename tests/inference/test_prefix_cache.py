"""A next turn reads only what is new, answers as if it had read everything, and never goes on from another's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, SamplingOptions
from onecard.data.messages import Turn
from onecard.inference.call import Chunk
from onecard.inference.engine import GenerationRequest, InferenceEngine, OutOfMemory, open_engine
from onecard.inference.prefix_cache import MOST_KEPT, PrefixCache, can_be_kept, new_cache
from onecard.model.model_layers import decoder_layers

MODES = {
    "greedy": SamplingOptions(max_new_tokens=8),
    "sample": SamplingOptions(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=5),
    "beam": SamplingOptions(max_new_tokens=8, num_beams=3),
    "beam-sample": SamplingOptions(max_new_tokens=8, num_beams=3, temperature=1.0, seed=5),
}
QUESTIONS = ("What is the capital of France?", "And of Italy?", "Why?", "把它翻译成英文。")
HELLO = (Turn("user", "Hello, who are you?"),)


def opened(base: Path, gib: float, **bundle: Any) -> InferenceEngine:
    options = ModelOptions(model_path=str(base), bits=32, device="cpu", gradient_checkpointing=False)
    return open_engine(options, InferenceOptions(prompt_type="chatml", **bundle), LimitOptions(prefix_cache_gib=gib))


@pytest.fixture(scope="module")
def plain(lively_base: Path) -> InferenceEngine:
    """Reads every conversation from its beginning."""
    return opened(lively_base, 0)


@pytest.fixture
def engine(lively_base: Path, plain: InferenceEngine) -> InferenceEngine:
    """Shares the model of `plain`, and starts with nothing kept."""
    return InferenceEngine(plain._adapters, LimitOptions(prefix_cache_gib=1))


def answer(engine: InferenceEngine, turns: tuple[Turn, ...], **request: Any) -> Chunk:
    request.setdefault("sampling", MODES["greedy"])
    return list(engine.stream(GenerationRequest(turns, **request)))[-1][0]


class CountTokens:
    """How many tokens the model reads."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.total = 0
        self._layer = decoder_layers(engine._adapters.model)[0]

    def __enter__(self) -> CountTokens:
        self._handle = self._layer.register_forward_pre_hook(self._add)
        return self

    def _add(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.total += inputs[0].shape[0] * inputs[0].shape[1]

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("mode", list(MODES))
def test_a_next_turn_reads_only_what_is_new_and_is_answered_alike(
    engine: InferenceEngine, plain: InferenceEngine, mode: str
) -> None:
    turns: tuple[Turn, ...] = ()
    n_before = 0
    for question in QUESTIONS:
        turns = (*turns, Turn("user", question))
        expected = answer(plain, turns, sampling=MODES[mode])
        with CountTokens(engine) as read:
            got = answer(engine, turns, sampling=MODES[mode])
        assert got == expected
        n_prompt, n_cached = got.usage.n_prompt_tokens, got.usage.n_cached_tokens
        assert expected.usage.n_cached_tokens == 0
        assert n_cached >= n_before
        assert read.total <= n_prompt - n_cached + 3 * 8
        turns, n_before = (*turns, Turn("assistant", got.text)), n_prompt - 1


def test_several_answers_and_logprobs_are_those_without_a_cache(
    engine: InferenceEngine, plain: InferenceEngine
) -> None:
    answer(engine, HELLO)
    request = GenerationRequest(
        (*HELLO[:0], Turn("user", "Hello, who are we?")), sampling=MODES["sample"], n=3, top_logprobs=2
    )
    got, expected = list(engine.stream(request))[-1], list(plain.stream(request))[-1]
    assert [chunk.text for chunk in got] == [chunk.text for chunk in expected]
    assert all(chunk.usage.n_cached_tokens > 8 for chunk in got)
    for ours, theirs in zip(got, expected, strict=True):
        logprobs = [[entry.logprob for entry in chunk.logprobs] for chunk in (ours, theirs)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)


def test_an_edited_message_is_read_anew_and_two_conversations_do_not_drive_each_other_out(
    engine: InferenceEngine, plain: InferenceEngine
) -> None:
    told = (*HELLO, Turn("assistant", "A kind fox. " * 8), Turn("user", "Since when?"))
    other = (Turn("user", "Hello, and good evening to you."),)
    edited = (*HELLO, Turn("assistant", "A lazy dog."), Turn("user", "Since when?"))
    for turns in (told, other, edited, told, other):
        assert answer(engine, turns) == answer(plain, turns)
    again = answer(engine, (*told, Turn("assistant", "Always."), Turn("user", "Truly?")))
    assert again.usage.n_cached_tokens >= plain.count_tokens(told) - 1


def test_an_answer_that_was_stopped_leaves_a_right_beginning(engine: InferenceEngine, plain: InferenceEngine) -> None:
    long = SamplingOptions(max_new_tokens=300, min_new_tokens=300)
    for wanted in (1, 3):
        stream = engine.stream(GenerationRequest(HELLO, sampling=long))
        for _, _chunk in zip(range(wanted), stream, strict=False):
            pass
        stream.close()
        assert answer(engine, HELLO) == answer(plain, HELLO)


def test_a_fault_in_the_middle_of_the_layers_leaves_nothing_half_read(
    engine: InferenceEngine, plain: InferenceEngine
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("device-side assert")

    for _ in range(2):
        handle = decoder_layers(engine._adapters.model)[1].register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="device-side"):
            answer(engine, (*HELLO, Turn("assistant", "A fox."), Turn("user", "Oh!")))
        handle.remove()
        assert answer(engine, HELLO) == answer(plain, HELLO)


def test_adapters_never_go_on_from_each_others_keys(lively_base: Path, adapters_folder: Path) -> None:
    options = ModelOptions(model_path=str(lively_base), bits=32, device="cpu", gradient_checkpointing=False)
    bundle = InferenceOptions(prompt_type="chatml")
    keeps, reads = (
        open_engine(options, bundle, LimitOptions(prefix_cache_gib=gib), str(adapters_folder)) for gib in (1.0, 0.0)
    )
    for name in ("first", "second", "first", "second"):
        assert answer(keeps, HELLO, adapter=name) == answer(reads, HELLO, adapter=name)
    assert answer(keeps, HELLO, adapter="first").usage.n_cached_tokens > 8


def test_full_memory_is_freed_of_other_conversations_and_the_request_tried_again(
    engine: InferenceEngine, plain: InferenceEngine
) -> None:
    def full_while_something_is_kept(*_: Any) -> None:
        if engine._prefixes._kept:
            raise torch.OutOfMemoryError("CUDA")

    other = (Turn("user", QUESTIONS[0]),)
    expected = answer(plain, other)
    answer(engine, HELLO)
    handle = decoder_layers(engine._adapters.model)[1].register_forward_pre_hook(full_while_something_is_kept)
    try:
        assert answer(engine, other) == expected
        assert len(engine.embed([[1, 5]])) == 1
    finally:
        handle.remove()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA")

    handle = decoder_layers(engine._adapters.model)[1].register_forward_pre_hook(full)
    try:
        with pytest.raises(OutOfMemory, match="--max_new_tokens"):
            answer(engine, other)
    finally:
        handle.remove()
    assert not engine._prefixes._kept


def test_memory_and_number_are_bounded_and_the_oldest_goes_first() -> None:
    model = small_mistral(sliding_window=None)
    texts = [list(range(k, k + 20)) for k in range(MOST_KEPT + 4)]

    def filled(prefixes: PrefixCache) -> list[int]:
        for ids in texts:
            cache = new_cache(model)
            model(torch.tensor([ids]), past_key_values=cache)
            prefixes.keep("", ids, cache)
        return [kept.ids[0] for kept in prefixes._kept]

    n_bytes = 2 * 2 * 20 * 2 * 16 * 4  # keys and values, layers, tokens, heads, head size, fp32
    assert filled(PrefixCache(1)) == list(range(4, MOST_KEPT + 4))
    assert filled(PrefixCache(3.5 * n_bytes / 2**30)) == [MOST_KEPT + 1, MOST_KEPT + 2, MOST_KEPT + 3]
    assert filled(PrefixCache(0.5 * n_bytes / 2**30)) == []
    assert PrefixCache(0).take(model, "", texts[0]) is None


def small_mistral(sliding_window: int | None) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=sliding_window, max_position_embeddings=128,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_behind_a_sliding_window_a_text_goes_on_but_is_not_cut() -> None:
    model = small_mistral(sliding_window=16)
    prefixes, ids = PrefixCache(1), [(7 * k) % 120 for k in range(40)]
    with torch.inference_mode():
        cache = prefixes.take(model, "", ids)
        assert cache is not None
        model(torch.tensor([ids]), past_key_values=cache)
        prefixes.keep("", ids, cache)
        shorter = prefixes.take(model, "", ids[:30])
        assert shorter is not None
        assert shorter.get_seq_length() == 0
        longer = prefixes.take(model, "", [*ids, 3, 4, 5])
        assert longer is not None
        assert longer.get_seq_length() == 40
        behind = model(torch.tensor([[3, 4, 5]]), past_key_values=longer).logits
        whole = model(torch.tensor([[*ids, 3, 4, 5]])).logits[:, -3:]
    torch.testing.assert_close(behind, whole, rtol=1e-4, atol=1e-5)


def test_rotations_that_depend_on_the_length_are_not_continued() -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = small_mistral(sliding_window=None)
    assert can_be_kept(model)
    model.config.rope_parameters = scaled
    assert not can_be_kept(model)
