"""Where an export is written: beside its target under another name, and renamed only once it is whole and durable.

Knows directories, free space and progress. Does not know what is in the files.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from onecard.config.problems import Problem
from onecard.console import first_line, say
from onecard.errors import ConfigError, ModelError
from onecard.manifest import content_files
from onecard.storage import is_disk_full, move, sync_directory, sync_file

OUTPUT_FLAG = "--output_path"
SHARD_FLAG = "--max_shard_size"
LINE_SECONDS = 20.0  # between two lines of progress where there is no terminal
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass
class OutputOptions:
    """The options of every program that writes a new directory."""

    output_path: str = ""
    """A new directory for the result."""
    overwrite: bool = False
    """Replace what is at --output_path."""

    @property
    def target(self) -> Path:
        return Path(self.output_path)


@dataclass
class ShardOptions:
    """How the weights of a model are cut into files."""

    max_shard_size: str = "5GB"
    """Largest weight file, such as 5GB or 500MB; also what is held in memory."""

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes. Raises ConfigError."""
        return parse_size(self.max_shard_size)

    def problems(self) -> list[Problem]:
        try:
            parse_size(self.max_shard_size)
        except ConfigError as reason:
            return [(SHARD_FLAG, str(reason).removeprefix(f"{SHARD_FLAG}: "))]
        return []


@dataclass
class ShardedOutputOptions(ShardOptions, OutputOptions):
    """Those of a program that writes the weights of a model into a new directory."""


@contextmanager
def new_directory(
    target: Path, *, overwrite: bool = False, inputs: Sequence[Path] = (), needed_bytes: int = 0
) -> Iterator[Path]:
    """Give an empty hidden directory beside `target`; it takes the target's name when the `with` block ends well.

    Whatever happens in between (an error, Ctrl-C, a kill, a full disk, a power cut), `target` is absent, or whole, or
    what it was before. A directory that a killed start left behind is removed by the next one.

    Args:
        inputs: directories and files that are read meanwhile; a target that holds one of them is refused.
        needed_bytes: about what will be written; refused at once where the disk has less.

    Raises:
        ConfigError: the target exists and `overwrite` is false, is a file, is or holds an input, or another export
            writes it.
        ModelError: no room or no right to write.
    """
    target = _plain(target)
    if target.is_file():
        raise ConfigError(OUTPUT_FLAG, f"{target} is a file; give a directory")
    with _staged(target, overwrite, inputs, needed_bytes) as partial:
        partial.mkdir(parents=True)
        yield partial


