"""Training through DeepSpeed: optimizer state (ZeRO-1), gradients (ZeRO-2) and weights (ZeRO-3) over the processes.

The same loop, the same numbers, the same checkpoints as without it: DeepSpeed sees fp32 adapters and fp32 gradients,
autocast happens inside the model, and `optimizer.pt` is written in the form of the undivided optimizer. So a run goes
on with another number of processes, or without DeepSpeed, and the other way round.

ZeRO-3 divides all but the embeddings and the output head, which stay whole everywhere: how often the chunked loss calls
the head depends on a process's rows, and each call of a divided module is an exchange between all processes.

The only file that imports deepspeed. https://deepspeed.readthedocs.io/en/stable/training.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from onecard.config.zero_stage import DIVIDES_BASE
from onecard.console import first_line
from onecard.errors import CheckpointError, ConfigError
from onecard.model.output_head import innermost
from onecard.train.optimizer_shards import ShardLayout, join_states, pieces_of_each, split_state

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


class Zero3Model(nn.Module):
    """A model as ZeRO-3 sees it: without the parameters that stay whole, which at each step it would put away."""

    def __init__(self, module: nn.Module, whole: list[nn.Module]) -> None:
        super().__init__()
        self.module = module
        self._kept = {id(parameter) for one in whole for parameter in one.parameters()}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def named_parameters(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in super().named_parameters(*arguments, **named) if id(p) not in self._kept)


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

    def whole_weights(self, *, written: bool = False) -> AbstractContextManager[Any]:
        """Where every trained weight is whole, which all processes have to enter; written: new values are put there."""
        if not self.model.zero_optimization_partition_weights():
            return nullcontext()
        import deepspeed

        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return deepspeed.zero.GatheredParameters(trained, modifier_rank=0 if written else None)


class ShardedOptimizer:
    """The optimizer as the loop and the checkpoints see it: whole, though each process holds a part of its state."""

    def __init__(self, engine: Any, base: torch.optim.Optimizer, layout: ShardLayout, scaler: LossScale | None) -> None:
        self.engine, self.base, self.layout, self.scaler = engine, base, layout, scaler

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def state_dict(self) -> dict[str, Any]:
        """The state as the undivided optimizer would store it. Every process has to ask; all get the answer."""
        with self._with_parameters():
            own = _on_cpu(self.base.state_dict())
        return join_states(gather_object([own]), self.layout)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this process's part out of a whole state. The adapter has its stored values already."""
        expected = [len(names) for names in self.layout.names]
        found = [len(group["params"]) for group in state["param_groups"]]
        if found != expected:
            raise CheckpointError(f"the optimizer state is for {found} parameters per group; {expected} are trained")
        with self._with_parameters():
            sizes = [group["params"][0].numel() for group in self.base.param_groups]
            self.base.load_state_dict(split_state(state, self.layout, torch.distributed.get_rank(), sizes))
        self.engine.optimizer.refresh_fp32_params()

    @contextmanager
    def _with_parameters(self) -> Iterator[None]:
        """Let the optimizer have its flat parameters, by which it knows its state; ZeRO-3 takes them between steps."""
        if not self.engine.zero_optimization_partition_weights():
            yield
            return
        for group, flat in zip(self.base.param_groups, self.engine.optimizer.fp32_partitioned_groups_flat, strict=True):
            group["params"] = [flat]
        try:
            yield
        finally:
            for group in self.base.param_groups:
                group["params"] = []


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], dtype: torch.dtype,
            device: torch.device) -> tuple[Any, ShardedOptimizer]:  # fmt: skip
    """Hand model and optimizer to DeepSpeed; returns its engine, which is called like the model, and the optimizer.

    Under ZeRO-3 the decoder layers may lie in RAM: they come to the device weight by weight, as they are divided.
    Raises ConfigError for a configuration that DeepSpeed refuses, and for one of its accelerators that is not `device`.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    own = get_accelerator().device_name()
    if own != device.type:
        raise ConfigError("--deepspeed", f"DeepSpeed would train on {own}, but --device says {device.type}; set the "
                          f"environment variable DS_ACCELERATOR={device.type}")  # fmt: skip
    divides = config["zero_optimization"]["stage"] == DIVIDES_BASE
    whole = model if dtype == torch.float32 else Autocast(model, device.type, dtype)
    whole = Zero3Model(whole, whole_modules(model)) if divides else whole
    named = {id(parameter): name for name, parameter in whole.named_parameters()}
    groups = [list(group["params"]) for group in optimizer.param_groups]
    names = [[named[id(parameter)] for parameter in group] for group in groups]
    shapes = {named[id(parameter)]: parameter.shape for group in groups for parameter in group}
    _limit_bucket(config["zero_optimization"], sum(shape.numel() for shape in shapes.values()))
    with left_out(whole, whole_modules(model)) if divides else nullcontext():
        try:
            if divides:
                deepspeed.zero.Init(module=whole, config_dict_or_path=config)
            engine, _, _, _ = deepspeed.initialize(model=whole, optimizer=optimizer, config=config)
        except (ValueError, TypeError, KeyError, AssertionError) as reason:
            raise ConfigError("--deepspeed", f"DeepSpeed refuses this configuration: {first_line(reason)}") from reason
    if divides:
        _move_rest(model, device)
        pieces = pieces_of_each(names, shapes, torch.distributed.get_world_size())
    else:
        pieces = gather_object([_own_pieces(engine)])
    layout = ShardLayout(names, shapes, pieces)
    scaler = LossScale() if dtype == torch.float16 else None
    return engine, ShardedOptimizer(engine, optimizer, layout, scaler)


def _own_pieces(engine: Any) -> list[dict[str, tuple[int, int]]]:
    """Under ZeRO-1 and 2: per parameter group, where each parameter lies in the partition of this process."""
    return [
        {name: (piece.start, piece.numel) for name, piece in group.items()}
        for group in engine.optimizer.state_dict()[_PIECES]
    ]


def whole_modules(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output head. Raises ConfigError where something in them is trained."""
    base = innermost(model)
    asked = [getattr(base, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    found = [module for module in asked if module is not None]
    if any(parameter.requires_grad for module in found for parameter in module.parameters()):
        raise ConfigError("--deepspeed", "ZeRO stage 3 keeps embeddings and output head whole, and cannot train them; "
                          "use stage 2, or train decoder layers only")  # fmt: skip
    return found


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Move what ZeRO-3 leaves where it is: the embeddings and the head, and buffers."""
    for module in whole_modules(model):
        module.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@contextmanager
def left_out(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Take modules out of a model for a while: what walks over it meanwhile leaves them as they are."""
    places = [
        (parent, name, child) for parent in model.modules() for name, child in parent.named_children()
        if child in modules
    ]  # fmt: skip
    for parent, name, _ in places:
        setattr(parent, name, None)
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


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
