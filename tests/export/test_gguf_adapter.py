"""`onecard gguf --adapter_only`: the file holds what PEFT applies, and what it cannot hold is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from onecard.console import run_main
from onecard.export.gguf.layout import read_layout
from onecard.programs import gguf as program
from tests.export import gguf_models

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 8},
                 "alpha_pattern": {"down_proj": 3, "0.self_attn.k_proj": 20}},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
}  # fmt: skip


def save_adapter(base: Path, directory: Path, config: Any) -> Any:
    """The PEFT model of random matrices, its adapter saved."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hada" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    return model.eval()


def exported(base: Path, adapter: Path, output: Path, *words: str) -> int:
    start = ["--model_path", str(base), "--lora_path", str(adapter), "--output_path", str(output), "--adapter_only"]
    return run_main(lambda: program.main([*start, *words]), debug=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def get(family: str) -> Path:
        if not (folder / family).exists():
            gguf_models.save_model(folder / family, family)
        return folder / family

    return get


@pytest.mark.parametrize(("family", "settings"), [("llama", "plain"), ("llama", "patterns"), ("qwen3", "rslora")])
def test_the_file_applies_what_peft_applies(
    family: str, settings: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(family)
    model = save_adapter(base, tmp_path / "a", LoraConfig(**SETTINGS[settings], target_modules=TARGETS))
    assert exported(base, tmp_path / "a", tmp_path / "out", "--gguf_type", "f32", "--adapter_scale", "0.5") == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter-f32.gguf")
    layout = read_layout(base)
    values = {key: reader.get_field(key).contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert values == {"general.type": "adapter", "general.architecture": layout.architecture, "adapter.type": "lora"}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.architecture.upper()], layout.n_layers)
    compared = 0
    for module, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        wanted = 0.5 * layer.get_delta_weight("default")
        if layout.architecture == "llama" and re.search("[qk]_proj", module):
            heads = layout.n_heads if "q_proj" in module else layout.n_kv_heads
            wanted = wanted.reshape(heads, 2, -1, wanted.shape[1]).swapaxes(1, 2).reshape(wanted.shape)
        torch.testing.assert_close(alpha / b.shape[1] * b @ a, wanted, rtol=1e-5, atol=1e-6)
        compared += 1
    assert compared == 14 == len(found) / 2
    assert "ADAPTER ./adapter-f32.gguf" in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8").splitlines()[1]


@pytest.mark.parametrize(
    ("config", "says"),
    [(LoraConfig(use_dora=True, target_modules=TARGETS), "DoRA adapter"),
     (LoHaConfig(target_modules=TARGETS), "LOHA adapter"),
     (LoraConfig(target_modules=[*TARGETS, "embed_tokens"]), "trained embeddings"),
     (LoraConfig(target_modules=TARGETS, modules_to_save=["lm_head"]), "more than LoRA"),
     (LoraConfig(target_modules=TARGETS, lora_bias=True), "more than LoRA")],
    ids=["dora", "loha", "embeddings", "head", "bias"],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused_by_name(
    config: Any, says: str, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(bases("llama"), tmp_path / "a", config)
    assert exported(bases("llama"), tmp_path / "a", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert says in said and "leave --adapter_only out" in said
    assert not (tmp_path / "out").exists()


def test_other_bases_and_kinds_are_refused(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(bases("llama"), tmp_path / "a", LoraConfig(target_modules=TARGETS))
    for words, code, says in (
        ((bases("mistral"), tmp_path / "a", tmp_path / "o1"), 1, "trained on another base"),
        ((bases("llama"), tmp_path / "a", tmp_path / "o2", "--gguf_type", "q8_0"), 2, "--gguf_type"),
        ((bases("llama"), Path(f"{tmp_path / 'a'},{tmp_path / 'a'}"), tmp_path / "o3"), 2, "2 adapters"),
        ((bases("llama"), "", tmp_path / "o4"), 2, "needs an adapter"),
    ):
        assert exported(*words) == code  # type: ignore[arg-type]
        assert says in capsys.readouterr().err
        assert not Path(words[2]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", gguf_models.FAMILIES)
def test_llama_cpp_answers_as_peft_does(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Base as f32, adapter as f32: the logits of 40 positions to 1e-4 of their spread."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it compiles for minutes")
    base = bases(family)
    model = save_adapter(base, tmp_path / "a", LoraConfig(**SETTINGS["patterns"], target_modules=TARGETS))
    program.main(["--model_path", str(base), "--output_path", str(tmp_path / "base"), "--gguf_type", "f32"])
    assert exported(base, tmp_path / "a", tmp_path / "out", "--gguf_type", "f32") == 0
    ids = list(range(5, 45))
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
        with model.disable_adapter():
            without = model(torch.tensor([ids])).logits[0].numpy()
    llama = llama_cpp.Llama(
        str(tmp_path / "base" / "model-f32.gguf"), lora_path=str(tmp_path / "out" / "adapter-f32.gguf"), n_ctx=64,
        n_threads=1, verbose=False, type_k=0, type_v=0, logits_all=True,
    )  # fmt: skip
    try:
        llama.eval(ids)
        found = np.array(llama.scores[: len(ids)])
    finally:
        llama.close()
    assert np.abs(found - wanted).max() < 1e-4 * wanted.std()
    assert np.abs(found - without).max() > 0.1 * wanted.std()
