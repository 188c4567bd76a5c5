"""Training through DeepSpeed: optimizer state (ZeRO-1) and gradients (ZeRO-2) divided over the processes.

The same loop, the same numbers, the same checkpoints as without it: DeepSpeed sees fp32 adapters and fp32 gradients,
autocast happens inside the model, and `optimizer.pt` is written in the form of the undivided optimizer. So a run goes
on with another number of processes, or without DeepSpeed, and the other way round.

The only file that imports deepspeed. https://deepspeed.readthedocs.io/en/stable/training.html
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from onecard.errors import CheckpointError, ConfigError

# What DeepSpeed's ZeRO optimizer calls, in its state_dict, the places of parameters in the partition of this process.
_PIECES = "param_slice_mappings"


class Autocast(nn.Module):
    """A model whose forward computes in 16 bits. Inside the wrapper: DeepSpeed switches off what is set outside."""

    def __init__(self, module: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.device_type, self.dtype = module, device_type, dtype

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with torch.autocast(self.device_type, dtype=self.dtype):
            return self.module(*inputs, **named)


class LossScale:
    """The fp16 loss scale: halved after an overflow, doubled after many steps without one.

    DeepSpeed scales fp16 weights only; the adapters here are fp32, their gradients pass through fp16. Values and stored
    form are those of `torch.amp.GradScaler`.
    """

    def __init__(self) -> None:
        self.scale, self.good_steps = 2.0**16, 0

    def update(self, overflow: bool) -> None:
        """Draw the conclusion from one step."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale *= 0.5
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
                "_growth_tracker": self.good_steps}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["_growth_tracker"])


class DeepSpeedEngine:
    """Backward and step through DeepSpeed; the same interface as `engine.Engine`."""

    can_repeat = False
    needs_every_turn = True

    def __init__(self, accelerator: Any, model: Any, optimizer: ShardedOptimizer) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer

    @property
    def scaler(self) -> LossScale | None:
        """The fp16 loss scale, or None where the number format needs none."""
        return self.optimizer.scaler

    @property
    def has_scaler(self) -> bool:
        """Whether a gradient that overflows is normal."""
        return self.scaler is not None

    def gathering(self, is_last: bool) -> AbstractContextManager[Any]:
        """The context of one micro-batch; only the last one of a step completes the gradients."""
        self.model.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradients of one micro-batch."""
        if self.scaler is not None:
            self.model.optimizer.override_loss_scale(self.scaler.scale)
        # DeepSpeed averages gradients over processes; the step's loss is a sum over them.
        self.model.backward(loss * self.accelerator.num_processes)

    def clip(self) -> float:
        """Clip *and* step, which DeepSpeed does in one; returns the norm before it.

        A step whose norm is NaN or Inf is not taken; the answer is then Inf.
        """
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return float(norm) if self.model.was_step_applied() else math.inf

    def step(self) -> bool:
        """True when `clip` left the step out for an overflow."""
        skipped = not self.model.was_step_applied()
        if self.scaler is not None:
            self.scaler.update(skipped)
        return skipped

    def forget(self) -> None:
        """Drop the gradients gathered so far. DeepSpeed cannot drop all of them: a step cannot be done again."""
        self.model.optimizer.zero_grad()


@dataclass(frozen=True)
class ShardLayout:
    """Where the parameters of the undivided optimizer lie in the partitions of the processes."""

    names: list[list[str]]
    """Per parameter group, the parameters in the optimizer's order."""
    shapes: dict[str, torch.Size]
    pieces: list[list[dict[str, tuple[int, int]]]]
    """Per process, per group: name -> (start, length) in its flat partition; the parts of one parameter follow
    the ranks."""

    def index(self, group: int) -> int:
        """The number that the first parameter of a group has in `optimizer.pt`."""
        return sum(len(names) for names in self.names[:group])


