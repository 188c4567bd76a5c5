"""Download a model or dataset from the Hub or a mirror: size and free room first, resumed when cut, hashes compared.

onecard download --repo_id Qwen/Qwen3-0.6B --output_path models/qwen3-0.6b
onecard download --repo_id Qwen/Qwen3-0.6B --endpoint https://hf-mirror.com --dry_run
For what is private or asks for your consent, set HF_TOKEN or run `hf auth login`; a mirror gets HF_TOKEN only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onecard.config.parsing import comma_list, parse
from onecard.config.problems import Problem
from onecard.console import escaped, rendered, say, warn

N_LISTED = 40


@dataclass
class FetchOptions:
    """Which files are fetched, from which hub, and how."""

    output_path: str = ""
    """Directory that will hold the files and nothing else; empty: the cache where training and chat look by Hub id."""
    include: str = ""
    """Only files like these, with commas between them: *.json,*.Q4_K_M.gguf. Empty: what loading needs."""
    exclude: str = ""
    """No files like these, with commas between them."""
    revision: str = "main"
    """Branch, tag or commit, on the Hugging Face Hub."""
    endpoint: str = ""
    """Address of a mirror; empty: that of HF_ENDPOINT, or the Hub itself."""
    max_workers: int = 4
    """Files fetched at a time."""
    dry_run: bool = False
    """Say how many files and bytes there are, and how much room, and fetch nothing."""
    overwrite: bool = False
    """Replace what is there."""

    def problems(self) -> list[Problem]:
        n = self.max_workers
        return [] if 1 <= n <= 32 else [("--max_workers", f"{n} is not between 1 and 32")]


@dataclass
class DownloadOptions(FetchOptions):
    """What is downloaded, from where, and where to."""

    repo_id: str = ""
    """Name on the Hub: owner/name."""
    repo_type: Literal["model", "dataset"] = "model"
    """What it is."""

    def problems(self) -> list[Problem]:
        found = super().problems()
        if not self.repo_id:
            found.append(("--repo_id", "is missing; give a name on the Hub, such as Qwen/Qwen3-0.6B"))
        if not self.revision:
            found.append(("--revision", "is empty; give a branch, tag or commit"))
        if self.overwrite and not self.output_path:
            found.append(("--overwrite", "needs --output_path; the cache is never overwritten"))
        return found


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    options = parse(DownloadOptions, argv, description=__doc__ or "")

    from onecard.export.hub.download import cache_place, directory_place, fetch
    from onecard.export.hub.files import Repository, list_files

    repository = Repository(options.repo_id, options.repo_type, options.revision, options.endpoint)
    listing = list_files(repository, comma_list(options.include), comma_list(options.exclude))
    target = Path(options.output_path).expanduser() if options.output_path else None
    place = directory_place(target) if target else cache_place(listing)
    missing_bytes, free_bytes = place.missing_bytes(listing), place.free_bytes()
    say(_table(listing), is_styled=True)
    say(
        f"{len(listing.files)} files, {_readable(listing.n_bytes)}; to fetch: {_readable(missing_bytes)}; "
        f"free there: {_readable(free_bytes)}"
    )
    if listing.left_out:
        say(
            f"left out: {len(listing.left_out)} files, such as {', '.join(listing.left_out[:4])} (--include takes them)"
        )
    pickles = [file.name for file in listing.files if file.is_pickle]
    if pickles:
        warn(f"pickled, and so able to carry code: {', '.join(pickles[:4])}. It is read as plain tensors here only")
    if options.dry_run:
        return
    directory = fetch(listing, target, overwrite=options.overwrite, max_workers=options.max_workers)
    say(f"{directory}: commit {listing.commit[:12]}, sizes and hashes are those that {repository.address} tells")


def _table(listing: Any) -> str:
    """The largest files, ready to print."""
    from rich.table import Table
    from rich.text import Text

    repository = listing.repository
    table = Table(title=f"{repository.repo_id} at {repository.revision}, from {repository.address}")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    largest = sorted(listing.files, key=lambda file: -file.n_bytes)
    for file in largest[:N_LISTED]:
        table.add_row(Text(escaped(file.name)), _readable(file.n_bytes))
    if len(largest) > N_LISTED:
        rest = largest[N_LISTED:]
        table.add_row(f"... {len(rest)} smaller ones", _readable(sum(file.n_bytes for file in rest)))
    return rendered(table)


def _readable(n_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} B"
