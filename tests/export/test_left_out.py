"""Every tensor of a source is in the export, or its absence is explained, or nothing is written. For all exports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import onecard.programs.convert_llama as convert_llama
import onecard.programs.expand_vocab as expand_vocab
import onecard.programs.gguf as export_gguf
import onecard.programs.quantize_bnb as quantize_bnb
import onecard.programs.weight_diff as weight_diff
from onecard.console import run_main
from onecard.export.gguf.layout import read_layout
from onecard.export.quantize import gptq
from tests import tiny
from tests.export import gguf_models

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TABLE = "model.layers.0.self_attn.rotary_emb.inv_freq"


def change_weights(model: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Rewrite the one weight file of a model."""
    tensors = tiny.tensors_of(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def change_config(model: Path, **changes: Any) -> Path:
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | changes
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def tied(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A tiny Llama whose config says that the head is the embeddings, with other weights."""
    model = tiny.save_tiny_llama(directory, tie_word_embeddings=True)
    return change_weights(change_config(model, torch_dtype="float16"), change)


def own_head(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=generator).half().float()


def same_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[TABLE] = torch.ones(8)


def gguf_of(model: Path, target: Path) -> int:
    return run_main(lambda: export_gguf.main(["--model_path", str(model), "--output_path", str(target),
                                              "--gguf_type", "f32"]), debug=False)  # fmt: skip


def pth_of(model: Path, target: Path) -> int:
    words = ["pth", "--model_path", str(model), "--output_path", str(target)]
    return run_main(lambda: convert_llama.main(words), debug=False)


def bnb_of(model: Path, target: Path) -> int:
    few = ["--device", "cpu", "--eval_samples", "1", "--eval_len", "16", "--bits", "8"]
    words = ["--model_path", str(model), "--output_path", str(target), *few]
    return run_main(lambda: quantize_bnb.main(words), debug=False)


EXPORTS = {"gguf": gguf_of, "pth": pth_of, "bnb": bnb_of}


def head_in(name: str, target: Path) -> Tensor | None:
    """The head that an export holds, None where it holds none."""
    if name == "gguf":
        found = {t.name: t for t in gguf.GGUFReader(target / "model-f32.gguf").tensors}
        return torch.tensor(found["output.weight"].data) if "output.weight" in found else None
    if name == "pth":
        return torch.load(target / "consolidated.00.pth", weights_only=True)["output.weight"]
    return tiny.tensors_of(target / "model.safetensors").get(HEAD)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_head_of_its_own_is_kept_although_the_config_says_tied(name: str, tmp_path: Path) -> None:
    model = tied(tmp_path / "model", own_head)
    assert EXPORTS[name](model, tmp_path / "out") == 0
    head = head_in(name, tmp_path / "out")
    assert head is not None
    assert torch.equal(head.float(), tiny.tensors_of(model / "model.safetensors")[HEAD])


@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_left_out_is_named_with_its_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tied(tmp_path / "model", same_head)
    assert EXPORTS[name](model, tmp_path / "out") == 0
    told = "".join(capsys.readouterr())
    assert f"left out: {TABLE}, computed anew by every program" in told
    assert (f"left out: {HEAD}, the same as {EMBEDDING} bit for bit" in told) == (
        head_in(name, tmp_path / "out") is None
    )


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize(
    "extra",
    ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "model.norm.bias", "visual.proj.weight",
     "model.mtp.0.weight", "lm_head.bias", "value_head.weight"],
)  # fmt: skip
def test_a_tensor_that_has_no_place_in_the_export_is_an_error(
    name: str, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.save_tiny_llama(tmp_path / "model")
    change_weights(model, lambda tensors: tensors.update({extra: torch.ones(64)}))
    assert EXPORTS[name](model, tmp_path / "out") != 0
    assert f"holds {extra}, which would be lost" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gptq_refuses_a_head_that_its_loader_would_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_known_families", lambda: ["llama"])
    settings = gptq.GptqOptions(group_size=32)
    with pytest.raises(gptq.ModelError, match="set tie_word_embeddings to false"):
        gptq.check_source(tied(tmp_path / "own", own_head), settings)
    gptq.check_source(tied(tmp_path / "same", same_head), settings)


def test_a_grown_vocabulary_grows_both_of_two_different_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tied(tmp_path / "model", own_head)
    grown = tiny.save_sentencepiece_tokenizer(tmp_path / "grown")
    tokenizer = gguf_models.load_tokenizer(grown)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(grown)
    words = ["apply", "--model_path", str(model), "--tokenizer_path", str(grown), "--output_path"]
    assert run_main(lambda: expand_vocab.main([*words, str(tmp_path / "out")]), debug=False) == 0
    assert "the head is tied" not in capsys.readouterr().out
    before, after = (tiny.tensors_of(place / "model.safetensors") for place in (model, tmp_path / "out"))
    new = tokenizer.convert_tokens_to_ids("<new>")
    for name in (HEAD, EMBEDDING):
        assert torch.equal(after[name][:new], before[name][:new])
    assert not torch.equal(after[HEAD][new], after[EMBEDDING][new])


# differences


def make(base: Path, tuned: Path, target: Path) -> int:
    words = ["make", "--base_path", str(base), "--tuned_path", str(tuned), "--output_path", str(target)]
    return run_main(lambda: weight_diff.main(words), debug=False)


def without_layer(tensors: dict[str, Tensor], *, number: int = 1) -> None:
    for name in [name for name in tensors if f".layers.{number}." in name]:
        del tensors[name]


def test_a_model_that_lost_a_layer_is_not_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = (tiny.save_tiny_llama(tmp_path / name) for name in ("base", "tuned"))
    change_weights(tuned, without_layer)
    assert make(base, tuned, tmp_path / "diff") != 0
    assert "lacks 9 tensors of layers that" in capsys.readouterr().err
    change_config(tuned, num_hidden_layers=1)  # taken out on purpose, and nothing else is changed
    assert make(base, tuned, tmp_path / "diff") != 0
    told = capsys.readouterr().err
    assert "in every tensor, but for model.layers.1." in told
    assert "of the 21, which it lacks, there is" in told.replace(";", "")
    change_weights(tuned, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert make(base, tuned, tmp_path / "diff") == 0
    assert "only in the base, not in the tuned model: model.layers.1." in capsys.readouterr().out


def test_a_difference_of_others_that_lacks_a_layer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, diff = (tiny.save_tiny_llama(tmp_path / name) for name in ("base", "diff"))
    change_weights(diff, without_layer)
    words = ["recover", "--base_path", str(base), "--diff_path", str(diff), "--output_path", str(tmp_path / "out")]
    assert run_main(lambda: weight_diff.main(words), debug=False) != 0
    assert "lacks 9 tensors of layers that" in capsys.readouterr().err


# positions


def yarn(directory: Path, **settings: Any) -> Path:
    model = gguf_models.save_model(directory, "yarn")
    rope = json.loads((model / "config.json").read_text(encoding="utf-8"))["rope_parameters"]
    return change_config(model, rope_parameters=rope | settings)


def llama_cpp_yarn(found: dict[str, Any], n: int) -> tuple[Tensor, float]:
    """Frequencies and factor of ggml's rope_yarn, from what a file says; betas as by the options of llama.cpp.

    https://github.com/ggml-org/llama.cpp: ggml_rope_yarn_corr_dims in ggml/src/ggml.c, rope_yarn in
    ggml/src/ggml-cpu/ops.cpp, and the names of the keys (LLM_KV_ROPE_SCALING_...) in src/llama-arch.cpp.
    """
    rope = {key.removeprefix("qwen3.rope."): value for key, value in found.items() if "rope." in key}
    base, factor, context = rope["freq_base"], rope["scaling.factor"], rope["scaling.original_context_length"]

    def dimension(rotations: float) -> float:
        return n * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(dimension(rope.get("scaling.yarn_beta_fast", 32.0))))
    high = min(n - 1, math.ceil(dimension(rope.get("scaling.yarn_beta_slow", 1.0))))
    ramp = 1 - ((torch.arange(n // 2) - low) / max(0.001, high - low)).clamp(0, 1)
    plain = base ** -(torch.arange(0, n, 2) / n)
    return plain / factor * (1 - ramp) + plain * ramp, rope.get("scaling.attn_factor", 1.0) * (
        1 + 0.1 * math.log(factor)
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention_factor": 1.5}, {"mscale": 0.8, "mscale_all_dim": 0.5}, {"mscale": 1.0, "mscale_all_dim": 1.0},
     {"beta_fast": 64.0, "beta_slow": 2.0}, {"beta_fast": 32, "beta_slow": 1}],
)  # fmt: skip
def test_llama_cpp_turns_positions_as_transformers_does(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model = yarn(tmp_path / "model", **settings)
    assert gguf_of(model, tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert ("--yarn-beta-fast 64 --yarn-beta-slow 2" in told) == (settings.get("beta_fast") == 64.0)
    fields = gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").fields
    frequencies, factor = llama_cpp_yarn({key: field.contents() for key, field in fields.items()}, 32)
    rotary = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb
    assert torch.allclose(frequencies.float(), rotary.inv_freq, rtol=1e-5)
    assert factor == pytest.approx(rotary.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"rope_type": "dynamic"}, "scaled by 'dynamic'"),
     ({"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}, "scaled by 'longrope'"),
     ({"truncate": False}, "'truncate' is false"), ({"mrope_section": [8, 4, 4]}, "turned by mrope_section"),
     ({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "scaled by 'llama3'")],
)  # fmt: skip
def test_positions_that_llama_cpp_turns_otherwise_are_refused_by_name(
    settings: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gguf_of(yarn(tmp_path / "model", **settings), tmp_path / "out") != 0
    assert told in capsys.readouterr().err


def test_positions_scaled_evenly(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny.save_tiny_llama(tmp_path / "model", rope_parameters=rope)
    assert read_layout(model).attention_factor == 1.0
    assert gguf_of(model, tmp_path / "out") == 0
    fields = gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").fields
    found = {key.removeprefix("llama.rope."): f.contents() for key, f in fields.items() if "rope." in key}
    assert found == {"dimension_count": 16, "freq_base": 10000.0, "scaling.type": "linear", "scaling.factor": 2.0}
