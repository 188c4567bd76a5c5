#!/usr/bin/env python
"""What --kl_anchor gives: exact match on the task, and how far the model moves from its base elsewhere, by its weight.

    python benchmarks/kl_anchor.py [--weights 0,0.1,1] [--seeds 3]

Each weight is a run of the recipe on sample/tiny-llama with the rows of sample/merge_sample.json; exact match is of
the answers to sample/held_out.json, greedy. KL(base || tuned) is on the texts that do not anchor, per token in nats,
the same for all. Means over seeds. Writes benchmarks/results/kl_anchor.json.
"""

from __future__ import annotations

import statistics
import sys
import time
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
from onecard.config.parsing import comma_list, parse  # noqa: E402
from onecard.config.run import TrainOptions  # noqa: E402
from onecard.config.training import FinetuneConfig  # noqa: E402
from onecard.console import run_main, say  # noqa: E402


@dataclass
class AnchorOptions:
    """What is compared."""

    weights: str = "0,0.1,0.3,1,3"
    """Values of --kl_anchor; the first is what the others are compared with."""
    seeds: int = 2
    """Runs of each."""
    num_epoch: float = 3
    """Passes over the rows."""
    output: str = str(ROOT / "benchmarks" / "results" / "kl_anchor.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(AnchorOptions, argv, description=__doc__ or "")

    from benchmarks.machine import machine, say_table, write_result

    rows: list[dict[str, Any]] = []
    for weight in map(float, comma_list(options.weights)):
        runs = [measured(weight, seed, options) for seed in range(options.seeds)]
        rows.append({"kl_anchor": weight} | {name: [run[name] for run in runs] for name in runs[0]})
        say(f"--kl_anchor {weight:g}: {rows[-1]}")
    first = statistics.mean(rows[0]["forgetting"])
    table = [[row["kl_anchor"], *(f"{statistics.mean(row[name]):.4f}" for name in ("exact_match", "forgetting")),
              f"{statistics.mean(row['forgetting']) / first:.2f}", f"{statistics.mean(row['cpu_s']):.1f}"]
             for row in rows]  # fmt: skip
    say_table(["--kl_anchor", "exact match", "forgetting", "of the first", "CPU seconds"], table)
    given = asdict(options) | {"output": Path(options.output).name}
    write_result(options.output, {"options": given, "rows": rows, "machine": machine("cpu")})


def measured(weight: float, seed: int, options: AnchorOptions) -> dict[str, float]:
    """Exact match, forgetting and CPU seconds of the training of one run."""
    from onecard.recipes import finetune

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = Path(folder) / "run"
        started = time.process_time()
        finetune(FinetuneConfig(
            ModelOptions(model_path=DEFAULT_BASE, bits=32, device="cpu"),
            DataOptions(data_path=str(ROOT / "sample" / "merge_sample.json"), cache_path=f"{folder}/cache"),
            train=TrainOptions(output_path=str(run), seed=seed, num_epoch=options.num_epoch, kl_anchor=weight,
                               measure_forgetting=False, compare_with_base=False),
        ))  # fmt: skip
        seconds = time.process_time() - started
        return {"exact_match": exact_match(run), "forgetting": forgetting(run), "cpu_s": round(seconds, 1)}


def exact_match(run: Path) -> float:
    """Of the answers to sample/held_out.json."""
    from onecard.config.evaluation import EvaluateOptions
    from onecard.programs.evaluate import EvaluateConfig, evaluate

    asked = EvaluateOptions(suite=f"open:{ROOT / 'sample' / 'held_out.json'}", lora_path=str(run), batch_size=32,
                            output_path=str(run.parent / "measured"), max_new_tokens=32)  # fmt: skip
    report = evaluate(EvaluateConfig(asked, ModelOptions(model_path=DEFAULT_BASE, bits=32, device="cpu")))
    value: Any = report["suites"][0]["measures"][0]["values"]["exact_match"]
    return float(value[0])


def forgetting(run: Path) -> float:
    """KL(base || tuned) per token in nats, on the texts that do not anchor."""
    from onecard.inference.load import load_bundle
    from onecard.objectives.preference import adapter_off
    from onecard.train.forgetting import MEASURED, measure_forgetting, text_rows

    bundle, _ = load_bundle(ModelOptions(model_path=DEFAULT_BASE, bits=32, device="cpu"), str(run), "auto")
    found = measure_forgetting(bundle.model, text_rows(bundle.tokenizer, MEASURED), "cpu", adapter_off)
    return found.kl if found is not None else float("nan")


if __name__ == "__main__":
    run_main(main)
