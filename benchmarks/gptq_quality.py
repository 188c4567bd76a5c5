#!/usr/bin/env python3
"""Measure whether GPTQ beats rounding to the nearest on the embedded base, over seeds, texts and bits.

    python benchmarks/gptq_quality.py [--seeds 3] [--texts statements,data,corpus]

For each seed and kind of text, other rows are drawn to fit to and to measure on; both are of the same kind, and none is
on both sides. Each setting is then quantised by GPTQ and by rounding, and measured on the same held-out tokens: the
mean KL divergence from the 16-bit predictions, and perplexity. Needs requirements-gptq.txt. Writes
benchmarks/results/gptq_quality.json, anew after each draw.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.config.problems import Problem  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.objectives.registry import objective_named  # noqa: E402

TEXTS = {
    "statements": "the statements of the base's corpus, what quantize_gptq.py takes by itself",
    "corpus": "all documents of the base's corpus, questions on their pages too",
    "data": "sample/merge_sample.json through the alpaca template, as training sees it",
}
DATA, DOCUMENTS = ROOT / "sample" / "merge_sample.json", objective_named("documents")


@dataclass
class BenchmarkOptions:
    """What is measured."""

    model_path: str = DEFAULT_BASE
    """Directory of an unquantised model that knows the texts."""
    seeds: int = 3
    """Draws of text to fit to and to measure on."""
    texts: str = "statements,data"
    """Kinds of text: statements, data, corpus."""
    settings: str = "4x128,3x128"
    """Bits x group size; -1: one group a row."""
    calibration_samples: int = 32
    """Samples of --calibration_len to fit to; of shorter ones up to eight times as many. quantize_gptq.py takes 256."""
    calibration_len: int = 512
    """Longest sample in tokens."""
    eval_samples: int = 16
    """Samples of --calibration_len to measure on; of shorter ones up to eight times as many."""
    desc_act: bool = False
    """Act-order."""
    damp_percent: float = 0.05
    """Damping of the Hessian."""
    output: str = str(RESULTS / "gptq_quality.json")
    """Where the result is written."""

    def problems(self) -> list[Problem]:
        unknown = [name for name in self.texts.split(",") if name not in TEXTS]
        return [("--texts", f"{', '.join(unknown)} is not known; use {', '.join(TEXTS)}")] if unknown else []


def rows_of(text: str, seed: int, tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Token ids of one kind of text, each sample a row of its own; endless for the two of the corpus."""
    from onecard.data.chat_template import load_template
    from onecard.export.quantize.calibration import data_rows, text_rows
    from tools.tiny_corpus import build

    if text == "data":
        return data_rows(str(DATA), DOCUMENTS, load_template("alpaca", tokenizer), tokenizer, length)
    documents = build.documents(seed)
    texts: Iterable[str] = (one + answer for one, answer in documents if text == "corpus" or not answer)
    return text_rows(texts, tokenizer, length, packed=False)


