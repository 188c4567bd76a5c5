"""Rows of a data set on the Hugging Face Hub, streamed: which part of it, at which commit, and what its errors mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onecard.data.plain_text import RawRecord
from onecard.data.readers import SUFFIXES
from onecard.data.values import safe
from onecard.errors import DataError
from onecard.hub_errors import MIRROR, hub_problem
from onecard.installation import command

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class HubDataset:
    """A data set by its id, and which part of it: a split, of a subset (configuration), of a folder; '' is all.

    collection: its name in the catalogue, if it was found by that.
    """

    hub_id: str
    subset: str = ""
    split: str = "train"
    folder: str = ""
    collection: str = ""


def hub_id_of(data_path: str) -> str:
    """The text if it may name a data set of the Hub. Raises DataError: it looks like a file, which is not there."""
    looks_like_a_file = Path(data_path).suffix.lower() in SUFFIXES
    if looks_like_a_file or not _HUB_ID.fullmatch(data_path):
        raise DataError("there is no such file or folder", data_path)
    return data_path


def hub_commit(dataset: HubDataset) -> str:
    """The commit that the Hub would give now. Raises DataError."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(dataset.hub_id).sha)
    except Exception as error:
        raise _hub_error(dataset, error) from error


def hub_rows(dataset: HubDataset) -> Iterator[RawRecord]:
    """The rows, streamed; the row number stands for the line. Raises DataError."""
    from datasets import load_dataset  # heavy, and only for the Hub

    part = {"name": dataset.subset, "data_dir": dataset.folder}
    options = {name: value for name, value in part.items() if value}
    try:
        rows = load_dataset(dataset.hub_id, split=dataset.split, streaming=True, **options)
        for number, row in enumerate(rows, start=1):
            yield RawRecord(number, row)
    except Exception as error:
        raise _hub_error(dataset, error) from error


def _hub_error(dataset: HubDataset, error: Exception) -> DataError:
    if dataset.collection:
        what = f"the collection ({dataset.hub_id})"
        remedy = f"bring it here first: {command('data')} get {dataset.collection} --endpoint {MIRROR}"
        problem = hub_problem(error, what, dataset.hub_id, kind="dataset", remedy=remedy)
        return DataError(safe(problem, 1000), dataset.collection)
    what = f"there is no such file or folder, and the `{dataset.split}` split of the data set on the Hub"
    return DataError(safe(hub_problem(error, what, dataset.hub_id, kind="dataset"), 1000), dataset.hub_id)
