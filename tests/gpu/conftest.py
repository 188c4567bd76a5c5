"""Tests that need an NVIDIA card. Elsewhere each one is skipped, and says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecard.model.allocator import VARIABLES

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA card; torch.cuda.is_available() is false here"))


@pytest.fixture(autouse=True)
def _asked_of_the_allocator_as_before() -> Iterator[None]:
    """A program that is called in this process asks for segments that grow, after torch has read what was asked."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
