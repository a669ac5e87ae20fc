"""An open lease: the job, and what is missing until it is done."""

from zsplit.wire.messages import Contribution, Evaluate, Job, Measure, Merge, Predict, Ref, Tally, Turn
from zsplit_broker.events import Done
from zsplit_broker.tally import NOTHING

Peer = tuple[str, int]
"""A peer by its role and index."""

ON_DISK = "broker"
"""The holder of versions that are on the broker's disk."""


class Work:
    """A lease that was opened: its job, whether its server is ready, and what each side finished with."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ready = False
        self.done: dict[str, Done] = {}

    @property
    def complete(self) -> bool:
        """Whether nothing is missing: a turn takes both sides, what else has a client the client's figures."""
        if isinstance(self.job, Turn):
            return self.done.keys() == {"client", "server"}
        return ("server" if client_of(self.job) is None else "client") in self.done

    @property
    def beside(self) -> bool:
        """Whether other work need not wait for this."""
        return isinstance(self.job, Evaluate) and self.job.part == "validation"

    def tally(self, side: str) -> Tally:
        """Return what a side did, nothing where it had no part."""
        return self.done[side].tally if side in self.done else NOTHING


def client_of(job: Job) -> int | None:
    """Return the client that takes part in a job, None where only a server does."""
    match job:
        case Turn(client=client) | Evaluate(client=client) | Predict(client=client):
            return client
        case Measure(client=client) if client >= 0:
            return client
        case _:
            return None


def parties(job: Job) -> set[Peer]:
    """Return the peers that a job concerns."""
    peers: set[Peer] = {("server", job.server)}
    client = client_of(job)
    return peers if client is None else peers | {("client", client)}


def refs_in(contribution: Contribution) -> list[Ref]:
    """Return the states that a contribution names."""
    return [ref for ref in (contribution.front, contribution.back) if ref is not None]


def refs_of(job: Job) -> list[Ref]:
    """Return the states that a job may pull."""
    match job:
        case Turn(base=base, back=back):
            return [base] if back is None else [base, back]
        case Evaluate(base=base) | Predict(base=base):
            return [base]
        case Merge(base=base, inputs=inputs):
            return [base, *(ref for contribution in inputs for ref in refs_in(contribution))]
        case _:
            return []


def peer_of(name: str) -> Peer:
    """Return the peer that a name such as `client.3` stands for; one that is nobody's becomes nobody."""
    role, _, index = name.partition(".")
    return role, int(index) if len(index) < 10 and index.isascii() and index.isdigit() else -1
