"""In how many bits a base answers: what was typed, the run's own on a card, the fastest that fits without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.config.inference import AnsweringModelOptions, ChatConfig, GenerateConfig, ServeConfig
from onecard.inference.load import load_bundle
from onecard.inference.run_files import stored_options, trained_bits
from onecard.model import answer_bits
from onecard.model.answer_bits import count_weights, fastest_on_cpu, with_answer_bits, with_streaming
from onecard.model.hardware import Hardware, detect
from onecard.model.load import load_base

CARD = Hardware(torch.device("cuda"), "RTX 3060", 12 * 2**30, True, (8, 6))
CPU = detect("cpu")


@pytest.fixture
def auto(tiny_base: Path) -> AnsweringModelOptions:
    return AnsweringModelOptions(model_path=str(tiny_base), device="cpu", gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("hardware", "trained", "expected"), [(CARD, None, 4), (CARD, 8, 8), (CPU, None, 16), (CPU, 4, 16)]
)
def test_the_default_is_the_runs_own_on_a_card_and_the_fastest_without(auto, hardware, trained, expected) -> None:
    assert with_answer_bits(auto, hardware, trained).bits == expected


@pytest.mark.parametrize(("free", "expected"), [(10**9, "off"), (1000, "on")])
def test_layers_are_streamed_where_the_weights_are_larger_than_the_card(
    free: int, expected: str, auto, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answer_bits, "free_and_total_bytes", lambda device: (free, 10**9))
    options = with_answer_bits(auto, CARD, None)
    assert with_streaming(options, CARD).stream_layers == expected
    assert ("pass through it" in capsys.readouterr().err) is (expected == "on")
    assert with_streaming(options, CPU).stream_layers == "off"
    for typed in ("on", "off"):
        assert with_streaming(replace(options, stream_layers=typed), CARD).stream_layers == typed
    assert with_streaming(replace(options, max_memory="0:1GiB"), CARD).stream_layers == "off"


@pytest.mark.parametrize("config", [GenerateConfig, ChatConfig, ServeConfig])
def test_every_program_that_answers_chooses(config: type) -> None:
    assert (config().model.bits, config().model.model_path) == ("auto", "auto")


def test_what_was_typed_stays(auto) -> None:
    for bits in (4, 8, 16, 32):
        typed = replace(auto, bits=bits)
        assert with_answer_bits(typed, CPU, 4) is typed
    assert load_bundle(auto, None, "alpaca")[1]["bits"] == 16


@pytest.mark.parametrize(("free_gib", "dtype", "expected"), [
    (20, "auto", 16), (15, "auto", 8), (8, "auto", 4), (2, "auto", 4), (40, "fp32", 32), (20, "fp32", 8),
])  # fmt: skip
def test_fewer_bits_where_more_do_not_fit(auto, free_gib: int, dtype: str, expected: int) -> None:
    """7 billion weights."""
    assert fastest_on_cpu(replace(auto, dtype=dtype), 7_000_000_000, free_gib * 2**30) == expected


def test_a_family_that_computes_in_fp32_alone(auto, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "xlstm"}')
    assert fastest_on_cpu(replace(auto, model_path=str(tmp_path)), 1000, 2**30) == 32


def test_weights_are_counted_from_the_files(auto, tiny_base: Path) -> None:
    model = load_base(ModelOptions(str(tiny_base), bits=32, device="cpu"), CPU).model
    assert count_weights(tiny_base) == sum(parameter.numel() for parameter in model.parameters())


def test_a_larger_model_on_a_cpu_names_what_is_faster(auto, monkeypatch, capsys) -> None:
    with_answer_bits(auto, CPU, None)
    assert "no GPU" not in capsys.readouterr().err, "tiny models are quick in any form"
    monkeypatch.setattr(answer_bits, "TOLD_FROM", 1000)
    with_answer_bits(auto, CPU, None)
    told = capsys.readouterr().err
    assert "answer in 16 bits" in told and "llama.cpp" in told and "tools/export_gguf.py --gguf_type q4_0" in told
    with_answer_bits(auto, CARD, None)
    assert "no GPU" not in capsys.readouterr().err


@pytest.mark.parametrize(("stored", "expected"), [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8), ({"load_in_4bit": True}, 4),
    ({"quant_method": "gptq", "bits": 3}, 4),
])  # fmt: skip
def test_weights_that_lie_there_quantised_decide(auto, stored: dict, expected: int, monkeypatch) -> None:
    monkeypatch.setattr(answer_bits, "stored_quantization", lambda directory: stored)
    assert with_answer_bits(auto, CPU, 32).bits == expected


@pytest.mark.parametrize(("stored", "kept"), [(4, {}), (8, {}), (16, {"bits": 16}), (32, {"bits": 32})])
def test_bits_that_made_training_fit_are_not_those_of_answering(stored: int, kept: dict, tmp_path: Path) -> None:
    (tmp_path / "onecard.yaml").write_text(f"bits: {stored}\n")
    assert stored_options(str(tmp_path)) == kept
    assert trained_bits(str(tmp_path)) == stored
    assert trained_bits(None) is None
