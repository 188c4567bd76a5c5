#!/usr/bin/env python
"""What each technique saves: peak memory of a real training step, one technique more in each row.

    python benchmarks/memory_ladder.py --model_path Llama-3.1-8B --length 4096 --lora_r 32 --pretend_turing
    python benchmarks/memory_ladder.py --dtype bf16 --length 1280               (on a CPU: a toy of the same shape)

The first row is plain Hugging Face with PEFT's k-bit preparation. A step is two micro-batches, so that the second meets
the gradients of the first. Rows differ in length by a token or two, so that plain Hugging Face needs its mask. Measured
on a card: what torch's allocator says; on a CPU: what torch's profiler sees, less what a card would have sent to RAM.
Writes benchmarks/results/memory_ladder.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

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

TOY = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4,
       "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 8016, "max_position_embeddings": 131072,
       "tie_word_embeddings": False}  # fmt: skip
UPCAST = {"plain, upcast": True, "plain": False}  # the rows of plain Hugging Face
COLUMNS = ("measured", "difference", "planned", "reserved", "ram", "planned_ram")


@dataclass
class LadderOptions:
    """What is measured."""

    model_path: str = "toy"
    """A known model's name (random weights), a directory, or toy: Llama-3.1-8B at a sixteenth of its width."""
    length: int = 640
    """Tokens of the longest row."""
    rows: int = 2
    """Rows of a micro-batch."""
    lora_r: int = 32
    """Rank of the adapter on all linear layers."""
    bits: int = 4
    """Bits per base weight."""
    head_bits: int = 8
    """Bits of the head in the row that quantises it: 4 or 8."""
    loss_chunk: int = 128
    """Supervised tokens whose logits exist at once, in the row that chunks the loss."""
    mlp_tile: int = 256
    """Tokens in an MLP at once, in the row that tiles it."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Number format of the arithmetic; auto: by the card, and fp16 with --pretend_turing."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    pretend_turing: bool = False
    """fp16 and no FlashAttention, whatever the card."""
    seconds: float = 0.0
    """No further row is begun after so many; 0: all rows."""
    output: str = str(ROOT / "benchmarks" / "results" / "memory_ladder.json")
    """Where the result is written, anew after each row."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(LadderOptions, argv, description=__doc__ or "")

    from benchmarks.machine import machine, say_table, write_result
    from onecard.model.hardware import detect

    hardware = detect(options.device, pretend_turing=options.pretend_turing)
    given = asdict(options) | {name: Path(getattr(options, name)).name for name in ("output", "model_path")}
    here = machine(str(hardware.device))
    rows: list[dict[str, Any]] = []
    for row in ladder(options, hardware):
        rows.append(row)
        write_result(options.output, {"options": given, "unit": "bytes", "rows": rows, "machine": here})
    say_table(
        ["MiB", "peak of tensors", "difference", "planned", "reserved", "in RAM", "planned in RAM"],
        [[row["technique"], *(_mib(row[name]) for name in COLUMNS)] for row in rows],
    )


def ladder(options: LadderOptions, hardware: Any) -> Iterator[dict[str, Any]]:
    """Every row, measured one after the other, each on a model of its own; those that time was left for."""
    import torch

    from onecard.model.out_of_memory import give_back_memory

    # Paged optimizers lie in memory that torch's allocator does not see; the plain 8-bit one is of the same size.
    memory = MemoryOptions(
        loss_chunk=-1, offload_activations="off", offload_embeddings="off", head_bits="16", mlp_tile=-1
    )
    train = TrainOptions(total_batch=2 * options.rows, micro_batch=options.rows, optimizer="adamw", max_steps=100)
    bits: Any = options.bits
    model = ModelOptions(model_path=options.model_path, bits=bits, device=options.device, dtype=options.dtype,
                         gradient_checkpointing=True)  # fmt: skip
    lora = LoraOptions(lora_r=options.lora_r)
    config = FinetuneConfig(model, DataOptions(cutoff_len=options.length), lora, train, memory)
    before: dict[str, Any] | None = None
    last = time.monotonic() + options.seconds if options.seconds else float("inf")
    for name, group, changes in techniques(options):
        if before is not None and time.monotonic() > last:
            say(f"not run: {name}; the time is used up")
            continue
        if group in UPCAST:
            found = _attempt(plain_peak, config, hardware, options, UPCAST[group])
        else:
            config = replace(config, **{group: replace(getattr(config, group), **changes)})
            found = _attempt(our_peak, config, hardware, options)
        before = _row(name, before, found)
        yield before
        give_back_memory()
        if hardware.is_gpu:
            torch.cuda.empty_cache()


