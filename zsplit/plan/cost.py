"""From a profile and a link to the seconds, bytes and memory of one client's step under a plan."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from zsplit.wire.messages import LinkSpeed, Profile, Stretch

LABEL_BYTES = 8
"""A label is an int64."""

HEADER_BYTES = 150
"""A tensor's message beside its payload: the msgpack header (103 to 138 bytes) and ZMTP's framing."""

MIB = 2**20


class Seconds(NamedTuple):
    """The forward and the backward pass of one slice."""

    forward: float
    backward: float


class Pace(NamedTuple):
    """One client's step, micro-batch by micro-batch, in seconds on each resource.

    The first forward includes loading the mini-batch, the last backward the optimizer's step. `server` is forward and
    backward of the back; after the last one comes `server_step`. A message arrives `delay` after it was sent.
    """

    forward: tuple[float, ...]
    uplink: tuple[float, ...]
    server: tuple[float, ...]
    downlink: tuple[float, ...]
    backward: tuple[float, ...]
    server_step: float
    delay: float
    window: int

    @property
    def client_busy(self) -> float:
        """Seconds in which the client computes."""
        return sum(self.forward) + sum(self.backward)

    @property
    def server_busy(self) -> float:
        """Seconds in which the server computes for this client."""
        return sum(self.server) + self.server_step

    def shortest(self) -> float:
        """Return seconds that no step can be under: each resource does all of its work, between fill and drain.

        When a step begins, client, uplink and downlink have nothing left to do from the one before.
        """
        first, last = self.forward[0], self.backward[-1]
        sent = first + self.uplink[0] + self.delay
        replied = self.downlink[-1] + self.delay + last
        return max(
            self.client_busy,
            first + sum(self.uplink) + self.delay + self.server[-1] + replied,
            sent + sum(self.server) + replied,
            sent + self.server[0] + sum(self.downlink) + self.delay + last,
        )


class Timetable:
    """A profile summed up from both ends: what front and back cost at each cut, for slices of any size."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.index = {name: index for index, name in enumerate(profile.cuts)}
        self._fronts = list(accumulate(map(_row, profile.stretches), _added))
        self._backs = list(accumulate(map(_row, reversed(profile.stretches)), _added))[::-1]

    def front(self, cut: str, samples: int) -> Seconds:
        """Return the seconds of a slice of so many samples up to the cut."""
        return self._at(self._fronts[self.index[cut]], samples)

    def back(self, cut: str, samples: int) -> Seconds:
        """Return the seconds of a slice of so many samples from the cut to the loss."""
        return self._at(self._backs[self.index[cut] + 1], samples)

    def front_step(self, cut: str) -> float:
        """Return the seconds of the front's optimizer step."""
        return self._fronts[self.index[cut]].step

    def back_step(self, cut: str) -> float:
        """Return the seconds of the back's optimizer step."""
        return self._backs[self.index[cut] + 1].step

    def packing(self, cut: str) -> tuple[float, float]:
        """Return the seconds a sample of packing what is sent at the cut, and of unpacking what comes there."""
        place, profile = self.index[cut], self.profile
        return (profile.encode[place] if profile.encode else 0.0), (profile.decode[place] if profile.decode else 0.0)

    def front_memory(self, cut: str, samples: int, slots: int) -> float:
        """Return bytes for training the front with so many samples in flight.

        Weights, their gradients, `slots` optimizer buffers for each, and what waits for the backward pass.
        """
        row = self._fronts[self.index[cut]]
        return row.weights * (2 + slots) + row.saved * samples

    def front_state(self, cut: str, carried: int) -> float:
        """Return bytes of the front as it travels: weights, and so many optimizer buffers for each."""
        return self._fronts[self.index[cut]].weights * (1 + carried)

    def has_front(self, cut: str) -> bool:
        """Whether every stretch up to the cut was measured."""
        return self.index[cut] < len(self._fronts)

    def has_back(self, cut: str) -> bool:
        """Whether every stretch from the cut on was measured."""
        return cut in self.index and len(self._backs) == len(self.index) + 1

    def _at(self, row: "_Row", samples: int) -> Seconds:
        sizes = self.profile.sizes
        return Seconds(interpolated(sizes, row.forward, samples), interpolated(sizes, row.backward, samples))


class _Row(NamedTuple):
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    step: float
    saved: float
    weights: float


def _row(stretch: Stretch) -> _Row:
    return _Row(stretch.forward, stretch.backward, stretch.step, stretch.saved, stretch.weights)


def _added(one: _Row, other: _Row) -> _Row:
    forward = tuple(a + b for a, b in zip(one.forward, other.forward, strict=True))
    backward = tuple(a + b for a, b in zip(one.backward, other.backward, strict=True))
    return _Row(forward, backward, one.step + other.step, one.saved + other.saved, one.weights + other.weights)


def interpolated(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    """Return the seconds at a size: on straight lines between what was measured, the outer ones prolonged.

    One measured size alone is taken for proportional. Never below zero.
    """
    if len(sizes) == 1:
        return seconds[0] * size / sizes[0]
    right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
    left = right - 1
    share = (size - sizes[left]) / (sizes[right] - sizes[left])
    return max(0.0, seconds[left] + share * (seconds[right] - seconds[left]))


def slices(batch: int, micro_batches: int) -> list[int]:
    """Return the samples of each micro-batch, as `tensor_split` deals them out.

    >>> slices(10, 4)
    [3, 3, 2, 2]
    """
    count = min(batch, micro_batches)
    return [batch // count + (micro < batch % count) for micro in range(count)]


def pace(
    client: Timetable, server: Timetable, link: LinkSpeed, batch: int, cut: str, micro_batches: int, window: int
) -> Pace:
    """Return what a step takes on each resource."""
    sizes = slices(batch, micro_batches)
    place = client.index[cut]
    up, down = client.profile.up[place], client.profile.down[place]
    own, theirs = client.profile.message_seconds, server.profile.message_seconds
    fronts = {size: client.front(cut, size) for size in set(sizes)}
    backs = {size: sum(server.back(cut, size)) + theirs + size * sum(server.packing(cut)) for size in fronts}
    pack, unpack = client.packing(cut)
    forward = [fronts[size].forward + own / 2 + size * pack for size in sizes]
    backward = [fronts[size].backward + own / 2 + size * unpack for size in sizes]
    forward[0] += client.profile.batch_seconds
    backward[-1] += client.front_step(cut)
    return Pace(
        forward=tuple(forward),
        uplink=tuple((size * (up + LABEL_BYTES) + HEADER_BYTES) / link.up for size in sizes),
        server=tuple(backs[size] for size in sizes),
        downlink=tuple((size * down + HEADER_BYTES) / link.down for size in sizes),
        backward=tuple(backward),
        server_step=server.back_step(cut),
        delay=link.rtt / 2,
        window=window,
    )
