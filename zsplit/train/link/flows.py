"""How fast messages came in, by lease: what a link carries while it is used, without a measurement of its own."""

import math
import threading
from collections.abc import Collection

from zsplit.wire.messages import Flow, Lease

LEAST = 64 * 1024
LONG = 0.02
"""Bytes, or seconds on the way, of a message that says something about a rate; any other says more about delays."""


class Flows:
    """Flows by lease. Thread-safe; no clock: all times are arguments, in seconds of one clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flows: dict[Lease, Flow] = {}
        self._arrived: dict[Lease, float] = {}

    def add(self, lease: Lease, nbytes: int, left: float, arrived: float) -> float:
        """Count a message that left its sender and arrived here; return when the way began to carry it.

        That is when it left, or when the one before it arrived: messages of one way go one after the other.
        """
        if not math.isfinite(left):
            return arrived
        with self._lock:
            before = self._arrived.get(lease, -math.inf)
            self._arrived[lease] = arrived
            begin = min(max(left, before), arrived)  # two clocks agree to half a round trip only
            if nbytes >= LEAST or arrived - begin >= LONG:
                flow = self._flows.get(lease, Flow())
                starts = flow.starts + (left > before)
                self._flows[lease] = Flow(flow.bytes + nbytes, flow.seconds + arrived - begin, starts)
        return begin

    def take(self, lease: Lease) -> Flow:
        """Return what was counted for the lease, and forget it."""
        with self._lock:
            self._arrived.pop(lease, None)
            return self._flows.pop(lease, Flow())

    def keep(self, leases: Collection[Lease]) -> None:
        """Forget every other lease."""
        with self._lock:
            self._flows = {lease: flow for lease, flow in self._flows.items() if lease in leases}
            self._arrived = {lease: at for lease, at in self._arrived.items() if lease in leases}
