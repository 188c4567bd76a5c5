"""Merging: what comes out is what peft's own whole-model merge gives, for every variant; and every refusal."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config.base_model import ModelOptions
from onecard.config.inference import SamplingOptions
from onecard.console import run_main
from onecard.data.messages import Turn
from onecard.errors import ConfigError, ModelError
from onecard.export.io.weights import open_weights
from onecard.export.merge.merge import export_merged, find_base, merge_into
from onecard.export.merge.options import MergeSettings
from onecard.inference.load import load_bundle
from onecard.programs import merge as merge_lora
from onecard.recipes import finetune
from tests import tiny
from tests.answers import answers_of
from tests.model.every_family import save_small
from tests.model.model_families import save_family

IDS = torch.arange(3, 43)[None]
EXACT = MergeSettings(dtype="fp32")
PLAIN = {"target_modules": ["q_proj", "down_proj"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": PLAIN,
    "rslora": {**PLAIN, "use_rslora": True},
    "dora on all": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 32}},
    "head in full": {**PLAIN, "modules_to_save": ["lm_head"]},
    "embeddings in full": {**PLAIN, "modules_to_save": ["embed_tokens"]},
    "both in full": {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora on both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "tokens": {**PLAIN, "trainable_token_indices": [3, 5, 440]},
    "both as one": {**PLAIN, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
STAY_TIED = {"lora", "rslora", "dora on all", "patterns", "tokens", "both as one"}


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def make_adapter(model: Any, directory: Path, *, seed: int = 0, size: float = 0.05, **config: Any) -> torch.Tensor:
    """Attach an adapter of random values to `model`, save it, and return the logits of the two."""
    settings = {"r": 4, "task_type": "CAUSAL_LM", **{name: _own(value) for name, value in config.items()}}
    adapted = peft.get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    adapted.eval().save_pretrained(directory)
    return logits(adapted)


def _own(value: Any) -> Any:
    """A copy: peft writes into the lists it is given."""
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


def merged_by_peft(base: Path, *adapters: Path) -> Any:
    model = loaded(base)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A base whose head is its embeddings, and one with a head of its own, by whether they are tied."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        tied: tiny.save_tiny_llama(folder / f"tied-{tied}", layers=1, tie_word_embeddings=tied)
        for tied in (False, True)
    }


@pytest.fixture(scope="module")
def plain(bases: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA on the untied base."""
    directory = tmp_path_factory.mktemp("adapters") / "plain"
    make_adapter(loaded(bases[False]), directory, **PLAIN)
    return directory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_merges_as_peft_does(variant: str, tied: bool, bases: dict[bool, Path], tmp_path: Path) -> None:
    base, adapter, result = bases[tied], tmp_path / "adapter", tmp_path / "result"
    expected = make_adapter(loaded(base), adapter, **VARIANTS[variant])
    result.mkdir()
    report = merge_into(result, str(base), [str(adapter)], EXACT)
    model = loaded(result)
    assert far(logits(model), expected) < 2e-6
    assert far(logits(model), logits(loaded(base))) > 1e-3  # the adapter does something
    stays_tied = tied and variant in STAY_TIED
    assert model.config.tie_word_embeddings == stays_tied
    assert ("lm_head.weight" in open_weights(result).entries) == (not stays_tied)
    assert any("stores both" in note for note in report.notes) == (tied and not stays_tied)
    assert not report.unchanged and f"{report.n_targets} of {report.n_targets} target layers" in report.proof
    # Of a tied pair peft merges LoRA into the shared weight, which changes the other half too: its logits move. And
    # it cannot load what it saved of a pair that was trained as one.
    if not (tied and variant in ("both as one", "lora on embeddings", "dora on both")):
        theirs = merged_by_peft(base, adapter).state_dict()
        ours = model.state_dict()
        assert ours.keys() == theirs.keys() and len(ours) == 12
        assert max(far(ours[name], theirs[name]) for name in ours) < 1e-6


