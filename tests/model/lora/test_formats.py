"""Adapters as earlier kits left them, built here byte for byte in those forms."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from onecard.config.given_paths import path_problems
from onecard.config.lora import LoraOptions
from onecard.errors import ModelError
from onecard.model.lora.adapter import add_lora, load_adapter, restore_adapter, save_adapter
from onecard.model.lora.formats import base_of_adapter, read_adapter
from tests.model.lora.test_adapter import logits, train


@pytest.fixture(scope="module")
def today(tmp_path_factory, load_family) -> Path:
    """A trained adapter, r 4, alpha 8, in today's form, with the logits that it gives."""
    directory = tmp_path_factory.mktemp("today")
    torch.manual_seed(0)
    model = train(add_lora(load_family("llama").model, LoraOptions(lora_r=4, lora_alpha=8)))
    save_adapter(model, directory)
    torch.save(logits(model), directory / "logits.pt")
    return directory


def tensors_of(today: Path) -> dict[str, torch.Tensor]:
    return load_file(today / "adapter_model.safetensors")


def same(today: Path, source: Path, load_family, **options) -> list[str]:
    """Load `source`, check that the logits are those of the adapter in today's form, return the notes."""
    loaded = load_adapter(load_family("llama").model, source, trainable=False, **options)
    assert torch.equal(logits(loaded.model), torch.load(today / "logits.pt", weights_only=True))
    return loaded.notes


def test_adapter_model_bin(today, load_family, tmp_path) -> None:
    torch.save(tensors_of(today), tmp_path / "adapter_model.bin")
    shutil.copy(today / "adapter_config.json", tmp_path)
    assert same(today, tmp_path, load_family) == ["older layout: read adapter_model.bin"]
    assert same(today, tmp_path / "adapter_model.bin", load_family)


@pytest.mark.parametrize("spelling", ["plain", "default", "wrapped", "bare"])
def test_checkpoint_without_config(spelling, today, load_family, tmp_path) -> None:
    """pytorch_model.bin with lora keys among others, rank and targets only in the shapes."""
    rename = {
        "plain": lambda key: key,  # base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
        "default": lambda key: key.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        ),
        "wrapped": lambda key: f"module.{key}",
        "bare": lambda key: key.removeprefix("base_model.model."),
    }[spelling]
    state = {rename(key): tensor for key, tensor in tensors_of(today).items()}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors_of(today)
    checkpoint = tmp_path / "checkpoint-200"
    checkpoint.mkdir()
    torch.save({**state, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, checkpoint / "pytorch_model.bin")
    notes = "\n".join(same(today, checkpoint, load_family))
    assert "older layout: read pytorch_model.bin" in notes and "1 tensors that are not LoRA's" in notes
    assert "took r = 4 and 14 target layers" in notes and "assumed lora_alpha = 8 (2 r)" in notes
    written = notes.partition(f"write it into {checkpoint / 'adapter_config.json'}: ")[2].splitlines()[0]
    (checkpoint / "adapter_config.json").write_text(written.replace('"lora_alpha": 8', '"lora_alpha": 4'))
    loaded = load_adapter(load_family("llama").model, checkpoint, trainable=False)
    assert loaded.model.peft_config["default"].lora_alpha == 4 and not any("assumed" in note for note in loaded.notes)
    assert not torch.allclose(logits(loaded.model), torch.load(today / "logits.pt", weights_only=True), atol=1e-3)


def test_some_layers_and_mixed_ranks(today, load_family, tmp_path) -> None:
    state = {key: tensor for key, tensor in tensors_of(today).items() if "q_proj" in key or "v_proj" in key}
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    state[f"{key}.lora_A.weight"] = torch.ones(6, 64)
    state[f"{key}.lora_B.weight"] = torch.ones(64, 6)
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = load_adapter(load_family("llama").model, tmp_path, trainable=True).model
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert len(shapes) == 8 and shapes[f"{key}.lora_A.default.weight"] == (6, 64)


def test_config_one_directory_up(today, load_family, tmp_path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    torch.save(tensors_of(today), checkpoint / "pytorch_model.bin")
    shutil.copy(today / "adapter_config.json", tmp_path / "run")
    notes = same(today, checkpoint, load_family)
    assert any("checkpoint-7 has no adapter_config.json; took the one of" in note for note in notes)


def test_run_directory_without_final_adapter(today, load_family, tmp_path) -> None:
    for step in (9, 10, 100):
        target = Path(shutil.copytree(today, tmp_path / f"checkpoint-{step}"))
        if step == 100:  # unfinished: nothing but a configuration
            (target / "adapter_model.safetensors").unlink()
    notes = same(today, tmp_path, load_family)
    assert any("took its newest checkpoint, checkpoint-10" in note for note in notes)
    assert base_of_adapter(tmp_path) == base_of_adapter(today) is not None


def test_restore_reads_older_layouts_too(today, load_family, tmp_path) -> None:
    torch.save(tensors_of(today), tmp_path / "pytorch_model.bin")
    model = add_lora(load_family("llama").model, LoraOptions(lora_r=4, lora_alpha=8))
    restore_adapter(model, tmp_path)
    assert torch.equal(logits(model.eval()), torch.load(today / "logits.pt", weights_only=True))


def test_fp16_files_become_fp32_adapters(today, load_family, tmp_path) -> None:
    half = {key: tensor.half() for key, tensor in tensors_of(today).items()}
    save_file(half, tmp_path / "adapter_model.safetensors")
    shutil.copy(today / "adapter_config.json", tmp_path)
    model = load_adapter(load_family("llama").model, tmp_path, trainable=True).model
    live = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(live) == 28 and {p.dtype for p in live.values()} == {torch.float32}
    assert all(torch.equal(p, half[n.replace(".default", "")].float()) for n, p in live.items())


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "code ran")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_code_in_a_pickle_is_refused_and_not_run(name, zipped, today, load_family, tmp_path) -> None:
    ran = tmp_path / "ran"
    torch.save(
        {**tensors_of(today), "x.lora_A.weight": Malicious(ran)}, tmp_path / name, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ModelError, match=r"holds code.*Nothing in it was run"):
        load_adapter(load_family("llama").model, tmp_path, trainable=False)
    assert not ran.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert ran.read_text(encoding="utf-8") == "code ran"  # so it would have run


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"base_model.model.lm_head.weight": torch.zeros(2)}, "no LoRA tensors"),
        ({}, "no LoRA tensors"),
        ([torch.zeros(2)], "something else than named tensors"),
        ({"a.lora_B.weight": torch.zeros(2, 2)}, "no lora_A"),
    ],
)
def test_files_that_are_no_adapter(content, word, load_family, tmp_path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=word):
        load_adapter(load_family("llama").model, tmp_path, trainable=False)


