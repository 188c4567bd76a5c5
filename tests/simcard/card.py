"""Installs the simulated card into this process: its library, torch's Python side of CUDA, bitsandbytes' functions.

torch.cuda stays torch's own code: what it calls in torch._C, and its two classes for streams and events, are supplied
here. Nothing is taken back; a process that has the card keeps it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.simcard.build import MODULE, Unavailable, build

UNITS = {"GiB": 2**30, "MiB": 2**20}
# Streaming multiprocessors of a usual card of this capability, which bitsandbytes chooses kernels by.
MULTIPROCESSORS = {(7, 5): 68, (8, 0): 108, (8, 6): 82, (8, 9): 128}
CONTEXT_BYTES = (
    512 * 2**20
)  # what a process holds before its first tensor; assumed, as in onecard/model/memory/estimate.py
WORDS = ("late", "garbage", "expandable")


@dataclass(frozen=True)
class Device:
    """One simulated device: its compute capability and its memory in bytes."""

    capability: tuple[int, int]
    total_bytes: int


@dataclass(frozen=True)
class Spec:
    """The simulated devices and how they behave."""

    devices: tuple[Device, ...]
    late: bool = False
    garbage: bool = False
    expandable: bool = False


def parse(text: str) -> Spec:
    """`sm75:11GiB`, `sm86:24GiB,sm86:24GiB,late,garbage` -> what to simulate. Raises ValueError."""
    devices, words = [], set()
    for word in text.split(","):
        found = re.fullmatch(r"sm(\d)(\d):(\d+(?:\.\d+)?)(GiB|MiB)", word)
        if found:
            major, minor, amount, unit = found.groups()
            devices.append(Device((int(major), int(minor)), int(float(amount) * UNITS[unit])))
        elif word in WORDS:
            words.add(word)
        else:
            raise ValueError(f"'{word}' is neither a device such as sm75:11GiB nor one of {', '.join(WORDS)}")
    if not 1 <= len(devices) <= 8:
        raise ValueError(f"1 to 8 devices can be simulated, not {len(devices)}: sm75:11GiB, or sm86:24GiB,sm86:24GiB")
    if any(device.capability not in MULTIPROCESSORS for device in devices):
        raise ValueError("the capabilities that are modelled are sm75, sm80, sm86 and sm89")
    return Spec(tuple(devices), **dict.fromkeys(words, True))


@contextmanager
def shapes_only(computed_bytes: int = 1 << 20) -> Iterator[None]:
    """Compute only what works on at most this many bytes; larger tensors have shapes and memory, no values."""
    native = sys.modules[MODULE]
    before = native.computed_bytes()
    native.compute_up_to(computed_bytes)
    try:
        yield
    finally:
        native.compute_up_to(before)


class Card:
    """The installed card: `native` is its library."""

    def __init__(self, native: Any, spec: Spec) -> None:
        self.native = native
        self.spec = spec

    shapes_only = staticmethod(shapes_only)

    @contextmanager
    def behaving(self, *, late: bool = False, garbage: bool = False, expandable: bool = False) -> Iterator[None]:
        """Other behaviour than the one asked for on the command line, inside the block."""
        self.native.behave(late, garbage, expandable)
        try:
            yield
        finally:
            self.native.behave(self.spec.late, self.spec.garbage, self.spec.expandable)


def install(spec: Spec) -> Card:
    """Build and load the card, and make torch believe in it. Raises Unavailable."""
    if "torch" in sys.modules:
        raise Unavailable("torch was imported before the simulated card was installed")
    library = build()
    try:
        ctypes.CDLL(str(library))  # registers the hooks that torch asks for while it is imported
    except OSError as error:
        raise Unavailable(f"the simulated card was built, but does not load: {error}") from error
    import torch  # noqa: F401  # the module below needs its Python side

    module_spec = importlib.util.spec_from_file_location(MODULE, library)
    assert module_spec is not None and module_spec.loader is not None
    native = importlib.util.module_from_spec(module_spec)
    sys.modules[MODULE] = native
    module_spec.loader.exec_module(native)
    if not native.registered():
        raise Unavailable("torch did not take the simulated card's hooks")
    import bitsandbytes  # noqa: F401  # with its library for CPUs, before anybody says that there is CUDA

    native.install(len(spec.devices))
    for index, device in enumerate(spec.devices):
        context = CONTEXT_BYTES if device.total_bytes > 2 * CONTEXT_BYTES else 0
        native.configure(index, device.total_bytes, context, *device.capability)
    native.behave(spec.late, spec.garbage, spec.expandable)
    supply_torch(native, spec)
    from tests.simcard.bnb_functions import supply_bitsandbytes

    supply_bitsandbytes(native)
    return Card(native, spec)


class Properties:
    """What torch.cuda.get_device_properties tells of a simulated device."""

    is_integrated = 0
    warp_size = 32
    max_threads_per_multi_processor = 1024
    regs_per_multiprocessor = 65536
    gcnArchName = ""

    def __init__(self, index: int, device: Device) -> None:
        self.major, self.minor = device.capability
        self.total_memory = device.total_bytes
        self.multi_processor_count = MULTIPROCESSORS[device.capability]
        self.name = f"simulated sm_{self.major}{self.minor}"
        self.uuid = f"simulated-{index}"
        self.pci_bus_id = index


def stream_classes() -> tuple[type, type]:
    """torch.cuda.Stream and torch.cuda.Event on top of torch's device-independent ones."""
    import torch

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> Any:
            if ids:
                return super().__new__(cls, **ids)
            return super().__new__(cls, device=torch.device("cuda", torch.cuda._get_device_index(device, True)))

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
            return super().__new__(cls, device=torch.device("cuda"), enable_timing=enable_timing, blocking=blocking)

    return Stream, Event


