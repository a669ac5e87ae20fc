"""Who may do what, when: the run as a state machine. Events in, instructions out; no clock, no socket.

    waiting ──all joined──▶ measuring ──▶ planning ──▶ initialising ──▶ training ◀──▶ merging
       └───────── nothing to measure ──────────────────────▲               ▲             │ end of the round
                                                                           └── next ── validating
                                                                                         └──▶ testing ──▶ finished

Storing, evaluating and planning anew run beside each other, and hold up the next round. Under `round_robin` only
planning does: a round is stored and evaluated beside the turns of the next one, and recorded once both are done.
Under `async` a round is as many results as there are clients: turns and merges go on beside each other, and beside the
evaluation of the round before.
Nothing here depends on anything but the config and the events so far: replaying a journal gives the same scheduler,
lease for lease.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Literal

import msgspec

from zsplit.config import Config
from zsplit.errors import StorageError
from zsplit.wire.messages import (
    Contribution,
    Evaluate,
    Group,
    Init,
    Job,
    Lease,
    Measure,
    Merge,
    Ref,
    Share,
    Turn,
)
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
    Planned,
    Ready,
    Started,
    Stopped,
    Store,
    Stored,
)
from zsplit_broker.policy import merges_after, participants, shares_back, stages_of
from zsplit_broker.state import State
from zsplit_broker.survey import measures
from zsplit_broker.work import Work, client_of


class Scheduler(State):
    """The run. `handle` takes one event at a time; everything else reads."""

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
            case Planned():
                yield from self._planned(event)
            case Stopped(sentence=sentence):
                yield from self._finish(False, self.ended(sentence))

    def _lose(self, event: Lost) -> Iterator[Instruction]:
        if self.peers.pop((event.role, event.index), None) is not None and self.phase != "waiting":
            who = f"{event.role} {event.index}"
            yield from self._finish(False, self.ended(f"{who} is gone: {event.sentence}"))

    def _ready(self, lease: Lease) -> Iterator[Instruction]:
        work = self.work.get(lease)
        if work is not None and not work.ready:
            work.ready = True
            if client_of(work.job) is not None:
                yield Grant(work.job)

    def _done(self, event: Done) -> Iterator[Instruction]:
        work = self.work.get(event.lease)
        if work is None or event.side in work.done:
            return
        work.done[event.side] = event
        if work.complete:
            del self.work[event.lease]
            wrong = self._collect(work)
            yield Close(work.job)
            if wrong:
                yield from self._finish(False, self.ended(wrong))
            else:
                yield from self._go_on()

    def _stored(self, digest: str) -> Iterator[Instruction]:
        if digest in self.storing:
            yield from (Discard(other) for other in self.archive.written(digest))
            yield from self._go_on()

    def _planned(self, event: Planned) -> Iterator[Instruction]:
        """Take plans in. Those that nobody asked for are an earlier run's, and come before this one begins."""
        asked = self.plans.deciding is not None
        if asked or self.phase == "waiting":
            self.plans.take(event, self.round)
        if asked:
            yield from self._go_on()

    def _go_on(self) -> Iterator[Instruction]:
        """Something is over: settle the rounds that waited for it, and go on where nothing else is open."""
        yield from self._settle()
        if self.is_async and self.phase == "training":
            yield from self._mix()
        elif all(work.beside for work in self.work.values()):
            yield from self._advance()

    # From phase to phase: called when no lease is open that others wait for

    def _begin(self) -> Iterator[Instruction]:
        self.began = self.now
        if measures(self.config):
            yield from self._measure()
        else:
            yield from self._initialise()

    def _measure(self) -> Iterator[Instruction]:
        self.phase = "measuring"
        for server, client in self.survey.due(self.servers()):
            yield self._open(Measure(lease=self._lease(), server=server, client=client))
        if not self.work:
            yield from self._plan()

    def _plan(self) -> Iterator[Instruction]:
        self.phase = "planning"
        steps = {client: self.steps(client) for client in range(self.config.schedule.clients)}
        yield self.plans.ask(self.survey, self.round, steps)

    def _initialise(self) -> Iterator[Instruction]:
        self.phase = "initialising"
        yield self._open(Init(lease=self._lease(), server=self.least_loaded()))

    def _advance(self) -> Iterator[Instruction]:
        match self.phase:
            case "measuring":
                yield from self._measure()
            case "planning":
                yield from self._initialise()
            case "initialising" if self.stored:
                yield from self._start_round()
            case "initialising" if not self.storing:
                yield self._store()
            case "training" if merges_after(self.config, self.stages, self.stage):
                yield from self._merge()
            case "training":
                self.stage += 1
                yield from self._train()
            case "merging" if self.stage + 1 < len(self.stages):
                self.stage += 1
                if self.config.run.commit_every and self.stage % self.config.run.commit_every == 0:
                    yield self._store()
                yield from self._train()
            case "merging":
                yield from self._end_round()
            case "validating" if self._may_begin():
                yield from self._start_round()
            case "validating" if self.trained and not self.unsettled:
                yield from self._test()
            case "testing":
                yield from self._finish(True, "the run is finished")
            case _:
                pass  # what is waited for comes back as an event

    def _may_begin(self) -> bool:
        """Whether the next round can begin: under round-robin, with the one before still being evaluated."""
        beside = 1 if self.config.schedule.policy == "round_robin" else 0
        return not self.trained and self.plans.deciding is None and len(self.unsettled) <= beside

    def _start_round(self) -> Iterator[Instruction]:
        self.books.begin(self.round, self.now)
        self.plans.use(self.round)
        if self.is_async:
            self.phase = "training"
            yield from self._mix()
            return
        clients = participants(self.config, self.round)
        self.stages = stages_of(self.config, self.round, {c: self.steps(c) for c in clients})
        self.stage = 0
        yield from self._train()

    def _train(self) -> Iterator[Instruction]:
        self.phase = "training"
        stage = self.stages[self.stage]
        group = Group(number=self.number + 1, shares=stage) if shares_back(self.config) else None
        together = self.least_loaded()
        for share in stage:
            server = self.least_loaded() if group is None else together
            yield self._open(self._turn(share, server, self.round, group))

    def _turn(self, share: Share, server: int, round_: int, group: Group | None = None) -> Turn:
        backs = [c.back for c in self.contributions.values() if c.back is not None]
        return Turn(
            lease=self._lease(),
            client=share.client,
            server=server,
            base=self.base(),
            plan=self.plan_of(share.client),
            round=round_,
            first=share.first,
            count=share.steps,
            threads=(self.threads_of("client", share.client), self.threads_of("server", server)),
            epoch_steps=self.epoch_steps(share.client),
            back=backs[-1] if backs and group is None and not self.is_async else None,
            group=group,
        )

    def _merge(self) -> Iterator[Instruction]:
        self.phase = "merging"
        inputs = tuple(self.contributions[client] for client in sorted(self.contributions))
        yield self._open(self._merger(inputs))

    def _merger(self, inputs: tuple[Contribution, ...], share: float = 1.0) -> Merge:
        back = next(c.back for c in inputs if c.back is not None)
        server = int(back.holder.removeprefix("server."))
        lease = self._lease()
        return Merge(lease=lease, server=server, base=self.base(), round=self.round, inputs=inputs, share=share)

    def _mix(self) -> Iterator[Instruction]:
        """Under `async`: mix in what came, one result after the other, and let who is free begin again."""
        yield from self._end_arrivals()
        merging = any(isinstance(work.job, Merge) for work in self.work.values())
        while self.phase == "training" and not merging and self.arrivals.next is not None:
            contribution, share = self.arrivals.next
            if share:
                yield self._open(self._merger((contribution,), share))
                merging = True
            else:
                self.arrivals.discard()
                yield from self._end_arrivals()
        if self.phase == "training" and len(self.unsettled) <= 1:
            yield from self._begin_turns()

    def _begin_turns(self) -> Iterator[Instruction]:
        busy = {client_of(work.job) for work in self.work.values() if isinstance(work.job, Turn)}
        for client in range(self.config.schedule.clients):
            begun = self.arrivals.turns.get(client, -1) + 1
            if client not in busy and not self.arrivals.waits(client) and begun < self.config.run.rounds:
                share = Share(client, 0, self.steps(client))
                turn = self._turn(share, self.least_loaded(), self.arrivals.begin(client))
                self.bases[turn.lease] = self.arrivals.versions
                yield self._open(turn)

    def _end_arrivals(self) -> Iterator[Instruction]:
        """End a round of results where as many came as there are clients; turns go on beside that."""
        if self.arrivals.count < (self.round + 1) * self.config.schedule.clients:
            return
        ended, version = yield from self._close_round()
        if self.trained:
            self.phase = "validating"
            yield from self._drop_turns()
        else:
            self.books.begin(self.round, self.now)
            self.plans.use(self.round)
        yield from self._validate(ended, version)

    def _drop_turns(self) -> Iterator[Instruction]:
        """End the turns that nobody waits for any more (early stopping)."""
        for lease, work in list(self.work.items()):
            if isinstance(work.job, Turn):
                del self.work[lease]
                yield Close(work.job)

    def _end_round(self) -> Iterator[Instruction]:
        """End the round's training: store the version, evaluate it where due, plan anew where something moved.

        The turn that can begin beside that comes first, so that the least loaded server is its.
        """
        self.phase = "validating"
        ended, version = yield from self._close_round()
        if self._may_begin():
            yield from self._start_round()
        yield from self._validate(ended, version)

    def _close_round(self) -> Generator[Instruction, None, tuple[int, Ref]]:
        """The round's training is over: store its version, and plan anew. Return the round's number and version."""
        ended, version = self.round, self.base()
        self.books.trained(ended, self.now)
        self.unsettled[ended] = version
        self.round += 1
        yield self._store()
        if not self.trained and self.plans.deciding is None:
            asked = self.plans.reconsider(self.round, self.books.rounds[ended])
            if asked:
                yield asked
        return ended, version

    def _validate(self, round_: int, version: Ref) -> Iterator[Instruction]:
        every = self.config.run.eval_every
        if every and (round_ + 1) % every == 0:
            yield from self._evaluate("validation", round_, version, self.config.codec.eval)

    def _settle(self) -> Iterator[Instruction]:
        """Record the rounds whose version is stored and evaluated, in order."""
        evaluated = {w.job.round for w in self.work.values() if isinstance(w.job, Evaluate)}
        for round_, version in list(self.unsettled.items()):
            if version.digest in self.storing or round_ in evaluated:
                return
            del self.unsettled[round_]
            self.history.append(self.books.end(round_, version.digest, self.now))
            yield Announce(round_)

    def _test(self) -> Iterator[Instruction]:
        self.phase = "testing"
        yield from self._evaluate("test", self.round, self.base(), self.config.codec.eval)
        if self.lossy:
            yield from self._evaluate("test", self.round, self.base(), not self.config.codec.eval)
        if not self.work:
            yield from self._advance()

    def _evaluate(
        self, part: Literal["validation", "test"], round_: int, version: Ref, through: bool
    ) -> Iterator[Instruction]:
        """Have a version evaluated, smashed data going `through` their codec or raw."""
        for client in range(self.config.schedule.clients):
            if getattr(self.peers["client", client].prepared, part):
                yield self._open(
                    Evaluate(
                        lease=self._lease(),
                        client=client,
                        server=self.least_loaded(),
                        base=version,
                        plan=self.evaluation_plan(client, through),
                        round=round_,
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

    def _collect(self, work: Work) -> str:
        """Keep what a finished job leaves: measurements, a contribution, a version, figures. Return what is wrong."""
        done = work.done
        self.books.closed(work.job, self.now, work.tally("client"), work.tally("server"), self.round)
        match work.job:
            case Measure(client=client):
                return self.survey.take(work.job, done["client" if client >= 0 else "server"])
            case Turn():
                self._keep(work.job, self._contribution(work.job, done))
            case Init(server=server) | Merge(server=server):
                if isinstance(work.job, Merge) and self.is_async:
                    self.arrivals.mixed()
                self.contributions = {}
                self.version = Ref(digest=done["server"].digest, holder=f"server.{server}")
            case Evaluate():
                pass  # it leaves figures only
        return ""

    def _contribution(self, turn: Turn, done: Mapping[str, Done]) -> Contribution:
        samples = done["client"].tally.samples
        return Contribution(
            client=turn.client,
            weight=float(samples) if self.config.schedule.weighting == "samples" else 1.0,
            front=Ref(digest=done["client"].digest, holder=f"client.{turn.client}"),
            back=Ref(digest=done["server"].digest, holder=f"server.{turn.server}"),
        )

    def _keep(self, turn: Turn, contribution: Contribution) -> None:
        """Keep a contribution until it is merged. Where all have one back, the latest is everybody's."""
        if self.is_async:
            self.arrivals.take(contribution, self.bases.pop(turn.lease))
            return
        if self.config.schedule.server_model != "replica":
            fronts = self.contributions.items()
            self.contributions = {client: msgspec.structs.replace(each, back=None) for client, each in fronts}
        self.contributions[turn.client] = contribution

    def _store(self) -> Store:
        self.archive.store(self.base())
        return Store(self.base())

    def _open(self, job: Job) -> Open:
        self.work[job.lease] = Work(job)
        self.books.opened(job, self.now)
        return Open(job)

    def _lease(self) -> Lease:
        self.number += 1
        return Lease(self.epoch, self.number)


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
