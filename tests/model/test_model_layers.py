"""What is quantised and what gets an adapter, where that is not every linear layer: experts, routers, eyes, Falcon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError, ModelError
from onecard.model.lora.adapter import add_lora, describe_trainable, load_adapter, save_adapter
from onecard.model.lora.peft_model import adaptable_layers
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.plan import CardSpec, make_plan
from onecard.model.memory.tensor_sizes import n_trained
from onecard.model.memory_saving.lm_head import quantize_head
from onecard.model.memory_saving.tiled_mlp import tile_mlps
from onecard.model.model_layers import expert_tensors, linear_layers
from onecard.model.quantised_loading import quantization_config
from onecard.model.quantization import dequantize_4bit, stored_bytes, unquantised
from tests.model.every_family import save_small
from tests.model.test_every_family import (
    assert_close,
    gradients,
    loaded,
    logits,
    mean_loss,
    pair,
    plain_loss,
    with_adapter,
)

CARD = CardSpec("a card", 2**33, 2**33)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    saved: dict[str, Path] = {}

    def directory(model_type: str) -> Path:
        if model_type not in saved:
            saved[model_type] = save_small(model_type, tmp_path_factory.mktemp(model_type))
        return saved[model_type]

    return directory


def dequantised_twin(directory: Path, model: Any) -> Any:
    """The base in 32 bits whose quantised weights have the values that they stand for in `model`."""
    twin = tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if type(weight).__name__ == "Params4bit":
                name = name.replace("parametrizations.", "").removesuffix(".original")
                weights[name].copy_(dequantize_4bit(weight))
    return twin


# --- four bits


@pytest.mark.parametrize("model_type", ["falcon", "mixtral", "gpt_oss", "jetmoe", "dbrx", "inkling_text", "zamba"])
def test_what_transformers_leaves_in_16_bits_is_quantised(model_type, small) -> None:
    directory = small(model_type)
    model = loaded(directory, 4)
    few, many = unquantised(model)
    plain = tf.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantization_config(4, torch.float32)
    )
    few_there, _ = unquantised(plain)
    assert few > few_there and few > 0.8 * (few + sum(many.values()))
    assert torch.equal(logits(model), logits(dequantised_twin(directory, model)))  # that is all that changed
    # A fp32 base of these weights takes 4 bytes for each, a 4-bit one little more than half a byte.
    whole = loaded(directory, 32)
    assert stored_bytes(model) < stored_bytes(whole) - 3.3 * few


def test_experts_are_dequantised_one_layer_at_a_time_only(small) -> None:
    model = loaded(small("mixtral"), 4)
    logits(model)
    for name, weight in expert_tensors(model).items():
        assert (
            weight.dtype == torch.uint8
            and weight.quant_state.shape == expert_tensors(loaded(small("mixtral")))[name].shape
        )
    assert not torch.nn.utils.parametrize._cache


def test_routers_are_neither_quantised_nor_adapted(small) -> None:
    for model_type in ("hunyuan_v1_moe", "llama4_text", "longcat_flash", "phimoe", "dbrx"):
        model = loaded(small(model_type), 4)
        routers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
                   and any(word in name for word in ("router", ".gate.wg", ".classifier"))]  # fmt: skip
        assert routers and not {*routers} & {*linear_layers(model)}
        assert {model.get_submodule(name).weight.dtype for name in routers} == {torch.float32}


def test_a_model_of_which_little_is_quantised_says_so(small, capsys) -> None:
    loaded(small("mamba"), 4)
    told = "".join(capsys.readouterr())
    assert "% of the weights outside embeddings and head lie in 4 bits" in told
    assert "in out_proj" in told and "stay in 32 bits" in told and "GiB" in told
    loaded(small("mixtral"), 8)
    assert "in experts" in "".join(capsys.readouterr())  # LLM.int8 knows matrices only
    loaded(small("mixtral"), 4)
    assert "outside embeddings and head" not in "".join(capsys.readouterr())


def test_four_bits_of_a_model_without_a_layer_for_them_are_refused(tmp_path) -> None:
    config = tf.XLNetConfig(vocab_size=128, d_model=64, n_layer=1, n_head=4, d_inner=64)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="xlnet"):  # such a one is not trained either; the rule is for those to come
        loaded(tmp_path, 4)
    from onecard.model.load import _tell_unquantised

    class Tables(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(4, 4))

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(ConfigError, match="--bits: 4 changes nothing in Tables"):
        _tell_unquantised(Tables(), 4, torch.float32)  # type: ignore[arg-type]


@pytest.mark.usefixtures("peaks_by_formula")
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_plan_counts_what_is_loaded(bits, small) -> None:
    for model_type in ("mixtral", "falcon", "mamba2", "gemma3"):
        model = architecture_of(small(model_type))
        config = FinetuneConfig(model=ModelOptions(model_path=str(small(model_type)), bits=bits))
        parts = make_plan(model, config, CARD, element_bytes=4).account.parts
        base = ("base:", "embeddings", "output head", "norms and the rest")
        planned = sum(part.n_bytes for part in parts if part.name.startswith(base))
        real = stored_bytes(loaded(small(model_type), bits)) * (2 if bits == 16 else 1)  # planned with 4 bytes
        assert abs(planned - real) < 0.08 * real, (model_type, planned, real)  # the tables of small layers count here


# --- adapters


@pytest.mark.usefixtures("peaks_by_formula")
def test_of_a_model_that_sees_only_the_text_part_gets_adapters(small, tmp_path) -> None:
    for model_type, outside in (
        ("gemma3", "vision_tower"),
        ("phi4_multimodal", "embed_tokens_extend"),
        ("fuyu", "vision"),
    ):
        model = loaded(small(model_type))
        assert any(outside in name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        adapted = add_lora(model, LoraOptions(lora_r=2))
        names = [name for name, _ in adapted.named_parameters() if ".lora_A" in name]
        assert names and not [name for name in names if outside in name]
    named = add_lora(loaded(small("gemma3")), LoraOptions(lora_r=2, lora_target_modules="q_proj"))
    assert len([name for name, _ in named.named_parameters() if ".lora_A" in name]) == 2
    setup = setup_of(small("gemma3"), lora_r=2, lora_target_modules="q_proj")
    trained = sum(weight.numel() for weight in named.parameters() if weight.requires_grad)
    assert n_trained(architecture_of(small("gemma3")), setup) == trained


def setup_of(directory: Path, **lora: Any) -> Any:
    config = FinetuneConfig(model=ModelOptions(model_path=str(directory), bits=32), lora=LoraOptions(**lora))
    return make_plan(architecture_of(directory), config, CARD, longest_row=16).setup  # Jamba's scan is traced by token


@pytest.mark.usefixtures("peaks_by_formula")
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "qwen2_moe", "jamba", "falcon_h1"])
@pytest.mark.parametrize("experts", ["", "experts"])
def test_plan_and_adapter_agree_on_what_is_trained(model_type, experts, small) -> None:
    options = {"lora_r": 2, "lora_target_parameters": experts}
    if experts and model_type == "falcon_h1":
        with pytest.raises(ConfigError, match=r"--lora_target_parameters: .* has no experts"):
            setup_of(small(model_type), **options)
        return
    model = add_lora(loaded(small(model_type)), LoraOptions(**options))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == n_trained(architecture_of(small(model_type)), setup_of(small(model_type), **options))


def test_layers_whose_names_mean_experts_to_peft_are_left_out_and_named(small, capsys) -> None:
    """DeepSeek's dense and shared layers are called as its experts were; peft would adapt the experts instead."""
    model = loaded(small("deepseek_v2"))
    left = linear_layers(model).keys() - adaptable_layers(model).keys()
    assert {name.rpartition(".")[2] for name in left} == {"gate_proj", "up_proj", "down_proj"} and len(left) == 6
    direct = peft.get_peft_model(loaded(small("deepseek_v2")), peft.LoraConfig(target_modules=["gate_proj", "up_proj"]))
    assert all("experts" in name for name, _ in direct.named_parameters() if ".lora_A" in name)
    add_lora(model, LoraOptions(lora_r=2))
    assert "6 dense or shared layers (down_proj, gate_proj, up_proj) get no adapter" in "".join(capsys.readouterr())
    with pytest.raises(ModelError, match=r"gate_proj cannot be named in DeepseekV2.*--lora_target_parameters"):
        add_lora(loaded(small("deepseek_v2")), LoraOptions(lora_target_modules="q_proj,gate_proj"))
    # Where peft renames nothing, they are adapted.
    assert any("shared_expert." in name for name in adaptable_layers(loaded(small("qwen2_moe"))))


