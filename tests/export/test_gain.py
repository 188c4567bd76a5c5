"""What an adapter gained on tiny-llama is still there after every export: at least 99 % of the gain in NLL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from onecard.export.quantize.options import SourceOptions
from onecard.export.quantize.run import whole_model
from onecard.model.lora.adapter import load_adapter
from onecard.programs import gguf as export_gguf
from onecard.programs import merge as merge_lora
from onecard.recipes import finetune
from tests import tiny
from tests.export.test_merge import loaded
from tests.gain import answer_nll, kept_share

SAMPLE = Path(__file__).resolve().parents[2] / "sample"
STEPS = (6, 24, 64)
ALL_ROWS = 200


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[int, float], Any]:
    """The embedded base in bf16, a run of 64 steps on it, and NLL by number of steps (0: the base)."""
    folder = tmp_path_factory.mktemp("gain")
    base, run = folder / "base", folder / "run"
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny-llama")
    loaded(SAMPLE / "tiny-llama").bfloat16().save_pretrained(base)
    tokenizer.save_pretrained(base)
    finetune(
        tiny.config_for(
            base, SAMPLE / "merge_sample.json", run, max_steps=64, num_epoch=9, learning_rate=3e-4, save_steps=2,
            keep_checkpoints=40,
        )
    )  # fmt: skip
    nll = {0: answer_nll(loaded(base), tokenizer, "alpaca", n_rows=ALL_ROWS)}
    for n in STEPS:
        model = load_adapter(loaded(base), run / f"checkpoint-{n}", trainable=False).model.eval()
        nll[n] = answer_nll(model, tokenizer, "alpaca", n_rows=ALL_ROWS)
    return base, run, nll, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("n", STEPS)
def test_every_export_keeps_the_gain(trained: Any, n: int, tmp_path: Path) -> None:
    base, run, nll, tokenizer = trained
    adapter = str(run / f"checkpoint-{n}")

    def kept(model: Any, what: str) -> float:
        found = answer_nll(model.eval(), tokenizer, "alpaca", n_rows=ALL_ROWS)
        return kept_share(nll[0], nll[n], found, f"{n} steps, {what}")

    words = ["--model_path", str(base), "--lora_path", adapter, "--output_path"]
    merge_lora.main([*words, str(tmp_path / "merged")])
    assert kept(loaded(tmp_path / "merged"), "merge") >= 0.99
    export_gguf.main([*words, str(tmp_path / "gguf")])
    dequantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model-f16.gguf", dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    assert kept(dequantised, "GGUF f16") >= 0.99
    with whole_model(SourceOptions(model_path=str(base), lora_path=adapter), tmp_path) as source:
        assert kept(loaded(source), "sum for quantisers") >= 0.99
