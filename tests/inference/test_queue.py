"""First come, first served; nobody is forgotten, and too many are sent away."""

from __future__ import annotations

import threading
import time

import pytest

from onecard.inference.queue import QueueFull, RequestQueue


def test_one_at_a_time_in_the_order_of_coming() -> None:
    turnstile, entered, inside = RequestQueue(10), [], []
    tickets = [turnstile.join() for _ in range(8)]

    def go(k: int) -> None:
        list(turnstile.wait(tickets[k], threading.Event()))
        inside.append(k)
        assert len(inside) == 1
        entered.append(k)
        time.sleep(0.01)
        inside.remove(k)
        turnstile.leave(tickets[k], 0.01)

    threads = [threading.Thread(target=go, args=(k,)) for k in reversed(range(8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert entered == list(range(8))
    assert turnstile.n_waiting == 0


@pytest.mark.parametrize("most", [0, 3])
def test_who_comes_to_a_full_line_is_sent_away_with_a_time(most: int) -> None:
    turnstile = RequestQueue(most)
    tickets = [turnstile.join() for _ in range(most + 1)]
    with pytest.raises(QueueFull) as refused:
        turnstile.join()
    assert refused.value.retry_after_seconds >= 1
    assert f"{most} requests" in str(refused.value)
    turnstile.leave(tickets[0])
    turnstile.join()


def test_places_are_told_while_waiting_and_cancelling_leaves() -> None:
    turnstile = RequestQueue(5)
    tickets = [turnstile.join() for _ in range(3)]
    cancel, places = threading.Event(), []

    def wait() -> None:
        places.extend(turnstile.wait(tickets[2], cancel))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    turnstile.leave(tickets[0])
    time.sleep(0.7)
    begun = time.monotonic()
    cancel.set()
    thread.join(timeout=5)
    assert time.monotonic() - begun < 0.5
    assert places[0] == 2
    assert places[-1] == 1
    turnstile.leave(tickets[2])
    assert list(turnstile.wait(tickets[1], threading.Event())) == [], "the next one is not held up"


def test_several_at_once() -> None:
    turnstile, cancel = RequestQueue(1, at_once=2), threading.Event()
    first, second, third = turnstile.join(), turnstile.join(), turnstile.join()
    assert [list(turnstile.wait(ticket, cancel)) for ticket in (first, second)] == [[], []]
    assert next(turnstile.wait(third, cancel)) == 1 and turnstile.n_waiting == 1
    with pytest.raises(QueueFull):
        turnstile.join()
    turnstile.leave(second)
    assert list(turnstile.wait(third, cancel)) == []
