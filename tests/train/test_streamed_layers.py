"""Layers in RAM during a run: whether they are is no part of the run, so it may change from start to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onecard.config.training import FinetuneConfig
from onecard.recipes import finetune
from onecard.train import build
from onecard.train.not_finite import _broken_tensors
from tests import tiny
from tests.runs import assert_same_end, run_and_stop

RUN: dict[str, Any] = {"total_batch": 7, "test_size": 3, "num_epoch": 1, "gradient_checkpointing": "auto"}


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_llama(tmp_path_factory.mktemp("deep"), layers=5)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow), pytest.param(32, marks=pytest.mark.slow)])
def test_streamed_resident_and_changed_between_kills_a_run_ends_alike(
    bits: int, deep_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def config(name: str, where: str) -> FinetuneConfig:
        return tiny.config_for(deep_base, instructions, tmp_path / name, **RUN, bits=bits, stream_layers=where)

    resident = finetune(config("resident", "off"))
    assert "pass through" not in capsys.readouterr().out
    run_and_stop(config("changed", "on"), monkeypatch, after_steps=1)
    assert "5 layers lie in RAM (" in capsys.readouterr().out
    run_and_stop(config("changed", "off"), monkeypatch, after_steps=1)
    assert_same_end(resident, finetune(config("changed", "on")))


def test_embeddings_stay_in_ram_beside_the_layers(
    deep_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    real = build.use_limits
    monkeypatch.setattr(build, "use_limits", lambda run, limits: (runs.append(run), real(run, limits))[1])
    more = {"bits": 32, "offload_embeddings": "on", "offload_activations": "on", "max_steps": 1}
    names = [
        finetune(tiny.config_for(deep_base, instructions, tmp_path / where, **RUN, **more, stream_layers=where))
        for where in ("on", "off")
    ]
    assert_same_end(*names)
    # Reading all tensors, as the search for NaN does, finds each layer's own.
    streamed, resident = (run.plain_model for run in runs)
    with_nan = resident.get_base_model().model.layers[3].mlp.up_proj.base_layer.weight
    assert list(_broken_tensors(runs[1])) == list(_broken_tensors(runs[0])) == []
    with_nan[0, 0] = float("nan")
    assert list(_broken_tensors(runs[1])) == ["model.layers.3.mlp.up_proj.weight"]
    assert streamed is not resident


@pytest.mark.parametrize(("options", "text"), [
    ({"gradient_checkpointing": False}, "on needs --gradient_checkpointing on"),
    ({"deepspeed": "zero.json"}, "on does not go with --deepspeed"),
    ({"max_memory": "0:1GiB"}, "on does not go with --max_memory"),
])  # fmt: skip
def test_what_streaming_contradicts_is_a_problem_of_the_options(options: dict[str, Any], text: str) -> None:
    config = tiny.with_options(FinetuneConfig(), {**options, "stream_layers": "on"})
    ((flag, problem),) = [*config.model.problems(), *config.problems()]
    assert flag == "--stream_layers" and problem.startswith(text)
