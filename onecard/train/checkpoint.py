"""Checkpoints that are there whole or not at all.

    run/checkpoint-12/                   whole: every file and a manifest with its size and SHA-256
    run/.checkpoint-12.partial-4711/     being written
    run/.checkpoint-12.replaced-4711/    the old one while a step is saved a second time
    run/.checkpoint-8.deleted-4711/      being removed
    run/checkpoint-12.broken/            damaged, set aside by a resume

The store handles directories and bytes; what is in the files is the business of whoever passes `write`. It imports no
torch. Whoever uses it holds the :class:`onecard.train.run_lock.RunLock` of the run directory: so every hidden directory
found at the start was left by a process that is dead, whatever has its number today.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from onecard import manifest, storage
from onecard.console import warn
from onecard.errors import CheckpointError

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_SET_ASIDE = re.compile(r"checkpoint-\d+\.broken(-\d+)?")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final)\.(partial|deleted)-\d+")
_REPLACED = re.compile(r"\.(checkpoint-\d+)\.replaced-\d+")
MIN_KEPT = 2


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint to go on from."""

    path: Path
    step: int
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Newer checkpoints that are broken, newest first: (name it has now, reason)."""


class CheckpointStore:
    """The checkpoints of one run directory. Only the holder of its RunLock may use it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        best_steps: Sequence[int | None] = (),
        keep_last: int = MIN_KEPT,
    ) -> Path:
        """Save one checkpoint and remove those that are no longer needed; returns its directory.

        `write(directory)` writes the files. The last `keep_last` checkpoints (never fewer than two) and `best_steps`
        stay; nothing goes before the new one has been read back and verified.

        Raises: CheckpointError when the disk refuses (`disk_full` tells whether for want of room or rights); the
        partial is gone then and all older checkpoints are untouched. Other errors of `write` pass through.
        """
        target = self.run_dir / f"checkpoint-{step}"
        partial = self._hidden(target.name, "partial")
        try:
            self._write_sealed(partial, write)
            self._put_in_place(partial, target)
        except BaseException as reason:
            shutil.rmtree(partial, ignore_errors=True)
            self._raise_as_checkpoint_error(reason, target)
            raise
        broken = manifest.problems(target)
        if broken:
            aside = self._set_aside(target)
            self._restore_replaced()
            raise CheckpointError(
                f"{target} was written but reads back differently: {'; '.join(broken)}. It is kept as {aside.name}; "
                "older checkpoints are untouched. Check the disk."
            )
        self.rotate(step, best_steps, keep_last)
        return target

    def newest_whole(self) -> FoundCheckpoint | None:
        """The newest checkpoint whose every byte is as it was written, or None where there never was one.

        Tidies up first what a killed run left. Broken checkpoints newer than the one found are renamed to
        `checkpoint-N.broken`.

        Raises: CheckpointError when there are checkpoints but none is whole; nothing is renamed then, so that the same
        command does not start from zero when it is given again.
        """
        self.tidy()
        broken: list[tuple[Path, str]] = []
        for step, path in sorted(self._checkpoints().items(), reverse=True):
            reasons = manifest.problems(path)
            if not reasons:
                return FoundCheckpoint(
                    path, step, [(self._set_aside_if_possible(bad).name, why) for bad, why in broken]
                )
            broken.append((path, "; ".join(reasons)))
        earlier = sorted(path for path in self._entries() if _SET_ASIDE.fullmatch(path.name))
        broken.extend((path, "was found broken earlier") for path in earlier)
        if not broken:
            return None
        listed = "\n".join(f"  {path.name}: {why}" for path, why in broken)
        raise CheckpointError(
            f"No checkpoint in {self.run_dir} is whole:\n{listed}\n"
            "Restore one from a backup, or begin anew with another --output_path."
        )

    def newest_steps(self, number: int) -> list[int]:
        """The steps of the newest so many checkpoints that are whole, in order; fewer where there are not so many."""
        newest = sorted(self._checkpoints().items(), reverse=True)
        whole = (step for step, path in newest if not manifest.problems(path))
        return sorted(islice(whole, number))  # no further one is read

    def set_aside_newer(self, step: int) -> list[str]:
        """Rename checkpoints after `step` to `.abandoned`: a run that goes on from `step` shall not find them again.

        For `--resume_from_checkpoint DIR` of an older step in the same run. Returns the new names, oldest first.
        """
        newer = sorted((number, path) for number, path in self._checkpoints().items() if number > step)
        return [self._set_aside(path, "abandoned").name for _, path in newer]

    def publish(self, write: Callable[[Path], None]) -> None:
        """Put the final files into the run directory itself: each one atomically, their manifest last.

        A kill in between leaves files that the manifest in place does not fit, which `verify(run_dir)` tells; the next
        run publishes again. Raises: as `save`.
        """
        partial = self._hidden("final", "partial")
        try:
            self._write_sealed(partial, write)
            for path in [*manifest.content_files(partial), partial / manifest.MANIFEST]:
                final = self.run_dir / path.relative_to(partial)
                final.parent.mkdir(parents=True, exist_ok=True)
                storage.move(path, final)
                storage.sync_directory(final.parent)
        except BaseException as reason:
            self._raise_as_checkpoint_error(reason, self.run_dir)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        broken = manifest.problems(self.run_dir)
        if broken:
            raise CheckpointError(f"{self.run_dir} reads back differently: {'; '.join(broken)}. Check the disk.")

    def tidy(self) -> None:
        """Remove what a killed run left half-written, and bring back what it was about to replace."""
        self._restore_replaced()
        for path in self._entries():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif storage.is_abandoned(path):
                path.unlink(missing_ok=True)

    def _write_sealed(self, partial: Path, write: Callable[[Path], None]) -> None:
        if partial.exists():  # in a container every run may have the same process id
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        write(partial)
        manifest.seal(partial)

    def _put_in_place(self, partial: Path, target: Path) -> None:
        """Rename `partial` to `target`; an older `target` steps aside first and is brought back after a kill."""
        replaced = None
        if target.exists():
            replaced = self._hidden(target.name, "replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            storage.move(target, replaced)
        try:
            storage.move(partial, target)
        except BaseException:
            if replaced is not None:
                storage.move(replaced, target)
            raise
        storage.sync_directory(self.run_dir)

    def _restore_replaced(self) -> None:
        """Bring back the old checkpoint of a step where the new one did not arrive whole; else let the old one go."""
        for old in self._entries():
            match = _REPLACED.fullmatch(old.name)
            if match is None:
                continue
            target = self.run_dir / match[1]
            if target.exists() and manifest.problems(target):
                self._set_aside(target)
            if target.exists():
                self._remove(old, target.name)
            else:
                storage.move(old, target)

    def rotate(self, newest_step: int, best_steps: Sequence[int | None], keep_last: int) -> None:
        """Remove old checkpoints: none that is the newest, a best one, or among the last `keep_last` usable ones.

        Never fewer than two of these stay.
        """
        self._restore_replaced()
        keep_last = max(MIN_KEPT, keep_last)
        kept = [newest_step, *best_steps]
        n_last = 0
        for step, path in sorted(self._checkpoints().items(), reverse=True):
            # One that lost a file is no reserve; it neither counts nor goes, the next resume tells of it.
            is_reserve = not manifest.problems(path, sizes_only=True)
            n_last += is_reserve
            if is_reserve and n_last > keep_last and step not in kept:
                self._remove(path, path.name)

    def _remove(self, path: Path, name: str) -> None:
        # Hidden first, in one move: a half-removed directory must not pass for a broken checkpoint.
        hidden = self._hidden(name, "deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            storage.move(path, hidden)
        except OSError as reason:  # the new checkpoint is safe already; this one only takes room
            warn(f"{path} is no longer needed but cannot be removed ({reason})")
        shutil.rmtree(hidden, ignore_errors=True)

    def _set_aside_if_possible(self, path: Path) -> Path:
        try:
            return self._set_aside(path)
        except OSError as reason:
            warn(f"{path} is broken but cannot be renamed ({reason})")
            return path

    def _set_aside(self, path: Path, word: str = "broken") -> Path:
        number = 1
        aside = path.with_name(f"{path.name}.{word}")
        while os.path.lexists(aside):
            number += 1
            aside = path.with_name(f"{path.name}.{word}-{number}")
        storage.move(path, aside)
        return aside

    def _checkpoints(self) -> dict[int, Path]:
        matches = ((_NAME.fullmatch(path.name), path) for path in self._entries())
        return {int(match[1]): path for match, path in matches if match}

    def _entries(self) -> list[Path]:
        return sorted(self.run_dir.iterdir()) if self.run_dir.is_dir() else []

    def _hidden(self, name: str, state: str) -> Path:
        return self.run_dir / f".{name}.{state}-{os.getpid()}"

    def _raise_as_checkpoint_error(self, reason: BaseException, target: Path) -> None:
        no_room = isinstance(reason, Exception) and storage.is_disk_full(reason)
        if isinstance(reason, CheckpointError) or not (no_room or isinstance(reason, OSError)):
            return
        todo = "Make room there or give another --output_path" if no_room else "Check the disk and your right to write"
        raise CheckpointError(
            f"{target} could not be saved ({str(reason)[:200]}). What was saved before is untouched. {todo}.",
            disk_full=no_room,
        ) from reason


def verify(path: Path, *, require_manifest: bool = True) -> list[str]:
    """What is wrong with a checkpoint or run directory; an empty list means that it can be used.

    Older layouts have no manifest: with `require_manifest=False` such a directory is accepted, with a warning that
    nothing could be compared, unless it holds no file at all or an empty one.
    """
    path = Path(path)
    if require_manifest or not path.is_dir() or (path / manifest.MANIFEST).exists():
        return manifest.problems(path)
    files = list(manifest.content_files(path))
    if not files:
        return ["holds no files"]
    empty = [f"{file.name} is empty" for file in files if file.stat().st_size == 0]
    if not empty:
        warn(f"{path} has no {manifest.MANIFEST} (an older layout): damage in its {len(files)} files cannot be seen")
    return empty
