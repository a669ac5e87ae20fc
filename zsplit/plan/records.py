"""What the planner is told, and what it answers."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from zsplit.wire.messages import LinkSpeed, Plan, Profile

Bottleneck = Literal["client", "uplink", "server", "downlink", "cores"]


class Machine(msgspec.Struct, frozen=True):
    """Where a peer computes: its host's name, the host's cores, the threads of one computation, the device.

    Peers on one host share its cores, or its GPU. An empty name is a host of its own.
    """

    host: str
    cores: int
    threads: int
    device: str = "cpu"


class ClientSite(msgspec.Struct, frozen=True):
    """A client: its profile, its link, the steps of its round, the samples of its mini-batch, and its server.

    `turns` is in how many turns it takes the round's steps: each begins and ends with the front on the link.
    """

    client: int
    machine: Machine
    profile: Profile
    link: LinkSpeed
    steps: int
    batch: int
    server: int = 0
    turns: int = 1


class ServerSite(msgspec.Struct, frozen=True):
    """A server and its profile."""

    server: int
    machine: Machine
    profile: Profile


class Limits(msgspec.Struct, frozen=True):
    """What the config fixes, and what it forbids.

    An empty `cut` and 0 `micro_batches` are free. `window` is the most micro-batches in flight (0: all of the step),
    `min_cut` the first place that is allowed (empty: any), `client_memory_mb` MiB for training the front (0: any).
    `slots` is how many buffers the optimizer keeps for each parameter, `carried` how many of them travel with it.
    Places are names or indexes in digits.
    """

    cut: str = ""
    micro_batches: int = 0
    window: int = 0
    min_cut: str = ""
    client_memory_mb: float = 0.0
    slots: int = 0
    carried: int = 0
    up: str = "raw"
    down: str = "raw"


class Situation(msgspec.Struct, frozen=True):
    """All that a plan depends on. A run that plans keeps it in its folder as `profile.json`.

    `clients` are those that train in the same round: under `parallel` at once, under `round_robin` one at a time.
    """

    policy: Literal["parallel", "round_robin"]
    clients: tuple[ClientSite, ...]
    servers: tuple[ServerSite, ...]
    limits: Limits = Limits()

    def at_once(self) -> list[tuple[tuple[ClientSite, ...], tuple[ServerSite, ...]]]:
        """Return the clients that compute at the same time, with their servers: all, or each client on its own."""
        groups = [self.clients] if self.policy == "parallel" else [(site,) for site in self.clients]
        used = [{site.server for site in group} for group in groups]
        servers = [tuple(site for site in self.servers if site.server in numbers) for numbers in used]
        return list(zip(groups, servers, strict=True))


class Forecast(msgspec.Struct, frozen=True):
    """A client's step as predicted, in seconds, and how long in it each resource is busy.

    `turn_seconds` is how long the front, with the optimizer's buffers, is on the link in each turn, down and up.
    `server_busy` counts what the server does for all its clients. `bottleneck` is the resource that is busy longest;
    `cores` are those of a host that client and server share.
    """

    step_seconds: float
    client_busy: float
    uplink_busy: float
    server_busy: float
    downlink_busy: float
    bottleneck: Bottleneck
    turn_seconds: float = 0.0


class Candidate(msgspec.Struct, frozen=True):
    """A cut and a number of micro-batches for some clients that are alike, the others keeping the plan decided on.

    `excluded` says why it was not considered; then it has no forecasts.
    """

    clients: tuple[int, ...]
    cut: str
    micro_batches: int
    forecasts: dict[int, Forecast] = {}
    excluded: str = ""

    @property
    def slowest(self) -> Forecast:
        """The forecast of the slowest of the clients. Raises ValueError where the candidate was excluded."""
        return max(self.forecasts.values(), key=lambda forecast: forecast.step_seconds)


class Decision(msgspec.Struct, frozen=True):
    """Each client's plan and predicted step seconds, the ranking (the chosen first), and sentences to know about it."""

    plans: dict[int, Plan]
    predicted: dict[int, float]
    ranking: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()

    def alike(self) -> list[list[int]]:
        """Return the clients in groups that have the same plan."""
        groups: dict[Plan, list[int]] = {}
        for client, plan in self.plans.items():
            groups.setdefault(plan, []).append(client)
        return list(groups.values())

    def candidates(self, clients: Iterable[int]) -> list[Candidate]:
        """Return what was considered for the slowest of these clients and those like it, the chosen one first."""
        slowest = max(clients, key=lambda client: self.predicted[client])
        return [candidate for candidate in self.ranking if slowest in candidate.clients]
