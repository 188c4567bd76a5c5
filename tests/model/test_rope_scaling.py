"""--rope_scaling: the configuration of transformers, what a loaded model computes, and what each exported file says."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from onecard.config.base_model import ModelOptions, rope_scaling_of
from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError, ModelError
from onecard.export.gguf.layout import read_layout
from onecard.export.merge.merge import export_merged
from onecard.export.merge.options import MergeSettings
from onecard.inference.load import load_bundle
from onecard.inference.run_files import stored_options
from onecard.model.full_tuning import save_tuned, tune_base, write_tuned_model
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.model.lora.adapter import load_adapter
from onecard.model.lora.formats import adapter_scaling, scaling_of_adapters
from onecard.model.memory.architecture import architecture_of
from onecard.model.model_config import CONFIG
from onecard.model.rope_scaling import MARK, check_same_positions, check_scaled, context_limit, scale_rope, scaled_json
from onecard.recipes import finetune
from onecard.serve.handover import read_run
from tests import tiny
from tests.model.model_families import SIZES, family_configs

CPU = detect("cpu")
# The keys of each kind are what transformers reads: ROPE_INIT_FUNCTIONS of modeling_rope_utils.py.
SCALED = {
    "yarn:4": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
    "linear:2.5": ({"rope_type": "linear", "factor": 2.5}, 160, 160),
    "dynamic:2": ({"rope_type": "dynamic", "factor": 2.0}, 64, 128),
}
WITHOUT = ("phi3", "bloom", "gpt2")  # Phi 3 takes longrope alone


def base_options(path: Path, value: str, **changes: Any) -> ModelOptions:
    return ModelOptions(
        model_path=str(path), bits=32, device="cpu", gradient_checkpointing=False, rope_scaling=value, **changes
    )


@pytest.mark.parametrize("value", SCALED)
def test_each_family_gets_what_transformers_reads(value: str) -> None:
    wanted, positions, limit = SCALED[value]
    seen, refused = 0, []
    for family, config in family_configs().items():
        config = copy.deepcopy(config)
        try:
            scale_rope(config, value)
        except ConfigError as reason:
            refused.append(family)
            assert reason.flag == "--rope_scaling" and family in str(reason)
            continue
        rope = config.rope_parameters
        if family == "gemma3_text":  # those layers look back 32 tokens, however long the text is
            assert rope["sliding_attention"] == {"rope_theta": 10000.0, "rope_type": "default"}
            rope = rope["full_attention"]
        assert wanted.items() <= rope.items() and "rope_theta" in rope
        assert (config.max_position_embeddings, context_limit(config)) == (positions, limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            config.validate_rope()
        seen += 1
    assert seen == 11 and tuple(refused) == WITHOUT


@pytest.mark.parametrize("value", SCALED)
def test_a_loaded_model_turns_by_the_frequencies_of_transformers(tiny_base: Path, value: str) -> None:
    plain = json.loads((tiny_base / CONFIG).read_text(encoding="utf-8"))
    kind, factor = rope_scaling_of(value) or ("", 0)
    rope = {"rope_type": kind, "factor": factor, "rope_theta": plain["rope_parameters"]["rope_theta"]}
    expected = transformers.LlamaConfig(**{**plain, "rope_parameters": rope})
    model: Any = load_base(base_options(tiny_base, value), CPU).model
    here = model.model.rotary_emb
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](expected, torch.device("cpu"))
    assert torch.equal(here.inv_freq, inv_freq) and here.attention_scaling == attention_factor
    untouched: Any = load_base(base_options(tiny_base, "auto"), CPU).model
    assert torch.equal(here.inv_freq, untouched.model.rotary_emb.inv_freq) == (kind == "dynamic")  # until rows are long


@pytest.mark.parametrize(
    "bad", ["yarn", "yarn:1", "yarn:0.5", "yarn:nan", "yarn:-2", "ntk:4", "yarn:1e9", "YARN:4", ""]
)
def test_what_is_no_scaling_is_said_with_all_else(bad: str) -> None:
    assert [flag for flag, _ in ModelOptions(rope_scaling=bad).problems()] == ["--rope_scaling"]


def test_a_base_that_is_scaled_already_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = transformers.LlamaConfig(**{**SIZES, "rope_parameters": rope})
    with pytest.raises(ConfigError, match=r"scaled already \(llama3, factor 8"):
        scale_rope(config, "yarn:2")
    base = tiny.save_tiny_llama(tmp_path / "base", layers=1, rope_parameters=rope)
    with pytest.raises(ConfigError, match="--rope_scaling"):  # neither wrapped nor renamed on its way out of loading
        load_base(base_options(base, "linear:2"), CPU)


def test_a_family_that_computes_positions_in_its_own_way_is_refused() -> None:
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.LlamaForCausalLM(config)  # not scaled: as if it took no notice
    with pytest.raises(ConfigError, match="does not reach the positions of llama models"):
        check_scaled(model, "yarn:2")


def test_files_of_transformers_4_keep_their_form() -> None:
    old = {**transformers.LlamaConfig(**SIZES).to_dict(), "rope_theta": 5e5}
    del old["rope_parameters"]
    scaled = scaled_json(old, "old", "yarn:4")
    assert scaled["rope_theta"] == 5e5 and scaled["max_position_embeddings"] == 256
    assert scaled["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    again = transformers.LlamaConfig(**scaled)
    assert again.rope_parameters == {"rope_theta": 5e5, **scaled["rope_scaling"]}
    nested = {"model_type": "gemma3", "text_config": {"hidden_size": 64}}
    inside = scaled_json(nested, "nested", "linear:2")["text_config"]
    assert inside["rope_parameters"]["full_attention"]["rope_type"] == "linear"
    assert inside["max_position_embeddings"] == 2 * transformers.Gemma3TextConfig().max_position_embeddings


def test_the_plan_knows_the_longer_context(tiny_base: Path) -> None:
    longer = architecture_of(tiny_base, rope_scaling="yarn:4")
    assert (architecture_of(tiny_base).max_positions, longer.max_positions) == (512, 2048)
    assert longer.source.read()[0].rope_parameters["rope_type"] == "yarn"
    known = architecture_of("Llama-2-7B", rope_scaling="linear:2")
    assert known.max_positions == 2 * architecture_of("Llama-2-7B").max_positions == 8192


def test_training_with_dynamic_keeps_to_the_positions_of_the_base() -> None:
    config = transformers.LlamaConfig(**SIZES)
    scale_rope(config, "dynamic:2")
    check_same_positions(config, "row 1", 64)
    with pytest.raises(ConfigError, match=r"row 1 has 65 tokens.*--cutoff_len 64.*yarn:2"):
        check_same_positions(config, "row 1", 65)


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under yarn:2 whose rows are longer than its base reads."""
    folder = tmp_path_factory.mktemp("rope")
    rows = [{"instruction": "count " + "1 2 3 4 5 6 7 8 " * 40, "output": f"answer {i}"} for i in range(5)]
    (folder / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    config = tiny.config_for(
        tiny_base, folder / "long.json", folder / "run", rope_scaling="yarn:2", cutoff_len=1024, test_size=0,
        max_steps=2, total_batch=1, bits=32, compare_with_base=False, server_check=False, learning_rate=5e-3,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*positions.*")
        return finetune(config)


def test_what_answers_takes_the_scaling_from_the_run(run: Path, tmp_path: Path) -> None:
    assert stored_options(str(run))["rope_scaling"] == "yarn:2"
    assert json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))[MARK] == "yarn:2"
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # as it lies on the Hub: no onecard.yaml
        (tmp_path / name).write_bytes((run / name).read_bytes())
    for place in (run, run / "checkpoint-2", tmp_path):
        bundle, depends_on = load_bundle(base_options(Path("auto"), "auto"), str(place), "none")
        assert bundle.model.config.rope_parameters["rope_type"] == "yarn"
        assert (context_limit(bundle.model.config), depends_on["rope_scaling"]) == (1024, "yarn:2")
    bundle, depends_on = load_bundle(base_options(Path("auto"), "none"), str(run), "none")
    assert context_limit(bundle.model.config) == 512 and "rope_scaling" not in depends_on


