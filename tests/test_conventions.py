"""What neither ruff nor import-linter can say (pyproject.toml holds their rules): no effect at import, no patching.

Each rule is shown to fire on a bad example: a rule that never fires protects nothing.
"""

from __future__ import annotations

import ast
import os
import pkgutil
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def process_state() -> list[object]:
    """What an import could change of a process."""
    return [dict(os.environ), list(sys.path), sys.stdout, sys.excepthook, len(warnings.filters)]


def test_importing_the_library_changes_nothing_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """All of it anew, beside what the other tests have imported of it: a process of its own takes eleven seconds."""
    import gradio  # noqa: F401  (what these do at import is theirs)
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    known = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "onecard"}
    try:
        capfd.readouterr()
        before, threads = process_state(), {*threading.enumerate()}
        package = import_module("onecard")
        names = [found.name for found in pkgutil.walk_packages(package.__path__, "onecard.")]
        assert all(import_module(name) is not known.get(name) for name in names)
        assert process_state() == before
        assert {*threading.enumerate()} <= threads
        assert capfd.readouterr() == ("", "")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "onecard"]:
            del sys.modules[name]
        sys.modules.update(known)
    assert len(names) > 100
    assert not torch.cuda.is_initialized()
    assert torch.random.initial_seed() == torch.default_generator.initial_seed()


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for file in sorted((REPOSITORY / "onecard").rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(file.relative_to(REPOSITORY)))
    assert len(places) > 200
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def foreign_names(tree: ast.Module) -> set[str]:
    """Names bound by imports of other libraries, anywhere in the file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names if not a.name.startswith("onecard")}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("onecard") and not node.level:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def patches(text: str) -> Iterator[tuple[int, str]]:
    """Lines that assign to an attribute of an imported module or class, and `trust_remote_code=True`."""
    tree = ast.parse(text)
    foreign = foreign_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in foreign:
                yield node.lineno, f"`{ast.unparse(node)}` belongs to another library"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            if isinstance(node.args[0], ast.Name) and node.args[0].id in foreign:
                yield node.lineno, f"`{node.args[0].id}` belongs to another library"
        elif isinstance(node, ast.keyword) and ast.unparse(node) == "trust_remote_code=True":
            yield node.lineno, "trust_remote_code is for the user to switch on"


def test_no_other_library_is_patched_and_no_code_of_a_model_is_trusted() -> None:
    files = [*(REPOSITORY / "onecard").rglob("*.py"), *(REPOSITORY / "tools").rglob("*.py"), *REPOSITORY.glob("*.py")]
    assert len(files) > 100
    found = [
        f"{file.relative_to(REPOSITORY)}:{line}: {what}"
        for file in files
        for line, what in patches(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("import torch\ntorch.foo = 1\n", [2]),
        ("from torch import nn\ndef f():\n    nn.Linear.forward = None\n", [3]),
        ("import sys\ndef f():\n    sys.stdout = None\n    del sys.path\n", [3, 4]),
        ("import peft\nsetattr(peft, 'x', 1)\n", [2]),
        ("f(x, trust_remote_code=True)\n", [1]),
        ("from onecard.config.training import C\nC.x = 1\nf(trust_remote_code=flag)\n", []),
    ],
)
def test_the_rules_fire(text: str, lines: list[int]) -> None:
    assert [line for line, _ in patches(text)] == lines