def test_layers_that_peft_would_not_find_again_get_no_adapter(small) -> None:
    left = linear_layers(loaded(small("laguna"))).keys() - adaptable_layers(loaded(small("laguna"))).keys()
    assert left and all(".shared_experts." in name for name in left)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v2"])
def test_experts_are_trained_through_target_parameters(model_type, small, tmp_path) -> None:
    model = with_adapter(loaded(small(model_type)), lora_target_parameters="experts")
    n_tensors = len(expert_tensors(loaded(small(model_type))))
    names = [name for name, _ in model.named_parameters() if ".lora_A" in name and "experts" in name]
    assert len(names) == n_tensors and "experts" in describe_trainable(model)
    found = gradients(model, mean_loss, pair())
    assert all(found[name].abs().sum() > 0 for name in names)
    assert_close(found, gradients(model, plain_loss, pair()))
    save_adapter(model, tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(small(model_type), dtype=torch.float32)
    there = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(logits(model), logits(there))
    again = load_adapter(loaded(small(model_type), 8), tmp_path, trainable=False).model
    assert torch.isfinite(logits(again)).all()
    with pytest.raises(ConfigError, match="--bits: 4 does not go with adapters on experts"):
        load_adapter(loaded(small(model_type), 4), tmp_path, trainable=False)


def test_older_adapters_that_name_experts_as_layers_are_not_lost_in_4_bits(small, tmp_path) -> None:
    config = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(loaded(small("qwen3_moe")), config).eval()
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    again = load_adapter(loaded(small("qwen3_moe")), tmp_path, trainable=False).model
    assert torch.equal(logits(model), logits(again))
    with pytest.raises(ConfigError, match="--bits: 4 does not go with adapters on experts"):
        load_adapter(loaded(small("qwen3_moe"), 4), tmp_path, trainable=False)


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("mixtral", {"lora_target_parameters": "experts.gate_up"}, "did you mean experts.gate_up_proj"),
        ("mixtral", {"lora_target_parameters": "mlp.gate.weight"}, "it has experts.down_proj, experts.gate_up_proj"),
        ("falcon", {"lora_target_parameters": "experts"}, "it has no experts"),
    ],
)
def test_wrong_target_parameters_are_told(model_type, options, words, small) -> None:
    with pytest.raises(ConfigError, match="--lora_target_parameters") as caught:
        add_lora(loaded(small(model_type)), LoraOptions(**options))
    assert words in str(caught.value)


