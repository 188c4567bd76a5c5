"""Bottleneck adapters: each form computes what its paper says, in every family that has a place for it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.functional import linear, relu, silu
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, ParallelOptions, SamplingOptions
from onecard.config.lora import BOTTLENECK_FORMS, LoraOptions
from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.data.messages import Turn
from onecard.errors import ConfigError, ModelError
from onecard.export.gguf.adapter import export_adapter
from onecard.export.gguf.options import ExportOptions, OllamaOptions
from onecard.inference.adapters import AdapterManager
from onecard.inference.engine import GenerationRequest, InferenceEngine
from onecard.inference.generate import stream
from onecard.inference.load import load_bundle
from onecard.model.lora.adapter import add_lora, load_adapter, save_adapter
from onecard.model.lora.peft_model import remove_adapter
from onecard.model.memory_saving.tiled_mlp import tile_mlps, untile_mlps
from onecard.recipes import finetune
from tests import tiny
from tests.answers import answers_of

IDS = torch.tensor([[1, 5, 9, 33, 7, 12, 6, 3]])
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


def base_of(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def llama() -> Any:
    return base_of(LlamaForCausalLM, LlamaConfig(**LLAMA))


def trained(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def by_hand(form: str, tensors: dict[str, torch.Tensor], activation: Any, scale: float) -> torch.Tensor:
    """The logits of a Llama whose sublayers are computed with the adapter's tensors, by forward hooks."""
    base = llama()

    def added(place: str, states: torch.Tensor) -> torch.Tensor:
        down, up = (f"base_model.model.{place}.bottleneck_{name}" for name in ("down", "up"))
        narrow = activation(linear(states, tensors[f"{down}.weight"], tensors[f"{down}.bias"]))
        return scale * linear(narrow, tensors[f"{up}.weight"], tensors[f"{up}.bias"])

    for number, layer in enumerate(base.model.layers):
        block = f"model.layers.{number}."
        if form == "parallel":
            layer.mlp.register_forward_hook(lambda _, x, out, at=f"{block}mlp": out + added(at, x[0]))
        else:
            layer.mlp.register_forward_hook(lambda _, x, out, at=f"{block}mlp.down_proj": out + added(at, out))
        if form == "houlsby":
            layer.self_attn.register_forward_hook(
                lambda _, x, out, at=f"{block}self_attn.o_proj": (out[0] + added(at, out[0]), *out[1:])
            )
    return logits(base)


@pytest.mark.parametrize(("form", "options", "activation", "scale", "narrow"), [
    ("houlsby", "", relu, 1, 2), ("pfeiffer", "non_linearity=silu,reduction_factor=8", silu, 1, 4),
    ("parallel", "", relu, 4, 2), ("parallel", "scaling=2,reduction_factor=4", relu, 2, 8),
])  # fmt: skip
def test_each_form_is_what_its_paper_says(form, options, activation, scale, narrow, tmp_path) -> None:
    model = add_lora(llama(), LoraOptions(form, options))
    assert torch.equal(logits(model.eval()), logits(llama()))  # untrained it changes nothing
    save_adapter(trained(model), tmp_path)
    tensors = tiny.tensors_of(tmp_path / "adapter_model.safetensors")
    assert {tuple(value.shape) for value in tensors.values()} == {(narrow, 32), (narrow,), (32, narrow), (32,)}
    assert len(tensors) == 4 * 2 * (1 + (form == "houlsby"))
    assert torch.allclose(logits(model), by_hand(form, tensors, activation, scale), atol=1e-5)
    assert not torch.allclose(logits(model), logits(llama()), atol=0.1)


@pytest.mark.parametrize("form", BOTTLENECK_FORMS)
def test_saved_it_is_read_by_peft_switched_off_and_taken_off(form: str, tmp_path: Path) -> None:
    model = trained(add_lora(llama(), LoraOptions(form)))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["form"]) == ("BOTTLENECK", form)
    loaded = load_adapter(llama(), tmp_path, trainable=False).model
    assert torch.equal(logits(loaded), logits(model))
    plain: Any = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(plain), logits(model))
    with plain.disable_adapter():
        assert torch.equal(logits(plain), logits(llama()))
    plain.load_adapter(tmp_path, "second")
    plain.base_model.set_adapter(["default", "second"])
    assert not torch.equal(logits(plain), logits(model))  # both of them
    plain.delete_adapter("second")
    with pytest.raises(ValueError, match="cannot be merged: between their two matrices is a non-linearity"):
        plain.merge_and_unload()
    assert torch.equal(logits(remove_adapter(loaded)), logits(llama()))


FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32),
             ["attn.c_proj", "mlp.c_proj"], ["mlp"]),
    "bloom": (BloomForCausalLM, BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
              ["mlp.dense_4h_to_h", "self_attention.dense"], ["mlp"]),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**LLAMA, head_dim=16), ["mlp.down_proj", "self_attn.o_proj"], ["mlp"]),
    "opt": (OPTForCausalLM, OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32),
            ["fc2", "self_attn.out_proj"], None),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_its_places_are_found_by_structure(family: str) -> None:
    kind, config, both, block = FAMILIES[family]
    untouched = logits(base_of(kind, config))
    feedforward = [place for place in both if "att" not in place]
    for form, places in (("houlsby", both), ("pfeiffer", feedforward), ("parallel", block)):
        if places is None:
            with pytest.raises(
                ModelError, match=r"OPTForCausalLM has none of its blocks .* so parallel adapters have no"
            ):
                add_lora(base_of(kind, config), LoraOptions(form))
            continue
        model = add_lora(base_of(kind, config), LoraOptions(form)).eval()
        assert sorted(model.peft_config["default"].target_modules) == places
        assert torch.equal(logits(model), untouched)
        assert not torch.allclose(logits(trained(model)), untouched, atol=1e-2)


