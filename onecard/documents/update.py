"""An index brought up to date with its folders: what is new or changed is read, what is gone is taken out.

A document that cannot be read is named with the reason and skipped; an older version of it stays. Killed at any moment,
the next start goes on. Knows files and the order of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onecard.console import first_line, say, warn
from onecard.data.documents import page_list
from onecard.data.values import UnusableRecord
from onecard.documents.chunks import chunks_of
from onecard.documents.index import EMBED_MODEL, DocumentIndex
from onecard.documents.reading import SUFFIXES, read_blocks
from onecard.documents.vectors import TextVectors, stored
from onecard.errors import DataError
from onecard.storage import sha256_of


@dataclass
class ReadingLimits:
    """chunk_size: most words, or Chinese characters, of a chunk. max_file_mib: larger files are skipped."""

    chunk_size: int
    max_file_mib: float


@dataclass
class UpdateCounts:
    """Documents that were read, were as before, could not be read, and are gone."""

    n_read: int = 0
    n_same: int = 0
    n_skipped: int = 0
    n_gone: int = 0


def update(index: DocumentIndex, paths: Sequence[Path], limits: ReadingLimits, embed_model: str = "") -> UpdateCounts:
    """Bring these files and folders into the index; without any, the folders that were added before.

    Raises DataError: a path is missing, or the model of the vectors does not load.
    """
    missing = [str(path) for path in paths if not path.expanduser().exists()]
    if missing:
        raise DataError("there is no such file or folder", missing[0])
    model = _vectors(index, embed_model)
    known = [Path(folder) for folder in index.folders()]
    given = [_place_of(path, known) for path in paths]
    index.folders([str(place) for place in given if place.is_dir()])
    places = given or known
    if not places:
        raise DataError("no folder was added yet; name one", str(index.path.parent))
    counts, versions = UpdateCounts(), {(each.folder, each.name): each.sha256 for each in index.documents()}
    for place in places:
        if not place.exists():
            warn(f"{place}: not there now; its documents stay as they are")
            continue
        seen = set()
        for folder, name, file in _files(place, counts):
            seen.add((folder, name))
            _put(index, (folder, name, file), versions.get((folder, name)), limits, model, counts)
        if place.is_dir():
            counts.n_gone += _remove_gone(index, str(place), seen)
    return counts


def _place_of(path: Path, known: Sequence[Path]) -> Path:
    """The whole path; of a folder that was added before, as it was named then: macOS takes names in other capitals."""
    place = path.expanduser().resolve()
    return next((folder for folder in known if folder.is_dir() and folder.samefile(place)), place)


def _vectors(index: DocumentIndex, embed_model: str) -> TextVectors | None:
    """The model of the index's vectors. Raises DataError, also where the index has others."""
    stored_name = index.setting(EMBED_MODEL)
    if embed_model and embed_model != stored_name and index.documents():
        has = f"vectors of {stored_name}" if stored_name else "no vectors"
        raise DataError(f"has {has}, and those of {embed_model} do not go with them; make another index",
                        str(index.path.parent))  # fmt: skip
    name = embed_model or stored_name
    model = TextVectors(name) if name else None
    index.setting(EMBED_MODEL, name)
    return model


def _files(place: Path, counts: UpdateCounts) -> Iterator[tuple[str, str, Path]]:
    """(folder, name, file) of every document; what is none, and links that lead out of the folder, are named."""
    if place.is_file():
        yield str(place.parent), place.name, place
        return
    others = 0
    for file in sorted(place.rglob("*")):
        name = file.relative_to(place).as_posix()
        if any(part.startswith(".") for part in file.relative_to(place).parts) or file.is_dir():
            continue
        if file.suffix.lower() not in SUFFIXES:
            others += 1
        elif not file.resolve().is_relative_to(place):
            warn(f"{name}: a link that leads out of the folder; add what it points to")
            counts.n_skipped += 1
        else:
            yield str(place), name, file
    if others:
        say(f"{place}: {others} files are none of {' '.join(SUFFIXES)}")


def _put(
    index: DocumentIndex, document: tuple[str, str, Path], sha256: str | None, limits: ReadingLimits,
    model: TextVectors | None, counts: UpdateCounts,
) -> None:  # fmt: skip
    """Read one document, if it is not as it was, and put it in."""
    folder, name, file = document
    try:
        new_sha256 = sha256_of(file)
        if new_sha256 == sha256:
            counts.n_same += 1
            return
        blocks = read_blocks(file, limits.max_file_mib)
    except (UnusableRecord, OSError) as reason:
        warn(f"{name}: {first_line(reason)}")
        counts.n_skipped += 1
        return
    pages = {block.page for block in blocks}
    if empty := tuple(number for number in range(1, max(pages) + 1) if number not in pages):
        warn(f"{name}: no text on the pages {page_list(empty)}")
    chunks = chunks_of(blocks, limits.chunk_size)
    vectors = stored(model.of([" ".join((*chunk.headings, chunk.text)) for chunk in chunks])) if model else None
    index.put(folder, name, new_sha256, chunks, vectors)
    counts.n_read += 1


def _remove_gone(index: DocumentIndex, folder: str, seen: set[tuple[str, str]]) -> int:
    gone = [each for each in index.documents() if each.folder == folder and (each.folder, each.name) not in seen]
    index.remove(gone)
    return len(gone)
