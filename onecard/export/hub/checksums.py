"""SHA-256 lists of a model directory, in the form of `sha256sum`: written once, checked after every copy.

Knows files, hashes and the two lists that prove them: SHA256SUMS and the manifest.json of runs and checkpoints. Does
not know what the files mean, nor the hashes that the Hub keeps (`download.py` does).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

from onecard.errors import ConfigError, DataError, ModelError
from onecard.export.io.output import new_file, progress
from onecard.installation import command
from onecard.manifest import MANIFEST, ManifestError, read_manifest
from onecard.storage import sha256_of

LIST = "SHA256SUMS"
UNFINISHED = (".partial", ".incomplete", ".part", ".tmp", ".crdownload", ".aria2")
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
UNESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
# <hash>, a blank, a blank (text) or an asterisk (binary), the name; and the older form of the BSDs.
LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
BSD_LINE = re.compile(r"(\\?)SHA256 \((.+)\) ?= ?([0-9a-fA-F]{64})", re.DOTALL)


@dataclass(frozen=True)
class WriteReport:
    """What `write` did: the list's place, how many files and bytes are in it, and the names that are not."""

    path: Path
    n_files: int
    n_bytes: int
    left_out: list[str]


@dataclass
class VerifyReport:
    """What `verify` found; all names are relative, with forward slashes. `extra` files are in no list."""

    source: str
    n_files: int = 0
    n_bytes: int = 0
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    def n_wrong(self, *, strict: bool = False) -> int:
        """Files that are not as listed; with `strict`, files that are in no list count, too."""
        return len(self.missing) + len(self.changed) + len(self.unreadable) + (len(self.extra) if strict else 0)


def write(directory: Path, *, overwrite: bool = False) -> WriteReport:
    """Hash every file under `directory` and write SHA256SUMS there; `sha256sum -c SHA256SUMS` reads it, too.

    Links to files are followed: the Hub's cache consists of them. Hidden and unfinished files are left out.

    Raises:
        ConfigError: the list exists already, and `overwrite` is false.
        ModelError: no directory, no files, a link to nowhere, a file that cannot be read, no room.
    """
    _need_directory(directory)
    target = directory / LIST
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise ConfigError("--overwrite", f"{target} exists already; add --overwrite to replace it, or verify it")
    files, left_out = _list_files(directory)
    files.pop(LIST, None)
    if not files:
        raise ModelError(f"{directory} holds no files to hash")
    broken = [name for name, path in files.items() if not path.is_file()]
    if broken:
        raise ModelError(f"{directory}/{broken[0]} is a link that leads nowhere; complete the directory first")
    with new_file(target, overwrite=overwrite) as partial:
        n_bytes = sum(path.stat().st_size for path in files.values())
        with progress("hashing", n_bytes, in_bytes=True) as moved:
            hashes = {name: sha256_of(path, moved) for name, path in files.items()}
        partial.write_bytes(b"".join(_line(name, digest) for name, digest in sorted(hashes.items())))
        if read_list(partial) != hashes:
            raise ModelError(f"{target} does not read back as it was written; is the disk in order?")
    return WriteReport(target, len(files), n_bytes, left_out)


def verify(directory: Path) -> VerifyReport:
    """Compare `directory` with its SHA256SUMS, or with its manifest.json where it has no such list.

    Raises:
        ModelError: no directory, no list, a damaged manifest.
        DataError: a line that is no hash and name, or a name outside of the directory: then nothing is read.
    """
    _need_directory(directory)
    if (directory / LIST).is_file():
        report, listed = VerifyReport(LIST), read_list(directory / LIST)
        sizes: Mapping[str, int] = {}
    elif (directory / MANIFEST).is_file():
        try:
            entries = read_manifest(directory)
            listed = {name: str(entry["sha256"]).lower() for name, entry in entries.items()}
            sizes = {name: int(entry["bytes"]) for name, entry in entries.items()}
        except (ManifestError, KeyError, TypeError, ValueError) as reason:
            raise ModelError(f"{directory}: {reason}; it proves nothing, so copy the directory again") from reason
        report = VerifyReport(MANIFEST)
        _refuse_outsiders(listed, directory / MANIFEST)
    else:
        raise ModelError(
            f"{directory} has neither {LIST} nor {MANIFEST} to compare with; `{command('checksums')} write` "
            f"makes a list of what is there now, `{command('download')}` compares with the Hub's own hashes"
        )
    _compare(directory, listed, sizes, report)
    report.extra = [name for name in _list_files(directory)[0] if name not in listed and name != report.source]
    return report


