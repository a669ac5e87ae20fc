"""The pipeline with serial resources, run event by event: clients, uplinks, servers, downlinks, shared cores.

Each client follows the order of micro-batches that `zsplit.train.schedule.order` gives it: forwards while fewer than
the window are unanswered, backwards in order and only when no forward is allowed. A server computes forward and
backward of one slice in one go, for whoever came first. The method is that of PipeLearn and PiPar, with time for
messages, steps and shared cores.
"""

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import NamedTuple

from zsplit.plan.cost import Pace

WARM = 2
"""Steps that are not counted: while the first ones run, the clients of a server get out of each other's way."""


class Cores(NamedTuple):
    """Where a peer computes: a pool of cores that it shares (−1: none), and how many of them it takes."""

    pool: int = -1
    threads: int = 1


class Pipe(NamedTuple):
    """One client in the simulation: its pace, its server, its cores, its steps, and the step time that is too long."""

    pace: Pace
    server: int = 0
    cores: Cores = Cores()
    steps: int = 2 * WARM
    limit: float = inf


def simulate(pipes: Sequence[Pipe], servers: Sequence[Cores], pools: Sequence[int] = ()) -> list[list[float]]:
    """Return for each pipe when its steps end, in seconds; shorter lists where a step time would exceed its limit.

    `servers` says where each server computes, `pools` how many cores each pool has. All begin at 0; a client's next
    step begins when the one before has ended.
    """
    return _Simulation(pipes, servers, pools).run()


def step_seconds(ends: Sequence[float]) -> float:
    """Return the step time once the pipeline is warm."""
    return (ends[-1] - ends[WARM - 1]) / (len(ends) - WARM)


class _Pool:
    """Cores of a host: computations start in the order in which they ask, when there are cores for them."""

    def __init__(self, cores: int) -> None:
        self.free = self.cores = cores
        self.waiting: deque[tuple[int, Callable[[_Client], None], _Client]] = deque()


class _Server:
    def __init__(self, cores: Cores) -> None:
        self.cores = cores
        self.queue: deque[_Client] = deque()


class _Client:
    def __init__(self, pipe: Pipe, server: _Server) -> None:
        self.pace = pipe.pace
        self.slices = len(pipe.pace.forward)
        self.cores = pipe.cores
        self.server = server
        self.steps = pipe.steps
        self.allowed = pipe.limit * (pipe.steps - WARM)
        self.sent = self.served = self.arrived = self.answered = 0
        self.up_free = self.down_free = 0.0
        self.waits = False
        self.ends: list[float] = []

    def due(self) -> float:
        """Return when this client has to be done to stay within its limit."""
        return self.ends[WARM - 1] + self.allowed if WARM <= len(self.ends) < self.steps else inf


class _Simulation:
    def __init__(self, pipes: Sequence[Pipe], servers: Sequence[Cores], pools: Sequence[int]) -> None:
        self.pools = [_Pool(cores) for cores in pools]
        houses = [_Server(cores) for cores in servers]
        self.clients = [_Client(pipe, houses[pipe.server]) for pipe in pipes]
        self.events: list[tuple[float, int, Callable[[_Client], None], _Client]] = []
        self.number = count()
        self.now = 0.0
        self.due = inf

    def run(self) -> list[list[float]]:
        for client in self.clients:
            self._go_on(client)
        events = self.events
        while events and events[0][0] <= self.due:
            self.now, _, happen, client = heappop(events)
            happen(client)
        return [client.ends for client in self.clients]

    def _later(self, when: float, happen: Callable[[_Client], None], client: _Client) -> None:
        heappush(self.events, (when, next(self.number), happen, client))

    # The client

    def _go_on(self, client: _Client) -> None:
        """Start the client's next computation, or wait for a gradient."""
        client.waits = False
        if client.sent < client.slices and client.sent - client.answered < client.pace.window:
            self._enter(client.cores, self._forward, client)
        elif client.arrived > client.answered:
            self._enter(client.cores, self._backward, client)
        else:
            client.waits = True

    def _forward(self, client: _Client) -> None:
        self._later(self.now + client.pace.forward[client.sent], self._forwarded, client)

    def _forwarded(self, client: _Client) -> None:
        self._leave(client.cores)
        client.up_free = max(client.up_free, self.now) + client.pace.uplink[client.sent]
        client.sent += 1
        self._later(client.up_free + client.pace.delay, self._at_server, client)
        self._go_on(client)

    def _at_client(self, client: _Client) -> None:
        client.arrived += 1
        if client.waits:
            self._go_on(client)

    def _backward(self, client: _Client) -> None:
        self._later(self.now + client.pace.backward[client.answered], self._backwarded, client)

    def _backwarded(self, client: _Client) -> None:
        self._leave(client.cores)
        client.answered += 1
        if client.answered == client.slices:
            client.sent = client.served = client.arrived = client.answered = 0
            client.ends.append(self.now)
            if len(client.ends) >= WARM:
                self.due = min(each.due() for each in self.clients)
            if len(client.ends) == client.steps:
                return
        self._go_on(client)

    # The server

    def _at_server(self, client: _Client) -> None:
        client.server.queue.append(client)
        if len(client.server.queue) == 1:
            self._enter(client.server.cores, self._serve, client)

    def _serve(self, client: _Client) -> None:
        self._later(self.now + client.pace.server[client.served], self._reply, client)

    def _reply(self, client: _Client) -> None:
        client.down_free = max(client.down_free, self.now) + client.pace.downlink[client.served]
        self._later(client.down_free + client.pace.delay, self._at_client, client)
        client.served += 1
        if client.served == client.slices:
            self._later(self.now + client.pace.server_step, self._served, client)
        else:
            self._served(client)

    def _served(self, client: _Client) -> None:
        server = client.server
        self._leave(server.cores)
        server.queue.popleft()
        if server.queue:
            self._enter(server.cores, self._serve, server.queue[0])

    # Shared cores

    def _enter(self, cores: Cores, begin: Callable[[_Client], None], client: _Client) -> None:
        if cores.pool < 0:
            begin(client)
            return
        pool = self.pools[cores.pool]
        if pool.free >= cores.threads and not pool.waiting:
            pool.free -= cores.threads
            begin(client)
        else:
            pool.waiting.append((cores.threads, begin, client))

    def _leave(self, cores: Cores) -> None:
        if cores.pool < 0:
            return
        pool = self.pools[cores.pool]
        pool.free += cores.threads
        while pool.waiting and pool.free >= pool.waiting[0][0]:
            threads, begin, client = pool.waiting.popleft()
            pool.free -= threads
            begin(client)
