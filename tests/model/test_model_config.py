"""What a config.json says to this transformers: infinite numbers, newer writers, encoders, and chance switched off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from onecard.config.lora import LoraOptions
from onecard.errors import ModelError
from onecard.model.lora.adapter import add_lora
from onecard.model.memory.architecture import architecture_of
from onecard.model.model_config import ignored_keys, read_model_config, without_chance
from tests.model.every_family import save_small, small_config
from tests.model.model_families import small_batch

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize("model_type", ["bamba", "falcon_h1", "granitemoehybrid", "mamba2"])
def test_infinite_numbers_are_read_as_transformers_writes_them(model_type, tmp_path, load_family) -> None:
    save_small(model_type, tmp_path)
    assert '{\n      "__float__": "Infinity"\n    }' in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert architecture_of(tmp_path).model_type == model_type
    assert load_family("", model_path=tmp_path).model.config.time_step_limit[1] == float("inf")


@pytest.mark.parametrize(
    ("writer", "words"),
    [
        ({"transformers_version": "99.1.0"}, ["was written by transformers 99.1.0", "install that version or a newer"]),
        ({"transformers_version": "4.0.0"}, ["was written by transformers 4.0.0", "the code that it needs"]),
        ({}, ["does not say which version wrote it", "Install a newer transformers"]),
        ({"transformers_version": "someday"}, ["was written by transformers someday"]),
    ],
)
def test_an_unknown_model_type_is_reported_with_its_writer(writer, words, tmp_path, load_family) -> None:
    config = {**LLAMA, "model_type": "qwen9", **writer}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for attempt in (lambda: architecture_of(tmp_path), lambda: load_family("", model_path=tmp_path)):
        with pytest.raises(ModelError) as caught:
            attempt()
        text = str(caught.value)
        assert f"transformers {tf.__version__} does not know the model type 'qwen9'" in text
        assert "did you mean" not in text and str(tmp_path) in text
        assert all(word in text for word in words)


def test_keys_of_a_newer_transformers_are_named_and_not_passed_over(
    family_directory, load_family, tmp_path, capsys
) -> None:
    directory = Path(tmp_path / "newer")
    tf.AutoModelForCausalLM.from_pretrained(family_directory("llama")).save_pretrained(directory)
    edit_config(directory, attention_chunks=4, transformers_version="99.1.0")
    load_family("", model_path=directory)
    told = capsys.readouterr()
    assert "written by transformers 99.1.0" in told.err + told.out and "attention_chunks" in told.err + told.out
    raw = {**LLAMA, "attention_chunks": 4, "rope_theta": 1e4, "quantization_config": {}}
    config = read_model_config(raw, "a model")
    assert ignored_keys({**raw, "transformers_version": "99.1.0"}, config) == ["attention_chunks", "rope_theta"]
    assert ignored_keys({**raw, "transformers_version": "4.30.0"}, config) == []  # older ones wrote what is known here


def test_a_number_of_layers_may_be_told_by_their_kinds() -> None:
    raw = small_config("nemotron_h").to_dict()
    assert "num_hidden_layers" not in raw
    assert read_model_config(raw, "a model").num_hidden_layers == 4
    with pytest.raises(ModelError, match="does not say num_hidden_layers"):
        read_model_config({key: value for key, value in raw.items() if key != "layers_block_type"}, "a model")


def test_a_decoder_of_an_encoder_family_is_taken() -> None:
    raw = {**LLAMA, "model_type": "bert"}
    assert read_model_config({**raw, "is_decoder": True}, "a model").model_type == "bert"
    with pytest.raises(ModelError, match="a model is a bert model, which is an encoder"):
        read_model_config(raw, "a model")
    assert read_model_config({**raw, "model_type": "gpt_neox"}, "a model").is_decoder is False


def test_chance_in_nested_parts_is_switched_off() -> None:
    dbrx = without_chance(tf.DbrxConfig(resid_pdrop=0.1, ffn_config={"moe_jitter_eps": 0.2}))
    gemma = without_chance(tf.Gemma3Config(text_config={"attention_dropout": 0.1}))
    mixtral = without_chance(tf.MixtralConfig(router_jitter_noise=0.1, attention_dropout=0.1))
    assert (dbrx.resid_pdrop, dbrx.ffn_config.moe_jitter_eps, gemma.text_config.attention_dropout) == (0, 0, 0)
    assert (mixtral.router_jitter_noise, mixtral.attention_dropout) == (0, 0)
    phi = without_chance(tf.PhimoeConfig(input_jitter_noise=0.1, router_jitter_noise=0.1))
    assert (phi.input_jitter_noise, phi.router_jitter_noise) == (0, 0.1)  # the latter decides in answering, too


@pytest.mark.parametrize("bits", [4, 32])
def test_rwkv_answers_with_the_weights_that_its_adapter_was_trained_on(bits, tmp_path, load_family) -> None:
    save_small("rwkv", tmp_path)
    edit_config(tmp_path, rescale_every=1)  # as published models, from the seventh layer on
    model = add_lora(load_family("", bits, model_path=tmp_path).model, LoraOptions(lora_r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.1)
        ids = small_batch()["input_ids"]
        trained, answering = model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    assert torch.equal(trained, answering)
