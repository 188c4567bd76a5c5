"""Checkpoints of bitsandbytes: bit by bit what was quantised, loaded with the same --bits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from onecard.config.base_model import DEFAULT_BASE, ModelOptions
from onecard.errors import ConfigError, DataError, ModelError
from onecard.export.io.weights import open_weights
from onecard.export.quantize.bnb import check_same_weights, stored_dtype
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.programs import quantize_bnb
from onecard.recipes import finetune
from tests import tiny

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


# The 16 levels of NF4 (QLoRA, https://arxiv.org/abs/2305.14314, appendix E).
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def check_4_bits(name: str, tensors: dict[str, torch.Tensor], weight: np.ndarray) -> np.ndarray:
    """The values that NF4 files stand for, each the level nearest to the source's: 64 weights share a largest value."""
    stored = {key.removeprefix(f"{name}."): tensor.numpy() for key, tensor in tensors.items() if key.startswith(name)}
    nested_offset = json.loads(stored["quant_state.bitsandbytes__nf4"].tobytes())["nested_offset"]
    scales = stored["nested_quant_map"][stored["absmax"]]  # the largest values in 8 bits, 256 of them share their own
    scales = scales * np.repeat(stored["nested_absmax"], 256)[: scales.size] + nested_offset
    packed = stored[name].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1, 64)  # the upper half of a byte comes first
    blocks = weight.reshape(-1, 64)
    largest = np.abs(blocks).max(-1, keepdims=True)
    distances = np.abs(blocks[..., None] / largest[..., None] - NF4)
    chosen = np.take_along_axis(distances, codes[..., None].astype(int), -1)[..., 0]
    assert (chosen <= distances.min(-1) + 1e-6).all()
    np.testing.assert_allclose(scales, largest[:, 0], atol=0.01 * np.ptp(largest) + 1e-6)
    return (NF4[codes] * scales[:, None]).reshape(weight.shape)


def check_8_bits(name: str, tensors: dict[str, torch.Tensor], weight: np.ndarray) -> np.ndarray:
    """The values that int8 files stand for, each the step nearest to the source's: 127 steps up to a row's largest."""
    steps, scales = tensors[name].numpy(), tensors[name.removesuffix("weight") + "SCB"].numpy()[:, None]
    np.testing.assert_allclose(scales, np.abs(weight).max(-1, keepdims=True), rtol=1e-6)
    assert np.abs(steps - weight * 127 / scales).max() <= 0.5 + 127 / 2**11  # scaled in fp16
    return steps * scales / 127


@pytest.mark.parametrize(("bits", "check"), [(4, check_4_bits), (8, check_8_bits)])
def test_every_value_stands_for_the_nearest_to_the_sources(base, tmp_path, bits, check) -> None:
    target = saved(base, tmp_path / "small", bits)
    tensors, source = load_file(target / "model.safetensors"), load_file(base / "model.safetensors")
    model = load(target, bits, torch.float16)
    layers = [name for name in source if name in tensors and tensors[name].dtype in (torch.uint8, torch.int8)]
    assert len(layers) == 14
    for name in layers:
        values = check(name, tensors, source[name].double().numpy())
        layer = model.get_submodule(name.removesuffix(".weight"))
        computed = layer(torch.eye(values.shape[1], dtype=torch.float16)).T.double().detach().numpy()
        np.testing.assert_allclose(computed, values, rtol=2**-9, atol=1e-5)  # two roundings to fp16


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
    for words, name in (((), "the pages of docs/en and docs/zh"), (("--eval_path", str(own)), str(own))):
        saved(base, tmp_path / str(len(words)), 8, "--eval_samples", "3", *words)
        said = capsys.readouterr().out
        assert f"measuring on 3 samples of {name}, 192 tokens" in said and "perplexity on 3 held-out samples" in said
    embedded = quantize_bnb.text_for(DEFAULT_BASE, quantize_bnb.BnbOptions())
    assert embedded.name == "the corpus of sample/tiny-llama" and not embedded.packed
    own.write_text("\n", encoding="utf-8")
    with pytest.raises((ConfigError, DataError)):
        saved(base, tmp_path / "no", 8, "--eval_path", str(own))
