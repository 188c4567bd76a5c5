"""What bitsandbytes' CUDA library does, by its own CPU operations on the simulated card's bytes.

bitsandbytes' Python code for CUDA runs unchanged: it allocates on the card and hands addresses to a library; that
library is replaced here. Its numbers are those of bitsandbytes' CPU operations. A function without a stand-in raises
NotImplementedError when it is called.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import re
from collections.abc import Callable
from typing import Any

import torch

FLOAT32, FLOAT16 = torch.float32, torch.float16
DTYPES = {"fp32": FLOAT32, "32": FLOAT32, "fp16": FLOAT16, "16": FLOAT16, "bf16": torch.bfloat16}
EVERYTHING = 2**63 - 1  # the limit of computed bytes where there is none
INT8_SCALE = 1 / (127.0 * 127.0)


def number(value: Any) -> Any:
    """The Python number in a ctypes one."""
    return value.value if hasattr(value, "value") else value


def tensor_at(address: Any, count: int, dtype: torch.dtype) -> Any:
    """A CPU tensor over `count` numbers at an address of the card; None for a null pointer."""
    if not number(address):
        return None
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(number(address))
    return torch.frombuffer(buffer, dtype=dtype, count=count)


def dequantize(dtype: torch.dtype, quant_type: str | None) -> Callable[..., None]:
    """cdequantize_blockwise_DTYPE[_QUANT]."""

    def run(code: Any, packed: Any, absmax: Any, out: Any, blocksize: int, n: int, _stream: Any) -> None:
        scales = tensor_at(absmax, math.ceil(n / blocksize), torch.float32)
        if quant_type is None:
            values = torch.ops.bitsandbytes.dequantize_blockwise(
                tensor_at(packed, n, torch.uint8), scales, tensor_at(code, 256, torch.float32), blocksize, dtype
            )
        else:
            values = torch.ops.bitsandbytes.dequantize_4bit(
                tensor_at(packed, (n + 1) // 2, torch.uint8).view(-1, 1), scales, blocksize, quant_type, [n], dtype
            )
        tensor_at(out, n, dtype).copy_(values.view(-1))

    return run


def quantize(dtype: torch.dtype, quant_type: str | None) -> Callable[..., None]:
    """cquantize_blockwise_DTYPE[_QUANT]."""

    def run(code: Any, values: Any, absmax: Any, out: Any, blocksize: int, n: int) -> None:
        source = tensor_at(values, n, dtype)
        if quant_type is None:
            packed, scales = torch.ops.bitsandbytes.quantize_blockwise(
                source, tensor_at(code, 256, torch.float32), blocksize
            )
        else:
            packed, scales = torch.ops.bitsandbytes.quantize_4bit(source, blocksize, quant_type, torch.uint8)
        tensor_at(out, packed.numel(), torch.uint8).copy_(packed.view(-1))
        tensor_at(absmax, math.ceil(n / blocksize), torch.float32).copy_(scales)

    return run


def gemm_4bit(dtype: torch.dtype, _quant_type: str | None) -> Callable[..., None]:
    """cgemm_4bit_DTYPE: A (m, k) times the transpose of packed B (n, k)."""

    def run(
        a: Any, b: Any, absmax: Any, absmax8: Any, code: Any, offset: Any, out: Any, bias: Any, *sizes: Any
    ) -> None:
        m, n, k, blocksize, quant_type, _stream = sizes
        blocks = math.ceil(n * k / blocksize)
        if absmax8:  # the scales are themselves in 8 bits, in blocks of 256
            coarse = tensor_at(absmax, math.ceil(blocks / 256), torch.float32)
            fine, table = tensor_at(absmax8, blocks, torch.uint8), tensor_at(code, 256, torch.float32)
            scales = torch.ops.bitsandbytes.dequantize_blockwise(fine, coarse, table, 256, torch.float32)
            scales = scales + tensor_at(offset, 1, torch.float32)
        else:
            scales = tensor_at(absmax, blocks, torch.float32)
        weight = torch.ops.bitsandbytes.dequantize_4bit(
            tensor_at(b, (n * k + 1) // 2, torch.uint8).view(-1, 1), scales, blocksize,
            "fp4" if quant_type == 1 else "nf4", [n, k], dtype,
        )  # fmt: skip
        product = tensor_at(a, m * k, dtype).view(m, k).float() @ weight.float().t()
        if bias:
            product += tensor_at(bias, n, dtype).float()
        tensor_at(out, m * n, dtype).view(m, n).copy_(product)

    return run


def optimizer(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """cNAME32bit_grad_DTYPE."""

    def run(grad: Any, param: Any, state1: Any, state2: Any, unorm: Any, *rest: Any) -> None:
        *numbers, n = (number(value) for value in rest)
        states = (tensor_at(state, n, torch.float32) for state in (state1, state2))
        norm = tensor_at(unorm, 1, torch.float32)
        torch.ops.bitsandbytes.optimizer_update_32bit(
            name, tensor_at(grad, n, dtype), tensor_at(param, n, dtype), *states, norm, *numbers
        )

    return run


def optimizer_8bit(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """cNAME_8bit_blockwise_grad_DTYPE, in blocks of 256."""

    def run(param: Any, grad: Any, state1: Any, state2: Any, *rest: Any) -> None:
        values = [number(value) for value in rest]
        betas_to_rate, (map1, map2, absmax1, absmax2), tail, n = values[:7], values[7:11], values[11:-1], values[-1]
        blocks = math.ceil(n / 256)
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            name, tensor_at(grad, n, dtype), tensor_at(param, n, dtype),
            *(tensor_at(state, n, torch.uint8) for state in (state1, state2)), *betas_to_rate,
            *(tensor_at(table, 256, torch.float32) for table in (map1, map2)),
            *(tensor_at(scales, blocks, torch.float32) for scales in (absmax1, absmax2)), *tail,
        )  # fmt: skip

    return run


def int8_matmul(_context: Any, m: int, n: int, k: int, weight: Any, x: Any, out: Any, *_rest: Any) -> int:
    """cigemmlt_32: x (n, m) times the transpose of the weight (k, m), in int32."""
    weights, inputs = tensor_at(weight, k * m, torch.int8).view(k, m), tensor_at(x, n * m, torch.int8).view(n, m)
    tensor_at(out, n * k, torch.int32).view(n, k).copy_(torch.ops.bitsandbytes.int8_linear_matmul(inputs, weights))
    return 0


def int8_dequantize(a: Any, row_stats: Any, col_stats: Any, out: Any, bias: Any, rows: int, cols: int, _s: Any) -> None:
    """cdequant_mm_int32_fp16."""
    scales = tensor_at(row_stats, rows, torch.float32)[:, None] * tensor_at(col_stats, cols, torch.float32)[None]
    values = tensor_at(a, rows * cols, torch.int32).view(rows, cols) * (scales * INT8_SCALE)
    if bias:
        values += tensor_at(bias, cols, torch.float16).float()
    tensor_at(out, rows * cols, torch.float16).view(rows, cols).copy_(values)


def int8_quantize(a: Any, out: Any, stats: Any, threshold: float, rows: int, cols: int, _stream: Any) -> None:
    """cint8_vector_quant: each row by its largest number below the threshold."""
    values = tensor_at(a, rows * cols, torch.float16).view(rows, cols).float()
    if threshold > 0:
        values = values.masked_fill(values.abs() >= threshold, 0)
    largest = values.abs().amax(1)
    scaled = torch.round(values * (127.0 / largest.clamp_min(1e-30))[:, None])
    tensor_at(out, rows * cols, torch.int8).view(rows, cols).copy_(scaled)
    tensor_at(stats, rows, torch.float32).copy_(largest)


class ManagedMemory:
    """cget_managed_ptr: memory that card and CPU share, for paged optimizers. Never given back."""

    def __init__(self) -> None:
        self.held: list[mmap.mmap] = []

    def __call__(self, n_bytes: Any) -> int:
        self.held.append(mmap.mmap(-1, max(1, number(n_bytes))))
        return ctypes.addressof(ctypes.c_char.from_buffer(self.held[-1]))


def fill(dtype: torch.dtype) -> Callable[..., None]:
    """cfill_DTYPE."""
    return lambda a, _b, value, n: tensor_at(a, number(n), dtype).fill_(number(value))


PLAIN: dict[str, Callable[..., Any]] = {
    "cigemmlt_32": int8_matmul,
    "cdequant_mm_int32_fp16": int8_dequantize,
    "cint8_vector_quant": int8_quantize,
    "cget_managed_ptr": ManagedMemory(),
    "cprefetch": lambda *_: None,
    "cfill_fp32": fill(torch.float32),
    "cfill_uint8": fill(torch.uint8),
    "get_context": lambda: 1,
}
FAMILIES = (
    (re.compile(r"cdequantize_blockwise_([a-z0-9]+)(?:_(nf4|fp4))?"), dequantize),
    (re.compile(r"cquantize_blockwise_([a-z0-9]+)(?:_(nf4|fp4))?"), quantize),
    (re.compile(r"cgemm_4bit_([a-z0-9]+)(\b)"), gemm_4bit),
)
OPTIMIZERS = (
    (re.compile(r"c([a-z]+)32bit_grad_([a-z0-9]+)"), optimizer),
    (re.compile(r"c([a-z]+)_8bit_blockwise_grad_([a-z0-9]+)"), optimizer_8bit),
)
# In shapes-only mode nothing of more bytes than the limit is computed; these always are.
ALWAYS = ("cget_managed_ptr", "cprefetch", "get_context")


def stand_in(name: str) -> Callable[..., Any] | None:
    """The function of this name, or None for one that has no stand-in."""
    if name in PLAIN:
        return PLAIN[name]
    for pattern, make in FAMILIES:
        if found := pattern.fullmatch(name):
            return make(DTYPES[found[1]], found[2] or None)
    for pattern, make_optimizer in OPTIMIZERS:
        if found := pattern.fullmatch(name):
            return make_optimizer(found[1], DTYPES[found[2]])
    return None


class Function:
    """A function of the library; bitsandbytes sets the two attributes, which ctypes would use."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, name: str, native: Any) -> None:
        self.name, self.native, self.run = name, native, stand_in(name)

    def __call__(self, *arguments: Any) -> Any:
        if self.run is None:
            raise NotImplementedError(f"bitsandbytes' {self.name} has no stand-in on the simulated card")
        self.native.run_current_stream(self.native.current_device())
        if self.name not in ALWAYS and self.is_large(arguments):
            self.leave_ones(arguments)
            return 0
        return self.run(*arguments)

    def leave_ones(self, arguments: tuple[Any, ...]) -> None:
        """In place of a small product of matrices that was not computed, as the card's own operations do."""
        if self.name == "cigemmlt_32":
            address, count, dtype = arguments[6], arguments[2] * arguments[3], torch.int32
        elif self.name == "cdequant_mm_int32_fp16":
            address, count, dtype = arguments[3], arguments[5] * arguments[6], torch.float16
        elif self.name == "cint8_vector_quant":
            address, count, dtype = arguments[2], arguments[4], torch.float32
        elif self.name.startswith("cgemm_4bit_"):
            address, count, dtype = arguments[6], arguments[8] * arguments[9], DTYPES[self.name.split("_")[-1]]
        else:
            return
        if count * dtype.itemsize <= self.native.computed_bytes():
            tensor_at(address, count, dtype).fill_(1)

    def is_large(self, arguments: tuple[Any, ...]) -> bool:
        """Whether shapes-only mode leaves this call out: any product of matrices, else by its count of numbers."""
        limit = self.native.computed_bytes()
        if self.name.startswith(("cgemm", "cigemm", "cdequant_mm", "cint8")):
            return limit < EVERYTHING
        return max(n for n in map(number, arguments) if isinstance(n, int) and n < 1 << 31) > limit  # no addresses


class Library:
    """In the place of libbitsandbytes_cuda; what it does not know comes from the library for CPUs."""

    compiled_with_cuda = True

    def __init__(self, cpu_library: Any, native: Any) -> None:
        self._cpu_library, self._native = cpu_library, native
        self._functions: dict[str, Function] = {}

    def __getattr__(self, name: str) -> Any:
        if stand_in(name) is None and hasattr(self._cpu_library._lib, name):
            return getattr(self._cpu_library, name)
        return self._functions.setdefault(name, Function(name, self._native))


def supply_bitsandbytes(native: Any) -> None:
    """Give bitsandbytes its CUDA backend over the stand-ins. Its CPU backend keeps the library it was imported with."""
    import bitsandbytes.cextension as extension
    import bitsandbytes.functional as functional

    library: Any = Library(extension.lib, native)
    extension.lib = functional.lib = library
    functional._cuda_device_of = torch.cuda.device_of
    import bitsandbytes.backends.cuda.ops  # noqa: F401  # registers the operations for CUDA
