from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from onecard.config.base_model import ModelOptions
from onecard.errors import ConfigError, ModelError
from onecard.model.load import base_fingerprint, load_base, load_tokenizer
from onecard.model.quantised_loading import quantization_config
from tests.model.model_families import save_family

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def llama(family_directory, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(family_directory("llama"), tmp_path / "models" / "tiny-llama"))


def load(path: Path | str, cpu, **options):
    return load_base(ModelOptions(model_path=str(path), **{"bits": 32, **options}), cpu)


def refused(path: Path | str, cpu, *words: str, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load(path, cpu, **options)
    text = str(caught.value)
    for word in words:
        assert word in text
    return text


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


# --- what is loaded


@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, torch.float32), (8, torch.float32), (16, torch.bfloat16), (32, torch.float32)]
)
def test_frozen_and_never_upcast(bits, dtype, family_directory, cpu) -> None:
    base = load(family_directory("llama"), cpu, bits=bits)
    assert base.dtype == dtype and base.dtype_reason.startswith({torch.bfloat16: "bf16"}.get(dtype, "fp32"))
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    floating = {p.dtype for p in base.model.parameters() if p.is_floating_point()}
    assert floating <= {dtype}


@pytest.mark.parametrize("bits", [4, 8])
def test_bf16_arithmetic_on_quantised_weights_keeps_embeddings_and_norms_in_bf16(bits, family_directory, cpu) -> None:
    model = load(family_directory("llama"), cpu, bits=bits, dtype="bf16").model
    named = {name: p.dtype for name, p in model.named_parameters() if "proj" not in name}
    assert len(named) == 7 and set(named.values()) == {torch.bfloat16}


def test_norms_compute_in_fp32_inside(family_directory, cpu) -> None:
    """Why norm weights need no upcast: 300 squared overflows fp16, and a norm in fp16 weights is right all the same."""
    norm = load(family_directory("llama"), cpu).model.model.norm.to(torch.float16)
    rows = torch.full((1, 64), 300.0, dtype=torch.float16)
    assert torch.allclose(norm(rows).float(), torch.ones(1, 64) * norm.weight.float(), atol=1e-3)


def test_quantised_base_is_near_the_original(family_directory, cpu) -> None:
    ids = torch.arange(3, 20)[None]
    logits = {bits: load(family_directory("llama"), cpu, bits=bits).model(ids).logits for bits in (4, 8, 32)}
    errors = {bits: (logits[bits] - logits[32]).norm() / logits[32].norm() for bits in (4, 8)}
    assert 0 < errors[8] < errors[4] < 0.5


def test_dropout_of_the_base_is_off(load_family) -> None:
    model = load_family("gpt2").model.train()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_layers_stay_whole(load_family) -> None:
    """The decoder layer is the unit that is loaded, placed and hooked: no wrapper, no hook of accelerate's."""
    model = load_family("llama", 4).model
    assert [type(layer).__name__ for layer in model.model.layers] == ["LlamaDecoderLayer"] * 2
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


def test_checkpoint_quantised_before_is_taken_as_it_is(family_directory, cpu, tmp_path) -> None:
    source = AutoModelForCausalLM.from_pretrained(
        family_directory("llama"), quantization_config=quantization_config(4, torch.float32), device_map={"": "cpu"}
    )
    source.save_pretrained(tmp_path)
    model = load(tmp_path, cpu, bits=4).model
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, source(ids).logits)
    with pytest.raises(ConfigError, match="use --bits 4"):
        load(tmp_path, cpu, bits=8)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="gptq, 4 bits"):
        load(tmp_path, cpu, bits=4)


def test_shards_and_bf16_on_disk(tmp_path, cpu) -> None:
    save_family("llama", tmp_path, dtype=torch.bfloat16)
    model = load(tmp_path, cpu, bits=16).model
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load(tmp_path / "shards", cpu, bits=16).model(ids).logits, model(ids).logits)
    shards[1].unlink()
    refused(tmp_path / "shards", cpu, shards[1].name, "lacks 1 of")


# --- what is refused, and how


def test_missing_directory_names_the_nearest(llama, cpu) -> None:
    refused(llama.parent / "tiny-lama", cpu, "no directory", "did you mean", "tiny-llama")
    refused(llama.parent / "nothing-like-it", cpu, "no directory", "or a Hub id")
    refused("./no-such", cpu, "no directory ./no-such")
    refused(llama / "config.json", cpu, "is a file", str(llama))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors_is_named(keep, llama, cpu) -> None:
    file = llama / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    refused(llama, cpu, "model.safetensors is damaged", f"it has {len(content[:keep])} bytes")
    with pytest.raises(ModelError, match="damaged"):
        base_fingerprint(str(llama))


