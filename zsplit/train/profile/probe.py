"""How fast a link is: a round trip and a rate each way, from exchanges that others make. No clock, no socket."""

from collections.abc import Callable
from math import inf, isfinite
from statistics import median
from typing import NamedTuple

from zsplit.wire.messages import LinkSpeed

Exchange = Callable[[int, int], float]
"""Sends so many bytes up, waits for so many back, at least 1 each way, and returns the seconds that it took."""

PINGS = 9
SAMPLES = 4, 16
"""Transfers whose rates are compared, at least and at most: of short ones, which single delays disturb, there are more.
"""

FIRST = 16 * 1024
LARGEST = 8 * 2**20
"""Bytes of a transfer that is timed."""

EXTREME = 8
"""Where there are so many transfers, the fastest and the slowest in that number say nothing about the link."""

LONG_ENOUGH = 0.1
"""Seconds of a transfer beside which the jitter of a round trip is small."""

GROWTH = 2.0, 8.0
"""How much larger the next transfer is, at least and at most."""

SLOWEST = 1.0
"""Bytes a second that a link is said to have where it has none, so that whoever plans can divide by it."""

UNKNOWN = 10.0
"""The spread of what could not be measured."""


class Rate(NamedTuple):
    """Bytes a second, and how far repeated measurements lay apart, relative to their median."""

    value: float
    spread: float


def measure_link(exchange: Exchange, seconds: float = 1.5) -> LinkSpeed:
    """Return what `exchange` shows of the link, in about so many `seconds`.

    The round trip is the lower quartile of some tiny exchanges. A way's rate is bytes over the seconds beyond the round
    trip: the size grows until these are a tenth of a second, or to 8 MiB, and the median of some transfers of that
    size counts. All figures are finite and the rates above 0: a link that seems to have no speed, or an endless one,
    has a `spread` of 10.
    """
    rtt = _round_trip(exchange, seconds / 5)
    up = _rate(lambda size: exchange(size, 1), rtt, seconds * 2 / 5)
    down = _rate(lambda size: exchange(1, size), rtt, seconds * 2 / 5)
    return LinkSpeed(up=up.value, down=down.value, rtt=rtt, spread=max(up.spread, down.spread))


def _round_trip(exchange: Exchange, seconds: float) -> float:
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < PINGS and sum(taken) < seconds):
        taken.append(exchange(1, 1))
    # The first may have had a connection to wake up.
    usable = sorted(each for each in taken[1:] if isfinite(each) and each > 0)
    return usable[len(usable) // 4] if usable else 0.0


def _rate(transfer: Callable[[int], float], rtt: float, seconds: float) -> Rate:
    size, spent, taken = FIRST, 0.0, 0.0
    while True:
        taken = _duration(transfer(size))
        spent += taken
        if taken - rtt >= LONG_ENOUGH or size == LARGEST or spent >= seconds:
            break
        size = min(LARGEST, int(size * _growth(taken - rtt)))
    samples = [taken]
    while len(samples) < 2 or (_too_few(samples) and spent + taken < seconds):
        samples.append(_duration(transfer(size)))
        spent += samples[-1]
    return _summary(size, samples, rtt)


def _too_few(samples: list[float]) -> bool:
    least, most = SAMPLES
    return len(samples) < least or (len(samples) < most and sum(samples) < least * LONG_ENOUGH)


def _duration(seconds: float) -> float:
    """Return a transfer's seconds; one that never came through took for ever."""
    return max(0.0, seconds) if isfinite(seconds) else inf


def _growth(beyond: float) -> float:
    least, most = GROWTH
    # A tenth more than it takes, lest rounding stops short of it.
    return min(most, max(least, 1.1 * LONG_ENOUGH / beyond)) if beyond > 0 else most


def _summary(size: int, samples: list[float], rtt: float) -> Rate:
    """Return the rate of some transfers. No longer than a round trip, or never through, is not measured."""
    if not all(rtt < taken < inf for taken in samples):
        return Rate(max(SLOWEST, size / max(median(samples), 1e-6)), UNKNOWN)
    rates = sorted(size / (taken - rtt) for taken in samples)
    beyond = len(rates) // EXTREME
    rates = rates[beyond : len(rates) - beyond]
    return Rate(max(SLOWEST, median(rates)), (rates[-1] - rates[0]) / median(rates))
