"""What else asks for a card: the doctor, the choice of bits and of streaming, quantisers, PiSSA, a chain of stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from onecard.config.base_model import ModelOptions
from onecard.doctor.facts import examine
from onecard.errors import ConfigError
from onecard.export.quantize import run as quantize
from onecard.model import answer_bits
from onecard.model.answer_bits import with_answer_bits, with_streaming
from onecard.model.hardware import choose_dtype, count_gpus, detect
from onecard.model.load import load_base
from onecard.model.memory_saving.activation_offload import SideStream
from onecard.programs import finetune as finetune_program
from onecard.programs import quantize_bnb
from onecard.recipes import finetune
from tests import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    """It has one arithmetic per process, and these runs have several."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_the_doctor_finds_a_card_that_computes() -> None:
    found = examine()
    print(*found, sep="\n")
    assert not [finding for finding in found if finding.state == "problem"]
    said = {finding.value for finding in found}
    assert any(detect("cuda").name in value for value in said)
    assert "ran on cuda:0" in said


def test_a_card_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=f"GPU number {count_gpus()} is asked for"):
        detect(f"cuda:{count_gpus()}")
    with pytest.raises(ConfigError, match="gpu is unknown; use auto, cpu, cuda or cuda:N"):
        detect("gpu")
    card = detect("cuda", pretend_turing=True)
    with pytest.raises(ConfigError, match="gemma2 overflows in fp16"):
        choose_dtype("fp16", 4, card, "gemma2")


def test_answers_take_4_bits_and_stream_where_the_weights_are_too_many(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = detect("cuda")
    options = with_answer_bits(ModelOptions(model_path=str(tiny_base), bits="auto"), card, None)
    assert options.bits == 4
    assert with_streaming(options, card).stream_layers == "off"
    monkeypatch.setattr(answer_bits, "count_weights", lambda directory: 10**12)
    assert with_streaming(options, card).stream_layers == "on"
    assert f"are free on {card.name}" in capsys.readouterr().err
    monkeypatch.setattr(answer_bits, "is_gptq", lambda stored: True)  # packed layers do not stream
    assert with_streaming(options, card).stream_layers == "off"


def test_a_quantised_model_is_measured_on_the_card_where_it_fits(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, spare, on_cpu in (("card", quantize.SPARE_BYTES, False), ("cpu", 10**13, True)):
        monkeypatch.setattr(quantize, "SPARE_BYTES", spare)
        words = ["--model_path", str(tiny_base), "--output_path", str(tmp_path / name), "--bits", "4"]
        quantize_bnb.main([*words, "--eval_samples", "2", "--eval_len", "64", "--device", "cuda"])
        assert ("measured on the CPU" in capsys.readouterr().out) == on_cpu
        model = load_base(ModelOptions(model_path=str(tmp_path / name), bits=4), detect("cuda")).model
        assert next(model.parameters()).device.type == "cuda"


def test_pissa_starts_alike_in_a_resumed_run(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    options = {"device": "cuda", "bits": 32, "lora_init": "pissa", "total_batch": 4, "num_epoch": 1}
    runs = [finetune(tiny.config_for(tiny_base, instructions, tmp_path / name, **options)) for name in ("one", "two")]
    one, two = (tiny.losses_of(run) for run in runs)
    assert len(one) == 6
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-4


def test_a_chain_of_stages_trains_on_the_card(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    common = {"model_path": str(tiny_base), "data_path": str(instructions), "cache_path": str(tmp_path / "cache"),
              "device": "cuda", "bits": 4, "num_epoch": 1, "total_batch": 4, "test_size": 0}  # fmt: skip
    file = tmp_path / "stages.yaml"
    stages = [{"name": "first"}, {"name": "second", "learning_rate": 1e-4}]
    file.write_text(yaml.safe_dump({**common, "stages": stages}), encoding="utf-8")
    finetune_program.main(["--stages", str(file), "--output_path", str(tmp_path / "chain")])
    assert len([*(tmp_path / "chain").rglob("adapter_model.safetensors")]) >= 2


def test_a_copy_that_was_interrupted_before_its_mark_is_waited_for() -> None:
    side = SideStream(torch.device("cuda", 0))
    source = torch.arange(1 << 16, dtype=torch.float32, device="cuda")
    with side.after_compute():
        copy = torch.empty_like(source, device="cpu", pin_memory=True).copy_(source, non_blocking=True)
        back = copy.to("cuda", non_blocking=True)
    side.let_compute_wait(None)
    assert torch.equal(back, source)
