"""A data set of ModelScope brought to this disk, by ModelScope's own package. The only file that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onecard.console import first_line
from onecard.errors import ModelError
from onecard.export.io.output import new_directory
from onecard.installation import install_command


def fetch_dataset(
    dataset_id: str, target: Path, patterns: Sequence[str], *, endpoint: str = "", overwrite: bool = False,
    max_workers: int = 4,
) -> Path:  # fmt: skip
    """Download the files of a data set that match `patterns` into `target`, which appears when all is there.

    Raises ModelError: the package is missing, no network, no such data set; ConfigError: `target` exists.
    """
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError as reason:
        raise ModelError(f"ModelScope needs its own package: {install_command('modelscope')}") from reason
    with new_directory(target, overwrite=overwrite) as staged:
        try:
            dataset_snapshot_download(
                dataset_id, local_dir=str(staged), allow_patterns=list(patterns), max_workers=max_workers,
                endpoint=endpoint or None,
            )  # fmt: skip
        except Exception as reason:  # its own kinds, and those of requests
            raise ModelError(
                f"{dataset_id} cannot be downloaded from ModelScope: {first_line(reason)}; check the network and the "
                "name, or take the Hugging Face Hub (--hub huggingface)"
            ) from reason
        if not any(file.is_file() for file in staged.rglob("*")):
            raise ModelError(f"{dataset_id} on ModelScope has no file like {', '.join(patterns)}")
    return target
