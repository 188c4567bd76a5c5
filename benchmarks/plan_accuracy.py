#!/usr/bin/env python
"""How right the memory plan is: planned against measured peaks over models x bits x length x batch x rank.

    python benchmarks/plan_accuracy.py [--split held_out]

Each row is one real optimizer step of a model with random weights, and one evaluation at the same limits. On a card the
measurement is torch's own: `max_memory_allocated` for tensors, `max_memory_reserved` beside it. On a CPU it is every
allocation of torch, by its profiler, at toy sizes. No constant of the plan was fitted to the held-out rows.
Writes benchmarks/results/plan_accuracy.json: every row, mean and worst errors, the machine and the versions; on a card
also what the plan assumes beside the tensors, as measured: the context, and the allocator's slack.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import ModelError  # noqa: E402

TOY = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "vocab_size": 1500, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# family or model, rows, length, and the rest of a setup by name. "fit": looked at while the plan was written.
TOY_ROWS: dict[str, list[tuple[str, int, int, dict[str, Any]]]] = {
    "fit": [
        ("llama", 2, 256, {"bits": 32, "loss_chunk": 128}),
        ("llama", 2, 256, {"bits": 8, "loss_chunk": 128}),
        ("qwen2", 4, 128, {"bits": 4, "rank": 64, "loss_chunk": 32}),
        ("gemma2", 2, 256, {"bits": 16, "loss_chunk": 128}),
        ("phi3", 2, 256, {"bits": 32, "loss_chunk": 128, "mlp_tile": 64}),
    ],
    "held_out": [  # drawn after the last change of the arithmetic
        ("llama", 2, 272, {"bits": 4, "rank": 28, "loss_chunk": 72}),
        ("llama", 5, 112, {"bits": 8, "rank": 14, "loss_chunk": 160}),
        ("llama", 1, 576, {"bits": 16, "rank": 20, "loss_chunk": 88, "head_bits": 4}),
        ("qwen2", 3, 208, {"bits": 8, "rank": 36, "loss_chunk": 0, "optimizer": "adamw_8bit"}),
        ("qwen3", 2, 344, {"bits": 32, "rank": 28, "loss_chunk": 120, "head_bits": 8}),
        ("mistral", 3, 900, {"bits": 4, "rank": 12, "loss_chunk": 300, "offload_activations": True}),
        ("gemma", 4, 136, {"bits": 16, "rank": 24, "loss_chunk": 64, "mlp_tile": 128}),
        ("gemma2", 2, 184, {"bits": 4, "rank": 40, "loss_chunk": 56}),
        ("granite", 3, 152, {"bits": 16, "rank": 28, "loss_chunk": 140}),
        ("cohere", 1, 416, {"bits": 32, "rank": 20, "loss_chunk": 60}),
        ("phi3", 2, 240, {"bits": 4, "rank": 36, "loss_chunk": 110}),
    ],
}
CARD_ROWS: dict[str, list[tuple[str, int, int, dict[str, Any]]]] = {
    "fit": [
        ("llama-3.1-8b", 2, 2048, {"bits": 4, "rank": 32}),
        ("qwen2.5-0.5b", 4, 512, {"bits": 8, "rank": 16}),
        ("qwen2.5-1.5b", 1, 4096, {"bits": 4, "rank": 16}),
        ("llama-3.1-8b", 1, 1024, {"bits": 4, "rank": 32, "offload_embeddings": True}),
    ],
    "held_out": [
        ("llama-3.1-8b", 1, 8192, {"bits": 4, "rank": 16, "offload_activations": True}),
        ("llama-3.1-8b", 4, 512, {"bits": 8, "rank": 16}),
        ("llama-3.2-1b", 4, 1024, {"bits": 16, "rank": 64}),
        ("llama-3.2-3b", 2, 3072, {"bits": 8, "rank": 32, "optimizer": "adamw_8bit"}),
        ("qwen2.5-7b", 1, 4096, {"bits": 4, "rank": 8, "loss_chunk": 256, "head_bits": 4}),
        ("qwen2.5-1.5b", 8, 512, {"bits": 4, "rank": 8, "loss_chunk": 0}),
        ("gemma-2-2b", 2, 1024, {"bits": 4, "rank": 16}),
        ("mistral-7b-v0.3", 1, 6144, {"bits": 4, "rank": 24, "mlp_tile": 2048}),
    ],
}


@dataclass
class BenchmarkOptions:
    """What is measured."""

    split: str = "all"
    """fit, held_out or all: the rows that are measured."""
    models: Literal["auto", "toy", "real"] = "auto"
    """real: known models; toy: what a CPU trains in a second; auto: real ones on a card."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    pretend_turing: bool = False
    """fp16 and no FlashAttention, whatever the card."""
    seconds: float = 0.0
    """No further row is begun after so many, and the smallest steps come first; 0: all rows, in their order."""
    output: str = str(RESULTS / "plan_accuracy.json")
    """Where the result is written, anew after each row."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(BenchmarkOptions, argv, description=__doc__ or "")

    from onecard.model.hardware import detect
    from onecard.model.nvidia_driver import nvidia_smi
    from onecard.model.out_of_memory import give_back_memory

    used = nvidia_smi("--query-gpu=memory.used")  # before this process has a context
    hardware = detect(options.device, pretend_turing=options.pretend_turing)
    table = CARD_ROWS if options.models == "real" or (hardware.is_gpu and options.models == "auto") else TOY_ROWS
    chosen = [(split, *row) for split in table if options.split in (split, "all") for row in table[split]]
    if options.seconds and table is CARD_ROWS:
        chosen.sort(key=size_of_step)
    results: list[dict[str, Any]] = []
    here, last = machine(str(hardware.device)), time.monotonic() + options.seconds
    for split, name, rows, length, rest in chosen:
        if options.seconds and results and time.monotonic() > last:
            say(f"{len(chosen) - len(results)} rows not run: the time is used up")
            break
        config = toy_config(name) if table is TOY_ROWS else known_config(name)
        results.append({"split": split, **attempt(name, config, rows, length, rest, hardware)})
        give_back_memory()
        constants = constants_of(results, hardware, used_bytes(used, hardware.device.index or 0))
        measured = [row for row in results if "ratio" in row]
        summary = {split: summarise([row for row in measured if row["split"] == split]) for split in table}
        write_result(options.output, {"summary": summary, "constants": constants, "asked": len(chosen),
                                      "rows": results, "machine": here})  # fmt: skip
    tell(measured, summary)
    failed = [f"{row['model']}: {row['failed']}" for row in results if "failed" in row]
    if failed:
        raise ModelError(f"{len(failed)} of {len(results)} rows could not be measured: " + "; ".join(failed))


def size_of_step(row: tuple[Any, ...]) -> int:
    """Weights x tokens of a step with a known model: what its time goes with."""
    from onecard.model.memory.architecture import find_known

    _, name, rows, length, _ = row
    known = find_known(name)
    return known.n_parameters * rows * length if known else 0


def known_config(name: str) -> dict[str, Any]:
    from benchmarks.random_models import config_of

    return config_of(name)


def attempt(
    name: str, config: dict[str, Any], rows: int, length: int, rest: dict[str, Any], hardware: Any
) -> dict[str, Any]:
    """The row; on a card, where it does not fit or fails, what there is to say instead: others are still measured."""
    from onecard.model.allocator import has_expandable_segments
    from onecard.model.hardware import choose_dtype
    from onecard.model.memory.architecture import architecture_of
    from onecard.model.memory.estimate import MemoryConfig, account
    from onecard.model.nvidia_driver import line_of
    from onecard.train.auto_config import card_of

    dtype, _ = choose_dtype("auto", rest["bits"], hardware, config["model_type"])
    setup = MemoryConfig(**{"element_bytes": dtype.itemsize, "rows": rows, "length": length, "on_gpu": hardware.is_gpu,
                            "repeats_kv": not hardware.has_flash_attention_in(dtype.itemsize),
                            "expandable_segments": has_expandable_segments(), **rest})  # fmt: skip
    planned = account(architecture_of(config, name=name), setup)
    if not hardware.is_gpu:
        return measure(name, config, setup, planned, hardware)
    card, row = card_of(hardware), {"model": name, "setup": asdict(setup), "planned_card_bytes": planned.card_bytes}
    if planned.card_bytes > card.total_bytes or planned.ram_bytes > card.ram_bytes:
        say(f"{name}, {setup.bits} bits, {rows} x {length}: not run; it is planned to take more than is free here")
        return row | {"not_run": "planned to take more than is free"}
    try:
        return measure(name, config, setup, planned, hardware)
    except Exception as reason:
        say(f"{name}, {setup.bits} bits, {rows} x {length}: {line_of(reason)}")
        return row | {"failed": line_of(reason)}


def measure(name: str, config: dict[str, Any], setup: Any, planned: Any, hardware: Any) -> dict[str, Any]:
    """One step and one evaluation of one row, beside their plan; sizes in bytes."""
    from benchmarks.synthetic_run import planned_peak

    found = peaks(config, setup, hardware)
    training = found["training_bytes"]
    row = {"model": name, "setup": asdict(setup), "planned_bytes": planned.tensor_bytes, **found,
           "ratio": round(planned.tensor_bytes / training, 4),
           "evaluation_ratio": round(planned.tensor_bytes / found["evaluation_bytes"], 4)}  # fmt: skip
    if "reserved_bytes" in found:
        moving = sum(part.n_bytes for part in planned.parts if part.transient and part.place == "card")
        planned_reserved = planned_peak(planned).reserved_bytes  # the context is not among what torch reserves
        assert planned_reserved is not None, "only a plan for a CPU has none"
        row |= {"planned_card_bytes": planned.card_bytes, "moving_bytes": moving,
                "reserved_ratio": round(planned_reserved / found["reserved_bytes"], 4)}  # fmt: skip
    of_what = f"{name}, {setup.bits} bits, {setup.rows} x {setup.length}, rank {setup.rank}"
    say(f"{of_what}: planned / measured {row['ratio']:.4f}")
    return row


def toy_config(family: str, **changes: Any) -> dict[str, Any]:
    """A family's config at a size that a CPU trains in a second; multiples of 64, as 4-bit blocks want."""
    config = {"model_type": family, **TOY}
    if family in ("qwen3", "gemma", "gemma2", "gemma3_text", "glm4"):
        config["head_dim"] = 32
    if family == "granite":
        config |= {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}
    return config | changes


