"""The cached reference of preference runs: equal to the computed one, kept, gone on with, never taken for another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onecard.errors import CheckpointError
from onecard.recipes import finetune
from onecard.train import reference
from tests import tiny
from tests.objectives.test_preference import OPTIONS, pair_file

ALONE = {**OPTIONS, "micro_batch": 1, "max_steps": 4, "test_size": 4, "eval_steps": 2, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_file(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 16)


def assert_same(one: Path, other: Path) -> None:
    """Every bit of the adapter, and every loss that `other` has."""
    assert set(tiny.losses_of(other)) <= set(tiny.losses_of(one))
    assert tiny.same_tensors(*(tiny.tensors_of(run / "adapter_model.safetensors") for run in (one, other)))


def values_in(cache: Path) -> list[np.ndarray]:
    return [np.frombuffer(file.read_bytes()[32:], "<f4") for file in sorted(cache.glob("*.reference"))]


def test_a_cached_reference_gives_the_bits_of_a_computed_one(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is there for the next run, whatever the objective, its split and its batch are."""
    cache = tmp_path / "cache"
    options = {**ALONE, "cache_path": str(cache)}
    computed = finetune(tiny.config_for(tiny_base, data, tmp_path / "computed", **options))
    assert not list(cache.glob("*.reference"))
    cached = finetune(tiny.config_for(tiny_base, data, tmp_path / "cached", **options, cache_reference=True))
    assert_same(computed, cached)
    (values,) = values_in(cache)
    assert len(values) == 32 and (values < 0).all()
    assert "16 pairs are given to the reference" in capsys.readouterr().out
    monkeypatch.setattr(reference, "evaluate", None)
    again = {**options, "objective": "ipo", "test_size": 2, "seed": 1, "max_steps": 1, "cache_reference": True}
    finetune(tiny.config_for(tiny_base, data, tmp_path / "again", **again))
    assert "the reference is the base without adapter: log-probabilities of 16" in capsys.readouterr().out


def test_a_start_adapter_is_the_reference_of_a_run_that_goes_on(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """Its values may be gone by then: they are computed again from the adapter, not from the checkpoint."""
    start = finetune(tiny.config_for(tiny_base, data, tmp_path / "start", **{**ALONE, "max_steps": 2}))
    options = {**ALONE, "init_adapter": str(start), "cache_path": str(tmp_path / "cache")}
    whole = finetune(tiny.config_for(tiny_base, data, tmp_path / "whole", **options))
    assert tiny.losses_of(whole)[0][1] == pytest.approx(0.693147, abs=1e-6)
    (values,) = values_in(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    again = {**options, "resume_from_checkpoint": str(whole / "checkpoint-2")}
    resumed = finetune(tiny.config_for(tiny_base, data, tmp_path / "resumed", **again))
    assert [step for step, _ in tiny.losses_of(resumed)] == [3, 4]
    assert_same(whole, resumed)
    assert np.array_equal(values_in(tmp_path / "cache")[0], values)
    shutil.rmtree(start)  # no longer needed: its values are kept
    finetune(tiny.config_for(tiny_base, data, tmp_path / "third", **again))
    assert_same(whole, tmp_path / "third")
    shutil.rmtree(tmp_path / "cache")
    shutil.copytree(whole, start)
    with pytest.raises(CheckpointError, match="is the reference of this run and has changed since it began"):
        finetune(tiny.config_for(tiny_base, data, tmp_path / "other", **again))


@pytest.mark.slow
def test_another_base_is_computed_anew_and_damage_is_said(
    tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    options = {**ALONE, "cache_path": str(cache), "max_steps": 1, "cache_reference": True}
    finetune(tiny.config_for(tiny_base, data, tmp_path / "first", **options))
    (kept,) = cache.glob("*.reference")
    whole = kept.read_bytes()
    other = tiny.save_tiny_llama(tmp_path / "base", seed=1)
    finetune(tiny.config_for(other, data, tmp_path / "second", **options))
    values = values_in(cache)
    assert len(values) == 2 and not np.allclose(*values)
    finetune(tiny.config_for(tiny_base, data, tmp_path / "quantised", **options, bits=8))
    assert len(values_in(cache)) == 3
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    finetune(tiny.config_for(tiny_base, data, tmp_path / "third", **options))
    assert "the cached reference in" in "".join(capsys.readouterr()) and kept.read_bytes() == whole


def test_an_interrupted_start_goes_on_with_what_is_missing(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**ALONE, "cache_path": str(tmp_path / "cache"), "max_steps": 1, "cache_reference": True}
    real, asked = reference.evaluate, []

    def interrupted(run: Any, pairs: list[Any], **given: Any) -> torch.Tensor:
        asked.append([pair.row for pair in pairs])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(run, pairs, **given)

    monkeypatch.setattr(reference, "evaluate", interrupted)
    monkeypatch.setattr(reference, "BLOCK", 5)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny.config_for(tiny_base, data, tmp_path / "run", **options))
    assert np.isnan(values_in(tmp_path / "cache")[0]).sum() == 12
    finetune(tiny.config_for(tiny_base, data, tmp_path / "run", **options))
    assert len(asked) == 5 and sorted(asked[3] + asked[4]) == sorted({*range(0, 32, 2)} - {*asked[0], *asked[1]})
