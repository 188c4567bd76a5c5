"""Adapters of a folder that answer together: read when they are asked for, the least recently used one let go.

Each is read on a base without weights, so that nothing of the model that is answering is touched. Knows adapters by
name and path. It does not know requests.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from onecard.console import warn
from onecard.model.lora.adapter import attach_files
from onecard.model.lora.formats import other_base, read_adapter
from onecard.model.lora.peft_model import lora_products, remove_adapter
from onecard.model.lora.routing import AdapterRouter

MOST_LOADED = 16


class SharedAdapters:
    """The adapters of these paths (None: the base alone) on one base, beside each other.

    fingerprint: of the base; a warning tells of an adapter that was trained on another one. scale: how strongly they
    are put on.
    """

    def __init__(self, base: Any, paths: Mapping[str, str | None], fingerprint: str, scale: float) -> None:
        self.router = AdapterRouter(base)
        self._base, self._paths, self._fingerprint, self._scale = base, paths, fingerprint, scale
        self._loaded: OrderedDict[str, bool] = OrderedDict()  # whether it is plain, the least recently used first
        self._numbers: dict[str, int] = {}
        self._next = itertools.count(1)
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()
        with torch.device("meta"):
            self._skeleton: Any = type(base)(copy.deepcopy(base.config)).eval()

    @contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Inside, this adapter stays at hand; False for one that is more than a plain LoRA, and has to answer alone.

        Raises ModelError for an adapter that does not load.
        """
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
                self._numbers[name] = next(self._next)
            self._users[name] += 1
            self._loaded.move_to_end(name)
            idle = [other for other in self._loaded if not self._users[other]]
            for other in idle[: max(len(self._loaded) - MOST_LOADED, 0)]:
                self._drop(other)
            is_plain = self._loaded[name]
        try:
            yield is_plain
        finally:
            with self._lock:
                self._users[name] -= 1

    def is_plain(self, name: str) -> bool:
        """Whether an adapter that is held can answer beside others."""
        return self._loaded[name]

    def number(self, name: str) -> int:
        """Tells this adapter, as it was loaded, from all others and from what had its name before."""
        return self._numbers[name]

    def forget(self, name: str) -> bool:
        """Let an adapter go that nobody uses; False while somebody does."""
        with self._lock:
            if self._users[name]:
                return False
            if name in self._loaded:
                self._drop(name)
            return True

    def _drop(self, name: str) -> None:
        del self._loaded[name], self._numbers[name]
        self.router.drop(name)

    def _load(self, name: str) -> bool:
        path = self._paths[name]
        if path is None:
            self.router.put(name, {})
            return True
        files = read_adapter(path)
        loaded = attach_files(self._skeleton, files, trainable=False, scale=self._scale)
        products = lora_products(loaded.model)
        remove_adapter(loaded.model)
        if products is None:
            return False
        other = other_base(path, str(self._base.config._name_or_path), self._fingerprint)
        for note in [*loaded.notes, *([other] if other else [])]:
            warn(f"{name}: {note}")
        self.router.put(name, products)
        return True
