#!/usr/bin/env python
"""The longest context per gigabyte: one row of as many tokens as a real training step takes on a card of that size.

    python benchmarks/context_per_vram.py                          (a card: Llama-3.1-8B, rank 32, fp16, as on Turing)
    python benchmarks/context_per_vram.py --vram 11 --tries 6

The process is capped (`torch.cuda.set_per_process_memory_fraction`); the CUDA context is taken off the cap as the plan
assumes it. The plan's longest context is tried first, then a little more or less. A length counts when two steps,
forward, backward and optimizer, end without running out of memory once. Without a card the table is only planned, and
a toy is trained at its planned longest context, its peak beside the plan. Writes results/context_per_vram.json.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.base_model import ModelOptions  # noqa: E402
from onecard.config.data import DataOptions  # noqa: E402
from onecard.config.lora import LoraOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.config.run import TrainOptions  # noqa: E402
from onecard.config.training import FinetuneConfig, MemoryOptions  # noqa: E402
from onecard.console import run_main, say  # noqa: E402

# Published by Unsloth for Llama-3.1-8B, QLoRA, rank 32 on all linear layers, padded, one row; beside it plain Hugging
# Face with FlashAttention-2 (0: out of memory). https://unsloth.ai/blog/llama3-3
PUBLISHED = {8: (2_972, 0), 12: (21_848, 932), 16: (40_724, 2_551), 24: (78_475, 5_789)}
STRAIGHT_LINE = {11: 17_100}  # nobody publishes 11 GB; a straight line through Unsloth's figures
TOY = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4,
       "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 8016, "max_position_embeddings": 131072,
       "tie_word_embeddings": False}  # fmt: skip


@dataclass
class ContextOptions:
    """What is measured."""

    model_path: str = "Llama-3.1-8B"
    """A known model's name, or a config.json; its weights are random."""
    vram: str = "8,11,12,16,24"
    """Sizes of cards in GiB, with commas between them."""
    lora_r: int = 32
    """Rank of the adapter on all linear layers."""
    tries: int = 5
    """Lengths tried for each size."""
    minutes: float = 20.0
    """Time for each size; no further length is begun after it."""
    seconds: float = 0.0
    """Time for all sizes: a length that would take longer than what is left of it is not begun; 0: no limit."""
    quick: bool = False
    """One step of one row, whose gradients lie there before it, instead of two steps of two rows: the same peak in a
    quarter of the time."""
    toy_mib: int = 48
    """Without a card: the size, in MiB, for which the toy's longest context is planned and run once."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    output: str = str(ROOT / "benchmarks" / "results" / "context_per_vram.json")
    """Where the result is written, anew after each size."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(ContextOptions, argv, description=__doc__ or "")

    from benchmarks.machine import machine, say_table, write_result
    from onecard.model.hardware import detect

    hardware = detect(options.device, pretend_turing=True)
    clock, here = Clock(options, hardware), machine(str(hardware.device))
    given = asdict(options) | {name: Path(getattr(options, name)).name for name in ("output", "model_path")}
    rows: list[dict[str, Any]] = []
    for word in options.vram.split(","):
        rows.append(row_of(options, hardware, float(word), clock))
        write_result(options.output, {"options": given, "rows": rows, "toy": None, "machine": here})
    toy = None if hardware.is_gpu else toy_row(options, hardware)
    header = ["card, GiB", "planned tokens", "and RAM, GiB", "measured tokens", "peak reserved, GiB", "tokens/s",
              "Unsloth", "ratio of measured", "plain Hugging Face + FA2"]  # fmt: skip
    say_table(header, [[row[name] for name in ROW] for row in rows])
    if toy is not None:
        say("Planned only: there is no card here, so no length was measured and no ratio is given.")
        say_table(list(toy), [list(toy.values())])
    write_result(options.output, {"options": given, "rows": rows, "toy": toy, "machine": here})


ROW = ("gib", "planned", "planned_ram_gib", "measured", "reserved_gib", "tokens_per_s", "unsloth", "ratio", "plain")


class Clock:
    """What is left of `--seconds`, and how long a length will take, by the rate of those that ran."""

    def __init__(self, options: ContextOptions, hardware: Any) -> None:
        from benchmarks.machine import matrix_products_per_s
        from onecard.model.memory.architecture import architecture_of

        self.end = time.monotonic() + options.seconds if options.seconds else float("inf")
        self.model = architecture_of(options.model_path)
        self.n_rows = 1 if options.quick else 4
        self.flops_per_s = float("inf")
        if options.seconds and hardware.is_gpu:
            import torch

            # A third of what matrix products alone reach, until a length was measured.
            self.flops_per_s = matrix_products_per_s(hardware.device, torch.float16, 0.5) / 3

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def expected(self, length: int) -> float:
        """Seconds of all steps of one length, and of making the model."""
        return self.n_rows * flops_of(self.model, length) / self.flops_per_s + 10

    def saw(self, length: int, tokens_per_s: float) -> None:
        """Learn from a length that was measured."""
        self.flops_per_s = flops_of(self.model, length) * tokens_per_s / length