def test_plain_lora_is_the_closed_form_rounded_once(bases: dict[bool, Path], plain: Path, tmp_path: Path) -> None:
    """What no adapter touches to the nearest; a sum to one of its two neighbours, with no error on the mean."""
    adapter = load_file(plain / "adapter_model.safetensors")
    for dtype, step in {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp32": 1e-6}.items():
        (tmp_path / dtype).mkdir()
        merge_into(tmp_path / dtype, str(bases[False]), [str(plain)], MergeSettings(dtype=dtype))
        found, base = open_weights(tmp_path / dtype), open_weights(bases[False])
        n_merged = 0
        for name, weight in base:
            a, result = adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"), found.read(name)
            if a is None:
                assert torch.equal(result, weight.to(result.dtype)), name
                continue
            b = adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            weight = (weight.double() + b.double() @ a.double() * (8 / 4)).float()
            n_merged += 1
            error = result.float() - weight
            if dtype == "fp32":
                assert far(result, weight) < step
                continue
            assert (error.abs() <= step * weight.abs().clamp(min=2.0**-10)).all(), name
            assert abs(float(error.mean())) < 4 * float(error.std()) / error.numel() ** 0.5, name
        assert n_merged == 2 and len(found.entries) == len(base.entries)


def test_two_adapters_merge_in_order(bases: dict[bool, Path], plain: Path, tmp_path: Path) -> None:
    """DoRA's magnitudes speak of the weights that it meets, so the order decides."""
    dora = tmp_path / "dora"
    between = merged_by_peft(bases[False], plain)
    expected = make_adapter(between, dora, seed=1, target_modules="all-linear", use_dora=True)
    results = {}
    for name, order in {"right": (plain, dora), "wrong": (dora, plain)}.items():
        (tmp_path / name).mkdir()
        report = merge_into(tmp_path / name, str(bases[False]), [str(adapter) for adapter in order], EXACT)
        assert report.n_targets == 7
        results[name] = logits(loaded(tmp_path / name))
    assert far(results["right"], expected) < 2e-6
    assert far(results["wrong"], expected) > 1e-4


@pytest.mark.parametrize("rows", [452, 430])
@pytest.mark.parametrize("trained", [True, False])
def test_another_number_of_rows_comes_with_the_adapter(
    rows: int, trained: bool, bases: dict[bool, Path], tmp_path: Path
) -> None:
    """Kits that add tokens, or cut the padding off, resize the base; the adapter's files then hold both layers."""
    model = loaded(bases[False])
    torch.manual_seed(3)
    model.resize_token_embeddings(rows, mean_resizing=False)
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]} if trained else {}
    expected = make_adapter(model, tmp_path / "adapter", **PLAIN, **whole)  # peft sees the change and saves them
    (tmp_path / "result").mkdir()
    report = merge_into(tmp_path / "result", str(bases[False]), [str(tmp_path / "adapter")], EXACT)
    result = loaded(tmp_path / "result")
    assert result.config.vocab_size == rows and result.lm_head.weight.shape[0] == rows
    assert far(logits(result), expected) < 2e-6
    assert any(f"{rows} rows" in note for note in report.notes)


