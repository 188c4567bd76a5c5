"""--peft_method full and freeze:N: learned, resumed bit for bit, planned, and a model that all else takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from benchmarks.plan_accuracy import peaks, toy_config
from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError, ModelError
from onecard.export.merge.merge import merge_into
from onecard.export.merge.options import MergeSettings
from onecard.inference.load import load_bundle
from onecard.inference.run_files import stored_options
from onecard.model.hardware import detect
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import MemoryConfig, account
from onecard.model.memory.tensor_sizes import FP32, n_trained
from onecard.model.trained import describe_trained, make_trainable
from onecard.programs.gguf import main as gguf
from onecard.recipes import finetune
from onecard.train.optim import build_optimizer, default_learning_rate
from tests import tiny
from tests.runs import final_checkpoint, run_and_stop

IDS = torch.tensor([[1, 5, 9, 33, 7, 120, 64, 3]])
TRAINED, GENERATION = "trained_weights.safetensors", "generation_config.json"


@pytest.fixture(autouse=True)
def _own_number_format() -> Iterator[None]:
    """accelerate keeps one for the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def config(base: Path, data: Path, output: Path, method: str, bits: int, **changes: Any) -> FinetuneConfig:
    settings = {"peft_method": method, "bits": bits, "num_epoch": 2, "save_steps": 100, "learning_rate": 2e-3}
    return tiny.config_for(base, data, output, **{**settings, **changes})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("method", "bits"),
    [("full", 16), pytest.param("full", 32, marks=pytest.mark.slow), ("freeze:1", 32),
     pytest.param("freeze:1", 16, marks=pytest.mark.slow)],
)  # fmt: skip
def test_it_learns_goes_on_bitwise_and_is_a_model(method, bits, tiny_base, instructions, tmp_path, monkeypatch) -> None:
    straight = finetune(config(tiny_base, instructions, tmp_path / "straight", method, bits))
    losses = [loss for _, loss in tiny.losses_of(straight)]
    assert losses[-1] < losses[0] - 0.1, losses
    cut = config(tiny_base, instructions, tmp_path / "run", method, bits)
    run_and_stop(cut, monkeypatch, after_steps=3)
    killed, _ = load_bundle(ModelOptions("auto", bits=bits, device="cpu"), str(tmp_path / "run"), "auto")
    resumed = finetune(cut)
    assert tiny.losses_of(resumed) == tiny.losses_of(straight)
    files = [(final_checkpoint(run) / TRAINED).read_bytes() for run in (straight, resumed)]
    assert files[0] == files[1]
    states = [torch.load(final_checkpoint(run) / "optimizer.pt", weights_only=True) for run in (straight, resumed)]
    assert tiny.same_values(*states)

    whole = transformers.AutoModelForCausalLM.from_pretrained(straight)
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=whole.dtype)
    assert whole.dtype == (torch.float32 if bits == 32 else torch.bfloat16)
    bundle, depends_on = load_bundle(ModelOptions("auto", bits=bits, device="cpu"), str(resumed), "auto")
    assert torch.equal(logits(whole), logits(bundle.model)) and depends_on["adapter"] is None
    assert stored_options(str(straight))["model_path"] == str(straight)
    stored = tiny.tensors_of(final_checkpoint(straight) / TRAINED)
    for name, weight in whole.named_parameters():
        expected = stored[name].to(weight.dtype) if name in stored else before.get_parameter(name)
        assert torch.equal(weight, expected), name
    assert {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"} <= stored.keys()
    assert ("model.layers.0.mlp.up_proj.weight" in stored) == ("lm_head.weight" in stored) == (method == "full")
    half_way = logits(killed.model)
    assert not torch.equal(half_way, logits(before)) and not torch.equal(half_way, logits(whole))


def test_what_asks_for_an_adapter_is_told_and_gguf_takes_the_model(tiny_base, instructions, tmp_path, capsys) -> None:
    settings = {"final_weights": "average:2", "save_steps": 2, "keep_checkpoints": 2}
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    # Sampling that is off with a temperature: transformers reads such files and refuses to write them.
    (base / GENERATION).write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 2}', encoding="utf-8")
    run = finetune(config(base, instructions, tmp_path / "run", "freeze:2", 32, **settings))
    means = [tiny.tensors_of(run / f"checkpoint-{step}" / TRAINED) for step in (4, 6)]
    name = "model.layers.0.mlp.up_proj.weight"
    mean = ((means[0][name].double() + means[1][name].double()) / 2).float()
    assert torch.equal(tiny.tensors_of(run / "model.safetensors")[name], mean)
    assert "model of the mean of steps 4, 6 saved in" in capsys.readouterr().out
    assert (run / GENERATION).read_bytes() == (base / GENERATION).read_bytes()
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    (tmp_path / "merged").mkdir()
    for source, said in (
        (run, "is a whole model, .* nothing to merge"),
        (run / "checkpoint-6", "holds trained weights"),
    ):
        with pytest.raises(ModelError, match=said):
            merge_into(tmp_path / "merged", str(tiny_base), [str(source)], MergeSettings(dtype="fp32"))
        with pytest.raises(ModelError, match=said):
            finetune(tiny.config_for(tiny_base, instructions, tmp_path / "next", init_adapter=str(source)))
    gguf(["--model_path", str(run), "--gguf_type", "f16", "--output_path", str(tmp_path / "gguf")])
    assert list((tmp_path / "gguf").glob("*.gguf"))
    other = tiny.save_tiny_llama(tmp_path / "other", layers=1)
    shutil.rmtree(tmp_path / "next", ignore_errors=True)
    with pytest.raises(ModelError, match=r"does not fit this base.*layers.1"):
        load_bundle(ModelOptions(str(other), bits=32, device="cpu"), str(run / "checkpoint-6"), "auto")