def flops_of(model: Any, length: int) -> float:
    """Of one row: 6 N a token, as step_speed.py counts, and the scores of attention, half of which are masked.

    Scores and their sums over values: 4 d a pair of tokens forward, again when recomputed, 2.5 times that backward.
    """
    width = model.n_heads * model.head_dim * model.n_layers
    return 6.0 * model.n_linear * length + 4.5 * 4 * width * length**2 / 2


def row_of(options: ContextOptions, hardware: Any, gib: float, clock: Clock) -> dict[str, Any]:
    """One size of card: planned, and where there is one, measured."""
    from onecard.model.memory.architecture import architecture_of
    from onecard.model.memory.estimate import GIB
    from onecard.model.memory.plan import CardSpec, longest_context

    config = config_for(options.model_path, options.lora_r, gib, quick=options.quick)
    card = CardSpec(f"{gib:g} GiB", int(gib * GIB), 1 << 40)
    planned = longest_context(architecture_of(options.model_path), config, card, element_bytes=2)
    tried: list[dict[str, Any]] = []
    first, why_not = first_length(config, hardware, planned, clock)
    if first:
        tried = search(config, hardware, first, options, clock)
    best = max((each for each in tried if each["passed"]), key=lambda each: each["tokens"], default=None)
    unsloth, plain = PUBLISHED.get(int(gib), (STRAIGHT_LINE.get(int(gib)), None)) if gib == int(gib) else (None, None)
    measured = best["tokens"] if best else None
    return {
        "gib": gib, "planned": planned, "planned_ram_gib": ram_gib(config, card, planned), "measured": measured,
        "reserved_gib": best["reserved_gib"] if best else None, "tokens_per_s": best["tokens_per_s"] if best else None,
        "unsloth": unsloth, "unsloth_is_a_straight_line": int(gib) in STRAIGHT_LINE,
        "ratio": round(measured / unsloth, 3) if measured and unsloth else None,
        "plain": "out of memory" if plain == 0 else plain, "tried": tried, "not_run": why_not,
    }  # fmt: skip


def first_length(config: FinetuneConfig, hardware: Any, planned: int, clock: Clock) -> tuple[int, str | None]:
    """The length to try first, 0 for none, and why there is none: no card, a smaller one, too little time.

    Where RAM has no room for what the planned length sends there, it is the longest with the RAM that is free.
    """
    from onecard.model.memory.estimate import GIB
    from onecard.model.memory.plan import CardSpec, longest_context
    from onecard.train.auto_config import card_of

    gib = config.memory.vram
    if not hardware.is_gpu:
        return 0, "there is no card here"
    # Cards have a few percent less than their name says.
    if gib * GIB * 0.95 > hardware.total_bytes:
        return 0, f"the card has {hardware.total_bytes / GIB:.1f} GiB"
    card = CardSpec(f"{gib:g} GiB", int(gib * GIB), card_of(hardware).ram_bytes)
    length = min(planned, longest_context(clock.model, config, card, element_bytes=2))
    if not length:
        return 0, f"no length fits {gib:g} GiB with {card.ram_bytes / GIB:.1f} GiB of RAM"
    if clock.expected(length) > clock.left:
        return 0, f"{max(0.0, clock.left):.0f} s left, {length:,} tokens take about {clock.expected(length):.0f}"
    return length, None


def ram_gib(config: FinetuneConfig, card: Any, length: int) -> float:
    """GiB of RAM that the plan for one row of `length` tokens asks for."""
    from onecard.model.memory.architecture import architecture_of
    from onecard.model.memory.estimate import GIB
    from onecard.model.memory.plan import make_plan

    config = replace(config, data=replace(config.data, cutoff_len=max(8, length)))
    plan = make_plan(architecture_of(config.model.model_path), config, card, element_bytes=2)
    return round(plan.account.ram_bytes / GIB, 2)


def config_for(model: str, rank: int, gib: float, *, quick: bool = False) -> FinetuneConfig:
    """One row at a time, fp16, everything else by the plan."""
    return FinetuneConfig(
        ModelOptions(model_path=model, bits=4, gradient_checkpointing=True),
        DataOptions(),
        LoraOptions(lora_r=rank),
        # Two rows in a step: the second meets the gradients of the first.
        TrainOptions(total_batch=1 if quick else 2, micro_batch=1, max_steps=100),
        MemoryOptions(vram=gib, pretend_turing=True, ignore_plan=True),
    )