def techniques(options: LadderOptions) -> list[tuple[str, str, dict[str, Any]]]:
    """(what the row adds, the group of options or one of UPCAST, the options that change); all before it stay."""
    return [
        ("plain Hugging Face + PEFT, fp32 norms, embeddings and head", "plain, upcast", {}),
        ("no upcast", "plain", {}),
        ("no attention mask", "memory", {}),
        (f"chunked loss, {options.loss_chunk} tokens", "memory", {"loss_chunk": options.loss_chunk}),
        ("layer inputs in RAM", "memory", {"offload_activations": "on"}),
        ("8-bit optimizer", "train", {"optimizer": "adamw_8bit"}),
        ("embeddings in RAM", "memory", {"offload_embeddings": "on"}),
        (f"head in {options.head_bits} bits", "memory", {"head_bits": str(options.head_bits)}),
        (f"tiled MLP, {options.mlp_tile} tokens", "memory", {"mlp_tile": options.mlp_tile}),
    ]


def plain_peak(config: FinetuneConfig, hardware: Any, options: LadderOptions, upcast: bool) -> tuple[Any, None]:
    """The peak of the plain loop; there is no plan for it."""
    from benchmarks.plain import build_plain
    from benchmarks.synthetic_run import peak_of

    base, samples = _base_and_samples(replace(config.model, gradient_checkpointing=False), hardware, options)
    run = build_plain(config, hardware, base, samples, rows=options.rows, upcast=upcast)
    inner = run.optimizer.optimizer
    return peak_of(lambda: run.step(0), run.accelerator.device, run.model, inner), None


def our_peak(config: FinetuneConfig, hardware: Any, options: LadderOptions) -> tuple[Any, Any]:
    """The peak of our step under `config`, and the plan's."""
    from benchmarks.random_models import config_of
    from benchmarks.synthetic_run import build_run, plan_for, planned_peak, run_peak
    from onecard.model.memory.architecture import architecture_of
    from onecard.train.step import take_step

    raw = TOY if options.model_path == "toy" else config_of(options.model_path)
    plan = plan_for(config, architecture_of(raw), hardware, options.length)
    base, samples = _base_and_samples(config.model, hardware, options)
    run = build_run(config, hardware, base, samples)
    in_ram = config.memory.offload_embeddings == "on"
    return run_peak(run, lambda: take_step(run), embeddings_in_ram=in_ram), planned_peak(plan.account)


def _base_and_samples(model: ModelOptions, hardware: Any, options: LadderOptions) -> tuple[Any, Any]:
    from benchmarks.random_models import base_model, random_base
    from benchmarks.synthetic_run import random_samples

    toy = options.model_path == "toy"
    base = random_base(TOY, model, hardware) if toy else base_model(model, hardware)
    # No two alike: whichever rows meet in a micro-batch, plain Hugging Face has to pad and to mask.
    lengths = [options.length - number for number in range(2 * options.rows)]
    return base, random_samples(lengths, base.model.config.vocab_size)


def _attempt(measure: Any, *arguments: Any) -> tuple[Any, Any]:
    """What `measure` gives; (None, None) where memory ran out."""
    from onecard.errors import ModelError
    from onecard.model.out_of_memory import is_out_of_memory

    try:
        return measure(*arguments)
    except (RuntimeError, MemoryError, ModelError) as reason:
        if not is_out_of_memory(reason) and "out of memory" not in str(reason):
            raise
        say(f"out of memory: {str(reason).splitlines()[0]}")
    return None, None


def _row(name: str, before: dict[str, Any] | None, found: tuple[Any, Any]) -> dict[str, Any]:
    peak, planned = found
    measured = peak.tensor_bytes if peak else None
    last = before["measured"] if before else None
    difference = measured - last if measured is not None and last is not None else None
    return {"technique": ("+ " if before else "") + name, "measured": measured, "difference": difference,
            "planned": planned.tensor_bytes if planned else None, "reserved": peak.reserved_bytes if peak else None,
            "ram": peak.ram_bytes if peak else None, "planned_ram": planned.ram_bytes if planned else None,
            "out_of_memory": peak is None}  # fmt: skip


def _mib(n_bytes: int | None) -> str | None:
    return None if n_bytes is None else f"{n_bytes / 2**20:,.1f}"


if __name__ == "__main__":
    sys.exit(run_main(main))
