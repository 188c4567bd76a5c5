"""The tape on worked examples that are small enough for a pencil."""

from __future__ import annotations

from onecard.model.memory.tape import PASSES_ON, Back, Tape


def test_a_tensor_is_alive_as_long_as_it_is_held() -> None:
    tape = Tape()
    one, two = tape.new(10), tape.new(5)
    assert tape.live_bytes == tape.peak_bytes == 15
    del one
    assert (tape.live_bytes, tape.peak_bytes) == (5, 15)
    assert two.n_bytes == 5


def test_what_is_saved_lives_until_its_backward() -> None:
    tape = Tape()
    x = tape.new(10, needs_grad=True)
    hidden = tape.op([x], 10)
    out = tape.op([hidden], 10, Back([hidden]))
    del hidden
    assert tape.live_bytes == 30  # x, hidden and out
    end = out.node
    del out
    tape.backward(end, tape.new(10))
    # x, hidden, the gradient from above and that of hidden
    assert tape.peak_bytes == 40
    assert tape.live_bytes == 10


def test_under_a_checkpoint_nothing_is_saved() -> None:
    tape = Tape(keeps_saved=False)
    hidden = tape.op([tape.new(10, needs_grad=True)], 10)
    out = tape.op([hidden], 10, Back([hidden], saves_output=True))
    tape.hold(hidden)
    del hidden
    assert tape.live_bytes == out.n_bytes == 10


def test_a_view_takes_no_memory_and_its_gradient_does() -> None:
    tape = Tape()
    base = tape.op([tape.new(0, needs_grad=True)], 8)
    view = tape.op([base], 4, is_view=True)
    assert tape.live_bytes == 8
    end = view.node
    del base, view
    tape.backward(end, tape.new(4))
    assert tape.peak_bytes == 12  # the view's gradient, and one as large as the base


def _sum_of_two(back: Back) -> int:
    """Two uses of one tensor, whose gradients are added up."""
    tape = Tape()
    leaf = tape.new(0, needs_grad=True)
    x = tape.op([leaf], 10)
    one, two = tape.op([x], 10, back), tape.op([x], 10, back)
    end = tape.op([one, two], 10, PASSES_ON).node
    del x, one, two
    tape.peak_bytes = 0
    tape.backward(end, tape.new(10))
    return tape.peak_bytes


def test_gradients_are_added_in_place_where_nobody_else_holds_them() -> None:
    assert _sum_of_two(Back()) == 30  # from above, and of each use: the sum is one of these
    assert _sum_of_two(Back(gives_views=True)) == 30  # the one from above is gone when the third is made
    assert _sum_of_two(PASSES_ON) == 20  # both are the one from above; their sum is new


def test_transient_bytes_count_beside_what_is_alive() -> None:
    tape = Tape()
    x = tape.new(10, needs_grad=True)
    out = tape.op([x], 10, Back(trained=[7], temporary=3), temporary=4)
    assert tape.peak_bytes == 24
    end = out.node
    del out
    tape.backward(end, tape.new(10))
    assert tape.peak_bytes == 10 + 10 + 10 + 7  # x, two gradients, the one of the weight


def test_after_a_stop_the_graph_goes_on_without_memory() -> None:
    tape = Tape()
    x = tape.op([tape.new(10, needs_grad=True)], 10)
    tape.stop()
    out = tape.op([x], 10, temporary=100)
    assert (tape.live_bytes, tape.peak_bytes) == (10, 20)
    tape.backward(out.node, tape.new(10))
    assert tape.op([x], 10).n_bytes == 10 and tape.peak_bytes == 30


def test_what_is_held_outlives_the_backward() -> None:
    tape = Tape()
    x = tape.op([tape.new(0, needs_grad=True)], 10)
    tape.hold(x)
    end = tape.op([x], 4).node
    del x
    tape.backward(end, tape.new(4))
    assert tape.live_bytes == 10