def search(
    config: FinetuneConfig, hardware: Any, first: int, options: ContextOptions, clock: Clock
) -> list[dict[str, Any]]:
    """Try the first length, then lengths above the longest that passed and below the shortest that did not."""
    tried: list[dict[str, Any]] = []
    begun, length = time.monotonic(), first
    while len(tried) < options.tries and (not tried or time.monotonic() - begun < 60 * options.minutes):
        if tried and clock.expected(length) > clock.left:
            break
        tried.append(try_length(config, hardware, length))
        if tried[-1]["passed"]:
            clock.saw(length, tried[-1]["tokens_per_s"])
        say(f"{config.memory.vram:g} GiB, {length:,} tokens: {'passed' if tried[-1]['passed'] else 'out of memory'}")
        length = next_length(tried)
    return tried


def next_length(tried: list[dict[str, Any]]) -> int:
    """Half-way between what passed and what did not; 5 % further while only one of the two is known."""
    low = max((each["tokens"] for each in tried if each["passed"]), default=0)
    high = min((each["tokens"] for each in tried if not each["passed"]), default=0)
    if not high:
        return low + max(1, low // 20)
    return (low + high) // 2 if low else high - max(1, high // 20)


def try_length(config: FinetuneConfig, hardware: Any, length: int) -> dict[str, Any]:
    """Steps of rows of `length` tokens under the cap of `config.memory.vram`, on a base of its own."""
    import torch

    from benchmarks.random_models import base_model
    from benchmarks.synthetic_run import random_samples
    from onecard.errors import ModelError
    from onecard.model.memory.architecture import architecture_of
    from onecard.model.memory.estimate import GIB
    from onecard.model.out_of_memory import give_back_memory, is_out_of_memory
    from onecard.train.auto_config import cap_memory

    give_back_memory()
    cap_memory(hardware, config.memory.vram)
    torch.cuda.reset_peak_memory_stats()
    seconds = None
    try:
        model = architecture_of(config.model.model_path)
        base = base_model(config.model, hardware)
        rows = random_samples([length] * config.train.total_batch, model.vocab_size)
        seconds, _, _ = step_at(config, hardware, model, base, rows)
    except (RuntimeError, MemoryError, ModelError) as reason:
        if not is_out_of_memory(reason) and "out of memory" not in str(reason):
            raise
    peak = torch.cuda.max_memory_reserved() / GIB
    give_back_memory()
    speed = round(config.train.total_batch * length / seconds, 1) if seconds else None
    return {"tokens": length, "passed": seconds is not None, "reserved_gib": round(peak, 3), "tokens_per_s": speed}


def step_at(
    config: FinetuneConfig, hardware: Any, model: Any, base: Any, samples: Any
) -> tuple[float | None, Any, Any]:
    """Two steps under the plan for these samples: seconds of the second (None: memory ran out), the run, the plan.

    One step where it has one row: the gradients that a second row would meet are laid out before it.
    """
    import torch

    from benchmarks.synthetic_run import build_run, plan_for
    from onecard.train.auto_config import resolve
    from onecard.train.step import take_step

    length = int(samples.lengths.max())
    config = replace(config, data=replace(config.data, cutoff_len=length))
    first = plan_for(config, model, hardware, length)
    filled, plan = resolve(config, hardware, first, length)
    run = build_run(filled, hardware, base, samples)
    if config.train.total_batch == 1:
        for parameter in run.plain_model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    else:
        take_step(run)
    begun = time.perf_counter()
    take_step(run)
    # A step that was repeated in smaller pieces does not count here, although a real run would go on.
    return (None if run.events else time.perf_counter() - begun), run, plan


def toy_row(options: ContextOptions, hardware: Any) -> dict[str, Any]:
    """A toy's longest context for a card of a few MiB, run once; the profiler's peak beside the plan."""
    from benchmarks.random_models import random_base
    from benchmarks.synthetic_run import planned_peak, random_samples, run_peak
    from onecard.model.memory.architecture import architecture_of
    from onecard.model.memory.estimate import GIB, LIBRARY_BYTES
    from onecard.model.memory.plan import CardSpec, longest_context
    from onecard.train.step import take_step

    # Its size is that of tensors alone: the libraries of a process on a CPU stand beside it.
    n_bytes = (options.toy_mib << 20) + LIBRARY_BYTES
    config = config_for("toy", options.lora_r, n_bytes / GIB)
    config = replace(config, memory=replace(config.memory, pretend_turing=False))
    model = architecture_of(TOY)
    card = CardSpec("toy", n_bytes, 1 << 40, is_gpu=False, repeats_kv=False)
    length = longest_context(model, config, card, element_bytes=4)
    base, samples = random_base(TOY, config.model, hardware), random_samples([length] * 2, model.vocab_size)
    _, run, plan = step_at(config, hardware, model, base, samples)
    planned = planned_peak(plan.account)
    measured = run_peak(run, lambda: take_step(run), embeddings_in_ram=False)
    mib = {"planned MiB": planned.tensor_bytes / 2**20, "measured MiB": measured.tensor_bytes / 2**20}
    return {"toy card, MiB": options.toy_mib, "planned tokens": length,
            **{name: round(value, 2) for name, value in mib.items()},
            "measured / planned": round(measured.tensor_bytes / planned.tensor_bytes, 4)}  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