def read_list(path: Path) -> dict[str, str]:
    """The hashes in a SHA256SUMS file: relative name -> hex digest. Raises DataError with file and line."""
    listed: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        text = os.fsdecode(line.removesuffix(b"\r"))
        if not text.strip() or text.startswith("#"):
            continue
        name, digest = _read_line(text, path, number)
        if listed.get(name, digest) != digest:
            raise DataError(f"{name} is listed twice, with two hashes", str(path), number)
        listed[name] = digest
    if not listed:
        raise DataError("lists no files", str(path))
    _refuse_outsiders(listed, path)
    return listed


def is_inside(name: str) -> bool:
    """Whether a listed name stays below the directory of its list."""
    path = PurePath(name)
    return bool(path.parts) and ".." not in path.parts and not path.anchor and "\0" not in name


def _compare(directory: Path, listed: Mapping[str, str], sizes: Mapping[str, int], report: VerifyReport) -> None:
    there = {name: directory / name for name in sorted(listed) if (directory / name).is_file()}
    report.n_files, report.missing = len(listed), sorted(listed.keys() - there.keys())
    report.n_bytes = sum(path.stat().st_size for path in there.values())
    with progress("verifying", report.n_bytes, in_bytes=True) as moved:
        for name, path in there.items():
            try:
                # The size alone tells most damage, at once.
                wrong_size = path.stat().st_size != sizes.get(name, path.stat().st_size)
                is_wrong = wrong_size or sha256_of(path, moved) != listed[name]
                report.changed += [name] if is_wrong else []
            except OSError:
                report.unreadable.append(name)


def _list_files(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """Files by relative name, sorted, and the names that are left out: hidden, unfinished, and what is no file."""
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for folder, folders, names in os.walk(directory, onerror=_refuse_folder):
        here = Path(folder)
        left_out += [f"{(here / name).relative_to(directory).as_posix()}/" for name in folders if not _is_wanted(name)]
        # A link to a folder may lead round in a circle, and is no file.
        left_out += [(here / name).relative_to(directory).as_posix() for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if _is_wanted(name)]
        for name in names:
            path = here / name
            relative = path.relative_to(directory).as_posix()
            if _is_wanted(name) and (path.is_file() or path.is_symlink()):
                files[relative] = path
            else:
                left_out.append(relative)
    return dict(sorted(files.items())), sorted(set(left_out))


def _refuse_folder(reason: OSError) -> None:
    raise ModelError(f"{reason.filename} cannot be read: {reason.strerror}") from reason


def _is_wanted(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(UNFINISHED)


def _line(name: str, digest: str) -> bytes:
    escaped = "".join(ESCAPES.get(letter, letter) for letter in name)
    mark = "\\" if escaped != name else ""
    return os.fsencode(f"{mark}{digest}  {escaped}\n")


def _read_line(text: str, path: Path, number: int) -> tuple[str, str]:
    if match := LINE.fullmatch(text):
        is_escaped, digest, name = match.groups()
    elif match := BSD_LINE.fullmatch(text):
        is_escaped, name, digest = match.groups()
    else:
        raise DataError(f"is no line of a SHA-256 list: {text[:80]!r}", str(path), number)
    if is_escaped:
        name = re.sub(r"\\[\\nr]", lambda found: UNESCAPES[found[0]], name)
    return PurePosixPath(name).as_posix(), digest.lower()


def _refuse_outsiders(names: Iterable[str], path: Path) -> None:
    for name in names:
        if not is_inside(name):
            raise DataError(
                f"names {name!r}, which is outside of its directory; the list is not to be trusted", str(path)
            )


def _need_directory(directory: Path) -> None:
    if not directory.is_dir():
        what = "is a file" if directory.is_file() else "does not exist"
        raise ConfigError("--model_path", f"{directory} {what}; give the directory that holds the files")