def measure(options: BenchmarkOptions, text: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Quantise in every setting and compare, on one draw of one kind of text."""
    from onecard.export.quantize.calibration import calibration_of
    from onecard.export.quantize.evaluate import quality_of, round_layers
    from onecard.export.quantize.gptq import quantize, quantized_layers
    from onecard.export.quantize.options import CalibrationTextOptions, GptqOptions, SourceOptions
    from onecard.model.load import load_tokenizer

    tokenizer = load_tokenizer(options.model_path)
    amount = CalibrationTextOptions(
        calibration_samples=options.calibration_samples, calibration_len=options.calibration_len,
        eval_samples=options.eval_samples, seed=seed,
    )  # fmt: skip
    drawn = calibration_of(rows_of(text, seed, tokenizer, options.calibration_len), amount)
    before = quality_of(loaded(options.model_path), drawn.held_out, objective=DOCUMENTS, batch_size=32)
    at_once, found = SourceOptions(batch_size=32, device="cpu"), []
    for setting in options.settings.split(","):
        bits, group_size = map(int, setting.split("x"))
        settings = GptqOptions(bits, group_size, options.desc_act, True, options.damp_percent)  # type: ignore[arg-type]
        target = folder / f"{text}-{seed}-{setting}"
        target.mkdir()
        started = time.perf_counter()
        quantize(Path(options.model_path), drawn.rows, settings, at_once, target, folder / "kept")
        seconds = time.perf_counter() - started
        rounded = loaded(options.model_path)
        round_layers(rounded, quantized_layers(target), bits, group_size)
        by_gptq = quality_of(loaded(str(target)), drawn.held_out, before, objective=DOCUMENTS, batch_size=32)
        by_rounding = quality_of(rounded, drawn.held_out, before, objective=DOCUMENTS, batch_size=32)
        found.append(
            {"text": text, "seed": seed, "bits": bits, "group_size": group_size, "fitted_tokens": drawn.n_tokens,
             "held_out_tokens": sum(len(row) - 1 for row in drawn.held_out), "seconds": round(seconds, 1),
             "perplexity": before.perplexity, "perplexity_gptq": by_gptq.perplexity,
             "perplexity_rounding": by_rounding.perplexity, "kl_gptq": by_gptq.divergence,
             "kl_rounding": by_rounding.divergence}
        )  # fmt: skip
        say(
            f"{text}, seed {seed}, {setting}: KL {by_gptq.divergence:.5f} against {by_rounding.divergence:.5f}; "
            f"{drawn.n_tokens} tokens, {seconds:.0f} s"
        )
    return found


def loaded(directory: str) -> Any:
    """A model in fp32 on the CPU, which holds 16-bit weights exactly."""
    import torch

    from onecard.config.base_model import ModelOptions
    from onecard.model.hardware import detect
    from onecard.model.load import load_base

    options = ModelOptions(model_path=directory, bits=16, device="cpu", gradient_checkpointing=False)
    return load_base(options, detect("cpu"), gptq=True, dtype=torch.float32).model


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the seeds of each text and setting, and how often GPTQ was the better one."""
    summary = []
    for text, bits, group_size in dict.fromkeys((row["text"], row["bits"], row["group_size"]) for row in rows):
        some = [row for row in rows if (row["text"], row["bits"], row["group_size"]) == (text, bits, group_size)]
        cost = {way: median(row[f"perplexity_{way}"] / row["perplexity"] - 1 for row in some)
                for way in ("gptq", "rounding")}  # fmt: skip
        summary.append(
            {"text": text, "bits": bits, "group_size": group_size, "draws": len(some),
             "kl_gptq": median(row["kl_gptq"] for row in some),
             "kl_rounding": median(row["kl_rounding"] for row in some),
             "kl_ratio": median(row["kl_gptq"] / row["kl_rounding"] for row in some),
             "kl_better": sum(row["kl_gptq"] < row["kl_rounding"] for row in some),
             "perplexity_cost_gptq": cost["gptq"], "perplexity_cost_rounding": cost["rounding"],
             "perplexity_better": sum(row["perplexity_gptq"] < row["perplexity_rounding"] for row in some)}
        )  # fmt: skip
    return summary


def main(argv: list[str] | None = None) -> None:
    options = parse(BenchmarkOptions, argv, description=__doc__ or "")
    from onecard.model.gptq import check_gptq_installed

    check_gptq_installed("gptq_quality.py", "quantises by GPTQ")
    rows: list[dict[str, Any]] = []
    texts = {name: TEXTS[name] for name in options.texts.split(",")}
    with tempfile.TemporaryDirectory(prefix="gptq-quality-") as folder:
        for seed in range(1, options.seeds + 1):
            for text in options.texts.split(","):
                rows += measure(options, text, seed, Path(folder))
                summary = summary_of(rows)
                write_result(
                    options.output, {"texts": texts, "summary": summary, "rows": rows, "machine": machine("cpu")}
                )
    say_table(
        ["text", "bits x group", "KL, GPTQ", "KL, rounding", "GPTQ / rounding", "GPTQ better", "perplexity, GPTQ",
         "perplexity, rounding"],
        [[row["text"], f"{row['bits']} x {row['group_size']}", f"{row['kl_gptq']:.4f}", f"{row['kl_rounding']:.4f}",
          f"{row['kl_ratio']:.2f}", f"{row['kl_better']} of {row['draws']}", f"{row['perplexity_cost_gptq']:+.1%}",
          f"{row['perplexity_cost_rounding']:+.1%}"] for row in summary],
    )  # fmt: skip
    say("medians over the draws; KL in nats per token from the 16-bit predictions; perplexity beside that of 16 bits")


if __name__ == "__main__":
    sys.exit(run_main(main))
