"""The table of PEFT methods: PEFT knows each by this name, and nobody outside of model/lora writes the names down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from transformers import AutoModelForCausalLM

from onecard.config.lora import LORA_FORMS, METHOD_SETTINGS, LoraOptions, PeftMethodName
from onecard.errors import ConfigError
from onecard.model.lora import methods
from onecard.model.lora.adapter import add_lora
from onecard.model.lora.bottleneck import register_bottleneck
from onecard.model.lora.methods import (
    METHODS,
    PROMPT,
    AdaptedLayers,
    is_adapter_weight,
    layer_of,
    peft_settings,
    starts_at_zero,
)
from onecard.model.lora.peft_model import trained_part

PACKAGE = Path(methods.__file__).parents[2]


def test_the_option_and_the_table_and_peft_agree() -> None:
    assert METHODS.keys() | LORA_FORMS.keys() == set(get_args(PeftMethodName))
    assert METHOD_SETTINGS.keys() == METHODS.keys()
    register_bottleneck()
    assert {name.upper() for name in METHODS} - {kind.value for kind in PeftType} == {"BOTTLENECK"}
    for name, method in METHODS.items():
        kind: Any = name.upper()
        assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == method.prefix or method.prefix == "" == layer_of(PROMPT[0])
        accepted = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__.keys()
        assert peft_settings(LoraOptions(peft_method=name), AdaptedLayers(["q_proj"], None, False)).keys() <= accepted
        assert method.stored.keys() <= accepted


@pytest.mark.parametrize(
    ("name", "layer"),
    [("base_model.model.a.q_proj.lora_A.default.weight", "base_model.model.a.q_proj"),
     ("base_model.model.a.experts.base_layer.lora_B.weight", "base_model.model.a.experts.base_layer"),
     ("a.q_proj.lora_magnitude_vector", "a.q_proj"), ("a.mlp.bottleneck_up.default.bias", "a.mlp"),
     ("model.embed_tokens.lora_embedding_A", "model.embed_tokens"),
     ("prompt_encoder.default.embedding.weight", ""), ("prompt_embeddings", ""), ("model.prompt_encoder.weight", None),
     ("a.q_proj.base_layer.weight", None), ("a.explora_A.weight", None),
     ("model.embed_tokens.token_adapter.trainable_tokens_delta", None)],
)  # fmt: skip
def test_layers_of_tensors(name: str, layer: str | None) -> None:
    assert layer_of(name) == layer
    assert is_adapter_weight(name) == (layer is not None)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"train_embeddings": True}])
def test_the_trained_part_is_what_has_gradients(options: dict, tiny_base: Path) -> None:
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny_base), LoraOptions(lora_r=2, **options))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert dict(trained_part(model)).keys() == trained.keys()
    zero = [parameter for name, parameter in trained.items() if starts_at_zero(name)]
    assert zero and not any(parameter.any() for parameter in zero)
    assert isinstance(model.peft_config["default"], LoraConfig)


def test_what_a_method_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    monkeypatch.setitem(METHODS, "ia3", methods.PeftMethod("ia3_", ("ia3_none",)))
    asked = LoraOptions(peft_method="ia3", train_new_tokens=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--train_new_tokens: does not go with --peft_method ia3"):
        add_lora(AutoModelForCausalLM.from_pretrained(tiny_base), asked, new_ids=[5])
    with pytest.raises(ConfigError, match="--lora_target_parameters: does not go with --peft_method ia3"):
        peft_settings(asked, AdaptedLayers([], ["experts.down_proj"], False))


def test_no_other_file_names_the_tensors_of_adapters() -> None:
    named = re.compile(r"lora_(A|B|embedding|magnitude)|\.lora_\b|\"lora_\"")
    files = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE / "model" / "lora"]
    assert len(files) > 100
    assert [str(file) for file in files if named.search(file.read_text(encoding="utf-8"))] == []