@pytest.mark.parametrize(("kind", "config", "reason"), [
    (MixtralForCausalLM, MixtralConfig(**LLAMA, num_local_experts=2), "is a mixture of experts"),
    (MambaForCausalLM, MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1), "has none of its"),
])  # fmt: skip
def test_a_base_without_a_place_is_refused_by_name(kind: Any, config: Any, reason: str) -> None:
    with pytest.raises(
        ModelError, match=f"{kind.__name__} {reason}.*pfeiffer adapters have no place.*--peft_method lora"
    ):
        add_lora(kind(config), LoraOptions("pfeiffer"))


@pytest.mark.parametrize("form", BOTTLENECK_FORMS)
def test_tiles_of_the_feed_forward_block_change_nothing(form: str) -> None:
    model = trained(add_lora(llama(), LoraOptions(form)))
    whole = logits(model)
    assert tile_mlps(model, 3) == 2
    assert torch.allclose(logits(model), whole, atol=1e-5)
    untile_mlps(model)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [("houlsby --peft_option form=parallel", "--peft_method: houlsby contradicts --peft_option form=parallel"),
     ("pfeiffer --lora_target_modules q_proj", "--lora_target_modules: does not go with --peft_method bottleneck"),
     ("pfeiffer --lora_r 4", "--lora_r: does not go with --peft_method bottleneck"),
     ("parallel --train_embeddings true", "--train_embeddings: does not go with --peft_method bottleneck"),
     ("housby", r"'housby' is not one of .*\(did you mean houlsby\?\)")],
)  # fmt: skip
def test_what_does_not_go_with_them_is_named(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(FinetuneConfig, ["--peft_method", *words.split()])


def test_a_form_by_its_name_is_the_same_run_as_by_its_option() -> None:
    by_name = parse(FinetuneConfig, ["--peft_method", "parallel", "--peft_option", "scaling=2"])
    by_option = parse(FinetuneConfig, ["--peft_method", "bottleneck", "--peft_option", "form=parallel,scaling=2"])
    assert by_name.lora == by_option.lora


@pytest.mark.parametrize(
    ("option", "said"),
    [("form=series", "form=series is not one of houlsby, pfeiffer, parallel"),
     ("dropout=0.1", "dropout is given by --lora_dropout"),
     ("non_linearity=rely", "non_linearity=rely is no activation"), ("reduction_factor=0", "is not above 0"),
     ("reduction=4", r"no setting of BottleneckConfig \(did you mean reduction_factor\?\)")],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(option: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--peft_option: .*{said}"):
        add_lora(llama(), LoraOptions("bottleneck", option))


def test_the_form_of_another_kit_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """LLM-Adapters writes the same peft_type beside other settings."""
    save_adapter(trained(add_lora(llama(), LoraOptions("pfeiffer"))), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["form"]
    file.write_text(json.dumps({**config, "bottleneck_size": 2}), encoding="utf-8")
    with pytest.raises(ModelError, match="is another kit's bottleneck adapter, which cannot be loaded here"):
        load_adapter(llama(), tmp_path, trainable=False)


@pytest.fixture(scope="module")
def run(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bottleneck") / "run"
    options = {"peft_method": "bottleneck", "peft_option": "form=houlsby", "save_steps": 100}
    return finetune(tiny.config_for(tiny_base, instructions, out, **options))


def test_the_engine_answers_with_it_beside_other_adapters(run: Path, tiny_base: Path) -> None:
    """In a batch it has no place; alone it answers as without the engine, with beams, too."""
    bundle: Any = load_bundle(ModelOptions("auto", bits=32, device="cpu"), str(run), "auto")[0]
    for beams in (1, 3):
        sampling = SamplingOptions(temperature=0, num_beams=beams, max_new_tokens=6)
        turns = [[Turn("user", text)] for text in ("Count to 5", "Hi")]
        together = answers_of(bundle, turns, sampling)
        assert [answer.text for answer in together] == [[*stream(bundle, each, sampling)][-1].text for each in turns]
    greedy = SamplingOptions(temperature=0, max_new_tokens=6)
    true = answers_of(bundle, turns[:1], greedy)[0].text
    options, inference = ModelOptions(str(tiny_base), bits=32, device="cpu"), InferenceOptions(prompt_type="alpaca")
    engine = InferenceEngine(
        AdapterManager(options, inference, {"base": None, "houlsby": str(run)}),
        LimitOptions(), ParallelOptions(max_parallel=2),
    )  # fmt: skip
    try:
        for name in ("houlsby", "base", "houlsby"):
            request = GenerationRequest((turns[0][0],), sampling=greedy, adapter=name)
            text = [*engine.stream(request, threading.Event())][-1][0].text
            assert (text == true) == (name == "houlsby")
    finally:
        engine.close()


def test_a_gguf_adapter_cannot_hold_it(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    options = ExportOptions(model_path=str(tiny_base), output_path=str(tmp_path / "gguf"), lora_path=str(run))
    with pytest.raises(ModelError, match=r"method bottleneck, which is not merged here or anywhere: .*non-linearity"):
        export_adapter(options, OllamaOptions())
