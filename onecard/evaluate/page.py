"""The report as one HTML file that asks no server for anything: plots are SVG in it, both languages are in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from onecard.evaluate.report import (
    REPORT_FILE,
    by_group,
    columns_of,
    is_word,
    markdown,
    note_text,
    setting,
    shown,
    word,
)
from onecard.storage import write_whole

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:.5rem 1rem 3rem}
body{overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}td,th{border:1px solid #8886;padding:.2rem .5rem;text-align:right}
td,th{white-space:nowrap}td:first-child,th:first-child{text-align:left}
.one td,.one th{white-space:normal}
dl{display:grid;grid-template-columns:fit-content(50%) 1fr;gap:.1rem 1rem;font-size:.9rem}dt{opacity:.7}dd{margin:0}
figure{margin:.6rem 0}figcaption{font-size:.9rem;opacity:.7}
svg{width:100%;height:auto;max-width:32rem}svg text{fill:currentColor;font-size:12px}
.bars{display:grid;grid-template-columns:fit-content(40%) 1fr auto;gap:.1rem .5rem;align-items:center;max-width:44rem}
.bars{font-size:.8rem;margin:.5rem 0}.bars svg{height:.8rem}
details{border:1px solid #8886;border-radius:.3rem;padding:.4rem .6rem;margin:.4rem 0}
summary small{opacity:.7}
pre{white-space:pre-wrap;margin:.2rem 0}
#zh:checked~main .en,#en:checked~main .zh{display:none}
nav,input[name=language]{display:inline}
"""
_IN_PLOTS = ("accuracy", "f1", "grade", "perplexity_per_character")
_IN_SUMMARY = 80  # characters of a question that are seen before its record is opened


