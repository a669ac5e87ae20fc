"""Who may do what, when: the run as a state machine. Events in, instructions out; no clock, no socket.

    waiting ──all joined──▶ initialising ──▶ training ◀──▶ merging
                                 │              ▲             │ end of the round
                                 ▼              └── next ── validating ──▶ testing ──▶ finished
                              storing

Storing runs beside the other phases and holds up only the next round. Nothing here depends on anything
but the config and the events so far: replaying a journal gives the same scheduler, lease for lease.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import msgspec

from zsplit.config import Config
from zsplit.errors import StorageError
from zsplit.wire.messages import Contribution, Evaluate, Init, Job, Lease, Merge, Plan, Ref, Tally, Turn
from zsplit_broker.events import (
    Announce,
    Close,
    Discard,
    Done,
    Entry,
    Event,
    Finish,
    Grant,
    Instruction,
    Joined,
    Lost,
    Open,
    Ready,
    Started,
    Stopped,
    Store,
    Stored,
)
from zsplit_broker.policy import Stage, participants, stages_of
from zsplit_broker.tally import NOTHING, add

Phase = Literal["waiting", "initialising", "training", "merging", "validating", "testing", "finished"]
Peer = tuple[str, int]

KEPT_VERSIONS = 2
"""Stored versions: the newest, and the one before it for when the newest is damaged."""


class RoundRecord(NamedTuple):
    """What a round was: the version it made, tallies of both sides and of validation, wall seconds."""

    round: int
    version: str
    train: Tally
    server: Tally
    validation: Tally
    seconds: float


class Work:
    """An open lease: its job, whether its server is ready, and what each side finished with."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ready = False
        self.done: dict[str, Done] = {}

    @property
    def complete(self) -> bool:
        """Whether nothing is missing: a turn takes both sides, an evaluation the client's figures."""
        match self.job:
            case Turn():
                return self.done.keys() == {"client", "server"}
            case Evaluate():
                return "client" in self.done
            case _:
                return "server" in self.done


