#!/usr/bin/env python3
"""Samples in shared rows (--packing) against padding: tokens per second on instruction rows, same steps, same run.

    python benchmarks/packing.py [--rows 1000] [--rounds 7] [--joined 1]

Three ways take the same steps in turns, and must find the same losses: `--packing`; rows padded to the longest of a
micro-batch, as this project cuts a step (longest first, --micro_tokens); and 8 rows at a time (--micro_batch 8),
longest first too. Tokens are those of the samples, padding aside; seconds are CPU seconds of this process, so others
on the machine count little. The base is sample/tiny-llama in 32 bits, and the records are from the generator of
sample/. Where TRL is installed (`bash scripts/test.sh --trl` makes such an environment), its SFTTrainer takes steps of
the same samples in each round, too (`trl_packing.py`). Writes benchmarks/results/packing.json.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
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
from onecard.config.training import FinetuneConfig, MemoryOptions  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import ModelError  # noqa: E402

PACKED, PADDED, FIXED = "packed rows", "padded, longest first", "padded, 8 rows at once"
TRL_PACKED, TRL_PADDED = "TRL, packing=True", "TRL, packing=False"
N_TASKS = 7  # kinds of records that the generator has
FIXED_ROWS = 8
TOLERANCE, LOGGED = 1e-4, 2e-3  # of the loss of a step; of one that is logged in four digits


@dataclass
class PackingOptions:
    """What is compared."""

    rows: int = 1000
    """Instruction records."""
    joined: int = 1
    """Every record has the texts of 1 to so many; with more than 1 they are of unlike lengths."""
    cutoff_len: int = 512
    """Tokens of a shared row."""
    micro_tokens: int = 2048
    """Tokens at once, padding included."""
    total_batch: int = 32
    """Samples of an optimizer step."""
    steps: int = 3
    """Steps of each way in a round."""
    rounds: int = 7
    """Rounds; medians are reported."""
    seed: int = 42
    """Of the order of samples."""
    output: str = str(ROOT / "benchmarks" / "results" / "packing.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(PackingOptions, argv, description=__doc__ or "")

    from benchmarks.machine import machine, say_table, write_result
    from benchmarks.synthetic_run import samples_of

    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(records(options.rows, options.joined), ensure_ascii=False), encoding="utf-8")
        samples = samples_of(str(path), Path(DEFAULT_BASE), options.cutoff_len)
    ways, padded = build(options, samples)
    with TemporaryDirectory() as folder:
        others = trl_runs(options, samples, Path(folder))
        speeds, losses = measure(ways, others, samples, options)
    rows = []
    for name in speeds:
        ratios = [packed / other for packed, other in zip(speeds[PACKED], speeds[name], strict=True)]
        rows.append({"name": name, "tokens_per_cpu_s": round(statistics.median(speeds[name]), 1),
                     "packed_to_this": round(statistics.median(ratios), 3),
                     "computed_to_real_tokens": round(padded[name], 3) if name in padded else None})  # fmt: skip
    say_table(
        ["", "tokens per CPU second", "packed / this", "computed / real tokens"], [[*row.values()] for row in rows]
    )
    say(f"largest difference of a step's loss: {losses:.1e}")
    given = asdict(options) | {"output": Path(options.output).name}
    facts = {"samples": len(samples), "median_length": float(statistics.median(samples.lengths)),
             "longest": int(samples.lengths.max()), "loss_difference": losses,
             "trl": version("trl") if others else None}  # fmt: skip
    write_result(options.output, {"options": given, "rows": rows, "facts": facts, "speeds": speeds,
                                  "machine": machine("cpu")})  # fmt: skip


def records(n_rows: int, joined: int = 1) -> list[dict[str, Any]]:
    """Records of the kinds that sample/merge_sample.json has, of 1 to `joined` of them each."""
    from tools.tiny_corpus.build import merge_sample

    every = merge_sample(per_task=n_rows // N_TASKS + 1)[:n_rows]
    several = [[every[(number + more) % n_rows] for more in range(number % joined + 1)] for number in range(n_rows)]
    return [{name: "\n".join(str(one[name]) for one in some) for name in some[0]} for some in several]


def trl_runs(options: PackingOptions, samples: Any, folder: Path) -> dict[str, Any]:
    """TRL's trainer with packing and with padding; nothing where it is not installed."""
    if importlib.util.find_spec("trl") is None:
        say("TRL is not installed, and not compared with")
        return {}
    from benchmarks.trl_packing import TrlRun

    # 32 samples are some 4 packed rows, which is one micro-batch, as the rows of --micro_tokens are.
    rows = options.micro_tokens // options.cutoff_len
    return {TRL_PACKED: TrlRun(options, samples, folder / "packed", packing=True, rows=rows),
            TRL_PADDED: TrlRun(options, samples, folder / "padded", packing=False, rows=FIXED_ROWS)}  # fmt: skip


