"""Let bitsandbytes compile its functions when they are called first, not when it is imported.

Its import hands four functions to torch.compile, which loads torch's compiler: a second and a half of each program's
start, of which most call none of the four. peft and transformers import it as well, so that the module is caught where
Python looks for it. Knows the name of one module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COMPILES = "bitsandbytes.backends.default.ops"


class _Finder(MetaPathFinder):
    """Finds that module as Python does, and lets it run with another `torch.compile`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != COMPILES:
            return None
        spec: ModuleSpec | None = PathFinder.find_spec(fullname, path, target)
        loader: Any = spec and spec.loader
        if loader is not None:
            loader.exec_module = _with_late_compilation(loader.exec_module)
        return spec


def _with_late_compilation(exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def run(module: ModuleType) -> None:
        import torch  # only here: bitsandbytes has imported it by now

        compiled = torch.compile

        def later(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            at_first_call = cache(lambda: compiled(function, **options))
            return lambda *args, **kwargs: at_first_call()(*args, **kwargs)

        torch.compile = later
        try:
            exec_module(module)
        finally:
            torch.compile = compiled

    return run


def compile_late() -> None:
    """Do so from now on; bitsandbytes that is imported already stays as it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
