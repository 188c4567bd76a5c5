"""Writes the file tree of docs/en/architecture.md and docs/zh/architecture.md: the first line of each module.

    python scripts/write_architecture.py            write it
    python scripts/write_architecture.py --check    end with status 1 where it is out of date

Reads syntax only: nothing of the project is imported.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / language / "architecture.md" for language in ("en", "zh")]
FIRST, LAST = "<!-- file tree: written by scripts/write_architecture.py -->\n", "<!-- end of the file tree -->\n"


def purpose(module: Path) -> str:
    """The first sentence of a module's docstring, on one line; '' without one."""
    lines = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(lines.split())


def tree(folder: Path, depth: int = 0) -> list[str]:
    """The lines of a folder: its own, its modules, then its sub-packages."""
    start = folder / "__init__.py"
    name = "  " * depth + folder.name + "/"
    lines = [f"{name:<36}{purpose(start) if start.exists() else ''}".rstrip()]
    for module in sorted(folder.glob("*.py")):
        if module != start:
            name = "  " * (depth + 1) + module.name
            lines.append(f"{name:<36}{purpose(module)}".rstrip())
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))):
        lines += tree(inner, depth + 1)
    return lines


def with_tree(text: str) -> str:
    """The whole page with the tree as it is now. Raises ValueError where the page has lost its two marks."""
    before, rest = text.split(FIRST)
    after = rest.split(LAST)[1]
    lines = [f"{path.name:<36}{purpose(path)}" for path in sorted(ROOT.glob("*.py"))]
    lines += tree(ROOT / "onecard") + tree(ROOT / "tools")
    return f"{before}{FIRST}\n```text\n" + "\n".join(lines) + f"\n```\n\n{LAST}{after}"


def main() -> int:
    old = {page: page.read_text(encoding="utf-8") for page in PAGES}
    new = {page: with_tree(text) for page, text in old.items()}
    if "--check" in sys.argv[1:]:
        return int(new != old)
    for page, text in new.items():
        page.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