def build(options: PackingOptions, samples: Any) -> tuple[dict[str, Callable[[int], float]], dict[str, float]]:
    """Each way to take step n, and how many tokens it computes for each real one."""
    from benchmarks.random_models import base_model
    from benchmarks.synthetic_run import build_run
    from onecard.data.batches import micro_batches, step_samples
    from onecard.data.packing import padded_tokens
    from onecard.model.hardware import detect
    from onecard.model.packed_rows import keep_texts_apart
    from onecard.train.oom import MicroBatchLimits
    from onecard.train.step import take_step

    hardware = detect("cpu")
    config = FinetuneConfig(
        ModelOptions(bits=32, gradient_checkpointing=False), DataOptions(cutoff_len=options.cutoff_len),
        train=TrainOptions(total_batch=options.total_batch, micro_tokens=options.micro_tokens, optimizer="adamw",
                           schedule="constant", warmup_ratio=0.0, learning_rate=1e-6, max_steps=10**6,
                           seed=options.seed),
        memory=MemoryOptions(loss_chunk=-1),
    )  # fmt: skip
    limits = {
        PACKED: MicroBatchLimits(0, options.micro_tokens, row_tokens=options.cutoff_len),
        PADDED: MicroBatchLimits(0, options.micro_tokens),
        FIXED: MicroBatchLimits(FIXED_ROWS),
    }
    ways: dict[str, Callable[[int], float]] = {}
    padded: dict[str, float] = {}
    for name, limit in limits.items():
        run = build_run(config, hardware, base_model(config.model, hardware), samples)
        run.limits = limit
        if limit.row_tokens:
            keep_texts_apart(run.plain_model, hardware.device)

        def step(number: int, *, run: Any = run) -> float:
            run.state.step = number
            return take_step(run).loss

        ways[name] = step
        chosen = [step_samples(n, len(samples), options.total_batch, options.seed).indices for n in range(20)]
        cut = [micro for indices in chosen for micro in micro_batches(indices, samples.lengths, **limit.cut)]
        real = sum(int(samples.lengths[indices].sum()) for indices in chosen)
        padded[name] = sum(padded_tokens(micro, samples.lengths, limit.row_tokens) for micro in cut) / real
    return ways, padded


def measure(
    ways: dict[str, Callable[[int], float]], others: dict[str, Any], samples: Any, options: PackingOptions
) -> tuple[dict[str, list[float]], float]:
    """Tokens per CPU second of each way by round, and how far the losses of a step lie apart.

    Raises ModelError where they do not compute the same.
    """
    from onecard.data.batches import step_samples

    speeds: dict[str, list[float]] = {name: [] for name in (*ways, *others)}
    furthest = 0.0
    for turn in range(options.rounds + 1):  # the first one warms up
        numbers = range(turn * options.steps, (turn + 1) * options.steps)
        chosen = [step_samples(n, len(samples), options.total_batch, options.seed).indices for n in numbers]
        n_tokens = sum(int(samples.lengths[indices].sum()) for indices in chosen)
        losses = {}
        for name in [*ways][:: 1 if turn % 2 else -1]:
            begun = time.process_time()
            losses[name] = [ways[name](number) for number in numbers]
            if turn:
                speeds[name].append(n_tokens / (time.process_time() - begun))
        for name in [*others][:: 1 if turn % 2 else -1]:
            speed = others[name].speed()
            speeds[name] += [speed] if turn else []
        if others and not turn:  # the same rows in the same order
            check_same_losses(others[TRL_PADDED].clock.losses, losses[PADDED])
        apart = [abs(a - b) for found in losses.values() for a, b in zip(found, losses[PADDED], strict=True)]
        furthest = max(furthest, *apart)
        if not furthest <= TOLERANCE:
            raise ModelError(f"the losses of the same steps lie {furthest:.1e} apart, so speeds mean nothing")
    return speeds, furthest


def check_same_losses(others: Sequence[float], ours: Sequence[float]) -> None:
    """Raise ModelError where another trainer's first steps, as it logs them, are not those of this project."""
    apart = max(abs(one - other) for one, other in zip(others, ours, strict=False))
    if not apart <= LOGGED:
        raise ModelError(f"the losses of TRL's first steps lie {apart:.1e} from ours: it is not the same job")


if __name__ == "__main__":
    sys.exit(run_main(main))