def test_a_base_that_is_tuned_itself_keeps_the_scaling_in_its_config(tiny_base: Path, tmp_path: Path) -> None:
    model = tune_base(load_base(base_options(tiny_base, "yarn:2"), CPU).model, LoraOptions(peft_method="freeze:1"))
    save_tuned(model, tmp_path / "checkpoint-1")
    write_tuned_model(model, [tmp_path / "checkpoint-1"], tmp_path)
    (tmp_path / "onecard.yaml").write_text("rope_scaling: yarn:2\n", encoding="utf-8")
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert (config["rope_parameters"]["rope_type"], config["max_position_embeddings"]) == ("yarn", 1024)
    assert stored_options(str(tmp_path))["rope_scaling"] == "none"  # not once more over that
    assert adapter_scaling(tmp_path) == adapter_scaling(tmp_path / "checkpoint-1") == "none"


def test_other_positions_than_trained_are_reported_and_plain_peft_warns(run: Path, tiny_base: Path) -> None:
    base = load_base(base_options(tiny_base, "none"), CPU).model
    notes = load_adapter(base, run, trainable=False).notes
    assert any("trained under --rope_scaling yarn:2, and answers under none here" in note for note in notes), notes
    with pytest.warns(UserWarning, match=MARK):
        PeftConfig.from_pretrained(str(run))


def test_the_merged_model_holds_the_scaling_and_answers_as_the_run(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    export_merged(tmp_path / "merged", str(tiny_base), [str(run)], MergeSettings(dtype="fp32"))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.rope_parameters == {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0
    }  # fmt: skip
    assert model.config.max_position_embeddings == 1024
    bundle, _ = load_bundle(base_options(tiny_base, "auto"), str(run), "none")
    ids = torch.randint(3, 400, (1, 700))
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, bundle.model(ids).logits, atol=1e-4)
    layout = read_layout(tmp_path / "merged")  # whose values test_gguf.py finds in the file again
    assert (layout.rope_kind, layout.rope_factor, layout.context_length) == ("yarn", 2.0, 1024)
    assert layout.rope["original_max_position_embeddings"] == 512


def test_what_llama_cpp_does_not_compute_is_refused_before_merging(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="scaled by 'dynamic'"):
        read_layout(tiny_base, "dynamic:2")


def test_the_handover_tells_the_engine(run: Path, tmp_path: Path) -> None:
    found, _ = read_run(run)
    assert found.context == 1024
    assert found.positions["rope_parameters"]["original_max_position_embeddings"] == 512
    with pytest.raises(ModelError, match="1025 is more than the 1024 positions"):
        read_run(run, context=1025)


def test_adapters_of_two_scalings_are_not_merged_together(run: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes((run / "adapter_model.safetensors").read_bytes())
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, MARK: "linear:2"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"yarn:2.*linear:2"):
        scaling_of_adapters([str(run), str(tmp_path)])