class ShardedOptimizer:
    """The optimizer as the loop and the checkpoints see it: whole, though each process holds a part of its state."""

    def __init__(self, engine: Any, base: torch.optim.Optimizer, layout: ShardLayout, scaler: LossScale | None) -> None:
        self.engine, self.base, self.layout, self.scaler = engine, base, layout, scaler

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def state_dict(self) -> dict[str, Any]:
        """The state as the undivided optimizer would store it. Every process has to ask; all get the answer."""
        return join_states(gather_object([_on_cpu(self.base.state_dict())]), self.layout)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this process's part out of a whole state. The adapter has its stored values already."""
        expected = [len(names) for names in self.layout.names]
        found = [len(group["params"]) for group in state["param_groups"]]
        if found != expected:
            raise CheckpointError(f"the optimizer state is for {found} parameters per group; {expected} are trained")
        sizes = [group["params"][0].numel() for group in self.base.param_groups]
        self.base.load_state_dict(split_state(state, self.layout, torch.distributed.get_rank(), sizes))
        self.engine.optimizer.refresh_fp32_params()


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], dtype: torch.dtype,
            device: torch.device) -> tuple[Any, ShardedOptimizer]:  # fmt: skip
    """Hand model and optimizer to DeepSpeed; returns its engine, which is called like the model, and the optimizer.

    Raises ConfigError for a configuration that DeepSpeed refuses, and for one of its accelerators that is not `device`.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    own = get_accelerator().device_name()
    if own != device.type:
        raise ConfigError("--deepspeed", f"DeepSpeed would train on {own}, but --device says {device.type}; set the "
                          f"environment variable DS_ACCELERATOR={device.type}")  # fmt: skip
    whole = model if dtype == torch.float32 else Autocast(model, device.type, dtype)
    named = {id(parameter): name for name, parameter in whole.named_parameters()}
    groups = [list(group["params"]) for group in optimizer.param_groups]
    names = [[named[id(parameter)] for parameter in group] for group in groups]
    shapes = {named[id(parameter)]: parameter.shape for group in groups for parameter in group}
    _limit_bucket(config["zero_optimization"], sum(shape.numel() for shape in shapes.values()))
    try:
        engine, _, _, _ = deepspeed.initialize(model=whole, optimizer=optimizer, config=config)
    except (ValueError, TypeError, KeyError, AssertionError) as reason:
        raise ConfigError("--deepspeed", f"DeepSpeed refuses this configuration: {reason}") from reason
    own_pieces = [
        {name: (piece.start, piece.numel) for name, piece in group.items()}
        for group in engine.optimizer.state_dict()[_PIECES]
    ]
    layout = ShardLayout(names, shapes, gather_object([own_pieces]))
    scaler = LossScale() if dtype == torch.float16 else None
    return engine, ShardedOptimizer(engine, optimizer, layout, scaler)


def join_states(shards: Sequence[dict[str, Any]], layout: ShardLayout) -> dict[str, Any]:
    """One optimizer state out of the flat ones of all processes.

    Two processes, parameters a (3 values) and b (2), padded to 3 per process:

        process 0: exp_avg [a0 a1 a2]      ->  state {0: {"exp_avg": [a0 a1 a2]}, 1: {"exp_avg": [b0 b1]}}
        process 1: exp_avg [b0 b1 pad]
    """
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for number, names in enumerate(layout.names):
        first = layout.index(number)
        groups.append({**shards[0]["param_groups"][number], "params": list(range(first, first + len(names)))})
        flat = [shard["state"].get(number, {}) for shard in shards]
        for position, name in enumerate(names):
            pieces = [where[number].get(name) for where in layout.pieces]
            entry = {key: _joined([part[key] for part in flat], pieces, layout.shapes[name]) for key in flat[0]}
            if entry:  # before the first step there is no state
                state[first + position] = entry
    return {"state": state, "param_groups": groups}


def split_state(state: dict[str, Any], layout: ShardLayout, rank: int, sizes: Sequence[int]) -> dict[str, Any]:
    """The flat optimizer state of process `rank` out of a whole one: the opposite of `join_states`.

    sizes: length of this process's partition per parameter group, padding included; the padding gets zeros.
    """
    flat: dict[int, dict[str, Any]] = {}
    groups = []
    for number, names in enumerate(layout.names):
        first = layout.index(number)
        groups.append({**state["param_groups"][number], "params": [number]})
        entries = {name: state["state"].get(first + position) for position, name in enumerate(names)}
        pieces = [where[number] for where in layout.pieces[: rank + 1]]
        part = {key: _cut({name: entry[key] for name, entry in entries.items()}, pieces, sizes[number])
                for key in entries[names[0]] or ()}  # fmt: skip
        if part:
            flat[number] = part
    return {"state": flat, "param_groups": groups}


def _cut(values: dict[str, Any], pieces: list[dict[str, tuple[int, int]]], size: int) -> Any:
    """One process's part of a value of all parameters; `pieces` are those of the processes before it and its own."""
    example = next(iter(values.values()))
    if not isinstance(example, Tensor):
        return example
    if example.dim() == 0:
        return example.clone()
    target = torch.zeros(size, dtype=example.dtype)
    for name, (start, length) in pieces[-1].items():
        before = sum(where.get(name, (0, 0))[1] for where in pieces[:-1])
        target[start : start + length] = values[name].flatten()[before : before + length]
    return target


def _joined(parts: list[Any], pieces: list[tuple[int, int] | None], shape: torch.Size) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if parts[0].dim() == 0:
        # The number of steps, the same everywhere; each parameter counts on with a tensor of its own.
        return parts[0].clone()
    found = [part[piece[0] : piece[0] + piece[1]] for part, piece in zip(parts, pieces, strict=True) if piece]
    return torch.cat(found).reshape(shape).clone()


def _on_cpu(value: Any) -> Any:
    """The same nested state with its tensors in RAM: a GPU of one process is not that of another."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return [_on_cpu(inner) for inner in value] if isinstance(value, list) else value


def _limit_bucket(zero: dict[str, Any], n_trained: int) -> None:
    """DeepSpeed reserves this many values for the exchange; more than there are gradients is memory for nothing."""
    wanted = int(zero.get("reduce_bucket_size", n_trained))
    zero["reduce_bucket_size"] = max(1, min(wanted, n_trained))
