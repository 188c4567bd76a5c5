from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _plans_trace_no_model(module_peaks_by_formula: None) -> None:
    """What these runs learn and say is looked at; a test of their plan asks for `traced_peaks`."""
