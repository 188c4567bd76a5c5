"""The report of an evaluation: JSON with everything, and Markdown for reading; `page.py` makes the page of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from onecard import __version__

REPORT_FILE, ANSWERS_FILE = "report.json", "answers.jsonl"
WORST = 20
_NAMED = ("method", "prompt", "rule", "gain_in")  # settings whose values are names in words.yaml
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "sacrebleu", "rouge-score")


def build_report(settings: Mapping[str, Any], suites: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of all suites: how it was made, and per suite its settings, measures, worst records and notes.

    Nothing in it depends on when or how fast it was made: an evaluation that was stopped and went on has the same.
    """
    shown = [{**suite, "worst": suite["worst"][:WORST], "n_worse": len(suite["worst"])} for suite in suites]
    return {"settings": dict(settings), "versions": versions(), "suites": shown}


def versions() -> dict[str, str]:
    """Versions of this program and of the libraries that figures depend on."""
    found = {"onecard": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def words() -> dict[str, list[str]]:
    """What stands in reports, by name: English and Chinese."""
    found: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
    return found


def word(name: str, language: int = 0) -> str:
    """A name of a figure or setting in words; one that is not in words.yaml as it is."""
    return words().get(name, [name.replace("_", " ")] * 2)[language]


def note_text(name: str, n: int, language: int = 0) -> str:
    """A note of a report in words, such as how many answers were cut."""
    return word(f"note_{name}", language).format(n=n)


def shown(value: Any) -> str:
    """A value as it is read: shares and scores with 4 digits, an estimate with its interval."""
    if isinstance(value, list):
        return f"{shown(value[0])} [{shown(value[1])}, {shown(value[2])}]"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def columns_of(measures: Sequence[dict[str, Any]]) -> list[str]:
    """The names of all figures that any of the measures has, in order."""
    return list(dict.fromkeys(name for measure in measures for name in measure["values"]))


def by_group(measures: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The measures of each group: total, then categories, classes, subjects."""
    found: dict[str, list[dict[str, Any]]] = {}
    for measure in measures:
        found.setdefault(measure["group"], []).append(measure)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, headings in both languages."""
    lines = [f"# {_both('title')}", "", *_settings(report["settings"]), *_settings(report["versions"])]
    for suite in report["suites"]:
        lines += ["", f"## {_cell(suite['name'])}", "", *_settings(suite["settings"])]
        lines += [f"- {_cell(note_text(name, n))}" for name, n in suite["notes"].items() if n]
        for group, measures in by_group(suite["measures"]).items():
            columns = columns_of(measures)
            lines += ["", f"### {_both(group)}", ""]
            lines.append(f"| | n | {' | '.join(word(name) for name in columns)} |")
            lines.append("|---|---:|" + "---:|" * len(columns))
            for measure in measures:
                cells = [shown(measure["values"].get(name, "")) for name in columns]
                lines.append(f"| {_cell(measure['name'])} | {measure['n']} | {' | '.join(cells)} |")
        if suite["worst"]:
            lines += ["", f"### {_both('worst')} ({len(suite['worst'])} / {suite['n_worse']})", ""]
        for record in suite["worst"]:
            lines.append(f"- {_cell(record['key'])}")
            for name in ("question", "expected", "got"):
                lines.append(f"  - {_both(name)}: {_cell(str(record[name]))}")
    return "\n".join(lines) + "\n"


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """Two evaluations side by side as Markdown, headings in both languages."""
    lines = [f"# {_both('comparison')}", "", *_settings({name: comparison[name] for name in ("a", "b", "level")}), ""]
    columns = ("n", "a", "b", "difference", "n_up", "n_down", "result")
    lines += [f"| | | {' | '.join(map(_both, columns))} |", f"|---|---|{'---:|' * len(columns)}"]
    for suite in comparison["suites"]:
        means = {"a": shown(suite["mean_a"]), "b": shown(suite["mean_b"])}
        cells = {**suite, **means, "difference": shown(suite["difference"]), "result": _both(suite["result"])}
        told = " | ".join(str(cells[name]) for name in columns)
        lines.append(f"| {_cell(suite['name'])} | {_both(suite['score'])} | {told} |")
    notes = [(suite["name"], name, two) for suite in comparison["suites"] for name, two in suite["settings"].items()]
    notes += [(suite["name"], "n_apart", [suite["n_apart"]]) for suite in comparison["suites"] if suite["n_apart"]]
    for suite_name, name, values in notes:
        told = " / ".join(_value(name, value) for value in values)
        lines += ["", f"- {_cell(suite_name)}: {_both(name)}: {told}"]
    return "\n".join(lines) + "\n"


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"- {_both(name)}: {_value(name, value)}" for name, value in values.items()]


def is_word(name: str, value: Any) -> bool:
    """Whether words.yaml says the value of this setting in both languages."""
    return name in _NAMED or (name, value) == ("template", "auto")


def setting(value: Any) -> str:
    """The value of a setting as it is read."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _value(name: str, value: Any) -> str:
    return _both(str(value)) if is_word(name, value) else _cell(setting(value))


def _both(name: str) -> str:
    english, chinese = word(name), word(name, 1)
    return english if english == chinese else f"{english} / {chinese}"


def _cell(text: str) -> str:
    """Foreign text on one line of Markdown, without its own marks."""
    flat = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        flat = flat.replace(sign, f"\\{sign}")
    return flat if len(flat) <= 1000 else flat[:1000] + "…"
