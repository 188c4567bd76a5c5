"""The reader of architectures, held against real models and against what publishers say of theirs."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import transformers as tf

from onecard.errors import ModelError
from onecard.model.memory.architecture import Linear, architecture_of, find_known, known_models
from onecard.model.model_layers import linear_layers
from tests.model.model_families import FAMILIES, N_FAMILIES, family_configs

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip


def n_unique(model) -> int:
    return sum(weight.numel() for weight in {id(weight): weight for weight in model.parameters()}.values())


def kinds_of(model) -> Counter:
    """The rule of `adapters.linear_layers`, counted on a real model."""
    found: Counter = Counter()
    for name, layer in linear_layers(model).items():
        shape = layer.weight.shape if isinstance(layer, tf.pytorch_utils.Conv1D) else layer.weight.shape[::-1]
        found[(name.rsplit(".", 1)[-1], *shape, layer.bias is not None)] += 1
    return found


def test_all_families_are_compared() -> None:
    assert len(FAMILIES) == N_FAMILIES == 14


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_equal_those_of_a_real_model(name, load_family, family_directory) -> None:
    model = load_family(name).model
    found = architecture_of(family_directory(name))
    assert found.n_weights == n_unique(model)
    assert {(k.name, k.n_in, k.n_out, k.bias): k.count for k in found.linears} == kinds_of(model)
    assert found.n_linear == sum(w.numel() for layer in linear_layers(model).values() for w in layer.parameters())
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is table.weight
    assert found.tied == tied
    assert found.n_head == (0 if tied else sum(weight.numel() for weight in head.parameters()))
    positions = 64 * 64 if name == "gpt2" else 0
    assert found.n_embedding == table.weight.numel() + positions
    assert found.n_other > 0 and found.stored_bits is None and found.notes == ()
    assert (found.n_layers, found.hidden_size, found.vocab_size, found.head_dim) == (2, 64, 128, 16)
    assert found.model_type == model.config.model_type


def test_both_ways_of_the_head_are_among_the_families(family_directory) -> None:
    assert architecture_of(family_directory("gemma")).tied and not architecture_of(family_directory("llama")).tied


def test_grouped_query_attention_and_biases() -> None:
    found = architecture_of({**LLAMA, "attention_bias": True})
    assert (found.n_heads, found.n_kv_heads, found.intermediate_size, found.max_positions) == (4, 2, 128, 64)
    assert (
        Linear("k_proj", 64, 32, True, 2) in found.linears and Linear("down_proj", 128, 64, False, 2) in found.linears
    )
    assert Linear("k_proj", 64, 32, True, 2).n_weights == 2 * (64 * 32 + 32)


def test_conv1d_and_positions_of_gpt2(family_directory) -> None:
    found = architecture_of(family_directory("gpt2"))
    assert Linear("c_fc", 64, 256, True, 2) in found.linears
    assert found.intermediate_size == 256 and found.n_kv_heads == 4 and found.max_positions == 64


def test_tied_weights_are_counted_once() -> None:
    free, tied = architecture_of(LLAMA), architecture_of({**LLAMA, "tie_word_embeddings": True})
    assert free.n_weights - tied.n_weights == free.n_head == 128 * 64 and tied.n_head == 0 and tied.tied


# --- where it comes from


def test_directory_file_and_dict_say_the_same(family_directory) -> None:
    directory = family_directory("qwen3")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    sources = (directory, str(directory), directory / "config.json", config)
    found = [architecture_of(source, name="x") for source in sources]
    assert len(found) == 4 and len(set(found)) == 1


def test_a_directory_wins_over_a_known_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert architecture_of("Qwen3-8B").n_layers == 36
    Path("Qwen3-8B").mkdir()
    Path("Qwen3-8B/config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert architecture_of("Qwen3-8B").n_layers == 2


@pytest.mark.parametrize("name", ["qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct",
                                  "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"])  # fmt: skip
def test_known_models_by_name_id_and_alias_need_no_network(name, monkeypatch) -> None:
    def refuse(*_args, **_options):
        raise AssertionError("a known model was looked for on the Hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    assert architecture_of(name).n_weights == 7_615_616_512 and architecture_of(name).name == "Qwen2.5-7B"


def test_only_config_json_comes_from_the_hub(tmp_path, monkeypatch) -> None:
    asked = []

    def download(*arguments, **options):
        asked.append((arguments, options))
        (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = architecture_of("some-org/some-model")
    assert asked == [(("some-org/some-model", "config.json"), {})]
    assert found.name == "some-org/some-model" and found.n_layers == 2


# --- the known models

KNOWN = known_models()


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_models_have_the_published_size(name) -> None:
    known = KNOWN[name]
    found = architecture_of(name)
    assert found.n_weights == pytest.approx(known.n_parameters, rel=0.005)
    assert known.source == f"https://huggingface.co/{known.source.split('/', 3)[3]}" and known.checked
    assert known.source.endswith("/blob/main/config.json") and known.hub_ids
    assert known.source.split("/", 3)[3].removesuffix("/blob/main/config.json") in known.hub_ids
    assert ((known.note,) if known.note else ()) == found.notes


def test_known_names_and_ids_mean_one_model_each() -> None:
    names = [text.lower() for known in KNOWN.values() for text in {known.name, *known.hub_ids}]
    assert len(KNOWN) >= 35 and len(names) == len(set(names))
    assert list(KNOWN) == sorted(KNOWN, key=lambda name: (KNOWN[name].n_parameters, name))
    short = {text.split("/")[-1].lower(): known for known in KNOWN.values() for text in known.hub_ids}
    assert len(short) > 50 and all(find_known(text) == known for text, known in short.items())
    assert find_known("no-such-model") is None


def test_eighty_layers_take_under_a_second() -> None:
    wide = {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    architecture_of(LLAMA)
    start = time.process_time()
    assert architecture_of(wide).n_weights == 70_553_706_496  # Llama-3.1-70B, as published
    assert time.process_time() - start < 1


# --- more than plain text models


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_of_a_multimodal_model_the_text_part_is_trained(name) -> None:
    text = {key: value for key, value in LLAMA.items() if key != "model_type"}
    # Gemma 3's own configs are sparse like this one: the vocabulary is the class's.
    text.pop("vocab_size") if name == "gemma3" else None
    inner = {"gemma3": "gemma3_text", "mistral3": "mistral", "qwen2_5_vl": "qwen2_5_vl_text"}[name]
    found = architecture_of({"model_type": name, "text_config": {"model_type": inner, **text, "head_dim": 16}})
    assert found.model_type == inner and found.n_layers == 2 and "only its text part" in found.notes[0]
    rows = 262_208 if name == "gemma3" else 128
    assert found.n_embedding == rows * 64 and found.n_head in (0, rows * 64)
    assert sum(kind.count for kind in found.linears if kind.adapted) == 14
    # Transformers loads Gemma 3 with its eyes, and of the others the text part alone.
    assert (sum(kind.count for kind in found.linears) > 14) == (name == "gemma3")


def test_a_vision_model_keeps_the_head_of_its_text_part() -> None:
    text = {**LLAMA, "model_type": "qwen2_5_vl_text"}
    free, tied = (
        architecture_of({"model_type": "qwen2_5_vl", "tie_word_embeddings": tied, "text_config": text})
        for tied in (False, True)
    )
    plain = architecture_of({**LLAMA, "model_type": "qwen2"})
    assert (free.n_weights, free.n_head) == (plain.n_weights, plain.n_head) and tied.n_head == 0


def test_experts_are_neither_linear_nor_forgotten() -> None:
    config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    found = architecture_of(config)
    n_experts = 2 * 4 * 3 * 64 * 128
    assert found.n_weights == n_unique(tf.AutoModelForCausalLM.from_config(tf.MixtralConfig(**config)))
    assert found.n_experts == n_experts and f"{n_experts:,}" in found.notes[0]
    assert {kind.name for kind in found.experts} == {"experts.gate_up_proj", "experts.down_proj"}
    assert {kind.name for kind in found.linears} >= {"q_proj", "o_proj"}


@pytest.mark.parametrize(
    ("stored", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"quant_method": "fp8"}, 8),
        (None, None),
    ],
)
def test_quantised_checkpoints_tell_their_bits(stored, bits) -> None:
    found = architecture_of({**LLAMA, "quantization_config": stored})
    assert found.stored_bits == bits and found.n_weights == architecture_of(LLAMA).n_weights


def test_code_beside_a_known_family_is_not_needed() -> None:
    found, known = architecture_of({**LLAMA, "auto_map": {"AutoModelForCausalLM": "own.Own"}}), architecture_of(LLAMA)
    assert found.source.code is None and replace(found, source=known.source) == known


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_an_own_family_runs_only_when_trusted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "own.py").write_text(OWN_CODE, encoding="utf-8")
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA, "model_type": "own_llama", "auto_map": own}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match="if you trust it, add --trust_remote_code true"):
        architecture_of(tmp_path)
    found = architecture_of(tmp_path, trust_remote_code=True)
    assert found.model_type == "own_llama" and found.n_weights == architecture_of(LLAMA).n_weights


# --- what cannot be read


def without(*names: str) -> dict:
    return {key: value for key, value in LLAMA.items() if key not in names}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**LLAMA, "model_type": "lama"}, ["'lama'", "does not know the model type"]),
        (without("model_type"), ["names no model_type"]),
        ({**LLAMA, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, ["--trust_remote_code", "'own'"]),
        ({**LLAMA, "model_type": "vit"}, ["no causal language model"]),
        ({**LLAMA, "model_type": "vit", "auto_map": {"AutoModel": "vit.Vit"}}, ["no causal language model"]),
        ({"model_type": "t5", "num_layers": 2, "d_model": 64, "vocab_size": 128}, ["encoder-decoder"]),
        (without("num_hidden_layers", "vocab_size"), ["does not say num_hidden_layers, vocab_size"]),
        ({**LLAMA, "num_hidden_layers": 0}, ["num_hidden_layers 0", "above 0"]),
        ({**LLAMA, "hidden_size": -64}, ["hidden_size -64"]),
        ({**LLAMA, "num_attention_heads": 0}, ["cannot be built|describes no model"]),
        ({**LLAMA, "hidden_size": "wide"}, ["hidden_size"]),
    ],
)
def test_bad_configs_are_one_clear_line(config, words, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        architecture_of(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message, message
    assert all(any(part in message for part in word.split("|")) for word in words), message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "config.json is missing"),
        ({"adapter_config.json": "{}"}, "LoRA adapter"),
        ({"config.json": "{"}, "cannot be read as JSON"),
        ({"config.json": "[]"}, "holds no JSON object"),
    ],
)
def test_bad_directories_are_one_clear_line(files, words, tmp_path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=words) as caught:
        architecture_of(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Qwen/Qwen2.5-7C", "did you mean Qwen/Qwen2.5-7B"),
        ("./not here/at all", "give a directory"),
        ("Lama-3.1-8B", "did you mean Llama-3.1-8B"),
        ("some-org/some-model", "the Hub cannot be reached; go online"),
    ],
)
def test_unknown_names_are_one_clear_line(name, words, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        architecture_of(name)
    assert words in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_family_configs_are_not_changed_by_reading() -> None:
    config = family_configs()["llama"].to_dict()
    before = json.dumps(config, sort_keys=True, default=str)
    architecture_of(config)
    assert json.dumps(config, sort_keys=True, default=str) == before
