"""Late streams of the simulated card: a wait that is missing shows as wrong numbers, and a right one does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.simcard.card import Card

pytestmark = pytest.mark.simcard

N = 100_000


@pytest.fixture(autouse=True)
def late(card: Card) -> Iterator[None]:
    with card.behaving(late=True, garbage=True):
        yield
        torch.cuda.synchronize()


@pytest.fixture
def side() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def ones() -> torch.Tensor:
    return torch.ones(N, device="cuda")


def test_a_copy_that_is_not_waited_for_is_not_there(side: torch.cuda.Stream) -> None:
    source, target = ones(), torch.zeros(N, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    assert target.sum().isnan()
    torch.cuda.current_stream().wait_stream(side)
    assert float(target.sum()) == N


@pytest.mark.parametrize("how", ["wait_event", "event.wait", "event.synchronize", "stream.synchronize", "synchronize"])
def test_each_way_to_wait_waits(side: torch.cuda.Stream, how: str) -> None:
    source, target = ones(), torch.zeros(N, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
        event = side.record_event()
    assert not event.query() and not side.query()
    {
        "wait_event": lambda: torch.cuda.current_stream().wait_event(event),
        "event.wait": lambda: event.wait(),
        "event.synchronize": event.synchronize,
        "stream.synchronize": side.synchronize,
        "synchronize": torch.cuda.synchronize,
    }[how]()
    assert float(target.sum()) == N
    assert event.query() and side.query()


def test_an_event_waits_for_what_came_before_it_only(side: torch.cuda.Stream) -> None:
    source, first, second = ones(), torch.zeros(N, device="cuda"), torch.zeros(N, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        first.copy_(source, non_blocking=True)
        event = side.record_event()
        second.copy_(source, non_blocking=True)
    torch.cuda.current_stream().wait_event(event)
    assert float(first.sum()) == N and second.sum().isnan()


def test_a_copy_that_does_not_wait_for_its_source_reads_garbage(card: Card, side: torch.cuda.Stream) -> None:
    target, before = torch.zeros(N, device="cuda"), card.native.n_unordered_copies()
    torch.cuda.synchronize()
    source = ones() * 2
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert target.isnan().all() and card.native.n_unordered_copies() == before + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert float(target.sum()) == 2 * N and card.native.n_unordered_copies() == before + 1


def test_an_operation_on_another_stream_that_does_not_wait_gives_garbage(side: torch.cuda.Stream) -> None:
    torch.cuda.synchronize()
    source = ones() * 2
    with torch.cuda.stream(side):
        assert (source + 1).isnan().all()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert float((source + 1).sum()) == 3 * N


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_that_another_stream_reads_is_kept_by_record_stream(side: torch.cuda.Stream, recorded: bool) -> None:
    target = torch.zeros(N, device="cuda")
    source = ones()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    if recorded:
        source.record_stream(side)
    address = source.data_ptr()
    del source
    torch.cuda.current_stream().query()
    again = torch.zeros(N, device="cuda")
    assert (again.data_ptr() == address) is not recorded
    torch.cuda.synchronize()
    assert float(target.sum()) == (N if recorded else 0)


@pytest.mark.parametrize("pin", [True, False])
def test_a_copy_to_pinned_memory_is_late_and_to_other_memory_is_not(pin: bool) -> None:
    source = ones()
    target = torch.zeros(N, pin_memory=pin)
    target.copy_(source, non_blocking=True)
    assert float(target.sum()) == (0 if pin else N)
    torch.cuda.synchronize()
    assert float(target.sum()) == N


def test_gradients_over_two_streams_are_those_of_one(side: torch.cuda.Stream) -> None:
    weight = torch.full((N,), 3.0, device="cuda", requires_grad=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        squared = weight * weight
    torch.cuda.current_stream().wait_stream(side)
    (squared * 2 + weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((N,), 13.0, device="cuda"))
