"""From the last hidden states of any model to its logits: its own head, and what its family does to the output.

Knows the model inside its wrappers, its head and its config.json. It does not know labels or losses.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onecard.console import warn
from onecard.errors import ModelError
from onecard.installation import command

CAPPED_ROWS = 16  # of logits, while the gradient of the cap is computed in fp32

# Numbers of config.json that families do something to the head's output with: most scale it, HyperCLOVA X multiplies
# where Granite divides by the same name, and MiniCPM 3 divides what enters the head. So what fits is found by trying.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# How the logits of a model come about, by model, found at the first call of each; None: not as any of the known ways.
_scalings: weakref.WeakKeyDictionary[nn.Module, _LogitScaling | None] = weakref.WeakKeyDictionary()


def logits_at(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Return the logits (batch, len(positions), vocab) at `positions`, computing no others where the model can."""
    n_positions, n_seq = len(positions), inputs["input_ids"].shape[1]
    if not takes_positions(model):
        return _forward(model, **inputs).logits[:, positions]
    logits = _forward(model, **inputs, logits_to_keep=positions).logits
    if logits.shape[1] != n_positions:
        raise ModelError(
            f"{type(model).__name__} gave logits for {logits.shape[1]} positions of {n_seq}, but "
            f"{n_positions} were asked for: its logits_to_keep does not take a list of positions"
        )
    return logits


def _forward(model: nn.Module, **inputs: Any) -> Any:
    """Call the model without the sentence of GPT-2 that asks for an `attention_mask`: pads on the right need none."""
    logger = logging.getLogger("transformers.modeling_utils")

    def worth_saying(record: logging.LogRecord) -> bool:
        return "passing in an `attention_mask`" not in str(record.msg)

    logger.addFilter(worth_saying)
    try:
        return model(**inputs)
    finally:
        logger.removeFilter(worth_saying)


def takes_positions(model: nn.Module) -> bool:
    """Whether the forward of the model inside all wrappers takes `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(type(innermost(model)).forward).parameters


def innermost(model: nn.Module) -> Any:
    """The base model inside an adapter and other wrappers."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def positions_in_front(model: Any) -> int:
    """Positions that an adapter of virtual tokens puts in front of every text; 0 for all others."""
    inner = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return int(getattr(inner, "n_in_front", 0))


@dataclass(frozen=True)
class _LogitScaling:
    """What a family does to the head's output, in this order: Cohere multiplies, Granite divides, Gemma 2 caps."""

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None


@dataclass(frozen=True)
class OutputHead:
    """The way from hidden states (tokens, hidden) to logits (tokens, vocab), under the autocast that the model uses."""

    module: nn.Module
    autocast: bool
    autocast_dtype: torch.dtype
    scaling: _LogitScaling = field(default_factory=_LogitScaling)
    temperature: float = 1.0  # the logits are divided by it

    def output(self, hidden: Tensor) -> Tensor:
        """Return what the head alone makes of one chunk, differentiable where gradients are enabled."""
        # Evaluation runs under autocast inside the model's forward only, and this is outside.
        with torch.autocast(hidden.device.type, self.autocast_dtype, self.autocast, cache_enabled=False):
            return self.module(hidden)

    def finish(self, output: Tensor) -> Tensor:
        """Return the logits in fp32; `output` is overwritten (in fp32 without a cap, the logits are that memory).

        No layer keeps its own output for its gradient; for one that does, autograd would report the overwriting.
        """
        if self.scaling.factor is not None:
            output.mul_(self.scaling.factor)
        if self.scaling.divisor is not None:
            output.div_(self.scaling.divisor)
        cap = self.scaling.cap
        logits = output.float() if cap is None else output.div_(cap).tanh_().to(torch.float32, copy=True).mul_(cap)
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def unfinish(self, gradient: Tensor, output: Tensor) -> None:
        """Turn the gradient of the logits into that of the head's output, in place; `output` is as `finish` left it."""
        if self.temperature != 1:
            gradient.div_(self.temperature)
        if self.scaling.cap is not None:
            for rows, tanh in zip(gradient.split(CAPPED_ROWS), output.split(CAPPED_ROWS), strict=True):
                rows.mul_(1 - tanh.float().square())
        if self.scaling.divisor is not None:
            gradient.div_(self.scaling.divisor)
        if self.scaling.factor is not None:
            gradient.mul_(self.scaling.factor)


