#!/usr/bin/env python
"""How fast a training step is, beside plain Hugging Face QLoRA: same data, weights, adapters, optimizer, machine, hour.

    python benchmarks/step_speed.py --model_path Llama-3.1-8B --bits 4 --pretend_turing --lora_r 32 --rounds 7
    python benchmarks/step_speed.py                                                   (on a CPU: sample/tiny-llama)

In each round every contestant takes the same steps, in turns; what counts is the ratio within a round. Before that,
both train the same first steps and must find the same loss at each, else nothing is compared. Tokens are those of the
samples; padding is reported, not counted. `--kernels liger` adds our step with liger-kernel's kernels. TRL and
LLaMA-Factory train through the Trainer, for which the plain loop stands (`trl_speed.py` measures TRL itself); Unsloth
rewrites transformers when it is imported, so it cannot take turns with others in one process and has no row.
Writes benchmarks/results/step_speed.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.data import DataOptions  # noqa: E402
from onecard.config.lora import LoraOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.config.run import TrainOptions  # noqa: E402
from onecard.config.training import FinetuneConfig, MemoryOptions  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import ModelError  # noqa: E402

OURS, PLAIN, LIGER = "onecard", "plain Hugging Face + PEFT", "onecard, liger kernels"
# How far the losses of the same step may lie apart: in 16 bits plain Hugging Face computes its norms' weights and its
# head in other formats.
TOLERANCE = {4: 1e-4, 2: 2e-2}


@dataclass
class SpeedOptions:
    """What is compared."""

    model_path: str = DEFAULT_BASE
    """A directory, or a known model's name (random weights)."""
    data_path: str = str(ROOT / "sample" / "merge_sample.json")
    """Instruction data; lengths are those that the tokenizer of sample/tiny-llama makes of it."""
    bits: int = 4
    """Bits per base weight."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Number format of the arithmetic."""
    lora_r: int = 16
    """Rank of the adapter on all linear layers."""
    total_batch: int = 32
    """Samples of an optimizer step."""
    plain_rows: int = 8
    """Rows of plain Hugging Face's micro-batches; 8 is the Trainer's own default."""
    micro_tokens: int = 0
    """Our token budget; 0: chosen by the plan."""
    steps: int = 2
    """Steps of each contestant in a round."""
    rounds: int = 5
    """Rounds; medians are reported. One more goes before them, whose losses are compared."""
    seconds: float = 0.0
    """No further round is begun after so many; 0: all rounds."""
    kernels: Literal["torch", "liger"] = "torch"
    """liger: one more contestant, where liger-kernel and the card allow it."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    pretend_turing: bool = False
    """fp16 and no FlashAttention for us, whatever the card; plain Hugging Face keeps its own kernels."""
    output: str = str(ROOT / "benchmarks" / "results" / "step_speed.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(SpeedOptions, argv, description=__doc__ or "")

    from benchmarks.machine import machine, matrix_products_per_s, say_table, write_result
    from onecard.model.hardware import choose_dtype, detect

    hardware, begun = detect(options.device, pretend_turing=options.pretend_turing), time.monotonic()
    contestants, facts = build(options, hardware)
    dtype, _ = choose_dtype(options.dtype, options.bits, hardware, facts["model_type"])
    facts |= {"loss_difference": check_same_loss(contestants, options.steps, TOLERANCE[dtype.itemsize])}
    last = begun + options.seconds if options.seconds else float("inf")
    speeds = compare(contestants, facts["tokens"], options, hardware.device, last)
    ceiling = matrix_products_per_s(hardware.device, dtype)
    rows = [summary(name, speeds, facts, ceiling) for name in contestants]
    say_table(["", "tokens/s", "ratio to plain", "tokens with padding", "share of the ceiling"],
              [[row[name] for name in SUMMARY] for row in rows])  # fmt: skip
    say(f"largest difference of a step's loss: {facts['loss_difference']:.1e}")
    say(f"ceiling of matrix products: {ceiling / 1e12:.3f} TFLOP/s in {dtype}")
    given = asdict(options) | {
        name: Path(getattr(options, name)).name for name in ("output", "model_path", "data_path")
    }
    write_result(options.output, {"options": given, "rows": rows, "facts": facts, "dtype": str(dtype),
                                  "matrix_product_flops_per_s": ceiling, "speeds": speeds,
                                  "machine": machine(str(hardware.device))})  # fmt: skip


SUMMARY = ("name", "tokens_per_s", "ratio", "padding", "share")
Contestant = Callable[[int], float]  # takes step n, gives its loss


def build(options: SpeedOptions, hardware: Any) -> tuple[dict[str, Contestant], dict[str, Any]]:
    """The contestants by name, and facts about the data and the model that all of them share."""
    from benchmarks.plain import build_plain
    from benchmarks.random_models import base_model, config_of
    from benchmarks.synthetic_run import build_run, plan_for, samples_of
    from onecard.model.memory.architecture import architecture_of
    from onecard.train.auto_config import resolve

    config = config_for(options)
    samples = samples_of(options.data_path, ROOT / "sample" / "tiny-llama", config.data.cutoff_len)
    architecture = architecture_of(config_of(options.model_path))
    longest = int(samples.lengths.max())
    filled, _ = resolve(config, hardware, plan_for(config, architecture, hardware, longest), longest)
    run = build_run(filled, hardware, base_model(config.model, hardware), samples)
    unchecked = replace(config.model, gradient_checkpointing=False)
    # fp32 master copies, full optimizer: the plan's own savings are ours alone, except the optimizer.
    plain = build_plain(filled, hardware, base_model(unchecked, hardware), samples, rows=options.plain_rows)
    contestants: dict[str, Contestant] = {PLAIN: plain.step, OURS: stepper(run)}
    if options.kernels == "liger":
        liger = replace(filled, memory=replace(filled.memory, kernels="liger"))
        contestants[LIGER] = stepper(build_run(liger, hardware, base_model(config.model, hardware), samples))
    steps = range(options.steps, options.steps * (options.rounds + 1))
    chosen = [plain.chosen(step) for step in steps]
    cuts = {PLAIN: [m for c in chosen for m in plain.micros(c)], OURS: [m for c in chosen for m in cut(run, c)]}
    facts = {
        "model_type": architecture.model_type, "n_linear": architecture.n_linear, "samples": len(samples),
        "tokens": [int(samples.lengths[c].sum()) for c in chosen],
        "median_length": float(statistics.median(samples.lengths)), "longest": longest,
        "micro_tokens": filled.train.micro_tokens,
        "padded": {name: sum(len(m) * int(samples.lengths[m].max()) for m in micros) for name, micros in cuts.items()},
        "micro_batches": {name: len(micros) for name, micros in cuts.items()},
    }  # fmt: skip
    return contestants, facts


def config_for(options: SpeedOptions) -> FinetuneConfig:
    bits: Any = options.bits
    return FinetuneConfig(
        ModelOptions(options.model_path, bits, options.dtype, options.device, gradient_checkpointing=True),
        DataOptions(data_path=options.data_path),
        LoraOptions(lora_r=options.lora_r),
        TrainOptions(
            total_batch=options.total_batch, micro_tokens=options.micro_tokens, schedule="constant", warmup_ratio=0.0,
            max_steps=options.steps * (options.rounds + 1), optimizer="adamw",
        ),
        MemoryOptions(pretend_turing=options.pretend_turing),
    )  # fmt: skip


def stepper(run: Any) -> Contestant:
    """Our step as a contestant."""
    from onecard.train.step import take_step

    def step(number: int) -> float:
        run.state.step = number
        return take_step(run).loss

    return step


def cut(run: Any, indices: Any) -> list[Any]:
    """A step's samples as our run cuts them."""
    from onecard.data.batches import micro_batches

    return micro_batches(indices, run.train_samples.lengths, **run.limits.cut)


