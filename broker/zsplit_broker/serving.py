"""Who may ask what of a finished run: a state machine like the scheduler, without training. No clock, no socket.

Every client that is here holds a `Predict` with a server, from the first moment at which there is one; where its server
leaves, with another. It ends when it is stopped, never because a peer left.
"""

from collections.abc import Iterator

from zsplit.config import Config
from zsplit.wire.messages import Predict, Ref
from zsplit_broker.events import Close, Event, Instruction, Joined, Lost, Ready, Started, Stopped
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.work import Work, client_of


class Serving(Scheduler):
    """One stored version, held by the broker, that clients ask through servers. See `Scheduler` for its verbs."""

    def __init__(self, config: Config, digest: str) -> None:
        super().__init__(config)
        self.phase = "serving"
        self.version = Ref(digest=digest, holder="broker")

    def _follow(self, event: Event) -> Iterator[Instruction]:
        match event:
            case Started(epoch=epoch):
                self.epoch, self.number = epoch, 0
            case Joined(role=role, index=index):
                self.peers[role, index] = self.known[role, index] = event
                yield from self._admit()
            case Lost(role=role, index=index):
                self.peers.pop((role, index), None)
                yield from self._end_jobs(role, index)
                yield from self._admit()
            case Ready(lease=lease):
                yield from self._ready(lease)
            case Stopped(sentence=sentence):
                yield from self._finish(True, f"Serving has ended: {sentence}")
            case _:
                pass  # nothing is ever done, stored or planned

    def _admit(self) -> Iterator[Instruction]:
        """Give every client that has no job one, where there is a server for it."""
        busy = {client_of(work.job) for work in self.work.values()}
        idle = sorted(index for role, index in self.peers if role == "client" and index not in busy)
        for client in idle if self.servers() else ():
            server, base = self.least_loaded(), self.base()
            plan = self.evaluation_plan(client, self.config.codec.eval)
            yield self._open(Predict(lease=self._lease(), client=client, server=server, base=base, plan=plan))

    def _end_jobs(self, role: str, index: int) -> Iterator[Instruction]:
        """End the jobs of a peer that is gone."""
        for lease, work in list(self.work.items()):
            if self._takes_part(role, index, work):
                del self.work[lease]
                yield Close(work.job)

    def _takes_part(self, role: str, index: int, work: Work) -> bool:
        return index == (work.job.server if role == "server" else client_of(work.job))

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold; tests call it after every event."""
        clients = [client_of(work.job) for work in self.work.values()]
        here = {index for role, index in self.peers if role == "client"}
        assert len(set(clients)) == len(clients), "a client holds two jobs"
        assert (self.phase == "finished") == (self.outcome is not None)
        if self.phase == "serving":
            assert set(clients) == (here if self.servers() else set()), "a client waits, or one that is gone does not"
        for work in self.work.values():
            assert ("server", work.job.server) in self.peers, "work for a server that is not there"
