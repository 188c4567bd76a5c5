#!/usr/bin/env python
"""Clean a million records with planted duplicates: what is found, records per second, peak memory.

    python benchmarks/clean_data.py [--records 1000000]

Half of the records are Chinese. Of each hundred, five repeat one before them with a Jaccard similarity of exactly 0.8
(of runs of five words), and five are look-alikes with 0.5, which must stay. Needs requirements-data.txt.
Writes benchmarks/results/clean_data.json.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.curation import CleanOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.curation.clean.run import clean  # noqa: E402

RUNS = 45  # of five words in each text: 49 words
# Shared runs of two texts with 45 each: 40 / (90 - 40) = 0.8 and 30 / (90 - 30) = 0.5
SHARED_RUNS = {"duplicate": 40, "look-alike": 30}


@dataclass
class BenchmarkOptions:
    """What is measured."""

    records: int = 1_000_000
    """Records in the data file."""
    languages: str = ""
    """Languages that stay, as of `onecard data clean`; empty: none is looked for."""
    output: str = str(ROOT / "benchmarks" / "results" / "clean_data.json")
    """Where the result is written."""
    data_path: str = ""
    """Clean this file in this process and print one line of JSON; the benchmark starts itself so."""


def planted_rows(n: int, seed: int = 7) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, record) of `n` records; kind is "new", or "duplicate" or "look-alike" of an earlier new one."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    latin = ["".join(draw.choices(letters, k=draw.randint(3, 9))) for _ in range(50_000)]
    han = [chr(code) for code in range(0x4E00, 0x4E00 + 5000)]
    recent: list[list[list[str]]] = [[], []]
    for i in range(n):
        words, blank = (latin, " ") if i % 2 else (han, "")
        kind = {18: "duplicate", 19: "duplicate", 38: "look-alike", 39: "look-alike"}.get(i % 40, "new")
        text = draw.choices(words, k=RUNS + 4)
        if kind == "new":
            recent[i % 2] = [*recent[i % 2][-999:], text]
        else:
            shared = SHARED_RUNS[kind] + 4
            earlier = draw.choice(recent[i % 2])
            text = earlier[:shared] + text[shared:]
            # The next word differs for certain, so no more runs are shared.
            while text[shared] == earlier[shared]:
                text[shared] = draw.choice(words)
        yield kind, {"instruction": blank.join(text[:12]), "output": blank.join(text[12:]), "id": i}


def write_planted(path: Path, n: int) -> list[str]:
    """Write `n` planted records as JSON lines; returns the kind of each."""
    kinds = []
    with path.open("w", encoding="utf-8") as stream:
        for kind, row in planted_rows(n):
            kinds.append(kind)
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return kinds


def removed_lines(target: Path) -> set[int]:
    """Lines (from 1) that a cleaning left out."""
    with (target / "report" / "removed.jsonl").open(encoding="utf-8") as stream:
        return {json.loads(line)["line"] for line in stream}


def found_shares(kinds: list[str], removed: set[int]) -> tuple[float, float]:
    """(share of the planted duplicates that went, share of the other records that went)."""
    planted = {line for line, kind in enumerate(kinds, start=1) if kind == "duplicate"}
    return len(planted & removed) / len(planted), len(removed - planted) / (len(kinds) - len(planted))


def measure(options: BenchmarkOptions) -> None:
    """Clean one file; print seconds and the peak of this process."""
    import resource  # not on Windows, where the planted rows are still of use

    started = time.perf_counter()
    target = Path(options.data_path).with_name("cleaned")
    clean(CleanOptions(data_path=options.data_path, output_path=str(target), languages=options.languages))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu_s = time.process_time()
    say(json.dumps({"wall_s": time.perf_counter() - started, "cpu_s": cpu_s, "peak_mib": peak_mib}))


def main(argv: list[str] | None = None) -> None:
    """Measure and write the result."""
    options = parse(BenchmarkOptions, argv, description=__doc__ or "")
    if options.data_path:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "planted.jsonl"
        kinds = write_planted(file, options.records)
        words = [sys.executable, __file__, "--data_path", str(file), "--languages", options.languages]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found, false = found_shares(kinds, removed_lines(Path(folder) / "cleaned"))
        result = {
            "records": options.records,
            "planted_found": found,
            "others_removed": false,
            **json.loads(done.stdout.splitlines()[-1]),
        }
    result["records_per_s"] = options.records / result["wall_s"]
    result["records_per_cpu_s"] = options.records / result["cpu_s"]
    packages = {name: version(name) for name in ("rensa", "ftfy", "numpy")}
    result |= {"python": platform.python_version(), "cpus": os.cpu_count(), "packages": packages}
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(json.dumps(result, indent=2))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
