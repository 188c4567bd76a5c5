"""Write the SHA-256 list of a model directory, or verify the directory against its list.

onecard checksums write --model_path outputs/merged
onecard checksums verify --model_path outputs/merged
The list is SHA256SUMS; `sha256sum -c SHA256SUMS` reads it as well. Runs and checkpoints are verified by their
manifest.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onecard.config.parsing import parse_verb
from onecard.config.problems import Problem
from onecard.console import say, warn
from onecard.errors import ModelError

N_NAMED = 20


@dataclass
class WriteChecksumsOptions:
    """Hash every file of a directory into SHA256SUMS."""

    model_path: str = ""
    """Directory whose files are hashed, those in folders below it, too; the list is written into it."""
    overwrite: bool = False
    """Replace the list where there is one."""

    def problems(self) -> list[Problem]:
        return _path_problems(self.model_path)


@dataclass
class VerifyChecksumsOptions:
    """Compare a directory with its SHA256SUMS or manifest.json."""

    model_path: str = ""
    """Directory that holds the list and the files: a model, a run or a checkpoint."""
    strict: bool = False
    """Files that are in no list are an error, too."""
    json: bool = False
    """Print one JSON object instead of text."""

    def problems(self) -> list[Problem]:
        return _path_problems(self.model_path)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    verb, options = parse_verb(
        {"write": WriteChecksumsOptions, "verify": VerifyChecksumsOptions}, argv, description=__doc__ or ""
    )
    if verb == "write":
        write_list(options)
    else:
        verify_list(options)


def write_list(options: WriteChecksumsOptions) -> None:
    """Write the list and say what is in it."""
    from onecard.export.hub.checksums import write

    done = write(Path(options.model_path).expanduser(), overwrite=options.overwrite)
    say(f"{done.path}: {done.n_files} files, {done.n_bytes:,} bytes")
    if done.left_out:
        say(f"left out, as hidden or unfinished: {_named(done.left_out)}")


def verify_list(options: VerifyChecksumsOptions) -> None:
    """Say what differs. Raises ModelError when anything does."""
    from onecard.export.hub.checksums import verify

    report = verify(Path(options.model_path).expanduser())
    n_wrong = report.n_wrong(strict=options.strict)
    if options.json:
        say(json.dumps({"model_path": options.model_path, "ok": not n_wrong, **asdict(report)}, indent=1))
    else:
        _say_report(report)
    if n_wrong:
        raise ModelError(
            f"{options.model_path} is not what {report.source} says: {n_wrong} of its files are wrong; "
            "copy or download these again"
        )
    if not options.json:
        say(f"all {report.n_files} files ({report.n_bytes:,} bytes) are what {report.source} says")


def _say_report(report: Any) -> None:
    for what in ("missing", "changed", "unreadable"):
        for name in getattr(report, what)[:N_NAMED]:
            say(f"{what:<10}  {name}")
        if len(getattr(report, what)) > N_NAMED:
            say(f"{what:<10}  ... and {len(getattr(report, what)) - N_NAMED} more; --json names all")
    if report.extra:
        warn(f"not in {report.source}: {_named(report.extra)}")


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _path_problems(model_path: str) -> list[Problem]:
    return [] if model_path else [("--model_path", "is missing; give the directory that holds the files")]
