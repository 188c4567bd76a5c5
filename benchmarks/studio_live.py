#!/usr/bin/env python
"""How soon the studio shows ten long runs, and what a second costs its page while rows keep arriving.

    python benchmarks/studio_live.py [--n_runs 10 --n_rows 100000 --rounds 3]

The studio is a process of its own, the page is open in Chromium under playwright (requirements-dev.txt). In each round
the view is opened anew; times are counted from the navigation, of a studio that has read nothing yet. Then rows are
added to every log, and CPU seconds of the page's main thread are read from `Performance.getMetrics`, whatever else the
machine does. Writes benchmarks/results/studio_live.json: every round, medians, the machine and the versions.
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.streaming import machine  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.train.run_lock import OWNER  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
# Notes when the first text and when all curves stand on the screen, in ms since the navigation.
WATCHES = """
(() => {
  const look = () => {
    const shown = document.querySelectorAll("CHART .u-series").length >= LINES + 1;
    if (!shown) return requestAnimationFrame(look);
    requestAnimationFrame(() => { window.curvesAt = performance.now(); });
  };
  requestAnimationFrame(look);
  sessionStorage.setItem("onecard.compared", JSON.stringify(RUNS));
})();
"""
OUTPUT = "step {}: loss 1.2345, 912 tokens/s, 8.1 GiB, 1 h 12 min left\n"  # what a run prints
FIRST_PAINT = "(performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null)"


@dataclass
class BenchmarkOptions:
    """What is measured."""

    n_runs: int = 10
    """Runs, all of them drawn over one another."""
    n_rows: int = 100_000
    """Rows of each log."""
    rows_per_s: float = 10.0
    """Rows that are added to each log in a second."""
    seconds: float = 10.0
    """For which a page is watched while rows arrive."""
    rounds: int = 3
    """Times that each view is opened; medians are reported."""
    output: str = str(ROOT / "benchmarks" / "results" / "studio_live.json")
    """Where the result is written."""


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)

    with tempfile.TemporaryDirectory() as folder:
        runs = [make_run(Path(folder), number, options.n_rows) for number in range(options.n_runs)]
        found, chromium = every_round(runs, options)
    medians = {view: {name: round(statistics.median(values), 1) for name, values in of_view.items()}
               for view, of_view in found.items()}  # fmt: skip
    result = {"runs": options.n_runs, "rows": options.n_rows, "rows_per_s": options.rows_per_s,
              "seconds": options.seconds, "rounds": options.rounds, "medians": medians, "every_round": found,
              "machine": machine() | {"chromium": chromium}}  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"{medians}\nwritten to {options.output}")


def every_round(runs: list[Path], options: BenchmarkOptions) -> tuple[dict[str, dict[str, list[float]]], str]:
    """What was measured, by view and name, and the version of the browser."""
    from playwright.sync_api import sync_playwright

    # The chart of a view, and how many lines are waited for: Train draws the loss of one run.
    views = {"runs": ("#chart-compare", len(runs)), "train": ("#chart-loss", 1)}
    found: dict[str, dict[str, list[float]]] = {view: {} for view in views}
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for number, (view, (chart, n_lines)) in product(range(options.rounds), views.items()):
            script = WATCHES.replace("CHART", chart).replace("LINES", str(n_lines))
            script = script.replace("RUNS", json.dumps([run.name for run in runs]))
            with studio(runs[0].parent) as (address, process):
                measured = watched(chromium, (f"{address}#{view}", script, process), runs, options)
            say(f"{number + 1} {view}: " + ", ".join(f"{name} {value}" for name, value in measured.items()))
            for name, value in measured.items():
                found[view].setdefault(name, []).append(value)
        version = chromium.version
        chromium.close()
    return found, version


@contextmanager
def studio(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a studio on this folder, which has read nothing yet, and its process."""
    words = [sys.executable, "-m", "onecard", "studio", "--no_browser", "--port", "0", "--output_root", str(folder)]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
    assert child.stdout is not None
    try:
        for line in child.stdout:
            if found := re.search(r"http://\S+", line):
                yield f"{found[0]}/", psutil.Process(child.pid)
                break
    finally:
        child.terminate()
        child.communicate()


