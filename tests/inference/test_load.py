"""A run directory is enough: base, bits, template and tokenizer come from it, and nothing that should not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from onecard.config.base_model import DEFAULT_BASE, ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, SamplingOptions
from onecard.data.built_in_templates import FOLDER
from onecard.data.messages import Turn
from onecard.errors import ConfigError, ModelError
from onecard.inference.engine import GenerationRequest, open_engine
from onecard.inference.load import base_path, load_bundle
from onecard.inference.run_files import run_directory, stored_options
from onecard.model.files import base_fingerprint
from tests import tiny
from tests.answers import answers_of

AUTO = ModelOptions(model_path="auto", bits=32, device="cpu")


def test_the_run_says_which_base_and_how_it_lies_in_memory_and_no_more(run_dir, lively_base) -> None:
    expected = {"model_path": str(lively_base), "bits": 32, "dtype": "auto"}
    for path in (run_dir, run_dir / "checkpoint-3", run_dir / "adapter_model.safetensors"):
        assert stored_options(str(path)) == expected
    assert stored_options(None) == {}
    assert stored_options("someone/adapter-on-the-hub") == {}


@pytest.mark.parametrize("text", ["", "- a list", "bits: four\nmodel_path: 3", "{broken", "\udcff"])
def test_damaged_stored_options_count_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "onecard.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert stored_options(str(tmp_path)) == {}


def test_template_and_tokenizer_are_the_runs_own(run_dir, lively_base, questions) -> None:
    bundle, depends_on = load_bundle(AUTO, str(run_dir), "auto")
    assert bundle.template.jinja == (FOLDER / "chatml.jinja").read_text(encoding="utf-8")
    from_checkpoint, same = load_bundle(AUTO, str(run_dir / "checkpoint-3"), "auto")
    assert from_checkpoint.template == bundle.template
    assert same == depends_on
    sampling = SamplingOptions(max_new_tokens=8)
    answers = [answers_of(t, questions, sampling) for t in (bundle, from_checkpoint)]
    assert answers[0] == answers[1]
    options = ModelOptions(model_path=str(lively_base), bits=32, device="cpu")
    base, without = load_bundle(options, None, "chatml")
    assert answers_of(base, questions, sampling) != answers[0]
    assert without["adapter"] is None
    assert {name for name in without if without[name] != depends_on[name]} == {"adapter"}


def test_the_stored_template_counts_where_the_tokenizer_comes_from_the_base(run_dir, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"):
        shutil.copy(run_dir / name, tmp_path)
    bundle, _ = load_bundle(AUTO, str(tmp_path), "auto")
    assert bundle.template.jinja == (FOLDER / "chatml.jinja").read_text(encoding="utf-8")


def test_thinking_sets_the_templates_own_switch_and_a_request_has_the_last_word(run_dir, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "onecard.yaml"):
        shutil.copy(run_dir / name, tmp_path)
    jinja = (FOLDER / "chatml.jinja").read_text(encoding="utf-8")
    closed = "{%- if add_generation_prompt and enable_thinking is false -%}{{- '<think></think>' -}}{%- endif -%}"
    (tmp_path / "chat_template.jinja").write_text(jinja + closed, encoding="utf-8")
    engine = open_engine(AUTO, InferenceOptions(str(tmp_path), thinking="off"), LimitOptions())
    turns = (Turn("user", "Hi"),)

    def fed(**variables: bool) -> str:
        request = GenerationRequest(turns, template_variables=variables)
        return engine.tokenizer().decode(engine._rows(request)[0].ids)

    assert fed().endswith("<think></think>")
    assert not fed(enable_thinking=True).endswith("<think></think>")
    assert engine.count_tokens(turns) == len(engine._rows(GenerationRequest(turns))[0].ids)
    bundle, depends_on = load_bundle(AUTO, str(tmp_path), "auto", "on")
    assert bundle.template.variables == {"enable_thinking": True}
    assert depends_on["thinking"] == "on"
    assert "thinking" not in load_bundle(AUTO, str(tmp_path), "auto")[1]  # answers of earlier versions go on
    with pytest.raises(ConfigError, match="off, but the prompt template alpaca has no switch for thoughts"):
        load_bundle(AUTO, str(run_dir), "alpaca", "off")


def test_a_template_that_was_typed_wins_over_the_stored_one(run_dir) -> None:
    bundle, _ = load_bundle(AUTO, str(run_dir), "alpaca")
    assert bundle.template.name == "alpaca"


def test_the_tokenizer_is_the_runs_own_where_the_base_has_none(run_dir, lively_base, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(lively_base, base)
    for file in list(base.glob("tokenizer*")):
        file.unlink()
    options = ModelOptions(model_path=str(base), bits=32, device="cpu")
    bundle, _ = load_bundle(options, str(run_dir), "auto")
    assert bundle.tokenizer("Hi", add_special_tokens=False)["input_ids"]
    with pytest.raises(ModelError):
        load_bundle(options, None, "alpaca")


def test_an_adapter_on_another_base_of_the_same_shape_is_told_of(
    run_dir, lively_base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every program that answers; the base may be the same in another form, so it is not refused."""
    run, other = tmp_path / "run", tiny.save_tiny_llama(tmp_path / "other", initializer_range=0.15, seed=4)
    shutil.copytree(run_dir, run)
    (run / "trainer_state.json").write_text(json.dumps({"identity": {"base": base_fingerprint(str(lively_base))}}))
    options = {str(base): ModelOptions(str(base), bits=32, device="cpu") for base in (lively_base, other)}

    def told(base: Path, adapter: Path) -> bool:
        load_bundle(options[str(base)], str(adapter), "auto")
        return f"trained on another base, {lively_base}, not on {base}" in capsys.readouterr().err

    assert told(other, run) and told(other, run / "checkpoint-3") and told(other, run / "adapter_config.json")
    assert not told(lively_base, run)
    assert not told(other, run_dir), "an old run, without a fingerprint"
    # Put on later, as the chat page and the API do.
    engine = open_engine(options[str(other)], InferenceOptions(), LimitOptions(), str(tmp_path), "plain")
    assert "trained on another base" in capsys.readouterr().err
    for name in ("other", "plain"):  # the base alone, then the adapter
        asked = GenerationRequest((Turn("user", "Hi"),), sampling=SamplingOptions(max_new_tokens=2), adapter=name)
        list(engine.stream(asked))
    assert "trained on another base" in capsys.readouterr().err


def test_the_base_is_the_one_that_the_adapter_names(run_dir, lively_base, tmp_path: Path) -> None:
    assert base_path("auto", str(run_dir)) == str(lively_base)
    assert base_path("given", str(run_dir)) == "given"
    assert base_path("auto", None) == DEFAULT_BASE
    shutil.copy(run_dir / "adapter_model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match="does not name its base model"):
        base_path("auto", str(tmp_path))


def test_a_plain_adapter_without_the_runs_files_has_no_run_directory(run_dir, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(run_dir / name, tmp_path)
    assert run_directory(str(tmp_path)) is None
    bundle, _ = load_bundle(AUTO, str(tmp_path), "auto")
    assert bundle.template.name == "alpaca"