def element_bytes(bits: int, hardware: Any) -> int:
    """Bytes of one number of the arithmetic, as `hardware.choose_dtype` would have it."""
    return 2 if bits == 16 or (hardware.is_gpu and bits < 32) else 4


def peaks(config: dict[str, Any], setup: Any, hardware: Any) -> dict[str, int]:
    """The most bytes of tensors in one training step and in one evaluation of as many rows, at the same limits."""
    from benchmarks.synthetic_run import real_run
    from onecard.train.evaluate import Evaluator
    from onecard.train.step import take_step

    run = real_run(config, setup, hardware)
    take_step(run)  # the first makes what stays: quantisation's own tensors, the check of the loss

    def evaluate() -> None:
        samples = list(run.train_samples)[: setup.rows]
        Evaluator(run.model, run.accelerator, run.limits).sums(run.objective, samples)

    if hardware.is_gpu:
        training, reserved = _peak_on_card(lambda: take_step(run))
        evaluation, _ = _peak_on_card(evaluate)
        return {"training_bytes": training, "evaluation_bytes": evaluation, "reserved_bytes": reserved}
    from tests.live_memory import held_bytes, peak_bytes

    held = held_bytes(run.plain_model, run.optimizer)
    training = held + peak_bytes(lambda: take_step(run))
    return {"training_bytes": training, "evaluation_bytes": held + peak_bytes(evaluate)}


