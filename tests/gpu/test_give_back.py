"""A run that leaves its card for a while: the card is free meanwhile, and the result is the same, bit for bit."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from onecard.errors import ModelError
from onecard.model.hardware import free_and_total_bytes, reserved_bytes
from onecard.model.memory_saving.card_to_ram import CardToRam
from onecard.recipes import finetune
from onecard.train import loop
from onecard.train.control import reply, send, status
from tests import tiny
from tests.runs import assert_same_end
from tests.simcard import is_simulated

pytestmark = pytest.mark.gpu

PATIENCE_S = 60.0
SMALL_SHARE = 0.01
OPTIONS = {"device": "cuda", "total_batch": 4, "num_epoch": 2, "lora_dropout": 0.1, "test_size": 4, "eval_steps": 4}
WAYS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "dtype": "fp16", "optimizer": "adamw_8bit"},
    "4 bits, paged": {"bits": 4, "dtype": "fp16", "optimizer": "paged_adamw_8bit"},
    "8 bits": {"bits": 8, "dtype": "fp16", "gradient_checkpointing": True},
    "16 bits": {"bits": 16, "dtype": "fp16", "peft_method": "full", "lora_dropout": 0.0},
    "32 bits": {"bits": 32, "gradient_checkpointing": True, "offload_activations": "on", "offload_embeddings": "on"},
    "streamed": {"bits": 4, "dtype": "fp16", "gradient_checkpointing": True, "stream_layers": "on"},
}


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    """It has one arithmetic per process, and these runs have several."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Guest:
    """Takes the card of a run at some of its steps, looks how much is left there, and gives it back."""

    def __init__(self, run: Path, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.shares, self.failures = run, list[float](), list[BaseException]()
        self._threads = list[threading.Thread]()
        real, done = loop.take_step, 0

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            result = real(*args, **kwargs)
            done += 1
            if done in steps:
                send(run, "ask", question="Say hello", max_new_tokens=3)
                send(run, "give_back")
                self._threads.append(threading.Thread(target=self._visit, args=(len(self.shares),)))
                self._threads[-1].start()
            return result

        monkeypatch.setattr(loop, "take_step", step)

    def _visit(self, n_before: int) -> None:
        try:
            self._wait(lambda: status(self.run).state == "given_back")
            device = torch.device("cuda", 0)
            self.shares.append(reserved_bytes(device) / free_and_total_bytes(device)[1])
            request = send(self.run, "take_back")
            self._wait(lambda: reply(self.run, request).is_final)
            assert reply(self.run, request).state == "done"
        except BaseException as reason:
            self.failures.append(reason)
            send(self.run, "stop")

    def _wait(self, fits: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not fits():
            assert time.monotonic() < deadline, status(self.run)
            time.sleep(0.02)

    def leave(self) -> None:
        for thread in self._threads:
            thread.join()
        assert not self.failures


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_left_its_card_ends_as_undisturbed(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    options = {**OPTIONS, **WAYS[way]}
    undisturbed = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "undisturbed", **options))
    AcceleratorState._reset_state(True)
    guest = Guest(tmp_path / "run", {3, 7}, monkeypatch)
    run = finetune(tiny.config_for(tiny_base, instructions, guest.run, **options))
    guest.leave()
    assert len(guest.shares) == 2 and max(guest.shares) < SMALL_SHARE
    if "peft_method" not in options:
        assert_same_end(undisturbed, run)
    else:
        assert tiny.same_tensors(*(tiny.tensors_of(each / "model.safetensors") for each in (undisturbed, run)))
        assert tiny.losses_of(undisturbed) == tiny.losses_of(run)


@pytest.mark.slow
def test_ten_random_moments_on_the_card(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, **WAYS["4 bits"], "num_epoch": 8}
    undisturbed = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "undisturbed", **options))
    moments = set(random.Random(20).sample(range(1, 40), 10))
    AcceleratorState._reset_state(True)
    guest = Guest(tmp_path / "run", moments, monkeypatch)
    run = finetune(tiny.config_for(tiny_base, instructions, guest.run, **options))
    guest.leave()
    assert_same_end(undisturbed, run)
    assert len(guest.shares) == 10 and max(guest.shares) < SMALL_SHARE


@pytest.mark.skipif(not is_simulated(), reason="fills the card")
def test_a_card_that_has_no_room_any_more_can_be_asked_again() -> None:
    """Objects, addresses of views in one storage, and values stay; what is asked for too early changes nothing."""
    whole = torch.arange(1 << 20, dtype=torch.float32, device="cuda")
    parameter = torch.nn.Parameter(whole[16:32].view(4, 4))
    away = CardToRam()
    away.leave()
    assert away.n_bytes >= whole.nbytes and torch.cuda.memory_allocated() == 0
    other = torch.empty(int(torch.cuda.mem_get_info()[0] // 512 * 512) - (2 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(ModelError, match="end what uses the card, and ask again"):
        away.come_back()
    assert away.n_bytes >= whole.nbytes and torch.cuda.memory_allocated() <= other.nbytes + 512
    del other
    torch.cuda.empty_cache()  # else what comes back would lie in this one segment, and hold it for all later tests
    away.come_back()
    assert away.n_bytes == 0
    assert parameter.flatten().tolist() == list(range(16, 32)) and whole[-1].item() == (1 << 20) - 1
    with torch.no_grad():
        parameter += 1
    assert whole[16].item() == 17
