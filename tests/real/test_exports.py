"""What an adapter gained on a real model is still there after every export: at least 99 % of the gain in NLL."""

from __future__ import annotations

from dataclasses import dataclass
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
from tests.gain import answer_nll, kept_share

ROWS = Path(__file__).resolve().parents[2] / "sample" / "merge_sample.json"
PROMPT_TYPES = {"smollm2": "auto", "gemma3_270m": "alpaca"}
# Runs of their own, each with its own schedule. Gemma, which is not exported to GGUF, only where rounding weighs most.
RUNS = [("smollm2", 6), ("smollm2", 24), ("smollm2", 64), ("gemma3_270m", 6)]


@dataclass(frozen=True)
class Run:
    """An adapter of a real base, and the NLL of held-out answers without and with it."""

    name: str
    base: Path
    adapter: Path
    n_steps: int
    tokenizer: Any
    without: float
    with_it: float

    def kept(self, model: Any, what: str) -> float:
        nll = answer_nll(model, self.tokenizer, PROMPT_TYPES[self.name])
        return kept_share(self.without, self.with_it, nll, f"{self.name}, {self.n_steps} steps, {what}")


def loaded(directory: Path, **words: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **words).eval()


def adapted(run: Run) -> Any:
    return load_adapter(loaded(run.base), run.adapter, trainable=False).model.eval()


@pytest.fixture(scope="session", params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run at the defaults, but for its length."""
    name, n_steps = request.param
    base, output = request.getfixturevalue(name)["bf16"], tmp_path_factory.mktemp("real") / f"{name}-{n_steps}"
    finetune(
        tiny.config_for(
            base, ROWS, output, max_steps=n_steps, num_epoch=9, total_batch=4, learning_rate=2e-4, cutoff_len=128,
            prompt_type=PROMPT_TYPES[name], log_steps=10,
        )
    )  # fmt: skip
    tokenizer, prompt_type = AutoTokenizer.from_pretrained(base), PROMPT_TYPES[name]
    without = answer_nll(loaded(base), tokenizer, prompt_type)
    model = load_adapter(loaded(base), output, trainable=False).model.eval()
    with_it = answer_nll(model, tokenizer, prompt_type)
    assert with_it < without - 0.05, "the run gained nothing: nothing could be lost"
    return Run(name, base, output, n_steps, tokenizer, without, with_it)


def test_the_merge_keeps_the_gain(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_path", str(run.base), "--lora_path", str(run.adapter), "--output_path", str(tmp_path / "merged")]
    merge_lora.main(words)
    assert "of what the adapters change in the predictions is kept" in capsys.readouterr().out
    merged = loaded(tmp_path / "merged")
    with capsys.disabled():
        assert run.kept(merged, "merge") >= 0.99
    if run.name == "smollm2":  # the other one is a base that was taught no chat
        assert_speaks_alike(run, adapted(run), merged)


def test_the_sum_that_quantisers_take_keeps_the_gain(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SourceOptions(model_path=str(run.base), lora_path=str(run.adapter))
    with whole_model(options, tmp_path) as source:
        model = loaded(source)
    with capsys.disabled():
        assert run.kept(model, "sum for quantisers") >= 0.99


def test_gguf_keeps_the_gain(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if run.name != "smollm2":
        pytest.skip("the GGUF export does not know this family")
    folder = tmp_path / "gguf"
    words = ["--model_path", str(run.base), "--lora_path", str(run.adapter), "--output_path", str(folder)]
    export_gguf.main(words)
    model = loaded(folder, gguf_file="model-f16.gguf", quantization_config=GgufConfig(dequantize=True))
    with capsys.disabled():
        assert run.kept(model, "GGUF f16") >= 0.99


def assert_speaks_alike(run: Run, one: Any, other: Any) -> None:
    """Greedy answers of both agree, but for a near tie that tips over, and make sense."""
    questions = [f"What is the capital of {country}?" for country in CAPITALS]
    answers, others = ([answer(model, run.tokenizer, question) for question in questions] for model in (one, other))
    assert sum(a == b for a, b in zip(answers, others, strict=True)) >= len(CAPITALS) - 1, (answers, others)
    known = [capital in text for capital, text in zip(CAPITALS.values(), others, strict=True)]
    assert sum(known) >= len(CAPITALS) // 2, others  # 135M parameters do not know them all


CAPITALS = {"Italy": "Rome", "France": "Paris", "Germany": "Berlin", "Japan": "Tokyo"}


def answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
