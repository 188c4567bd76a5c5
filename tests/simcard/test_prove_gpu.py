"""The proof on a card, rehearsed on the simulated one: every step runs, and its file is as it should be."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.context_per_vram import config_for, try_length
from benchmarks.proof_steps import TOY, Setting
from benchmarks.prove_gpu import Ended, ProofOptions, prove
from benchmarks.random_models import random_base
from benchmarks.synthetic_run import real_run
from onecard.config.base_model import ModelOptions
from onecard.errors import OneCardError
from onecard.installation import SCRIPTS
from onecard.model.hardware import detect
from onecard.model.memory.estimate import MemoryConfig
from onecard.model.model_layers import linear_layers
from onecard.train.step import take_step
from tests.simcard.card import Card
from tests.test_prove_gpu import entries

pytestmark = pytest.mark.simcard
# What runs in this process. The others start processes of their own.
HERE = ("plan", "context", "ladder", "speed", "serving")


def run_here(command: Sequence[str], limit: float, prefix: Path) -> Ended:
    """The program as a function in this process, which has the card already."""
    words = list(command[1:])
    verb = next((verb for verb, script in SCRIPTS.items() if script == words[0]), "")
    of_verb = f"onecard.programs.{verb.replace('-', '_')}"
    module = importlib.import_module(of_verb if verb else words[0].removesuffix(".py").replace("/", "."))
    out, err, begun, code = io.StringIO(), io.StringIO(), time.monotonic(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([word for word in words[1:] if word != "--debug"])
        except OneCardError as reason:
            code = 1
            err.write(str(reason))
        except Exception:
            code = 1
            traceback.print_exc()
        finally:
            AcceleratorState._reset_state(True)  # one number format per process
            torch.cuda.set_per_process_memory_fraction(1.0)
    return Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - begun)


@pytest.fixture(scope="module")
def rehearsal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of a rehearsal by their step."""
    options = ProofOptions(rehearse=True, pretend_turing=True, steps=",".join(HERE), device="cuda:0",
                           output_path=str(tmp_path_factory.mktemp("proof")))  # fmt: skip
    return entries(prove(options, run_here))


def test_every_step_of_this_process_ends_well_and_says_that_it_measured_nothing(rehearsal: dict[str, Any]) -> None:
    assert list(rehearsal) == list(HERE)
    for name, entry in rehearsal.items():
        assert entry["status"] == "done", (name, entry["reason"], entry["last_lines"])
        assert entry["machine"]["is_simulated"] and entry["rehearsal"]


def test_the_numbers_are_those_of_a_card(rehearsal: dict[str, Any], card: Card) -> None:
    numbers = {name: entry["numbers"] for name, entry in rehearsal.items()}
    assert numbers["plan"]["constants"].keys() == {"context_bytes", "slack_share_mean", "slack_share_largest"}
    assert numbers["plan"]["constants"]["context_bytes"] >= 2**29 - 2**20  # which the simulated card assumes
    assert numbers["plan"]["asked"] > len(numbers["plan"]["rows"]) >= 1  # a second is not enough for all
    assert all(row["reserved_bytes"] >= row["training_bytes"] for row in numbers["plan"]["rows"])
    (context,) = numbers["context"]["rows"]
    assert context["planned"] > 0 and len(context["tried"]) == 1 and context["not_run"] is None
    assert numbers["ladder"]["rows"][0]["measured"] > 0
    assert [row["name"] for row in numbers["speed"]["rows"]] == ["plain Hugging Face + PEFT", "onecard"]
    assert numbers["serving"]["rows"][0]["tokens"] == 4


@pytest.mark.shapes_only
def test_one_row_with_gradients_before_it_has_the_peak_of_two_steps_of_two(tmp_path: Path) -> None:
    toy = Setting(True, True, "", "cuda:0", tmp_path).toy()
    turing = detect("cuda:0", pretend_turing=True)
    found = [try_length(config_for(toy, 256, 1.0, quick=quick), turing, 1024) for quick in (True, False)]
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(one["passed"] for one in found)
    assert found[0]["reserved_gib"] == pytest.approx(found[1]["reserved_gib"], rel=0.03)


@pytest.mark.shapes_only
@pytest.mark.parametrize("tied", [False, True])
def test_a_random_base_never_lies_there_in_16_bits(tied: bool) -> None:
    """Nor do the embeddings twice, where the head is tied to them: 128 MiB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = TOY | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
                    "tie_word_embeddings": tied, "vocab_size": 64_000}  # fmt: skip
    base = random_base(config, ModelOptions(bits=4), detect("cuda:0", pretend_turing=True))
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    in_16_bits = 2 * sum(module.in_features * module.out_features for module in linear_layers(base.model).values())
    # Beside what stays: the largest layer in 16 and in 32 bits, and what quantising it takes.
    assert held < peak < held + 4 * 2 * 1024 * 4096 < held + in_16_bits / 3


def test_a_planned_run_whose_embeddings_lie_in_ram_has_them_there() -> None:
    AcceleratorState._reset_state(True)
    setup = MemoryConfig(bits=4, element_bytes=2, rows=1, length=16, offload_embeddings=True)
    run = real_run(TOY, setup, detect("cuda:0", pretend_turing=True))
    assert run.plain_model.get_base_model().get_input_embeddings().weight.device.type == "cpu"
    assert take_step(run).loss > 0


@pytest.mark.slow
def test_the_whole_rehearsal_runs_in_processes_of_its_own(tmp_path: Path, card: Card) -> None:
    spec = card.spec.devices[0]
    simcard = f"sm{spec.capability[0]}{spec.capability[1]}:{spec.total_bytes >> 30}GiB"
    options = ProofOptions(minutes=60, rehearse=True, simcard=simcard, output_path=str(tmp_path / "proof"))
    found = entries(prove(options))
    statuses = {name: (entry["status"], entry["reason"], entry["last_lines"]) for name, entry in found.items()}
    ended_well = {name for name, (status, *_) in statuses.items() if status == "done"}
    assert any("simulated" in one["value"] for one in found["doctor"]["numbers"]["findings"])
    assert ended_well >= {"gpu_tests", "plan", "context", "ladder", "speed", "serving", "kill_and_resume"}, statuses
    assert found["kill_and_resume"]["numbers"]["is_bitwise"]
    assert found["gpu_tests"]["numbers"]["passed"] >= 1
    assert json.dumps(found["streamed"]["reason"]).startswith('"not in this version')
