"""The plan answers for what is reserved: the smallest limit under which a step runs, as benchmarks/ find it."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.random_models import config_of
from benchmarks.reserved_memory import in_this_process
from onecard.train.oom import give_back_memory
from tests.simcard.card import Card

pytestmark = pytest.mark.simcard


@pytest.mark.parametrize("expandable", [True, False])
@pytest.mark.parametrize(
    ("rows", "length", "rest"),
    [(2, 2048, {"bits": 4, "loss_chunk": 512})],
)
def test_a_step_runs_in_what_is_planned(
    card: Card, rows: int, length: int, rest: dict[str, Any], expandable: bool
) -> None:
    """Four layers only, whose loss outweighs them: a little further off than the whole models of the benchmark."""
    config = {**config_of("Llama-3.2-3B"), "num_hidden_layers": 4}
    give_back_memory()
    with card.behaving(expandable=expandable):
        found = in_this_process(config, rows, length, rest, expandable=expandable)
        give_back_memory()
    assert 0.98 < found["ratio"] < (1.05 if expandable else 1.15), found
