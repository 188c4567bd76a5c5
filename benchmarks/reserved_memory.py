#!/usr/bin/env python
"""What the plan says beside the smallest memory in which a step runs, on a simulated card (tests/simcard/README.md).

    python benchmarks/reserved_memory.py [--rows 0,3] [--split held_out] [--mode fixed]
    python benchmarks/reserved_memory.py --plan_only true      the limits of the file, beside what is planned today

Each row loads a model of random weights as shapes, without and with expandable segments, in a process of its own, and
halves the allocator's limit between what the tensors took and what was reserved until it knows the smallest one within
0.8 %. A row is two of the largest micro-batches, forward and backward, over gradients that are there. The allocator's
arithmetic is torch's; no figure is a measurement of a card. The state of a paged optimizer is planned on the card, and
made there: pages of unified memory are none of the allocator's.
Writes benchmarks/results/reserved_memory.json, in which rows that are not measured stay as they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import ModelError  # noqa: E402
from onecard.model.files import read_json  # noqa: E402

CARD = "sm75:80GiB"
MODES = ("fixed", "expandable")
PRECISION = 0.008  # of the tensors
MICRO_BATCHES = 2
IN_RAM = {"stream_layers": True, "offload_activations": True, "offload_embeddings": True,
          "optimizer": "paged_adamw_8bit"}  # fmt: skip
# split, model, rows, length, and the rest of a `MemoryConfig`. "fit": looked at when the constants were chosen.
ROWS: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("fit", "Llama-3.2-1B", 4, 1000, {"bits": 16}),
    ("fit", "Qwen2.5-0.5B", 8, 512, {"bits": 4, "loss_chunk": 256}),
    ("fit", "Qwen2.5-1.5B", 1, 4096, {"bits": 4}),
    ("fit", "Qwen2.5-7B", 1, 1024, {"bits": 8}),
    ("fit", "Llama-3.2-3B", 2, 3072, {"bits": 8}),
    ("fit", "Qwen2.5-7B", 1, 1024, {"bits": 4}),
    ("fit", "Qwen2.5-7B", 1, 4096, {"bits": 4, "offload_activations": True}),
    ("held_out", "Llama-3.1-8B", 2, 2048, {"bits": 4}),
    ("held_out", "Qwen2.5-3B", 2, 777, {"bits": 4, "rank": 64, "optimizer": "paged_adamw_8bit"}),
    ("held_out", "Qwen3-8B", 3, 1500, {"bits": 4}),
    ("held_out", "Mistral-7B-v0.3", 1, 8192, {"bits": 4, "mlp_tile": 2048}),
    ("held_out", "Llama-3.1-8B", 1, 16384, {"bits": 4, "offload_activations": True, "mlp_tile": 4096}),
    ("streamed", "Llama-3.1-8B", 1, 512, {"bits": 4, "loss_chunk": 256, "head_bits": 8, **IN_RAM}),
    ("streamed", "Llama-3.1-8B", 1, 4096, {"bits": 4, **IN_RAM}),
    ("streamed", "Qwen2.5-32B", 1, 2048, {"bits": 4, **IN_RAM}),
    ("streamed", "Llama-3.1-70B", 1, 512, {"bits": 4, **IN_RAM}),
    ("streamed", "Llama-3.1-70B", 1, 4096, {"bits": 4, "offload_activations": True, "stream_layers": True}),
    ("held_out", "Qwen2.5-0.5B", 4, 2048, {"bits": 16}),
    ("held_out", "Qwen3-1.7B", 4, 1024, {"bits": 8, "rank": 32}),
    ("held_out", "Qwen3-4B", 2, 1536, {"bits": 4}),
    ("held_out", "Llama-3.2-1B", 2, 4096, {"bits": 8}),
    ("held_out", "Llama-3.2-3B", 1, 8192, {"bits": 4, "offload_activations": True}),
    ("held_out", "Mistral-7B-v0.3", 2, 1024, {"bits": 8, "loss_chunk": 512}),
    ("held_out", "Llama-3.1-8B", 1, 3000, {"bits": 8, "rank": 16}),
    ("held_out", "Qwen2.5-14B", 1, 2048, {"bits": 4, "offload_activations": True, "optimizer": "paged_adamw_8bit"}),
    ("held_out", "Llama-3.1-8B", 1, 8192, {"bits": 4, "loss_chunk": 256, "head_bits": 4, "offload_embeddings": True}),
    ("held_out", "Qwen2.5-1.5B", 2, 1024, {"bits": 4, "gradient_checkpointing": False}),
    ("held_out", "SmolLM2-1.7B", 6, 700, {"bits": 16, "rank": 16}),
    ("held_out", "Gemma-2-2B", 1, 2048, {"bits": 4, "element_bytes": 4}),  # fp16 is too small for this family
    ("held_out", "Phi-3.5-mini", 2, 1200, {"bits": 4, "rank": 64}),
    ("held_out", "Gemma-3-1B", 4, 1024, {"bits": 4, "element_bytes": 4}),
]
# Rows 31 and 32, which are measured one at a time.
FOUR_LAYERS = ("test", "Llama-3.2-3B/4", 2, 2048, {"bits": 4, "loss_chunk": 512})  # the first so many of a model
LONG_ROW = ("test", "Llama-3.1-8B", 1, 32768,
            {"bits": 4, "rank": 32, "mlp_tile": 8192, "offload_activations": True})  # fmt: skip


@dataclass
class ReservedMemoryOptions:
    """What is tried."""

    rows: str = ""
    """Numbers of rows, counted from 0; empty: all of the split."""
    split: str = "all"
    """fit, held_out, streamed or all."""
    row: int = -1
    """Inside the process of one row: its number."""
    mode: str = ""
    """fixed or expandable; empty: both."""
    micro_batches: int = MICRO_BATCHES
    """How many a step has, with nothing given back between them. The plan has two."""
    plan_only: bool = False
    """Measure nothing: plan the rows of the file anew, beside the limits that were found."""
    output: str = str(RESULTS / "reserved_memory.json")
    """Where the result goes."""


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the file."""
    options = parse(ReservedMemoryOptions, argv, description=__doc__)
    if options.row >= 0:
        _, name, rows, length, rest = [*ROWS, FOUR_LAYERS, LONG_ROW][options.row]
        is_growing = options.mode == MODES[1]
        found = in_this_process(name, rows, length, rest, expandable=is_growing, micro_batches=options.micro_batches)
        say(json.dumps(found))
        return
    if options.plan_only:
        stored = read_json(Path(options.output))
        again = [row | plan_of(row, row["mode"] == MODES[1], row["limit_bytes"]) for row in stored["rows"]]
        write_result(options.output, {**stored, "rows": again, "summary": summary(again)})
        tell(again)
        return
    asked = [int(number) for number in options.rows.split(",") if number.strip()] or range(len(ROWS))
    output = Path(options.output)
    done = read_json(output)["rows"] if output.is_file() else []
    for number in asked:
        for mode in [options.mode] if options.mode else MODES:
            if options.split in (ROWS[number][0], "all"):
                found = in_a_process(number, mode, options.micro_batches)
                done = in_order([*done, {"split": ROWS[number][0], "mode": mode, **found}])
                write_result(options.output, {"rows": done, "summary": summary(done), "machine": machine("cpu")})
    tell(done)


