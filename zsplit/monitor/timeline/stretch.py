"""Which stretch of a timeline to look at: from when to when, by time, round or step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from zsplit.errors import ConfigError
from zsplit.monitor.timeline.read import Bar, Timeline

COMPUTE = "compute"

TRAINING = frozenset({"load", "forward", "tail", "backward", "step"})
"""Spans on a client that a training step consists of."""

STEPS = 3
"""Steps that are shown where nothing else is asked for."""

SHORTEST = 1e-6
"""Seconds of a stretch at least, so that one without length can be drawn."""


class Place(NamedTuple):
    """A step: the client that trains, the round (counted from 1, −1 unknown) and the step in it (from 0)."""

    client: str
    round: int
    step: int


class Extent(NamedTuple):
    """From when to when, in seconds since the run began."""

    begin: float
    end: float


@dataclass(frozen=True)
class Wanted:
    """What somebody asked to see: from when to when (s), or a round, or a step (of a round, or the last such one)."""

    begin: float | None = None
    end: float | None = None
    round: int | None = None
    step: int | None = None


def choose(timeline: Timeline, wanted: Wanted) -> Extent:
    """Return the stretch to look at: what was asked for, else the last steps of the client that trained last.

    Raises ConfigError where there is no such stretch.
    """
    begin, end = _stretch(timeline, wanted)
    return Extent(begin, max(end, begin + SHORTEST))


def _stretch(timeline: Timeline, wanted: Wanted) -> Extent:
    timed = wanted.begin is not None or wanted.end is not None
    if timed and (wanted.round is not None or wanted.step is not None):
        raise ConfigError("a stretch is given by --from and --to, or by --round and --step, not by both")
    if timed:
        return _between(timeline, wanted)
    if wanted.step is not None:
        return _step(timeline, wanted.step, wanted.round)
    return _round(timeline, wanted.round) if wanted.round is not None else _last_steps(timeline)


def _between(timeline: Timeline, wanted: Wanted) -> Extent:
    begin = timeline.begin if wanted.begin is None else wanted.begin
    end = timeline.end if wanted.end is None else wanted.end
    if not (begin < end and begin < timeline.end and end > timeline.begin):
        raise ConfigError(
            f"nothing lies between {begin:g} s and {end:g} s: "
            f"the timeline goes from {timeline.begin:.3f} s to {timeline.end:.3f} s"
        )
    return Extent(max(begin, timeline.begin), min(end, timeline.end))


def _step(timeline: Timeline, step: int, number: int | None) -> Extent:
    steps = steps_of(timeline)
    rounds = {place.round for place in steps}
    there = [place for place in steps if number in (None, place.round)]
    found = [place for place in there if place.step == step]
    if not found:
        where = "" if number is None else f" in round {number}"
        known = _known("steps", {place.step for place in there}) if there else _known("rounds", rounds - {-1})
        raise ConfigError(f"no client trained step {step}{where}: {known}")
    return steps[max(found, key=lambda place: steps[place].end)]


def _round(timeline: Timeline, number: int) -> Extent:
    bars = [bar for bars in timeline.rows.values() for bar in bars]
    found = [bar for bar in bars if bar.round == number]
    if not found:
        raise ConfigError(f"no span lies in round {number}: {_known('rounds', {bar.round for bar in bars} - {-1})}")
    return _hull(found)


def _known(what: str, numbers: set[int]) -> str:
    if not numbers:
        return f"there are no {what} in it yet, give --from and --to"
    return f"the timeline has {what} {min(numbers)} to {max(numbers)}"


def _last_steps(timeline: Timeline) -> Extent:
    steps = sorted(steps_of(timeline).items(), key=lambda item: item[1].end)
    if not steps:
        return Extent(timeline.begin, timeline.end)
    last = steps[-1][0]
    mine = [extent for place, extent in steps if place[:2] == last[:2]][-STEPS:]
    return Extent(mine[0].begin, mine[-1].end)


def _hull(bars: Iterable[Bar]) -> Extent:
    extents = list(bars)
    return Extent(min(bar.begin for bar in extents), max(bar.end for bar in extents))


def steps_of(timeline: Timeline) -> dict[Place, Extent]:
    """Return the steps that clients trained: each from its first to its last span of training on the client."""
    steps: dict[Place, Extent] = {}
    for row, bars in timeline.rows.items():
        for bar in bars:
            if row.lane == COMPUTE and row.peer.startswith("client") and bar.step >= 0 and bar.name in TRAINING:
                place = Place(row.peer, bar.round, bar.step)
                begin, end = steps.get(place, Extent(bar.begin, bar.end))
                steps[place] = Extent(min(begin, bar.begin), max(end, bar.end))
    return steps


def within(bars: Iterable[Bar], extent: Extent) -> list[Bar]:
    """Return the spans that reach into a stretch, cut to it."""
    begin, end = extent
    found = []
    for bar in bars:
        if begin <= bar.begin and bar.end <= end:
            found.append(bar)
        elif bar.begin < end and bar.end > begin:
            found.append(bar._replace(begin=max(begin, bar.begin), end=min(end, bar.end)))
    return found