def test_garbage_safetensors(llama, cpu) -> None:
    (llama / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!" + b"\0" * 99)
    refused(llama, cpu, "header is not readable")


def test_no_weights_no_config_not_json(llama, cpu) -> None:
    (llama / "model.safetensors").rename(llama / "weights.safetensors")
    refused(llama, cpu, "holds no weights", "weights.safetensors")
    (llama / "config.json").write_text("{", encoding="utf-8")
    refused(llama, cpu, "config.json cannot be read as JSON")
    (llama / "config.json").unlink()
    refused(llama, cpu, "config.json is missing")
    (llama / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(llama, cpu, "a LoRA adapter; its base goes into --model_path")


def test_missing_tensors_are_not_filled_with_random_numbers(llama, cpu) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    refused(llama, cpu, "lacks 1 tensors", "model.layers.1.mlp.up_proj.weight")


def test_other_shapes_than_the_config(llama, cpu) -> None:
    edit_config(llama, intermediate_size=192)
    refused(llama, cpu, "cannot be loaded", "other shapes")


def test_unknown_too_new_not_causal_and_own_code(llama, cpu) -> None:
    edit_config(llama, model_type="llamma")
    refused(llama, cpu, "does not know the model type 'llamma'", "Install a newer transformers")
    edit_config(llama, model_type="brand_new", transformers_version="99.0.0")
    refused(llama, cpu, "'brand_new'", "was written by transformers 99.0.0", "install that version or a newer one")
    edit_config(llama, model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused(llama, cpu, "is an encoder-decoder")
    edit_config(llama, model_type="vit", architectures=["ViTModel"])
    refused(llama, cpu, "no causal language model")
    edit_config(llama, model_type="own", auto_map={"AutoModelForCausalLM": "own.Model"})
    (llama / "own.py").write_text(f"open({str(llama / 'ran')!r}, 'w')\n", encoding="utf-8")
    refused(llama, cpu, "its own Python code", "--trust_remote_code")
    assert not (llama / "ran").exists()


def test_own_code_runs_with_the_flag_only(llama, cpu) -> None:
    edit_config(
        llama, model_type="own_llama", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    )
    (llama / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    refused(llama, cpu, "its own Python code")
    assert type(load(llama, cpu, trust_remote_code=True).model).__name__ == "OwnModel"


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "code ran")


def test_pickled_weights_load_as_tensors_only(llama, cpu, family_directory, capsys) -> None:
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load(llama, cpu).model(ids).logits, load(family_directory("llama"), cpu).model(ids).logits)
    assert "pickled weights" in capsys.readouterr().out
    ran = llama / "ran"
    torch.save({"model.norm.weight": Malicious(ran)}, llama / "pytorch_model.bin")
    refused(llama, cpu, "code inside", "nothing was run")
    assert not ran.exists()
    assert pickle.loads(pickle.dumps(Malicious(ran))) and ran.exists()  # so the pickle would have run


def test_attention_kernel_that_is_not_there(llama, cpu) -> None:
    assert load(llama, cpu, attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="--attn_implementation"):
        load(llama, cpu, attn_implementation="flash_attention_2")


# --- tokenizer


def test_tokenizer(llama) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(str(llama))
    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>").save_pretrained(llama)
    assert load_tokenizer(str(llama))("a", add_special_tokens=False).input_ids == [1]
    (llama / "tokenizer.json").write_text('{"broken": ', encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(str(llama))


# --- fingerprint


def test_fingerprint_tells_bases_apart(llama, family_directory, tmp_path) -> None:
    same = base_fingerprint(str(llama))
    assert same == base_fingerprint(str(family_directory("llama"))) and len(same) == 64
    edit_config(llama, transformers_version="4.0.0")
    assert base_fingerprint(str(llama)) == same
    edit_config(llama, rope_theta=12345.0)
    assert base_fingerprint(str(llama)) != same
    sister = Path(shutil.copytree(family_directory("llama"), tmp_path / "sister"))
    tensors = {name: tensor + 1e-3 for name, tensor in load_file(sister / "model.safetensors").items()}
    save_file(tensors, sister / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(str(sister)) != same  # same shapes, other training


# --- no network

OFFLINE = """
import sys, time
from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.console import run_main
from onecard.model.lora.adapter import add_lora
from onecard.model.hardware import detect
from onecard.model.load import load_base, load_tokenizer
name, start = "some-org/some-model", time.perf_counter()
code = run_main(lambda: load_base(ModelOptions(model_path=name), detect("cpu")), debug=False)
code += run_main(lambda: load_tokenizer(name), debug=False)
print("seconds", time.perf_counter() - start, code)
if sys.argv[1] == "cached":
    base = load_base(ModelOptions(model_path="some-org/cached", bits=4), detect("cpu"))
    print("named", add_lora(base.model, LoraOptions()).peft_config["default"].base_model_name_or_path)
"""


@pytest.mark.parametrize("offline", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_hub_id_without_network_is_one_clear_line(offline, family_directory, tmp_path) -> None:
    cached = tmp_path / "hub" / "models--some-org--cached"
    shutil.copytree(family_directory("llama"), cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    # A port where nobody listens stands for "no network" on machines that have one.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "cached"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all("some-org/some-model" in line for line in errors), done.stderr
    assert "base model" in errors[0] and "tokenizer" in errors[1]
    assert all("go online, or give a directory" in line for line in errors)
    _, seconds, code = next(line for line in done.stdout.splitlines() if line.startswith("seconds")).split()
    assert float(seconds) < 20 and code == "2"
    assert "named some-org/cached" in done.stdout  # what lies in the cache works, and keeps its Hub name