def test_new_rows_that_nobody_has_are_an_error(bases: dict[bool, Path], tmp_path: Path) -> None:
    model = loaded(bases[True])
    model.resize_token_embeddings(452, mean_resizing=False)
    make_adapter(model, tmp_path / "adapter", **PLAIN, modules_to_save=["embed_tokens"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {
        name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name and "original" not in name
    }
    save_file(kept, file)
    with pytest.raises(ModelError, match="no adapter holds the new rows of lm_head"):
        export_merged(tmp_path / "result", str(bases[True]), [str(tmp_path / "adapter")], EXACT)


def test_a_tokenizer_with_more_tokens_than_rows_is_an_error(
    bases: dict[bool, Path], plain: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    tokenizer = AutoTokenizer.from_pretrained(bases[False])
    tokenizer.add_tokens([f"<new{i}>" for i in range(60)])
    tokenizer.save_pretrained(run)
    with pytest.raises(ModelError, match=r"has 4\d\d tokens, the model 448 rows: tokens were added"):
        export_merged(tmp_path / "result", str(bases[False]), [str(run)], EXACT)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "phi", "bloom"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """GPT-2's transposed Conv1D and the prefix that its files lack; biases; tied heads; a head with a bias."""
    base = save_family(family, tmp_path)
    config = {"target_modules": "all-linear"} | ({"fan_in_fan_out": True} if family == "gpt2" else {})
    expected = make_adapter(loaded(base), tmp_path / "adapter", **config)
    (tmp_path / "result").mkdir()
    report = merge_into(tmp_path / "result", str(base), [str(tmp_path / "adapter")], EXACT)
    assert far(logits(loaded(tmp_path / "result")), expected) < 2e-6
    assert report.n_targets >= 8


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_a_head_of_its_own_is_merged_although_the_config_says_tied(targets: list[str], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base, adapter, result = tmp_path / "base", tmp_path / "adapter", tmp_path / "result"
    tiny.save_tiny_llama(base, layers=1)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    model = LlamaForCausalLM.from_pretrained(base)  # which does not tie what differs
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    expected = make_adapter(model, adapter, target_modules=targets)
    result.mkdir()
    report = merge_into(result, str(base), [str(adapter)], EXACT)
    assert far(logits(loaded(result)), expected) < 2e-6
    assert not loaded(result).config.tie_word_embeddings
    assert any("its files hold two different ones" in note for note in report.notes)


def test_tensors_that_the_model_does_not_know_are_in_the_merged_one_too(
    bases: dict[bool, Path], plain: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(bases[False], tmp_path / "base")
    extra = {"model.layers.1.mtp.weight": torch.arange(6.0).reshape(2, 3), "model.norm.bias": torch.ones(64)}
    save_file(tiny.tensors_of(base / "model.safetensors") | extra, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "result").mkdir()
    merge_into(tmp_path / "result", str(base), [str(plain)], EXACT)
    found = tiny.tensors_of(tmp_path / "result" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())


def test_a_base_that_stores_its_experts_one_by_one_is_compared_whole(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    expected = make_adapter(loaded(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    (tmp_path / "result").mkdir()
    report = merge_into(tmp_path / "result", str(tmp_path / "base"), [str(tmp_path / "adapter")], EXACT)
    assert far(logits(loaded(tmp_path / "result")), expected) < 2e-6
    assert "one whole model after the other" in report.proof


def test_adapters_on_experts_are_refused_by_name(tmp_path: Path) -> None:
    """Stored one by one (Mixtral) or in one tensor (gpt-oss), which ended in an AttributeError of peft."""
    for model_type in ("mixtral", "gpt_oss"):
        base, adapter = save_small(model_type, tmp_path / model_type), tmp_path / f"{model_type}-adapter"
        make_adapter(loaded(base), adapter, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
        (tmp_path / f"{model_type}-result").mkdir()
        with pytest.raises(ModelError, match=r"adapts experts \(.*--lora_target_parameters\), .* beside its base"):
            merge_into(tmp_path / f"{model_type}-result", str(base), [str(adapter)], EXACT)


def test_pickled_and_sharded_bases_give_the_same_bits(bases: dict[bool, Path], plain: Path, tmp_path: Path) -> None:
    pickled, sharded = tmp_path / "pickled", tmp_path / "sharded"
    shutil.copytree(bases[False], pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    loaded(bases[False]).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    results = []
    for base in (bases[False], pickled, sharded):
        target = tmp_path / f"from-{base.name}"
        target.mkdir()
        merge_into(target, str(base), [str(plain)], replace(EXACT, max_shard_size="120KB"))
        shards = sorted(target.glob("model-*.safetensors"))
        assert len(shards) > 2 and all(shard.stat().st_size < 120_000 for shard in shards)
        assert not list(target.glob("*.bin*"))
        results.append(dict(open_weights(target)))
    assert len(results[0]) == 12
    assert tiny.same_tensors(results[0], results[1]) and tiny.same_tensors(results[0], results[2])


def test_a_run_of_ours_answers_the_same_once_it_is_merged(
    tiny_base: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    finetune(tiny.config_for(tiny_base, instructions, run, num_epoch=2))
    capsys.readouterr()
    merge_lora.main(["--lora_path", str(run), "--output_path", str(merged), "--dtype", "fp32"])
    said = capsys.readouterr()
    assert "proven on the reopened files" in said.out and "fingerprint" not in said.err
    assert (merged / "chat_template.jinja").read_bytes() == (run / "chat_template.jinja").read_bytes()
    # The run holds tokenizer.json alone; the base's other form is still true, and llama.cpp wants it.
    assert not (run / "tokenizer.model").exists() and (merged / "tokenizer.model").is_file()
    questions = ("Count to 4", "数到 5")
    answers = []
    for model, adapter in ((str(tiny_base), str(run)), (str(merged), None)):
        bundle, _ = load_bundle(ModelOptions(model, bits=32, device="cpu"), adapter, "auto")
        rows = [[Turn("user", question)] for question in questions]
        greedy = SamplingOptions(max_new_tokens=12)
        answers.append([found.text for found in answers_of(bundle, rows, greedy)])
    assert answers[0] == answers[1] and all(answers[0])
    # Another base of the same shape is refused, whether the run or its checkpoint is given.
    other = tiny.save_tiny_llama(tmp_path / "other", seed=1)
    checkpoint = next(run.glob("checkpoint-*"))
    for adapter in (run, checkpoint):
        with pytest.raises(ModelError, match=r"trained on another base.*--accept_other_base"):
            export_merged(tmp_path / "no", str(other), [str(adapter)], EXACT)
    assert not (tmp_path / "no").exists()
    report = export_merged(tmp_path / "yes", str(other), [str(checkpoint)], replace(EXACT, accept_other_base=True))
    assert any("accepted" in note for note in report.notes) and (tmp_path / "yes" / "chat_template.jinja").is_file()


def _changed_base(source: Path, target: Path, **changes: torch.Tensor) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, **changes}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_auto_is_fp16_where_the_model_fits_and_bf16_where_not(
    bases: dict[bool, Path], plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    loaded(bases[False]).bfloat16().save_pretrained(half)
    norm, up = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(half / "model.safetensors")
    large = _changed_base(half, tmp_path / "large", **{up: weights[up] * 1e7})
    tiny_values = _changed_base(half, tmp_path / "tiny", **{up: weights[up] * 1e-6})
    active = _changed_base(half, tmp_path / "active", **{norm: weights[norm] * 60_000})
    reasons = {half: "", bases[False]: "", large: "65504 is the most", tiny_values: "of which fp16 loses",
               active: "on the probe prompts, and fp16 ends at 65504"}  # fmt: skip
    for base, reason in reasons.items():
        target, expected = tmp_path / f"result-{base.name}", "bf16" if reason else "fp16"
        report = export_merged(target, str(base), [str(plain)], MergeSettings())
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        assert report.dtype == expected and config["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[expected]
        assert {entry.dtype for entry in open_weights(target).entries.values()} == {getattr(torch, config["dtype"])}
        assert any(reason in note for note in report.notes) and not list(target.glob(".*"))
    with pytest.raises(ModelError, match="65504 is the most"):
        export_merged(tmp_path / "typed", str(large), [str(plain)], MergeSettings(dtype="fp16"))


def test_bad_bases(bases: dict[bool, Path], plain: Path, tmp_path: Path) -> None:
    norm, q_proj = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(bases[False] / "model.safetensors")
    nan = _changed_base(bases[False], tmp_path / "nan", **{norm: torch.full_like(weights[norm], torch.nan)})
    nan_q = _changed_base(bases[False], tmp_path / "nan-q", **{q_proj: torch.full_like(weights[q_proj], torch.nan)})
    large = _changed_base(bases[False], tmp_path / "large", **{norm: weights[norm] * 1e5})
    large_q = _changed_base(bases[False], tmp_path / "large-q", **{q_proj: weights[q_proj] * 1e8})
    wide = tiny.save_tiny_llama(tmp_path / "wide", layers=1, hidden_act="gelu", head_dim=32)
    quantised = _changed_base(bases[False], tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    (quantised / "config.json").write_text(text, encoding="utf-8")
    lacking = _changed_base(bases[False], tmp_path / "lacking")
    save_file({name: tensor for name, tensor in weights.items() if name != q_proj}, lacking / "model.safetensors")
    cut = _changed_base(bases[False], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    other_config = _changed_base(bases[False], tmp_path / "other-config")
    text = json.dumps(config | {"intermediate_size": 192})
    (other_config / "config.json").write_text(text, encoding="utf-8")
    code = _changed_base(bases[False], tmp_path / "code")
    (code / "model.safetensors").unlink()
    (code / "pytorch_model.bin").write_bytes(pickle.dumps({"w": print}))
    told = {
        nan: f"{norm} holds NaN", nan_q: f"{q_proj} holds NaN", large: f"{norm} has values up to 1e.05.*fit into fp16",
        large_q: f"{q_proj} has values.*fp16", wide: "does not fit.*differ", quantised: "quantised already.*gptq",
        lacking: f"lacks 1 tensors.*{q_proj}", cut: "is damaged", other_config: "config.json calls for",
        code: "holds code", plain: "holds a LoRA adapter", tmp_path: "no model",
    }  # fmt: skip
    for base, message in told.items():
        with pytest.raises(ModelError, match=f"(?s){message}"):
            export_merged(tmp_path / "result", str(base), [str(plain)], MergeSettings(dtype="fp16"))
        assert not (tmp_path / "result").exists(), base


def test_bad_adapters(bases: dict[bool, Path], plain: Path, tmp_path: Path) -> None:
    untrained, nan, cut, unmergeable = (tmp_path / name for name in ("untrained", "nan", "cut", "bias"))
    make_adapter(loaded(bases[False]), untrained, size=0.0, **PLAIN)
    make_adapter(loaded(bases[False]), unmergeable, **PLAIN, lora_bias=True)
    for directory in (nan, cut):
        shutil.copytree(plain, directory)
    file = nan / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    (cut / "adapter_model.safetensors").write_bytes((plain / "adapter_model.safetensors").read_bytes()[:-8])
    told = {untrained: "changed none of 2 layers", nan: "NaN or Inf", cut: "damaged", unmergeable: "cannot be merged",
            bases[False]: "holds no LoRA tensors", tmp_path / "nowhere": "no directory"}  # fmt: skip
    for adapter, message in told.items():
        with pytest.raises(ModelError, match=message):
            export_merged(tmp_path / "result", str(bases[False]), [str(plain), str(adapter)][-1:], EXACT)
        assert not (tmp_path / "result").exists(), adapter
    with pytest.raises(ConfigError, match="names no adapter"):
        merge_into(tmp_path, str(bases[False]), [], EXACT)
    config = plain / "adapter_config.json"
    for changes, message in (
        ({"r": "eight"}, "does not fit this base"),
        ({"base_model_name_or_path": str(tmp_path / "gone" / "base")}, "names a base that cannot be had"),
    ):
        odd = shutil.copytree(plain, tmp_path / next(iter(changes)))
        (odd / config.name).write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **changes}))
        with pytest.raises((ModelError, ConfigError), match=message):
            export_merged(tmp_path / "result", find_base("auto", str(odd)), [str(odd)], EXACT)
    with pytest.raises(ModelError, match="holds no LoRA tensors"):
        find_base("auto", str(bases[False]))


def test_the_tool(bases: dict[bool, Path], plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str]:
        code = run_main(lambda: merge_lora.main(list(words)), debug=False)
        said = capsys.readouterr()
        return code, said.out + said.err

    target = str(tmp_path / "result")
    code, said = run("--max_shard_size", "lots", "--dtype", "fp8")
    assert code == 2 and all(flag in said for flag in ("--lora_path", "--output_path", "--max_shard_size", "--dtype"))
    code, said = run("--lora_path", f"{plain}, {plain}", "--output_path", target, "--max_shard_size", "100KB")
    assert code == 0 and "merging 2 adapter(s) into 2 layers" in said and "GiB of RAM" in said
    assert "could not be checked" in said and "proven" in said and (tmp_path / "result" / "tokenizer.model").is_file()
    twice = merged_by_peft(bases[False], plain, plain)
    assert far(logits(loaded(tmp_path / "result")), logits(twice)) < 1e-3
    code, said = run("--lora_path", str(plain), "--output_path", target)
    assert code == 2 and "--overwrite" in said
    code, said = run("--lora_path", str(plain), "--output_path", target, "--overwrite", "--verify", "false")
    assert code == 0 and "not verified" in said
    assert not list(tmp_path.glob("result/model-*"))  # nothing of the first result is left
    code, said = run("--lora_path", str(plain), "--output_path", str(bases[False]), "--overwrite")
    assert code == 2 and "is read here" in said


def test_the_original_format(bases: dict[bool, Path], plain: Path, tmp_path: Path) -> None:
    """--format pth: the same weights under LLaMA's own names, and nothing left of what was between."""
    words = ["--lora_path", str(plain), "--model_path", str(bases[False])]
    merge_lora.main([*words, "--output_path", str(tmp_path / "hf")])
    merge_lora.main([*words, "--output_path", str(tmp_path / "pth"), "--format", "pth"])
    assert {"consolidated.00.pth", "params.json"} <= {file.name for file in (tmp_path / "pth").iterdir()}
    assert not list((tmp_path / "pth").rglob("*.safetensors"))
    original = torch.load(tmp_path / "pth" / "consolidated.00.pth", weights_only=True)
    stored = open_weights(tmp_path / "hf")
    for theirs, ours in {"layers.0.feed_forward.w2": "model.layers.0.mlp.down_proj", "output": "lm_head"}.items():
        assert torch.equal(original[f"{theirs}.weight"], stored.read(f"{ours}.weight"))


@pytest.mark.slow
def test_the_benchmark(tmp_path: Path) -> None:
    from benchmarks import merge_memory

    output = tmp_path / "memory.json"
    merge_memory.main(
        ["--total_gb", "0.25", "--shard_mb", "140", "--rounds", "1", "--folder", str(tmp_path), "--output", str(output)]
    )
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [row["way"] for row in result["rows"]] == [merge_memory.TOOL, merge_memory.WHOLE]
    assert all(row["peak_bytes"] > result["largest_shard_bytes"] for row in result["rows"])
    assert result["rows"][0]["said"] and result["largest_difference"] < 2e-3
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
