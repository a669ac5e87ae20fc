"""How busy everybody was in a stretch of a timeline, and how large the bubbles of the pipeline were."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from statistics import median

import msgspec

from zsplit.monitor.timeline.kinds import WAITING
from zsplit.monitor.timeline.read import Bar, Timeline
from zsplit.monitor.timeline.stretch import COMPUTE, TRAINING, Extent, Place, steps_of, within


class LaneFigures(msgspec.Struct, frozen=True):
    """The share of the stretch in which the lane was busy, and its seconds by name, waiting included."""

    busy: float
    seconds: dict[str, float]


class PeerFigures(msgspec.Struct, frozen=True):
    """A peer in a stretch: the busy share of what computes, its lanes, and the bubble of the steps it took part in.

    The bubble of a step is the share of the time between the first and the last span of the client's step in which
    this peer computes nothing; here it is the median over the `steps` that lie in the stretch, None without any.
    """

    peer: str
    busy: float
    bubble: float | None
    steps: int
    lanes: dict[str, LaneFigures]


class Figures(msgspec.Struct, frozen=True):
    """A stretch, in seconds since the run began, and all peers in it."""

    begin: float
    end: float
    peers: list[PeerFigures]


def figures_of(timeline: Timeline, extent: Extent) -> Figures:
    """Return the figures of all peers in a stretch."""
    steps = {place: step for place, step in steps_of(timeline).items() if _lies(step, extent)}
    lanes = timeline.lanes()
    peers = {peer: {lane: bars for (who, lane), bars in lanes.items() if who == peer} for peer, _ in lanes}
    return Figures(*extent, [_peer(peer, own, steps, extent) for peer, own in peers.items()])


def _lies(inner: Extent, outer: Extent) -> bool:
    return outer.begin <= inner.begin and inner.end <= outer.end


def _peer(peer: str, lanes: Mapping[str, list[Bar]], steps: Mapping[Place, Extent], extent: Extent) -> PeerFigures:
    computing = lanes.get(COMPUTE, [])
    busy = Busy(computing)
    mine = _took_part(peer, computing)
    bubbles = [1 - busy.share(step) for place, step in steps.items() if mine & _keys(place)]
    shown = {lane: _lane(bars, extent) for lane, bars in lanes.items()}
    return PeerFigures(peer, busy.share(extent), median(bubbles) if bubbles else None, len(bubbles), shown)


def _lane(bars: list[Bar], extent: Extent) -> LaneFigures:
    seconds: dict[str, float] = {}
    for bar in within(bars, extent):
        seconds[bar.name] = seconds.get(bar.name, 0.0) + bar.seconds
    return LaneFigures(Busy(bars).share(extent), seconds)


def _took_part(peer: str, bars: Iterable[Bar]) -> set[Place]:
    """Return the steps that a peer took part in; where it does not say for which client, the client is empty."""
    own = peer if peer.startswith("client") else ""
    return {
        Place(f"client {bar.client}" if bar.client >= 0 else own, bar.round, bar.step)
        for bar in bars
        if bar.name in TRAINING
    }


def _keys(place: Place) -> set[Place]:
    return {place, place._replace(client="")}


class Busy:
    """When somebody was at work: seconds within any stretch, in logarithmic time."""

    def __init__(self, bars: Iterable[Bar]) -> None:
        merged: list[Extent] = []
        for bar in sorted((bar for bar in bars if bar.name not in WAITING), key=lambda bar: bar.begin):
            if merged and bar.begin <= merged[-1].end:
                merged[-1] = Extent(merged[-1].begin, max(merged[-1].end, bar.end))
            else:
                merged.append(Extent(bar.begin, bar.end))
        self._merged = merged
        self._begins = [extent.begin for extent in merged]
        self._before = [0.0, *accumulate(extent.end - extent.begin for extent in merged)]

    def share(self, extent: Extent) -> float:
        """Return the share of a stretch that was spent at work."""
        seconds = self._until(extent.end) - self._until(extent.begin)
        return min(1.0, max(0.0, seconds / max(extent.end - extent.begin, 1e-9)))

    def _until(self, time: float) -> float:
        number = bisect_right(self._begins, time)
        late = max(0.0, self._merged[number - 1].end - time) if number else 0.0
        return self._before[number] - late
