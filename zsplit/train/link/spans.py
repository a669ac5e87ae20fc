"""What this peer did when: spans for the run's timeline, kept until they are sent."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from zsplit.train.link.clock import Clock
from zsplit.wire.messages import Lease, Span

Lane = Literal["compute", "up", "down"]

KEPT = 64 * 1024
"""Spans that wait to be sent at most; where there are more, the oldest are lost."""

BATCH = 4096
"""Spans in one message at most."""


class Recorder:
    """Spans by this peer's clock (`time.monotonic`, seconds). Thread-safe; where it is off, nothing is kept."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.clients: Mapping[Lease, int] = {}  # whose leases they are: a server works for several clients
        self._spans: deque[Span] = deque(maxlen=KEPT)  # its methods are atomic

    def add(
        self,
        lane: Lane,
        name: str,
        begin: float,
        end: float,
        step: int = -1,
        micro: int = -1,
        lease: Lease | None = None,
    ) -> None:
        """Keep a span of a lease's job."""
        if self.on:
            client = self.clients.get(lease, -1) if lease else -1
            self._spans.append(Span(lane, name, begin, max(0.0, end - begin), step, micro, client))

    def span(self, lane: Lane, name: str, step: int, micro: int, lease: Lease) -> AbstractContextManager[None]:
        """Keep what is done inside as a span."""
        return self._timed(lane, name, step, micro, lease) if self.on else nullcontext()

    @contextmanager
    def _timed(self, lane: Lane, name: str, step: int, micro: int, lease: Lease) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(lane, name, begin, time.monotonic(), step, micro, lease)

    def drain(self, clock: Clock) -> tuple[Span, ...]:
        """Return the oldest spans by the broker's clock, `BATCH` at most, and forget them. One thread drains."""
        batch = [self._spans.popleft() for _ in range(min(BATCH, len(self._spans)))]
        return tuple(span._replace(begin=clock.now(span.begin)) for span in batch)
