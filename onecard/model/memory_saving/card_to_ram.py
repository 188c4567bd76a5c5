"""Everything that this process holds on its cards goes to RAM, and comes back: for a while the cards are free.

The bytes of each storage go, and the storage becomes empty; tensors, parameters, states of quantised weights and
optimizers, views and slots of streamed layers stay the objects they are, so nothing has to know about it. Call both
between two steps, when no graph is alive. Knows storages; it does not know what they mean.
"""

from __future__ import annotations

import gc
from typing import Any

import psutil
import torch
from torch import Tensor

from onecard.console import first_line
from onecard.errors import ModelError
from onecard.model.hardware import count_gpus, forget_workspaces, free_and_total_bytes, synchronize
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory
from onecard.model.quantization import page_out

SPARE_RAM_BYTES = 1 << 30  # stays free when the cards' bytes have come


class CardToRam:
    """What was on the cards, while it is in RAM. `n_bytes`: how much."""

    def __init__(self) -> None:
        self._away: list[tuple[Any, Tensor]] = []  # a storage of the card that is empty now, and its bytes

    @property
    def n_bytes(self) -> int:
        return sum(len(held) for _, held in self._away)

    def leave(self) -> None:
        """Move all to RAM. Raises ModelError where RAM has no room; everything is then where it was."""
        gc.collect()
        storages = _storages_on_cards()
        n_bytes = sum(storage.nbytes() for storage in storages)
        free_ram = psutil.virtual_memory().available
        if storages and n_bytes + SPARE_RAM_BYTES > free_ram:
            raise ModelError(f"the card holds {n_bytes / 2**30:.1f} GiB for this run, and only {free_ram / 2**30:.1f} "
                             "GiB of RAM are free; close other programs, and ask again")  # fmt: skip
        synchronize_all()
        try:
            for storage in storages:
                self._away.append((storage, _bytes_of(storage).cpu()))
                storage.resize_(0)
        except (RuntimeError, MemoryError) as reason:
            self.come_back()  # where there is room: nothing has taken it yet
            raise ModelError(f"RAM has no room for what lies on the card ({first_line(reason)})") from reason
        forget_workspaces()
        give_back_memory()

    def come_back(self) -> None:
        """Move all back. Raises ModelError where the cards have no room; everything is then in RAM, as before."""
        n_done = 0
        try:
            for storage, held in self._away:
                storage.resize_(len(held))
                _bytes_of(storage).copy_(held)
                n_done += 1
        except (RuntimeError, MemoryError) as reason:
            if not is_out_of_memory(reason):
                raise
        synchronize_all()
        if n_done == len(self._away):
            self._away = []
            return
        for storage, _ in self._away[: n_done + 1]:
            storage.resize_(0)
        give_back_memory()
        free = sum(free_and_total_bytes(index)[0] for index in range(count_gpus()))
        raise ModelError(f"the run needs {self.n_bytes / 2**30:.2f} GiB of the card, and {free / 2**30:.2f} are free; "
                         "end what uses the card, and ask again")  # fmt: skip


def synchronize_all() -> None:
    """Wait for everything that was queued on any card."""
    for index in range(count_gpus()):
        synchronize(torch.device("cuda", index))


def _storages_on_cards() -> list[Any]:
    """The storages of all tensors that Python knows, and of gradients, which it may not; each once.

    Paged ones are told to leave on the way.
    """
    # Not isinstance, which asks the proxies of other libraries.
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    for tensor in tensors:
        page_out(tensor)
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    found: dict[int, Any] = {}
    for tensor in [*tensors, *gradients]:
        storage = tensor.untyped_storage() if tensor.layout is torch.strided else None
        if storage is not None and storage.device.type == "cuda" and storage.nbytes() and storage.resizable():
            found[storage._cdata] = storage
    return list(found.values())


def _bytes_of(storage: Any) -> Tensor:
    """All bytes of a storage as a tensor over it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
