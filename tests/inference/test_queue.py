"""First come, first served; nobody is forgotten, and too many are sent away."""

from __future__ import annotations

import threading
import time

import pytest

from onecard.inference.queue import QueueFull, RequestQueue


def test_one_at_a_time_in_the_order_of_coming() -> None:
    queue, entered, inside = RequestQueue(10), [], []
    tickets = [queue.join() for _ in range(8)]

    def go(k: int) -> None:
        list(queue.wait(tickets[k], threading.Event()))
        inside.append(k)
        assert len(inside) == 1
        entered.append(k)
        time.sleep(0.01)
        inside.remove(k)
        queue.leave(tickets[k], 0.01)

    threads = [threading.Thread(target=go, args=(k,)) for k in reversed(range(8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert entered == list(range(8))
    assert queue.n_waiting == 0


@pytest.mark.parametrize("most", [0, 3])
def test_who_comes_to_a_full_line_is_sent_away_with_a_time(most: int) -> None:
    queue = RequestQueue(most)
    tickets = [queue.join() for _ in range(most + 1)]
    with pytest.raises(QueueFull) as refused:
        queue.join()
    assert refused.value.retry_after_seconds >= 1
    assert f"{most} requests" in str(refused.value)
    queue.leave(tickets[0])
    queue.join()


def test_places_are_told_while_waiting_and_cancelling_leaves() -> None:
    queue = RequestQueue(5)
    tickets = [queue.join() for _ in range(3)]
    cancel, places = threading.Event(), []

    def wait() -> None:
        places.extend(queue.wait(tickets[2], cancel))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    queue.leave(tickets[0])
    time.sleep(0.7)
    begun = time.monotonic()
    cancel.set()
    thread.join(timeout=5)
    assert time.monotonic() - begun < 0.5
    assert places[0] == 2
    assert places[-1] == 1
    queue.leave(tickets[2])
    assert list(queue.wait(tickets[1], threading.Event())) == [], "the next one is not held up"


def test_several_at_once() -> None:
    queue, cancel = RequestQueue(1, at_once=2), threading.Event()
    first, second, third = queue.join(), queue.join(), queue.join()
    assert [list(queue.wait(ticket, cancel)) for ticket in (first, second)] == [[], []]
    assert next(queue.wait(third, cancel)) == 1 and queue.n_waiting == 1
    with pytest.raises(QueueFull):
        queue.join()
    queue.leave(second)
    assert list(queue.wait(third, cancel)) == []
