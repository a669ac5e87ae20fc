"""What is to be done, and when: the run from phase to phase. No clock, no socket.

    waiting ──all joined──▶ measuring ──▶ planning ──▶ initialising ──▶ training ◀──▶ merging
       └───────── nothing to measure ──────────────────────▲               ▲             │ end of the round
                                                                           └── next ── validating
                                                                                         └──▶ testing ──▶ finished

Storing, evaluating and planning anew run beside each other. A round is stored beside the training of the next one,
which waits for planning and, in parallel training, for the evaluation; it is recorded once it is stored and evaluated.
Under `async` a round is as many results as there are clients: turns and merges go on beside each other, and beside the
evaluation of the round before.

In each phase what is to be done follows from what there is: `proceed` opens all that is neither done nor open and
whose peers are here, whatever happened before. So what was lost is done again for the same reason for which it was done
the first time, and what waits for a peer begins when that is back.
"""

from collections.abc import Generator, Iterator
from copy import deepcopy

from zsplit.wire.messages import (
    Contribution,
    Evaluate,
    Group,
    Init,
    Job,
    Lease,
    Measure,
    Merge,
    Share,
    Turn,
)
from zsplit_broker.events import Announce, Close, Finish, Instruction, Open, Store
from zsplit_broker.policy import merges_after, participants, shares_back, stages_of
from zsplit_broker.state import Mark, State
from zsplit_broker.survey import measures
from zsplit_broker.work import Work, client_of, peer_of

Moves = Generator[Instruction, None, bool]
"""Instructions, and at their end whether the run has come into another phase or stage."""


