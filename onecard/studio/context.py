"""What every part of the studio is given: the folders it may use, the jobs it may start. Knows no routes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onecard.config.studio import StudioOptions
from onecard.installation import SHIPPED
from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.events import EventHub
from onecard.studio.jobs import Jobs

OWN_FOLDER = ".studio"  # in the output root: queue, jobs, uploads
UPLOADS, JOBS = "uploads", "jobs"


@dataclass(frozen=True)
class StudioContext:
    """All paths are resolved. `data_roots` are read; `output_root` is read and written; uploads lie in it."""

    data_roots: tuple[Path, ...]
    output_root: Path
    upload_root: Path
    upload_max_bytes: int
    jobs: Jobs
    events: EventHub

    @property
    def readable(self) -> tuple[Path, ...]:
        """Every root that may be read."""
        return (*self.data_roots, self.output_root)

    @staticmethod
    def safe_path(text: str, roots: Iterable[Path]) -> Path:
        """The path of a text from the browser, resolved with its links; it need not exist.

        A relative one is looked for in each root, then taken as one in the first. Raises ApiError (400, 403).
        """
        roots = tuple(roots)
        if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > 4096:
            raise bad_request("this is no path", code="bad_path")
        try:
            given = Path(text)
            places = [given] if given.is_absolute() else [root / given for root in roots]
            found = [place.resolve() for place in places]
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name that the system cannot have
            raise bad_request("this is no path", code="bad_path") from None
        allowed = [path for path in found if any(path.is_relative_to(root) for root in roots)]
        if not allowed:
            listed = ", ".join(map(str, roots))
            raise ApiError(403, f"{text} lies outside {listed}; start the studio with --data_root to read elsewhere",
                           code="outside_roots")  # fmt: skip
        return next((path for path in allowed if path.exists()), allowed[0])


def open_context(options: StudioOptions) -> StudioContext:
    """The folders of these options; those for writing are made."""
    output = Path(options.output_root).expanduser().resolve()
    own = output / OWN_FOLDER
    for folder in (own / UPLOADS, own / JOBS):
        folder.mkdir(parents=True, exist_ok=True)
    roots = [*(Path(root).expanduser() for root in options.data_root), SHIPPED / "sample"]
    return StudioContext(tuple(root.resolve() for root in roots), output, own / UPLOADS,
                         options.upload_max_mb * 1_000_000, Jobs(own / JOBS), EventHub())  # fmt: skip


def leads_within(path: Path, roots: Sequence[Path]) -> bool:
    """Whether what a path leads to, by links too, lies in one of the roots."""
    try:
        found = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    return any(found.is_relative_to(root) for root in roots)
