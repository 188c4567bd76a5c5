"""Several LoRA adapters on one base at once: each span of a row of tokens is given the adapter of its own request.

PEFT chooses adapters by row of a batch (`adapter_names`), and a packed batch has one row. Here each layer adds B A x to
its own output, by a hook, and the base is left as it is. Knows layers by name and spans of tokens. It does not know
files (`adapter.py`) or requests. https://arxiv.org/abs/2311.03285 (S-LoRA) computes the same with kernels of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import linear


class LoraProduct(NamedTuple):
    """What an adapter adds to a layer: scale * B A, with A (r, in) and B (out, r)."""

    a: Tensor
    b: Tensor
    scale: float


class AdapterSpan(NamedTuple):
    """Tokens from `start` up to `end` of a packed row, and the adapter that reads them; "" is the base alone."""

    start: int
    end: int
    adapter: str


class AdapterRouter:
    """Adapters by name over the layers of a base; each thread says which of them its next tokens are read by."""

    def __init__(self, base: nn.Module) -> None:
        self._layers = dict(base.named_modules())  # as they are now: an adapter that is put on alone wraps some of them
        self._products: dict[str, Mapping[str, LoraProduct]] = {}
        self._hooks: dict[str, Any] = {}
        self._here = threading.local()

    def put(self, adapter: str, products: Mapping[str, LoraProduct]) -> None:
        """Keep an adapter, by the names of its layers, on the device of each layer."""
        placed = {}
        for layer, product in products.items():
            device = next(self._layers[layer].parameters()).device
            placed[layer] = LoraProduct(product.a.to(device), product.b.to(device), product.scale)
        self._products[adapter] = placed
        for layer in placed:
            if layer not in self._hooks:
                self._hooks[layer] = self._layers[layer].register_forward_hook(self._hook_of(layer))

    def drop(self, adapter: str) -> None:
        """Let an adapter go."""
        self._products.pop(adapter, None)

    def route(self, spans: Sequence[AdapterSpan]) -> None:
        """The spans of the row that this thread reads next, one behind the other."""
        self._here.spans = spans

    def read_as(self, adapter: str) -> None:
        """All that this thread reads from now on is read by one adapter; "": by the base alone."""
        self._here.whole = adapter

    def _hook_of(self, layer: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
            if whole := getattr(self._here, "whole", ""):
                product = self._products[whole].get(layer)
                return out if product is None else _added(out, inputs[0], product)
            for span in getattr(self._here, "spans", ()):
                # One that has left meanwhile is read by nobody any more.
                if (product := self._products.get(span.adapter, {}).get(layer)) is not None:
                    tokens = slice(span.start, span.end)
                    out[:, tokens] = _added(out[:, tokens], inputs[0][:, tokens], product)
            return out

        return hook


def _added(out: Tensor, x: Tensor, product: LoraProduct) -> Tensor:
    """As peft's own layers: in the adapter's number format, and back in the layer's."""
    update = linear(linear(x.to(product.a.dtype), product.a), product.b) * product.scale
    return (out + update).to(out.dtype)