class Scheduler:
    """The run. `handle` takes one event at a time; everything else reads."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.phase: Phase = "waiting"
        self.outcome: Finish | None = None
        self.peers: dict[Peer, Joined] = {}
        self.epoch = 0
        self.number = 0
        self.work: dict[Lease, Work] = {}
        self.round = 0
        self.stages: list[Stage] = []
        self.stage = 0
        self.version: Ref | None = None
        self.contributions: dict[int, Contribution] = {}
        self.storing: dict[str, Ref] = {}
        self.stored: list[str] = []
        self._ordered: list[str] = []  # stored and storing, as training made them, not as the disk finished them
        self.history: list[RoundRecord] = []
        self.test = NOTHING
        self.now = 0.0
        self.began: float | None = None
        self._round_began = 0.0
        self._tallies: dict[str, Tally] = {}

    # What there is to read

    def jobs(self, peer: Peer) -> list[Job]:
        """Return the jobs that a peer should hold now: a server from `Open` on, a client from `Grant` on."""
        role, index = peer
        if role == "server":
            return [w.job for w in self.work.values() if w.job.server == index]
        return [
            w.job
            for w in self.work.values()
            if w.ready and isinstance(w.job, Turn | Evaluate) and w.job.client == index
        ]

    def kept(self, peer: Peer) -> list[str]:
        """Return the digests that a peer must keep: contributions, and the current version."""
        name = f"{peer[0]}.{peer[1]}"
        refs = [ref for c in self.contributions.values() for ref in (c.front, c.back)]
        refs += self.storing.values()
        if self.version is not None:
            refs.append(self.version)
        return [ref.digest for ref in refs if ref.holder == name]

    @property
    def plan(self) -> Plan:
        """What clients are told to use; the cut by the name that the first server knows it by."""
        train = self.config.train
        servers = sorted(index for role, index in self.peers if role == "server")
        cut = self.peers["server", servers[0]].prepared.cut if servers else str(self.config.model.cut)
        return Plan(
            cut=cut,
            micro_batches=train.micro_batches,
            window=self.config.plan.window or train.micro_batches,
            up=self.config.codec.up,
            down=self.config.codec.down,
        )

    def missing(self) -> list[str]:
        """Return the names of the peers that the run waits for before it can begin."""
        names = [f"client {i}" for i in range(self.config.schedule.clients) if ("client", i) not in self.peers]
        return names if any(role == "server" for role, _ in self.peers) else [*names, "a server"]

    @property
    def seconds(self) -> float:
        """The time since everybody had joined, up to the last event."""
        return self.now - self.began if self.began is not None else 0.0

    # Events

    def handle(self, entry: Entry) -> list[Instruction]:
        """Take in one event and return what follows from it. One that no longer matters changes nothing."""
        self.now = entry.at
        if self.phase == "finished":
            return []
        return list(self._follow(entry.event))

    def _follow(self, event: Event) -> Iterator[Instruction]:
        match event:
            case Started(epoch=epoch):
                self.epoch, self.number = epoch, 0
            case Joined(role=role, index=index):
                self.peers[role, index] = event
                if self.phase == "waiting" and not self.missing():
                    yield from self._begin()
            case Lost():
                yield from self._lose(event)
            case Ready(lease=lease):
                yield from self._ready(lease)
            case Done():
                yield from self._done(event)
            case Stored(digest=digest):
                yield from self._stored(digest)
            case Stopped(sentence=sentence):
                yield from self._finish(False, f"{sentence}. {self.kept_sentence()}")

    def _lose(self, event: Lost) -> Iterator[Instruction]:
        if self.peers.pop((event.role, event.index), None) is not None and self.phase != "waiting":
            who = f"{event.role} {event.index}"
            yield from self._finish(False, f"{who} is gone: {event.sentence}. {self.kept_sentence()}")

    def kept_sentence(self) -> str:
        """Say what a run that ends now leaves behind."""
        if not self.stored:
            return "Nothing was stored yet: start the run again"
        return (
            f"The last version, {self.stored[-1][:12]}, is kept ({len(self.history)} of "
            f"{self.config.run.rounds} rounds are done), and the folder can be resumed"
        )

    def _ready(self, lease: Lease) -> Iterator[Instruction]:
        work = self.work.get(lease)
        if work is not None and not work.ready:
            work.ready = True
            if isinstance(work.job, Turn | Evaluate):
                yield Grant(work.job)

    def _done(self, event: Done) -> Iterator[Instruction]:
        work = self.work.get(event.lease)
        if work is None or event.side in work.done:
            return
        work.done[event.side] = event
        if work.complete:
            del self.work[event.lease]
            self._collect(work)
            yield Close(work.job)
            if not self.work:
                yield from self._advance()

    def _stored(self, digest: str) -> Iterator[Instruction]:
        if self.storing.pop(digest, None) is None:
            return
        self.stored = [other for other in self._ordered if other == digest or other in self.stored]
        while len(self.stored) > KEPT_VERSIONS:
            yield Discard(self.stored.pop(0))
        self._ordered = [other for other in self._ordered if other in self.stored or other in self.storing]
        if not self.work and not self.storing:
            yield from self._advance()

    # From phase to phase: called when no lease is open

    def _begin(self) -> Iterator[Instruction]:
        self.phase = "initialising"
        self.began = self.now
        server = self._least_loaded()
        yield self._open(Init(lease=self._lease(), server=server))

    def _advance(self) -> Iterator[Instruction]:
        match self.phase:
            case "training":
                yield from self._merge()
            case "merging" if self.stage + 1 < len(self.stages):
                self.stage += 1
                if self.config.run.commit_every and self.stage % self.config.run.commit_every == 0:
                    yield self._store()
                yield from self._train()
            case "merging":
                yield from self._validate()
            case "initialising" if self.stored:
                yield from self._start_round()
            case "initialising":
                yield self._store()
            case "validating" if not self.storing:
                yield from self._end_round()
            case "testing":
                yield from self._finish(True, "the run is finished")
            case _:
                pass  # a version is being stored: its commit comes back as an event

    def _start_round(self) -> Iterator[Instruction]:
        self._round_began = self.now
        self._tallies = {}
        clients = participants(self.config, self.round)
        self.stages = stages_of(self.config, self.round, {c: self.steps(c) for c in clients})
        self.stage = 0
        yield from self._train()

    def steps(self, client: int) -> int:
        """Return how many steps a client has in a round: every local epoch, the short last batch kept."""
        samples = self.peers["client", client].prepared.train
        return self.config.train.local_epochs * -(-samples // self.config.train.batch_size)

    def _train(self) -> Iterator[Instruction]:
        self.phase = "training"
        for share in self.stages[self.stage]:
            server = self._least_loaded()
            threads = self._threads("client", share.client), self._threads("server", server)
            yield self._open(
                Turn(
                    lease=self._lease(),
                    client=share.client,
                    server=server,
                    base=self._base(),
                    plan=self.plan,
                    round=self.round,
                    first=share.first,
                    count=share.steps,
                    threads=threads,
                )
            )

    def _merge(self) -> Iterator[Instruction]:
        self.phase = "merging"
        inputs = tuple(self.contributions[client] for client in sorted(self.contributions))
        holder = int(inputs[0].back.holder.removeprefix("server."))
        lease = self._lease()
        yield self._open(Merge(lease=lease, server=holder, base=self._base(), round=self.round, inputs=inputs))

    def _validate(self) -> Iterator[Instruction]:
        """End the round's training: store the version and, where due, evaluate it meanwhile."""
        self.phase = "validating"
        yield self._store()
        every = self.config.run.eval_every
        if every and (self.round + 1) % every == 0:
            yield from self._evaluate("validation")

    def _end_round(self) -> Iterator[Instruction]:
        self.history.append(
            RoundRecord(
                self.round,
                self._base().digest,
                self._tallies.get("client", NOTHING),
                self._tallies.get("server", NOTHING),
                self._tallies.get("validation", NOTHING),
                self.now - self._round_began,
            )
        )
        yield Announce(self.round)
        self.round += 1
        if self.round < self.config.run.rounds:
            yield from self._start_round()
        else:
            self.phase = "testing"
            yield from self._evaluate("test")
            if not self.work:
                yield from self._advance()

    def _evaluate(self, part: Literal["validation", "test"]) -> Iterator[Instruction]:
        for client in range(self.config.schedule.clients):
            if getattr(self.peers["client", client].prepared, part):
                yield self._open(
                    Evaluate(
                        lease=self._lease(),
                        client=client,
                        server=self._least_loaded(),
                        base=self._base(),
                        plan=self.plan,
                        round=self.round,
                        part=part,
                    )
                )

    def _finish(self, ok: bool, sentence: str) -> Iterator[Instruction]:
        self.phase = "finished"
        self.outcome = Finish(ok, sentence)
        for work in self.work.values():
            yield Close(work.job)
        self.work.clear()
        yield self.outcome

    # Parts of the above

    def _collect(self, work: Work) -> None:
        """Keep what a finished job leaves: a contribution, a version, or figures."""
        done = work.done
        match work.job:
            case Turn(client=client, server=server):
                samples = done["client"].tally.samples
                self.contributions[client] = Contribution(
                    client=client,
                    weight=float(samples) if self.config.schedule.weighting == "samples" else 1.0,
                    front=Ref(digest=done["client"].digest, holder=f"client.{client}"),
                    back=Ref(digest=done["server"].digest, holder=f"server.{server}"),
                )
                for side, event in done.items():
                    self._count(side, event.tally)
            case Init(server=server) | Merge(server=server):
                self.contributions = {}
                self.version = Ref(digest=done["server"].digest, holder=f"server.{server}")
                self._count("server", done["server"].tally)
            case Evaluate(part="validation"):
                self._count("validation", done["client"].tally)
            case Evaluate():
                self.test = add((self.test, done["client"].tally))

    def _count(self, what: str, tally: Tally) -> None:
        self._tallies[what] = add((self._tallies.get(what, NOTHING), tally))

    def _store(self) -> Store:
        digest = self._base().digest
        self._ordered = [*(other for other in self._ordered if other != digest), digest]
        self.stored = [other for other in self._ordered if other in self.stored]
        self.storing[digest] = self._base()
        return Store(self._base())

    def _open(self, job: Job) -> Open:
        self.work[job.lease] = Work(job)
        return Open(job)

    def _lease(self) -> Lease:
        self.number += 1
        return Lease(self.epoch, self.number)

    def _base(self) -> Ref:
        if self.version is None:
            raise AssertionError("no version before the model is initialised")
        return self.version

    def _threads(self, role: str, index: int) -> int:
        return self.peers[role, index].prepared.threads

    def _least_loaded(self) -> int:
        servers = sorted(index for role, index in self.peers if role == "server")
        load = dict.fromkeys(servers, 0)
        for work in self.work.values():
            load[work.job.server] += 1
        return min(servers, key=lambda index: (load[index], index))

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
        elif self.phase in ("training", "merging", "testing"):
            assert self.work, f"nobody works while {self.phase}"
        for work in self.work.values():
            assert ("server", work.job.server) in self.peers, "work for a server that is not there"
            assert not work.complete, "finished work is still open"


def restore(config: Config, lines: Iterable[bytes]) -> Scheduler:
    """Return the scheduler that a journal's lines lead to: the one that wrote them, had it never died.

    Raises StorageError for a line that is no event.
    """
    scheduler = Scheduler(config)
    for number, line in enumerate(lines, 2):
        try:
            scheduler.handle(msgspec.json.decode(line, type=Entry))
        except msgspec.MsgspecError as error:
            raise StorageError(f"Line {number} of the journal is no event of this version ({error})") from error
    return scheduler
