#!/usr/bin/env python
"""Where a benchmark ran, and how its result is printed and kept: the same for every benchmark of memory and speed.

    python benchmarks/machine.py --output machine.json

Knows devices, versions, Markdown and JSON. It does not know what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.console import run_main, say  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
SECONDS_OF_PRODUCTS = 1.0
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass
class MachineOptions:
    """What is described."""

    device: str = "auto"
    """auto, cpu or cuda:N."""
    pretend_turing: bool = False
    """Measure matrix products in fp16, whatever the card."""
    output: str = str(RESULTS / "machine.json")
    """Where the description is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    from onecard.config.parsing import parse

    options = parse(MachineOptions, argv, description=__doc__ or "")

    import psutil
    import torch

    from onecard.model.hardware import choose_dtype, detect

    hardware = detect(options.device, pretend_turing=options.pretend_turing)
    dtype, _ = choose_dtype("auto", 4, hardware, "llama")
    free_bytes = psutil.virtual_memory().available
    ram_free_gib = round(free_bytes / 2**30, 2)
    if hardware.is_gpu:
        free_bytes, _ = torch.cuda.mem_get_info(hardware.device)
    write_result(options.output, machine(str(hardware.device)) | {
        "free_gib": round(free_bytes / 2**30, 2), "ram_free_gib": ram_free_gib, "dtype": str(dtype),
        "matrix_product_flops_per_s": matrix_products_per_s(hardware.device, dtype),
    })  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """The machine, its card if `device` is one, the versions and the date; nothing that names a person or a host."""
    import psutil
    import torch

    from onecard.model.nvidia_driver import nvidia_smi
    from tests.simcard import is_simulated

    on_gpu = device.startswith("cuda")
    card = torch.cuda.get_device_properties(torch.device(device)) if on_gpu else None
    drivers = nvidia_smi("--query-gpu=driver_version") if on_gpu else []
    return {
        "device": "cuda" if on_gpu else "cpu",
        "gpu": card.name if card else None,
        "gpu_gib": round(card.total_memory / 2**30, 2) if card else None,
        "capability": f"{card.major}.{card.minor}" if card else None,
        "is_simulated": on_gpu and is_simulated(),
        "driver": drivers[0][0] if drivers else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "date": time.strftime("%Y-%m-%d"),
    }


def now(device: Any) -> float:
    """The time, once the device has done all it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_products_per_s(device: Any, dtype: Any, seconds: float = SECONDS_OF_PRODUCTS) -> float:
    """FLOP/s of large square matrix products in `dtype`, the best of several: what the device can really do."""
    import torch

    from tests.simcard import is_simulated

    n = 8192 if device.type == "cuda" and not is_simulated() else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = now(device)
        torch.mm(a, b)
        best = min(best, now(device) - begun)
    return 2 * n**3 / best


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write one result as JSON, and say where."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"written to {target}")


def say_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table; None is a dash, because a number that was not measured is not printed."""
    say("| " + " | ".join(header) + " |")
    say("|" + " --- |" * len(header))
    for row in rows:
        say("| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(run_main(main))
