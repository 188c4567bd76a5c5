"""The proof of a merge: it sees what is wrong with a result, and computes what a whole model computes."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.errors import ModelError
from onecard.export.io.base import LazyCheckpoint, open_base
from onecard.export.io.weights import ShardWriter
from onecard.export.merge.effect import effect_of
from onecard.export.merge.forward import ForwardPass, run_together
from onecard.export.merge.lora_stack import LoadedLora
from onecard.export.merge.merge import merge_into
from onecard.export.merge.options import MergeSettings
from onecard.export.merge.tensors import MergeReport
from onecard.export.merge.verify import check_files, probe_prompts
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
    report = merge_into(
        folder / "result", str(base), [str(folder / "adapter")], MergeSettings(dtype="fp16", verify=False)
    )
    return base, folder / "adapter", folder / "result", report


def without(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, base: tensors.pop(name)


def changed(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, base: tensors.update({name: by(tensors[name])})


def as_in_base(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, base: tensors.update({name: base[name].half()})


DAMAGE = {
    "a layer of the base left as it was": (as_in_base(Q), "1 tensors are not as merged"),
    "another layer changed by a percent": (
        changed("model.layers.0.mlp.up_proj.weight", lambda w: w * 1.01), "1 tensors are not as merged"),
    "a merged layer changed by a percent": (changed(DOWN, lambda w: w * 1.01), "1 tensors are not as merged"),
    "a NaN": (changed(NORM, lambda w: w.clone().fill_(torch.nan)), rf"not as merged .*\['{NORM}'\]"),
    "a tensor lost": (without(NORM), "lacks 1 tensors"),
    "a tensor too many": (lambda tensors, base: tensors.update({"new": torch.ones(2)}), "other tensors than the base"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(name: str, merged: Any, tmp_path: Path) -> None:
    base, _, result, report = merged
    damage, message = DAMAGE[name]
    copy = tmp_path / "copy"
    shutil.copytree(result, copy)
    tensors = load_file(copy / "model.safetensors")
    damage(tensors, load_file(base / "model.safetensors"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        check_files(copy, open_base(str(base)), report)


def test_a_wrong_merge_is_refused_and_no_rounding_is_blamed(
    merged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _, _ = merged
    right = LoadedLora.merged

    def half(self: LoadedLora, module: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        return {name: torch.lerp(before[name], sum_, 0.5) for name, sum_ in right(self, module, tensors).items()}

    monkeypatch.setattr(LoadedLora, "merged", half)
    for dtype in ("fp32", "bf16"):
        (tmp_path / dtype).mkdir()
        with pytest.raises(ModelError, match=r"does not agree with its adapters: (4|5)\d\.\d% of .* before rounding, "):
            merge_into(tmp_path / dtype, str(base), [str(adapter)], MergeSettings(dtype=dtype))


def test_the_base_is_read_once_and_layers_in_turn(merged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor's fp32 values are made once for three forward passes, the merge and the comparison with the base."""
    base, adapter, _, _ = merged
    reads: list[str] = []
    right = LazyCheckpoint.read

    def read(self: LazyCheckpoint, parameter: str) -> torch.Tensor:
        reads.append(parameter)
        return right(self, parameter)

    monkeypatch.setattr(LazyCheckpoint, "read", read)
    for number, dtype in enumerate(("auto", "fp32")):
        (tmp_path / dtype).mkdir()
        report = merge_into(
            tmp_path / dtype, str(base), [str(adapter), str(adapter)][number:], MergeSettings(dtype=dtype)
        )
        assert sorted(reads) == sorted(report.checksums) and len(reads) == 12, dtype
        assert " 100.0% of what the adapters change" in report.proof
        reads.clear()


