"""What an adapter gained on a real model is still there after every export: at least 99 % of the gain in NLL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from onecard.export.quantize import Request, whole_model
from onecard.model.adapters import load_adapter
from onecard.recipes import finetune
from tests import tiny
from tests.gain import answer_nll, kept_share
from tools import export_gguf, merge_lora

ROWS = Path(__file__).resolve().parents[2] / "sample" / "merge_sample.json"
STEPS = (6, 24, 64)
PROMPT_TYPES = {"smollm2": "auto", "gemma3_270m": "alpaca"}


def loaded(directory: Path, **words: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **words).eval()


@pytest.fixture(scope="session", params=PROMPT_TYPES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, dict[int, Path], dict[int, float], Any]:
    """Base, template, checkpoints and NLL by number of steps (0: the base), and the tokenizer."""
    name = request.param
    base, run = request.getfixturevalue(name)["bf16"], tmp_path_factory.mktemp("real") / name
    steps = STEPS if name == "smollm2" else STEPS[:1]
    finetune(
        tiny.config_for(
            base, ROWS, run, max_steps=max(steps), num_epoch=9, total_batch=4, learning_rate=2e-4, cutoff_len=128,
            save_steps=6, keep_checkpoints=20, prompt_type=PROMPT_TYPES[name], log_steps=10,
        )
    )  # fmt: skip
    checkpoints = {n: run / f"checkpoint-{n}" for n in steps}
    tokenizer, model = AutoTokenizer.from_pretrained(base), loaded(base)
    nll = {0: answer_nll(model, tokenizer, PROMPT_TYPES[name])}
    for n, checkpoint in checkpoints.items():
        adapted = load_adapter(loaded(base), checkpoint, trainable=False).model.eval()
        nll[n] = answer_nll(adapted, tokenizer, PROMPT_TYPES[name])
    return base, PROMPT_TYPES[name], checkpoints, nll, tokenizer


def kept(trained: Any, n: int, model: Any, what: str) -> float:
    base, prompt_type, _, nll, tokenizer = trained
    return kept_share(nll[0], nll[n], answer_nll(model, tokenizer, prompt_type), f"{base.parent.name}, {n}, {what}")


@pytest.mark.parametrize("n", STEPS)
def test_merge_keeps_the_gain(trained: Any, n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _, checkpoints, nll, _ = trained
    if n not in checkpoints:
        pytest.skip("the longer runs are made on SmolLM2 alone")
    assert nll[n] < nll[0] - 0.05
    words = ["--model_path", str(base), "--lora_path", str(checkpoints[n]), "--output_path", str(tmp_path / "merged")]
    merge_lora.main(words)
    assert "of what the adapters change in the predictions is kept" in capsys.readouterr().out
    with capsys.disabled():
        assert kept(trained, n, loaded(tmp_path / "merged"), "merge") >= 0.99


def test_gguf_and_the_sum_that_quantisers_take_keep_the_gain(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At six steps, where a rounding takes the largest share."""
    base, _, checkpoints, _, _ = trained
    with whole_model(Request(str(base), (str(checkpoints[6]),), tmp_path / "q"), tmp_path) as source, capsys.disabled():
        assert kept(trained, 6, loaded(source), "sum for quantisers") >= 0.99
    if base.parent.name != "smollm2":
        return  # a family that is not exported
    folder = tmp_path / "gguf"
    words = ["--model_path", str(base), "--lora_path", str(checkpoints[6]), "--output_path", str(folder)]
    export_gguf.main(words)
    model = loaded(folder, gguf_file="model-f16.gguf", quantization_config=GgufConfig(dequantize=True))
    with capsys.disabled():
        assert kept(trained, 6, model, "GGUF f16") >= 0.99
