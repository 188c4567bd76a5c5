"""The rules of the house, each a function from one parsed file to the offences in it.

A rule sees syntax only: it imports nothing of the project, so a broken module is still checked. `test_house.py` runs
every rule over every file and proves on small bad examples that each of them fires.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

Offence = tuple[int, str]  # (line, what is wrong)

LAYERS = {
    "translation": 0,
    "console": 0,
    "manifest": 0,
    "config": 1,
    "data": 2,
    "model": 3,
    "train": 4,
    "inference": 4,
    "export": 4,
    "doctor": 2,
    "serve": 5,
    "recipes": 6,
}
SOLE_IMPORTERS = {
    "peft": "onecard/model/lora/adapter.py",
    "bitsandbytes": "onecard/model/quantization.py",
    "deepspeed": "onecard/train/deepspeed_engine.py",
    "gradio": "onecard/serve/web/app.py",
    "gptqmodel": "onecard/export/quantize/gptq.py",
    "gguf": "onecard/export/gguf/writer.py",
}
NOT_FOR_TEXT = {"transformers", "peft", "bitsandbytes", "gradio", "accelerate", "gptqmodel", "gguf"}
LIGHT = {"yaml", "jsonargparse", "onecard"}  # besides the standard library: all that cli, config and console import

MAX_FILE_LINES, MAX_SCRIPT_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_NESTING = 400, 40, 60, 8, 3

SAFE_CALLS = {
    *("dataclass", "dataclasses.dataclass", "field", "TypeVar", "ParamSpec", "namedtuple", "cache", "lru_cache"),
    *("functools.cache", "functools.lru_cache", "Path", "PurePosixPath", "frozenset", "set", "dict", "tuple", "list"),
    *("len", "min", "max", "sum", "sorted", "range", "zip", "enumerate", "chr", "ord", "str", "int", "float", "bytes"),
    *("re.compile", "struct.Struct", "logging.getLogger", "MappingProxyType", "type", "object", "math.log"),
    *("struct.calcsize", "math.sqrt", "ContextVar", "super", "map", "np.dtype", "getattr", "any", "all"),
    *("torch.no_grad", "torch.inference_mode", "weakref.WeakKeyDictionary", "pa.schema", "pa.field", "pa.list_"),
    *(
        "pa.string",
        "pa.bool_",
        "pa.int8",
        "pa.int32",
        "pa.int64",
        "TypeAdapter",
        "property",
        "itemgetter",
        "attrgetter",
    ),
}
# Methods of strings, paths and containers: they compute a value and touch nothing outside.
SAFE_METHODS = {
    *("resolve", "absolute", "with_name", "with_suffix", "joinpath", "relative_to", "split", "splitlines", "join"),
    *(
        "format",
        "strip",
        "lower",
        "upper",
        "replace",
        "encode",
        "union",
        "keys",
        "values",
        "items",
        "fromkeys",
        "startswith",
    ),
}
# A script sees only its own folder until it puts the repository on the path; a tool may read a table beside it.
SAFE_IN_SCRIPTS = {"sys.path.insert", "read_text"}


@dataclass(frozen=True)
class SourceFile:
    """One Python file: its path from the repository root, its text and its syntax tree."""

    path: PurePosixPath
    text: str
    tree: ast.Module

    @property
    def in_library(self) -> bool:
        return self.path.parts[0] == "onecard"

    @property
    def layer(self) -> str:
        """`data` for onecard/data/x.py, `recipes` for onecard/recipes.py, '' for everything else."""
        if not self.in_library or (self.path.name == "__init__.py" and len(self.path.parts) == 2):
            return ""
        return self.path.parts[1].removesuffix(".py")


def parse(path: str, text: str) -> SourceFile:
    return SourceFile(PurePosixPath(path), text, ast.parse(text, path))


def imports(file: SourceFile, root: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions and by `import_module("x")` too."""
    for node in ast.walk(root or file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(file.path.parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            for alias in node.names:
                # `from onecard import train` names a module; `from onecard.train import x` may name one.
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and dotted(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            yield from ((node.lineno, str(word)) for word in words[:1])


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such an expression, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def functions(file: SourceFile) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def layers(file: SourceFile) -> Iterator[Offence]:
    """Imports go one way: cli/config/console <- text <- model <- {train, talk, export} <- recipes."""
    for line, module in imports(file):
        parts = module.split(".")
        if file.in_library and parts[0] in (
            "tools",
            "tests",
            "scripts",
            "finetune",
            "finetune_chat",
            "generate",
            "chat",
        ):
            yield line, f"the library imports {module}, which stands above it"
        if parts[0] != "onecard" or not file.layer or len(parts) < 2 or parts[1] not in LAYERS:
            continue
        own, other = LAYERS[file.layer], LAYERS[parts[1]]
        if other > own or (other == own == 4 and parts[1] != file.layer):
            yield line, f"onecard.{file.layer} imports onecard.{parts[1]}"


def known_layers(file: SourceFile) -> Iterator[Offence]:
    """A module outside the layers would escape the rule above."""
    if file.layer and file.layer not in LAYERS:
        yield 1, f"onecard/{file.layer} belongs to no layer; name one in tests/house_rules.py"


def sole_importers(file: SourceFile) -> Iterator[Offence]:
    """peft, bitsandbytes, gradio, gptqmodel and gguf are each imported by one file."""
    for line, module in imports(file):
        owner = SOLE_IMPORTERS.get(module.split(".")[0])
        if owner and str(file.path) != owner:
            yield line, f"{module.split('.')[0]} is imported by {owner} alone"


def text_is_plain(file: SourceFile) -> Iterator[Offence]:
    """data takes any tokenizer-like object: no model library; torch only where batches become tensors."""
    if file.layer != "data":
        return
    for line, module in imports(file):
        name = module.split(".")[0]
        if name in NOT_FOR_TEXT or (name == "torch" and file.path.name != "batches.py"):
            yield line, f"onecard.data imports {name}"


def options_are_light(file: SourceFile) -> Iterator[Offence]:
    """cli, config and console import the standard library, yaml and jsonargparse only, so `--help` is instant."""
    if file.layer not in ("config", "console"):
        return
    for line, module in imports(file):
        name = module.split(".")[0]
        if name not in LIGHT and name not in sys.stdlib_module_names:
            yield line, f"onecard.{file.layer} imports {name}"


def entries_are_light(file: SourceFile) -> Iterator[Offence]:
    """Root scripts and tools import heavy libraries only inside functions, after the options are known to be good."""
    if file.in_library or file.path.parts[0] not in ("tools", file.path.name) or len(file.path.parts) > 2:
        return
    heavy = {"torch", "transformers", "accelerate", "datasets", "numpy", "pyarrow", "matplotlib", *SOLE_IMPORTERS}
    for node in _at_import(file.tree.body):
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            yield node.lineno, "jsonargparse runs TYPE_CHECKING blocks of the files that declare options; move it"
        if isinstance(node, ast.Import | ast.ImportFrom):
            for line, module in imports(file, node):
                if module.split(".")[0] in heavy:
                    yield line, f"{module.split('.')[0]} is imported before the options are read"


def _at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Statements and expressions that run when a module is imported; bodies of functions and lambdas do not."""
    for statement in body:
        if isinstance(statement, ast.If) and _is_main_guard(statement.test):
            continue
        yield from _running(statement)


def _is_main_guard(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare) and dotted(test.left) == "__name__"


def _running(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        at_once: list[ast.AST] = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        for part in at_once:
            yield from _running(part)
        return
    if isinstance(node, ast.ClassDef):
        for part in [*node.decorator_list, *node.bases, *node.keywords]:
            yield from _running(part)
        for statement in node.body:
            yield from _running(statement)
        return
    if isinstance(node, ast.AnnAssign):  # annotations are not evaluated: `from __future__ import annotations`
        for part in filter(None, [node.target, node.value]):
            yield from _running(part)
        return
    for child in ast.iter_child_nodes(node):
        yield from _running(child)


def quiet_import(file: SourceFile) -> Iterator[Offence]:
    """Nothing happens at import: no calls but those that only build a value, no writes, no loops, no statements."""
    own = {node.name: node for node in file.tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    safe = SAFE_CALLS | SAFE_METHODS | (SAFE_IN_SCRIPTS if file.path.parts[0] in ("tools", "benchmarks") else set())
    for node in _at_import(file.tree.body):
        if isinstance(node, ast.Call) and not _only_builds(node, own, safe):
            yield node.lineno, f"`{ast.unparse(node.func)[:60]}(...)` is called at import"
        elif isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute | ast.Subscript):
                    yield node.lineno, "something outside is written at import"
        elif isinstance(node, ast.For | ast.While | ast.With | ast.Delete | ast.Raise | ast.Assert):
            yield node.lineno, f"a `{type(node).__name__.lower()}` statement runs at import"


def _only_builds(call: ast.Call, own: dict[str, ast.ClassDef | ast.FunctionDef], safe: set[str]) -> bool:
    """True for a call that computes a value and touches nothing: a safe one, our class, our function of such calls."""
    name = dotted(call.func)
    is_method = isinstance(call.func, ast.Attribute) and call.func.attr not in SAFE_CALLS
    if name in safe or (is_method and call.func.attr in safe):
        return True
    maker = own.get(name)
    if not isinstance(maker, ast.FunctionDef):
        return maker is not None
    grows_own_list = ("append", "extend", "add")
    others = {n: node for n, node in own.items() if n != name}
    local = {n.id for n in ast.walk(maker) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    inner = [node for statement in maker.body for node in _running(statement) if isinstance(node, ast.Call)]
    return all(
        _only_builds(node, others, safe)
        or (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in grows_own_list
            and dotted(node.func.value) in local
        )
        for node in inner
    )


class Ownership:
    """Tells, inside one function, whether an expression is an object of this project's own classes.

    A name is ours when it is annotated with one of our classes or bound to a call of one of our classes or functions;
    it is imported when an import statement binds it. Everything else is unknown, and unknown counts as foreign.
    """

    def __init__(self, file: SourceFile) -> None:
        self.imported = {
            (alias.asname or alias.name.split(".")[0]): getattr(node, "module", None) or alias.name
            for node in ast.walk(file.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        ours = {name for name, module in self.imported.items() if module.split(".")[0] in ("onecard", "tests", "tools")}
        defined = {n.name for n in ast.walk(file.tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        bound = {
            t.id for n in file.tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        self.ours = ours | defined | bound
        # Functions that hand back what another library made are not to be trusted with it.
        self.foreign_makers = {
            n.name
            for n in ast.walk(file.tree)
            if isinstance(n, ast.FunctionDef) and n.returns is not None and not self._ours_in(n.returns)
        }

    def _ours_in(self, annotation: ast.expr) -> bool:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        return any(isinstance(n, ast.Name) and n.id in self.ours for n in ast.walk(annotation))

    def local_names(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = {"self", "cls"} | {a.arg for a in arguments if a.annotation is not None and self._ours_in(a.annotation)}
        for _ in range(3):  # names may be bound from one another; three rounds follow any chain that is readable
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.AnnAssign)
                    and isinstance(node.target, ast.Name)
                    and self._ours_in(node.annotation)
                ):
                    names.add(node.target.id)
                pairs = _pairs(node) if isinstance(node, ast.Assign) else []
                if isinstance(node, ast.withitem) and node.optional_vars is not None:
                    pairs = [(node.optional_vars, node.context_expr)]
                names |= {t.id for t, value in pairs if isinstance(t, ast.Name) and self.is_ours(value, names)}
        return names

    def is_ours(self, value: ast.expr, names: set[str]) -> bool:
        if isinstance(value, ast.Name):
            return value.id in names
        if isinstance(value, ast.Attribute | ast.Subscript):
            return self.is_ours(value.value, names)
        if isinstance(value, ast.IfExp):
            return self.is_ours(value.body, names) and self.is_ours(value.orelse, names)
        if isinstance(value, ast.Call) and dotted(value.func) == "getattr":
            return self.is_ours(value.args[0], names)
        if isinstance(value, ast.Call):
            head = dotted(value.func).split(".")[0]
            return (head in self.ours or head in names) and head not in self.foreign_makers
        return False


def _pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment; `a, b = x, y` gives two."""
    found: list[tuple[ast.expr, ast.expr]] = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            found += zip(target.elts, node.value.elts, strict=False)
        else:
            found.append((target, node.value))
    return found


def hands_off(file: SourceFile) -> Iterator[Offence]:
    """Nobody assigns to another library's attributes: not to its modules or classes, nor, in onecard/, its objects."""
    ownership = Ownership(file)
    scopes: list[tuple[ast.AST, set[str]]] = [(f, ownership.local_names(f)) for f in functions(file)]
    scopes.append((file.tree, set().union(*(names for _, names in scopes)) if scopes else set()))
    seen: set[ast.AST] = set()
    for scope, names in scopes:
        for node in ast.walk(scope):
            for target in _written_objects(node):
                root = dotted(target).split(".")[0]
                foreign = root in ownership.imported and root not in ownership.ours
                unknown = file.in_library and not ownership.is_ours(target, names) and root not in ownership.ours
                if (foreign or unknown) and target not in seen:
                    yield node.lineno, f"assigns to an attribute of `{ast.unparse(target)}`, which is not ours"
                seen.add(target)


def _written_objects(node: ast.AST) -> Iterator[ast.expr]:
    """The `x` of `x.y = ...`, `x.y += ...`, `del x.y`, `setattr(x, ...)`."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    for target in [item for t in targets for item in (t.elts if isinstance(t, ast.Tuple) else [t])]:
        if isinstance(target, ast.Attribute):
            yield target.value
    if isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr", "monkeypatch.setattr") and node.args:
        yield node.args[0]


def budgets(file: SourceFile) -> Iterator[Offence]:
    """File, function, parameters and nesting keep within what a person takes in at a glance."""
    n_lines = file.text.count("\n")
    limit = MAX_SCRIPT_LINES if len(file.path.parts) == 1 else MAX_FILE_LINES
    if n_lines > limit:
        yield limit + 1, f"{n_lines} lines in one file, {limit} allowed"
    for function in functions(file):
        n_lines = (function.end_lineno or 0) - function.lineno + 1
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        arguments += filter(None, [function.args.vararg, function.args.kwarg])
        n_parameters = sum(a.arg not in ("self", "cls") for a in arguments)
        depth, line = deepest(function)
        if n_lines > MAX_FUNCTION_LINES:
            yield function.lineno, f"{function.name} has {n_lines} lines, {MAX_FUNCTION_LINES} allowed"
        if n_parameters > MAX_PARAMETERS:
            yield function.lineno, f"{function.name} has {n_parameters} parameters, {MAX_PARAMETERS} allowed"
        if depth > MAX_NESTING:
            yield line, f"{function.name} is nested {depth} deep, {MAX_NESTING} allowed"


def deepest(node: ast.AST, depth: int = 0) -> tuple[int, int]:
    """(depth, line) of the innermost block of a function; `elif` is no deeper than its `if`."""
    blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
    best = (depth, getattr(node, "lineno", 1))
    for field_name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ):
                continue
            is_elif = (
                isinstance(node, ast.If) and field_name == "orelse" and isinstance(child, ast.If) and len(value) == 1
            )
            deeper = depth + (isinstance(child, blocks) and not is_elif)
            best = max(best, deepest(child, deeper), key=lambda found: found[0])
    return best


def manners(file: SourceFile) -> Iterator[Offence]:
    """Prints through console, never ends the process, opens text as UTF-8, starts no shell, unpickles nothing."""
    path = str(file.path)
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
        last = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if name == "print" and path != "onecard/console.py":
            yield node.lineno, "prints past onecard.console"
        if file.in_library and (
            name in ("sys.exit", "exit", "quit") or (name == "os._exit" and path != "onecard/train/signals.py")
        ):
            yield node.lineno, f"{name} in the library; raise an OneCardError"
        if name in ("os.system", "os.popen") or _is_true(keywords.get("shell")):
            yield node.lineno, "starts a shell"
        if last in ("read_text", "write_text") and "encoding" not in keywords:
            yield node.lineno, f'{last} without encoding="utf-8"'
        if last == "open" and name != "os.open" and "encoding" not in keywords and not _is_binary(node, name):
            yield node.lineno, 'open without encoding="utf-8"'
        if name == "torch.load" and not _is_true(keywords.get("weights_only")):
            yield node.lineno, "torch.load without weights_only=True"
        if name in ("pickle.load", "pickle.loads", "logging.basicConfig", "eval", "exec"):
            yield node.lineno, f"{name} is not for this house"
        if _is_true(keywords.get("trust_remote_code")):
            yield node.lineno, "trust_remote_code is for the user to switch on"


def _is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _is_binary(call: ast.Call, name: str) -> bool:
    """True for `open(path, "rb")`, `path.open("wb")` and for opens that are no files (`pa.ipc.open`, `Image.open`)."""
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    return any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)


def future_annotations(file: SourceFile) -> Iterator[Offence]:
    """Library modules and tools start with `from __future__ import annotations`, which Python 3.10 needs here."""
    is_script = len(file.path.parts) == 1 or file.path.name == "__init__.py"
    if not is_script and not any(module == "__future__.annotations" for _, module in imports(file)):
        yield 1, "`from __future__ import annotations` is missing"


def documented(file: SourceFile) -> Iterator[Offence]:
    """Every module says what it knows; every public class of the library says what it is."""
    if file.path.name == "__init__.py" and not file.text.strip():
        return
    if not ast.get_docstring(file.tree):
        yield 1, "the module has no docstring"
    for node in file.tree.body if file.in_library else []:
        is_thing = isinstance(node, ast.ClassDef | ast.FunctionDef)
        if is_thing and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


RULES = (
    layers,
    known_layers,
    sole_importers,
    text_is_plain,
    options_are_light,
    entries_are_light,
    quiet_import,
    hands_off,
    budgets,
    manners,
    future_annotations,
    documented,
)
