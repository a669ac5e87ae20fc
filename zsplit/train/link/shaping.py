"""A slower link than the one there is: when each message would be through. Pure: no clock, no socket.

Each way of a link is a serial line with a rate and a delay, half of the round trip. A message waits until the line is
free, occupies it for its bytes over the rate, and is there one delay later: store and forward, since ZeroMQ shows a
message when its last byte has come. The line is free again at a time that is computed from the times before, never
read off a clock, so that waking up late delays one message and not those behind it.

What TCP adds of its own is not modelled: that it starts slowly after a pause, and that acknowledgements take up to 2 %
of the other way and wait there behind data.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from zsplit.config.shape import Row

SEGMENT = 1448
"""Bytes that a TCP segment carries over Ethernet: 1500 less the headers below. Rates are those of the link, as a
provider, `tc` or a trace gives them, and the link carries the headers too."""

HEADERS = 52
"""Bytes of TCP (20, and 12 of timestamps) and IPv4 (20) before each segment."""

BYTES_PER_MBIT = 1e6 / 8

T = TypeVar("T")


def on_wire(nbytes: int) -> int:
    """Return the bytes that a link carries for `nbytes` of a TCP stream."""
    return nbytes + HEADERS * -(-nbytes // SEGMENT)


class Rates:
    """Bytes a second over time. `rows` are (seconds, rate), ascending: each rate holds until the next row.

    The first rate holds before its time too, the last one for ever. A rate of 0 is no limit.
    """

    def __init__(self, rows: Sequence[tuple[float, float]]) -> None:
        self._rates = [rate for _, rate in rows]
        self._ends = [*(begin for begin, _ in rows[1:]), math.inf]

    def finish(self, begin: float, nbytes: float) -> float:
        """Return when so many bytes are through that begin now."""
        at, left = begin, nbytes
        for rate, end in zip(self._rates, self._ends, strict=True):
            if at >= end:
                continue
            if rate == 0:
                return at
            if at + left / rate <= end:
                return at + left / rate
            left -= (end - at) * rate
            at = end
        return at


class Line:
    """One way of a link. Times are seconds of one clock, that of `rates` begins at `origin`."""

    def __init__(self, rates: Rates, delay: float, origin: float = 0.0) -> None:
        self._rates, self._delay, self._origin = rates, delay, origin
        self._free = self._aside_free = -math.inf

    def through(self, nbytes: int, now: float) -> float:
        """Return when a message is there that is sent now, behind those before it."""
        self._free = self._after(max(now, self._free), nbytes)
        return self._free + self._delay

    def aside(self, nbytes: int, now: float) -> float:
        """Return when a small message on a connection of its own is there.

        It waits for none of the other connection's, as packets of two connections alternate; but what it takes of
        the rate, the others lack.
        """
        self._aside_free = self._after(max(now, self._aside_free), nbytes)
        self._free = self._after(max(now, self._free), nbytes)
        return self._aside_free + self._delay

    def _after(self, begin: float, nbytes: int) -> float:
        return self._origin + self._rates.finish(begin - self._origin, on_wire(nbytes))


def lines(rows: Sequence[Row], rtt: float, origin: float) -> tuple[Line, Line]:
    """Return the ways up and down of a link; `rtt` in seconds, the first row's time counted from `origin`."""
    up = Rates([(row.seconds, row.uplink_mbps * BYTES_PER_MBIT) for row in rows])
    down = Rates([(row.seconds, row.downlink_mbps * BYTES_PER_MBIT) for row in rows])
    return Line(up, rtt / 2, origin), Line(down, rtt / 2, origin)


class Passage(NamedTuple, Generic[T]):
    """A message on its way, and when it is there."""

    due: float
    item: T


class Way(Generic[T]):
    """Messages on their way, in order. `pass_` says when one of so many bytes is there that is sent now."""

    def __init__(self, pass_: Callable[[int, float], float]) -> None:
        self._pass = pass_
        self._passing: deque[Passage[T]] = deque()

    def put(self, item: T, nbytes: int, now: float) -> None:
        """Send a message."""
        self._passing.append(Passage(self._pass(nbytes, now), item))

    @property
    def due(self) -> float:
        """When the first message is there; infinite where there is none."""
        return self._passing[0].due if self._passing else math.inf

    @property
    def first(self) -> T:
        """The message that is there first. Raises IndexError where there is none."""
        return self._passing[0].item

    def drop(self) -> None:
        """Take the first message off."""
        self._passing.popleft()

    def clear(self) -> None:
        """Take all off: the connection that they were on is gone."""
        self._passing.clear()

    def arrived(self, now: float) -> Iterator[Passage[T]]:
        """Take off and yield what is there by now."""
        while self._passing and self._passing[0].due <= now:
            yield self._passing.popleft()