def in_order(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of `ROWS` in their order; of two of one row and mode the later one, none of any other row."""
    by_place = {}
    for row in found:
        for number, (_, model, rows, length, rest) in enumerate(ROWS):
            if {"model": model, "rows": rows, "length": length, **rest}.items() <= row.items():
                by_place[number, MODES.index(row["mode"])] = row
    return [row for _, row in sorted(by_place.items(), key=lambda entry: entry[0])]


def in_a_process(number: int, mode: str, micro_batches: int = MICRO_BATCHES) -> dict[str, Any]:
    """One row, on a card that nothing else was on. Raises ModelError with what it said last."""
    card = CARD + (",expandable" if mode == MODES[1] else "")
    words = [sys.executable, "-m", "tests.simcard", card, __file__, "--row", str(number), "--mode", mode,
             "--micro_batches", str(micro_batches)]  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith('{"model"')]
    if done.returncode or not rows:
        raise ModelError(f"row {number} failed: {' '.join(done.stderr.splitlines()[-3:])}")
    return dict(json.loads(rows[-1]))


def in_this_process(
    model: str, rows: int, length: int, rest: dict[str, Any], *, expandable: bool, micro_batches: int
) -> dict[str, Any]:
    """Plan and measure one setup on the simulated card of this process, in bytes without the context."""
    import torch

    from benchmarks.random_models import config_of
    from benchmarks.synthetic_run import real_run
    from onecard.model.hardware import detect
    from onecard.model.memory_saving import streamed_layers
    from onecard.model.out_of_memory import give_back_memory
    from tests.simcard.card import shapes_only

    name, _, n_layers = model.partition("/")
    config = config_of(name) | ({"num_hidden_layers": int(n_layers)} if n_layers else {})
    row = {"model": model, "rows": rows, "length": length, **rest}
    setup = setup_of(row, expandable)
    setup = replace(setup, optimizer=setup.optimizer.removeprefix("paged_"))
    with shapes_only(), patch.object(streamed_layers, "_write"):  # which would touch each page of so much RAM
        run = real_run(config, setup, detect("cuda", pretend_turing=True))
        give_back_memory()
        try:
            found = smallest_limit(run, rows, micro_batches)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    if run.plain_model.get_input_embeddings().weight.dtype.itemsize != setup.element_bytes:
        raise ModelError(f"{model} does not run in {setup.element_bytes} bytes a number; plan it with element_bytes")
    return row | plan_of(row, expandable, found["limit_bytes"]) | found | {"micro_batches": micro_batches}


def plan_of(row: dict[str, Any], expandable: bool, limit: int) -> dict[str, Any]:
    """What is planned for a row, in bytes without the context, beside the limit that was found for it."""
    from benchmarks.random_models import config_of
    from onecard.model.memory.architecture import architecture_of
    from onecard.model.memory.estimate import CUDA_CONTEXT_BYTES, account

    name, _, n_layers = row["model"].partition("/")
    config = config_of(name) | ({"num_hidden_layers": int(n_layers)} if n_layers else {})
    planned = account(architecture_of(config), setup_of(row, expandable))
    n_bytes = planned.card_bytes - CUDA_CONTEXT_BYTES
    return {"planned_tensor_bytes": planned.tensor_bytes, "planned_bytes": n_bytes, "ratio": n_bytes / limit}


def setup_of(row: dict[str, Any], expandable: bool) -> Any:
    """The `MemoryConfig` of a row, which has some of its numbers by name."""
    from onecard.model.memory.estimate import MemoryConfig

    given = {each.name: row[each.name] for each in fields(MemoryConfig) if each.name in row}
    return MemoryConfig(**{"element_bytes": 2, **given}, repeats_kv=True, expandable_segments=expandable)


def smallest_limit(run: Any, rows: int, micro_batches: int) -> dict[str, int]:
    """Bytes of tensors at the peak, bytes reserved without a limit, and the smallest limit that the step runs under."""
    import numpy as np
    import torch

    from onecard.model.out_of_memory import give_back_memory
    from onecard.train.step import accumulate

    total = torch.cuda.get_device_properties(0).total_memory

    def runs() -> bool:
        _, failed = accumulate(run, run.train_samples, [np.arange(rows)] * micro_batches, 1000.0)
        give_back_memory()
        return not failed

    if not runs():  # from here on there are gradients
        raise ModelError("the step does not run on the whole card")
    torch.cuda.reset_peak_memory_stats()
    runs()
    tensors, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    too_few, enough = tensors, reserved
    while enough - too_few > PRECISION * tensors:
        middle = (too_few + enough) // 2
        torch.cuda.set_per_process_memory_fraction(middle / total)
        too_few, enough = (too_few, middle) if runs() else (middle, enough)
    return {"tensor_bytes": tensors, "reserved_bytes": reserved, "limit_bytes": enough}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The lowest and the highest ratio of plan and limit, by mode and split."""
    groups: dict[str, list[float]] = {}
    for row in found:
        groups.setdefault(f"{row['mode']}, {row['split']}", []).append(row["ratio"])
    return {name: {"rows": len(ratios), "lowest": round(min(ratios), 4), "highest": round(max(ratios), 4)}
            for name, ratios in groups.items()}  # fmt: skip


def tell(found: list[dict[str, Any]]) -> None:
    """The table, in GiB."""
    sizes = ("planned_bytes", "tensor_bytes", "reserved_bytes", "limit_bytes")
    say_table(
        ["split", "segments", "model", "bits", "rows x length", "planned", "tensors", "reserved", "limit", "ratio"],
        [[row["split"], row["mode"], row["model"], row["bits"], f"{row['rows']} x {row['length']:,}",
          *(f"{row[size] / 2**30:.2f}" for size in sizes), f"{row['ratio']:.3f}"] for row in found],
    )  # fmt: skip
    for name, one in summary(found).items():
        say(f"{name}: plan / limit from {one['lowest']:.3f} to {one['highest']:.3f} over {one['rows']} rows")


if __name__ == "__main__":
    sys.exit(run_main(main))
