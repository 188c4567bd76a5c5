"""Which device this process computes on, and in which number format. The only file that calls torch.cuda.

Knows device names, memory, streams and what a card can do natively. It does not know the model beyond the name of its
family, and it places nothing: `load.py` does.
"""

from __future__ import annotations

import os
import platform
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import psutil
import torch

from onecard.console import warn
from onecard.errors import ConfigError
from onecard.installation import command
from onecard.model.nvidia_driver import OLD_TORCH, missing_gpu

TURING = (7, 5)  # CUDA capability
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Families whose activations leave the range of fp16 (65504), by the start of `model_type`. Gemma was trained in bf16
# and adds up to five digits in its residual stream; T5 overflows in its feed-forward layers.
# https://huggingface.co/docs/transformers/model_doc/gemma3  https://github.com/huggingface/transformers/issues/9295
# RWKV halves its states every few layers against that, but with weights that change between training and answering.
FP16_FRAGILE_FAMILIES = ("gemma", "recurrent_gemma", "rwkv", "t5", "mt5", "umt5")
# Their layers mix fp32 states into 16-bit arithmetic, which PyTorch refuses.
FP32_FAMILIES = ("xlstm",)


@dataclass(frozen=True)
class Hardware:
    """One device: `total_bytes` is its own memory (the machine's RAM for CPU), `capability` the CUDA one (8, 6)."""

    device: torch.device
    name: str
    total_bytes: int
    bf16_native: bool
    capability: tuple[int, int] | None

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def has_flash_attention(self) -> bool:
        """FlashAttention needs Ampere; older cards have the memory-efficient kernel, and a CPU has its own."""
        return self.capability is None or self.capability >= (8, 0)

    def has_flash_attention_in(self, element_bytes: int) -> bool:
        """The same for an arithmetic of so many bytes per number: no card has it in fp32, a CPU's own takes any."""
        return self.has_flash_attention and not (self.is_gpu and element_bytes >= torch.float32.itemsize)


def detect(device: str = "auto", *, pretend_turing: bool = False) -> Hardware:
    """Return the device for this process: `auto` takes the GPU if there is one; torchrun's LOCAL_RANK picks which.

    pretend_turing: describe a GPU as one of the Turing generation (no bf16, no FlashAttention), whatever it is.
    Raises ConfigError for a name that is unknown, for a GPU that is not there and for one too old for this torch. Warns
    where no GPU can be used though one was to be expected, with the reason.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError("--device", f"{device} is unknown; use auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return _cpu()
    if device == "auto" and not torch.cuda.is_available():
        if reason := _missing_gpu():
            warn(f"the CPU computes: {reason} ({command('doctor')} says more; --device cpu says that it is meant)")
        return _cpu()
    n_gpus = count_gpus()
    if n_gpus == 0:
        raise ConfigError(
            "--device",
            f"{device} asks for a GPU, but PyTorch sees none; use --device cpu, or install "
            f"the driver and a CUDA build of PyTorch. {_missing_gpu()}".rstrip(". "),
        )
    index = _gpu_index(device)
    if index >= n_gpus:
        raise ConfigError("--device", f"GPU number {index} is asked for, but there are {n_gpus} (counted from 0)")
    found = _gpu(index)
    _refuse_too_old(found)
    return replace(found, bf16_native=False, capability=TURING) if pretend_turing else found


def choose_dtype(requested: str, bits: int, hardware: Hardware, model_type: str) -> tuple[torch.dtype, str]:
    """Return the number format of the arithmetic and of everything unquantised, and the reason for a person to read.

    requested: auto, fp16, bf16 or fp32. bits: bits per base weight. Raises ConfigError for what cannot work, such as
    bf16 on a card that only emulates it, or a family that overflows in fp16.

        RTX 3090, auto, 4 bits, llama  -> bf16        RTX 2080 Ti, auto, 4 bits, gemma2  -> fp32
        RTX 2080 Ti, auto, 16, llama   -> fp16        CPU, auto, 16 bits                 -> bf16
    """
    if requested != "auto" and requested not in DTYPES:
        raise ConfigError("--dtype", f"{requested} is unknown; use auto, fp16, bf16 or fp32")
    if requested == "fp32" and bits == 16:
        raise ConfigError("--bits", "16 contradicts --dtype fp32; use --bits 32 or another --dtype")
    if requested in ("fp16", "bf16") and bits == 32:
        raise ConfigError("--bits", f"32 contradicts --dtype {requested}; use --bits 16 or --dtype fp32")
    if bits == 32:
        return torch.float32, "fp32, because --bits 32 was asked for"
    if model_type in FP32_FAMILIES:
        if bits == 16 or requested in ("fp16", "bf16"):
            flag, value = ("--bits", "16") if bits == 16 else ("--dtype", requested)
            raise ConfigError(
                flag, f"{value} does not work with {model_type}, which computes in fp32 only; use --bits 32"
            )
        return torch.float32, f"fp32, because {model_type} computes in nothing else"
    if requested != "auto":
        _refuse_dtype(requested, bits, hardware, model_type)
        return DTYPES[requested], f"{requested}, because --dtype {requested} was asked for"
    if not hardware.is_gpu:
        return _cpu_dtype(bits)
    return _gpu_dtype(bits, hardware, model_type)


def is_fragile_in_fp16(model_type: str) -> bool:
    """True for families whose activations overflow in fp16."""
    return model_type.startswith(FP16_FRAGILE_FAMILIES)


def count_gpus() -> int:
    """GPUs that PyTorch can use; 0 without any."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_properties(index: int) -> Any:
    """Name, capability, memory and uuid of a GPU, as torch tells them."""
    return torch.cuda.get_device_properties(index)


