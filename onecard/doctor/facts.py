"""The facts about this machine, each gathered on its own: one that cannot be had never hides the others.

Kernels are really run, forward and backward. Judges nothing: `report.py` does. Everything that may be missing is
imported inside functions.
"""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from onecard.doctor import report as doctor
from onecard.doctor.report import CardFacts, Package
from onecard.installation import SHIPPED, install_command, requirements
from onecard.model.nvidia_driver import Finding, line_of, nvidia_smi, torch_and_cards

OPTIONAL = ("gptqmodel", "optimum", "auto-gptq", "deepspeed", "liger-kernel", "flash-attn", "llama-cpp-python")
EXTRAS = {"gptqmodel": "gptq", "deepspeed": "deepspeed"}
MEND_KERNELS = (
    "pip install --force-reinstall --no-deps bitsandbytes, of the pinned version; `python -m bitsandbytes` says more"
)


def examine() -> list[Finding]:
    """Every check of this machine, in the order of a report. Never raises; takes some ten seconds."""
    checks: dict[str, Callable[[], list[Finding]]] = {
        "system": lambda: doctor.judge_system(platform.platform(), sys.version_info[:3], sys.maxsize > 2**32),
        "RAM": _memory, "disk": _disks, "packages": _packages, "torch": _torch,
        "cards": _cards,
        "matrix product": _cpu_matmul, "bitsandbytes": _bitsandbytes, "sentencepiece": _sentencepiece,
        "gradio": _gradio, "settings": lambda: doctor.judge_settings(os.environ),
    }  # fmt: skip
    return [finding for name, check in checks.items() for finding in isolated(name, check)]


