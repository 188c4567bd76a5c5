"""Writes what each recipe of field-recipes/ needs on common cards, as planned, into docs/en/recipes.md and docs/zh.

python scripts/write_recipe_plans.py            write it (a minute on two CPU cores)
python scripts/write_recipe_plans.py --check    end with status 1 where it is out of date
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.programs import plan  # noqa: E402

FIRST, LAST = "<!-- plans: written by scripts/write_recipe_plans.py -->\n", "<!-- end of the plans -->\n"
CARDS = (11, 12, 24)
HEADS = {
    "en": ("recipe", "`--cutoff_len`", "{card} GB: peak, tokens at once"),
    "zh": ("配方", "`--cutoff_len`", "{card} GB：峰值，一次的 token 数"),
}


def planned(settings: Path) -> list[dict[str, Any]]:
    """The plan of a recipe for each card."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        plan.main(["--config", str(settings), "--vram", ",".join(map(str, CARDS)), "--json"])
    return json.loads(out.getvalue())["plans"]


def tables() -> dict[str, str]:
    """The table by language."""
    rows, known = [], {}
    for settings in sorted((ROOT / "field-recipes").glob("*/settings.yaml")):
        options = yaml.safe_load(settings.read_text(encoding="utf-8"))
        # Plans take seconds, and these differ in nothing else that takes memory.
        length = options["cutoff_len"]
        known[length] = known.get(length) or planned(settings)
        cells = [f"{one['peak_bytes'] / 2**30:.1f} GiB, {one['micro_batch_tokens']:,}" for one in known[length]]
        rows.append([settings.parent.name, f"{length:,}", *cells])
    return {language: _table(language, rows) for language in HEADS}


def _table(language: str, rows: list[list[str]]) -> str:
    *heads, card = HEADS[language]
    header = [*heads, *(card.format(card=size) for size in CARDS)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *rows])


def main() -> int:
    """Write the pages, or compare them. Returns the exit code."""
    stale = False
    for language, table in tables().items():
        page = ROOT / "docs" / language / "recipes.md"
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(FIRST)
        new = f"{before}{FIRST}{table}{LAST}{rest.split(LAST)[1]}"
        stale |= new != text
        if "--check" not in sys.argv:
            page.write_text(new, encoding="utf-8")
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    raise SystemExit(main())
