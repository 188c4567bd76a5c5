"""Checkpoints of bitsandbytes: bit by bit what was quantised, loaded with the same --bits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onecard.config.training import ModelOptions
from onecard.errors import ConfigError, DataError, ModelError
from onecard.export.io.weights import open_weights
from onecard.export.quantize.bnb import check_same_weights, stored_dtype
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.recipes import finetune
from tests import tiny
from tools import quantize_bnb

IDS = torch.arange(3, 40)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, stored in fp16."""
    from transformers import LlamaForCausalLM

    directory = tiny.save_tiny_llama(tmp_path_factory.mktemp("base"))
    LlamaForCausalLM.from_pretrained(directory).half().save_pretrained(directory)
    return directory


def saved(base: Path, target: Path, bits: int, *words: str) -> Path:
    few = ["--device", "cpu", "--eval_samples", "2", "--eval_len", "64"]
    quantize_bnb.main(["--model_path", str(base), "--output_path", str(target), "--bits", str(bits), *few, *words])
    return target


def load(directory: Path, bits: int, dtype: torch.dtype | None = None):
    options = ModelOptions(model_path=str(directory), bits=bits, gradient_checkpointing=False)  # type: ignore[arg-type]
    return load_base(options, detect("cpu"), dtype=dtype).model


@pytest.mark.parametrize("bits", [4, 8])
def test_comes_back_as_it_was_saved(base, tmp_path, bits, capsys) -> None:
    target = saved(base, tmp_path / "small", bits)
    told = capsys.readouterr().out
    assert f"saved 14 layers in {bits} bits" in told and "bit by bit" in told
    whole, small = map(float, re.search(r"16-bit ([\d.]+), \d-bit ([\d.]+)", told).groups())
    assert abs(small / whole - 1) < 0.05
    tensors = load_file(target / "model.safetensors")
    quantised = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype in (torch.uint8, torch.int8) and name.endswith("weight")
    ]
    assert len(quantised) == 14
    direct, again = load(base, bits, torch.float16), load(target, bits, torch.float16)
    for name in quantised:
        assert torch.equal(again.state_dict()[name], tensors[name])
        assert torch.equal(direct.state_dict()[name], tensors[name])
    assert torch.equal(direct(IDS[None]).logits, again(IDS[None]).logits)
    assert stored_dtype(open_weights(target)) == torch.float16
    assert not list(target.glob(".*")) and (target / "tokenizer.model").is_file()


def test_arithmetic_is_this_machines(base, tmp_path) -> None:
    """Saved where bf16 is native, a checkpoint must not compute in bf16 on a card that only emulates it."""
    target = saved(base, tmp_path / "small", 4)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load(target, 4)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14 and {layer.compute_dtype for layer in layers} == {torch.float32}
    assert (model(IDS[None]).logits - load(base, 4)(IDS[None]).logits).abs().max() < 1e-3


def test_adapter_is_merged_first_and_training_goes_on(base, instructions, tmp_path) -> None:
    run = finetune(tiny.config_for(base, instructions, tmp_path / "run", learning_rate=3e-2))
    target = tmp_path / "small"
    quantize_bnb.main(["--lora_path", str(run), "--output_path", str(target), "--eval_samples", "2", "--device", "cpu"])
    assert (target / "chat_template.jinja").is_file()
    assert not torch.equal(load(target, 4)(IDS[None]).logits, load(base, 4)(IDS[None]).logits)
    again = finetune(tiny.config_for(target, instructions, tmp_path / "run2", bits=4, max_steps=1))
    assert len(tiny.losses_of(again)) == 1


def test_refusals(base, tmp_path) -> None:
    target = saved(base, tmp_path / "small", 8)
    with pytest.raises(ModelError, match="quantised already"):
        saved(target, tmp_path / "again", 4)
    with pytest.raises(ConfigError, match="--overwrite"):
        saved(base, target, 4)
    with pytest.raises(ConfigError, match="use --bits 8"):
        load(target, 4)
    with pytest.raises(ConfigError, match="--model_path: is needed"):
        quantize_bnb.main(["--output_path", str(tmp_path / "x")])
    model = load(target, 8)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.state_dict()[name].view(torch.int8)[0, 0] += 1
    with pytest.raises(ModelError, match=r"up_proj\.weight came back from the files as something else"):
        check_same_weights(model, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_as_many_samples_as_asked_for_of_text_that_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("A line of text.\n" * 400, encoding="utf-8")
    for words, name in (((), "README.md and docs/README_zh.md"), (("--eval_path", str(own)), str(own))):
        saved(base, tmp_path / str(len(words)), 8, "--eval_samples", "3", *words)
        said = capsys.readouterr().out
        assert f"measuring on 3 samples of {name}, 192 tokens" in said and "perplexity on 3 held-out samples" in said
    embedded = quantize_bnb.text_for(str(quantize_bnb.ROOT / "sample" / "tiny-llama"), quantize_bnb.BnbOptions())
    assert embedded.name == "the corpus of sample/tiny-llama" and not embedded.packed
    own.write_text("\n", encoding="utf-8")
    with pytest.raises((ConfigError, DataError)):
        saved(base, tmp_path / "no", 8, "--eval_path", str(own))
