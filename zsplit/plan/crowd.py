"""Clients that train at once and get into each other's way: their step times under given choices."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from math import inf
from typing import NamedTuple

from zsplit.plan.cost import Pace, Timetable, pace
from zsplit.plan.links import assumed
from zsplit.plan.options import Choice, Options, options
from zsplit.plan.records import Bottleneck, ClientSite, Forecast, Limits, Machine, ServerSite
from zsplit.plan.simulate import WARM, Cores, Pipe, simulate, step_seconds

COUNTED = 8
"""Steps that are simulated and counted, of the client that has most."""

LEAST = 3
"""Steps that are counted of a large crowd."""

EFFORT = 64
"""Steps of all clients that are simulated and counted; a large crowd has fewer each."""


class Seat:
    """A client with its server's timetable and the link that is assumed: its options and its pace at each."""

    def __init__(self, site: ClientSite, server: Timetable, limits: Limits) -> None:
        self.site = site
        self.limits = limits
        self.timetable = Timetable(site.profile)
        self.server = server
        self.assumption = assumed(site.link)
        self._paces: dict[Choice, Pace] = {}

    @cached_property
    def options(self) -> Options:
        """What this client may choose from. Raises PlanError where nothing is left."""
        return options(self.site, self.timetable, self.server, self.limits)

    @cached_property
    def speeds(self) -> tuple[float, ...]:
        """Return what tells whether clients are alike: seconds of the longest front that was measured, and rates."""
        link = self.assumption.link
        longest = self.options.choices[-1].cut
        return sum(self.timetable.front(longest, self.site.batch)), link.up, link.down

    def pace(self, choice: Choice) -> Pace:
        """Return what a step takes on each resource."""
        if choice not in self._paces:
            link = self.assumption.link
            self._paces[choice] = pace(self.timetable, self.server, link, self.site.batch, *choice)
        return self._paces[choice]

    def turn_seconds(self, choice: Choice) -> float:
        """Return how long the front is on the link in a turn: down at its beginning, up at its end."""
        link = self.assumption.link
        state = self.timetable.front_state(choice.cut, self.limits.carried)
        return state / link.down + state / link.up + 2 * link.rtt

    def round_seconds(self, choice: Choice, step_seconds: float) -> float:
        """Return the seconds of a round whose steps take so long."""
        return self.site.steps * step_seconds + self.site.turns * self.turn_seconds(choice)


class Score(NamedTuple):
    """How good a plan is, less is better: seconds of the slowest client's round, then of all rounds together."""

    slowest: float
    total: float

    def within(self, other: "Score", share: float) -> bool:
        """Whether this is worse than another by no more than a share."""
        return self.slowest <= other.slowest * (1 + share) and self.total <= other.total * (1 + share)


