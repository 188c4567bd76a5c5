"""One model over two cards with --max_memory: training, evaluation, resume and answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, SamplingOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.data.messages import Turn
from onecard.errors import ConfigError
from onecard.inference.engine import GenerationRequest, open_engine
from onecard.recipes import finetune
from onecard.train import loop
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import assert_same_end, run_and_stop
from tests.simcard import is_simulated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, or --simcard sm75:11GiB,sm75:11GiB"),
]

SHARES = "0:500KiB,1:2MiB"
ON_CARDS = {"device": "cuda", "total_batch": 4, "num_epoch": 1, "learning_rate": 1e-3, "gradient_checkpointing": True,
            "test_size": 4, "lora_dropout": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_llama(tmp_path_factory.mktemp("four-layers"), layers=4, initializer_range=0.15, seed=3)


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    """It has one arithmetic per process, and these runs have several."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Where the trained weights lay while training began."""
    found: dict[str, set[str]] = {}
    real = loop.take_step

    def looking(run: Any, *args: Any, **kwargs: Any) -> Any:
        found["trained"] = {str(p.device) for p in run.plain_model.parameters() if p.requires_grad}
        return real(run, *args, **kwargs)

    monkeypatch.setattr(loop, "take_step", looking)
    return found


@pytest.mark.parametrize("options", [{"bits": 4, "dtype": "fp16", "mlp_tile": 64}, {"bits": 8, "dtype": "fp16"}])
def test_two_cards_learn_what_one_does(
    base: Path, instructions: Path, tmp_path: Path, places: dict[str, set[str]], options: dict[str, Any]
) -> None:
    # The norm of all gradients is added up card by card: its last digit moves what 8-bit layers round.
    settings = ON_CARDS | options | {"lora_dropout": 0.0, "max_grad_norm": 0.0}
    one = finetune(tiny.config_for(base, instructions, tmp_path / "one", **settings))
    assert places["trained"] == {"cuda:0"}
    two = finetune(tiny.config_for(base, instructions, tmp_path / "two", **settings, max_memory=SHARES))
    assert places["trained"] == {"cuda:0", "cuda:1"}
    evaluated = [[row["eval_loss"] for row in read_log(run) if "eval_loss" in row] for run in (one, two)]
    assert evaluated[0]
    pairs = [*zip(tiny.losses_of(one), tiny.losses_of(two), strict=True)]
    assert len(pairs) == 5
    tolerance = 0 if is_simulated() else 1e-3
    assert max(abs(a - b) for (_, a), (_, b) in pairs) <= tolerance
    assert max(abs(a - b) for a, b in zip(*evaluated, strict=True)) <= tolerance


def test_a_run_on_two_cards_goes_on_bit_for_bit(
    base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ON_CARDS | {"bits": 4, "dtype": "fp16", "max_memory": SHARES, "optimizer": "paged_adamw_8bit"}
    straight = finetune(tiny.config_for(base, instructions, tmp_path / "straight", **settings))
    config = tiny.config_for(base, instructions, tmp_path / "run", **settings)
    run_and_stop(config, monkeypatch, after_steps=2)
    assert_same_end(straight, finetune(config))


def test_a_part_of_the_base_in_ram_is_refused_for_training(base: Path, instructions: Path, tmp_path: Path) -> None:
    config = tiny.config_for(base, instructions, tmp_path / "run", **ON_CARDS, max_memory="0:400KiB,cpu:1GiB")
    with pytest.raises(ConfigError, match=r"--max_memory.* outside the GPUs") as refused:
        finetune(config)
    assert "raise the shares" in str(refused.value)


def test_what_needs_one_card_is_refused_with_several() -> None:
    asked = {"--offload_activations": {"offload_activations": "on"}, "--head_bits": {"head_bits": "8"},
             "--offload_embeddings": {"offload_embeddings": "on"}}  # fmt: skip
    for flag, memory in asked.items():
        config = FinetuneConfig(ModelOptions(max_memory=SHARES), memory=MemoryOptions(**memory))  # type: ignore[arg-type]
        assert [problem[0] for problem in config.problems()] == [flag]
        config = FinetuneConfig(ModelOptions(max_memory="0:1GiB"), memory=config.memory)
        assert config.problems() == []


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("bundle", [InferenceOptions(), InferenceOptions(static_cache=True)])
def test_two_cards_answer_as_one_does(base: Path, bits: int, bundle: InferenceOptions) -> None:
    said = []
    for max_memory in (None, SHARES):
        model = ModelOptions(str(base), bits=bits, device="cuda", max_memory=max_memory)  # type: ignore[arg-type]
        engine = open_engine(model, bundle, LimitOptions(), None)
        request = GenerationRequest(
            (Turn("user", "What is the capital of France?"),), sampling=SamplingOptions(max_new_tokens=12)
        )
        said.append([list(engine.stream(request))[-1][0].text for _ in range(2)])
    assert said[0] == said[1] and said[0][0]
