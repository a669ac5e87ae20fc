"""Clients that train at once and get into each other's way: their step times under given choices."""

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

    def speeds(self) -> tuple[float, ...]:
        """Return what tells whether clients are alike: seconds of the longest front that was measured, and rates."""
        link = self.assumption.link
        longest = self.options.choices[-1].cut
        return sum(self.timetable.front(longest, self.site.batch)), link.up, link.down

    def alone(self, choice: Choice, sharing: int) -> float:
        """Return the seconds of a step, roughly, where the server does the same for so many clients."""
        own = self.pace(choice)
        return max(own.shortest(), sharing * own.server_busy)

    def pace(self, choice: Choice) -> Pace:
        """Return what a step takes on each resource."""
        if choice not in self._paces:
            link = self.assumption.link
            self._paces[choice] = pace(self.timetable, self.server, link, self.site.batch, *choice)
        return self._paces[choice]


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
            if any(len(times) < pipe.steps for times, pipe in zip(ends, pipes, strict=True)):
                self._over[key] = limit
                return None
            self._known[key] = [step_seconds(times) for times in ends]
        return self._known[key]

    def score(self, choices: Sequence[Choice], limit: float = inf) -> Score | None:
        """Return how good the choices are; None where a round takes longer than `limit` seconds."""
        steps = self.step_seconds(choices, limit) if self.least(choices) <= limit else None
        if steps is None:
            return None
        rounds = [seat.site.steps * seconds for seat, seconds in zip(self.seats, steps, strict=True)]
        return Score(max(rounds), sum(rounds)) if max(rounds) <= limit else None

    def least(self, choices: Sequence[Choice]) -> float:
        """Return seconds that the slowest client's round cannot be under."""
        pairs = zip(self.seats, choices, strict=True)
        return max(seat.site.steps * seat.pace(choice).shortest() for seat, choice in pairs) * (1 - 1e-9)

    def estimate(self, choices: Sequence[Choice]) -> float:
        """Return roughly what `score` will find, for trying the promising first."""
        loads = [0.0] * len(self._servers)
        for seat, choice in zip(self.seats, choices, strict=True):
            loads[self._servers.index(seat.site.server)] += seat.site.steps * seat.pace(choice).server_busy
        return max(self.least(choices), *loads)

    def forecasts(self, choices: Sequence[Choice]) -> dict[int, Forecast]:
        """Return each client's step and how long in it each resource is busy."""
        steps = self.step_seconds(choices)
        assert steps is not None
        paces = [seat.pace(choice) for seat, choice in zip(self.seats, choices, strict=True)]
        servers, pools = self._loads(paces, steps)
        return {
            seat.site.client: self._forecast(index, paces[index], steps[index], servers, pools)
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
        self, index: int, own: Pace, seconds: float, servers: Sequence[float], pools: Sequence[float]
    ) -> Forecast:
        server = self._servers.index(self.seats[index].site.server)
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
        return Forecast(seconds, busy["client"], busy["uplink"], busy["server"], busy["downlink"], longest)

    def _pipe(self, index: int, choice: Choice, limit: float) -> Pipe:
        seat = self.seats[index]
        steps = WARM + max(1, round(self._counted * seat.site.steps))
        server = self._servers.index(seat.site.server)
        return Pipe(seat.pace(choice), server, self._cores[index], steps, limit / seat.site.steps)


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