class Crowd:
    """Clients that train at once, with the servers that compute for them."""

    def __init__(self, seats: Sequence[Seat], servers: Sequence[ServerSite]) -> None:
        self.seats = list(seats)
        self._servers = [site.server for site in servers]
        machines = [*(seat.site.machine for seat in seats), *(site.machine for site in servers)]
        cores, self._pools = shared_cores(machines)
        self._cores, self._server_cores = cores[: len(seats)], cores[len(seats) :]
        self._counted = max(LEAST, min(COUNTED, EFFORT // len(seats))) / max(seat.site.steps for seat in seats)
        self.effort = 0
        """Micro-batches that were simulated so far."""
        self._known: dict[tuple[Choice, ...], list[float]] = {}
        self._over: dict[tuple[Choice, ...], float] = {}

    def step_seconds(self, choices: Sequence[Choice], limit: float = inf) -> list[float] | None:
        """Return each client's step time; None as soon as a round turns out to take longer than `limit` seconds."""
        key = tuple(choices)
        if self._over.get(key, -inf) >= limit:
            return None
        if key not in self._known:
            pipes = [self._pipe(index, choice, limit) for index, choice in enumerate(choices)]
            ends = simulate(pipes, self._server_cores, self._pools)
            self.effort += sum(len(times) * len(pipe.pace.forward) for times, pipe in zip(ends, pipes, strict=True))
            if any(len(times) < pipe.steps for times, pipe in zip(ends, pipes, strict=True)):
                self._over[key] = limit
                return None
            self._known[key] = [step_seconds(times) for times in ends]
        return self._known[key]

    def score(self, choices: Sequence[Choice], limit: float = inf) -> Score | None:
        """Return how good the choices are; None where a round takes longer than `limit` seconds.

        The few steps that are simulated may leave work to those after them; a whole round cannot.
        """
        least = self.least(choices)
        steps = self.step_seconds(choices, limit) if least <= limit else None
        if steps is None:
            return None
        places = zip(self.seats, choices, steps, strict=True)
        rounds = [seat.round_seconds(choice, seconds) for seat, choice, seconds in places]
        slowest = max(least, *rounds)
        return Score(slowest, sum(rounds)) if slowest <= limit else None

    def least(self, choices: Sequence[Choice]) -> float:
        """Return seconds that the slowest client's round cannot be under: its own, and the work on what is shared."""
        loads: defaultdict[tuple[str, int], float] = defaultdict(float)
        longest = 0.0
        for index, choice in enumerate(choices):
            alone, work = self.weight([index], choice)
            longest = max(longest, alone)
            for shared, seconds in work.items():
                loads[shared] += seconds
        return max(longest, *loads.values()) * (1 - 1e-9)

    def knows(self, choices: Sequence[Choice]) -> bool:
        """Whether the step times of these choices have been found."""
        return tuple(choices) in self._known

    def weight(self, members: Sequence[int], choice: Choice) -> tuple[float, dict[tuple[str, int], float]]:
        """Return what a choice of some clients takes, all taken for the first of them.

        That is the seconds that no round of theirs can be under, and those of a round in which each server and each
        pool of cores works for them.
        """
        seat = self.seats[members[0]]
        own, steps = seat.pace(choice), seat.site.steps
        server = self._servers.index(seat.site.server)
        loads = {("server", server): len(members) * steps * own.server_busy}
        for places, busy in (
            ([self._cores[index] for index in members], own.client_busy),
            ([self._server_cores[server]] * len(members), own.server_busy),
        ):
            for pool, threads in places:
                if pool >= 0:
                    work = steps * busy * threads / self._pools[pool]
                    loads["pool", pool] = loads.get(("pool", pool), 0.0) + work
        return seat.round_seconds(choice, own.shortest()), loads

    def forecasts(self, choices: Sequence[Choice]) -> dict[int, Forecast]:
        """Return each client's step and how long in it each resource is busy."""
        steps = self.step_seconds(choices)
        assert steps is not None
        paces = [seat.pace(choice) for seat, choice in zip(self.seats, choices, strict=True)]
        servers, pools = self._loads(paces, steps)
        return {
            seat.site.client: self._forecast(index, choices[index], steps[index], servers, pools)
            for index, seat in enumerate(self.seats)
        }

    def _loads(self, paces: Sequence[Pace], steps: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return the share of time in which each server computes, and in which the cores of each pool are taken."""
        servers, pools = [0.0] * len(self._servers), [0.0] * len(self._pools)
        for seat, own, seconds, cores in zip(self.seats, paces, steps, self._cores, strict=True):
            server = self._servers.index(seat.site.server)
            servers[server] += own.server_busy / seconds
            for place, busy in ((cores, own.client_busy), (self._server_cores[server], own.server_busy)):
                if place.pool >= 0:
                    pools[place.pool] += busy / seconds * place.threads / self._pools[place.pool]
        return servers, pools

    def _forecast(
        self, index: int, choice: Choice, seconds: float, servers: Sequence[float], pools: Sequence[float]
    ) -> Forecast:
        seat = self.seats[index]
        own, server = seat.pace(choice), self._servers.index(seat.site.server)
        busy: dict[Bottleneck, float] = {
            "client": own.client_busy,
            "uplink": sum(own.uplink),
            "server": min(seconds, seconds * servers[server]),
            "downlink": sum(own.downlink),
        }
        longest = max(busy, key=lambda resource: busy[resource])
        shared = [cores.pool for cores in (self._cores[index], self._server_cores[server]) if cores.pool >= 0]
        if any(seconds * pools[pool] > busy[longest] for pool in shared):
            longest = "cores"
        parts = busy["client"], busy["uplink"], busy["server"], busy["downlink"]
        return Forecast(seconds, *parts, longest, seat.turn_seconds(choice))

    def _pipe(self, index: int, choice: Choice, limit: float) -> Pipe:
        seat = self.seats[index]
        steps = WARM + max(1, round(self._counted * seat.site.steps))
        server = self._servers.index(seat.site.server)
        left = limit - seat.site.turns * seat.turn_seconds(choice)
        return Pipe(seat.pace(choice), server, self._cores[index], steps, left / seat.site.steps)


def shared_cores(machines: Sequence[Machine]) -> tuple[list[Cores], list[int]]:
    """Return where each machine's peer computes, and the cores of the pools that are too small for all at once.

    Computations on one GPU are taken to run one after the other.
    """
    hosts = sorted({(machine.host, machine.device) for machine in machines if machine.host})
    members = {host: [m for m in machines if (m.host, m.device) == host] for host in hosts}
    sizes = {host: max(m.cores for m in peers) if host[1] == "cpu" else 1 for host, peers in members.items()}
    asked = {host: sum(_threads(m, sizes[host]) for m in peers) for host, peers in members.items()}
    tight = [host for host in hosts if asked[host] > sizes[host]]
    cores = [
        Cores(tight.index(host), _threads(machine, sizes[host])) if host in tight else Cores()
        for machine, host in ((machine, (machine.host, machine.device)) for machine in machines)
    ]
    return cores, [sizes[host] for host in tight]


def _threads(machine: Machine, cores: int) -> int:
    """Return the cores that one computation takes of a pool."""
    return min(max(machine.threads, 1), cores) if machine.device == "cpu" else 1
