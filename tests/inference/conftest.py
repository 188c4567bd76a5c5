"""A small base whose answers differ from question to question, a trained-looking run on it, and both as bundles."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.data.built_in_templates import FOLDER
from onecard.data.chat_template import load_template
from onecard.data.messages import Turn
from onecard.inference.call import ModelBundle
from onecard.model.hardware import detect
from onecard.model.load import load_base, load_tokenizer
from onecard.model.lora.adapter import add_lora, save_adapter
from tests import tiny

# Different lengths, so that a batch of them is ragged.
INSTRUCTIONS = [
    "Hi", "What is the capital of France?", "把下面的句子翻译成英文：你好，世界。", "1 + 2",
    "Write a response that appropriately completes the request. " * 2, "fox",
]  # fmt: skip


@pytest.fixture(scope="session")
def lively_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger random weights than usual: the likeliest token depends on the prompt, and is no near-tie."""
    return tiny.save_tiny_llama(tmp_path_factory.mktemp("lively"), initializer_range=0.15, seed=3)


@pytest.fixture(scope="session")
def bundle(lively_base: Path) -> ModelBundle:
    tokenizer = load_tokenizer(str(lively_base))
    options = ModelOptions(model_path=str(lively_base), bits=32, device="cpu", gradient_checkpointing=False)
    return ModelBundle(load_base(options, detect("cpu")).model, tokenizer, load_template("alpaca", tokenizer))


@pytest.fixture(scope="session")
def questions() -> list[list[Turn]]:
    return [[Turn("user", text)] for text in INSTRUCTIONS]


@pytest.fixture(scope="session")
def run_dir(lively_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as training leaves it, in 32 bits with the chatml template, and a checkpoint inside it."""
    run = tmp_path_factory.mktemp("runs") / "my-run"
    options = ModelOptions(model_path=str(lively_base), bits=32, device="cpu", gradient_checkpointing=False)
    torch.manual_seed(1)
    model = add_lora(load_base(options, detect("cpu")).model, LoraOptions(lora_r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(model, run)
    save_adapter(model, run / "checkpoint-3")
    load_tokenizer(str(lively_base)).save_pretrained(run)
    (run / "chat_template.jinja").write_text((FOLDER / "chatml.jinja").read_text(encoding="utf-8"), encoding="utf-8")
    stored = {"model_path": str(lively_base), "bits": 32, "dtype": "auto", "device": "cuda:7", "prompt_type": "alpaca",
              "data_path": "train.json", "output_path": str(run), "trust_remote_code": True, "seed": 7}  # fmt: skip
    (run / "onecard.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    return run


@pytest.fixture(scope="session")
def adapters_folder(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters for the same base, one of them with other weights and another template, and clutter."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(run_dir, folder / "first")
    shutil.copytree(run_dir, folder / "second", ignore=shutil.ignore_patterns("chat_template.jinja"))
    weights = folder / "second" / "adapter_model.safetensors"
    tensors = {name: -2 * value for name, value in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    (folder / "notes").mkdir()
    (folder / "readme.txt").write_text("not an adapter", encoding="utf-8")
    return folder
