#!/usr/bin/env python3
"""How good an adapter becomes with 4 to 64 samples per optimizer step, by the number of training rows.

    python benchmarks/batch_size.py [--rows 40,272,552,2000] [--rates 2e-4,2e-3]

Everything else is the default of finetune.py, with sample/tiny-llama in 32 bits. The loss is that of the rows in
sample/held_out.json, none of which is trained on; what is more than sample/merge_sample.json holds comes from the same
generator. Writes benchmarks/results/batch_size.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as `python benchmarks/batch_size.py`, Python sees only this folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.base_model import ModelOptions  # noqa: E402
from onecard.config.data import DataOptions  # noqa: E402
from onecard.config.parsing import comma_list, parse  # noqa: E402
from onecard.config.run import TrainOptions  # noqa: E402
from onecard.config.training import FinetuneConfig, MemoryOptions  # noqa: E402
from onecard.console import run_main, say  # noqa: E402


@dataclass
class BatchOptions:
    """What is compared."""

    rows: str = "40,272,552,2000"
    """Training rows, with commas between them."""
    rates: str = "2e-4,2e-3"
    """Learning rates: the default, and one that suits a model this small."""
    batches: str = "4,8,16,32,64"
    """Samples per optimizer step."""
    output: str = str(ROOT / "benchmarks" / "results" / "batch_size.json")
    """Where the result is written."""


def main(argv: list[str] | None = None) -> None:
    options = parse(BatchOptions, argv, description=__doc__ or "")

    from benchmarks.machine import machine, say_table, write_result
    from onecard.train.auto_config import auto_total_batch

    found: list[dict[str, Any]] = []
    for n_rows in map(int, comma_list(options.rows)):
        for rate in map(float, comma_list(options.rates)):
            losses = {batch: held_out_loss(n_rows, rate, int(batch)) for batch in comma_list(options.batches)}
            found.append({"rows": n_rows, "rate": rate, "chosen": auto_total_batch(n_rows), "losses": losses})
            say(json.dumps(found[-1]))
    batches = comma_list(options.batches)
    table = [[row["rows"], row["rate"], *(row["losses"][b] for b in batches), row["chosen"]] for row in found]
    say_table(["rows", "rate", *batches, "chosen"], table)
    write_result(options.output, {"rows": found, "machine": machine("cpu")})


def held_out_loss(n_rows: int, rate: float, batch: int) -> float:
    """The loss on held-out rows after the default number of epochs over `n_rows` rows."""
    from onecard.recipes import finetune

    with TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        data.write_text(json.dumps(training_rows(n_rows)), encoding="utf-8")
        run = finetune(FinetuneConfig(
            ModelOptions(bits=32, device="cpu"), DataOptions(data_path=str(data), test_size=0, cache_path=folder),
            train=TrainOptions(output_path=f"{folder}/run", total_batch=batch, learning_rate=rate, save_steps=10**6),
            memory=MemoryOptions(rehearsal=False),
        ))  # fmt: skip
        return round(evaluated(run), 4)


def training_rows(n_rows: int) -> list[Any]:
    """The sample's rows, or as many as are wanted from its generator."""
    from tools.tiny_corpus.build import merge_sample

    made = merge_sample()
    return (made if n_rows <= len(made) else merge_sample(per_task=n_rows // 7))[:n_rows]


def evaluated(run: Path) -> float:
    """The loss of a finished run on sample/held_out.json."""
    from accelerate import Accelerator

    from onecard.data.chat_template import load_template
    from onecard.data.dataset import encode_dataset
    from onecard.data.encode import EncodeSettings
    from onecard.model.hardware import detect
    from onecard.model.load import load_base, load_tokenizer
    from onecard.model.lora.adapter import load_adapter
    from onecard.objectives.registry import objective_named
    from onecard.train.evaluate import Evaluator
    from onecard.train.oom import MicroBatchLimits

    options = replace(ModelOptions(bits=32, device="cpu"), gradient_checkpointing=False)
    tokenizer = load_tokenizer(options.model_path)
    held_out = str(ROOT / "sample" / "held_out.json")
    data = encode_dataset(held_out, load_template("auto", tokenizer), tokenizer, EncodeSettings(1024), run.parent)
    model = load_adapter(load_base(options, detect("cpu")).model, run, trainable=False).model
    samples = [data[number] for number in range(len(data))]
    sft, limits = objective_named("sft"), MicroBatchLimits(micro_tokens=4096)
    loss, n_units = Evaluator(model, Accelerator(cpu=True), limits).sums(sft, samples)[:2].tolist()
    return loss / n_units


if __name__ == "__main__":
    sys.exit(run_main(main))
