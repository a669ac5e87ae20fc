"""Links that are made slower: the arithmetic, and the same transfer over a link that the kernel made slower."""

import json
import math
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import free_port
from hypothesis import given
from hypothesis import strategies as st

from zsplit.config.shape import Row
from zsplit.train.link.shaping import HEADERS, SEGMENT, Line, Rates, Way, lines, on_wire

CROSSING = Path(__file__).with_name("crossing.py")

sizes = st.lists(st.integers(1, 10**7), min_size=1, max_size=20)
rates = st.floats(1e3, 1e9)
times = st.floats(0, 1e5)


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-6)


# The arithmetic


@given(sizes, rates, times)
def test_the_time_of_a_transfer_is_its_bytes_over_the_rate_however_it_is_cut_into_messages(
    messages: list[int], rate: float, begin: float
) -> None:
    line = Line(Rates([(0.0, rate)]), 0.0)
    ends = [line.through(nbytes, begin) for nbytes in messages]
    assert close(ends[-1] - begin, sum(map(on_wire, messages)) / rate)
    assert ends == sorted(ends)


@given(sizes, rates, st.data())
def test_when_a_message_is_handed_over_does_not_matter_while_the_line_is_busy(
    messages: list[int], rate: float, data: st.DataObject
) -> None:
    prompt, late = (Line(Rates([(0.0, rate)]), 0.0) for _ in range(2))
    free = 0.0
    for nbytes in messages:
        now = data.draw(st.floats(0.0, free))
        free = prompt.through(nbytes, 0.0)
        assert late.through(nbytes, now) == free


@given(rates, st.floats(0, 1), times)
def test_the_delay_is_added_to_each_message_and_keeps_none_behind_it_waiting(
    rate: float, delay: float, begin: float
) -> None:
    line, without = (Line(Rates([(0.0, rate)]), seconds) for seconds in (delay, 0.0))
    for nbytes in (1000, 1, 10**6):
        assert close(line.through(nbytes, begin), without.through(nbytes, begin) + delay)


@given(sizes, times)
def test_a_link_without_limits_holds_nothing_back(messages: list[int], now: float) -> None:
    up, down = lines([Row(0.0, 0.0, 0.0)], rtt=0.0, origin=0.0)
    assert all(way.through(nbytes, now) == way.aside(nbytes, now) == now for way in (up, down) for nbytes in messages)


def test_rates_are_megabits_a_second_each_way_and_half_the_round_trip_is_added_to_each() -> None:
    up, down = lines([Row(0.0, 8.0, 80.0)], rtt=0.2, origin=50.0)
    megabyte = 10**6 - HEADERS * 667
    assert on_wire(megabyte) == pytest.approx(10**6, abs=HEADERS * 25)
    assert up.through(megabyte, 50.0) == pytest.approx(50.0 + 1.0 + 0.1, rel=1e-3)
    assert down.through(megabyte, 50.0) == pytest.approx(50.0 + 0.1 + 0.1, rel=1e-3)


def test_each_segment_carries_its_headers() -> None:
    assert on_wire(1) == 1 + HEADERS
    assert on_wire(SEGMENT) == SEGMENT + HEADERS == 1500
    assert on_wire(SEGMENT + 1) == SEGMENT + 1 + 2 * HEADERS


@given(sizes, rates, st.floats(0, 10))
def test_a_control_message_passes_queued_tensors_but_takes_its_share_of_the_rate(
    messages: list[int], rate: float, now: float
) -> None:
    line, alone = (Line(Rates([(0.0, rate)]), 0.0) for _ in range(2))
    for nbytes in messages:
        line.through(nbytes, now)
        alone.through(nbytes, now)
    assert close(line.aside(100, now), now + on_wire(100) / rate)
    assert close(line.through(1, now), alone.through(1, now) + on_wire(100) / rate)


@st.composite
def traces(draw: st.DrawFn) -> list[tuple[float, float]]:
    """Return rates over time, limited all of the time."""
    gaps = draw(st.lists(st.floats(0.01, 10), max_size=6))
    begins = [0.0]
    for gap in gaps:
        begins.append(begins[-1] + gap)
    return [(begin, draw(st.floats(1e3, 1e6))) for begin in begins]


@given(traces(), st.floats(0, 40), st.integers(1, 10**7))
def test_a_trace_carries_between_begin_and_end_exactly_the_bytes_of_the_message(
    rows: list[tuple[float, float]], begin: float, nbytes: int
) -> None:
    end = Rates(rows).finish(begin, nbytes)
    carried = 0.0
    for (since, rate), (until, _) in pairwise([*rows, (math.inf, 0.0)]):
        carried += max(0.0, min(end, until) - max(begin, since)) * rate
    assert math.isclose(carried, nbytes, rel_tol=1e-6, abs_tol=0.1)


