"""Memory that runs out somewhere in a run changes nothing but time: it ends with the weights that it would have had.

Memory runs out for real here: at the n-th operation of torch inside forward, backward, clipping or evaluation, the
exception is raised that a card's allocator raises, with everything half done.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.config.training import FinetuneConfig
from onecard.errors import ModelError
from onecard.objectives import next_token
from onecard.recipes import finetune
from onecard.train import evaluate, step
from onecard.train.accelerator import TrainingEngine
from onecard.train.trackers import read_log
from tests import tiny
from tests.launching import finish, launch, torchrun
from tests.runs import assert_same_end, final_checkpoint

# Memory may run out in each of these; the optimizer's own step is the exception, and has a test of its own.
PLACES = [(step, "_backward"), (TrainingEngine, "clip"), (evaluate.Evaluator, "_within_memory")]


@pytest.fixture(autouse=True)
def quick_collection() -> Iterator[None]:
    """Each failure is followed by a garbage collection; let it not look through all of pytest and torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Operations(TorchDispatchMode):
    """Counts the operations of torch, and runs out of memory at some of them."""

    def __init__(self, fails_at: set[int]) -> None:
        super().__init__()
        self.fails_at, self.done, self.failed_in, self.place = fails_at, 0, [], ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done += 1
        if self.done in self.fails_at:
            self.failed_in.append(self.place)
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 MiB ({func})")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self, places: list[tuple[Any, str]] = PLACES) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in places:
                patch.setattr(owner, name, self._watched(getattr(owner, name), name))
            yield

    def _watched(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.place = name
            with self:
                return real(*args, **kwargs)

        return watched


def finetune_failing(config: FinetuneConfig, fails_at: set[int] = frozenset()) -> Operations:  # type: ignore[assignment]
    operations = Operations(fails_at)
    with operations.watching():
        finetune(config)
    return operations


def events_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_log(run) if row.get("event") == "out_of_memory"]


def assert_each_told_once(run: Path, n_events: int, printed: str) -> None:
    """One row and one printed line for each, and both say the same."""
    rows = events_of(run)
    assert len(rows) == n_events
    lines = [line for line in printed.splitlines() if ": out of memory; " in line]
    assert len(lines) == n_events
    assert all(f"out of memory; {row['change']}. " in line for row, line in zip(rows, lines, strict=True))


def spread(n: int, total: int, seed: int) -> set[int]:
    """n operations of `total`, one at random in each of n equal stretches, so that no single step fails too often."""
    chosen, width = random.Random(seed), total // n
    return {i * width + chosen.randrange(1, width + 1) for i in range(n)}


