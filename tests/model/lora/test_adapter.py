from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError, ModelError
from onecard.model.chunked_loss import summed_loss
from onecard.model.lora import adapter as adapters
from onecard.model.lora.adapter import add_lora, describe_trainable, load_adapter, restore_adapter, save_adapter
from onecard.model.lora.formats import base_of_adapter
from onecard.model.model_layers import linear_layers
from onecard.model.quantised_loading import quantization_config
from onecard.model.quantization import dequantize_4bit, keep_one_arithmetic_on_cpu
from tests.model.model_families import save_family, small_batch

IDS = torch.arange(3, 20)[None]


def train(model: torch.nn.Module, steps: int = 3) -> torch.nn.Module:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        summed_loss(model, small_batch(seed=step))[0].backward()
        optimizer.step()
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def plain(directory: Path, adapter: Path, bits: int = 32) -> torch.nn.Module:
    quantization = {"quantization_config": quantization_config(bits, torch.float32)} if bits < 16 else {}
    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map={"": "cpu"}, **quantization
    )
    # A base straight from transformers computes quantised layers otherwise in eval mode on some CPUs; see there.
    keep_one_arithmetic_on_cpu(base)
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def trained_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


# --- what is attached


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("q_porj", ["q_porj (did you mean q_proj?)"]),
        ("q_proj,v_poj", ["v_poj (did you mean v_proj?)"]),
        ("embed_tokens", ["embed_tokens"]),
        (",", ["nothing"]),
    ],
)
def test_names_that_do_not_exist(wanted, words, load_family) -> None:
    with pytest.raises(ModelError) as caught:
        add_lora(load_family("llama").model, LoraOptions(lora_target_modules=wanted))
    assert "--lora_target_modules" in str(caught.value)
    for word in [*words, "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"]:
        assert word in str(caught.value)


def test_zero_trainable_is_an_error(load_family) -> None:
    model = add_lora(load_family("llama").model, LoraOptions())
    model.requires_grad_(False)
    with pytest.raises(ModelError, match=r"0 trainable parameters.*down_proj, gate_proj, k_proj"):
        adapters.check_trainable(model)
    with pytest.raises(ModelError, match="has no adapter"):
        save_adapter(load_family("llama").model, Path("unused"))


def test_chosen_layers_only(load_family) -> None:
    model = add_lora(load_family("llama").model, LoraOptions(lora_target_modules="q_proj, v_proj", lora_r=2))
    layers = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in trained_values(model)}
    n_trained = 2 * 2 * (64 + 64) + 2 * 2 * (64 + 32)  # two layers, rank 2, q: 64 -> 64, v: 64 -> 32
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == n_trained
    assert "rank 2 on 4 layers (q_proj, v_proj)" in describe_trainable(model)
    assert f"{n_trained:,} of " in describe_trainable(model) and len(layers) >= 2


def test_description_counts_4_bit_weights_whole(load_family) -> None:
    texts = {describe_trainable(add_lora(load_family("llama", bits).model, LoraOptions())) for bits in (4, 8, 32)}
    assert len(texts) == 1


# --- starts and variants: what is saved works on the untouched base

VARIANTS = [
    (32, {"use_rslora": True}),
    (4, {"use_rslora": True, "lora_alpha": 8}),
    (32, {"use_dora": True}),
    (4, {"use_dora": True}),
    (32, {"lora_init": "pissa"}),
    (32, {"lora_init": "pissa", "use_rslora": True}),
    (4, {"lora_init": "loftq"}),
    (4, {"lora_init": "loftq", "use_rslora": True, "lora_alpha": 4}),
    (32, {"lora_dropout": 0.1}),
]


