"""Measuring a link: right on a steady one, honest on any other, and never long."""

import math
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zsplit.train.profile.probe import LARGEST, UNKNOWN, measure_link
from zsplit.wire.messages import LinkSpeed

MBIT = 1e6 / 8

rates = st.floats(math.log(0.5), math.log(10_000)).map(lambda power: math.exp(power) * MBIT)


class Wire:
    """A link with a clock of its own: every exchange takes as long as its bytes do, and a round trip."""

    def __init__(self, up: float, down: float, rtt: float, noise: Callable[[], float] = lambda: 0.0) -> None:
        self.up, self.down, self.rtt, self.noise = up, down, rtt, noise
        self.now = 0.0
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, up: int, down: int) -> float:
        seconds = self.rtt + up / self.up + down / self.down + self.noise()
        self.now += seconds
        self.sizes.append((up, down))
        return seconds


def cycle(*values: float) -> Callable[[], float]:
    """Return a source of these values, over and over."""

    def endless() -> Iterator[float]:
        while True:
            yield from values

    return endless().__next__


@example(up=10_000 * MBIT, down=0.5 * MBIT, rtt=0.3)
@given(up=rates, down=rates, rtt=st.floats(0.0001, 0.3))
def test_a_steady_link_is_measured_to_five_percent(up: float, down: float, rtt: float) -> None:
    found = measure_link(Wire(up, down, rtt))
    assert found.up == pytest.approx(up, rel=0.05)
    assert found.down == pytest.approx(down, rel=0.05)
    assert found.rtt == pytest.approx(rtt, rel=0.05, abs=1e-4)
    assert found.spread < 0.05


@given(up=rates.filter(lambda rate: rate >= MBIT), down=rates.filter(lambda rate: rate >= MBIT), rtt=st.floats(0, 0.1))
def test_it_takes_little_more_than_the_time_that_it_is_given(up: float, down: float, rtt: float) -> None:
    wire = Wire(up, down, rtt)
    measure_link(wire, 1.5)
    assert wire.now < 2 * 1.5


@given(up=rates, down=rates, rtt=st.floats(0, 1))
def test_only_one_way_at_a_time_is_loaded(up: float, down: float, rtt: float) -> None:
    wire = Wire(up, down, rtt)
    measure_link(wire)
    assert all(1 in sizes and 1 <= max(sizes) <= LARGEST for sizes in wire.sizes)


def test_a_fast_link_is_measured_with_large_transfers_and_a_slow_one_with_small() -> None:
    fast, slow = Wire(1250e6, 1250e6, 0.001), Wire(0.125e6, 0.125e6, 0.001)
    measure_link(fast)
    measure_link(slow)
    assert max(fast.sizes)[0] == LARGEST
    assert max(slow.sizes)[0] == 16 * 1024


def test_single_late_answers_hardly_matter() -> None:
    steady = measure_link(Wire(6.25e6, 6.25e6, 0.01))
    found = measure_link(Wire(6.25e6, 6.25e6, 0.01, cycle(0, 0, 0.05, 0, 0)))
    assert found.rtt == steady.rtt
    assert found.up == pytest.approx(steady.up, rel=0.25)


def test_the_spread_tells_how_steady_the_link_is() -> None:
    calm = measure_link(Wire(6.25e6, 6.25e6, 0.01, cycle(0, 0.004)))
    wild = measure_link(Wire(6.25e6, 6.25e6, 0.01, cycle(0, 0.4)))
    assert 0 < calm.spread < 0.1
    assert wild.spread > 0.5


def test_on_a_fast_link_a_few_delays_do_not_pass_for_instability() -> None:
    late = 0.02  # three times as long as 8 MiB take
    found = measure_link(Wire(1250e6, 1250e6, 0.001, cycle(*[0.0] * 9, late)))
    assert found.spread < 0.05
    assert found.up == pytest.approx(1250e6, rel=0.05)
    assert measure_link(Wire(1250e6, 1250e6, 0.001, cycle(0.0, 0.0, late))).spread > 0.5


def check_is_usable(found: LinkSpeed) -> None:
    assert all(math.isfinite(each) and each > 0 for each in (found.up, found.down))
    assert math.isfinite(found.rtt)


@pytest.mark.parametrize("seconds", [0.0, math.inf, math.nan, -1.0])
def test_a_link_without_a_speed_is_called_unknown(seconds: float) -> None:
    found = measure_link(lambda _, __: seconds)
    check_is_usable(found)
    assert found.spread == UNKNOWN


def test_a_link_that_stalls_has_next_to_no_speed() -> None:
    found = measure_link(lambda up, down: 0.01 if up == down else math.inf)
    assert (found.up, found.down, found.spread) == (1.0, 1.0, UNKNOWN)


@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_whatever_an_exchange_says_the_figures_can_be_used(seconds: list[float]) -> None:
    answer = cycle(*seconds)
    check_is_usable(measure_link(lambda _, __: answer()))
