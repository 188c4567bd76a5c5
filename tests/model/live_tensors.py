"""How many bytes of tensors are alive, at every operation of a piece of work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Watches the memory of every tensor that an operation makes inside the `with` block, forward and backward.

    `counts(tensor)` says which tensors matter; memory that existed before the block is not counted.
    """

    def __init__(self, counts: Callable[[torch.Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self.counts = counts
        self.refs: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.known |= before - self.refs.keys()
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.live())
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.refs or storage._cdata in self.known or not self.counts(tensor):
            return
        # A weak reference keeps the address from being used again, so it may serve as the name.
        self.refs[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def live(self) -> int:
        """Bytes alive now."""
        for key in [key for key, (ref, _) in self.refs.items() if ref.expired()]:
            del self.refs[key]
        return sum(n_bytes for _, n_bytes in self.refs.values())
