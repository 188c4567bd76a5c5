"""The plan answers for what is reserved: the smallest limit under which a step runs, as benchmarks/ find it."""

from __future__ import annotations

import pytest

from benchmarks.reserved_memory import FOUR_LAYERS, MODES, ROWS, in_a_process

pytestmark = pytest.mark.simcard


@pytest.mark.parametrize("mode", MODES)
def test_a_step_runs_in_what_is_planned(mode: str) -> None:
    """Two micro-batches, in a process of its own: what ran before would leave gaps."""
    found = in_a_process(len(ROWS), mode)
    assert (found["model"], found["rows"], found["length"]) == FOUR_LAYERS[1:4] and found["micro_batches"] == 2
    assert 0.99 < found["ratio"] < 1.03, found


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [n for n, row in enumerate(ROWS) if row[0] == "streamed" and row[3] == 512])
def test_streamed_layers_reserve_what_is_planned(number: int, mode: str) -> None:
    """Llama-3.1 of 8 and 70 B."""
    found = in_a_process(number, mode)
    assert found["stream_layers"] and 0.99 < found["ratio"] < 1.03, found
