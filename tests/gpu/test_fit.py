"""What the fit promises, on a real card: a plan that is not under the peak, recovery under a cap, Turing's path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import context_per_vram, memory_ladder, step_speed
from benchmarks.random_models import random_base
from benchmarks.synthetic_run import build_run, plan_for, planned_peak, random_samples, run_peak
from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.model.hardware import detect
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import CUDA_CONTEXT_BYTES, GIB
from onecard.model.out_of_memory import give_back_memory
from onecard.train.auto_config import cap_memory
from onecard.train.run import Run
from onecard.train.step import take_step
from tests.simcard import is_simulated

pytestmark = pytest.mark.gpu

# Large enough for the tensors of a step to outweigh what libraries take for themselves.
MIDDLE = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
          "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 131072,
          "tie_word_embeddings": False}  # fmt: skip
# Small enough for its losses to be computed without a card, too.
LITTLE = MIDDLE | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 2048}


@pytest.fixture(autouse=True)
def _memory_of_the_test_before() -> None:
    """What an earlier run holds in reference cycles would be counted here."""
    give_back_memory()


def config_for(length: int, bits: int = 4, **memory: object) -> FinetuneConfig:
    settings = {"loss_chunk": 512, "offload_activations": "off", "offload_embeddings": "off", "head_bits": "16",
                "mlp_tile": -1, "pretend_turing": True} | memory  # fmt: skip
    return FinetuneConfig(
        ModelOptions("middle", bits=bits, gradient_checkpointing=True),  # type: ignore[arg-type]
        DataOptions(cutoff_len=length),
        LoraOptions(lora_r=16),
        TrainOptions(total_batch=4, micro_batch=2, max_steps=9, optimizer="adamw"),
        MemoryOptions(**settings),  # type: ignore[arg-type]
    )


def run_for(config: FinetuneConfig, model: dict[str, object] = MIDDLE) -> Run:
    turing = detect("cuda", pretend_turing=True)
    samples = random_samples([config.data.cutoff_len] * 4, model["vocab_size"])
    return build_run(config, turing, random_base(model, config.model, turing), samples)


@pytest.mark.shapes_only
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("memory", [{}, {"offload_activations": "on"}, {"mlp_tile": 1024, "head_bits": "8"}])
def test_the_plan_is_close_to_the_peak_and_not_under_it(bits: int, memory: dict[str, object]) -> None:
    config = config_for(4096, bits, **memory)
    plan = plan_for(config, architecture_of(MIDDLE), detect("cuda", pretend_turing=True), 4096)
    run = run_for(config)
    measured = run_peak(run, lambda: take_step(run), embeddings_in_ram=False).tensor_bytes
    planned = planned_peak(plan.account).tensor_bytes
    assert 0.95 * planned < measured < 1.03 * planned, f"{measured / GIB:.3f} of {planned / GIB:.3f} GiB"


def test_the_turing_path_knows_no_bf16() -> None:
    run = run_for(config_for(128), LITTLE)
    assert run.accelerator.scaler is not None
    dtypes = {tensor.dtype for tensor in [*run.plain_model.parameters(), *run.plain_model.buffers()]}
    assert torch.float16 in dtypes and torch.bfloat16 not in dtypes
    losses = [take_step(run).loss for _ in range(4)]
    assert losses[-1] < losses[0]


def peak_and_third_loss() -> tuple[int, float]:
    """Bytes reserved by a run that has the whole card, and the loss of its third step."""
    run = run_for(config_for(4096))
    peak = run_peak(run, lambda: take_step(run), embeddings_in_ram=False)  # takes two steps
    return peak.reserved_bytes or 0, take_step(run).loss


@pytest.mark.shapes_only
def test_a_card_that_is_too_small_changes_the_cut_and_not_the_loss() -> None:
    peak, expected = peak_and_third_loss()
    give_back_memory()
    hardware = detect("cuda", pretend_turing=True)
    run = run_for(config_for(4096))
    try:
        cap_memory(hardware, (0.8 * peak + CUDA_CONTEXT_BYTES) / GIB)  # which are no part of `peak`
        got = [take_step(run).loss for _ in range(3)]
    finally:
        cap_memory(hardware, hardware.total_bytes / GIB)
    assert run.events and "out of memory" in run.events[0].message
    assert got[-1] == pytest.approx(expected, rel=1e-2)


@pytest.mark.skipif(is_simulated(), reason="compares losses and speeds of models too large to be computed on a CPU")
def test_each_benchmark_runs_on_the_card(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("ladder", "context", "speed")}
    memory_ladder.main(
        [
            "--pretend_turing",
            "--length",
            "2048",
            "--loss_chunk",
            "256",
            "--output",
            str(files["ladder"]),
        ]
    )
    context_per_vram.main(
        [
            "--model_path",
            "Llama-3.2-1B",
            "--vram",
            "4",
            "--tries",
            "2",
            "--output",
            str(files["context"]),
        ]
    )
    step_speed.main(["--pretend_turing", "--rounds", "3", "--output", str(files["speed"])])
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    assert {result["machine"]["device"] for result in results.values()} == {"cuda"}
    ladder = [row["measured"] for row in results["ladder"]["rows"]]
    assert len(ladder) == 9 and ladder[-1] < ladder[0]
    (row,) = results["context"]["rows"]
    assert len(row["tried"]) == 2 and row["tried"][0]["reserved_gib"] <= 4
    assert results["speed"]["rows"][1]["ratio"] > 0
    hardware = detect("cuda")
    cap_memory(hardware, hardware.total_bytes / GIB)
