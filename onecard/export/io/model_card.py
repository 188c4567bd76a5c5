"""The card (README.md) of a model that was made here: what it was made of, by names only, and the licence of its base.

https://huggingface.co/docs/hub/model-cards  Knows cards and run directories; does not know weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

CARD, OPTIONS_NAME = "README.md", "onecard.yaml"
LICENCE_KEYS = ("license", "license_name", "license_link", "language")


def write_card(
    directory: Path, source: Path, base: str, relation: Literal["finetune", "quantized"], lines: Sequence[str]
) -> None:
    """Put a card in place of the one that was copied from `source`; `base` is what that model is called."""
    kept = {key: value for key, value in front_matter(source / CARD).items() if key in LICENCE_KEYS}
    head: dict[str, Any] = {**kept, "library_name": "transformers", "base_model_relation": relation}
    if not Path(base).exists():
        head["base_model"] = base  # a Hub id; a path would be nobody else's
    licence = kept.get("license_name") or kept.get("license")
    unnamed = "of its base holds for it; its files do not name one"
    terms = f"of its base, {licence}, holds for it" if licence else unnamed
    body = [f"# {name_of(base)}, made with OneCard", "", f"- base: {name_of(base)}", *lines, f"- licence: that {terms}"]
    text = "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---\n\n" + "\n".join(body) + "\n"
    (directory / CARD).write_text(text, encoding="utf-8", newline="\n")


def adapter_lines(adapter: str, directory: Path) -> list[str]:
    """What is said of an adapter: its name, and what its run was trained on, by names."""
    lines = [f"- adapter: {name_of(adapter)}"]
    for place in (directory, directory.parent):
        if (place / OPTIONS_NAME).is_file():
            options = _loaded((place / OPTIONS_NAME).read_text(encoding="utf-8", errors="replace"))
            data = options.get("data") or options.get("data_path") or []
            names = ", ".join(name_of(str(path)) for path in (data if isinstance(data, list) else [data]))
            return [*lines, f"- trained on: {names}"] if names else lines
    return lines


def lines_of(card: Path) -> list[str]:
    """What a card that was written here says of adapters and data; nothing of any other card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return [line for line in text.splitlines() if line.startswith(("- adapter: ", "- trained on: "))]


def name_of(path: str) -> str:
    """A Hub id as it is; of a path the last part, because the others are somebody's own."""
    is_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    return path if is_id and not Path(path).suffix else Path(path.replace("\\", "/")).name


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the two lines of dashes at the top of a card; empty where there is none."""
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").split("---\n", 2)
    return _loaded(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}


def _loaded(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
