"""bitsandbytes hands nothing to torch's compiler before one of its functions is called."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from onecard.model.late_compilation import COMPILES, _with_late_compilation


def test_what_a_module_compiles_while_it_is_imported_is_compiled_when_it_is_first_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[dict[str, Any]] = []

    def compiler(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return lambda number: 10 * function(number)

    def body(module: ModuleType) -> None:
        vars(module)["next_number"] = torch.compile(lambda number: number + 1, dynamic=False)

    monkeypatch.setattr(torch, "compile", compiler)
    module = ModuleType("some")
    _with_late_compilation(body)(module)

    assert compiled == []
    assert torch.compile is compiler
    assert [module.next_number(1), module.next_number(2)] == [20, 30]
    assert compiled == [{"dynamic": False}]


def test_a_module_that_cannot_be_imported_leaves_torch_as_it_was() -> None:
    before = torch.compile

    def body(_: ModuleType) -> None:
        raise ImportError

    with pytest.raises(ImportError):
        _with_late_compilation(body)(ModuleType("some"))
    assert torch.compile is before


def test_bitsandbytes_is_imported_without_the_compiler() -> None:
    code = f"import sys, onecard.model, {COMPILES} as found; print('torch._inductor.compile_fx' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