def clone_storage(storage: Any) -> Any:
    """UntypedStorage.clone, whose constructor knows no CUDA in a torch for CPUs."""
    import torch

    if storage.device.type != "cuda":
        return type(storage)(storage.nbytes(), device=storage.device).copy_(storage)
    own = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return own.clone().untyped_storage()


def storage_resizing(native: Any) -> Any:
    """UntypedStorage.resize_, which a torch for CPUs refuses for CUDA."""
    import torch

    own = torch.UntypedStorage.resize_

    def resize_(storage: Any, n_bytes: int) -> Any:
        if storage.device.type != "cuda":
            return own(storage, n_bytes)
        native.resize_storage(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), n_bytes)
        return storage

    return resize_


def supply_torch(native: Any, spec: Spec) -> None:
    """The part of torch._C that only a torch for CUDA has, as far as torch.cuda, accelerate and bitsandbytes use it."""
    import torch

    kind = int(torch._C._autograd.DeviceType.CUDA)
    functions = {
        "init": lambda: None,
        "getDeviceCount": lambda: len(spec.devices),
        "getDevice": native.current_device,
        "setDevice": native.set_device,
        "exchangeDevice": native.exchange_device,
        "maybeExchangeDevice": native.exchange_device,
        "synchronize": lambda: native.synchronize(native.current_device()),
        "getCurrentStream": lambda device: (native.current_stream(device), device, kind),
        "getDefaultStream": lambda device: (0, device, kind),
        "setStream": lambda stream_id, device_index, device_type: native.set_stream(device_index, stream_id),
        "getCurrentRawStream": native.current_stream,
        "isCurrentStreamCapturing": lambda: False,
        "emptyCache": torch._C._accelerator_emptyCache,
        "memoryStats": torch._C._accelerator_getDeviceStats,
        "resetPeakMemoryStats": torch._C._accelerator_resetPeakStats,
        "resetAccumulatedMemoryStats": torch._C._accelerator_resetAccumulatedStats,
        "setMemoryFraction": lambda share, device: native.set_limit(
            device, int(share * spec.devices[device].total_bytes)
        ),
        "getMemoryFraction": lambda device: native.get_limit(device) / spec.devices[device].total_bytes,
        "getAllocatorBackend": lambda: "native",
        "canDeviceAccessPeer": lambda device, peer: False,
        "getArchFlags": lambda: "sm_75 sm_80 sm_86 sm_89",
        "clearCublasWorkspaces": native.forget_workspaces,
        "ipc_collect": lambda: None,
        "isInBadFork": lambda: False,
    }
    for name, function in functions.items():
        setattr(torch._C, f"_cuda_{name}", function)

    class Runtime:
        cudaMemGetInfo = staticmethod(torch._C._accelerator_getMemoryInfo)

    stream, event = stream_classes()
    properties = [Properties(index, device) for index, device in enumerate(spec.devices)]
    cuda: Any = torch.cuda
    cuda._cudart = Runtime
    cuda._exchange_device = cuda._maybe_exchange_device = native.exchange_device
    cuda._get_device_properties = properties.__getitem__
    cuda.default_generators = tuple(native.default_generator(index) for index in range(len(spec.devices)))
    cuda.Stream = cuda.streams.Stream = stream
    cuda.Event = cuda.streams.Event = event
    torch.storage._StorageBase.clone = clone_storage
    torch.UntypedStorage.resize_ = storage_resizing(native)  # type: ignore[method-assign]
    torch.version.cuda = "12.8"
    cuda.init()
