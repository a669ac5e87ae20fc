"""The broker's clock as a peer knows it, from beats and the orders that answer them.

A beat says when it was sent, its answer when the broker saw it. Had both ways taken equally long, the answer would
have been given in the middle of the round trip; so the broker's clock is known to half of the round trip, and the
shortest one knows best (the clock filter of NTP, RFC 5905, section 10).
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

RECENT = 16
"""Samples that are compared: older ones say little about clocks that drift apart."""


class Sample(NamedTuple):
    """One round trip and the offset that it shows (broker's clock less ours), in seconds."""

    round_trip: float
    offset: float


class Clock:
    """`read` is this peer's clock, in seconds. Before the first sample the two are taken for the same."""

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._recent: deque[Sample] = deque(maxlen=RECENT)
        self._best = Sample(0.0, 0.0)

    @property
    def samples(self) -> int:
        """How many round trips are known, `RECENT` of them at most."""
        return len(self._recent)

    def take(self, sent: float, theirs: float, received: float) -> None:
        """Take a round trip in: sent and received by our clock, answered by theirs. `sent` 0: it was no answer."""
        if 0 < sent <= received:
            self._recent.append(Sample(received - sent, theirs - (sent + received) / 2))
            self._best = min(self._recent)

    def forget(self) -> None:
        """The broker may be another process with another clock: what is known holds until the next sample only."""
        self._recent.clear()

    def now(self, at: float | None = None) -> float:
        """Return the broker's time: now, or when our clock said `at`."""
        return (self._read() if at is None else at) + self._best.offset

    def ours(self, theirs: float) -> float:
        """Return our time when the broker's clock said `theirs`."""
        return theirs - self._best.offset
