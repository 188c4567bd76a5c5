"""The proof of a merge: it sees what is wrong with a result, and computes what a whole model computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.console import ModelError
from onecard.export import verify
from onecard.export.merge import MergeReport, MergeSettings, merge_into
from onecard.export.stored_base import open_base
from onecard.export.verify import probe_prompts, relative_difference, verify_merge
from tests import tiny
from tests.export.test_merge import loaded, make_adapter

Q, DOWN, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, MergeReport]:
    """A base, a LoRA on two of its layers, the two merged in fp16, and the report of it."""
    folder = tmp_path_factory.mktemp("merged")
    base = tiny.save_tiny_llama(folder / "base", layers=1)
    make_adapter(loaded(base), folder / "adapter", target_modules=["q_proj", "down_proj"])
    (folder / "result").mkdir()
    report = merge_into(folder / "result", str(base), [str(folder / "adapter")], MergeSettings("fp16", verify=False))
    return base, folder / "adapter", folder / "result", report


def without(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, base: tensors.pop(name)


def changed(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, base: tensors.update({name: by(tensors[name])})


def as_in_base(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, base: tensors.update({name: base[name].half()})


DAMAGE = {
    "a layer of the base left as it was": (as_in_base(Q), "1 target layers are not as merged"),
    "another layer changed by a percent": (
        changed("model.layers.0.mlp.up_proj.weight", lambda w: w * 1.01), "does not agree with its adapters"),
    "a merged layer changed by a percent": (changed(DOWN, lambda w: w * 1.01), "does not agree with its adapters"),
    "a NaN": (changed(NORM, lambda w: w.clone().fill_(torch.nan)), f"merged {NORM} holds NaN"),
    "a tensor lost": (without(NORM), "lacks 1 tensors"),
    "a tensor too many": (lambda tensors, base: tensors.update({"new": torch.ones(2)}), "other tensors than the base"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(name: str, merged: Any, tmp_path: Path) -> None:
    base, adapter, result, report = merged
    damage, message = DAMAGE[name]
    copy = tmp_path / "copy"
    shutil.copytree(result, copy)
    tensors = load_file(copy / "model.safetensors")
    damage(tensors, load_file(base / "model.safetensors"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        verify_merge(copy, open_base(str(base)), [str(adapter)], report)


def test_a_model_that_magnifies_rounding_is_kept_when_no_better_file_exists(
    merged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, result, report = merged
    monkeypatch.setitem(verify.TOLERANCES, "fp16", 1e-9)
    proof = verify_merge(result, open_base(str(base)), [str(adapter)], report)
    assert "over the bound, but every tensor is the exact sum rounded once to fp16" in proof
    copy = Path(shutil.copytree(result, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    flat = tensors[DOWN].flatten()
    flat[0] = torch.nextafter(flat[0], torch.tensor(float("inf"), dtype=flat.dtype))
    save_file(tensors | {DOWN: flat.view_as(tensors[DOWN])}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not agree with its adapters"):
        verify_merge(copy, open_base(str(base)), [str(adapter)], report)


def test_the_reported_difference_is_that_of_whole_models(merged: Any) -> None:
    import peft

    base, adapter, result, report = merged
    proof = verify_merge(result, open_base(str(base)), [str(adapter)], report)
    reference = peft.PeftModel.from_pretrained(loaded(base), adapter).eval()
    prompts = probe_prompts(result, 448, open_base(str(base)))
    with torch.no_grad():
        expected, found = ([model(torch.tensor([ids])).logits[0] for ids in prompts]
                           for model in (reference, loaded(result)))  # fmt: skip
    told = float(proof.split("differ by ")[1].split()[0])
    assert told == pytest.approx(relative_difference(expected, found), rel=0.06)
    assert 1e-5 < told < 1e-3
    n_places = sum(map(len, prompts))
    assert f"of {n_places} places" in proof and "2 of 2 target layers changed" in proof


def test_probe_prompts_speak_both_languages_and_the_template(merged: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from onecard.text.template import FOLDER

    base, _, result, _ = merged
    copy = tmp_path / "copy"
    shutil.copytree(result, copy)
    without_template = probe_prompts(copy, 448, open_base(str(base)))
    shutil.copyfile(FOLDER / "alpaca.jinja", copy / "chat_template.jinja")
    prompts = probe_prompts(copy, 448, open_base(str(base)))
    assert len(without_template) == 4 and len(prompts) == 6
    texts = AutoTokenizer.from_pretrained(copy).batch_decode(prompts)
    assert "### Response" in texts[0] and "世界" in texts[1]
    assert prompts[-1][-1] == 447 and all(len(ids) <= 64 for ids in prompts)


def test_relative_difference() -> None:
    one, other = torch.tensor([[1.0, -4.0]]), torch.tensor([[1.5, -4.0]])
    assert relative_difference([one, one], [one, other]) == pytest.approx(0.125)
    assert not relative_difference([one], [one * torch.nan]) <= 1.0
