#!/usr/bin/env python
"""How fast TRL's SFTTrainer takes the steps of step_speed.py: same samples, model, adapters, optimizer and rows.

    python benchmarks/trl_speed.py --model_path Llama-3.2-3B --bits 4 --lora_r 32

In a process of its own: a trainer patches and keeps what others would meet. Needs `pip install trl`, which no file of
requirements has. The samples come ready, with their labels, so that nobody's tokenizing is measured; each is padded to
the longest of its micro-batch. The first step is not counted. Writes benchmarks/results/trl_speed.json.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, now, write_result  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.lora import LoraOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import ModelError  # noqa: E402


@dataclass
class TrlOptions:
    """What is measured."""

    model_path: str = DEFAULT_BASE
    """A directory, or a known model's name (random weights)."""
    data_path: str = str(ROOT / "sample" / "merge_sample.json")
    """Instruction data, as step_speed.py takes it."""
    bits: int = 4
    """Bits per base weight."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Number format of the arithmetic."""
    lora_r: int = 16
    """Rank of the adapter on all linear layers."""
    total_batch: int = 32
    """Samples of an optimizer step."""
    rows: int = 8
    """Rows of a micro-batch."""
    steps: int = 6
    """Steps, of which the first is not counted."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    pretend_turing: bool = False
    """fp16, whatever the card."""
    output: str = str(RESULTS / "trl_speed.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(TrlOptions, argv, description=__doc__ or "")
    if importlib.util.find_spec("trl") is None:
        raise ModelError("trl is not installed; pip install trl")

    from onecard.model.hardware import detect

    hardware = detect(options.device, pretend_turing=options.pretend_turing)
    with tempfile.TemporaryDirectory(prefix="trl-speed-") as folder:
        trainer, clock, samples = build(options, hardware, folder)
        trainer.train()
    n_tokens = sum(int(samples.lengths[row]) for row in clock.rows)
    seconds = clock.ended - clock.begun
    say(f"TRL: {n_tokens / seconds:,.0f} tokens/s over {options.steps - 1} steps")
    paths = {name: Path(getattr(options, name)).name for name in ("output", "model_path", "data_path")}
    write_result(options.output, {
        "options": asdict(options) | paths, "trl": version("trl"), "tokens": n_tokens, "seconds": round(seconds, 3),
        "tokens_per_s": round(n_tokens / seconds, 1), "losses": clock.losses,
        "machine": machine(str(hardware.device)),
    })  # fmt: skip


def build(options: TrlOptions, hardware: Any, folder: str) -> tuple[Any, Any, Any]:
    """The trainer over a base with adapters, its clock, and the samples."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from benchmarks.plain import upcast_like_peft
    from benchmarks.random_models import base_model
    from benchmarks.synthetic_run import samples_of
    from onecard.model.load import load_tokenizer
    from onecard.model.lora.adapter import add_lora

    bits: Any = options.bits
    samples = samples_of(options.data_path, Path(DEFAULT_BASE), 1024)
    model = ModelOptions(options.model_path, bits, options.dtype, options.device, gradient_checkpointing=False)
    base = base_model(model, hardware)
    upcast_like_peft(base.model)
    adapted = add_lora(base.model, LoraOptions(lora_r=options.lora_r))
    base.model.enable_input_require_grads()

    class Clock(TrainerCallback):
        """When the second step begins and the last one ends, and which samples lie between."""

        begun = ended = 0.0
        rows: tuple[int, ...] = ()

        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_step_end(self, *given: Any, **more: Any) -> None:
            self.ended = now(hardware.device)
            self.begun = self.begun or self.ended

        def on_log(self, *given: Any, **more: Any) -> None:
            logs: dict[str, float] = more["logs"]
            self.losses += [logs["loss"]] if "loss" in logs else []

    # Steps take the samples as they come: those of the second step and later are the ones whose tokens count.
    clock, each = Clock(), options.total_batch
    clock.rows = tuple(row % len(samples) for row in range(each, each * options.steps))
    chosen = [samples[row % len(samples)] for row in range(each * options.steps)]
    data = Dataset.from_list([{"input_ids": one.input_ids, "labels": one.labels} for one in chosen])
    half = str(base.dtype).removeprefix("torch.")
    settings = SFTConfig(
        output_dir=folder, per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=options.total_batch // options.rows, max_steps=options.steps, logging_steps=1,
        learning_rate=2e-4, lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
        fp16=half == "float16", bf16=half == "bfloat16", gradient_checkpointing=True, max_length=None,
        use_cpu=not hardware.is_gpu, train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(model=adapted, args=settings, train_dataset=data, callbacks=[clock],
                         processing_class=load_tokenizer(DEFAULT_BASE))  # fmt: skip
    return trainer, clock, samples


if __name__ == "__main__":
    sys.exit(run_main(main))
