"""What the broker knows of its run: read here, changed by `scheduler` alone. No clock, no socket."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

from zsplit.config import Config
from zsplit.spec import parse
from zsplit.wire.messages import Contribution, Evaluate, Job, Lease, Plan, Prepared, Ref, Share, Tally, Turn
from zsplit_broker.archive import Archive
from zsplit_broker.arrivals import Arrivals, Results
from zsplit_broker.books import Books, RoundBook, RoundRecord
from zsplit_broker.events import Finish, Joined
from zsplit_broker.plans import Plans
from zsplit_broker.policy import Stage
from zsplit_broker.survey import Survey
from zsplit_broker.tally import NOTHING
from zsplit_broker.work import ON_DISK, Peer, Work, client_of, peer_of, refs_in, refs_of

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


class Mark(NamedTuple):
    """Where training stood when a version was made: what there is to go on with if nothing later is left.

    `stage` is the next one of the round's `stages`, 0 with none of them before the round. `book` is what was written
    down of the round so far, `results` what `Arrivals.mark` says.
    """

    round: int
    stage: int = 0
    stages: tuple[Stage, ...] = ()
    missed: frozenset[int] = frozenset()
    moved: frozenset[int] = frozenset()
    book: RoundBook | None = None
    results: Results | None = None


class Finished(NamedTuple):
    """A turn that both sides have done and that is not merged yet: it counts when it is."""

    turn: Turn
    client: Tally
    server: Tally


class Evaluated(NamedTuple):
    """An evaluation: of which round's version, on whose data, through which codec."""

    part: Literal["validation", "test"]
    round: int
    up: str
    client: int


