"""Clients that do not wait for each other: whose result is mixed in next, and with which share. No clock, no socket.

Front and back of a turn start from one version and are mixed back together, with one weight (FedAsync, Xie et al. 2019,
algorithm 1, with its polynomial staleness function). The order of arrival is that of the events, so the journal has it.
"""

from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from zsplit.config.sections import ScheduleSection
from zsplit.wire.messages import Contribution


class Arrival(NamedTuple):
    """What came of a turn, and after how many versions its base had been made."""

    contribution: Contribution
    base: int


class Results(NamedTuple):
    """How far training is: as in `Arrivals`, and for each client the turns whose results are counted."""

    versions: int
    over: int
    discarded: int
    turns: dict[int, int]


class Arrivals:
    """Results in the order in which they came. `versions` counts those mixed in, `count` all that are over."""

    def __init__(self, schedule: ScheduleSection) -> None:
        self.versions = 0
        self.count = 0
        self.discarded = 0
        self.turns: dict[int, int] = {}
        self._schedule = schedule
        self._waiting: deque[Arrival] = deque()

    def begin(self, client: int) -> int:
        """A client begins a turn from the newest version; return which of its turns this is, from 0."""
        self.turns[client] = self.turns.get(client, -1) + 1
        return self.turns[client]

    def take(self, contribution: Contribution, base: int) -> None:
        """A turn is done."""
        self._waiting.append(Arrival(contribution, base))

    def waits(self, client: int) -> bool:
        """Whether a client's result is still to be mixed in."""
        return any(arrival.contribution.client == client for arrival in self._waiting)

    @property
    def contributions(self) -> list[Contribution]:
        """What waits, the next one first."""
        return [arrival.contribution for arrival in self._waiting]

    @property
    def next(self) -> tuple[Contribution, float] | None:
        """The result that is mixed in next and its share in the version, 0 where it is too stale; None: none waits."""
        if not self._waiting:
            return None
        contribution, base = self._waiting[0]
        return contribution, self.share(self.versions - base)

    def share(self, staleness: int) -> float:
        """Return α·(staleness + 1)^−a for a result whose base is so many versions old, 0 beyond the limit."""
        if staleness > self._schedule.max_staleness:
            return 0.0
        return float(self._schedule.mixing * (staleness + 1) ** -self._schedule.mixing_power)

    def mark(self, busy: Collection[int]) -> Results:
        """Return how far training is. A turn of a `busy` client is under way, or waits."""
        turns = {client: turn - (client in busy or self.waits(client)) for client, turn in self.turns.items()}
        return Results(self.versions, self.count, self.discarded, turns)

    def go_back(self, mark: Results) -> None:
        """Training is as far as it was then, and nothing waits."""
        self.versions, self.count, self.discarded = mark.versions, mark.over, mark.discarded
        self.turns = dict(mark.turns)
        self._waiting.clear()

    def again(self, client: int) -> None:
        """A client's latest turn came to nothing, or what it left is lost: it is to be done again."""
        self._waiting = deque(each for each in self._waiting if each.contribution.client != client)
        self.turns[client] -= 1

    def mixed(self) -> None:
        """The next result is in a new version."""
        self._waiting.popleft()
        self.versions += 1
        self.count += 1

    def discard(self) -> None:
        """The next result is too stale to be used."""
        self._waiting.popleft()
        self.count += 1
        self.discarded += 1
