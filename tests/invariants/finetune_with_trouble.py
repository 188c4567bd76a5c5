"""`finetune.py` in which something happens at a known step: a real signal, or a NaN. Started by `tests/launching.py`.

TROUBLE       SIGTERM-to-torchrun   as `kill` and job schedulers do: torchrun passes it on to its workers
              SIGINT-to-group       as Ctrl-C in a terminal does: torchrun and all in its group get it
              SIGINT-to-one-worker  only the second process hears of it; the others must agree to stop
              nan-loss, nan-gradient  in the second process only
              out-of-memory         in the second process only, in its first micro-batch of the step, once
TROUBLE_STEP  the step after which the signal is sent, in which the NaN appears or memory runs out
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

import finetune
from onecard.console import run_main
from onecard.objectives import next_token
from onecard.train import loop

KIND, STEP, RANK = os.environ["TROUBLE"], int(os.environ["TROUBLE_STEP"]), int(os.environ.get("RANK", "0"))


def send() -> None:
    if KIND == "SIGTERM-to-torchrun":
        os.kill(os.getppid(), signal.SIGTERM)
    elif KIND == "SIGINT-to-group":
        os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
    else:
        os.kill(os.getpid(), signal.SIGINT)


def step_then_signal(run: Any, requested: Any) -> Any:
    result = real_step(run, requested)
    sender = 1 if KIND == "SIGINT-to-one-worker" else 0
    if run.state.step + 1 == STEP and sender == RANK:
        send()
        deadline = time.monotonic() + 60
        while not requested().stop and time.monotonic() < deadline:
            time.sleep(0.01)
    return result


def loss_then_nan(model: Any, batch: Any, **settings: Any) -> Any:
    loss, n_supervised = real_loss(model, batch, **settings)
    if current_step == STEP - 1 and RANK == 1:
        loss = loss * float("nan") if KIND == "nan-loss" else loss + (loss * 0).sqrt()  # its slope there is not finite
    return loss, n_supervised


def loss_without_memory(model: Any, batch: Any, **settings: Any) -> Any:
    global current_step
    loss, n_supervised = real_loss(model, batch, **settings)
    if current_step == STEP - 1 and RANK == 1:
        current_step = -1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return loss, n_supervised


def step_counted(run: Any, requested: Any) -> Any:
    global current_step
    current_step = run.state.step
    return real_step(run, requested)


if __name__ == "__main__":
    current_step = -1  # the rehearsal is none
    real_step, real_loss = loop.take_step, next_token.summed_loss
    if KIND.startswith("nan"):
        loop.take_step, next_token.summed_loss = step_counted, loss_then_nan
    elif KIND == "out-of-memory":
        loop.take_step, next_token.summed_loss = step_counted, loss_without_memory
    else:
        loop.take_step = step_then_signal
    sys.exit(run_main(finetune.main))