def write_report(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write report.json, report.md and report.html; each is there whole or not at all."""
    texts = {
        REPORT_FILE: json.dumps(report, ensure_ascii=False, indent=1) + "\n",
        "report.md": markdown(report),
        "report.html": page(report),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]


def page(report: dict[str, Any]) -> str:
    """The whole page as text. Everything foreign in it is escaped."""
    body = [f"<h1>{_both('title')}</h1>", _settings(report["settings"])]
    body += [f"<details><summary>{_both('versions')}</summary>{_settings(report['versions'])}</details>"]
    for suite in report["suites"]:
        body.append(f"<h2>{escape(suite['name'])}</h2>{_settings(suite['settings'])}")
        notes = [(note_text(name, n), note_text(name, n, 1)) for name, n in suite["notes"].items() if n]
        body.append("<ul>" + "".join(f"<li>{_spans(*note)}</li>" for note in notes) + "</ul>" if notes else "")
        for group, measures in by_group(suite["measures"]).items():
            body.append(f"<h3>{_both(group)}</h3>{_table(measures)}{_drawn(group, measures, suite)}")
        if suite["worst"]:
            counts = f"{len(suite['worst'])} / {suite['n_worse']}"
            body.append(f"<h3>{_both('worst')} ({counts})</h3>{''.join(map(_record, suite['worst']))}")
    choice = "".join(
        f'<input type="radio" name="language" id="{code}"{" checked" if code == "en" else ""}>'
        f'<label for="{code}">{name}</label> '
        for code, name in (("en", "English"), ("zh", "中文"))
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(word('title'))}</title><style>{_STYLE}</style></head>\n"
        f"<body>{choice}<main>" + "\n".join(body) + "</main></body></html>\n"
    )


def _both(name: str) -> str:
    return _spans(word(name), word(name, 1))


def _spans(english: str, chinese: str) -> str:
    if english == chinese:
        return escape(english)
    return f'<span class="en">{escape(english)}</span><span class="zh" lang="zh">{escape(chinese)}</span>'


def _settings(values: Mapping[str, Any]) -> str:
    shown_values = {name: _both(str(v)) if is_word(name, v) else escape(setting(v)) for name, v in values.items()}
    return "<dl>" + "".join(f"<dt>{_both(k)}</dt><dd>{v}</dd>" for k, v in shown_values.items()) + "</dl>"


def _table(measures: Sequence[dict[str, Any]]) -> str:
    columns = columns_of(measures)
    if len(measures) == 1:  # a figure below the other, for narrow screens
        values = [("n", str(measures[0]["n"]))] + [(_both(name), escape(shown(measures[0]["values"][name])))
                                                   for name in columns]  # fmt: skip
        cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in values)
        title = f"<caption>{escape(measures[0]['name'])}</caption>" if measures[0]["name"] else ""
        return f'<table class="one">{title}{cells}</table>'
    head = "".join(f"<th>{_both(name)}</th>" for name in columns)
    rows = []
    for measure in measures:
        cells = "".join(f"<td>{escape(shown(measure['values'].get(name, '')))}</td>" for name in columns)
        rows.append(f"<tr><td>{escape(measure['name'])}</td><td>{measure['n']}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr><th></th><th>n</th>{head}</tr>{"".join(rows)}</table></div>'


def _drawn(group: str, measures: Sequence[dict[str, Any]], suite: dict[str, Any]) -> str:
    """The plot of a group: of a total none, of scales gain against forgetting, of others bars."""
    if group == "scale":
        return _dial(measures, suite["settings"]["gain_in"])
    return "" if group == "total" else _plot(measures)


def _dial(measures: Sequence[dict[str, Any]], gain_in: str) -> str:
    """Gain with its interval against forgetting, a point for each scale, joined in their order."""
    points = [(m["name"], m["values"]["forgetting"], *m["values"]["gain"]) for m in measures]
    most = max(kl for _, kl, *_ in points) or 1.0
    least, top = min(0.0, *(low for *_, low, _ in points)), max(0.0, *(high for *_, high in points))
    span = (top - least) or 1.0
    left, width, height, above = 60, 290, 180, 14  # pixels of a phone's screen

    def place(kl: float, gain: float) -> tuple[float, float]:
        return left + 10 + (width - 40) * kl / most, above + height * (top - gain) / span

    drawn, curve = [], []
    for name, kl, gain, low, high in points:
        (x, y), (_, y_low), (_, y_high) = place(kl, gain), place(kl, low), place(kl, high)
        curve.append(f"{x:.1f},{y:.1f}")
        drawn.append(
            f'<path d="M{x:.1f} {y_low:.1f}V{y_high:.1f}" stroke="currentColor" stroke-width="1.5"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#4a7fb5"/>'
            f'<text x="{x + 7:.1f}" y="{y - 6:.1f}">{escape(name)}</text>'
        )
    zero = place(0, 0)[1]
    axes = "".join(
        f'<text x="{left - 6}" y="{place(0, value)[1] + 4:.1f}" text-anchor="end">{value:+.3f}</text>'
        for value in dict.fromkeys((top, 0.0, least))
    )
    bottom = above + height + 18
    axes += (
        f'<path d="M{left} {zero:.1f}H{left + width}" stroke="currentColor" stroke-dasharray="4 4" opacity=".6"/>'
        f'<path d="M{left} {above}V{above + height}H{left + width}" fill="none" stroke="currentColor" opacity=".6"/>'
        f'<text x="{left + 10}" y="{bottom}">0</text>'
        f'<text x="{left + width}" y="{bottom}" text-anchor="end">{most:.4f}</text>'
    )
    label = _spans(*(word("dial", k).format(score=word(gain_in, k)) for k in (0, 1)))
    line = f'<polyline points="{" ".join(curve)}" fill="none" stroke="#4a7fb5" opacity=".6"/>'
    return (
        f'<svg viewBox="0 0 {left + width + 30} {bottom + 8}" role="img"><title>{escape(word("by_scale"))}</title>'
        f"{axes}{line}{''.join(drawn)}</svg><br><small>{label}</small>"
    )


def _plot(measures: Sequence[dict[str, Any]]) -> str:
    """A bar for each measure, with its interval where it has one; '' where there is nothing to draw."""
    name = next((name for name in _IN_PLOTS if any(name in measure["values"] for measure in measures)), "")
    values = [(measure["name"], measure["values"][name]) for measure in measures if name in measure["values"]]
    spans = [(label, *(value if isinstance(value, list) else [value, value, value])) for label, value in values]
    largest = max((high for *_, high in spans), default=0.0)
    if not largest > 0:
        return ""
    largest = 1.0 if name in ("accuracy", "f1") else largest
    bars = []
    for label, value, low, high in spans:
        x = [100 * min(part, largest) / largest for part in (value, low, high)]
        bars.append(
            f'<span>{escape(label)}</span><svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img">'
            f"<title>{escape(word(name))}</title>"
            f'<rect width="{x[0]:.1f}" height="10" fill="#4a7fb5"/><path d="M{x[1]:.1f} 5H{x[2]:.1f}" '
            'stroke="currentColor" stroke-width="2" vector-effect="non-scaling-stroke"/></svg>'
            f"<span>{shown(float(value))}</span>"
        )
    return f'<figure><figcaption>{_both(name)}</figcaption><div class="bars">{"".join(bars)}</div></figure>'


def _record(record: dict[str, Any]) -> str:
    parts = "".join(
        f"<div><b>{_both(name)}</b><pre>{escape(str(record[name]))}</pre></div>"
        for name in ("question", "expected", "got")
    )
    flat = " ".join(str(record["question"]).split())
    short = flat if len(flat) <= _IN_SUMMARY else f"{flat[:_IN_SUMMARY]}…"
    return f"<details><summary>{escape(record['key'])} <small>{escape(short)}</small></summary>{parts}</details>"
