"""The tensors of a model directory: read one at a time, written in shards, never all in memory.

Knows safetensors, their index, and pickled weights of older models (read as plain tensors, mapped from the disk). Does
not know what the tensors mean.
"""

from __future__ import annotations

import contextlib
import mmap
import pickle
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onecard.console import first_line
from onecard.errors import ModelError
from onecard.manifest import MANIFEST
from onecard.model.files import check_weights, read_json, safetensors_header, write_json
from onecard.storage import move

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
LISTS_OF_FILES = (MANIFEST, "SHA256SUMS")  # true of the directory they were written for only
READ_BYTES = 2**20  # at once, where a file is only looked through
PAGED_BYTES = 2**20  # from here on a tensor has pages of its own

# What torch.load raises for files that were cut or have flipped bits, found by cutting and flipping.
UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, AssertionError, TypeError),
    *(struct.error, OverflowError),
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its file's header tells it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights:
    """The tensors of one model directory, by name in the order of their files.

    >>> weights = open_weights(directory)
    >>> for name, tensor in weights: ...        # one file is open at a time; each tensor owns its memory
    """

    def __init__(self, directory: Path, entries: dict[str, TensorEntry]) -> None:
        self.directory, self.entries = directory, entries
        self._file: Path | None = None
        self._open: Any = None

    @property
    def total_bytes(self) -> int:
        return sum(entry.n_bytes for entry in self.entries.values())

    @property
    def largest_file_bytes(self) -> int:
        """Size of the largest weight file: what "one shard" means for this model."""
        return max(file.stat().st_size for file in {entry.file for entry in self.entries.values()})

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its own memory. Raises ModelError when the model has none of this name."""
        tensor = self.mapped(name)
        return own_memory(tensor.shape, tensor.dtype).copy_(tensor)

    def mapped(self, name: str) -> Tensor:
        """The same as it lies in the file: not to be changed, nor kept beyond `close`."""
        if name not in self.entries:
            raise ModelError(f"{self.directory} has no tensor {name}")
        entry = self.entries[name]
        if entry.file != self._file:
            self.close()
            self._open = _open_file(entry.file)
            self._file = entry.file
        try:
            tensor: Tensor = self._open[name] if isinstance(self._open, dict) else self._open.get_tensor(name)
        except SafetensorError as reason:
            raise _unreadable(entry.file, reason) from reason
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.entries:
            yield name, self.read(name)
        self.close()

    def close(self) -> None:
        """Let go of the open file, so that it can be replaced on Windows and its pages leave the memory."""
        self._file = self._open = None


def open_weights(directory: Path) -> Weights:
    """Look at a model directory's weights without loading them.

    Raises ModelError: no weights, missing shards, truncated or damaged files, code in a pickle, one name twice.
    """
    entries: dict[str, TensorEntry] = {}
    for file in check_weights(directory):
        for entry in _entries_of(file):
            if entry.name in entries:
                raise ModelError(
                    f"{directory} holds {entry.name} twice: in {entries[entry.name].file.name}, {file.name}"
                )
            entries[entry.name] = entry
    _check_index(directory, entries)
    if not entries:
        raise ModelError(f"{directory} holds weight files without a tensor in them; copy or download them again")
    return Weights(directory, entries)


def own_memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of any values; a large one in pages of its own, which the system has back as soon as it is dropped.

    glibc does not use freed aligned blocks again: read one after the other, the tensors of a model left its heap as
    large as the whole model (6 GB where 1.9 GB were in use). Private and in huge pages, because a shared page costs a
    fault for each 4 KiB: filling 48 MB took 42 ms so, and takes 13 ms.
    """
    n_bytes = shape.numel() * dtype.itemsize
    if n_bytes < PAGED_BYTES:
        return torch.empty(shape, dtype=dtype)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANON} if sys.platform != "win32" else {}
    pages = mmap.mmap(-1, n_bytes, **private)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).reshape(shape)


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped from the disk where its format allows. Raises ModelError.

    Code inside is refused and nothing of it runs. https://docs.pytorch.org/docs/stable/generated/torch.load.html
    """
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as reason:
        raise ModelError(
            f"{file} is refused: it is no plain pickle of tensors but holds code, or it is damaged. Nothing in it was "
            "run; ask its author for safetensors"
        ) from reason
    except UNREADABLE as reason:
        raise _unreadable(file, reason) from reason
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{file} holds something else than named tensors")
    return {str(name): tensor.detach() for name, tensor in content.items()}


class ShardWriter:
    """Writes tensors into safetensors files of at most `max_shard_bytes` each, with the index that names them.

    Holds one shard in memory. `add` copies nothing that is contiguous already, but what shares its memory with another
    (tied weights, pieces of one tensor). Names of files are those of the Hub: model.safetensors, or
    model-00001-of-00003.safetensors and model.safetensors.index.json. The header of a file, some KB, comes on top.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes, self._total_bytes = 0, 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._storages: set[int] = set()  # where the held tensors lie

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; a full shard goes to the disk first. A tensor larger than a shard gets its own.

        Raises ModelError for a name that was there before.
        """
        if name in self._names:
            raise ModelError(f"{name} would be written twice into {self.directory}; the model names two tensors alike")
        self._names.add(name)
        if self._held and self._held_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        held = tensor.detach().cpu().contiguous()
        storage = held.untyped_storage()
        if storage.nbytes() > held.nbytes or storage.data_ptr() in self._storages:
            held = held.clone()  # a view would keep all of its tensor alive, and safetensors refuses shared memory
        self._storages.add(held.untyped_storage().data_ptr())
        self._held[name] = held
        self._held_bytes += tensor.nbytes

    def finish(self) -> list[Path]:
        """Write the last shard and the index; returns the weight files. Raises ModelError when there is no tensor."""
        self._flush()
        n = len(self._shards)
        if n == 0:
            raise ModelError(f"there is no tensor to write into {self.directory}")
        if n == 1:
            move(self.directory / _unfinished(0), self.directory / "model.safetensors")
            return [self.directory / "model.safetensors"]
        names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        for i, name in enumerate(names):
            move(self.directory / _unfinished(i), self.directory / name)
        weight_map = {tensor: name for name, held in zip(names, self._shards, strict=True) for tensor in held}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.directory / "model.safetensors.index.json", index)
        return [self.directory / name for name in names]

    def _flush(self) -> None:
        if not self._held:
            return
        file = self.directory / _unfinished(len(self._shards))
        save_file(self._held, file, metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._total_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0
        self._storages = set()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """True when shape, kind of number and every bit agree (so NaN equals itself and 0.0 differs from -0.0)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, in about the time that copying it takes."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def stored_checksums(directory: Path) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and CRC-32 of each tensor in a directory's safetensors, read from the disk piece by piece."""
    for file in check_weights(directory):
        tensors = {name: entry for name, entry in safetensors_header(file).items() if name != "__metadata__"}
        with file.open("rb", buffering=0) as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in tensors.items():
                first, last = entry["data_offsets"]
                stream.seek(start + first)
                yield name, last - first, _crc_of(stream, last - first)