def test_auto_leaves_fp16_at_the_first_layer_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_tiny_llama(tmp_path / "base", layers=3)
    make_adapter(loaded(base), tmp_path / "adapter", target_modules=["q_proj"])
    stored = load_file(base / "model.safetensors")
    stored["model.layers.0.post_attention_layernorm.weight"] *= 60_000
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    stored_as: list[torch.dtype] = []
    right = ShardWriter.add

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        stored_as.append(tensor.dtype)
        right(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    (tmp_path / "result").mkdir()
    report = merge_into(tmp_path / "result", str(base), [str(tmp_path / "adapter")])
    assert report.dtype == "bf16" and "computes numbers up to" in report.notes[0]
    n_layer = sum(name.startswith("model.layers.0.") for name in stored)
    assert stored_as == [torch.float16] * (1 + n_layer) + [torch.bfloat16] * len(stored)


def test_a_fault_in_one_forward_pass_ends_those_beside_it(merged: Any) -> None:
    base, _, _, _ = merged
    stored, order = open_base(str(base)), list[str]()

    def reader(letter: str, broken: str = "") -> Callable[[str], dict[str, torch.Tensor]]:
        def read(layer: str) -> dict[str, torch.Tensor]:
            order.append(letter)
            if layer == broken:
                raise ModelError(f"{layer} is broken")
            return {name: stored.read(name) for name in stored.own_parameters_of(layer)}

        return read

    passes = [ForwardPass(stored.build(), reader(letter), [[3, 4, 5]]) for letter in "ab"]
    run_together(passes)
    assert "".join(order) == "ab" + "a" * 9 + "b" * 9 + "abab"  # embeddings, one layer, norm, head
    assert torch.equal(passes[0].logits[0], passes[1].logits[0]) and passes[0].largest > 0
    n_threads = threading.active_count()
    passes = [ForwardPass(stored.build(), reader(letter, "model.norm" * (letter == "b")), [[3]]) for letter in "abc"]
    with pytest.raises(ModelError, match=r"model\.norm is broken"):
        run_together(passes)
    assert threading.active_count() == n_threads and not any(one.logits for one in passes)
    assert all(parameter.is_meta for one in passes for parameter in one.model.parameters())  # ready for another try


def test_what_rounding_costs_is_reported_with_its_share(merged: Any, tmp_path: Path) -> None:
    base, _, _, _ = merged
    make_adapter(loaded(base), tmp_path / "small", size=3e-3, target_modules=["q_proj", "down_proj"])
    proofs = {}
    for dtype in ("bf16", "fp32"):
        (tmp_path / dtype).mkdir()
        proofs[dtype] = merge_into(
            tmp_path / dtype, str(base), [str(tmp_path / "small")], MergeSettings(dtype=dtype)
        ).proof
    assert "the rest is lost to the rounding to bf16" in proofs["bf16"] and "100.0% of" not in proofs["bf16"]
    assert "100.0% of what the adapters change" in proofs["fp32"] and "rounding" not in proofs["fp32"]


def test_the_reported_effect_is_that_of_whole_models(merged: Any, tmp_path: Path) -> None:
    import peft

    base, adapter, result, _ = merged
    (tmp_path / "verified").mkdir()
    proof = merge_into(tmp_path / "verified", str(base), [str(adapter)], MergeSettings(dtype="fp16")).proof
    reference = peft.PeftModel.from_pretrained(loaded(base), adapter).eval()
    prompts = probe_prompts(result, 448, open_base(str(base)))
    with torch.no_grad():
        with_adapter, found, without = (
            torch.cat([model(torch.tensor([ids])).logits[0] for ids in prompts]).double().log_softmax(-1)
            for model in (reference, loaded(result), loaded(base))
        )
    apart, moved = (torch.nn.functional.kl_div(other, with_adapter, reduction="batchmean", log_target=True)
                    for other in (found, without))  # fmt: skip
    told = [float(word) for word in re.findall(r"\d\.\de-\d\d", proof)]
    assert told == pytest.approx([float(apart), float(moved)], rel=0.06)
    assert f"of {len(with_adapter)} places" in proof and "2 of 2 target layers changed" in proof


def test_probe_prompts_speak_both_languages_and_the_template(merged: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from onecard.data.built_in_templates import FOLDER

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


def test_effect_of_known_logits() -> None:
    torch.manual_seed(0)
    base, change, noise = torch.randn(3, 7, 50, dtype=torch.float64).unbind()
    everything = effect_of([base + change], [base], [base + change])
    assert everything.kept == pytest.approx(1) and everything.apart == 0 and everything.is_whole
    assert everything.moved > 0.1 and everything.n_same == everything.n_places == 7
    small = 1e-3 * change
    assert effect_of([base + small], [base], [base + 0.7 * small]).kept == pytest.approx(0.7, abs=1e-6)
    assert not effect_of([base + small], [base], [base + small + small.norm() * 1e-1 * noise]).is_whole
    assert not effect_of([base + change], [base], [base * torch.nan]).is_whole
    grown = torch.cat([base + change, torch.zeros(7, 5)], dim=1)
    assert effect_of([grown, grown], [base, None], [grown, grown]).moved == pytest.approx(everything.moved)
