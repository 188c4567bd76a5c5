#!/usr/bin/env python
"""Whether a GPTQ model answers on the card as it does on the CPU, and how fast it reads.

    python benchmarks/gptq_kernels.py

The embedded base is quantised by GPTQ (4 bits, groups of 128), loaded on the device and on the CPU, and shown the same
tokens. Needs requirements-gptq.txt. Writes benchmarks/results/gptq_kernels.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, now, write_result  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402

BITS: Literal[4] = 4
GROUP, SAMPLES, LENGTH = 128, 16, 256


@dataclass
class KernelOptions:
    """What is measured."""

    model_path: str = DEFAULT_BASE
    """Directory of a small unquantised model."""
    rounds: int = 5
    """Passes whose time is taken."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    pretend_turing: bool = False
    """fp16 and no FlashAttention, whatever the card."""
    output: str = str(RESULTS / "gptq_kernels.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(KernelOptions, argv, description=__doc__ or "")
    from onecard.model.gptq import BACKEND, check_gptq_installed
    from onecard.model.hardware import detect

    check_gptq_installed("gptq_kernels.py", "measures GPTQ kernels")
    hardware = detect(options.device, pretend_turing=options.pretend_turing)
    with tempfile.TemporaryDirectory(prefix="gptq-kernels-") as folder:
        ids = quantised(options.model_path, Path(folder))
        expected, _ = logits_of(Path(folder) / "model", detect("cpu"), ids, 1)
        got, speeds = logits_of(Path(folder) / "model", hardware, ids, options.rounds)
    apart = ((got - expected).norm() / expected.norm()).item()
    same = (got.argmax(-1) == expected.argmax(-1)).float().mean().item()
    say(f"{BACKEND} kernels on {hardware.name}: {apart:.2e} of the logits' size apart from the CPU's, the same token in"
        f" {same:.1%}, {statistics.median(speeds):,.0f} tokens/s read")  # fmt: skip
    write_result(options.output, {
        "kernels": BACKEND, "bits": BITS, "group_size": GROUP, "tokens": ids.numel(), "relative_difference": apart,
        "same_token": round(same, 4), "tokens_per_s": round(statistics.median(speeds), 1),
        "machine": machine(str(hardware.device)),
    })  # fmt: skip


def quantised(model_path: str, folder: Path) -> Any:
    """Write the GPTQ model to `folder`/model; token ids, (1, LENGTH), of text that it was not fitted to."""
    import torch

    from benchmarks.gptq_quality import rows_of
    from onecard.export.quantize.calibration import calibration_of
    from onecard.export.quantize.gptq import quantize
    from onecard.export.quantize.options import CalibrationTextOptions, GptqOptions, SourceOptions
    from onecard.model.load import load_tokenizer

    amount = CalibrationTextOptions(
        calibration_samples=SAMPLES, calibration_len=LENGTH, eval_samples=SAMPLES, seed=1
    )  # fmt: skip
    drawn = calibration_of(rows_of("data", 1, load_tokenizer(model_path), LENGTH), amount)
    (folder / "model").mkdir()
    settings, options = GptqOptions(BITS, GROUP, False, True, 0.05), SourceOptions(batch_size=SAMPLES, device="cpu")
    quantize(Path(model_path), drawn.rows, settings, options, folder / "model", folder / "kept")
    return torch.tensor([[token for row in drawn.held_out for token in row][:LENGTH]])


def logits_of(model: Path, hardware: Any, ids: Any, rounds: int) -> tuple[Any, list[float]]:
    """The logits, in fp32 on the CPU, and the tokens per second of each pass after the first."""
    import torch

    from onecard.model.load import load_base

    options = ModelOptions(str(model), bits=BITS, gradient_checkpointing=False)
    loaded = load_base(options, hardware, gptq=True).model
    ids, speeds = ids.to(hardware.device), []
    with torch.inference_mode():
        logits = loaded(ids).logits.float().cpu()
        for _ in range(rounds):
            begun = now(hardware.device)
            loaded(ids)
            speeds.append(ids.numel() / (now(hardware.device) - begun))
    return logits, speeds


if __name__ == "__main__":
    sys.exit(run_main(main))
