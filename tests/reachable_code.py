"""The code that a program can reach, by its syntax tree, and the options that its messages name.

Names are resolved through imports; a method counts as reached when its class and its name are. What is found is
therefore a little more than what runs, never less, but for calls by a computed name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_0-9]*[a-z0-9])(?![\w-])")
Node = tuple[str, str]  # (module, name or Class.method)
ASIDE = {("onecard.config.parsing", "unknown_option")}  # it knows the options of all programs, and says only one's own


@dataclass
class Module:
    """The definitions of one file by name, and where its imported names come from."""

    tree: ast.Module
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (module, name in it or "")
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    others: dict[str, ast.AST] = field(default_factory=dict)  # functions and constants


def module_name(path: Path) -> str:
    return path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")


@lru_cache
def modules() -> dict[str, Module]:
    paths = (REPOSITORY / "onecard").rglob("*.py")
    found = {module_name(path): Module(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    for module in found.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    target = (whole, "") if whole in found else (node.module, alias.name)
                    module.imports[alias.asname or alias.name] = target
        for statement in module.tree.body:
            if isinstance(statement, ast.ClassDef):
                module.classes[statement.name] = statement
            elif isinstance(statement, ast.FunctionDef):
                module.others[statement.name] = statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for name in (node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)):
                    module.others[name.id] = statement
    return found


@dataclass
class ReachableCode:
    """Functions, constants (`trees`) and classes that are reached from a program, by module and name."""

    trees: dict[Node, ast.AST] = field(default_factory=dict)
    classes: dict[Node, ast.ClassDef] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)

    def reach(self, module: str, name: str) -> None:
        """A name at the top of a module."""
        home = modules().get(module)
        if home is None or (module, name) in self.trees or (module, name) in self.classes:
            return
        if name in home.classes:
            self.classes[module, name] = home.classes[name]
            for part in [*home.classes[name].bases, *home.classes[name].decorator_list]:
                self.visit(module, part)
            self.methods(module, home.classes[name])
        elif name in home.others and (module, name) not in ASIDE:
            self.trees[module, name] = home.others[name]
            self.visit(module, home.others[name])
        elif name in home.imports:
            self.reach(*home.imports[name])

    def methods(self, module: str, kind: ast.ClassDef) -> None:
        for part in kind.body:
            name = getattr(part, "name", "")
            wanted = not isinstance(part, ast.FunctionDef) or name in self.attributes or name.startswith("__")
            if wanted and (module, f"{kind.name}.{name or part.lineno}") not in self.trees:
                self.trees[module, f"{kind.name}.{name or part.lineno}"] = part
                self.visit(module, part)

    def visit(self, module: str, tree: ast.AST) -> None:
        new: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                self.reach(module, node.id)
            elif isinstance(node, ast.Attribute):
                if node.attr not in self.attributes:
                    new.add(node.attr)
                value = node.value
                imported = modules()[module].imports.get(value.id) if isinstance(value, ast.Name) else None
                if imported and not imported[1]:
                    self.reach(imported[0], node.attr)
        if new:
            self.attributes |= new
            for (home, _), kind in list(self.classes.items()):
                self.methods(home, kind)


def reachable_from(program: Path) -> ReachableCode:
    code = ReachableCode()
    code.reach(module_name(program), "main")
    return code


def named_flags(code: ReachableCode) -> Iterator[tuple[str, int, str, str]]:
    """(module, line, flag, whole text) of each option that a text in the reached code names; no docstrings."""
    for (module, _), tree in code.trees.items():
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(part) for part in node.values}
        for node in ast.walk(tree):
            if id(node) in skipped or not isinstance(node, ast.JoinedStr | ast.Constant):
                continue
            text = ast.unparse(node) if isinstance(node, ast.JoinedStr) else node.value
            if isinstance(text, str):
                yield from ((module, node.lineno, flag, text) for flag in FLAG.findall(text))