@pytest.mark.parametrize(("kind", "word", "remedy"), [
    ("MULTITASK_PROMPT_TUNING", "a prompt-tuning", "train a LoRA"), ("BOFT", "BOFT", "merge_and_unload"),
])  # fmt: skip
def test_other_kinds_of_adapters_are_called_what_they_are(kind, word, remedy, tmp_path) -> None:
    """As peft writes them, with the configuration; it is told before anything is loaded, and by the loader."""
    kwargs = {
        "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "BOFT": peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]),
    }  # fmt: skip
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **shape))
    peft.get_peft_model(model, kwargs[kind]).save_pretrained(tmp_path)
    pattern = rf"is {word} adapter, which cannot be loaded here.*{remedy}"
    with pytest.raises(ModelError, match=pattern):
        read_adapter(tmp_path)
    (problem,) = path_problems({"lora_path": str(tmp_path)})
    assert re.search(pattern, problem[1])


def test_damaged_and_missing_files(today, load_family, tmp_path) -> None:
    damaged = Path(shutil.copytree(today, tmp_path / "damaged"))
    content = (damaged / "adapter_model.safetensors").read_bytes()
    (damaged / "adapter_model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged"):
        read_adapter(damaged)
    (damaged / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no adapter"):
        read_adapter(damaged)
    (damaged / "adapter_model.bin").write_bytes(content[:50])
    with pytest.raises(ModelError, match=r"adapter_model\.bin is"):
        read_adapter(damaged)
    with pytest.raises(ModelError, match=r"adapter: no directory .*did you mean .*damaged"):
        read_adapter(tmp_path / "damagd")


def test_a_checkpoint_of_this_project_is_plain_peft(today) -> None:
    config = json.loads((today / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["init_lora_weights"] is True and config["inference_mode"] is True and config["peft_type"] == "LORA"