def _peak_on_card(work: Callable[[], object]) -> tuple[int, int]:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def used_bytes(rows: list[list[str]], index: int) -> int:
    """Of the card of this number, in what nvidia-smi says in MiB; 0 where it does not tell."""
    words = rows[index] if index < len(rows) else ["0"]
    return int(words[0]) << 20 if words[0].isdigit() else 0


def constants_of(rows: list[dict[str, Any]], hardware: Any, used_before: int) -> dict[str, float] | None:
    """What the plan assumes beside the tensors, as found on this card; None without one.

    The context: all that is used on the card but what the allocator holds and `used_before` this process had one. The
    slack: what the allocator held beyond the tensors, as a share of what comes and goes in a step.
    """
    import torch

    if not hardware.is_gpu:
        return None
    torch.cuda.synchronize(hardware.device)
    free, total = torch.cuda.mem_get_info(hardware.device)
    context = total - free - torch.cuda.memory_reserved(hardware.device) - used_before
    found: dict[str, float] = {"context_bytes": context}
    shares = [(row["reserved_bytes"] - row["training_bytes"]) / row["moving_bytes"] for row in rows if "ratio" in row]
    if shares:
        found |= {"slack_share_mean": round(sum(shares) / len(shares), 4), "slack_share_largest": round(max(shares), 4)}
    return found


def summarise(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """Errors in percent of what was measured: mean of their sizes, the worst over and the worst under."""
    errors = [100 * (row["ratio"] - 1) for row in rows]
    if not errors:
        return None
    return {
        "n": len(errors),
        "mean": round(sum(abs(error) for error in errors) / len(errors), 2),
        "worst_over": round(max([0.0, *errors]), 2),
        "worst_under": round(max([0.0, *(-error for error in errors)]), 2),
    }


def tell(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Print what was found."""
    mib = 2**20
    say_table(
        ["split", "model", "bits", "rows x length", "rank", "planned MiB", "measured", "ratio", "evaluation"],
        [
            (row["split"], row["model"], row["setup"]["bits"], f"{row['setup']['rows']} x {row['setup']['length']}",
             row["setup"]["rank"], f"{row['planned_bytes'] / mib:.1f}", f"{row['training_bytes'] / mib:.1f}",
             row["ratio"], f"{row['evaluation_bytes'] / mib:.1f}")
            for row in rows
        ],
    )  # fmt: skip
    for split, found in summary.items():
        if found:
            say(f"{split}: {found['n']} rows, mean error {found['mean']} %, worst over {found['worst_over']} %, "
                f"worst under {found['worst_under']} %")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
