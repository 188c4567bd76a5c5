"""Which lines of onecard/ run only with a CUDA card, and which of them the tests on the simulated card ran.

    python -m pytest tests/gpu tests/simcard --simcard sm75:11GiB,sm75:11GiB,late,garbage --cov=onecard --cov-report=
    python -m tests.simcard.cuda_lines .coverage

A line belongs to a card when it asks for one (WORDS) or runs only after such a question was answered with yes. Exit
status 1: a line neither ran nor has a reason in NOT_RUN.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "onecard"
WORDS = ("cuda", "is_gpu", "on_gpu", "on_card", "new_stream", "current_stream", "count_gpus", "is_paged")
ELSEWHERE = {  # path below onecard/ -> why the simulated card is not asked
    "config/*": "options, on any machine",
    "model/memory/*": "a plan works with a card's figures on any machine",
    "programs/plan.py": "the same",
    "model/nvidia_driver.py": "judges facts given as values: tests/doctor",
    "doctor/report.py": "the same",
}
NOT_RUN = {  # path below onecard/, or path and the beginning of a line -> why the simulated card cannot
    "model/kernels.py": "liger-kernel needs Triton, which needs a real card",
    "model/hardware.py raise ConfigError(": "no card, or one too old for this torch: tests/model/test_hardware.py",
    "model/hardware.py finding = missing_gpu(": "no card: tests/doctor",
}


def asks(node: ast.AST) -> bool:
    """Whether it names a stream or one of WORDS, or holds "cuda" as a value."""
    for part in ast.walk(node):
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
        if name == "stream" or any(word in name for word in WORDS):
            return True
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and re.fullmatch(r"cuda:?", part.value):
            return True
    return False


def why_not_run(name: str, line: str) -> str | None:
    return NOT_RUN.get(name) or next((NOT_RUN[key] for key in NOT_RUN if f"{name} {line}".startswith(key)), None)


def is_negative(test: ast.expr) -> bool:
    """Whether the body of an `if` with this test is the way without a card."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return True
    if isinstance(test, ast.BoolOp):
        return all(is_negative(part) for part in test.values if asks(part))
    if isinstance(test, ast.Compare):
        other = test.comparators[0]
        absent = isinstance(other, ast.Constant) and other.value in (None, "cpu")
        return absent if isinstance(test.ops[0], ast.Eq | ast.Is) else not absent
    return False


def ends(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)


def first_lines(body: list[ast.stmt]) -> Iterator[int]:
    """The lines on which statements begin, those inside compound statements too."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.stmt) and not is_docstring(node):
                yield node.lineno


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def lines_of_body(body: list[ast.stmt]) -> Iterator[int]:
    for index, statement in enumerate(body):
        parts = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        parts += [handler.body for handler in getattr(statement, "handlers", [])]
        if isinstance(statement, ast.If) and asks(statement.test):
            yield statement.lineno
            negative = is_negative(statement.test)
            yield from first_lines(statement.orelse if negative else statement.body)
            if negative and ends(statement.body):
                yield from first_lines(body[index + 1 :])
        elif not any(parts) and asks(statement) and not is_docstring(statement):
            yield statement.lineno
        for part in parts:
            yield from lines_of_body(part)


@cache
def cuda_lines(path: Path) -> set[int]:
    """Line numbers of statements in functions; what stands at the top of a module runs with any import."""
    source = path.read_text(encoding="utf-8")
    if not any(word in source for word in ("stream", *WORDS)):  # most files
        return set()
    tree = ast.parse(source)
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {line for function in functions for line in lines_of_body(function.body)}


def report(ran: dict[str, set[int]]) -> list[str]:
    """A row per file and one for the sum; `ran` are the lines that ran, by path below onecard/."""
    rows, total, missed = [], 0, 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name, lines = path.relative_to(PACKAGE).as_posix(), cuda_lines(path)
        if not lines or any(fnmatch(name, pattern) for pattern in ELSEWHERE):
            continue
        source = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        left = sorted(lines - ran.get(name, set()))
        reasons = {line: why_not_run(name, source[line - 1]) for line in left}
        rows.append(f"{name}: {len(lines) - len(left)} of {len(lines)} lines ran")
        rows += [f"  {line}: {source[line - 1]}  ({reasons[line] or 'NOT RUN'})" for line in left]
        total, missed = total + len(lines), missed + list(reasons.values()).count(None)
    return [*rows, f"{total - missed} of {total} lines ran or have a reason, {missed} did not"]


def main(path: str) -> int:
    from coverage import CoverageData

    data = CoverageData(path)
    data.read()
    ran = {
        Path(name).relative_to(PACKAGE).as_posix(): set(data.lines(name) or ())
        for name in data.measured_files()
        if Path(name).is_relative_to(PACKAGE)
    }
    rows = report(ran)
    print("\n".join(rows))
    return 0 if rows[-1].endswith(", 0 did not") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