def isolated(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Run one check; what it raises becomes its finding, because the others must still be heard."""
    try:
        return check()
    except ImportError as reason:
        return [Finding(name, "problem", f"cannot be checked: {line_of(reason)}", install_command())]
    except Exception as reason:
        return [
            Finding(name, "problem", f"the check itself failed: {line_of(reason)}", "tell us, with --json and --debug")
        ]


def without_names(text: str) -> str:
    """The text, fit for a public bug report."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user: a container's number
        user = ""
    return doctor.scrubbed(text, str(Path.home()), user, platform.node())


def pinned(wanted_texts: Iterable[str]) -> list[Package]:
    """The packages that requirements pin for this Python and system, and what is installed of them."""
    from packaging.requirements import Requirement

    found = []
    for wanted in map(Requirement, wanted_texts):
        if wanted.marker and not wanted.marker.evaluate():
            continue
        here = installed(wanted.name)
        fits = here is not None and wanted.specifier.contains(here, prereleases=True)
        found.append(Package(wanted.name, str(wanted.specifier).removeprefix("=="), here, fits))
    return found


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    return doctor.judge_memory(memory.total, memory.available)


def _disks() -> list[Finding]:
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    found = []
    for name, place in (("disk here", Path.cwd()), ("disk of the Hub cache", Path(cache).expanduser().absolute())):
        there = next(folder for folder in (place, *place.parents) if folder.is_dir())
        found += doctor.judge_disk(name, str(place), shutil.disk_usage(there).free)
    return found


def _packages() -> list[Finding]:
    extras = ["", *(extra for name, extra in EXTRAS.items() if installed(name))]
    found = [finding for extra in extras for finding in doctor.judge_packages(pinned(requirements(extra)), extra)]
    return found + doctor.judge_pairs({name: installed(name) for name in OPTIONAL})


def _torch() -> list[Finding]:
    facts, names = torch_and_cards(lambda: _n_gpus() > 0)
    found = doctor.judge_torch(facts, names)
    if facts.error:
        return found
    import torch

    if torch.version.hip:
        found.append(
            Finding("torch", "warning", "built for AMD (ROCm), which nobody has tested here", "tell us how it goes")
        )
    return found


def _n_gpus() -> int:
    from onecard.model.hardware import count_gpus

    return count_gpus()


def _cards() -> list[Finding]:
    return [finding for i in range(_n_gpus()) for finding in doctor.judge_card(_card(i))]


def _card(index: int) -> CardFacts:
    import torch

    from onecard.model.hardware import free_and_total_bytes, gpu_properties, has_native_bf16

    properties, native = gpu_properties(index), has_native_bf16(index)
    free_bytes, total_bytes = free_and_total_bytes(index)
    matmul = _error_of(lambda: _run_matmul(f"cuda:{index}", torch.float16))
    flash = _error_of(lambda: _run_flash_attention(f"cuda:{index}"))
    return CardFacts(
        index, properties.name, (properties.major, properties.minor), total_bytes, free_bytes, native, matmul, flash,
        _others(str(getattr(properties, "uuid", ""))),
    )  # fmt: skip


def _cpu_matmul() -> list[Finding]:
    import torch

    return doctor.judge_kernel(
        "fp32 on the CPU", "cpu", _error_of(lambda: _run_matmul("cpu", torch.float32)), remedy=install_command()
    )


def _bitsandbytes() -> list[Finding]:
    n_cards = _n_gpus()
    found = []
    for device in ("cpu", *(f"cuda:{i}" for i in range(n_cards))):
        for bits in (4, 8):
            error = _error_of(partial(_run_quantized, device, bits))
            needed = device != "cpu" or not n_cards  # on a machine with a card nobody trains on its CPU
            found += doctor.judge_kernel(f"bitsandbytes {bits}-bit", device, error, needed=needed, remedy=MEND_KERNELS)
    return found


def _sentencepiece() -> list[Finding]:
    def run() -> None:
        import sentencepiece

        text = "Hello, 世界 123"
        model = sentencepiece.SentencePieceProcessor(
            model_file=str(SHIPPED / "sample" / "tiny-llama" / "tokenizer.model")
        )
        if model.decode(model.encode(text)) != text:
            raise ArithmeticError("a text does not come back from its tokens")

    return doctor.judge_kernel("sentencepiece", "cpu", _error_of(run), remedy=install_command())


def _gradio() -> list[Finding]:
    """In a process of its own: it is large, and only the pages need it."""
    command = [sys.executable, "-c", "import gradio; print(gradio.__version__)"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    error = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashed"])[-1]
    return doctor.judge_kernel("gradio", "cpu", error, needed=False, remedy=install_command())


def _run_matmul(device: str, dtype: Any) -> None:
    import torch

    a = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64).remainder(7)
    product = (a.to(device, dtype) @ a.to(device, dtype).T).float().cpu()
    if not torch.equal(product, a @ a.T):  # whole numbers below 2048 are exact in fp16, too
        raise ArithmeticError("the result is wrong")


def _run_flash_attention(device: str) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from onecard.model.hardware import synchronize

    x = torch.zeros(1, 2, 64, 64, device=device, dtype=torch.float16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    synchronize(device)


def _run_quantized(device: str, bits: Any) -> None:
    """One quantised layer forward and backward, against the layer that it was made from."""
    import torch

    from onecard.model.quantization import quantize_linear

    dtype = torch.float32 if device == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(128, 256, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(256, 128, generator=generator))
    x = torch.randn(8, 128, generator=generator)
    small_x = x.to(device, dtype).requires_grad_()
    y = quantize_linear(linear.to(device, dtype), bits, dtype)(small_x)
    y.sum().backward()
    weight = linear.weight.detach().float().cpu()
    pairs = ((y.detach(), x @ weight.T), (small_x.grad, weight.sum(0).expand(8, -1)))
    for got, wanted in pairs:
        if got is None or not (got.float().cpu() - wanted).norm() < 0.2 * wanted.norm():  # NaN is caught, too
            raise ArithmeticError("the result is wrong")


def _error_of(run: Callable[[], Any]) -> str:
    """Run something; returns what it raised in one line, or ''. A kernel may fail in any way at all."""
    try:
        run()
        return ""
    except Exception as reason:
        return line_of(reason)


def _others(uuid: str) -> list[tuple[int, int]]:
    """(process id, bytes) of other processes on the card; empty where the driver does not tell (Windows)."""
    rows = nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory")
    rows = [row for row in rows if len(row) == 3 and row[0].removeprefix("GPU-") == uuid.removeprefix("GPU-")]
    return [(int(pid), int(mib) * 2**20) for _, pid, mib in rows if mib.isdigit() and int(pid) != os.getpid()]
