"""GPTQ with the real gptqmodel on small models: files, formats, bits, loading, refusals, going on after a kill.

One model is quantised once for the quick tests; each further one costs some seconds.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from onecard.config.base_model import DEFAULT_BASE, ModelOptions
from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.errors import ConfigError, ModelError, OneCardError
from onecard.export.quantize.evaluate import round_to_nearest
from onecard.inference.generate import answer_rows, prepare
from onecard.inference.load import load_bundle
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.programs import quantize_gptq
from onecard.recipes import finetune
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
LITTLE = [
    "--calibration_samples",
    "48",
    "--calibration_len",
    "64",
    "--eval_samples",
    "4",
    "--batch_size",
    "16",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, two layers of width 128, with a tokenizer; fp16."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=448, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(directory)
    return tiny.save_sentencepiece_tokenizer(directory)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from within its own folder, where gptqmodel would leave its logs."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return quantised(base, folder / "gptq")


def quantised(base: Path, target: Path, *words: str) -> Path:
    quantize_gptq.main(["--model_path", str(base), "--output_path", str(target), *LITTLE, *words])
    return target


def dequantised(tensors: dict[str, torch.Tensor], layer: str, bits: int) -> torch.Tensor:
    """The weight (out, in) that a v1 file stands for: (q - (zero + 1)) * scale, from the format's definition."""
    q = unpacked(tensors[f"{layer}.qweight"].t(), bits).t()  # (in, out): packed down the rows
    zeros = unpacked(tensors[f"{layer}.qzeros"], bits) + 1  # (groups, out): packed along a row, one less is stored
    group_of, scales = tensors[f"{layer}.g_idx"].long(), tensors[f"{layer}.scales"].float()
    return ((q - zeros[group_of]) * scales[group_of]).t().half().float()  # as the kernels compute it


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words (rows, n) -> numbers (rows, n * 32 / bits): the bits of a row are one stream, lowest first."""
    stream = (words.unsqueeze(-1) >> torch.arange(32)) & 1
    numbers = stream.reshape(words.shape[0], -1, bits)
    return (numbers << torch.arange(bits)).sum(-1)


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The way back of `unpacked`."""
    stream = ((numbers.unsqueeze(-1) >> torch.arange(bits)) & 1).reshape(numbers.shape[0], -1, 32)
    words = (stream.long() << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def logits_of(directory: Path, bits: int = 4) -> torch.Tensor:
    model = load_base(ModelOptions(model_path=str(directory), bits=bits), detect("cpu"), gptq=True).model
    return model(torch.arange(3, 40)[None]).logits


def reference_logits(base: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the plain model with these weights put in place of its own."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return model(torch.arange(3, 40)[None]).logits.detach()


def layers_in(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


@pytest.mark.gptq
def test_files_are_autogptq_v1(base, made) -> None:
    stored = json.loads((made / "quantize_config.json").read_text(encoding="utf-8"))
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == stored
    assert {
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "quant_method": "gptq",
    }.items() <= stored.items()
    assert "/" not in json.dumps(stored)  # no path of this machine
    tensors = load_file(made / "model.safetensors")
    layers = layers_in(tensors)
    assert len(layers) == 14
    for layer in layers:
        assert tensors[f"{layer}.scales"].dtype == torch.float16
        assert (unpacked(tensors[f"{layer}.qzeros"], 4) == 7).all()  # level 8 is zero, and v1 stores one less
        weight = load_file(base / "model.safetensors")[f"{layer}.weight"].float()
        error, rounding = (dequantised(tensors, layer, 4) - weight), round_to_nearest(weight, 4, 128) - weight
        assert error.norm() < 2 * rounding.norm()
    assert (made / "tokenizer.model").is_file()
    assert sorted(made.parent.iterdir()) == [made]  # nothing hidden is left, and no log of gptqmodel's


@pytest.mark.gptq
def test_generate_answers_with_it(base, made) -> None:
    tensors = load_file(made / "model.safetensors")
    weights = {layer: dequantised(tensors, layer, 4) for layer in layers_in(tensors)}
    assert len(weights) == 14
    torch.testing.assert_close(logits_of(made), reference_logits(base, weights), rtol=1e-4, atol=1e-4)
    bundle, _ = load_bundle(ModelOptions(model_path=str(made)), None, "alpaca")
    sampling = SamplingOptions(max_new_tokens=8)
    [answer] = answer_rows(bundle, [prepare(bundle, [Turn("user", "Count to 3")], sampling)], sampling)
    assert 1 <= answer.n_new_tokens <= 8


@pytest.mark.gptq
def test_other_bits_are_reported_in_one_line(made, capsys) -> None:
    assert torch.equal(logits_of(made, bits=8), logits_of(made))
    out = capsys.readouterr().out
    assert out == f"{made} holds GPTQ weights of 4 bits; --bits 8 does not change them\n"


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
def test_training_on_it_is_refused_before_the_data_are_read(base, tmp_path, place) -> None:
    with pytest.raises(ConfigError, match=r"gptq, 4 bits.*unquantised form, with --bits 4"):
        finetune(
            tiny.config_for(said_to_be_gptq(base, tmp_path, place), tmp_path / "no.json", tmp_path / "run", bits=4)
        )


@pytest.mark.gptq
def test_plain_lora_trains_beside_gptqmodel(tiny_base, instructions, tmp_path) -> None:
    """Without optimum beside it, peft would refuse every adapter."""
    for name in ("gptqmodel", "optimum"):
        assert importlib.util.find_spec(name) is not None
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run"))
    steps = tiny.losses_of(run)
    assert len(steps) == 3 and steps[-1][1] < steps[0][1]


def said_to_be_gptq(base: Path, folder: Path, place: str, bits: int = 4) -> Path:
    """A copy of `base` with its plain weights, whose files say that they are GPTQ's."""
    other = folder / "gptq"
    shutil.copytree(base, other)
    stored = {"quant_method": "gptq", "bits": bits, "group_size": 128}
    if place == "config.json":
        stored = {**json.loads((base / place).read_text(encoding="utf-8")), "quantization_config": stored}
    (other / place).write_text(json.dumps(stored), encoding="utf-8")
    return other


def test_without_gptqmodel_one_line_names_the_requirements(base, tmp_path, monkeypatch, capsys) -> None:
    other = said_to_be_gptq(base, tmp_path, "config.json", bits=3)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gptqmodel" else real(name, *rest)
    )
    line = r"which needs gptqmodel( and optimum)?: pip install -r requirements-gptq.txt"
    with pytest.raises(ModelError, match=line):
        load_base(ModelOptions(model_path=str(other)), detect("cpu"), gptq=True)
    with pytest.raises(ModelError, match=line):
        quantised(base, tmp_path / "new", "--lora_path", "nowhere/adapter")  # and before it is merged
    assert not (tmp_path / "new").exists()
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.gptq
@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "model.safetensors"])
def test_old_autogptq_checkpoint(base, tmp_path, name) -> None:
    """Packed here, by the format's definition: config.json says nothing of it, quantize_config.json lies beside."""
    plain = load_file(base / "model.safetensors")
    tensors, weights = {}, {}
    for key, tensor in plain.items():
        if "_proj" not in key:
            tensors[key] = tensor
            continue
        layer, (n_out, n_in) = key.removesuffix(".weight"), tensor.shape
        scales = (tensor.float().reshape(n_out, -1, 128).abs().amax(-1) * 2 / 15).half()  # (out, groups)
        group_of = torch.arange(n_in) // 128
        q = (torch.round(tensor.float() / scales.float()[:, group_of]) + 8).clamp(0, 15).long()
        tensors |= {
            f"{layer}.qweight": packed(q, 4).t().contiguous(), f"{layer}.g_idx": group_of.int(),
            f"{layer}.scales": scales.t().contiguous(), f"{layer}.bias": torch.zeros(n_out).half(),
            f"{layer}.qzeros": packed(torch.full((n_in // 128, n_out), 7), 4),
        }  # fmt: skip
        weights[layer] = ((q - 8) * scales.float()[:, group_of]).half().float()
    assert len(weights) == 14
    save_file(tensors, tmp_path / name)
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    stored = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True,
              "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}  # fmt: skip
    (tmp_path / "quantize_config.json").write_text(json.dumps(stored), encoding="utf-8")
    torch.testing.assert_close(logits_of(tmp_path), reference_logits(base, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.gptq
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--bits", "5"], "--bits"),
        (["--group_size", "100"], "--group_size: 100 is not packed by anyone"),
        (["--group_size", "256"], "--group_size: 256 is wider than .* use 128"),
        (["--calibration", "data"], "--calibration_path: is needed with --calibration data"),
        (["--calibration_path", "nowhere.txt"], "--calibration_path: there is no file or folder nowhere.txt"),
        (["--damp_percent", "2"], "--damp_percent"),
    ],
)
def test_what_cannot_work_is_reported_before_the_work(base, tmp_path, words, says) -> None:
    with pytest.raises(OneCardError, match=says):
        quantised(base, tmp_path / "new", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gptq
def test_too_little_text_small_layers_and_quantised_models(base, tiny_base, made, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("Only this.", encoding="utf-8")
    with pytest.raises(ConfigError, match="--calibration_path: gives 9 tokens to fit to"):
        quantised(base, tmp_path / "new", "--calibration_path", str(tmp_path / "short.txt"))
    with pytest.raises(ConfigError, match=r"--group_size: 128 is wider than .* use 64"):
        quantised(tiny_base, tmp_path / "new")
    with pytest.raises(ModelError, match=r"quantised already \(gptq\)"):
        quantised(made, tmp_path / "new")
    with pytest.raises(ConfigError, match="--overwrite"):
        quantised(base, made)
    assert not (tmp_path / "new").exists()


@pytest.mark.gptq
@pytest.mark.slow  # some seconds each
@pytest.mark.parametrize("words", [["--bits", "2"], ["--bits", "3"], ["--bits", "8"], ["--desc_act"],
                                   ["--group_size", "-1"], ["--sym", "false", "--group_size", "32"]])  # fmt: skip
def test_all_bits_and_orders_load(base, tmp_path, words) -> None:
    target = quantised(base, tmp_path / "gptq", *words)
    bits = int(words[1]) if words[0] == "--bits" else 4
    tensors = load_file(target / "model.safetensors")
    weights = {layer: dequantised(tensors, layer, bits) for layer in layers_in(tensors)}
    assert len(weights) == 14
    torch.testing.assert_close(logits_of(target), reference_logits(base, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.gptq
@pytest.mark.slow  # a trained model
def test_gptq_beats_rounding_on_the_trained_base(tmp_path, capsys) -> None:
    """The issue's bar: better than plain rounding, and within 4 % of 16 bits, at 4 bits in groups of 128.

    Better is what stays closer to the 16-bit predictions; which perplexity is lower is luck where rounding costs less
    than a percent (see `onecard/export/quantize/evaluate.py` and benchmarks/gptq_quality.py).
    """
    words = ["--model_path", DEFAULT_BASE, "--output_path", str(tmp_path / "gptq"), "--device", "cpu"]
    quantize_gptq.main([*words, "--batch_size", "32"])
    told = capsys.readouterr().out
    whole, fitted = map(float, re.search(r"16-bit ([\d.]+), GPTQ ([\d.]+) ", told).groups())
    of_gptq, of_rounding = map(float, re.search(r"token: GPTQ ([\d.]+), plain rounding ([\d.]+) ", told).groups())
    assert fitted < 1.04 * whole and 0 < of_gptq < 0.6 * of_rounding


@pytest.mark.gptq
@pytest.mark.slow  # processes of their own
@pytest.mark.skipif(sys.platform == "win32", reason="gptqmodel keeps no layers there")
def test_killed_between_layers_it_goes_on(base, made, tmp_path) -> None:
    words = [sys.executable, "tools/quantize_gptq.py", "--model_path", str(base), "--output_path", str(tmp_path / "g")]
    process = subprocess.Popen([*words, *LITTLE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    kept = tmp_path / ".g.layers" / "layers" / "CURRENT"
    while process.poll() is None and not kept.exists():
        pass
    process.kill()
    process.wait()
    assert kept.exists() and not (tmp_path / "g").exists()
    done = subprocess.run([*words, *LITTLE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "going on with the layers" in done.stdout
    assert tiny.same_tensors(load_file(tmp_path / "g" / "model.safetensors"), load_file(made / "model.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


@pytest.mark.gptq
@pytest.mark.slow
def test_base_and_adapter_and_own_data(base, instructions, tmp_path, capsys) -> None:
    run = finetune(tiny.config_for(base, instructions, tmp_path / "run", learning_rate=3e-2))
    data = tiny.write_instructions(tmp_path / "data.json", 80)
    words = ["--calibration", "data", "--calibration_path", str(data), "--calibration_len", "256"]
    quantize_gptq.main(["--lora_path", str(run), "--output_path", str(tmp_path / "g"), *LITTLE, *words])
    assert "perplexity on" in capsys.readouterr().out
    assert (tmp_path / "g" / "chat_template.jinja").is_file() and not list((tmp_path / "g").glob(".*"))
    merged = load_bundle(ModelOptions(model_path=str(base), bits=32), str(run), "auto")[0].model
    ids = torch.arange(3, 40)[None]
    exact, plain = merged(ids).logits, reference_logits(base, {})
    assert (logits_of(tmp_path / "g") - exact).norm() < (plain - exact).norm()
