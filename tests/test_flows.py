"""What is known of a link from the tensors that came over it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsplit.train.link.flows import LEAST, LONG, Flows
from zsplit.wire.messages import Flow, Lease

LEASE, OTHER = Lease(1, 1), Lease(1, 2)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(LEAST, 10**7)), min_size=1, max_size=20),
    st.floats(1e5, 1e8),
    st.floats(0, 0.5),
)
def test_bytes_over_seconds_is_the_rate_of_the_link_however_busy_it_is(
    messages: list[tuple[float, int]], rate: float, delay: float
) -> None:
    """Messages leave after pauses; the link carries one after the other."""
    flows = Flows()
    left = free = 0.0
    for pause, nbytes in messages:
        left += pause
        free = max(left, free) + nbytes / rate
        flows.add(LEASE, nbytes, left, free + delay)
    flow = flows.take(LEASE)
    assert flow.bytes == sum(nbytes for _, nbytes in messages)
    assert 1 <= flow.starts <= len(messages)
    assert -1e-6 <= flow.seconds - flow.bytes / rate <= len(messages) * delay + 1e-6


def test_a_message_that_found_the_way_busy_began_when_the_one_before_it_arrived() -> None:
    flows = Flows()
    assert flows.add(LEASE, LEAST, 1.0, 3.0) == 1.0
    assert flows.add(LEASE, LEAST, 2.0, 4.0) == 3.0
    assert flows.add(LEASE, LEAST, 6.0, 7.0) == 6.0
    assert flows.take(LEASE) == Flow(3 * LEAST, 4.0, 2)


def test_small_messages_are_not_counted_but_keep_the_way_busy() -> None:
    flows = Flows()
    flows.add(LEASE, LEAST - 1, 1.0, 1.01)
    flows.add(LEASE, LEAST, 1.0, 2.01)
    assert flows.take(LEASE) == Flow(LEAST, pytest.approx(1.0), 0)


def test_a_small_message_that_was_long_on_its_way_is_counted() -> None:
    flows = Flows()
    flows.add(LEASE, 1000, 1.0, 1.0 + LONG)
    assert flows.take(LEASE) == Flow(1000, pytest.approx(LONG), 1)


def test_what_was_taken_is_forgotten_and_each_lease_has_its_own_way() -> None:
    flows = Flows()
    flows.add(LEASE, LEAST, 1.0, 3.0)
    flows.add(OTHER, LEAST, 2.0, 4.0)
    assert [flows.take(LEASE), flows.take(LEASE)] == [Flow(LEAST, 2.0, 1), Flow()]
    flows.keep([LEASE])
    assert flows.take(OTHER) == Flow()


def test_a_clock_that_runs_ahead_makes_no_time_negative() -> None:
    flows = Flows()
    assert flows.add(LEASE, LEAST, 5.0, 4.0) == 4.0
    assert flows.add(LEASE, LEAST, math.nan, 9.0) == 9.0
    assert flows.take(LEASE) == Flow(LEAST, 0.0, 1)
