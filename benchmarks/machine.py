"""Where a benchmark ran, and how its result is printed and kept: the same for every benchmark of memory and speed.

Knows devices, versions, Markdown and JSON. It does not know what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onecard.console import say

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def machine(device: str) -> dict[str, Any]:
    """The machine, its card if `device` is one, the versions and the date; nothing that names a person or a host."""
    import psutil
    import torch

    on_gpu = device.startswith("cuda")
    card = torch.cuda.get_device_properties(torch.device(device)) if on_gpu else None
    return {
        "device": "cuda" if on_gpu else "cpu",
        "gpu": card.name if card else None,
        "gpu_gib": round(card.total_memory / 2**30, 2) if card else None,
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
