#!/usr/bin/env python
"""What the first move of a slider costs the studio's memory plan, and how far the answer at once is from the plan.

    python benchmarks/plan_moves.py [--models Llama-3.1-8B,Qwen2.5-7B --vram 11]

After the first plan of a model each other stop of each slider is asked for in a process of its own, forked from there,
so that nothing else is known: once for the answer at once, once for the plan. CPU seconds, whatever else the machine
does. Writes benchmarks/results/plan_moves.json with the machine and the versions.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.streaming import machine  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.studio import planning  # noqa: E402


@dataclass
class BenchmarkOptions:
    """What is planned."""

    models: str = "Llama-3.1-8B,Qwen2.5-7B"
    """Names of models, by comma."""
    vram: float = 11.0
    """Memory of the card in GiB; one of the Turing generation."""
    output: str = str(ROOT / "benchmarks" / "results" / "plan_moves.json")
    """Where the result is written."""


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)
    rows = [row for model in options.models.split(",") for row in moves_of(model, options.vram)]
    seconds = [row["at_once_s"] for row in rows]
    errors = [abs(row["error"]) for row in rows]
    result = {
        "machine": machine(), "vram_gib": options.vram, "n_moves": len(rows),
        "at_once_s": {"median": statistics.median(seconds), "largest": max(seconds)},
        "plan_s": {"median": statistics.median(row["plan_s"] for row in rows),
                   "largest": max(row["plan_s"] for row in rows)},
        "error_of_peak": {"median": statistics.median(errors), "largest": max(errors)},
        "n_other_verdicts": sum(row["fits"] != row["fits_at_once"] for row in rows),
        "moves": rows,
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(json.dumps({key: value for key, value in result.items() if key not in ("moves", "machine")}, indent=2))


def moves_of(model: str, vram: float) -> list[dict[str, Any]]:
    """Each first move from the defaults of the page."""
    begun = process_time()
    start = {name: value for name, value in planning.DEFAULTS.items() if value}
    planning.plan(model, start, vram, True)
    say(f"{model}: the first plan took {process_time() - begun:.2f} CPU s")
    rows = []
    for name, stops in planning.STOPS.items():
        for stop in stops:
            if stop in (0, planning.DEFAULTS[name]):
                continue
            row = in_a_fork(lambda: first_move(model, {**start, name: stop}, vram))  # noqa: B023
            rows.append({"model": model, "slider": name, "value": stop, **row})
            say(json.dumps(rows[-1]))
    return rows


def first_move(model: str, options: dict[str, Any], vram: float) -> dict[str, Any]:
    """CPU seconds of both answers, and how far the first is from the second."""
    begun = process_time()
    about = planning.plan_at_once(model, options, vram, True)
    between = process_time()
    plan = planning.plan(model, options, vram, True)
    return {"at_once_s": round(between - begun, 4), "plan_s": round(process_time() - between, 4),
            "is_exact": about["is_exact"], "error": round(about["peak_bytes"] / plan["peak_bytes"] - 1, 4),
            "peak_gib": round(plan["peak_bytes"] / 2**30, 3), "fits": plan["fits"],
            "fits_at_once": about["fits"]}  # fmt: skip


def in_a_fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives in a copy of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(work()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return dict(json.loads(text))


if __name__ == "__main__":
    run_main(main)
