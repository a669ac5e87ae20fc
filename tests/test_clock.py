"""The broker's clock, as round trips show it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsplit.train.link.clock import RECENT, Clock

ways = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=3 * RECENT)


def after(offset: float, trips: list[tuple[float, float]]) -> Clock:
    """Return a clock that knows these round trips (seconds up, seconds down), one every 20 s."""
    clock = Clock()
    for number, (up, down) in enumerate(trips, 1):
        clock.take(20.0 * number, 20.0 * number + up + offset, 20.0 * number + up + down)
    return clock


@given(st.floats(-1e6, 1e6), ways)
def test_the_error_is_at_most_half_of_the_shortest_recent_round_trip(
    offset: float, trips: list[tuple[float, float]]
) -> None:
    clock = after(offset, trips)
    shortest = min(up + down for up, down in trips[-RECENT:])
    assert abs(clock.now(5.0) - (5.0 + offset)) <= shortest / 2 + 1e-6


@given(st.floats(-1e6, 1e6), ways, st.floats(0, 1e5))
def test_our_time_of_the_brokers_time_is_our_time(offset: float, trips: list[tuple[float, float]], at: float) -> None:
    clock = after(offset, trips)
    assert math.isclose(clock.ours(clock.now(at)), at, abs_tol=1e-6)


def test_a_long_round_trip_does_not_take_the_place_of_a_short_one() -> None:
    assert after(7.0, [(0.1, 0.1), (8.0, 0.0)]).now(0.0) == pytest.approx(7.0)


def test_samples_grow_old() -> None:
    clock = after(7.0, [(0.0, 0.0)])
    for number in range(RECENT):
        clock.take(100.0 + number, 109.5 + number, 101.0 + number)
    assert clock.samples == RECENT
    assert clock.now(0.0) == pytest.approx(9.0)


def test_orders_that_answer_no_beat_say_nothing_of_the_clock() -> None:
    clock = Clock()
    clock.take(0.0, 500.0, 3.0)
    assert (clock.samples, clock.now(2.0)) == (0, 2.0)


def test_an_answer_from_before_its_beat_is_none() -> None:
    clock = Clock()
    clock.take(4.0, 500.0, 3.0)
    assert clock.samples == 0


def test_now_is_the_brokers_time_of_this_moment() -> None:
    clock = Clock(read=lambda: 30.0)
    clock.take(10.0, 1011.0, 12.0)
    assert clock.now() == 1030.0