def check_same_loss(contestants: dict[str, Contestant], steps: int, tolerance: float) -> float:
    """Let everyone take the first steps; the largest difference of a step's loss.

    Raises ModelError where it is above `tolerance`: then they do not compute the same, and no speed may be compared.
    """
    losses = {name: [step(number) for number in range(steps)] for name, step in contestants.items()}
    expected = losses[PLAIN]
    apart = [abs(one - other) for found in losses.values() for one, other in zip(found, expected, strict=True)]
    if not all(each <= tolerance for each in apart):  # NaN is not
        listed = "; ".join(f"{name}: {', '.join(f'{loss:.6f}' for loss in found)}" for name, found in losses.items())
        raise ModelError(
            f"the losses of the same steps lie up to {max(apart):.2e} apart, so speeds mean nothing: {listed}"
        )
    return max(apart)


def compare(
    contestants: dict[str, Contestant], tokens: list[int], options: SpeedOptions, device: Any, last: float
) -> dict[str, list[float]]:
    """Tokens per second of everyone, round by round, on the same steps; who goes first changes each time.

    After `last` (time.monotonic) no further round is begun; the first always is.
    """
    from benchmarks.machine import now

    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds):
        if turn and time.monotonic() > last:
            break
        first = options.steps * turn
        order = list(contestants) if turn % 2 else list(contestants)[::-1]
        for name in order:
            begun = now(device)
            for number in range(first, first + options.steps):
                contestants[name](options.steps + number)
            speeds[name].append(sum(tokens[first : first + options.steps]) / (now(device) - begun))
    return speeds


def summary(name: str, speeds: dict[str, list[float]], facts: dict[str, Any], ceiling: float) -> dict[str, Any]:
    """One row: medians, the ratio within rounds, padding, and the share of the ceiling.

    FLOPs per token: 6 N, N the weights of the linear layers. 2 N forward (arXiv:2001.08361, section 2.1), 2 N when
    checkpointing computes the layer again, 2 N for the gradients of its inputs; a frozen base has no gradients of
    weights. Attention, adapters, head and padding are left out: the share is of useful work.
    """
    speed = statistics.median(speeds[name])
    ratios = [one / other for one, other in zip(speeds[name], speeds[PLAIN], strict=True)]
    padded = facts["padded"].get(name, facts["padded"][OURS])
    return {
        "name": name, "tokens_per_s": round(speed, 1), "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios], "padding": round(padded / sum(facts["tokens"]), 3),
        "share": round(6 * facts["n_linear"] * speed / ceiling, 4),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