def _crc_of(stream: RawIOBase, n_bytes: int) -> int:
    """CRC-32 of what follows in a file; of less where the file ends before."""
    piece, crc = memoryview(bytearray(min(READ_BYTES, n_bytes))), 0
    while n_bytes and (n := stream.readinto(piece[:n_bytes])):
        crc, n_bytes = zlib.crc32(piece[:n], crc), n_bytes - n
    return crc


def copy_small_files(source: Path, target: Path) -> list[str]:
    """Copy what lies beside the weights (configs, tokenizer, templates, licence, code); returns the names."""
    copied = []
    for file in sorted(source.iterdir()):
        is_small = file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHT_SUFFIXES)
        if is_small and file.name not in LISTS_OF_FILES:
            shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    return copied


def _entries_of(file: Path) -> list[TensorEntry]:
    if file.suffix != ".safetensors":
        return [TensorEntry(name, file, tuple(t.shape), t.dtype) for name, t in read_pickled(file).items()]
    header = {name: entry for name, entry in safetensors_header(file).items() if name != "__metadata__"}
    _open_file(file)  # the library checks shapes, offsets and names against one another
    unknown = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
    if unknown:
        raise ModelError(f"{file} holds numbers of the kind {', '.join(unknown)}, which are not known here")
    in_order = sorted(header, key=lambda name: header[name]["data_offsets"])
    return [TensorEntry(name, file, tuple(header[name]["shape"]), DTYPES[header[name]["dtype"]]) for name in in_order]


def _check_index(directory: Path, entries: dict[str, TensorEntry]) -> None:
    """Raise ModelError where the index names tensors that its files do not hold, as after a mixed-up copy."""
    files = {entry.file for entry in entries.values()}
    kind = "model.safetensors" if any(file.suffix == ".safetensors" for file in files) else "pytorch_model.bin"
    index = directory / f"{kind}.index.json"
    if files == {directory / kind} or not index.is_file():
        return
    missing = sorted(map(str, read_json(index)["weight_map"].keys() - entries.keys()))
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} tensors that {index.name} names, such as {missing[0]}; copy or download "
            "its weight files again"
        )


def _open_file(file: Path) -> Any:
    if file.suffix != ".safetensors":
        return read_pickled(file)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as reason:
        raise _unreadable(file, reason) from reason


def _unreadable(file: Path, reason: Exception) -> ModelError:
    return ModelError(f"{file} is damaged ({first_line(reason)}); copy or download it again")


def _unfinished(number: int) -> str:
    return f".shard-{number:05d}.safetensors"
