"""An open lease: the job, and what is missing until it is done."""

from zsplit.wire.messages import Evaluate, Job, Measure, Predict, Tally, Turn
from zsplit_broker.events import Done
from zsplit_broker.tally import NOTHING

Peer = tuple[str, int]
"""A peer by its role and index."""


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
