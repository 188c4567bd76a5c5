"""However the model lies in memory, an adapter speaks through it, live, and can be changed for another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, SamplingOptions
from onecard.data.messages import Turn
from onecard.errors import ConfigError
from onecard.inference.call import Chunk
from onecard.inference.engine import GenerationRequest, InferenceEngine, open_engine

ASK = (Turn("user", "What is the capital of France?"),)


def answer(engine: InferenceEngine, sampling: SamplingOptions, adapter: str = "") -> Chunk:
    return list(engine.stream(GenerationRequest(ASK, sampling=sampling, adapter=adapter)))[-1][0]


def opened(
    lively_base: Path, bundle: InferenceOptions | None = None, folder: Path | None = None, **options
) -> InferenceEngine:
    model = ModelOptions(**{"model_path": str(lively_base), "bits": 32, "device": "cpu", **options})
    return open_engine(model, bundle or InferenceOptions(), LimitOptions(), str(folder) if folder else None)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_adapters_over_every_number_of_bits(lively_base: Path, adapters_folder: Path, bits: int) -> None:
    engine = opened(lively_base, folder=adapters_folder, bits=bits)
    greedy, beams = SamplingOptions(max_new_tokens=8), SamplingOptions(max_new_tokens=8, num_beams=2)
    first = [answer(engine, sampling, "first").text for sampling in (greedy, beams)]
    base = [answer(engine, sampling, engine.names[-1]).text for sampling in (greedy, beams)]
    assert first[0] != base[0]
    assert answer(engine, greedy, "second").text != first[0]
    assert [answer(engine, sampling, "first").text for sampling in (greedy, beams)] == first
    assert [answer(engine, sampling, engine.names[-1]).text for sampling in (greedy, beams)] == base
    alone = opened(lively_base, InferenceOptions(lora_path=str(adapters_folder / "first")), bits=bits)
    assert answer(alone, greedy).text == first[0]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_layers_that_come_from_ram_answer_the_same(lively_base: Path, adapters_folder: Path, bits: int) -> None:
    greedy, beams = SamplingOptions(max_new_tokens=8), SamplingOptions(max_new_tokens=8, num_beams=2)

    def answers(**options: str) -> list[Chunk]:
        engine = opened(lively_base, folder=adapters_folder, bits=bits, **options)
        return [answer(engine, how, name) for how in (greedy, beams) for name in ("first", "second", engine.names[-1])]

    assert answers(stream_layers="on") == answers(stream_layers="off")


def test_a_merged_model_answers_as_base_and_adapter_do(
    lively_base: Path, adapters_folder: Path, tmp_path: Path
) -> None:
    engine = opened(lively_base, InferenceOptions(lora_path=str(adapters_folder / "first")))
    greedy = SamplingOptions(max_new_tokens=8)
    expected = answer(engine, greedy).text
    adapters = engine._adapters
    adapters.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    adapters.get().tokenizer.save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "chat_template.jinja").write_text(adapters.get().template.jinja, encoding="utf-8")
    assert answer(opened(tmp_path / "merged"), greedy).text == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 0.9}])
def test_a_static_cache_changes_nothing(lively_base: Path, options: dict) -> None:
    sampling = SamplingOptions(max_new_tokens=12, **options)
    static = opened(lively_base, InferenceOptions(static_cache=True))
    assert answer(static, sampling).text == answer(opened(lively_base), sampling).text
    # Another length needs another cache.
    longer = SamplingOptions(max_new_tokens=40, **options)
    assert answer(static, longer).text == answer(opened(lively_base), longer).text


def test_a_map_of_memory_places_the_model(lively_base: Path) -> None:
    greedy = SamplingOptions(max_new_tokens=8)
    assert answer(opened(lively_base, max_memory="cpu:8GiB"), greedy) == answer(opened(lively_base), greedy)
    missing = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"names GPU {missing}"):
        opened(lively_base, max_memory=f"{missing}:4GiB,cpu:8GiB")
