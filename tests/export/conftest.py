from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _plans_trace_no_model(module_peaks_by_formula: None) -> None:
    """What is made of these runs is looked at, not their plan."""