def has_native_bf16(index: int) -> bool:
    """Whether this GPU computes bf16 itself."""
    with torch.cuda.device(index):  # is_bf16_supported asks the current device
        return torch.cuda.is_bf16_supported(including_emulation=False)


def free_and_total_bytes(device: torch.device | int | None = None) -> tuple[int, int]:
    """Memory of a GPU (None: the current one): what no process has taken, and all of it."""
    return torch.cuda.mem_get_info(device)


def reserved_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process's allocator holds, in use or not."""
    return torch.cuda.memory_reserved(device)


def peak_reserved_bytes() -> int | None:
    """The most that the allocator held on any GPU since `reset_peak`; None without a GPU."""
    return max((torch.cuda.max_memory_reserved(index) for index in range(count_gpus())), default=None)


def reset_peak() -> None:
    """Let `peak_reserved_bytes` count anew. Does nothing without a GPU."""
    for index in range(count_gpus()):
        torch.cuda.reset_peak_memory_stats(index)


def limit_memory(share: float, device: torch.device) -> None:
    """Let the allocator take no more than this share of the GPU."""
    torch.cuda.set_per_process_memory_fraction(share, device)


def empty_cache() -> None:
    """Give the allocator's unused blocks back to the driver. Does nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_workspaces() -> None:
    """Let the libraries of matrix products give up the memory that they keep. Does nothing without a GPU."""
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()


def synchronize(device: torch.device | str) -> None:
    """Wait for all that was queued on this GPU."""
    torch.cuda.synchronize(device)


def new_stream(device: torch.device) -> Any:
    """A stream of a GPU beside the one that computes."""
    return torch.cuda.Stream(device)


def current_stream(device: torch.device) -> Any:
    """The stream that this thread queues work on."""
    return torch.cuda.current_stream(device)


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Queue what is inside on this stream."""
    return torch.cuda.stream(stream)


@cache
def _missing_gpu() -> str:
    """Why PyTorch sees no GPU and what to do, where one was to be expected; else an empty text."""
    finding = missing_gpu(torch.cuda.is_available)
    return f"{finding.value}; {finding.remedy}" if finding is not None else ""


def _refuse_too_old(hardware: Hardware) -> None:
    """Raise ConfigError for a card older than all that this torch holds kernels for: the first one would fail."""
    built = [tuple(divmod(int(number), 10)) for number in re.findall(r"(?:sm|compute)_(\d+)", _kernels())]
    if hardware.capability is None or not built or hardware.capability >= min(built):
        return
    major, minor = hardware.capability
    raise ConfigError(
        "--device",
        f"{hardware.name} (compute capability {major}.{minor}) is too old for this torch, whose build for CUDA "
        f"{torch.version.cuda} begins at {'.'.join(map(str, min(built)))}; {OLD_TORCH}, or --device cpu",
    )


def _kernels() -> str:
    return " ".join(torch.cuda.get_arch_list()) if torch.version.cuda else ""


def _gpu_index(device: str) -> int:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if ":" not in device:
        return local_rank
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--device",
            f"{device} would put every process on the same GPU; use --device auto and "
            "choose the cards with CUDA_VISIBLE_DEVICES",
        )
    return int(device.split(":")[1])


def _cpu() -> Hardware:
    name = platform.processor() or platform.machine() or "CPU"
    return Hardware(torch.device("cpu"), name, psutil.virtual_memory().total, bf16_native=True, capability=None)


def _gpu(index: int) -> Hardware:
    properties = gpu_properties(index)
    return Hardware(
        torch.device("cuda", index),
        properties.name,
        properties.total_memory,
        has_native_bf16(index),
        (properties.major, properties.minor),
    )


def _cpu_dtype(bits: int) -> tuple[torch.dtype, str]:
    if bits == 16:
        return torch.bfloat16, "bf16, because --bits 16 on CPU needs a range that trains without a loss scaler"
    return torch.float32, f"fp32, which every CPU computes natively; the base weights lie there in {bits} bits"


def _gpu_dtype(bits: int, hardware: Hardware, model_type: str) -> tuple[torch.dtype, str]:
    if hardware.bf16_native:
        return torch.bfloat16, f"bf16, because {hardware.name} computes it natively"
    if not is_fragile_in_fp16(model_type):
        return torch.float16, f"fp16 with a loss scaler, because {hardware.name} has no native bf16"
    if bits == 16:
        raise ConfigError(
            "--bits",
            f"16 cannot work here: {model_type} overflows in fp16 and {hardware.name} has no "
            "native bf16; use --bits 4 or 8 (then the arithmetic is fp32), or --bits 32",
        )
    return torch.float32, (
        f"fp32 (slower), because {model_type} overflows in fp16 and {hardware.name} has no native bf16"
    )


def _refuse_dtype(requested: str, bits: int, hardware: Hardware, model_type: str) -> None:
    if requested == "bf16" and not hardware.bf16_native:
        raise ConfigError("--dtype", f"bf16 is only emulated on {hardware.name}, slowly; use fp16 or auto")
    if requested != "fp16":
        return
    if not hardware.is_gpu:
        raise ConfigError("--dtype", "fp16 training needs a GPU; on CPU use bf16 or fp32")
    if is_fragile_in_fp16(model_type):
        other = "auto" if hardware.bf16_native else "fp32 with --bits 4 or 8" if bits != 16 else "--bits 4"
        raise ConfigError("--dtype", f"{model_type} overflows in fp16 (NaN after a few steps); use {other}")