def make_run(folder: Path, number: int, n_rows: int) -> Path:
    """A run that goes on, as far as its files tell, with so many rows."""
    run = folder / f"run-{number:02d}"
    run.mkdir()
    (run / "onecard.yaml").write_text(f"model_path: base\ndata_path: rows.jsonl\nlora_r: {2**number}\n", "utf-8")
    with (run / "log.jsonl").open("w", encoding="utf-8") as log:
        log.writelines(rows_of(number, 1, n_rows))
    (run / "studio.log").write_text("".join(map(OUTPUT.format, range(5000))), "utf-8")
    (run / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
    return run


def rows_of(number: int, first: int, n: int) -> Iterator[str]:
    """Rows of a log from a step on: a loss that falls and scatters, with a peak now and then."""
    for step in range(first, first + n):
        noise = (step * 2_654_435_761 + number * 40_503) % 1000 / 1000
        loss = 2 / (1 + step / 5000) + 0.1 * number + 0.3 * noise + (3 if step % 20_000 == 0 else 0)
        row = {"step": step, "epoch": round(step / 30_000, 4), "loss": round(loss, 6), "grad_norm": 0.5 + noise,
               "learning_rate": 2e-4 / step**0.5, "tokens_per_s": 900 + 90 * noise, "peak_bytes": 9e9}  # fmt: skip
        yield json.dumps(row) + "\n"
        if step % 1000 == 0:
            yield json.dumps({"step": step, "eval_loss": round(loss, 6)}) + "\n"


def watched(
    chromium: Any, view: tuple[str, str, psutil.Process], runs: list[Path], options: BenchmarkOptions
) -> dict[str, float]:
    """One opening of a view, by address, script and studio: when it stands, and what a second costs as rows arrive."""
    url, script, process = view
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, locale="en-US", bypass_csp=True)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.add_init_script(script)
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    served = cpu_ms(process)
    page.goto(url)
    page.wait_for_function("window.curvesAt && " + FIRST_PAINT)
    told = {"first_paint_ms": page.evaluate(FIRST_PAINT), "curves_ms": page.evaluate("window.curvesAt"),
            "main_thread_ms_to_curves": 1000 * metrics(session)["TaskDuration"],
            "studio_ms_to_curves": cpu_ms(process) - served}  # fmt: skip
    wait_for_rest(page)
    with growing(runs, options.rows_per_s):
        time.sleep(3)  # the first news
        before, begun = metrics(session), time.monotonic()
        time.sleep(options.seconds)
        after, seconds = metrics(session), time.monotonic() - begun
    context.close()
    told |= {name: 1000 * (after[key] - before[key]) / seconds for name, key in COSTS.items()}
    return {name: round(value, 1) for name, value in told.items()}


def wait_for_rest(page: Any) -> None:
    """Until all points have followed the first ones: nothing was asked for three seconds."""
    n_asked, since = -1, time.monotonic()
    while time.monotonic() - since < 3:
        now = page.evaluate("performance.getEntriesByType('resource').length")
        if now != n_asked:
            n_asked, since = now, time.monotonic()
        time.sleep(0.5)


def cpu_ms(process: psutil.Process) -> float:
    """CPU milliseconds of a process so far."""
    return 1000 * sum(process.cpu_times()[:2])


COSTS = {"main_thread_ms_per_s": "TaskDuration", "script_ms_per_s": "ScriptDuration",
         "layout_ms_per_s": "LayoutDuration", "style_ms_per_s": "RecalcStyleDuration"}  # fmt: skip


def metrics(session: Any) -> dict[str, float]:
    """CPU seconds of the page's main thread so far."""
    return {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}


@contextmanager
def growing(runs: list[Path], rows_per_s: float) -> Iterator[None]:
    """Rows are added to every log meanwhile."""
    ended = threading.Event()

    def add() -> None:
        steps = dict.fromkeys(runs, 0)
        for run in runs:
            with (run / "log.jsonl").open("rb") as log:
                log.seek(-1000, os.SEEK_END)
                steps[run] = json.loads(log.read().splitlines()[-1])["step"]
        while not ended.wait(1 / rows_per_s):
            for number, run in enumerate(runs):
                steps[run] += 1
                with (run / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.writelines(rows_of(number, steps[run], 1))
                with (run / "studio.log").open("a", encoding="utf-8") as log:
                    log.write(OUTPUT.format(steps[run]))

    thread = threading.Thread(target=add, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(run_main(main))
