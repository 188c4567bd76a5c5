#!/usr/bin/env python
"""What the forgetting meter costs: its CPU seconds beside those of the rest of the run, at the default settings.

    python benchmarks/forgetting_cost.py [--rounds 5] [--data_path rows.json]

Each round is a whole run of the recipe on sample/tiny-llama in 32 bits; the meter is timed inside it, what rounding
gives at its first evaluation included, so that meter and run share every minute of the machine. CPU seconds of this
process, median over the rounds. Writes benchmarks/results/forgetting_cost.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.data import DataOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.config.run import TrainOptions  # noqa: E402
from onecard.config.training import FinetuneConfig  # noqa: E402
from onecard.console import run_main, say  # noqa: E402

BAR = 0.03  # of the run


@dataclass
class CostOptions:
    """What is measured."""

    data_path: str = str(ROOT / "sample" / "merge_sample.json")
    """Instruction data."""
    max_steps: int = 0
    """End after so many steps; 0: at the default length."""
    rounds: int = 5
    """Runs; medians are reported."""
    output: str = str(ROOT / "benchmarks" / "results" / "forgetting_cost.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(CostOptions, argv, description=__doc__ or "")

    from benchmarks.machine import machine, say_table, write_result

    rounds = [measured(options) for _ in range(options.rounds)]
    shares = [found["meter_s"] / found["rest_s"] for found in rounds]
    share = statistics.median(shares)
    rows = [[one["meter_s"], one["rest_s"], f"{part:.2%}"] for one, part in zip(rounds, shares, strict=True)]
    say_table(["meter, CPU s", "rest of the run, CPU s", "share"], rows)
    say(f"the meter costs {share:.2%} of the run without it, on {rounds[0]['texts']} texts, in "
        f"{rounds[0]['evaluations']} evaluations; the bar is {BAR:.0%}")  # fmt: skip
    given = asdict(options) | {"output": Path(options.output).name, "data_path": Path(options.data_path).name}
    write_result(options.output, {"options": given, "rounds": rounds, "share": share, "bar": BAR,
                                  "machine": machine("cpu")})  # fmt: skip


def measured(options: CostOptions) -> dict[str, Any]:
    """CPU seconds of the meter, and of the rest from the first step to the last, of one run."""
    from onecard import recipes
    from onecard.train import loop, validation

    spent: dict[str, list[float]] = {"meter": [], "run": []}
    texts: set[int] = set()

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def result(run: Any, *rest: Any) -> Any:
            texts.add(len(run.forgetting_rows))
            started = time.process_time()
            try:
                return work(run, *rest)
            finally:
                spent[name].append(time.process_time() - started)

        return result

    meter, train = validation._forgetting, loop.train
    validation._forgetting, loop.train = timed("meter", meter), timed("run", train)
    try:
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            recipes.finetune(FinetuneConfig(
                ModelOptions(model_path=DEFAULT_BASE, bits=32, device="cpu"),
                DataOptions(data_path=options.data_path, cache_path=str(Path(folder) / "cache")),
                train=TrainOptions(output_path=str(Path(folder) / "run"), max_steps=options.max_steps),
            ))  # fmt: skip
    finally:
        validation._forgetting, loop.train = meter, train
    meter_s = sum(spent["meter"])
    return {"meter_s": round(meter_s, 3), "rest_s": round(sum(spent["run"]) - meter_s, 3),
            "evaluations": len(spent["meter"]), "texts": max(texts)}  # fmt: skip


if __name__ == "__main__":
    run_main(main)