class Course(State):
    """The way of a run. `proceed` goes on as far as it can; everything else is a part of that."""

    def proceed(self) -> Iterator[Instruction]:
        """Settle the rounds that are over, open what is due, and go on to the next phase where nothing is left."""
        moved = True
        while moved and self.outcome is None:
            before = self.round
            yield from self._settle()
            yield from self._open_due()
            moved = yield from self._advance()
            moved |= self.round != before  # `async` ends one when it mixes, and its version may be stored
        if self.outcome is None:
            yield from self._open_evaluations()

    # What is due

    def _open_due(self) -> Iterator[Instruction]:
        match self.phase:
            case "measuring":
                yield from self._open_measurements()
            case "initialising" if self.version is None and not self.work and self.servers():
                yield self._open(Init(lease=self._lease(), server=self.least_loaded()))
            case "training" if self.is_async:
                yield from self._mix()
            case "training" if self.servers():
                yield from self._open_turns()
            case "merging" if self.contributions and self.servers() and not self._is_open(Merge):
                inputs = tuple(self.contributions[client] for client in sorted(self.contributions))
                yield self._open(self._merger(inputs))
            case "testing":
                yield from self._open_evaluations()
            case _:
                pass

    def _open_measurements(self) -> Iterator[Instruction]:
        under_way = [w.job for w in self.work.values() if isinstance(w.job, Measure)]
        if under_way and self.config.plan.quiet:
            return
        for server, client in self.survey.due(self.servers(), self.away):
            here = client < 0 or ("client", client) in self.peers
            # Which server is a client's changes with those that are here: it measures with one of them.
            if here and not any(job.client == client and (client >= 0 or job.server == server) for job in under_way):
                yield self._open(Measure(lease=self._lease(), server=server, client=client))

    def _open_turns(self) -> Iterator[Instruction]:
        """Open the turns of the stage. Those that share a back begin together, when all of them can."""
        due = self.shares_due()
        here = [share for share in due if ("client", share.client) in self.peers]
        if not shares_back(self.config):
            for share in here:
                yield self._open(self._turn(share, self.least_loaded(), self.round))
        elif due and here == due:
            group = Group(number=self.number + 1, shares=tuple(due))
            together, self.stage_began = self.least_loaded(), self.now
            for share in due:
                yield self._open(self._turn(share, together, self.round, group))

    def _turn(self, share: Share, server: int, round_: int, group: Group | None = None) -> Turn:
        backs = [c.back for c in self.contributions.values() if c.back is not None]
        handed_on = backs[-1] if self.config.schedule.server_model != "replica" and backs else None
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
            back=handed_on,
            group=group,
        )

    def _merger(self, inputs: tuple[Contribution, ...], share: float = 1.0) -> Merge:
        back = next(c.back for c in inputs if c.back is not None)
        _, server = peer_of(back.holder)
        lease = self._lease()
        return Merge(lease=lease, server=server, base=self.base(), round=self.round, inputs=inputs, share=share)

    def _open_evaluations(self) -> Iterator[Instruction]:
        for each, version, plan in list(self.evaluations_due()):
            if self.servers() and ("client", each.client) in self.peers:
                yield self._open(
                    Evaluate(
                        lease=self._lease(),
                        client=each.client,
                        server=self.least_loaded(),
                        base=version,
                        plan=plan,
                        round=each.round,
                        part=each.part,
                    )
                )

    def _is_open(self, kind: type[Job]) -> bool:
        return any(isinstance(work.job, kind) for work in self.work.values())

    # From phase to phase

    def _advance(self) -> Moves:
        """Go on where nothing is left in this phase; return whether that was so. The rest comes back as an event."""
        match self.phase:
            case "waiting" if not self.missing():
                self.began = self.now
                self.away = set(self.members()) - set(self.clients)
                self.phase = "measuring" if measures(self.config) else "initialising"
                return True
            case "measuring" if not self.work and self.servers() and not self.survey.due(self.servers(), self.away):
                self.phase = "planning"
                steps = {client: self.steps(client) for client in self.survey.clients}
                yield self.plans.ask(self.survey, self.round, steps)
            case "planning" if self.plans.deciding is None:
                self.phase, self.surveyed = "initialising", True
                return True
            case "initialising" if self.stored:
                self.phase = "validating"
                return True
            case "initialising" if self.version is not None and not self.storing:
                yield self._store(Mark(0))
            case "training" if not self.is_async and not self.shares_due() and not self._is_open(Turn):
                return self._end_stage()
            case "merging" if not self.contributions and not self._is_open(Merge):
                return (yield from self._end_merge())
            case "validating":
                return (yield from self._end_round())
            case "testing" if self._is_kept() and not self.work and not any(True for _ in self.evaluations_due()):
                yield from self._finish(True, "the run is finished")
        return False

    def _end_stage(self) -> bool:
        """All turns of the stage are done: merge what they left, or let the next ones go on from it."""
        if merges_after(self.config, self.stages, self.stage):
            self.phase = "merging"
        else:
            self._begin_stage(self.stage + 1)
        return True

    def _end_merge(self) -> Moves:
        if self.stage + 1 == len(self.stages):
            yield from self._close_round()
            self.phase = "validating"
            return True
        every = self.config.run.commit_every
        self._begin_stage(self.stage + 1)
        if every and self.stage % every == 0:
            yield self._store(
                Mark(
                    self.round,
                    self.stage,
                    tuple(self.stages),
                    frozenset(self.missed),
                    frozenset(self.moved),
                    deepcopy(self.books.rounds[self.round]),
                )
            )
        return True

    def _end_round(self) -> Moves:
        """Between two rounds: begin the next one as soon as that may be; after the last, test."""
        if self._may_begin():
            self._start_round()
            return True
        if not self.unsettled and self.trained:
            self.phase = "testing"
            return True
        if not self.unsettled and self.draining and self._is_kept():
            yield from self._finish(False, self.ended(self.draining))
        return False

    def _may_begin(self) -> bool:
        """Whether the next round can begin beside what is still to be done for the one before.

        In parallel training that is storing alone: an evaluation takes the clients' time. Early stopping needs both.
        """
        parallel = self.config.schedule.policy == "parallel"
        beside = 0 if parallel and (self.config.run.patience or self._evaluating()) else 1
        ready = self.plans.deciding is None and len(self.unsettled) <= beside
        return ready and not self.trained and not self.draining and self._enough()

    def _start_round(self) -> None:
        self.books.begin(self.round, self.now)
        self.plans.use(self.round)
        self.missed, self.moved = set(), set()
        if self.is_async:
            self.phase = "training"
            return
        clients = participants(self.config, self.round, self.eligible())
        self.stages = stages_of(self.config, clients, {client: self.steps(client) for client in clients})
        self._begin_stage(0)

    def _begin_stage(self, number: int) -> None:
        self.phase, self.stage, self.stage_began = "training", number, self.now

    def _close_round(self) -> Iterator[Instruction]:
        """The round's training is over: store its version, and plan anew where something moved."""
        ended = self.round
        self.books.trained(ended, self.now)
        self.unsettled[ended] = self.base()
        self.round += 1
        self.stages = []
        results = self.arrivals.mark(self._busy()) if self.is_async else None
        yield self._store(Mark(self.round, results=results))
        if not self.trained and self.plans.deciding is None:
            asked = self.plans.reconsider(self.round, self.books.rounds[ended])
            if asked:
                yield asked

    def _settle(self) -> Iterator[Instruction]:
        """Record the rounds whose version is stored and evaluated, in order."""
        evaluating = self._evaluating()
        for round_, version in list(self.unsettled.items()):
            if version.digest not in self.stored or round_ in evaluating:
                return
            del self.unsettled[round_]
            self.evaluated = {each for each in self.evaluated if each.round != round_ or each.part != "validation"}
            self.history.append(self.books.end(round_, version.digest, self.now))
            yield Announce(round_)

    def _evaluating(self) -> set[int]:
        """Return the rounds whose version is being evaluated, or is to be."""
        busy = {work.job.round for work in self.work.values() if isinstance(work.job, Evaluate)}
        return busy | {each.round for each, *_ in self.evaluations_due()}

    def _finish(self, ok: bool, sentence: str) -> Iterator[Instruction]:
        for lease in list(self.work):
            yield self._close(lease)
        self.phase = "finished"
        self.outcome = Finish(ok, sentence)
        yield self.outcome

    # Under `async`

    def _mix(self) -> Iterator[Instruction]:
        """Mix in what came, one result after the other, and let who is free begin again."""
        yield from self._end_arrivals()
        while self.phase == "training" and not self._is_open(Merge) and self.arrivals.next is not None:
            contribution, share = self.arrivals.next
            if share:
                yield self._open(self._merger((contribution,), share))
            else:
                self._count_turn(contribution.client)
                self.arrivals.discard()
                yield from self._end_arrivals()
        if self.phase == "training" and len(self.unsettled) <= 1 and self.servers():
            yield from self._begin_turns()

    def _busy(self) -> set[int]:
        return {work.job.client for work in self.work.values() if isinstance(work.job, Turn)}

    def _begin_turns(self) -> Iterator[Instruction]:
        """Open a turn for everybody who is free; who is away has its turns done by the others."""
        clients, rounds = self.config.schedule.clients, self.config.run.rounds
        for client in self.clients:
            busy = self._busy()
            begun = self.arrivals.turns.get(client, -1) + 1
            coming = self.arrivals.count + len(busy) + len(self.arrivals.contributions)
            open_to_all = self.away or self.config.schedule.elastic
            wanted = coming < rounds * clients and (begun < rounds or open_to_all)
            if wanted and client not in busy and not self.arrivals.waits(client):
                share = Share(client, 0, self.steps(client))
                turn = self._turn(share, self.least_loaded(), self.arrivals.begin(client))
                self.bases[turn.lease] = self.arrivals.versions
                yield self._open(turn)

    def _end_arrivals(self) -> Iterator[Instruction]:
        """End a round of results where as many came as there are clients; turns go on beside that."""
        if self.arrivals.count < (self.round + 1) * self.config.schedule.clients:
            return
        yield from self._close_round()
        if self.trained or self.draining:
            self.phase = "validating"
            for lease, work in list(self.work.items()):
                if isinstance(work.job, Turn):  # nobody waits for it any more (early stopping)
                    yield self._close(lease)
        else:
            self.books.begin(self.round, self.now)
            self.plans.use(self.round)

    # Parts of the above

    def _count_turn(self, client: int) -> None:
        """A turn is in a version now, or discarded as too old: from here on its figures count."""
        done = self.finished.pop(client)
        self.books.count(done.turn, done.client, done.server, self.round)

    def _is_kept(self) -> bool:
        """Whether the version is on the disk; one that was is stored again where its file turned out damaged."""
        return self.base().digest in self.stored

    def _store(self, mark: Mark) -> Store:
        """Have the version stored, and remember where training stood."""
        version = self.base()
        self.marks[version.digest] = mark
        self.archive.store(version)
        return Store(self.storing[version.digest])

    def _open(self, job: Job) -> Open:
        self.work[job.lease] = Work(job)
        self.books.opened(job, self.now)
        return Open(job)

    def _close(self, lease: Lease) -> Close:
        """End a lease, done or not. A turn under `async` that came to nothing is begun again."""
        work = self.work.pop(lease)
        self.books.closed(work.job, self.now, self.round)
        if self.bases.pop(lease, None) is not None:
            client = client_of(work.job)
            if client is not None:
                self.arrivals.again(client)
        return Close(work.job)

    def _lease(self) -> Lease:
        self.number += 1
        return Lease(self.epoch, self.number)