def test_twenty_times_at_random(
    tiny_base: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows pass alone, so each retry is cut as before: 20 failures in one run, and every bit is the same."""
    alone = {"micro_batch": 1, "total_batch": 1, "max_steps": 30, "num_epoch": 2, "test_size": 4, "eval_steps": 3,
             "save_steps": 7, "gradient_checkpointing": True, "rehearsal": False}  # fmt: skip
    undisturbed = tiny.config_for(tiny_base, instructions, tmp_path / "undisturbed" / "run", **alone)
    n_operations = finetune_failing(undisturbed).done
    capsys.readouterr()
    config = tiny.config_for(tiny_base, instructions, tmp_path / "disturbed" / "run", **alone)
    operations = finetune_failing(config, spread(20, n_operations, seed=1))
    run = Path(config.train.output_path)
    assert len(operations.failed_in) == 20
    assert {"_backward", "_within_memory"} <= set(operations.failed_in)
    assert_same_end(Path(undisturbed.train.output_path), run)
    assert_each_told_once(run, 20, capsys.readouterr().out)


VARIANTS = {
    "plain": {"gradient_checkpointing": False},
    "chosen": {"gradient_checkpointing": "auto"},
    "chunks": {"gradient_checkpointing": False, "loss_chunk": 16},
    "checkpoints": {"gradient_checkpointing": True},
    "offload": {"gradient_checkpointing": True, "offload_activations": "on"},
    "tiles": {"gradient_checkpointing": True, "mlp_tile": 64},
    "4 bits": {"bits": 4, "gradient_checkpointing": True},
    "8 bits": {"bits": 8, "gradient_checkpointing": True, "mlp_tile": 64},
}
FAST = ("chosen", "chunks", "offload", "8 bits")  # the last with recomputed layers and tiles
SHORT = {"micro_batch": 0, "micro_tokens": 600, "total_batch": 6, "max_steps": 3, "test_size": 4, "eval_steps": 2,
         "learning_rate": 1e-4}  # fmt: skip


@pytest.fixture
def small_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a tiny model go to RAM as well."""
    real = step.ActivationOffload
    monkeypatch.setattr(step, "ActivationOffload", lambda model, device: real(model, device, min_bytes=1))


@pytest.mark.usefixtures("small_offload")
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in VARIANTS]
)
def test_however_it_is_computed(variant: str, tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """Failures that make the pieces smaller: the same weights within 1e-6."""
    options = {**SHORT, **VARIANTS[variant]}
    undisturbed = tiny.config_for(tiny_base, instructions, tmp_path / "undisturbed" / "run", **options)
    n_operations = finetune_failing(undisturbed).done
    config = tiny.config_for(tiny_base, instructions, tmp_path / "disturbed" / "run", **options)
    operations = finetune_failing(config, spread(4, n_operations, seed=len(variant)))
    one, other = (Path(c.train.output_path) for c in (undisturbed, config))
    assert len(operations.failed_in) == len(events_of(other)) == 4
    changes = {row["change"] for row in events_of(other)}
    assert len(changes) > 1, "nothing was made smaller"
    assert any("layers are computed again" in change for change in changes) == (variant == "chosen")
    weights = [tiny.tensors_of(run / "adapter_model.safetensors") for run in (one, other)]
    assert tiny.largest_difference(*weights) < 1e-6
    assert len(tiny.losses_of(other)) == 3


def test_in_each_place(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """Once in each: the first operation, and one in the middle, where the work is half done; with dropout, too."""
    options = {**SHORT, "micro_tokens": 0, "micro_batch": 1, "loss_chunk": 64, "lora_dropout": 0.2, "rehearsal": False}
    config = tiny.config_for(tiny_base, instructions, tmp_path / "0" / "run", **options)
    finetune(config)
    tried = 0
    for owner, name in PLACES:
        for at in (1, 20):
            tried += 1
            again = tiny.with_options(config, {"output_path": str(tmp_path / str(tried) / "run")})
            operations = Operations({at})
            with operations.watching([(owner, name)]):
                finetune(again)
            assert operations.failed_in == [name]
            assert len(events_of(Path(again.train.output_path))) == 1
            assert_same_end(tmp_path / "0" / "run", Path(again.train.output_path))
    assert tried == 6


def test_inside_the_optimizer(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """Half an update cannot be taken back: the run ends, says so, and goes on from the newest checkpoint."""
    config = tiny.config_for(tiny_base, instructions, tmp_path / "undisturbed" / "run", **SHORT)
    finetune(config)
    run = tmp_path / "disturbed" / "run"
    config = tiny.with_options(config, {"output_path": str(run)})
    real, n_steps = TrainingEngine.step, 0

    def second_fails(engine: TrainingEngine) -> bool:
        nonlocal n_steps
        n_steps += 1
        with Operations({15 if n_steps == 2 else 0}):
            return real(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingEngine, "step", second_fails)
        with pytest.raises(ModelError, match=r"inside the optimizer at step 2, .* GiB were planned.*the same command"):
            finetune(config)
    assert final_checkpoint(run).name == "checkpoint-1"
    finetune(config)
    assert_same_end(tmp_path / "undisturbed" / "run", run)


def test_nothing_left_to_make_smaller(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """Memory that runs out again and again ends the run with the plan; all that was tried is in the log."""
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **{**SHORT, "rehearsal": False})
    real, n_failures = next_token.summed_loss, 0

    def failing(model: Any, batch: Any, **settings: Any) -> Any:
        nonlocal n_failures
        if not torch.is_grad_enabled() or not (tmp_path / "run" / "checkpoint-1").is_dir():
            return real(model, batch, **settings)
        n_failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "summed_loss", failing)
        with pytest.raises(ModelError, match=r"step 2 with nothing left .* GiB were planned.*--cutoff_len"):
            finetune(config)
    rows = events_of(tmp_path / "run")
    assert 4 <= n_failures == len(rows) + 1
    assert [row["change"] for row in rows[-3:]] == ["the same once more"] * 3 != [row["change"] for row in rows[:3]]
    assert final_checkpoint(tmp_path / "run").name == "checkpoint-1"


@pytest.mark.parametrize("place", ["training", "evaluation"])
def test_other_errors_are_not_swallowed(place: str, tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **{**SHORT, "rehearsal": False})

    real = next_token.summed_loss

    def broken(model: Any, batch: Any, **settings: Any) -> Any:
        if torch.is_grad_enabled() != (place == "training"):
            return real(model, batch, **settings)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "summed_loss", broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            finetune(config)


@pytest.mark.slow
def test_one_of_two_processes(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """The second one's memory runs out: both do the step again, and nobody waits for ever."""
    options = {**SHORT, "micro_tokens": 400, "log_samples": True}
    for name in ("undisturbed", "disturbed"):
        config = tiny.config_for(tiny_base, instructions, tmp_path / name / "run", **options)
        trouble = {"trouble": "out-of-memory", "at_step": 2} if name == "disturbed" else {}
        finish(launch(torchrun(2), config, tmp_path / name, **trouble))
    one, other = (tmp_path / name / "run" for name in ("undisturbed", "disturbed"))
    assert [row["step"] for row in events_of(other)] == [2]
    assert not events_of(one)
    weights = [tiny.tensors_of(run / "adapter_model.safetensors") for run in (one, other)]
    assert tiny.largest_difference(*weights) < 1e-6
