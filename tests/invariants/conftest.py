from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _plans_trace_no_model(module_peaks_by_formula: None) -> None:
    """Which weights these runs end with is looked at, not their plan."""