@pytest.mark.parametrize(("bits", "options"), VARIANTS)
def test_variant_saved_is_plain_peft(bits, options, load_family, family_directory, tmp_path) -> None:
    model = train(add_lora(load_family("llama", bits).model, LoraOptions(lora_r=4, **options)))
    here = logits(model)
    save_adapter(model, tmp_path)
    tolerance = 2e-5 if options.get("lora_init") == "pissa" else 1e-6
    there = logits(plain(family_directory("llama"), tmp_path, bits))
    assert torch.allclose(here, there, atol=tolerance)
    assert not torch.allclose(here, logits(load_family("llama", bits).model), atol=1e-2)
    again = load_adapter(load_family("llama", bits).model, tmp_path, trainable=True)
    assert torch.allclose(logits(again.model.eval()), here, atol=tolerance) and again.notes == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_pissa_starts_where_the_base_is(family, load_family, family_directory, tmp_path) -> None:
    base = load_family(family)
    weight = next(iter(linear_layers(base.model).values())).weight
    original, before = weight.detach().clone(), logits(base.model)
    model = add_lora(base.model, LoraOptions(lora_r=4, lora_init="pissa"))
    assert not torch.allclose(weight, original, atol=1e-3)  # a part has moved into the adapter
    assert torch.allclose(logits(model), before, atol=2e-5)
    train(model)
    save_adapter(model, tmp_path)
    assert torch.allclose(logits(plain(family_directory(family), tmp_path)), logits(model), atol=5e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 8


def test_pissa_in_bf16_is_near(load_family, tmp_path) -> None:
    """The rest of the base is rounded to bf16 once more, so both forms agree only as well as bf16 does."""
    model = train(add_lora(load_family("llama", 16).model, LoraOptions(lora_r=4, lora_init="pissa")))
    save_adapter(model, tmp_path)
    again = load_adapter(load_family("llama", 16).model, tmp_path, trainable=False).model
    assert (logits(again) - logits(model)).norm() / logits(model).norm() < 0.03


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_is_nearer_to_the_original(family, options, load_family, family_directory) -> None:
    original = dict(transformers.AutoModelForCausalLM.from_pretrained(family_directory(family)).named_parameters())
    model = add_lora(load_family(family, 4).model, LoraOptions(lora_r=8, lora_init="loftq", **options))
    visited = 0
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = original[name.removeprefix("base_model.model.") + ".weight"]
        weight = weight.T if family == "gpt2" else weight
        quantised = dequantize_4bit(layer.base_layer.weight)
        lost = (weight - quantised).norm()
        still_lost = (weight - quantised - layer.get_delta_weight("default")).norm()
        best = torch.linalg.svdvals(weight - quantised)[8:].norm()  # Eckart-Young: no rank-8 matrix is nearer
        assert torch.allclose(still_lost, best, rtol=1e-3) and still_lost < 0.9 * lost
        visited += 1
    assert visited == {"llama": 14, "gpt2": 8}[family]


@pytest.mark.parametrize(
    ("bits", "options", "flag", "word"),
    [
        (4, {"lora_init": "pissa"}, "--lora_init", "--bits 16 or 32"),
        (8, {"lora_init": "pissa"}, "--lora_init", "8-bit"),
        (8, {"lora_init": "loftq"}, "--lora_init", "--bits 4"),
        (32, {"lora_init": "loftq"}, "--lora_init", "--bits 4"),
        (32, {"lora_init": "pissa", "use_dora": True}, "--use_dora", "contradict"),
        (4, {"lora_init": "loftq", "use_dora": True}, "--use_dora", "contradict"),
        (8, {"use_dora": True}, "--bits", "DoRA on CPU"),
    ],
)
def test_combinations_that_cannot_work(bits, options, flag, word, load_family) -> None:
    with pytest.raises(ConfigError) as caught:
        add_lora(load_family("llama", bits).model, LoraOptions(**options))
    assert caught.value.flag == flag and word in str(caught.value)


# --- saving


def test_saved_files_are_repeatable_and_name_their_base(load_family, family_directory, tmp_path) -> None:
    model = train(add_lora(load_family("llama").model, LoraOptions()))
    save_adapter(model, tmp_path / "one")
    save_adapter(model, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert targets == sorted(targets) and targets
    assert base_of_adapter(tmp_path / "one") == str(family_directory("llama"))
    assert model.peft_config["default"].inference_mode is False  # saving changes nothing in the live model
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_not_saved(value, load_family, tmp_path) -> None:
    model = train(add_lora(load_family("llama").model, LoraOptions()), steps=1)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight")[0, 0] = value
    with pytest.raises(ModelError, match=r"NaN or Inf in 1 of 28 .*layers.1.mlp.up_proj.lora_A"):
        save_adapter(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_empty_is_not_saved(load_family, tmp_path, monkeypatch) -> None:
    model = add_lora(load_family("llama").model, LoraOptions())
    for nothing in ({}, {"a.lora_A.weight": torch.zeros(0, 4)}):
        monkeypatch.setattr(adapters, "live_tensors", lambda _, tensors=nothing: tensors)
        with pytest.raises(ModelError, match="is empty"):
            save_adapter(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_untrained_is_said(load_family, tmp_path, capsys) -> None:
    model = add_lora(load_family("llama").model, LoraOptions())
    save_adapter(model, tmp_path)
    assert "every lora_B is zero" in capsys.readouterr().err
    save_adapter(train(model, steps=1), tmp_path)
    assert capsys.readouterr().err == ""


def test_what_the_disk_gave_back_is_compared(load_family, tmp_path, monkeypatch) -> None:
    model = train(add_lora(load_family("llama").model, LoraOptions()), steps=1)

    def flipped(path: Path) -> dict[str, torch.Tensor]:
        tensors = load_file(path)
        next(iter(tensors.values()))[0, 0] += 1e-6
        return tensors

    def shorter(path: Path) -> dict[str, torch.Tensor]:
        return dict(list(load_file(path).items())[1:])

    for broken, word in ((flipped, "other values"), (shorter, "missing")):
        monkeypatch.setattr(adapters, "load_file", broken)
        with pytest.raises(ModelError, match=word):
            save_adapter(model, tmp_path)


def test_inside_a_wrapper(load_family, tmp_path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    model = train(add_lora(load_family("llama").model, LoraOptions()), steps=1)
    save_adapter(Wrapper(Wrapper(model)), tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 28


# --- loading and restoring


@pytest.mark.parametrize("trainable", [True, False])
def test_loaded_adapter_trains_only_when_asked(trainable, load_family, tmp_path) -> None:
    model = train(add_lora(load_family("llama", 4).model, LoraOptions(lora_dropout=0.1)))
    save_adapter(model, tmp_path)
    again = load_adapter(load_family("llama", 4).model, tmp_path, trainable=trainable).model
    for name, parameter in again.named_parameters():
        assert parameter.requires_grad == (trainable and "lora_" in name), name
    assert {p.dtype for n, p in again.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.equal(logits(again.eval()), logits(model))
    if trainable:
        assert train(again) and not torch.equal(logits(again), logits(model))


def test_another_base_is_refused_with_the_differences(load_family, tmp_path, cpu) -> None:
    save_adapter(train(add_lora(load_family("llama").model, LoraOptions()), steps=1), tmp_path / "adapter")
    sizes = {"wide": {"intermediate_size": 192}, "short": {"num_hidden_layers": 1}, "long": {"num_hidden_layers": 3}}
    words = {
        "wide": ["mlp.down_proj.lora_A.weight: (8, 128) in the files, (8, 192) needed here", "6 tensors differ"],
        "short": ["layers.1.mlp.down_proj.lora_A.weight: this base has no such layer", "and 4 more"],
        "long": ["layers.2.mlp.down_proj.lora_A.weight: missing in the files"],
    }
    for name, changes in sizes.items():
        base = load_family("llama", model_path=save_family("llama", tmp_path / name, **changes)).model
        before = logits(base)
        with pytest.raises(ModelError) as caught:
            load_adapter(base, tmp_path / "adapter", trainable=True)
        for word in words[name]:
            assert word in str(caught.value)
        assert torch.equal(logits(base), before) and not any("lora" in n for n, _ in base.named_modules())
    with pytest.raises(ModelError, match="does not fit this base"):
        load_adapter(load_family("bloom").model, tmp_path / "adapter", trainable=True)


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (4, {}),
        (16, {}),
        (32, {"lora_init": "pissa"}),
        (16, {"lora_init": "pissa"}),
        (4, {"lora_init": "loftq"}),
        (4, {"use_dora": True}),
        (8, {}),
    ],
)
def test_restore_is_bitwise_and_in_place(bits, options, load_family, tmp_path) -> None:
    model = train(add_lora(load_family("llama", bits).model, LoraOptions(lora_r=4, **options)))
    wanted, answer = trained_values(model), logits(model)
    save_adapter(model, tmp_path)

    torch.manual_seed(123)  # a resumed process has drawn other numbers before
    fresh = add_lora(load_family("llama", bits).model, LoraOptions(lora_r=4, **options))
    parameters = {name: p for name, p in fresh.named_parameters() if "lora_" in name}
    restore_adapter(fresh, tmp_path)
    assert parameters.keys() == wanted.keys() and len(wanted) >= 28
    for name, parameter in parameters.items():
        assert torch.equal(parameter, wanted[name]), name
        assert fresh.get_parameter(name) is parameter
    assert torch.equal(logits(fresh.eval()), answer)
    save_adapter(fresh, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_restore_pissa_from_another_card(family, load_family, tmp_path) -> None:
    """Another card's SVD may turn a singular vector: the same base, split otherwise."""
    model = train(add_lora(load_family(family).model, LoraOptions(lora_r=4, lora_init="pissa")))
    save_adapter(model, tmp_path)
    wanted = trained_values(model)
    other = add_lora(load_family(family).model, LoraOptions(lora_r=4, lora_init="pissa"))
    with torch.no_grad():
        for name, layer in other.named_modules():
            if hasattr(layer, "lora_A"):  # leave the weakest direction in the base
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                change = layer.scaling["default"] * b[:, 3:] @ a[3:]
                layer.base_layer.weight += change.T if layer.fan_in_fan_out else change
                a[3:] = 0
                for start in (adapters._pissa_starts[other],):
                    start[f"{name}.lora_A.weight"][3:] = 0
    restore_adapter(other, tmp_path)
    assert all(torch.equal(p, wanted[n]) for n, p in other.named_parameters() if n in wanted)
    assert torch.allclose(logits(other.eval()), logits(model), atol=5e-5)


def test_restore_refuses_another_rank(load_family, tmp_path) -> None:
    save_adapter(train(add_lora(load_family("llama").model, LoraOptions(lora_r=4)), steps=1), tmp_path)
    model = add_lora(load_family("llama").model, LoraOptions(lora_r=8))
    before = trained_values(model)
    with pytest.raises(ModelError, match=r"\(4, 64\) in the files, \(8, 64\) needed here"):
        restore_adapter(model, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in trained_values(model).items())


def test_other_kinds_of_adapter_are_refused(load_family, tmp_path) -> None:
    save_adapter(train(add_lora(load_family("llama").model, LoraOptions()), steps=1), tmp_path)
    config = tmp_path / "adapter_config.json"
    good = json.loads(config.read_text(encoding="utf-8"))
    for change, word in (
        ({"peft_type": "ADAPTION_PROMPT"}, "is an adaption-prompt adapter, which cannot be loaded here"),
        ({"peft_type": "ADALORA"}, "cannot be used: AdaLoRA does not work when `total_step` is None"),
        ({"init_lora_weights": "pissa"}, "unconverted"),
        ({"r": -1}, "cannot be used|does not fit"),
    ):
        config.write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(ModelError, match=word):
            load_adapter(load_family("llama").model, tmp_path, trainable=True)
    config.write_text("[", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_adapter(load_family("llama").model, tmp_path, trainable=True)


def test_nan_in_a_file_is_refused(load_family, tmp_path) -> None:
    save_adapter(train(add_lora(load_family("llama").model, LoraOptions()), steps=1), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="NaN or Inf in 1 of 28"):
        load_adapter(load_family("llama").model, tmp_path, trainable=False)
