"""Which clients are so alike that they are given the same plan, and what a plan for each kind takes, roughly."""

from collections import defaultdict
from collections.abc import Sequence
from math import inf, isclose
from typing import NamedTuple

from zsplit.plan.crowd import Crowd, Seat
from zsplit.plan.options import Choice

ALIKE = 0.1
"""Clients whose speeds, links and steps differ by no more than this share are given the same plan."""

KINDS = 4
"""How many kinds of clients are told apart in a crowd; where there are more, what counts as alike is widened."""

ALIKE_SECONDS = 1e-3
"""Round trips that differ by no more than this are alike."""

ROUGH_PASSES = 8
"""How often each kind may answer to what the others would choose, by the rough estimate."""


def kinds_of(seats: Sequence[Seat]) -> list[list[int]]:
    """Return which seats are so alike that they are given the same plan."""
    share = ALIKE
    kinds = _grouped(seats, share)
    while len(kinds) > KINDS and share < 1:
        share *= 2
        kinds = _grouped(seats, share)
    return kinds


def _grouped(seats: Sequence[Seat], share: float) -> list[list[int]]:
    kinds: list[list[int]] = []
    for index, seat in enumerate(seats):
        kind = next((kind for kind in kinds if _alike(seats[kind[0]], seat, share)), None)
        if kind is None:
            kinds.append([index])
        else:
            kind.append(index)
    return kinds


def _alike(one: Seat, other: Seat, share: float) -> bool:
    links = one.assumption.link, other.assumption.link
    return (
        _same(one) == _same(other)
        and all(isclose(a, b, rel_tol=share) for a, b in zip(one.speeds, other.speeds, strict=True))
        and isclose(links[0].rtt, links[1].rtt, rel_tol=share, abs_tol=ALIKE_SECONDS)
    )


def _same(seat: Seat) -> tuple[object, ...]:
    """Return what is the same for clients that are alike."""
    site = seat.site
    return site.server, site.machine.cores, site.machine.threads, site.machine.device, site.batch, seat.options.choices


class Weight(NamedTuple):
    """What a choice of a kind takes: seconds of a round that it cannot be under, and its work on what is shared."""

    least: float
    loads: dict[tuple[str, int], float]


class Rough:
    """Estimates without a simulation: no round is shorter than its slowest client alone, nor than a server's or a
    host's work. The first client of a kind stands for all of it.
    """

    def __init__(self, crowd: Crowd, kinds: Sequence[Sequence[int]]) -> None:
        self.kinds = kinds
        self.options = [crowd.seats[kind[0]].options.choices for kind in kinds]
        self._weights = [
            {option: Weight(*crowd.weight(kind, option)) for option in options}
            for kind, options in zip(kinds, self.options, strict=True)
        ]

    def alone(self) -> list[Choice]:
        """Return for each kind what is best where everybody does the same on what is shared."""
        return [self._alone(kind) for kind in range(len(self.kinds))]

    def together(self) -> list[Choice]:
        """Return for each kind what is best given the picks of the others, from `alone` on until none changes."""
        picks = self.alone()
        for _ in range(ROUGH_PASSES):
            before = list(picks)
            for kind in range(len(picks)):
                picks[kind] = self.order(picks, kind)[0]
            if picks == before:
                break
        return picks

    def order(self, picks: Sequence[Choice], kind: int, within: float = inf) -> list[Choice]:
        """Return a kind's choices, the most promising first, where each kind has picked one.

        What is estimated to take more than `within` seconds is left out, unless that is all.
        """
        weights = [self._weights[other][pick] for other, pick in enumerate(picks)]
        estimates: dict[Choice, tuple[float, float]] = {}
        for option in self.options[kind]:
            weights[kind] = self._weights[kind][option]
            estimates[option] = self._round(weights)
        order = sorted(self.options[kind], key=lambda option: estimates[option])
        return [option for option in order if estimates[option][0] <= within] or order[:1]

    def _alone(self, kind: int) -> Choice:
        share = sum(map(len, self.kinds)) / len(self.kinds[kind])

        def estimate(option: Choice) -> float:
            weight = self._weights[kind][option]
            return max(weight.least, *(share * seconds for seconds in weight.loads.values()))

        return min(self.options[kind], key=estimate)

    def _round(self, weights: Sequence[Weight]) -> tuple[float, float]:
        """Return seconds of the slowest client's round, then of all rounds together."""
        loads: defaultdict[tuple[str, int], float] = defaultdict(float)
        for weight in weights:
            for shared, seconds in weight.loads.items():
                loads[shared] += seconds
        rounds = [max(weight.least, *(loads[shared] for shared in weight.loads)) for weight in weights]
        return max(rounds), sum(len(kind) * each for kind, each in zip(self.kinds, rounds, strict=True))
