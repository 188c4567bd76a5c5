"""Logits of models that are in memory one layer at a time, and of several of them side by side.

Each layer gets its weights right before it runs and loses them right after. Passes that run together take turns after
each layer, so that what one of them has read of a layer serves the others. Knows modules and prompts; does not know
files, nor where weights come from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from onecard.export.merge.lora_stack import empty, fill, parents_of, plain_name
from onecard.export.merge.rounding import DoesNotFit

ReadLayer = Callable[[str], dict[str, Tensor]]


@dataclass
class ForwardPass:
    """One model on the meta device, where its layers' weights come from, and what came out."""

    model: Any
    read: ReadLayer
    """A layer's name -> its weights in fp32, by their names in the model."""
    prompts: list[list[int]]
    limit: float = inf
    """Of the absolute values between the layers; DoesNotFit beyond."""
    logits: list[Tensor] = field(default_factory=list)
    largest: float = 0.0


def run_together(passes: Sequence[ForwardPass]) -> None:
    """Fill in the logits of all passes; through each layer, the first one goes first. Raises what a pass raises."""
    turns = _Turns(len(passes))

    def run(number: int) -> None:
        one = passes[number]
        try:
            turns.wait(number)
            with _weights_on_demand(units_of(one.model), one.read, lambda: turns.give_up(number)):
                one.logits, one.largest = forward(one.model, one.prompts, one.limit)
        except BaseException as reason:
            turns.stop(reason)
        finally:
            turns.leave(number)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(passes))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C, too, which arrives here
        turns.stop(_Stopped())
        for thread in threads:
            thread.join()
    if turns.failure is not None and not isinstance(turns.failure, _Stopped):
        raise turns.failure


class _Stopped(Exception):
    """Ends a pass because of another's fault."""


class _Turns:
    """Whose turn it is among threads, of which one runs at a time."""

    def __init__(self, n: int) -> None:
        self._waiting = list(range(n))  # the first one runs
        self._changed = threading.Condition()
        self.failure: BaseException | None = None

    def wait(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or self._waiting[0] == number)
            if self.failure is not None:
                raise _Stopped

    def give_up(self, number: int) -> None:
        """Let all others run, and come back when it is this one's turn again."""
        with self._changed:
            self._waiting.append(self._waiting.pop(0))
            self._changed.notify_all()
        self.wait(number)

    def leave(self, number: int) -> None:
        with self._changed:
            self._waiting.remove(number)
            self._changed.notify_all()

    def stop(self, reason: BaseException) -> None:
        """End all; the first reason is kept."""
        with self._changed:
            self.failure = self.failure or reason
            self._changed.notify_all()


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """What gets its weights at once: each member of a list of layers, and else whatever holds weights of its own."""
    units: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(outer in units for outer in parents_of(name))
        is_member = name.rpartition(".")[2].isdigit()
        is_wrapper = hasattr(module, "base_layer") or hasattr(module, "token_adapter")
        is_wrapper = is_wrapper or hasattr(module, "modules_to_save")
        if not is_inside and (is_member or is_wrapper or next(module.parameters(recurse=False), None) is not None):
            units[name] = module
    return units


@contextmanager
def _weights_on_demand(units: dict[str, nn.Module], read: ReadLayer, unit_done: Callable[[], object]) -> Iterator[None]:
    """Inside, each unit gets its weights right before it runs and loses them right after."""
    hooks, filled = [], {name: list[str]() for name in units}
    for name, unit in units.items():

        def load(module: nn.Module, _: Any, name: str = name) -> None:
            filled[name] += fill(module, _weights_of(name, module, read))

        def unload(module: nn.Module, _: Any, __: Any, name: str = name) -> None:
            empty(module, filled[name])
            filled[name].clear()
            unit_done()

        hooks += [unit.register_forward_pre_hook(load), unit.register_forward_hook(unload)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, unit in units.items():  # after a fault
            empty(unit, filled[name])


def _weights_of(unit: str, module: nn.Module, read: ReadLayer) -> dict[str, Tensor]:
    """The weights that a unit lacks, by their plain names inside it; one that was trained in full lacks none."""
    missing = [
        plain_name(f"{unit}.{name}")
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.is_meta and "original_module." not in name
    ]
    found: dict[str, Tensor] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in missing):
        found |= {name.removeprefix(f"{unit}."): tensor for name, tensor in read(layer).items()}
    return found


def forward(model: Any, prompts: list[list[int]], limit: float = inf) -> tuple[list[Tensor], float]:
    """Logits (places, vocabulary) of each prompt, all in one pass, and the largest value between the layers.

    Padding stands behind and is cut off again. Raises DoesNotFit at the first layer beyond `limit`.
    """
    longest, largest = max(map(len, prompts)), [0.0]
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])

    def look(_: nn.Module, __: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if isinstance(values, Tensor) and values.is_floating_point():
            largest.append(max(abs(float(value)) for value in torch.aminmax(values)))
            if largest[-1] > limit:
                raise DoesNotFit(
                    f"this model computes numbers up to {largest[-1]:.3g} on the probe prompts, and fp16 ends at 65504"
                )

    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] != "lm_head"]
    hooks = [module.register_forward_hook(look) for module in layers]
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [row[: len(prompt)] for row, prompt in zip(logits, prompts, strict=True)], max(largest)