@pytest.mark.parametrize(
    ("words", "said"),
    [("full --bits 4", r"--bits: 4 does not work with --peft_method full: quantised weights cannot be trained"),
     ("freeze:2", r"--bits: 4 does not work with --peft_method freeze:2"),
     ("freeze:0 --bits 16", r"--peft_method: 'freeze:0' is not one of lora, "),
     ("freeze --bits 16", r"--peft_method: 'freeze' is not one of lora, "),
     ("full --bits 16 --lora_r 4", r"--lora_r: does not go with --peft_method full; it has no adapter"),
     ("full --bits 16 --peft_option r=4", r"--peft_option: does not go with --peft_method full"),
     ("full --bits 16 --head_bits 4", r"--head_bits: 4 contradicts --peft_method full"),
     ("full --bits 16 --offload_embeddings on", r"--offload_embeddings: on contradicts --peft_method full"),
     ("full --bits 16 --stream_layers on --gradient_checkpointing on", r"--stream_layers: on does not go with"),
     ("full --bits 16 --objective dpo", r"--objective: dpo does not go with --peft_method full: it compares"),
     ("full --bits 16 --loraplus_ratio 16", r"--loraplus_ratio: does not go with --peft_method full")],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused_by_name(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(FinetuneConfig, ["--peft_method", *words.split()])


def test_more_layers_than_there_are_and_packed_weights_are_refused(tiny_base) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    with pytest.raises(ConfigError, match="--peft_method: freeze:3, but LlamaForCausalLM has 2 layers"):
        make_trainable(model, LoraOptions("freeze:3"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="--peft_method: full cannot train weights that lie quantised"):
        make_trainable(model, LoraOptions("full"))


def test_matrices_decay_and_norms_do_not(tiny_base) -> None:
    model = make_trainable(transformers.AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(False),
                           LoraOptions("full"))  # fmt: skip
    options = replace(tiny.config_for(tiny_base, tiny_base, tiny_base).train, weight_decay=0.1)
    decay = {p.dim(): group["weight_decay"] for group in build_optimizer(model, options).param_groups
             for p in group["params"]}  # fmt: skip
    assert decay == {2: 0.1, 1: 0.0}
    assert "131,392 of 131,392 weights are trained (100.00 %)" in describe_trained(model)


def test_the_default_rate_is_a_tenth_of_loras() -> None:
    """Llama-3.1-8B: 2.9e-4 by the rule of adapters, so 2.9e-5."""
    assert default_learning_rate("llama", 4096, method="full")[0] == pytest.approx(2.9e-5)
    rate, reason = default_learning_rate("gpt2", 768, method="freeze:2")
    assert rate == pytest.approx(2e-5) and reason.startswith("a tenth of what LoRA gets, usual for LoRA")


PLANNED = [("llama", "full", 32, True), ("llama", "full", 16, True), ("qwen2", "freeze:2", 16, True),
           ("gpt2", "full", 32, False), ("gemma2", "full", 16, False), ("llama", "freeze:1", 32, False),
           ("mixtral", "full", 32, True)]  # fmt: skip


@pytest.mark.usefixtures("traced_peaks")
@pytest.mark.parametrize(
    ("family", "method", "bits", "again"),
    [pytest.param(*case, marks=[] if number < 2 else pytest.mark.slow) for number, case in enumerate(PLANNED)],
)
def test_its_memory_is_planned(family: str, method: str, bits: int, again: bool) -> None:
    """Trained weights to the number; the whole step, its peak measured by torch's profiler, within 3 %."""
    sizes = {"num_hidden_layers": 4}
    if family == "mixtral":
        sizes |= {"num_local_experts": 4}
    shape = toy_config(family, **sizes)
    if family == "gpt2":
        shape = {
            "model_type": "gpt2",
            "n_embd": 128,
            "n_layer": 4,
            "n_head": 4,
            "vocab_size": 1500,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    setup = MemoryConfig(bits, 2 if bits == 16 else FP32, 2, 192, peft_method=method, loss_chunk=64, on_gpu=False,
                         gradient_checkpointing=again)  # fmt: skip
    model = architecture_of(shape)
    real = make_trainable(model_of(shape), LoraOptions(method))
    assert n_trained(model, setup) == sum(p.numel() for p in real.parameters() if p.requires_grad) > 0
    ratio = account(model, setup).tensor_bytes / peaks(shape, setup, detect("cpu"))["training_bytes"]
    assert 0.97 <= ratio <= 1.03, ratio


def model_of(shape: dict[str, Any]) -> Any:
    settings = transformers.AutoConfig.for_model(**shape)
    return transformers.AutoModelForCausalLM.from_config(settings).requires_grad_(False)
