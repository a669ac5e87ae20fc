"""What the broker knows of its run: read here, changed by `scheduler` alone. No clock, no socket."""

from typing import Literal

import msgspec

from zsplit.config import Config
from zsplit.spec import parse
from zsplit.wire.messages import Contribution, Job, Lease, Plan, Ref, Tally, Turn
from zsplit_broker.archive import Archive
from zsplit_broker.arrivals import Arrivals
from zsplit_broker.books import Books, RoundRecord
from zsplit_broker.events import Finish, Joined
from zsplit_broker.plans import Plans
from zsplit_broker.policy import Stage
from zsplit_broker.survey import Survey
from zsplit_broker.tally import NOTHING
from zsplit_broker.work import Peer, Work, client_of, refs_in, refs_of

Phase = Literal[
    "waiting",
    "measuring",
    "planning",
    "initialising",
    "training",
    "merging",
    "validating",
    "testing",
    "finished",
    "serving",
]


class State:
    """A run as it is now. `check` asserts what must always hold."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.phase: Phase = "waiting"
        self.outcome: Finish | None = None
        self.peers: dict[Peer, Joined] = {}
        self.epoch = 0
        self.number = 0
        self.work: dict[Lease, Work] = {}
        self.survey = Survey(config)
        self.plans = Plans(config, self.peers)
        self.round = 0
        self.stages: list[Stage] = []
        self.stage = 0
        self.version: Ref | None = None
        self.contributions: dict[int, Contribution] = {}
        self.arrivals = Arrivals(config.schedule)
        self.bases: dict[Lease, int] = {}
        self.archive = Archive()
        self.unsettled: dict[int, Ref] = {}
        self.books = Books()
        self.history: list[RoundRecord] = []
        self.now = 0.0
        self.began: float | None = None

    def jobs(self, peer: Peer) -> list[Job]:
        """Return the jobs that a peer should hold now: a server from `Open` on, a client from `Grant` on."""
        role, index = peer
        if role == "server":
            return [w.job for w in self.work.values() if w.job.server == index]
        return [w.job for w in self.work.values() if w.ready and client_of(w.job) == index]

    def is_turn(self, lease: Lease) -> bool:
        """Whether the lease is that of a turn under way."""
        return lease in self.work and isinstance(self.work[lease].job, Turn)

    def kept(self, peer: Peer) -> list[str]:
        """Return the digests that a peer must keep: contributions, the current version, those not done with."""
        name = f"{peer[0]}.{peer[1]}"
        refs = [ref for c in (*self.contributions.values(), *self.arrivals.contributions) for ref in refs_in(c)]
        refs += [*self.storing.values(), *self.unsettled.values()]
        refs += [ref for work in self.work.values() if isinstance(work.job, Turn) for ref in refs_of(work.job)]
        if self.version is not None:
            refs.append(self.version)
        return list(dict.fromkeys(ref.digest for ref in refs if ref.holder == name))

    def plan_of(self, client: int) -> Plan:
        """Return what a client is told to use."""
        return self.plans.of(client)

    @property
    def storing(self) -> dict[str, Ref]:
        """Versions on their way to the disk, by digest."""
        return self.archive.storing

    @property
    def stored(self) -> list[str]:
        """Digests of the versions on the disk, oldest first."""
        return self.archive.stored

    @property
    def test(self) -> Tally:
        """What the evaluation at the end found, through the codec or not as the config says."""
        return self.tested(self.config.codec.eval)

    def tested(self, through: bool) -> Tally:
        """What the evaluation at the end found where smashed data took their codec, or travelled raw.

        Where the codec is lossless, both are the same and only one was done.
        """
        tests = self.books.tests
        return tests.get(self.evaluation_plan(0, through if self.lossy else self.config.codec.eval).up, NOTHING)

    @property
    def lossy(self) -> bool:
        """Whether smashed data come out of the codec other than they went in."""
        return not parse(self.plan_of(0).up).lossless

    def servers(self) -> list[int]:
        """Return the indexes of the servers that are here."""
        return sorted(index for role, index in self.peers if role == "server")

    def missing(self) -> list[str]:
        """Return the names of the peers that the run waits for before it can begin."""
        names = [f"client {i}" for i in range(self.config.schedule.clients) if ("client", i) not in self.peers]
        return names if self.servers() else [*names, "a server"]

    @property
    def seconds(self) -> float:
        """The time since everybody had joined, up to the last event."""
        return self.now - self.began if self.began is not None else 0.0

    def epoch_steps(self, client: int) -> int:
        """Return how many steps a client has in a local epoch, the short last batch kept."""
        return -(-self.peers["client", client].prepared.train // self.config.train.batch_size)

    def steps(self, client: int) -> int:
        """Return how many steps a client has in a round: every local epoch."""
        return self.config.train.local_epochs * self.epoch_steps(client)

    @property
    def is_async(self) -> bool:
        """Whether clients do not wait for each other."""
        return self.config.schedule.policy == "async"

    @property
    def stalled(self) -> bool:
        """Whether validation has not become better for so long that training ends (early stopping)."""
        patience = self.config.run.patience
        scores = [r.validation.top1 / r.validation.samples for r in self.history if r.validation.samples]
        return patience > 0 and len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])

    @property
    def trained(self) -> bool:
        """Whether no further round begins."""
        return self.round == self.config.run.rounds or self.stalled

    def ended(self, why: str) -> str:
        """Say why a run ends now, and what it leaves behind."""
        why = why.rstrip(".")
        if not self.stored:
            return f"{why}. Nothing was stored yet: start the run again"
        return (
            f"{why}. The last version, {self.stored[-1][:12]}, is kept ({len(self.history)} of "
            f"{self.config.run.rounds} rounds are done), and the folder can be resumed"
        )

    def base(self) -> Ref:
        """Return the version. Raises AssertionError before the model is initialised."""
        if self.version is None:
            raise AssertionError("no version before the model is initialised")
        return self.version

    def threads_of(self, role: str, index: int) -> int:
        """Return with how many threads a peer computes."""
        return self.peers[role, index].prepared.threads

    def least_loaded(self) -> int:
        """Return the server with the least open work."""
        load = dict.fromkeys(self.servers(), 0)
        for work in self.work.values():
            load[work.job.server] += 1
        return min(load, key=lambda index: (load[index], index))

    def evaluation_plan(self, client: int, through: bool) -> Plan:
        """Return a client's plan, with smashed data `through` their codec or raw."""
        plan = self.plan_of(client)
        return plan if through else msgspec.structs.replace(plan, up="raw")

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold; tests call it after every event."""
        turns = [w.job for w in self.work.values() if isinstance(w.job, Turn)]
        if self.config.schedule.policy == "round_robin":
            assert len(turns) <= 1, "two clients hold a turn"
        assert len({t.client for t in turns}) == len(turns), "a client holds two turns"
        assert all(lease.epoch <= self.epoch for lease in self.work), "a lease from a later epoch"
        assert (self.phase == "finished") == (self.outcome is not None)
        if self.phase in ("waiting", "finished"):
            assert not self.work, f"work is open while {self.phase}"
        elif self.phase == "training" and self.is_async:
            assert self.work or self.storing, "nobody works while training"
            assert not any(self.arrivals.waits(turn.client) for turn in turns), "a client does not wait for its merge"
        elif self.phase in ("measuring", "training", "merging", "testing"):
            assert not all(work.beside for work in self.work.values()), f"nobody works while {self.phase}"
        elif self.phase == "planning":
            assert self.plans.deciding is not None, "nobody plans while planning"
        elif self.phase == "validating":
            assert self.work or self.storing or self.plans.deciding is not None, (
                "nothing is waited for while validating"
            )
        assert len(self.unsettled) <= 2, "more than one round is evaluated beside another"
        assert self.unsettled.keys() <= self.books.rounds.keys(), "a round that is not settled has no book"
        for work in self.work.values():
            assert ("server", work.job.server) in self.peers, "work for a server that is not there"
            assert not work.complete, "finished work is still open"