@contextmanager
def new_file(target: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """The same for one file: gives the hidden path to write to. Raises as `new_directory` does."""
    target = _plain(target)
    if target.is_dir():
        raise ConfigError(OUTPUT_FLAG, f"{target} is a directory; give the name of a file")
    with _staged(target, overwrite, inputs, needed_bytes=0) as partial:
        yield partial


def _plain(target: Path) -> Path:
    """The absolute path, without `..` and `~`."""
    with contextlib.suppress(RuntimeError):  # ~ and a name that is no user's: then it is a file name
        target = target.expanduser()
    target = target.absolute()
    target = target.resolve() if ".." in target.parts else target
    if not target.name:
        raise ConfigError(OUTPUT_FLAG, f"{target} is a whole disk; give a directory of its own")
    return target


@contextmanager
def _staged(target: Path, overwrite: bool, inputs: Sequence[Path], needed_bytes: int) -> Iterator[Path]:
    # Imported here: it costs time, and --help goes through this module.
    from filelock import FileLock, Timeout

    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    with _full_disk_explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as reason:  # it is an OSError, so it is told in here
            if not Path(lock.lock_file).exists():  # nobody holds it: it cannot be made
                raise ModelError(
                    f"{target} cannot be written: its folder takes no files; give another place"
                ) from reason
            raise ConfigError(OUTPUT_FLAG, f"{target} is being written by another process; wait for it") from reason
    try:
        with _full_disk_explained(target):
            _tidy(target, partial, old)
            _check_target(target, overwrite, inputs)
            _check_disk_space(target, needed_bytes)
            try:
                yield partial
                _make_durable(partial)
                _publish(partial, target, old)
            finally:
                _tidy(target, partial, old)
    finally:
        # Removed while it is held: once released, it may be another process's already. (Windows removes it itself.)
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _tidy(target: Path, partial: Path, old: Path) -> None:
    """Clear what a start that ended half-way left behind. `old` is what stood at `target` while it was replaced."""
    _remove(partial)
    if _is_there(old):
        if _is_there(target):
            _remove(old)
        else:
            move(old, target)


def _check_target(target: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    places = [Path.cwd(), Path.home(), *(path.expanduser().absolute() for path in inputs)]
    if any(_holds(target, place.resolve()) for place in places):
        raise ConfigError(OUTPUT_FLAG, f"{target} is or holds what is read here; give a directory of its own")
    is_empty = target.is_dir() and not any(target.iterdir())
    if _is_there(target) and not overwrite and not is_empty:
        raise ConfigError(OUTPUT_FLAG, f"{target} exists already; give another place, or add --overwrite")


def _holds(target: Path, place: Path) -> bool:
    """Whether `place` is the target or lies in it, however their names are spelled."""
    if place.is_relative_to(target.resolve()):
        return True
    # On macOS Merged and merged are one folder, and resolve() keeps the spelling that was typed.
    return target.exists() and any(each.exists() and each.samefile(target) for each in (place, *place.parents))


def _is_there(path: Path) -> bool:
    """Whether the name is taken, be it by a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def free_disk_bytes(path: Path) -> int:
    """Free room on the disk of a path that need not exist yet."""
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def _check_disk_space(target: Path, needed_bytes: int) -> None:
    free_bytes = free_disk_bytes(target.parent)
    if needed_bytes > free_bytes:
        raise ModelError(
            f"{target} needs about {needed_bytes / 2**30:.2f} GiB, and its disk has {free_bytes / 2**30:.2f} GiB free; "
            "make room or give a place on another disk"
        )


def _make_durable(partial: Path) -> None:
    if partial.is_file():
        sync_file(partial)
        return
    for path in content_files(partial):
        # safetensors lets nobody but their owner read its files; a server that runs under another name must, too.
        path.chmod(partial.stat().st_mode & 0o666)
        sync_file(path)
    for folder in (path for path in partial.rglob("*") if path.is_dir()):
        sync_directory(folder)
    sync_directory(partial)


def _publish(partial: Path, target: Path, old: Path) -> None:
    """Put the new one in place of what was there, if anything: at every moment one of the two is whole."""
    if target.is_dir() or (partial.is_dir() and _is_there(target)):
        move(target, old)
    move(partial, target)
    sync_directory(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _full_disk_explained(target: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as reason:
        if is_disk_full(reason):
            raise ModelError(
                f"no room for {target}: the disk is full or takes no files ({first_line(reason)}); "
                "nothing was left behind there, make room and start again"
            ) from reason
        if isinstance(reason, OSError):
            # What is read meanwhile can fail, too: then its name is the one to tell.
            place = f" ({reason.filename})" if reason.filename else ""
            raise ModelError(f"{target} cannot be written: {reason.strerror or reason}{place}") from reason
        raise


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB, 500MB or 2GiB (B, KB, ... of 1000, KiB, ... of 1024). Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    n_bytes = int(Decimal(match[1]) * UNITS[match[2] or ""]) if match else 0
    if n_bytes < 1:
        raise ConfigError(SHARD_FLAG, f"{text!r} is no size; write it like 5GB, 500MB or 2GiB")
    return n_bytes


@contextmanager
def progress(what: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], Any]]:
    """A progress bar on a terminal, and in a log file a line now and then; gives the function that moves it on."""
    from tqdm import tqdm

    unit: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if in_bytes else {"unit": "step"}
    with tqdm(total=total, desc=what, disable=None, leave=False, **unit) as bar:
        yield _by_lines(what, total, in_bytes=in_bytes) if bar.disable else bar.update


def _by_lines(what: str, total: int, *, in_bytes: bool) -> Callable[[int], Any]:
    # Kept from now, because a library that speaks too much may be kept off standard output meanwhile.
    stream, done, printed_at = sys.stdout, 0, time.monotonic()

    def move_on(n: int) -> None:
        nonlocal done, printed_at
        done += n
        if time.monotonic() - printed_at >= LINE_SECONDS:
            printed_at = time.monotonic()
            amount = f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB" if in_bytes else f"{done} of {total}"
            with contextlib.redirect_stdout(stream):
                say(f"{what}: {amount}")

    return move_on