def states_and_head(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, OutputHead] | None:
    """What enters the head (batch, seq, hidden), and the head; None, of which is warned once, for an unknown one."""
    inner = innermost(model)
    is_new = inner not in _scalings
    found = _hidden_states(model, inner, inputs)
    if found is None and is_new:
        warn(
            f"the logits of {type(inner).__name__} are not what its head and its config.json give, so the loss is "
            f"computed for all tokens at once, which takes more memory (less "
            f"for a shorter {command('finetune')} --cutoff_len)"
        )
    return found


def _hidden_states(model: nn.Module, inner: Any, inputs: dict[str, Any]) -> tuple[Tensor, OutputHead] | None:
    """Run the model up to its head; return what enters the head (batch, seq, hidden), and the head.

    The model itself computes the logits of one token only. The first time, those are compared with ours, bit by bit.
    None: there is no head, it is not called once with all positions, or the logits differ.
    """
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    is_new = inner not in _scalings
    if head is None or (not is_new and _scalings[inner] is None):
        _scalings[inner] = None
        return None
    entered: list[tuple[Tensor, bool, torch.dtype]] = []
    left: list[Tensor] = []

    n_rows, n_seq = inputs["input_ids"].shape
    in_front = (0, positions_in_front(model))  # virtual tokens that have rows of their own here, or keys alone

    def keep_one(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or arguments[0].shape[:-1] not in [(n_rows, n + n_seq) for n in in_front]:
            return None
        hidden, device = arguments[0][:, -n_seq:], arguments[0].device.type
        entered.append((hidden, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
        # A clone, whose strides let one row be multiplied without a copy of the head's weight (bmm would make one).
        return (hidden[:1, :1].clone(memory_format=torch.contiguous_format), *arguments[1:])

    def keep_result(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
        left.append(output.detach().clone())  # a clone, since a model may go on in place

    no_graph = ExitStack()  # of a token whose logits are not used: it would hold, or offload, a trained head's copies

    def stop_graph(_module: nn.Module, _arguments: Any) -> None:
        no_graph.enter_context(torch.no_grad())

    def go_on(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        no_graph.close()

    hooks = [head.register_forward_pre_hook(keep_one), head.register_forward_pre_hook(stop_graph)]
    hooks.append(head.register_forward_hook(go_on))
    if is_new:
        hooks.append(head.register_forward_hook(keep_result))
    try:
        logits = _forward(model, **inputs).logits
    finally:
        no_graph.close()
        for hook in hooks:
            hook.remove()
    if is_new:
        config = inner.config.get_text_config()
        _scalings[inner] = _scaling_of(config, head, left[0], logits) if len(entered) == 1 else None
    scaling = _scalings[inner]
    if scaling is None or len(entered) != 1:
        return None
    hidden, autocast, dtype = entered[0]
    return hidden, OutputHead(head, autocast, dtype, scaling)


def _scaling_of(config: Any, head: nn.Module, output: Tensor, logits: Tensor) -> _LogitScaling | None:
    """Which way leads from the head's `output` to the model's own `logits` of the same token, bit by bit."""
    for scaling in _possible_scalings(config):
        made = OutputHead(head, False, output.dtype, scaling).finish(output.clone())
        if torch.equal(made.to(output.dtype), logits.to(output)):
            return scaling
    return None


def _possible_scalings(config: Any) -> Iterator[_LogitScaling]:
    scales = [getattr(config, name, None) for name in SCALES]
    caps = [getattr(config, name, None) for name in CAPS]
    for cap in (*filter(None, caps), None):
        yield from (_LogitScaling(scale, None, cap) for scale in filter(None, scales))
        yield from (_LogitScaling(None, scale, cap) for scale in filter(None, scales))
        yield _LogitScaling(cap=cap)


def assume_way(model: nn.Module) -> None:
    """Take the first possible way for that of a model whose tensors have no values to find it by."""
    inner = innermost(model)
    _scalings[inner] = next(_possible_scalings(inner.config.get_text_config()))


def states_before_head(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """Return what enters the head for `input_ids` (batch, seq), and the way from such states to logits in fp32.

    States are (batch, seq, hidden); the way takes (tokens, hidden). Pads stand on the right, as for `summed_loss`, and
    no gradients are kept. None for a model whose logits cannot be computed here, such as one without a head.
    """
    inner = innermost(model)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": None, "use_cache": False}
    with torch.no_grad():
        found = _hidden_states(model, inner, inputs)
    if found is None:
        return None
    states, head = found
    return states, lambda some: head.finish(head.output(some))
