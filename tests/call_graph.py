"""The code that a program can reach, by its syntax tree, and the options that its messages name.

Names are resolved through imports; a method counts as reached when its class and its name are. What is found is
therefore a little more than what runs, never less, but for calls by a computed name.
"""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_0-9]*[a-z0-9])(?![\w-])")
Node = tuple[str, str]  # (module, name or Class.method)
ASIDE = {("onecard.config.parsing", "unknown_option")}  # it knows the options of all programs, and says only one's own


@dataclass(eq=False)
class Definition:
    """A function, a constant or what a class has by one name. It is searched once, whichever programs reach it."""

    trees: list[ast.AST]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return [node for tree in self.trees for node in ast.walk(tree)]

    @cached_property
    def names(self) -> set[str]:
        return {node.id for node in self.nodes if isinstance(node, ast.Name)}

    @cached_property
    def attributes(self) -> set[tuple[str, str]]:
        """(name or "", attribute) of each `name.attribute` and of each attribute of anything else."""
        found = [node for node in self.nodes if isinstance(node, ast.Attribute)]
        return {(node.value.id if isinstance(node.value, ast.Name) else "", node.attr) for node in found}

    @cached_property
    def flags(self) -> list[tuple[int, str, str]]:
        """(line, flag, whole text) of each option that a text names; no docstrings."""
        texts = [node for node in self.nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
        if not any(isinstance(node, ast.Constant) and "--" in str(node.value) for node in texts):
            return []
        skipped = {id(node.value) for node in self.nodes if isinstance(node, ast.Expr)}
        skipped |= {id(part) for node in texts if isinstance(node, ast.JoinedStr) for part in node.values}
        found = []
        for node in texts:
            text = ast.unparse(node) if isinstance(node, ast.JoinedStr) else node.value
            if isinstance(text, str) and id(node) not in skipped:
                found += [(node.lineno, flag, text) for flag in FLAG.findall(text)]
        return found


@dataclass(eq=False)
class Class:
    """A class: what its head names, and its parts by name, or by line where they have none."""

    head: Definition
    parts: dict[str, Definition]
    methods: set[str]


@dataclass
class Module:
    """The definitions of one file by name, and where its imported names come from."""

    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (module, name in it or "")
    classes: dict[str, Class] = field(default_factory=dict)
    others: dict[str, Definition] = field(default_factory=dict)  # functions and constants


def module_name(path: Path) -> str:
    return path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")


@cache
def modules() -> dict[str, Module]:
    paths = (REPOSITORY / "onecard").rglob("*.py")
    gc.disable()  # half a million nodes, none of them garbage, would be searched for cycles again and again
    try:
        trees = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
        return {name: read_module(tree, trees) for name, tree in trees.items()}
    finally:
        gc.enable()


def read_module(tree: ast.Module, known: Container[str]) -> Module:
    """known: the names of all modules."""
    module = Module()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                module.imports[alias.asname or alias.name] = (
                    (whole, "") if whole in known else (node.module, alias.name)
                )
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            module.classes[statement.name] = read_class(statement)
        elif isinstance(statement, ast.FunctionDef):
            module.others[statement.name] = Definition([statement])
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            whole = Definition([statement])
            for name in (node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)):
                module.others[name.id] = whole
    return module


def read_class(statement: ast.ClassDef) -> Class:
    parts: dict[str, Definition] = {}
    for part in statement.body:  # a property and its setter have one name
        parts.setdefault(getattr(part, "name", "") or str(part.lineno), Definition([])).trees.append(part)
    methods = {part.name for part in statement.body if isinstance(part, ast.FunctionDef)}
    return Class(Definition([*statement.bases, *statement.decorator_list]), parts, methods)


@dataclass
class CallGraph:
    """What is reached from a program."""

    definitions: dict[Node, Definition] = field(default_factory=dict)
    classes: dict[Node, Class] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)

    def reach(self, module: str, name: str) -> None:
        """A name at the top of a module."""
        home = modules().get(module)
        if home is None or (module, name) in self.definitions or (module, name) in self.classes:
            return
        if name in home.classes:
            self.classes[module, name] = home.classes[name]
            self.visit(module, home.classes[name].head)
            self.methods(module, name, set(home.classes[name].parts))
        elif name in home.others and (module, name) not in ASIDE:
            self.definitions[module, name] = home.others[name]
            self.visit(module, home.others[name])
        elif name in home.imports:
            self.reach(*home.imports[name])

    def methods(self, module: str, kind: str, names: set[str]) -> None:
        """The parts of a class with one of these names, of its methods only those that something names."""
        found = self.classes[module, kind]
        for name in names & found.parts.keys():
            wanted = name not in found.methods or name in self.attributes or name.startswith("__")
            if wanted and (module, f"{kind}.{name}") not in self.definitions:
                self.definitions[module, f"{kind}.{name}"] = found.parts[name]
                self.visit(module, found.parts[name])

    def visit(self, module: str, definition: Definition) -> None:
        for name in definition.names:
            self.reach(module, name)
        for value, attribute in definition.attributes:
            imported, inner = modules()[module].imports.get(value, ("", ""))
            if imported and not inner:
                self.reach(imported, attribute)
        if new := {attribute for _, attribute in definition.attributes} - self.attributes:
            self.attributes |= new
            for home, kind in list(self.classes):
                self.methods(home, kind, new)


def reached(program: Path) -> CallGraph:
    graph = CallGraph()
    graph.reach(module_name(program), "main")
    return graph


def named_flags(graph: CallGraph) -> Iterator[tuple[str, int, str, str]]:
    """(module, line, flag, whole text) of each option that a text in the reached code names; no docstrings."""
    for (module, _), definition in graph.definitions.items():
        yield from ((module, *found) for found in definition.flags)
