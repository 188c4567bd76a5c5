"""Adapters that answer together: each request is read by its own, and shares nothing with the others'."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, ParallelOptions, SamplingOptions
from onecard.config.lora import LoraOptions
from onecard.errors import ModelError
from onecard.inference import shared_adapters as shared
from onecard.inference.engine import InferenceEngine, open_engine
from onecard.model.hardware import detect
from onecard.model.load import load_base, load_tokenizer
from onecard.model.lora.adapter import add_lora, save_adapter
from tests.inference.batched.conftest import LIMITS, Asked, answers, batch_of, held_blocks, mixes, request_of

LONG_QUESTION = "What is the capital of France? " * 5


@pytest.fixture(scope="module")
def folder(adapters_folder: Path, lively_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plain adapters and one with DoRA, which is no product beside a layer."""
    copied = tmp_path_factory.mktemp("shared") / "adapters"
    shutil.copytree(adapters_folder, copied)
    options = ModelOptions(model_path=str(lively_base), bits=32, device="cpu", gradient_checkpointing=False)
    torch.manual_seed(2)
    model = add_lora(load_base(options, detect("cpu")).model, LoraOptions(lora_r=4, use_dora=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(model, copied / "dora")
    load_tokenizer(str(lively_base)).save_pretrained(copied / "dora")
    return copied


def open_with(base: Path, folder: Path, n: int) -> InferenceEngine:
    options = ModelOptions(model_path=str(base), bits=32, device="cpu", gradient_checkpointing=False)
    given = InferenceOptions(prompt_type="alpaca")
    return open_engine(options, given, LIMITS, str(folder), parallel=ParallelOptions(max_parallel=n))


@pytest.fixture(scope="module")
def together(lively_base: Path, folder: Path) -> Iterator[InferenceEngine]:
    engine = open_with(lively_base, folder, 8)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def in_turn(lively_base: Path, folder: Path) -> InferenceEngine:
    return open_with(lively_base, folder, 1)


def test_all_adapters_and_the_base_answer_at_once(together: InferenceEngine, in_turn: InferenceEngine) -> None:
    assert len(together.names) == 4
    sampling = SamplingOptions(max_new_tokens=24)
    requests = [request_of(LONG_QUESTION, adapter=name, sampling=sampling) for name in together.names] * 3
    asked = [Asked(together, request) for request in requests]
    found = [one.result() for one in asked]
    expected = {request.adapter: answers(in_turn, request) for request in requests}
    assert found == [expected[request.adapter] for request in requests]
    assert len({one[0].text for one in expected.values()}) == 4
    paths = {request.adapter: one[0].path for request, one in zip(requests, found, strict=True)}
    assert paths == {name: "serial" if name == "dora" else "batched" for name in together.names}
    again = answers(together, requests[0])[0].usage  # by the same adapter, its beginning is not read again
    assert again.n_cached_tokens > again.n_prompt_tokens / 2
    assert held_blocks(together) == 0


@pytest.mark.parametrize("n", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_mixes_of_adapters_arrivals_and_cancels(together: InferenceEngine, in_turn: InferenceEngine, n: int) -> None:
    plain = [name for name in together.names if name != "dora"]  # it takes its turn alone
    compared = mixes(together, in_turn, n, plain)
    assert set(compared) == set(plain) and min(compared.values()) > n / 4


def test_beams_and_embeddings_are_read_by_their_adapter(together: InferenceEngine, in_turn: InferenceEngine) -> None:
    long = Asked(
        together, request_of(adapter="second", sampling=SamplingOptions(max_new_tokens=400, min_new_tokens=400))
    )
    assert long.began.wait(30)
    for name in together.names:
        request = request_of(adapter=name, sampling=SamplingOptions(max_new_tokens=8, num_beams=3))
        assert answers(together, request) == answers(in_turn, request)
        own, other = together.embed([[5, 6, 7]], name)[0], in_turn.embed([[5, 6, 7]], name)[0]
        assert own == pytest.approx(other, abs=1e-5)
    long.cancel.set()
    long.result()


def test_the_least_recently_used_one_leaves(
    together: InferenceEngine, in_turn: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "MOST_LOADED", 1)
    kept = batch_of(together).adapters
    assert kept is not None
    numbers = []
    for name in ("first", "second", "first"):
        request = request_of(LONG_QUESTION, adapter=name)
        assert answers(together, request) == answers(in_turn, request)
        assert list(kept._loaded) == [name]
        numbers.append(kept.number(name))
    assert len(set(numbers)) == 3  # what was read by the first loading is no beginning for the second


def test_an_adapter_that_does_not_load_harms_nobody(lively_base: Path, folder: Path, in_turn, tmp_path: Path) -> None:
    broken = tmp_path / "adapters"
    shutil.copytree(folder, broken)
    (broken / "second" / "adapter_model.safetensors").write_bytes(b"damaged")
    engine = open_with(lively_base, broken, 4)
    try:
        with pytest.raises(ModelError):
            answers(engine, request_of(adapter="second"))
        assert answers(engine, request_of(adapter="first")) == answers(in_turn, request_of(adapter="first"))
    finally:
        engine.close()


def test_each_thread_says_by_whom_it_is_read(bundle) -> None:
    from onecard.model.lora.routing import AdapterRouter, LoraProduct

    layer = bundle.model.model.layers[0].mlp.up_proj
    router = AdapterRouter(bundle.model)
    product = LoraProduct(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1), 2.0)
    router.put("own", {"model.layers.0.mlp.up_proj": product})
    x, seen = torch.ones(1, 2, layer.in_features), []
    plain = layer(x)
    router.read_as("own")
    other = threading.Thread(target=lambda: seen.append(layer(x)))
    other.start()
    other.join()
    assert torch.equal(seen[0], plain)
    assert torch.allclose(layer(x), plain + 2 * layer.in_features)
    for hook in router._hooks.values():
        hook.remove()
