"""One model for all tests of the API, and a server in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from onecard.config.inference import LimitOptions
from onecard.inference.engine import InferenceEngine
from tests.serve.api.serving import Running, long_context_base, open_tiny, serving

LIMITS = LimitOptions(max_queue=64, max_choices=8)


@pytest.fixture(scope="session")
def api_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_context_base(tmp_path_factory.mktemp("api-base"))


@pytest.fixture(scope="session")
def engine(api_base: Path) -> InferenceEngine:
    return open_tiny(api_base, LIMITS)


@pytest.fixture(scope="session")
def server(engine: InferenceEngine) -> Iterator[Running]:
    with serving(engine, LIMITS) as running:
        yield running