def test_one_of_the_expert_tensors_can_be_named(small) -> None:
    model = add_lora(loaded(small("mixtral")), LoraOptions(lora_r=2, lora_target_parameters="down_proj"))
    assert len([name for name, _ in model.named_parameters() if ".experts." in name and ".lora_A" in name]) == 2


def test_the_balancing_loss_of_routers_is_not_in_the_loss(small) -> None:
    model = loaded(small("mixtral"))
    with torch.no_grad():
        plain = plain_loss(model, pair())
        model.config.update({"output_router_logits": True})
        aside = model(input_ids=pair()["input_ids"], labels=pair()["labels"], output_router_logits=True)
        assert aside.aux_loss > 0 and aside.loss > plain
        assert abs(mean_loss(model, pair()) - plain) < 1e-5


# --- what else depends on the layers


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_mamba", "xlstm"])
def test_a_head_that_is_read_directly_is_not_quantised(model_type, small) -> None:
    with pytest.raises(ConfigError, match=f"--head_bits: 4 does not work with {model_type} models; use 16"):
        quantize_head(loaded(small(model_type)), 4, torch.float32)
    assert not architecture_of(small(model_type)).small_head


def test_tiles_that_change_nothing_are_told(small, capsys) -> None:
    assert tile_mlps(loaded(small("mamba2")), 8) == 0
    assert "--mlp_tile changes nothing here" in "".join(capsys.readouterr())
    assert not architecture_of(small("mamba2")).tiles and architecture_of(small("falcon_h1")).tiles


def test_the_plan_gives_up_nothing_for_what_a_model_cannot_do(small) -> None:
    """No checkpoints in JetMoe, no small head in Mamba: asked for or chosen, they save nothing."""
    from dataclasses import replace

    from onecard.model.memory.estimate import account

    for model_type, change in (
        ("jetmoe", {"gradient_checkpointing": False}),
        ("mamba2", {"head_bits": 4}),
        ("mamba2", {"mlp_tile": 8}),
    ):
        model, setup = architecture_of(small(model_type)), setup_of(small(model_type))
        assert account(model, setup) == account(model, replace(setup, **change))
