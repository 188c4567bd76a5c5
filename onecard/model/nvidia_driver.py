"""Why torch uses no NVIDIA card, from what the driver and the build of torch say.

torch is imported inside functions alone: that it is missing or broken is one of the answers.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

OK: Final = "ok"
WARNING: Final = "warning"
PROBLEM: Final = "problem"
SMI_SECONDS = 20
GET_TORCH = "https://pytorch.org/get-started/locally names the command"
# The build that package registries give is made for CUDA 13 since torch 2.11; it needs driver 580 and begins at Turing.
# The one for CUDA 12.6 takes cards from Maxwell to Hopper and driver 525, and ends with torch 2.14.
# https://github.com/pytorch/pytorch/blob/main/RELEASE.md  https://github.com/pytorch/pytorch/issues/190385
OLD_TORCH = "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty where there is nothing to do."""

    name: str
    state: Literal["ok", "warning", "problem"]
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class TorchBuild:
    """`cuda_build` is the CUDA version it was compiled for; `driver_cuda` the newest that the driver runs."""

    version: str
    cuda_build: str | None
    is_available: bool
    driver: str | None  # version of the NVIDIA driver, such as 550.54
    driver_cuda: tuple[int, int] | None
    hidden_by: str | None = None  # the value of CUDA_VISIBLE_DEVICES
    error: str = ""  # why it cannot be imported
    has_driver: bool = False  # whether the system holds a driver, which nvidia-smi may still not find


def why_no_card(torch: TorchBuild, names_of_cards: Sequence[str]) -> Finding | None:
    """Why torch uses no GPU though one was to be expected; None where nothing speaks of one.

    A driver, a torch that was built for CUDA, or a CUDA_VISIBLE_DEVICES that names a card speak of one.
    """
    is_named = torch.hidden_by not in (None, "", "-1", "NoDevFiles")
    if not (names_of_cards or torch.has_driver or torch.cuda_build or is_named):
        return None
    cards = ", ".join(names_of_cards) or "an NVIDIA driver"
    if not torch.cuda_build:
        what = cards if names_of_cards or torch.has_driver else f"CUDA_VISIBLE_DEVICES={torch.hidden_by}"
        return Finding(
            "card", PROBLEM, f"{what} is here, but torch is a CPU build", f"install a CUDA build: {GET_TORCH}"
        )
    if not names_of_cards and not torch.has_driver:
        remedy = "if there is a card, install the NVIDIA driver; in a container, start it with --gpus all"
        return Finding("card", WARNING, "no NVIDIA card is seen; the CPU computes, slowly", remedy)
    hidden = Finding(
        "card", PROBLEM, f"{cards} is hidden by CUDA_VISIBLE_DEVICES={torch.hidden_by!r}", "unset it, or name a card"
    )
    if torch.hidden_by is not None and not is_named:
        return hidden
    built = tuple(int(part) for part in re.findall(r"\d+", torch.cuda_build)[:2])
    # Within one major version older drivers run newer builds: https://docs.nvidia.com/deploy/cuda-compatibility
    if torch.driver_cuda and torch.driver_cuda[0] < built[0]:
        return Finding(
            "card",
            PROBLEM,
            f"driver {torch.driver or 'here'} is too old for a torch of CUDA {torch.cuda_build}",
            f"update the NVIDIA driver (CUDA 13 needs 580 or newer), or take the build for older ones: {OLD_TORCH}"
            if torch.driver_cuda[0] == 12
            else "update the NVIDIA driver (CUDA 13 needs 580 or newer, CUDA 12 needs 525)",
        )
    if torch.hidden_by is not None:
        return hidden
    return Finding(
        "card", PROBLEM, f"torch cannot use {cards}", "restart the machine; then reinstall the NVIDIA driver"
    )


def torch_and_cards(sees_gpu: Callable[[], bool]) -> tuple[TorchBuild, list[str]]:
    """What torch was built for, what the driver runs, and the names of the cards that the driver sees.

    sees_gpu: whether torch can use one; asked only where torch can be imported.
    """
    smi = nvidia_smi("--query-gpu=name,driver_version")
    driver = smi[0][1] if smi else None
    try:
        import torch
    except (ImportError, OSError) as reason:
        return TorchBuild("", None, False, driver, None, error=line_of(reason)), []
    facts = TorchBuild(
        torch.__version__, torch.version.cuda, sees_gpu(), driver, _driver_cuda(),
        os.environ.get("CUDA_VISIBLE_DEVICES"), has_driver=Path("/proc/driver/nvidia/version").exists(),
    )  # fmt: skip
    return facts, [row[0] for row in smi]


def missing_gpu(sees_gpu: Callable[[], bool]) -> Finding | None:
    """Why torch uses no GPU though one was to be expected; None where nothing speaks of one, or torch has one."""
    facts, names = torch_and_cards(sees_gpu)
    return None if facts.is_available or facts.error else why_no_card(facts, names)


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs. https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VERSION.html"""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library, number = ctypes.CDLL(name), ctypes.c_int(0)
        except OSError:
            continue
        if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
            return number.value // 1000, number.value % 1000 // 10
    return None


def nvidia_smi(query: str) -> list[list[str]]:
    """Rows of cells that the driver's own program prints; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=SMI_SECONDS
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):  # it hangs where the driver does; torch's own word remains
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]


def line_of(reason: BaseException) -> str:
    """An error in one line, with its kind."""
    first = str(reason).strip().partition("\n")[0]
    return f"{type(reason).__name__}: {first}"[:300]
