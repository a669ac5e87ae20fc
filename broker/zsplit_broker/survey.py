"""What the peers measured of themselves, and who is to measure next. No clock, no socket."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from zsplit.config import Config
from zsplit.wire.messages import LinkSpeed, Measure, Profile
from zsplit_broker.events import Done


class Measured(NamedTuple):
    """A client's profile, and its link to the server that it was measured with."""

    server: int
    profile: Profile
    link: LinkSpeed


def plans_itself(config: Config) -> bool:
    """Whether cut or micro-batches are the planner's choice in this run."""
    return "auto" in (config.model.cut, config.train.micro_batches) and not config.plan.file


def measures(config: Config) -> bool:
    """Whether peers measure themselves before the run begins."""
    return plans_itself(config) or (config.plan.predict and not config.plan.file)


class Survey:
    """Measurements, by peer. Servers come first, since a client is measured with one that has a profile."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.servers: dict[int, Profile] = {}
        self.clients: dict[int, Measured] = {}

    def due(self, servers: Sequence[int], away: Collection[int] = ()) -> list[tuple[int, int]]:
        """Return who is to measure now, as (server, client) with client −1 for a server by itself; all are done
        when it is empty. One at a time where the others are to be quiet. `servers` are here, `away` is not asked.
        """
        missing = [(server, -1) for server in servers if server not in self.servers]
        if not missing:
            missing = list(self._clients_due(servers, away))
        return missing[:1] if self.config.plan.quiet else missing

    def _clients_due(self, servers: Sequence[int], away: Collection[int]) -> Iterator[tuple[int, int]]:
        """Yield the clients that have not measured, each with the server that it will have most of the time."""
        for client in range(self.config.schedule.clients):
            if servers and client not in self.clients and client not in away:
                yield servers[client % len(servers) if self.config.schedule.policy == "parallel" else 0], client

    def take(self, job: Measure, done: Done) -> str:
        """Take a measurement in; return what is wrong with it, or nothing."""
        if done.profile is None:
            return f"{done.side} {job.server if job.client < 0 else job.client} measured itself and sent no profile"
        if job.client < 0:
            self.servers[job.server] = done.profile
        elif done.link is None:
            return f"client {job.client} measured itself and sent nothing about its link"
        else:
            self.clients[job.client] = Measured(job.server, done.profile, done.link)
        return ""
