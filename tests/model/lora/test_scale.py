"""--adapter_scale: what peft's own scaling gives, the base at 0, the same merged, refused where it means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions
from onecard.console import run_main
from onecard.errors import ConfigError
from onecard.export.merge.merge import merge_into
from onecard.export.merge.options import MergeSettings
from onecard.inference.adapters import open_adapters
from onecard.inference.load import load_bundle
from onecard.model.lora.adapter import load_adapter
from onecard.model.lora.peft_model import remove_adapter
from onecard.model.trained import load_trained
from onecard.programs import gguf, merge

IDS = torch.arange(3, 20)[None]
MODULES = {"target_modules": ["q_proj", "down_proj"]}
KINDS: dict[str, Any] = {
    "lora": LoraConfig(**MODULES, r=4, lora_alpha=8),
    "rslora": LoraConfig(**MODULES, r=4, lora_alpha=8, use_rslora=True),
    "patterns": LoraConfig(**MODULES, r=4, lora_alpha=8, alpha_pattern={"q_proj": 32}, rank_pattern={"q_proj": 2}),
    "loha": peft.LoHaConfig(**MODULES, r=4, alpha=8),
    "lokr": peft.LoKrConfig(**MODULES, r=4, alpha=8),
    "dora": LoraConfig(**MODULES, r=4, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "head": LoraConfig(**MODULES, r=4, modules_to_save=["lm_head"]),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def adapter(request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path) -> Path:
    """An adapter of the kind, with random values."""
    model = peft.get_peft_model(loaded(tiny_base), KINDS[request.param])
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("adapter", ["lora", "rslora", "patterns", "loha", "lokr"], indirect=True)
def test_it_is_pefts_own_scaling(adapter: Path, tiny_base: Path) -> None:
    base = loaded(tiny_base)
    without = logits(base)
    expected = peft.PeftModel.from_pretrained(loaded(tiny_base), adapter)
    whole = logits(expected)
    for layer in expected.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.scale_layer(0.5)
    half = logits(expected)
    assert (whole - half).abs().max() > 1e-3 and (half - without).abs().max() > 1e-3
    for scale, wanted in ((0.5, half), (1.0, whole)):
        model = load_adapter(base, adapter, trainable=False, scale=scale).model
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
        base = remove_adapter(model)
    model = load_adapter(base, adapter, trainable=False, scale=0.0).model
    assert torch.equal(logits(model), without)


@pytest.mark.parametrize("adapter", ["lora", "lokr"], indirect=True)
def test_a_merged_model_has_the_scale(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    report = merge_into(
        tmp_path / "merged", str(tiny_base), [str(adapter)], MergeSettings(dtype="fp32", adapter_scale=0.5)
    )
    expected = load_adapter(loaded(tiny_base), adapter, trainable=False, scale=0.5).model
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(expected), rtol=0, atol=1e-5)
    assert report.proof and "adapter_scale 0.5" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("adapter", ["lora"], indirect=True)
def test_what_answers_has_the_scale_after_another_adapter_too(adapter: Path, tiny_base: Path) -> None:
    options = ModelOptions(model_path=str(tiny_base), bits=32, device="cpu")
    bundle, depends_on = load_bundle(options, str(adapter), "alpaca", adapter_scale=0.5)
    expected = logits(bundle.model)
    assert depends_on["adapter_scale"] == 0.5
    assert "adapter_scale" not in load_bundle(options, str(adapter), "alpaca")[1]  # answers of before go on
    asked = InferenceOptions(lora_path=str(adapter), prompt_type="alpaca", adapter_scale=0.5)
    adapters = open_adapters(options, asked, str(adapter.parent), None)
    base = adapters.names[-1]
    assert torch.equal(logits(adapters.use().model), expected)
    assert not torch.equal(logits(adapters.use(base).model), expected)
    assert torch.equal(logits(adapters.use().model), expected)
    with pytest.raises(ConfigError, match="needs an adapter"):
        load_bundle(options, None, "alpaca", adapter_scale=0.5)


@pytest.mark.parametrize(("adapter", "named"), [("dora", "DoRA"), ("ia3", "ia3")], indirect=["adapter"])
def test_methods_without_a_strength_are_refused_by_name(adapter: Path, named: str, tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=f"of the method {named}, .*; it goes with lora, adalora, loha, lokr"):
        load_adapter(loaded(tiny_base), adapter, trainable=False, scale=0.5)
    load_adapter(loaded(tiny_base), adapter, trainable=False)


def test_a_whole_model_has_no_adapter_to_scale(tmp_path: Path) -> None:
    for name in ("config.json", "onecard.yaml"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="trained weights of the base itself"):
        load_trained(None, str(tmp_path), scale=0.5)


@pytest.mark.parametrize("adapter", ["head"], indirect=True)
def test_what_was_trained_whole_stays_and_is_reported(adapter: Path, tiny_base: Path) -> None:
    (note,) = load_adapter(loaded(tiny_base), adapter, trainable=False, scale=0.5).notes
    assert "modules_to_save" in note and "stays as trained" in note


def test_other_values_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for scale in (-1.0, 11.0, float("nan")):
        assert [flag for flag, _ in InferenceOptions(adapter_scale=scale).problems()] == ["--adapter_scale"]
    for program in (merge, gguf):
        words = ["--lora_path", "x", "--model_path", "y", "--output_path", "z", "--adapter_scale", "0"]
        assert run_main(lambda program=program, words=words: program.main(words)) == 2  # type: ignore[misc]
        assert "--adapter_scale: 0.0 is not above 0" in capsys.readouterr().err