class State:
    """A run as it is now. `check` asserts what must always hold.

    `peers` are here, `known` those that ever were, `gone` those that were lost, with the time. The run goes on without
    the clients that are `away` until they come back, and without `missed` until the round is over; `moved` have been
    given a later turn in it. `home` is the run's folder, for sentences.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.phase: Phase = "waiting"
        self.outcome: Finish | None = None
        self.peers: dict[Peer, Joined] = {}
        self.known: dict[Peer, Joined] = {}
        self.gone: dict[Peer, float] = {}
        self.away: set[int] = set()
        self.missed: set[int] = set()
        self.moved: set[int] = set()
        self.assembled: float | None = None
        self.draining = ""
        self.home = "RUN"
        self.ports = (0, 0, 0)
        self.epoch = 0
        self.number = 0
        self.work: dict[Lease, Work] = {}
        self.survey = Survey(config)
        self.plans = Plans(config, self.known)
        self.surveyed = False
        self.round = 0
        self.stages: list[Stage] = []
        self.stage = 0
        self.version: Ref | None = None
        self.contributions: dict[int, Contribution] = {}
        self.finished: dict[int, Finished] = {}
        self.evaluated: set[Evaluated] = set()
        self.marks: dict[str, Mark] = {}
        self.stage_began = 0.0
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
        refs += [ref for work in self.work.values() for ref in refs_of(work.job)]
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
        schedule = self.config.schedule
        names = [f"client {i}" for i in range(schedule.clients) if ("client", i) not in self.peers]
        if schedule.elastic:
            names = ["a client"] * (schedule.min_clients - len(self.clients))
        return names if self.servers() else [*names, "a server"]

    def members(self) -> list[int]:
        """Return the clients that belong to the run: those of the config, and whoever has joined beyond them."""
        joined = {index for role, index in self.known if role == "client"}
        return sorted({*range(self.config.schedule.clients), *joined})

    def eligible(self) -> list[int]:
        """Return the clients that may take part in a round: those that are not away."""
        return [client for client in self.members() if client not in self.away]

    @property
    def seconds(self) -> float:
        """The time since everybody had joined, up to the last event."""
        return self.now - self.began if self.began is not None else 0.0

    @property
    def clients(self) -> list[int]:
        """The indexes of the clients that are here."""
        return sorted(index for role, index in self.peers if role == "client")

    def crowd(self) -> list[int]:
        """Return the clients of the round under way, those that it goes on without excepted."""
        return sorted({share.client for stage in self.stages for share in stage} - self.missed)

    def shares_due(self) -> list[Share]:
        """Return the turns of the stage under way that are neither done nor open."""
        if self.phase != "training" or self.is_async or not self.stages:
            return []
        busy = {work.job.client for work in self.work.values() if isinstance(work.job, Turn)}
        done = busy | self.contributions.keys() | self.missed
        return [share for share in self.stages[self.stage] if share.client not in done]

    def evaluations_due(self) -> Iterator[tuple[Evaluated, Ref, Plan]]:
        """Yield the evaluations that are neither done nor open, with version and plan, in the order of the rounds.

        A round is evaluated with the plans that it was trained with, however long that takes. Under `async` turns
        belong to no round: there it is the latest of those made for it or an earlier one.
        """
        every, passes = self.config.run.eval_every, [self.config.codec.eval]
        wanted: list[tuple[Literal["validation", "test"], int, Ref]] = [
            ("validation", round_, version)
            for round_, version in self.unsettled.items()
            if every and (round_ + 1) % every == 0
        ]
        if self.phase == "testing":
            wanted.append(("test", self.round, self.base()))
            passes += [not self.config.codec.eval] if self.lossy else []
        busy = {evaluated_by(work.job) for work in self.work.values() if isinstance(work.job, Evaluate)}
        for part, round_, version in wanted:
            for through in passes if part == "test" else passes[:1]:
                for client in self.members():
                    if client in self.away or not getattr(self.prepared("client", client), part):
                        continue
                    plan = self.evaluation_plan(client, through, None if part == "test" else round_)
                    each = Evaluated(part, round_, plan.up, client)
                    if each not in busy and each not in self.evaluated:
                        yield each, version, plan

    def awaited(self) -> list[int]:
        """Return the clients that have something to do and are not here."""
        due = {share.client for share in self.shares_due()}
        due |= {each.client for each, *_ in self.evaluations_due()}
        if self.phase == "measuring":
            due |= {client for _, client in self.survey.due(self.servers(), self.away) if client >= 0}
        if self.is_async and self.phase == "training":
            due |= set(self.members()) - self.away
        return sorted(client for client in due if ("client", client) not in self.peers)

    def waits_for(self) -> str:
        """Say who or what is missing where the run cannot go on, or nothing."""
        if self.phase in ("waiting", "finished", "serving"):
            return ""
        names = [f"client {client}" for client in self.awaited()]
        between = self.phase == "validating" or (self.phase == "training" and self.is_async and not self.work)
        if not self.servers():
            names.append("a server")
        elif between and not names and not self.trained and not self._enough():
            here, least = len(self.eligible()), self.config.schedule.min_clients
            return f"the run needs more clients (schedule.min_clients = {least}, and {here} here): start them"
        return f"the run waits for {', '.join(names)}" if names else ""

    def _enough(self) -> bool:
        """Whether a round can begin with the clients that are not away."""
        return len(self.eligible()) >= self.config.schedule.min_clients

    def prepared(self, role: str, index: int) -> Prepared:
        """Return what a peer last said of itself; nothing of one that never was here."""
        return self.known[role, index].prepared if (role, index) in self.known else Prepared()

    def epoch_steps(self, client: int) -> int:
        """Return how many steps a client has in a local epoch, the short last batch kept."""
        return -(-self.prepared("client", client).train // self.config.train.batch_size)

    def steps(self, client: int) -> int:
        """Return how many steps a client has in a round: every local epoch."""
        return self.config.train.local_epochs * self.epoch_steps(client)

    @property
    def is_async(self) -> bool:
        """Whether clients do not wait for each other."""
        return self.config.schedule.policy == "async"

    @property
    def stalled(self) -> bool:
        """Whether validation has not become better for so long that training ends (early stopping).

        Only rounds count that are always evaluated by now: otherwise it would depend on who was faster, and on what was
        lost and done again.
        """
        patience = self.config.run.patience
        last = self.round - (0 if self.config.schedule.policy == "parallel" else 1)
        judged = [record.validation for record in self.history if record.round < last and record.validation.samples]
        scores = [tally.top1 / tally.samples for tally in judged]
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
            f"{self.config.run.rounds} rounds are done): `zsplit resume {self.home}` goes on with it"
        )

    def base(self) -> Ref:
        """Return the version. Raises AssertionError before the model is initialised."""
        if self.version is None:
            raise AssertionError("no version before the model is initialised")
        return self.version

    def threads_of(self, role: str, index: int) -> int:
        """Return with how many threads a peer computes."""
        return self.prepared(role, index).threads

    def least_loaded(self) -> int:
        """Return the server with the least open work."""
        load = dict.fromkeys(self.servers(), 0)
        for work in self.work.values():
            load[work.job.server] += 1
        return min(load, key=lambda index: (load[index], index))

    def evaluation_plan(self, client: int, through: bool, round_: int | None = None) -> Plan:
        """Return a client's plan, the one of now or of a round, with smashed data `through` their codec or raw."""
        plan = self.plans.of(client, round_)
        return plan if through else msgspec.structs.replace(plan, up="raw")

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold; tests call it after every event."""
        turns = [w.job for w in self.work.values() if isinstance(w.job, Turn)]
        if self.config.schedule.policy == "round_robin":
            assert len(turns) <= 1, "two clients hold a turn"
        assert len({t.client for t in turns}) == len(turns), "a client holds two turns"
        assert not {t.client for t in turns} & self.contributions.keys(), "a client trains what it has done"
        assert self.finished.keys() >= self.contributions.keys(), "a contribution without its figures"
        assert all(lease.epoch <= self.epoch for lease in self.work), "a lease from a later epoch"
        assert (self.phase == "finished") == (self.outcome is not None)
        if self.outcome is not None and self.outcome.ok:
            assert self.stored[-1] == self.base().digest, "what the run came to is not the last on the disk"
        if self.phase in ("waiting", "finished"):
            assert not self.work, f"work is open while {self.phase}"
        elif self.phase == "planning":
            assert self.plans.deciding is not None, "nobody plans while planning"
        elif not self.waits_for():
            idle = not self.work and not self.storing and self.plans.deciding is None
            assert not idle, f"nothing is waited for while {self.phase}"
        assert len(self.unsettled) <= 2, "more than one round is evaluated beside another"
        assert self.unsettled.keys() <= self.books.rounds.keys(), "a round that is not settled has no book"
        assert set(self.stored) <= self.marks.keys(), "a version on the disk of which nobody knows where it belongs"
        for work in self.work.values():
            assert ("server", work.job.server) in self.peers, "work for a server that is not there"
            client = client_of(work.job)
            assert client is None or ("client", client) in self.peers, "work for a client that is not there"
            assert not work.complete, "finished work is still open"
            for ref in refs_of(work.job):
                held = ref.holder != ON_DISK and peer_of(ref.holder) in self.peers
                assert held or ref.digest in self.stored, "work that needs a state which nobody has"


def evaluated_by(job: Evaluate) -> Evaluated:
    """Return what an evaluation is of."""
    return Evaluated(job.part, job.round, job.plan.up, job.client)