def test_the_last_rate_of_a_trace_holds_on_and_zero_is_no_limit() -> None:
    trace = Rates([(1.0, 100.0), (2.0, 10.0), (3.0, 0.0), (4.0, 1.0)])
    assert trace.finish(0.0, 100) == 1.0
    assert trace.finish(1.0, 105) == 2.5
    assert trace.finish(1.0, 1000) == 3.0
    assert trace.finish(3.5, 10**9) == 3.5
    assert trace.finish(100.0, 50) == 150.0


def test_the_time_of_a_trace_begins_at_its_origin() -> None:
    up, _ = lines([Row(0.0, 8.0, 0.0), Row(10.0, 0.0, 0.0)], rtt=0.0, origin=1000.0)
    assert up.through(10**5, 1000.0) > 1000.1
    assert up.through(10**9, 1000.0) == 1010.0
    assert up.through(10**9, 1020.0) == 1020.0


@given(sizes, rates, st.floats(0, 100))
def test_a_message_is_on_its_way_until_it_is_due_and_none_passes_another(
    messages: list[int], rate: float, now: float
) -> None:
    line = Line(Rates([(0.0, rate)]), 0.0)
    way: Way[int] = Way(line.through)
    for number, nbytes in enumerate(messages):
        way.put(number, nbytes, 0.0)
    early = list(way.arrived(now))
    assert all(passage.due <= now for passage in early)
    assert way.due > now
    assert [item for _, item in [*early, *way.arrived(math.inf)]] == list(range(len(messages)))
    assert way.due == math.inf


# The same transfer, through the kernel's shaping and through ours


class Route(NamedTuple):
    """From one process to another, at rates in Mbit/s: how to start each of them, and the address of the far one."""

    up: float
    down: float
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    host: str = "127.0.0.1"


@pytest.fixture(scope="module")
def bottleneck() -> Iterator[Route]:
    """Two namespaces, and between them a pair of interfaces of which each sends through a token bucket."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("to make a link slow in the kernel needs root, ip and tc")
    mark = uuid.uuid4().hex[:8]
    near, far = f"zn-{mark}", f"zf-{mark}"
    made = Route(20, 40, ("ip", "netns", "exec", near), ("ip", "netns", "exec", far), "10.203.0.2")
    try:
        _shell(f"ip netns add {near}", f"ip netns add {far}")
        _shell(f"ip -n {near} link add z0 type veth peer name z0 netns {far}")
        for name, address, rate in ((near, "10.203.0.1", made.up), (far, made.host, made.down)):
            _shell(f"ip -n {name} addr add {address}/24 dev z0", f"ip -n {name} link set z0 up")
            _shell(f"tc -n {name} qdisc add dev z0 root tbf rate {rate}mbit burst 16kb limit 4mb")
        yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel makes no namespaces with a token bucket: {error.stderr.strip()}")
    finally:
        for name in (near, far):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _shell(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True, text=True)


def transfer(route: Route) -> dict[str, float]:
    """Move bytes up and then down; return the seconds each way. Where there are no namespaces, the link is ours."""
    port = str(free_port())
    rates = () if route.near else (str(route.up), str(route.down))
    far = subprocess.Popen([*route.far, sys.executable, CROSSING, "far", route.host, port])
    try:
        near = [*route.near, sys.executable, CROSSING, "near", route.host, port, *rates]
        return dict(json.loads(subprocess.run(near, check=True, stdout=subprocess.PIPE, timeout=60).stdout))
    finally:
        far.kill()
        far.wait()


def test_a_transfer_takes_as_long_as_over_a_link_that_the_kernel_makes_slow(bottleneck: Route) -> None:
    """Whatever else the machine does makes a transfer longer, never shorter: of several the shortest counts."""
    kernel: list[dict[str, float]] = []
    ours: list[dict[str, float]] = []
    while len(ours) < 4 and not (ours and agree(kernel, ours)):
        kernel.append(transfer(bottleneck))
        ours.append(transfer(Route(bottleneck.up, bottleneck.down)))
    assert agree(kernel, ours), (kernel, ours)


def agree(kernel: list[dict[str, float]], ours: list[dict[str, float]]) -> bool:
    """Whether the shortest transfers each way are within 5 % of one another."""
    shortest = [{way: min(taken[way] for taken in each) for way in ("up", "down")} for each in (kernel, ours)]
    return shortest[1] == pytest.approx(shortest[0], rel=0.05)
